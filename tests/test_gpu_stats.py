"""What is counted of a GPU's part in an answer, with a GPU that the host plays."""

from pathlib import Path

import pytest
from cuda_twins import needs_compiler
from host_gpu import HostGpu

from localv4 import paths
from localv4.cli.generation import gpu_lines
from localv4.cli.loading import Loaded
from localv4.cuda import offload
from localv4.cuda.options import GpuOptions
from localv4.cuda.tier_counts import TierCounts
from localv4.cuda.transformer import GpuTransformer
from localv4.engine import devices
from localv4.engine.engine import Engine
from localv4.engine.gpu_stats import GpuStats, Tiers
from localv4.engine.growing_answer import ReplyOptions
from localv4.engine.memory import MemoryOptions
from localv4.engine.reply import Reply
from localv4.engine.sampler import Sampling
from localv4.engine.setup import Setup
from localv4.errors import DoesNotFitError, UsageError
from localv4.library import installed
from localv4.library.installed import embedded_model_path
from localv4.paging.paged_store import PagedStore
from localv4.planning.gpu_plan import plan_gpu
from localv4.planning.header_facts import facts_of_checkpoint
from localv4.planning.memory import read_memory
from localv4.planning.model_facts import ModelFacts
from localv4.planning.plan import make_plan
from localv4.storage import open_checkpoint

GIB = 1 << 30
CTX = 400
MEMORY = MemoryOptions()
TOKENS = 4


@pytest.fixture(scope="module")
def facts() -> ModelFacts:
    with open_checkpoint(embedded_model_path()) as checkpoint:
        return facts_of_checkpoint("tiny", "", checkpoint)


@pytest.fixture(autouse=True)
def _own_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(paths, "state_dir", lambda: tmp_path)
    monkeypatch.setattr(offload, "find_gpu", lambda _: HostGpu(2 * GIB))


def load(memory: int | None = None, ram: MemoryOptions = MEMORY) -> Engine:
    gpu = GpuOptions("cuda", memory=memory)
    return Engine.load(embedded_model_path(), Setup(ctx_size=CTX, threads=2, memory=ram, gpu=gpu))


def room_for(facts: ModelFacts, share: float) -> int:
    """What --gpu-mem must be so that a share of the experts fits."""
    whole = plan_gpu(facts, "", 2 * GIB, memory=None, ctx=CTX)
    return whole.budget - whole.experts + int(share * whole.all_experts)


def answer(engine: Engine) -> Reply:
    options = ReplyOptions(max_tokens=TOKENS, sampling=Sampling(temperature=0))
    reply = engine.reply(engine.new_session(), [0, 5, 9], options)
    for _ in reply:
        pass
    return reply


@needs_compiler
def test_all_experts_on_the_gpu() -> None:
    engine = load()
    reply = answer(engine)
    stats = reply.stats.gpu
    assert stats is not None and stats.tiers.shares() == {"gpu": 1.0, "memory": 0.0, "disk": 0.0}
    decoded = stats.counts.tokens
    assert 0 < decoded == reply.stats.generated_tokens - 1
    config = engine.config
    assert stats.tiers.total == decoded * config.n_layers * config.experts_per_token
    assert isinstance(engine.network, GpuTransformer)
    assert stats.uploaded_bytes == 0 and 0 < stats.used_bytes == engine.network.gpu_bytes


@needs_compiler
def test_experts_in_both_memories(facts: ModelFacts) -> None:
    engine = load(room_for(facts, 0.5))
    reply = answer(engine)
    stats = reply.stats.gpu
    assert stats is not None and reply.stats.paging is None, "the host has all experts"
    assert 0 < stats.tiers.gpu < stats.tiers.total, "the others came from the host"
    assert stats.counts.host_s > 0
    text = "\n".join(gpu_lines(reply))
    assert "a GPU of the tests" in text and "in memory" in text and "bound by" in text
    document = stats.document(reply.stats.decode_s)
    assert sum(document["experts_by_tier"].values()) == pytest.approx(1)


