"""The same tokens always: whatever is in memory, however it gets there, whatever goes wrong."""

import ctypes
import gc
import itertools
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from conversions import pack_folder

if os.environ.get("NUMBA_DISABLE_JIT") == "1":
    pytest.skip("packed kernels need the compiler", allow_module_level=True)

from localv4.engine.session import Session
from localv4.kernels.compiler import compile_kernels
from localv4.kernels.team import Team
from localv4.library.installed import embedded_model_path
from localv4.model.expert_source import open_store
from localv4.model.experts import Experts
from localv4.model.fast import FastTransformer
from localv4.model.loading import read_model_config, read_names, read_weights
from localv4.model.packing import families, pack_dense
from localv4.paging.arena import GRANULE_BYTES, Arena
from localv4.paging.faults import Faults
from localv4.paging.options import PagingOptions
from localv4.paging.paged_store import PagedStore
from localv4.paging.policy import make_policy
from localv4.paging.readers import ReadError, Readers
from localv4.paging.store import ExpertStore
from localv4.paging.uses import Uses
from localv4.storage import Checkpoint, open_checkpoint

PROMPT = np.random.default_rng(3).integers(0, 400, 70).tolist()
TOKENS = 14
BUDGETS = ("least", 0.25, 0.5, 1.0)


class Source:
    """A model with its dense weights packed, from which networks with any store are made."""

    def __init__(self, path: Path) -> None:
        self.checkpoint: Checkpoint = open_checkpoint(path)
        table = read_names(self.checkpoint)
        self.config = read_model_config(self.checkpoint, table)
        weights = read_weights(self.checkpoint, table, self.config)
        compile_kernels(families(weights))
        self.weights = pack_dense(weights, 2, copies=True)
        self.nbytes = Experts([layer.experts for layer in self.weights.layers]).nbytes

    def budget(self, share: str | float) -> int:
        """The bytes of a budget; the least is one and a half times what a token needs."""
        if share == "least":
            token = self.config.experts_per_token * int(self.nbytes[:, 0].sum())
            return token + token // 2
        return int(float(share) * self.nbytes.sum())

    def network(self, options: PagingOptions) -> FastTransformer:
        """A network that pages."""

        def make_store(experts: Experts) -> ExpertStore:
            return open_store(experts, options, self.checkpoint)

        return FastTransformer(
            self.config, self.weights, Team(2), make_store, looks_ahead=options.prefetch
        )


