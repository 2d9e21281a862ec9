"""What a batch takes from the plan for memory, and what its report makes of the counts."""

import json
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from terminal import needs_jit

from localv4.cli.batch_report import Report
from localv4.engine import batch_memory
from localv4.engine import memory as engine_memory
from localv4.engine.batch_memory import BatchPlan, plan_batch
from localv4.engine.batching import BatchStats
from localv4.engine.engine import Engine
from localv4.engine.memory import MemoryOptions
from localv4.engine.setup import Setup
from localv4.kernels.row_operations import COMPACT, FORMATS
from localv4.library.installed import embedded_model_path
from localv4.library.registry import ApiPrice, ModelSpec
from localv4.planning.header_facts import facts_of_checkpoint
from localv4.planning.memory import Memory
from localv4.planning.model_facts import held_state_bytes
from localv4.storage import open_checkpoint

GIB = 1 << 30


def plan(monkeypatch: pytest.MonkeyPatch, gib: float = 16, **asked: object) -> BatchPlan:
    """Plan for the built-in model on a machine with that much memory."""
    memory = Memory(int(gib * GIB), int(gib * GIB))
    for module in (batch_memory, engine_memory):
        monkeypatch.setattr(module, "read_memory", lambda: memory)
    facts: dict[str, object] = {
        "parallel": None,
        "rows": 1000,
        "ctx_size": None,
        "threads": 8,
        "exact": False,
    }
    options = asked.pop("options", MemoryOptions())
    return plan_batch(embedded_model_path(), options, **(facts | asked))  # type: ignore[arg-type]


def test_rows_by_threads_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan(monkeypatch).rows == 32
    assert plan(monkeypatch, threads=2).rows == 16
    assert plan(monkeypatch, threads=64).rows == 64
    assert plan(monkeypatch, rows=3).rows == 3
    assert plan(monkeypatch, parallel=5).rows == 5
    assert plan(monkeypatch, exact=True).rows == 32


def test_memory_of_rows_is_kept_from_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    one, many = plan(monkeypatch, parallel=1), plan(monkeypatch, parallel=64)
    assert many.room > one.room
    assert many.memory.reserve is not None and one.memory.reserve is not None
    assert many.memory.reserve - one.memory.reserve == many.room - one.room
    ram = plan(monkeypatch, parallel=64, options=MemoryOptions(ram=4 * GIB)).memory
    assert ram.ram is not None and ram.ram < 4 * GIB and ram.reserve is None


def test_rows_are_counted_in_the_format_that_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    compact = plan(monkeypatch, parallel=8)
    wide = plan(monkeypatch, parallel=8, options=MemoryOptions(kv="f32"))
    exact = plan(monkeypatch, parallel=8, exact=True)
    per_token = {"compact": 0.0, "f32": 0.0}
    with open_checkpoint(embedded_model_path()) as checkpoint:
        facts = facts_of_checkpoint("tiny-v4", "", checkpoint)
    for name in per_token:
        per_token[name] = replace(facts, rows=FORMATS[name]).state_bytes_per_token
    assert facts.state_bytes_per_token == per_token["compact"] < per_token["f32"] / 3
    fewer = (per_token["f32"] - per_token["compact"]) * facts.config.max_positions
    assert wide.row_bytes - compact.row_bytes == pytest.approx(fewer)
    assert exact.row_bytes == wide.row_bytes


def test_rows_share_the_bound_of_kv_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is counted once, be they many or few."""
    cap = 1 << 20
    bounded = MemoryOptions(kv="f32", kv_dir=Path("x"), kv_ram=cap)
    few, many = (plan(monkeypatch, parallel=n, options=bounded) for n in (8, 9))
    whole = plan(monkeypatch, parallel=8, options=MemoryOptions(kv="f32"))
    rings = many.room - few.room
    assert few.room == 8 * rings + cap < whole.room == 8 * whole.row_bytes
    # memory in which fewer rows would fit if each had a bound of its own
    monkeypatch.setattr(batch_memory, "_beyond_one_row", lambda *_, **__: 9 * rings)
    assert plan(monkeypatch, threads=2, options=bounded).rows == 10


def test_little_memory_means_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    roomy, tight = plan(monkeypatch, threads=16), plan(monkeypatch, 0.85, threads=16)
    assert 1 <= tight.rows < roomy.rows == 64
    assert tight.room < roomy.room


@needs_jit
def test_the_plan_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan(monkeypatch, 4, parallel=8)
    engine = Engine.load(embedded_model_path(), Setup(threads=1, memory=found.memory))
    assert engine.plan is not None
    assert engine.plan.reserve == found.memory.reserve
    state = held_state_bytes(engine.config, engine.plan.ctx_size, COMPACT)
    assert engine.plan.fixed["decoder state"] == state and engine.network.rows is COMPACT


def test_cost_at_the_price_of_the_api(capsys: pytest.CaptureFixture[str]) -> None:
    price = ApiPrice(as_of=date(2026, 9, 1), input_cache_hit=1, input_cache_miss=10, output=100)
    spec = ModelSpec(
        repo="a/b",
        arch="deepseek_v4",
        format="safetensors",
        release="preview",
        allow=("*.json",),
        api_price=price,
    )
    report = Report(Path("out.jsonl"), spec, 3, 1, 0, False, True)
    report._stats = BatchStats(reused_tokens=1000)
    usage = {"prompt_tokens": 3000, "completion_tokens": 500}
    report.note({"response": {"body": {"usage": usage}}, "error": None})
    report.note({"response": None, "error": {"code": "x"}})
    report.finish(as_json=False, stats=False)
    said = capsys.readouterr().err
    assert "1 of 2 rows answered (1 failed, 1 were done before)" in said
    assert "10 $ and 100 $ per million): 0.0710 $" in said


def test_rows_that_failed_before_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(Path("out.jsonl"), None, 16, 16, 11, False, True)
    report.finish(as_json=True, stats=False)
    out, said = capsys.readouterr()
    assert json.loads(out)["failed_before"] == 11
    assert "nothing to do: all of 16 rows are in out.jsonl" in said
    assert "11 rows failed before; without their lines in the output they are tried again" in said