@needs_compiler
def test_experts_on_three_tiers(facts: ModelFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    monkeypatch.setattr(
        "localv4.engine.expert_usage.save_usage", lambda *args: saved.append(len(args))
    )
    monkeypatch.setattr("localv4.engine.expert_usage.LEAST_TOKENS", 1)
    plan = make_plan(facts, read_memory(), ctx=CTX, threads=2)
    ram = plan.total - plan.expert_bytes + facts.all_expert_bytes * 6 // 10
    engine = load(room_for(facts, 0.5), MemoryOptions(ram=ram, io="direct"))
    reply = answer(engine)
    stats, paging = reply.stats.gpu, reply.stats.paging
    assert stats is not None and paging is not None
    assert isinstance(engine.network, GpuTransformer)
    host = engine.network.host_store
    assert isinstance(host, PagedStore) and host.pages
    assert paging.capacity_bytes == host.arena.capacity != engine.network.vram.arena.capacity
    assert stats.tiers.disk == int(paging.counts.misses.sum()) > 0
    assert paging.counts.tokens == stats.counts.tokens
    assert engine._usage is not None
    engine._usage.keep()
    assert saved, "the experts of the host's store are remembered"


@needs_compiler
def test_a_gpu_that_is_full_one_day_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = HostGpu(2 * GIB)
    monkeypatch.setattr(offload, "find_gpu", lambda _: gpu)
    monkeypatch.setattr(devices, "has_library", lambda: True)
    model = installed.resolve(None)
    engine = Engine.load(model.path, Setup(ctx_size=CTX, threads=2, gpu=GpuOptions("auto")))
    loaded = Loaded(engine, model)
    assert loaded.fresh_notes() == []
    gpu.total_bytes = 0
    reply = answer(engine)
    assert reply.stats.generated_tokens == TOKENS or reply.finish_reason == "stop"
    assert len(loaded.fresh_notes()) == 1 and loaded.fresh_notes() == []
    assert reply.stats.gpu is not None and "CPU goes on alone" in str(reply.stats.gpu.warning)


def made(tiers: Tiers, **counts: float) -> GpuStats:
    found = TierCounts(2)
    found.tokens = 10
    found.host_s, found.wait_s = counts.get("host_s", 0.0), counts.get("wait_s", 0.0)
    disk_s = counts.get("disk_s", 0.0)
    return GpuStats("a GPU", found, tiers, disk_s, 1 << 30, 2 << 30, 2, 2)


@pytest.mark.parametrize(
    ("spent", "bound"),
    [
        ({}, "GPU"),
        ({"host_s": 0.6}, "host"),
        ({"host_s": 0.9, "disk_s": 0.4}, "disk"),
        ({"wait_s": 0.4}, "PCIe"),
        ({"host_s": 0.4, "disk_s": 0.1, "wait_s": 0.1}, "GPU"),
    ],
)
def test_what_bounds_tokens_is_what_they_spend_their_time_on(
    spent: dict[str, float], bound: str
) -> None:
    assert made(Tiers(1, 1, 1), **spent).bound(1.0) == bound


def test_shares_of_tiers() -> None:
    assert Tiers(6, 3, 1).shares() == {"gpu": 0.6, "memory": 0.3, "disk": 0.1}
    assert Tiers(0, 0, 0).shares()["gpu"] == 1.0


def test_exact_arithmetic_is_the_cpus() -> None:
    with pytest.raises(UsageError, match="--device cuda needs --numerics fast"):
        Engine.load(embedded_model_path(), Setup(numerics="exact", gpu=GpuOptions("cuda")))


def test_too_little_memory_ends_cuda_and_is_a_note_for_auto(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "has_library", lambda: True)
    path = embedded_model_path()
    with pytest.raises(DoesNotFitError, match=r"needs at least .* of a GPU of the tests"):
        Engine.load(path, Setup(ctx_size=CTX, threads=2, gpu=GpuOptions("cuda", memory=1 << 20)))
    engine = Engine.load(
        path, Setup(ctx_size=CTX, threads=2, gpu=GpuOptions("auto", memory=1 << 20))
    )
    assert engine.gpu_plan is None
    assert [line for line in engine.notes if line.startswith("the GPU is not used: ")]
