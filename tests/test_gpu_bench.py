"""What a benchmark tells of a GPU, how this is measured, and what a batch leaves to it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cuda_twins import needs_compiler
from host_gpu import HostGpu
from terminal import LAPTOP, needs_jit, run_here

from localv4.cli.bench_figures import figures
from localv4.cli.bench_report import Report, gpu_lines
from localv4.cuda import offload, probe
from localv4.cuda.gpu import GpuError, GpuMemoryError
from localv4.cuda.options import GpuOptions
from localv4.cuda.tier_counts import TierCounts
from localv4.engine import engine
from localv4.engine.batch_memory import BatchPlan
from localv4.engine.benchmark import Benchmark
from localv4.engine.engine import Engine
from localv4.engine.gpu_measurement import GpuResult
from localv4.engine.gpu_stats import GpuStats, Tiers
from localv4.engine.measurement import Case, Measurement, Memory, Sample, Series
from localv4.engine.memory import MemoryOptions
from localv4.engine.setup import Setup
from localv4.library.installed import embedded_model_path
from localv4.planning.gpu_forecast import TierBytes
from localv4.planning.gpu_plan import STATE_SHARE, GpuPlan, plan_gpu
from localv4.planning.model_facts import facts_of_recipe
from localv4.planning.recipes import load_recipes
from localv4.planning.roofs import Roof
from localv4.planning.subject import flash_network

GIB = 1 << 30


class TimedGpu(HostGpu):
    """A GPU that takes a thousandth of a second for everything."""

    def seconds(self, work: Callable[[], object], repeats: int = 1) -> float:
        work()
        return 1e-3


@needs_compiler
def test_products_are_counted_and_leave_no_memory_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "REPEATS", 1)
    gpu = TimedGpu(1 << 26)
    assert probe.product_ops_s(gpu, 64, 256, 16) == 2 * 64 * 256 * 16 / 1e-3  # type: ignore[arg-type]
    assert gpu.launches > 0 and gpu.free_bytes() == gpu.total_bytes


def test_a_copy_takes_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "COPY_BYTES", 1 << 24)
    monkeypatch.setattr(probe, "LEAST_BYTES", 1 << 20)
    for total, copied in ((1 << 30, 1 << 24), (1 << 25, 1 << 23)):
        gpu = TimedGpu(total)
        assert probe.copy_bytes_s(gpu) == 2 * copied / 1e-3  # type: ignore[arg-type]
        assert gpu.free_bytes() == gpu.total_bytes
    with pytest.raises(GpuMemoryError, match="not enough free memory to be measured"):
        probe.copy_bytes_s(TimedGpu(1 << 20))  # type: ignore[arg-type]


def generated() -> Measurement:
    """40 tokens in a second, of which the GPU reads 4 GB each and the host 1 GB."""
    counts = TierCounts(2)
    counts.tokens, counts.host_s = 40, 0.7
    stats = GpuStats("Some GPU", counts, Tiers(80, 15, 5), 0.0, 8 * GIB, 16 * GIB, 2, 2)
    gpu = GpuResult(400e9, stats, TierBytes(4e9, 1e9, 0.5e9))
    series = Series(40, (Sample(1.0, 0.0),))
    roofs = (Roof(80e9, 1e12), Roof(90e9, 1e12))
    memory = Memory(5, {})
    return Measurement(Case("tg", 40, 0), series, roofs, int(5e9), 0, 1, memory, gpu)


def test_the_bound_is_that_of_the_slower_memory() -> None:
    found = generated()
    assert found.gpu is not None and found.gpu.bound(90e9) == 90
    assert found.bound_share == pytest.approx(40 / 90)
    assert found.read_share is None, "of the host's roof it would be no share"
    fast = replace(found, roofs=(Roof(500e9, 1e12),))
    assert fast.bound_share == pytest.approx(40 / 100)
    alone = replace(found, gpu=None)
    assert alone.bound_share is None and alone.read_share == pytest.approx(200 / 90)


def test_reports_tell_of_a_gpu_only_where_one_helped() -> None:
    found = generated()
    alone, own = figures(replace(found, gpu=None)), figures(found)
    assert gpu_lines([replace(found, gpu=None)]) == []
    assert not [name for name in alone if "gpu" in name or "bound" in name]
    assert list(own)[: len(alone)] == list(alone)
    assert (own["gpu_token_bytes"], own["experts_gpu_share"]) == (4e9, 0.8)
    assert own["bound_by"] == "host" and own["bound_tok_s"] == 90
    text = "\n".join(gpu_lines([found]))
    assert "Some GPU: copies 400 to 400 GB/s; 8.0 GiB of 16.0 GiB taken, 2 of 2 layers" in text
    assert "| tg40 |" in text and "44.4" in text and "80.0 %" in text
    assert found.gpu is not None
    prompt = replace(found, case=Case("pp", 40, 0), gpu=replace(found.gpu, token_bytes=None))
    assert len(gpu_lines([prompt])) == 1 and figures(prompt)["bound_tok_s"] is None
    assert list(figures(prompt)) == list(own)


@needs_compiler
def test_a_whole_benchmark_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = TimedGpu(2 * GIB)
    monkeypatch.setattr(offload, "find_gpu", lambda _: gpu)
    monkeypatch.setattr(probe, "COPY_BYTES", 1 << 22)
    monkeypatch.setattr(probe, "LEAST_BYTES", 1 << 20)
    options = GpuOptions("cuda")
    loaded = Engine.load(embedded_model_path(), Setup(ctx_size=64, threads=2, gpu=options))
    assert loaded.facts is not None
    need = loaded.facts.weight_bytes_per_token + loaded.facts.state_read_bytes(1)
    benchmark = Benchmark(loaded, repeats=1, roof_bytes=1 << 20)
    reads, generates = benchmark.run([Case("pp", 2, 0), Case("tg", 2, 0)])
    assert reads.gpu is not None and reads.gpu.token_bytes is None
    assert generates.gpu is not None and generates.gpu.copy_bytes_s == 2 * (1 << 22) / 1e-3
    assert generates.gpu.token_bytes == TierBytes(need, 0, 0)
    assert generates.gpu.stats.counts.tokens == 2
    assert not [name for name in generates.memory.parts if name.startswith("GPU")]
    report = Report("tiny", benchmark, (), None)
    report.measurements += [reads, generates]
    text = report.markdown()
    assert "| limited by |" in text and "copies 8 to 8 GB/s" in text
    document = json.loads(report.json())
    assert document["tests"][1]["experts_gpu_share"] == 1
    assert report.csv().splitlines()[0].count("gpu_copy_bytes_s") == 1


def batch_gpu(states: int | None, gib: float = 16) -> GpuPlan:
    facts = facts_of_recipe("v4-flash", flash_network(), load_recipes().by_name["q4"])
    return plan_gpu(facts, "a GPU", int(gib * GIB), memory=None, ctx=4096, states=states)


def test_rows_of_a_batch_leave_the_gpu_its_weights() -> None:
    one, many = batch_gpu(None), batch_gpu(100 * GIB)
    assert many.state == int(STATE_SHARE * many.budget) > one.state
    assert many.experts < one.experts and many.layers == many.all_layers
    assert batch_gpu(GIB).state == GIB
    plan = BatchPlan(64, 32 * GIB, MemoryOptions(), 512 << 20)
    assert plan.within(None) == plan
    within = plan.within(many)
    assert within.room == many.state and within.rows == many.state // plan.row_bytes < 64
    assert plan.within(replace(many, state=40 * GIB)) == plan
    half = replace(many, state=GIB, layers=many.all_layers - 3)
    assert half.state < plan.within(half).room < 2 * GIB, "the host has the states of its layers"


def fit(*arguments: str, home: Path) -> str:
    done = run_here("fit", "v4-flash:q4", *LAPTOP, *arguments, home=home)
    assert done.code == 0, done.stderr
    return done.stdout


@needs_jit
def test_fit_plans_for_a_gpu(tmp_path: Path) -> None:
    text = fit("--assume-gpu", "16GiB", "--assume-gpu-bandwidth", "500GB/s", home=tmp_path)
    sections = [line for line in text.splitlines()[1:] if line and not line.startswith(" ")]
    assert sections == ["Machine", "Speed", "Memory", "GPU memory", "Disk", "Faster with"]
    assert "copies 500 GB/s" in text and "without the GPU" in text and " on the GPU | " in text
    found = json.loads(fit("--assume-gpu", "16GiB", "--gpu-mem", "12GiB", "--json", home=tmp_path))
    plan, forecast = found["chosen"]["gpu_plan"], found["chosen"]["gpu_forecast"]
    assert plan["usable_bytes"] == 12 * GIB == plan["total_bytes"] == sum(plan["bytes"].values())
    assert sum(forecast["experts_by_tier"].values()) == pytest.approx(1)
    assert found["machine"]["gpu"]["total_bytes"] == 16 * GIB
    assert "gpu" in found["machine"]["assumed"]


@needs_jit
def test_fit_without_a_gpu_says_nothing_of_one(tmp_path: Path) -> None:
    text = fit(home=tmp_path)
    assert [line for line in text.splitlines() if "GPU" in line] == [
        line for line in text.splitlines() if line.startswith("  a GPU of ")
    ]
    found = json.loads(fit("--json", home=tmp_path))
    assert "gpu" not in found["machine"] and "gpu_plan" not in found["chosen"]


@needs_jit
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--assume-gpu-bandwidth", "500GB/s"), "needs --assume-gpu"),
        (("--assume-gpu", "much"), "--assume-gpu is 'much'"),
        (("--device", "gpu"), "--device is gpu"),
    ],
)
def test_what_fit_does_not_understand(
    tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    done = run_here("fit", "v4-flash", *LAPTOP, *arguments, home=tmp_path)
    assert done.code == 2 and said in done.stderr


@needs_jit
@pytest.mark.parametrize(
    "command",
    [
        ("run", "-q", "Hi"),
        ("bench", "-q"),
        ("batch", "-q", "-i", "rows.txt", "-o", "out.jsonl"),
        ("eval", "ppl", "-q", "-f", "rows.txt"),
        ("eval", "kld", "-q", "-f", "rows.txt", "--base-model", "tiny-v4"),
        ("eval", "logits", "-q", "-f", "rows.txt", "--save-base", "out.bin"),
        ("eval", "card", "-q", "-f", "rows.txt", "-o", "card"),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_a_device_that_is_not_there_ends_every_command_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    def none_found(options: GpuOptions) -> None:
        assert (options.number, options.memory) == (1, 8 * GIB)
        raise GpuError("there is no CUDA device 1: 0 found")

    def too_late(*_: object) -> None:
        raise AssertionError("nothing is compiled or packed before it is known who computes")

    monkeypatch.setattr(offload, "find_gpu", none_found)
    monkeypatch.setattr(engine, "compile_kernels", too_late)
    monkeypatch.setattr(engine, "pack_dense", too_late)
    monkeypatch.chdir(tmp_path)
    Path("rows.txt").write_text("Hi\n")
    done = run_here(*command, "--device", "cuda:1", "--gpu-mem", "8GiB", home=tmp_path)
    assert done.code == 4 and done.stdout == ""
    assert done.stderr.splitlines()[0] == "error: there is no CUDA device 1: 0 found"
