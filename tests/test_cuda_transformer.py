"""A network whose programs run on a GPU, which the host plays here: the same as the host's own."""

import functools
import gc
import weakref
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import real_gpu
from cuda_twins import needs_compiler
from gguf import GGMLQuantizationType as Type
from gguf_writer import ROLES, GgufOptions, write_gguf
from golden_files import random_model
from host_gpu import HostGpu
from networks import open_network
from numpy.typing import NDArray
from test_fast import WHOLE_GROUPS, make_fast

from localv4.cuda import program
from localv4.cuda.gpu import Gpu
from localv4.cuda.offload import offload
from localv4.cuda.transformer import GpuTransformer
from localv4.kernels import row_operations
from localv4.kernels.row_operations import RowFormat
from localv4.kernels.team import Team
from localv4.model.expert_source import open_store
from localv4.model.fast import FastTransformer
from localv4.model.packing import pack_dense
from localv4.model.snapshot import restore, take_snapshot
from localv4.model.transformer import Transformer
from localv4.paging.options import PagingOptions

pytestmark = needs_compiler

SMALL = {
    **WHOLE_GROUPS.dims,
    "num_hidden_layers": 3,
    "compress_ratios": [0, 4, 128],
    "num_hash_layers": 1,
}
PRESET = replace(WHOLE_GROUPS, dims=SMALL)
RANDOM = np.random.default_rng(0)
IDS = RANDOM.integers(0, 300, 12)
PLENTY = 1 << 28
SMALL_LEAD = 0.03
"""Lead of the likeliest token in logits, whose deviation is 1.3 here, that rounding can turn."""


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    """A network of integer weights with an expert format of its own."""
    types = dict.fromkeys(set(ROLES.values()) - {"hc", "router", "ape"}, Type.Q8_0)
    types |= {"gate_up": Type.MXFP4, "down": Type.MXFP4, "embedding": Type.BF16}
    path = tmp_path_factory.mktemp("model") / "m.gguf"
    return open_network(write_gguf(random_model(PRESET), path, GgufOptions(types))[0])


@pytest.fixture(scope="module")
def fast(exact: Transformer) -> FastTransformer:
    """The same network on the host."""
    return make_fast(exact)


def new_gpu() -> Gpu:
    """A GPU: a real one where that is wanted."""
    return real_gpu.gpu() if real_gpu.IS_WANTED else HostGpu()


def on_gpu(
    network: Transformer,
    *,
    layers: int = 3,
    capacity: int = PLENTY,
    rows: RowFormat = row_operations.F32,
    gpu: Gpu | None = None,
    falls_back: bool = False,
) -> GpuTransformer:
    """The same network with its first layers on a GPU that has room for some experts."""
    return offload(
        gpu or new_gpu(),
        network.config,
        pack_dense(network.weights, 2),
        Team(2),
        lambda experts: open_store(experts, PagingOptions(PLENTY, "map", readers=2)),
        rows,
        layers=layers,
        capacity=capacity,
        falls_back=falls_back,
    )


