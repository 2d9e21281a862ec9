"""The benchmark: what it counts, what it runs, and that its figures follow from its samples."""

import mmap
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from gguf_writer import GgufOptions, write_gguf
from golden.presets import Preset
from golden_files import random_model
from networks import open_network, wide_network
from numpy.typing import NDArray
from terminal import needs_jit
from test_sources import SUPERBLOCKS

from localv4.cli.description import describe
from localv4.engine import benchmark, contender, machine
from localv4.engine.benchmark import Benchmark
from localv4.engine.contender import OwnEngine
from localv4.engine.engine import Engine
from localv4.engine.machine import CpuTimes
from localv4.engine.measurement import Case, Measurement, Memory, PeerResult, Sample, Series
from localv4.engine.peer import Peer, PeerContext, PeerError, PeerRun
from localv4.engine.session import Session
from localv4.engine.setup import Setup
from localv4.errors import Cancelled, DoesNotFitError, UsageError
from localv4.library import installed
from localv4.model import traffic
from localv4.model.config import LayerKind, ModelConfig
from localv4.model.matrix import Matrix
from localv4.model.packing import PackedMatrix, expert_form, pack_dense
from localv4.model.transformer import Transformer
from localv4.planning import processor
from localv4.planning.roofs import Roof

# every matrix has whole groups of sixteen rows
WHOLE_GROUPS = Preset("groups", {**SUPERBLOCKS.dims, "vocab_size": 304}, length=0, seed=1)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    """All layer kinds, official storage types."""
    return wide_network(tmp_path_factory.mktemp("wide"))


@pytest.fixture(scope="module")
def engine() -> Engine:
    """The built-in model."""
    return Engine.load(installed.embedded_model_path(), Setup(threads=1, numerics="exact"))


def matrices_of_a_token(
    network: Transformer, monkeypatch: pytest.MonkeyPatch, depth: int
) -> list[Matrix]:
    """Decode one token and return every matrix that was multiplied, an entry a product."""
    session, used = Session(network, 1000), []
    session.extend([1] * depth)
    linear = network.numerics.linear

    def note(x: NDArray[Any], weight: Matrix, groups: int = 1) -> NDArray[Any]:
        used.append(weight)
        return linear(x, weight, groups)

    monkeypatch.setattr(network.numerics, "linear", note)
    session.extend([2])
    return used