@pytest.fixture(scope="module", params=["official", "packed"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """The embedded model, as it is published and as a packed folder."""
    path = embedded_model_path()
    if request.param == "packed":
        target = tmp_path_factory.mktemp("packed")
        with open_checkpoint(path) as checkpoint:
            pack_folder(checkpoint, target)
        path = target
    return Source(path)


def generate(network: FastTransformer) -> list[int]:
    """Greedy tokens after a prompt."""
    session, found = Session(network, 4096), list[int]()
    logits = session.extend(PROMPT)
    for _ in range(TOKENS):
        found.append(int(logits.argmax()))
        logits = session.extend(found[-1:])
    return [*found, int(logits.view(np.uint32).sum())]  # and every bit of the last logits


@pytest.fixture(scope="module")
def expected(source: Source) -> list[int]:
    """What comes out when everything is in memory."""
    network = source.network(PagingOptions(1 << 40, "map"))
    tokens = generate(network)
    network.close()
    return tokens


WAYS = list(itertools.product(BUDGETS, ("map", "direct", "buffered"), (1, 8), (True, False)))


@pytest.mark.parametrize(("share", "io", "readers", "prefetch"), WAYS)
def test_budget_io_readers_and_prefetch_change_no_token(
    source: Source,
    expected: list[int],
    share: str | float,
    io: str,
    readers: int,
    prefetch: bool,
) -> None:
    budget = source.budget(share)
    network = source.network(PagingOptions(budget, io, readers, prefetch=prefetch))  # type: ignore[arg-type]
    assert generate(network) == expected
    if isinstance(network.store, PagedStore):
        counts = network.store.counts
        assert (counts.evictions > 0) == (share != 1.0)
        assert network.store.arena.used <= network.store.arena.capacity
        assert prefetch or counts.guesses == 0
    network.close()


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_policies_change_no_token(source: Source, expected: list[int], policy: str) -> None:
    budget = source.budget(0.25)
    network = source.network(PagingOptions(budget, "direct", policy=policy))  # type: ignore[arg-type]
    assert generate(network) == expected
    network.close()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("io", ["direct", "buffered"])
def test_a_bad_disk_changes_no_token(
    source: Source, expected: list[int], io: str, seed: int
) -> None:
    faults = Faults(seed, short=0.3, eio_once=0.2, delay_s=0.002, reorder=True)
    budget = source.budget(0.25)
    network = source.network(PagingOptions(budget, io, 4, faults=faults))  # type: ignore[arg-type]
    assert generate(network) == expected
    assert faults.counts["eio"] > 5 and faults.counts["short"] > 0
    network.close()


def test_a_broken_place_ends_the_request_and_nothing_else(
    source: Source, expected: list[int]
) -> None:
    experts = Experts([layer.experts for layer in source.weights.layers])
    expert = experts.layers[3][5]
    part = expert.record if hasattr(expert, "record") else expert.w2.data
    path, offset = source.checkpoint.place_of(part)
    faults = Faults(0, broken=((path.name, offset),))
    network = source.network(PagingOptions(source.budget(0.5), "direct", faults=faults))
    with pytest.raises(ReadError) as failed:
        generate(network)
    assert failed.value.exit_code == 1
    line = str(failed.value)
    assert "expert 5 of layer 3" in line and path.name in line and str(offset) in line
    faults.broken = ()
    assert generate(network) == expected
    network.close()


def test_memory_that_others_need_changes_no_token(source: Source, expected: list[int]) -> None:
    network = source.network(PagingOptions(source.budget(1.0), "direct"))
    store = network.store
    assert isinstance(store, PagedStore)
    session, found = Session(network, 4096), list[int]()
    logits = session.extend(PROMPT)
    for step in range(TOKENS):
        found.append(int(logits.argmax()))
        logits = session.extend(found[-1:])
        if step in (3, 6):
            before = store.arena.capacity
            store.change_memory(-before // 3)
            assert store.arena.capacity < before and store.arena.used <= store.arena.capacity
        if step == 9:
            store.change_memory(source.budget(0.3))
    assert [*found, int(logits.view(np.uint32).sum())] == expected
    network.close()


def test_most_guesses_come_true(source: Source) -> None:
    # of an arbitrary half of the experts a guess would be right four times of sixteen
    network = source.network(PagingOptions(source.budget(0.5), "direct"))
    session = Session(network, 4096)
    logits = session.extend(PROMPT)
    for _ in range(20):  # some of them without guesses: both ways are compared
        logits = session.extend([int(logits.argmax())])
    assert isinstance(network.store, PagedStore)
    counts = network.store.counts
    assert counts.guesses > 20 and counts.guesses_used > 0.4 * counts.guesses
    network.close()


def test_a_forgotten_network_leaves_no_thread(source: Source) -> None:
    network = source.network(PagingOptions(source.budget(0.5), "direct"))
    generate(network)
    assert "reader-0" in {thread.name for thread in threading.enumerate()}
    del network
    gc.collect()
    assert "reader-0" not in {thread.name for thread in threading.enumerate()}


def test_records_of_several_sizes_share_an_arena() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.choice([3, 4, 7], (4, 20)).astype(np.int64) * GRANULE_BYTES
    written: dict[tuple[int, int], int] = {}

    def load(key: tuple[int, int], address: int) -> int:
        nbytes = int(sizes[key])
        ctypes.memset(address, hash(key) % 251, nbytes)
        written[key] = address
        return nbytes

    uses = Uses(4, 20)
    arena = Arena(int(0.4 * sizes.sum()))
    store = PagedStore(sizes, arena, Readers(load, 3), make_policy("decay", uses), uses)
    for _ in range(300):
        uses.clock += 1
        for layer in range(4):
            numbers = rng.permutation(20)[:3]
            store.request(layer, numbers.tolist())
            while (store.addresses[layer, numbers] <= 0).any():
                store.wait(layer, numbers.tolist())
            uses.record(layer, numbers)
            for key in zip([layer] * 3, numbers.tolist(), strict=True):
                address, nbytes = int(store.addresses[key]), int(sizes[key])
                held = ctypes.string_at(address, nbytes)
                assert held == bytes([hash(key) % 251]) * nbytes
            assert arena.used <= arena.capacity
        store.end_token()
    resident = store.addresses > 0
    assert arena.used == sizes[resident].sum() > 0.7 * arena.capacity
    store.close()
