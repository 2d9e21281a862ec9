"""Who computes the experts of a prompt that a GPU lacks: by how long both devices take."""

import numpy as np
import pytest
import real_gpu
from cuda_twins import needs_compiler
from host_gpu import HostGpu, _Lane
from test_cuda_transformer import exact as exact
from test_cuda_transformer import on_gpu

from localv4.cuda.prompt_experts import READ_SLOTS, Pace, PromptExperts, runs_of, units
from localv4.cuda.vram_store import copiers_of
from localv4.model.transformer import Transformer


def test_neighbours_are_computed_together() -> None:
    assert runs_of([5, 1, 2, 9, 3]) == [range(1, 4), range(5, 6), range(9, 10)]
    assert runs_of([]) == []


def test_an_upload_has_to_be_there_before_the_host_is_ready() -> None:
    both = PromptExperts.__new__(PromptExperts)
    both.upload, both.unit = Pace(), Pace()
    assert both.may_upload(9, []), "as long as nobody knows"
    both.upload.note(3e-3)
    both.unit.note(1e-3)
    assert units(READ_SLOTS) == 2
    few, many = [0] * 5, [4 * READ_SLOTS] * 5  # 5 and 25 ms of the host
    assert [both.may_upload(n, few) for n in (0, 1)] == [True, False]
    assert [both.may_upload(n, many) for n in (7, 8)] == [True, False]
    assert not both.may_upload(0, []), "the last one is the host's own"
    for _ in range(20):
        both.upload.note(0.1e-3)
    assert both.may_upload(40, few), "what was slow at first is forgotten"


@pytest.mark.parametrize(("threads", "copiers"), [(1, 0), (3, 0), (4, 1), (16, 4), (64, 6)])
def test_few_threads_copy_where_others_compute(threads: int, copiers: int) -> None:
    assert copiers_of(threads) == copiers


@needs_compiler
@pytest.mark.skipif(real_gpu.IS_WANTED, reason="looks into the GPU that the host plays")
def test_a_copy_waits_for_all_that_may_read_its_place(
    exact: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = HostGpu()
    network = on_gpu(exact, gpu=gpu, capacity=4 << 16)
    store, followed = network.vram, list[int]()
    monkeypatch.setattr(_Lane, "follow", lambda _, mark: followed.append(mark))
    network.forward(np.arange(3), network.new_state())
    followed.clear()
    launches = gpu.launches
    layer, number = np.argwhere(store.addresses == 0)[0].tolist()
    store.claim(layer, [number])
    while store.addresses[layer, number] <= 0:
        store.wait(layer, [number])
    store.release(layer, [number])
    assert followed and set(followed) == {launches}