def assert_close(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    """Values within the rounding of float32 sums in another order.

    Where that decides between two neighbouring int8, a token is off by what such a step makes,
    which can change the choice between two tokens that are almost equally likely.
    """
    distance = np.linalg.norm(actual - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert distance.max() < 0.05, distance
    second, first = np.sort(expected, axis=1)[:, -2:].T
    clear = first - second > SMALL_LEAD
    assert clear.any()
    np.testing.assert_array_equal(actual.argmax(1)[clear], expected.argmax(1)[clear])


Way = Callable[[FastTransformer], NDArray[np.float32]]


def read(*chunks: int) -> Way:
    """Return what processes the tokens in chunks and yields all logits."""

    def logits(network: FastTransformer) -> NDArray[np.float32]:
        state, rows, start = network.new_state(), [], 0
        for size in chunks:
            vectors = network.forward(IDS[start : start + size], state)
            rows.append(network.logits(vectors))
            start += size
        return np.concatenate(rows)

    return logits


def rows_together(network: FastTransformer) -> NDArray[np.float32]:
    """Read two beginnings, then decode a token of each together."""
    states = [network.new_state(), network.new_state()]
    network.forward(IDS[:5], states[0])
    network.forward(IDS[5:8], states[1])
    vectors = network.decode_rows(IDS[8:10], states)
    return network.logits(vectors)


def prompts_together(network: FastTransformer) -> NDArray[np.float32]:
    """Read the rest of two prompts in one chunk, then a token more of each."""
    states = [network.new_state(), network.new_state()]
    network.forward(IDS[:2], states[0])
    vectors = [network.forward_many(IDS[2:8], states, [2, 4])]
    vectors += [network.forward(IDS[8 + n : 9 + n], state) for n, state in enumerate(states)]
    return network.logits(np.concatenate(vectors))


def back_and_on(network: FastTransformer) -> NDArray[np.float32]:
    """Go back to a snapshot and on with other tokens."""
    state = network.new_state()
    network.forward(IDS[:5], state)
    snapshot = take_snapshot(state, 4)
    network.forward(IDS[5:8], state)
    restore(state, snapshot)
    network.forward(IDS[8:9], state)
    return network.logits(network.forward(IDS[9:10], state))


WAYS = {
    "chunk": read(6),
    "both": read(4, 1, 1),
    "rows": rows_together,
    "prompts": prompts_together,
    "back": back_and_on,
}


@pytest.fixture(scope="module")
def expected(fast: FastTransformer) -> dict[str, NDArray[np.float32]]:
    return {name: way(fast) for name, way in WAYS.items()}


@pytest.fixture(scope="module")
def whole(exact: Transformer) -> GpuTransformer:
    """All of the network on the GPU."""
    return on_gpu(exact)


@pytest.mark.parametrize("way", WAYS)
def test_all_on_the_gpu(
    whole: GpuTransformer, expected: dict[str, NDArray[np.float32]], way: str
) -> None:
    assert whole.vram.is_whole
    assert_close(WAYS[way](whole), expected[way])


@pytest.mark.parametrize("way", ["both", "rows"])
def test_one_launch_or_several_give_the_same_bits(
    exact: Transformer, whole: GpuTransformer, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = WAYS[way](whole)
    monkeypatch.setattr(program, "merge", list)
    np.testing.assert_array_equal(WAYS[way](on_gpu(exact)), expected)


@pytest.fixture(scope="module")
def mixed(exact: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    """The network with experts in one layer that have no packed form."""
    types = dict.fromkeys(set(ROLES.values()) - {"hc", "router", "ape"}, Type.Q8_0)
    types |= {"gate_up": Type.F32, "down": Type.F32, "embedding": Type.BF16}
    path = tmp_path_factory.mktemp("mixed") / "m.gguf"
    stored = open_network(write_gguf(random_model(PRESET), path, GgufOptions(types))[0])
    first, second, third = exact.weights.layers
    second = replace(second, experts=stored.weights.layers[1].experts)
    weights = replace(exact.weights, layers=(first, second, third))
    return Transformer(exact.config, weights, exact.numerics)


@pytest.mark.parametrize("layers", [3, 1])
@pytest.mark.parametrize("way", WAYS)
def test_experts_without_a_packed_form_are_the_hosts(
    mixed: Transformer, layers: int, way: str
) -> None:
    network = on_gpu(mixed, layers=layers)
    assert network.vram.is_whole and (layers == 1 or not network.vram.resident[1].any())
    assert_close(WAYS[way](network), WAYS[way](make_fast(mixed)))
    if layers == 3 and way == "both":
        k = mixed.config.experts_per_token
        assert network.vram.counts.misses.tolist() == [0, k * network.vram.counts.tokens, 0]


def test_parts_of_a_product_as_one_or_apart_give_the_same_bits(
    exact: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, apart = HostGpu(), HostGpu()
    expected = WAYS["chunk"](on_gpu(exact, gpu=together))
    monkeypatch.setattr(program, "as_series", lambda group, is_steady: group)
    np.testing.assert_array_equal(WAYS["chunk"](on_gpu(exact, gpu=apart)), expected)
    assert together.launches < apart.launches


@pytest.mark.parametrize("way", ["both", "rows"])
def test_routes_are_those_of_the_host(
    fast: FastTransformer, whole: GpuTransformer, way: str
) -> None:
    told: list[list[tuple[NDArray[np.integer], bool]]] = []
    for network in (fast, whole):
        routes: list[tuple[NDArray[np.integer], bool]] = []
        network.on_routes = lambda chosen, prompt, own=routes: own.append((chosen.copy(), prompt))
        WAYS[way](network)
        network.on_routes = None
        told.append(routes)
    assert len(told[0]) == len(told[1]) > 1
    for (expected, was_prompt), (actual, is_prompt) in zip(*told, strict=True):
        assert is_prompt == was_prompt
        np.testing.assert_array_equal(np.sort(actual, -1), np.sort(expected, -1))


@pytest.fixture(scope="module")
def some(exact: Transformer) -> GpuTransformer:
    """Room for few experts on the GPU."""
    record = int(exact.weights.layers[0].experts[0].w1.data.nbytes) * 3
    return on_gpu(exact, capacity=4 * max(record, 1 << 16))


@pytest.mark.parametrize("way", WAYS)
def test_experts_on_both_give_the_same_bits(
    whole: GpuTransformer, some: GpuTransformer, way: str
) -> None:
    assert not some.vram.is_whole and some.vram.resident.any()
    actual, expected = WAYS[way](some), WAYS[way](whole)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layers", [1, 2])
def test_layers_on_both(
    exact: Transformer, expected: dict[str, NDArray[np.float32]], layers: int, way: str
) -> None:
    assert_close(WAYS[way](on_gpu(exact, layers=layers)), expected[way])


def test_hot_experts_come_to_the_gpu(some: GpuTransformer) -> None:
    state = some.new_state()
    for token in np.tile(IDS[:1], 4):
        some.forward(np.array([token]), state)
    some.vram.wait(2, np.flatnonzero(some.vram.addresses[2] < 0).tolist())
    last = some.vram.uses.last == some.vram.uses.clock
    assert some.vram.resident[last].any()


def test_without_memory_the_host_goes_on(
    exact: Transformer, expected: dict[str, NDArray[np.float32]]
) -> None:
    if real_gpu.IS_WANTED:
        pytest.skip("nobody fills the memory of a real GPU")
    gpu = HostGpu()
    network = on_gpu(exact, gpu=gpu, falls_back=True)
    gpu.total_bytes = 0
    assert_close(read(4, 1, 1)(network), expected["both"])
    assert network.warning is not None and "CPU goes on alone" in network.warning


def test_without_memory_a_wanted_gpu_is_an_error(exact: Transformer) -> None:
    from localv4.errors import DoesNotFitError

    if real_gpu.IS_WANTED:
        pytest.skip("nobody fills the memory of a real GPU")
    gpu = HostGpu()
    network = on_gpu(exact, gpu=gpu)
    gpu.total_bytes = 0
    with pytest.raises(DoesNotFitError, match="not enough free memory"):
        network.forward(IDS[:2], network.new_state())


def test_a_forgotten_network_leaves_no_thread(exact: Transformer) -> None:
    network = on_gpu(exact)
    threads = [weakref.ref(thread) for thread in network.vram.readers._threads]
    read(2)(network)
    del network
    gc.collect()
    assert not any(thread() is not None and thread().is_alive() for thread in threads)


UPLOADS = {
    "host": lambda *_: False,
    "uploads": lambda *_: True,
    "some": lambda both, under_way, slots: under_way < 1,
}


@pytest.mark.parametrize("way", ["chunk", "rows"])
@pytest.mark.parametrize("uploads", UPLOADS)
def test_it_does_not_matter_who_computes_what_the_gpu_lacks(
    exact: Transformer,
    whole: GpuTransformer,
    way: str,
    uploads: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = on_gpu(exact, capacity=8 * int(whole.vram.nbytes.max()))
    both = few._on_gpu.prompt_experts
    monkeypatch.setattr(both, "may_upload", functools.partial(UPLOADS[uploads], both))
    bytes_before = sum(few.vram.counts.bytes.values())
    np.testing.assert_array_equal(WAYS[way](few), WAYS[way](whole))
    uploaded = sum(few.vram.counts.bytes.values()) - bytes_before
    assert (uploaded > 0) == (uploads != "host")
    assert (both.unit.seconds is not None) or uploads == "uploads"