def test_bytes_are_those_of_the_matrices_that_a_token_uses(
    network: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = traffic.weight_bytes(network.weights, network.config, packs_experts=False)
    used = matrices_of_a_token(network, monkeypatch, depth=9)
    vectors = sum(counted.values()) - counted["embedding row"] - sum(m.nbytes for m in used)
    # all that is left are norms, sinks and the like: some vectors of float32 for each layer
    assert 0 < vectors < 64 * 4 * network.config.hidden_size * network.config.n_layers
    assert counted["head"] == used[-1].nbytes == network.weights.head.nbytes
    assert counted["embedding row"] * network.config.vocab_size == network.weights.embed.nbytes
    routed = {id(m) for x in network.weights.layers for e in x.experts for m in (e.w1, e.w2, e.w3)}
    assert counted["routed experts"] == sum(m.nbytes for m in used if id(m) in routed)


def test_multiplications_are_those_of_a_token(
    network: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = matrices_of_a_token(network, monkeypatch, depth=9)
    body = traffic.multiplications(network.weights, network.config)
    head = traffic.head_multiplications(network.weights)
    assert body + head == sum(m.rows * m.cols for m in used)


def test_parts_add_up_to_the_file(tmp_path: Path) -> None:
    model = random_model(WHOLE_GROUPS)
    path, _ = write_gguf(model, tmp_path / "m.gguf", GgufOptions())
    network = open_network(path)
    config = replace(network.config, experts_per_token=network.config.n_experts)
    counted = traffic.weight_bytes(network.weights, config, packs_experts=False)
    described = describe(installed.resolve(str(path)))
    stored = sum(tensor.nbytes for tensor in described.tensors)
    weights = network.weights
    unread = weights.embed.nbytes - counted["embedding row"]
    for layer in weights.layers:
        inner = layer.attention.indexer.compressor if layer.attention.indexer else None
        for part in (layer.attention.compressor, inner):
            unread += part.ape[1:].nbytes if part is not None else 0
        if layer.router.table is not None:  # stored as int32, held as int64
            row = layer.router.table.shape[1]
            unread += 4 * layer.router.table.size - 8 * row
    assert sum(counted.values()) + unread == stored
    assert traffic.parameters(weights) == described.parameters


@needs_jit
def test_packed_weights_count_in_their_packed_form(network: Transformer) -> None:
    packed = pack_dense(network.weights, threads=1)
    counted = traffic.weight_bytes(packed, network.config, packs_experts=True)
    experts = 0
    for layer in packed.layers:
        form = expert_form(layer.experts[0])
        assert form is not None
        experts += network.config.experts_per_token * form.nbytes
    assert counted["routed experts"] == experts
    shared = [m for x in packed.layers for m in (x.shared.w1, x.shared.w2, x.shared.w3)]
    sizes = 0
    for matrix in shared:
        assert isinstance(matrix, PackedMatrix) and matrix.scales is not None
        sizes += matrix.packed.nbytes + matrix.scales.nbytes
    assert counted["shared experts"] == sizes


@pytest.mark.parametrize(
    ("position", "rows"),
    [
        (0, 3 * 1 * 16),  # the token's own row in three windows
        (9, 3 * 8 * 16 + 2 * 16),  # two entries of 4 tokens, all taken without scoring
        (19, 3 * 8 * 16 + 3 * 16 + 5 * 6 + 1 * 16),  # three of five scored entries, one of 20
    ],
)
def test_state_bytes(network: Transformer, position: int, rows: int) -> None:
    kinds = (LayerKind.SLIDING, LayerKind.CSA, LayerKind.HCA)
    config: ModelConfig = replace(
        network.config,
        layer_kinds=kinds,
        ratios=(0, 4, 20),
        window=8,
        head_dim=16,
        index_head_dim=6,
        index_top_k=3,
    )
    pooling = 2 * (2 * 16 + 2 * 6) + 2 * 16
    assert traffic.state_bytes(config, [position]) == 4 * (rows + pooling)
    assert traffic.state_bytes(config, [position, position]) == 4 * (rows + pooling)


def test_plan() -> None:
    found = benchmark.plan([512, 512], [0, 128], [0, 400], ctx_size=600)
    assert [case.name for case in found.fitting] == ["pp512", "tg128", "tg128 @ d400"]
    assert [case.name for case in found.skipped] == ["pp512 @ d400"]
    assert benchmark.plan([], [128], [400], ctx_size=528).skipped == ()
    with pytest.raises(DoesNotFitError, match="takes 528 tokens, the context holds 527"):
        benchmark.plan([], [128], [400, 500], ctx_size=527)
    with pytest.raises(UsageError):
        benchmark.plan([0], [0], [0], ctx_size=600)


def test_the_trace_never_changes() -> None:
    tokens = benchmark.trace(300, 5000)
    assert tokens[:100] == benchmark.trace(300, 100)
    assert min(tokens) == 0 and max(tokens) == 299
    assert benchmark.trace(8192, 3) == [34, 5039, 8060]


MEMORY = Memory(peak=7, parts={"state": 2, "rest": 3})


def series(tokens: int, *pairs: tuple[float, float]) -> Series:
    """Return a series of samples given as (seconds, foreign cores)."""
    return Series(tokens, tuple(Sample(seconds, cores) for seconds, cores in pairs))


def test_figures_follow_from_the_samples() -> None:
    roofs = (Roof(100e9, 1e12), Roof(200e9, 2e12))
    own = series(40, (1, 0.0), (2, 0.5), (4, 0.01))
    assert own.rates == (40, 20, 10)
    assert own.mean == pytest.approx(70 / 3)
    assert (own.median, own.clean, own.clean_median) == (20, 2, 25)
    assert own.stdev == pytest.approx(15.2753, abs=1e-4)
    assert series(40, (1, 0.5)).stdev == 0
    assert series(40, (1, 0.5)).clean_median is None
    tg = Measurement(Case("tg", 40, 0), own, roofs, int(2e9), 0, int(5e9), MEMORY)
    assert (tg.read_bytes_s, tg.read_share, tg.int8_share) == (40e9, 0.2, None)
    assert tg.roof_rate == 100
    pp = replace(tg, case=Case("pp", 40, 0))
    assert (pp.read_bytes_s, pp.read_share, pp.int8_share) == (None, None, 0.1)
    assert pp.roof_rate is None
    assert MEMORY.total == 5


def test_ratios() -> None:
    own = series(40, (1, 0.0), (2, 0.0), (4, 0.5))
    case, roofs = Case("tg", 40, 0), (Roof(1, 1), Roof(1, 1))
    alone = Measurement(case, own, roofs, 1, 0, 1, MEMORY)
    assert (alone.ratio, alone.clean_ratio) == (None, None)
    theirs = series(40, (4, 0.0), (8, 0.5), (8, 0.5))
    against = replace(alone, peer=PeerResult(theirs, None))
    assert (against.ratio, against.clean_ratio) == (20 / 5, 30 / 10)
    never_clean = replace(alone, peer=PeerResult(series(40, (4, 0.5)), None))
    assert (never_clean.ratio, never_clean.clean_ratio) == (2, None)
    failed = replace(alone, peer=PeerResult(None, "it crashed"))
    assert (failed.ratio, failed.clean_ratio) == (None, None)


def test_agreement() -> None:
    logits = np.array([1, 2, 3], np.float32)
    assert contender.agreement(logits, 2 * logits + 1) == pytest.approx(1)
    assert contender.agreement(logits, -logits) == pytest.approx(-1)
    assert contender.agreement(logits, logits[:2]) is None
    assert contender.agreement(None, logits) is None


@pytest.mark.parametrize(("available", "together"), [(34, True), (25, True), (20, False)])
def test_two_engines_share_memory(available: int, together: bool) -> None:
    gib = 1 << 30
    assert benchmark.fit_together(10 * gib, available * gib) == together
    with pytest.raises(DoesNotFitError, match=r"about 13.0 GiB .* 12.9 GiB are free"):
        benchmark.fit_together(10 * gib, int(12.9 * gib))


@needs_jit
def test_run(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    extend = Session.extend

    def note(self: Session, ids: list[int], **options: Any) -> NDArray[Any]:
        calls.append((self.position, len(ids)))
        logits = extend(self, ids, **options)
        assert self.tokens == benchmark.trace(engine.config.vocab_size, self.position)
        return logits

    monkeypatch.setattr(Session, "extend", note)
    steps: list[str] = []
    runner = Benchmark(
        engine, repeats=2, roof_bytes=1 << 20, on_step=lambda *step: steps.append(step[0])
    )
    cases = (Case("tg", 2, 0), Case("pp", 300, 7), Case("tg", 2, 7))
    found = list(runner.run(cases))
    assert [measurement.case for measurement in found] == list(cases)
    generated = [(0, 1), (1, 1)] * 3
    # 300 tokens are too many to go back for free: the seven before them are read again
    read = [(2, 5), (7, 300), *[(0, 7), (7, 300)] * 2]
    assert calls == [*generated, *read, (0, 7), *[(7, 1), (8, 1)] * 3]
    for measurement in found:
        assert len(measurement.own.samples) == 2
        assert measurement.own.median > 0
        assert measurement.memory.parts["mapped weights"] > 0 or sys.platform == "darwin"
        assert measurement.memory.total <= measurement.memory.peak + (64 << 20)
        assert min(roof.read_bytes_s for roof in measurement.roofs) > 1e8
        assert min(roof.int8_ops_s for roof in measurement.roofs) > 1e8
    assert found[0].token_bytes < found[2].token_bytes
    assert found[0].token_bytes - found[0].state_bytes == sum(runner.weight_bytes.values())
    assert {"tg2", "tg2: warming up", "pp300 @ d7: going to depth 7"} <= set(steps)


class Rival:
    """Stands for the process of llama.cpp; `fails` names the calls that go wrong."""

    def __init__(self, calls: list[str], fails: Sequence[str] = ()) -> None:
        self.calls, self.fails = calls, fails
        self.pid: int | None = os.getpid()

    def load(self, path: Path, threads: int) -> None:
        assert (path.suffix, threads) == (".safetensors", 1)
        self._note("load")

    def open(self, kind: str, depth: int, tokens: Sequence[int]) -> PeerContext:
        assert list(tokens) == benchmark.trace(tokens_in_vocabulary(), depth + 2)
        self._note(f"open {kind} @ {depth}")
        return PeerContext(1, 2, 3, "off")

    def prepare(self) -> None:
        self._note("prepare")

    def run(self, *, logits: bool = False) -> PeerRun:
        self._note("warm up" if logits else "run")
        values = np.arange(tokens_in_vocabulary(), dtype=np.float32)
        if "nan" in self.fails:
            values[0] = np.nan
        return PeerRun(0.5, 123, values if logits else None)

    def close(self) -> None:
        self.calls.append("close")

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if call in self.fails:
            self.pid = None
            raise PeerError(f"{call} crashed")


@cache
def tokens_in_vocabulary() -> int:
    """Return the number of tokens that the built-in model knows."""
    return Engine.load(installed.embedded_model_path(), Setup(threads=1)).config.vocab_size


def compare(
    load: Callable[[], Engine], rival: Rival, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> list[Measurement]:
    """Compare with a rival in two tests of two tokens, twice each; note our own samples too."""
    sample = OwnEngine.sample

    def note(self: OwnEngine) -> None:
        rival.calls.append("ours")
        sample(self)

    monkeypatch.setattr(OwnEngine, "sample", note)
    peer = cast(Peer, rival)
    runner = Benchmark(load(), repeats=2, roof_bytes=1 << 20, peer=peer, **options)
    return list(runner.run([Case("pp", 2, 0), Case("tg", 2, 3)]))


@needs_jit
def test_engines_take_turns(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    found = compare(lambda: engine, Rival(calls), monkeypatch)
    theirs = ["prepare", "run"]
    turns = ["prepare", "warm up", "ours", *theirs, *theirs, "ours"]
    assert calls == ["load", "open pp @ 0", *turns, "open tg @ 3", *turns]
    for measurement in found:
        assert measurement.peer is not None and measurement.peer.series is not None
        assert measurement.peer.series.median == 4
        assert measurement.peer.peak_bytes == 123
        assert measurement.peer.context == PeerContext(1, 2, 3, "off")
        assert measurement.peer.agreement is not None
        assert measurement.ratio == measurement.own.median / 4
        assert len(measurement.roofs) == 2


@needs_jit
def test_one_engine_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    path = installed.embedded_model_path()
    engines: list[weakref.ref[Engine]] = []

    class Alone(Rival):
        def load(self, path: Path, threads: int) -> None:
            assert all(engine() is None for engine in engines)
            super().load(path, threads)

    def load() -> Engine:
        engine = Engine.load(path, Setup(threads=1))
        engines.append(weakref.ref(engine))
        calls.append("load ours")
        return engine

    found = compare(load, Alone(calls), monkeypatch, reload=load)
    theirs = ["prepare", "warm up", "prepare", "run", "prepare", "run"]
    assert calls == [
        *("load ours", "close", "ours", "ours", "load", "open pp @ 0", *theirs),
        # who is in memory begins the next test
        *("open tg @ 3", *theirs, "close", "load ours", "ours", "ours"),
    ]
    assert [len(measurement.roofs) for measurement in found] == [3, 3]


@needs_jit
@pytest.mark.parametrize(
    ("fails", "problems", "loads"),
    [
        (["run"], ["run crashed", "run crashed"], 2),
        (["open tg @ 3"], [None, "open tg @ 3 crashed"], 1),
        (["load"], ["load crashed", "load crashed"], 1),
        (["nan"], ["llama.cpp: its logits are not finite"] * 2, 1),
    ],
)
def test_faults_of_the_peer_are_noted(
    fails: list[str],
    problems: list[str | None],
    loads: int,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rival = Rival([], fails)
    found = compare(lambda: engine, rival, monkeypatch)
    assert [m.peer.problem for m in found if m.peer is not None] == problems
    assert rival.calls.count("load") == loads
    for measurement, problem in zip(found, problems, strict=True):
        assert measurement.peer is not None
        assert (measurement.peer.series is None) == (problem is not None)
        assert len(measurement.own.samples) == 2


@needs_jit
def test_it_can_be_stopped(engine: Engine) -> None:
    stop = threading.Event()
    runner = Benchmark(engine, repeats=1, pause_s=600, roof_bytes=1 << 20, cancelled=stop)
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(Cancelled):
        next(runner.run([Case("tg", 1, 0)]))


def test_foreign_cores() -> None:
    before = CpuTimes(wall_s=10, own_s=5, busy_s=100, stolen_s=1)
    after = CpuTimes(wall_s=14, own_s=9, busy_s=106, stolen_s=2)
    assert machine.foreign_cores(before, after) == pytest.approx((6 - 4 + 1) / 4)
    quiet = replace(after, busy_s=103, stolen_s=1)  # clocks of different grain
    assert machine.foreign_cores(before, quiet) == 0
    now = machine.cpu_times()
    assert 0 < now.own_s <= now.busy_s + 1
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        assert machine.cpu_times(other.pid).own_s < now.own_s
        other.communicate(b"\n")
    with pytest.raises(ProcessLookupError):
        machine.cpu_times(other.pid)


def test_memory_of_this_process(tmp_path: Path) -> None:
    size = 64 << 20
    before = machine.resident_bytes()
    held = np.ones(size, np.uint8)
    assert machine.resident_bytes() - before > size // 2
    del held
    assert machine.peak_resident_bytes() > before + size // 2
    assert machine.peak_resident_bytes() >= machine.resident_bytes() - (8 << 20)
    path = tmp_path / "mapped"
    path.write_bytes(bytes(1 << 20))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        assert sum(view[::4096]) == 0
        found = machine.resident_file_bytes([path])
    assert found == (None if sys.platform == "darwin" else 1 << 20)


def test_machine_facts_name_nobody(tmp_path: Path) -> None:
    facts = machine.machine_facts()
    assert facts["cpu"] and facts["isa"] and facts["ram_bytes"]
    versions = {"localv4", "python", "numpy", "numba", "llvmlite"}
    assert set(facts) - versions == {
        *("cpu", "isa", "physical_cores", "logical_cores", "ram_bytes", "os", "architecture")
    }
    assert str(Path.home()) not in str(facts)
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nmodel name\t: Some CPU @ 2 GHz\nmodel name: other\n")
    assert processor._linux_cpu_name(info) == "Some CPU @ 2 GHz"
    assert processor._linux_cpu_name(tmp_path / "none") is None
