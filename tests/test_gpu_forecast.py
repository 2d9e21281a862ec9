"""Predicted speeds with a GPU: what moves them in which direction, and what is called the bound."""

from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from localv4.cuda import offload, probe
from localv4.cuda.gpu import GpuError
from localv4.cuda.options import GpuOptions
from localv4.cuda.speed import GpuSpeed
from localv4.engine import expectation
from localv4.errors import DoesNotFitError
from localv4.planning import history, measuring
from localv4.planning.assessment import Assessment, Request, assess, what_would_change
from localv4.planning.gpu_forecast import GpuForecast, TierBytes
from localv4.planning.machine import DiskFacts, GpuFacts, Machine
from localv4.planning.measuring import Wanted, known_gpu, measured_machine
from localv4.planning.memory import Memory
from localv4.planning.model_facts import ModelFacts, facts_of_recipe
from localv4.planning.plan import GIB
from localv4.planning.profile import RoofProfile
from localv4.planning.recipes import load_recipes
from localv4.planning.subject import flash_network

pytestmark = pytest.mark.usefixtures("own_folders")

HERE = Machine(Memory(16 * GIB, 15 * GIB), 8, read_bytes_s=40e9, disk=DiskFacts(7e9))
SPEED = GpuSpeed(900e9, 22e9, 90e12)


def machine(gpu: float, gb_s: float = 900, ram: int = 256, disk: float = 7) -> Machine:
    return HERE.with_assumptions(
        ram=ram * GIB,
        bandwidth=90e9,
        disk=disk * 1e9,
        gpu=int(gpu * GIB),
        gpu_bandwidth=gb_s * 1e9,
    )


def flash(recipe: str = "q4") -> ModelFacts:
    return facts_of_recipe("v4-flash", flash_network(), load_recipes().by_name[recipe])


def assessed(on: Machine) -> Assessment:
    return assess(flash(), on)


def predicted(on: Machine) -> GpuForecast:
    found = assessed(on).gpu_forecast
    assert found is not None
    return found


def test_more_memory_and_bandwidth_are_never_slower() -> None:
    rates = [predicted(machine(gib)).decode.likely for gib in (5, 6, 8, 12, 16, 24, 48, 96, 180)]
    assert rates == sorted(rates) and rates[-1] > 3 * rates[3]
    by_rate = [predicted(machine(16, gb_s)).decode.likely for gb_s in (200, 400, 900, 1800)]
    assert by_rate == sorted(by_rate)


def test_a_gpu_helps_and_nothing_beats_the_bound_of_the_tiers() -> None:
    for gib in (8, 16, 24, 180):
        found = assessed(machine(gib))
        assert found.forecast is not None and found.gpu_forecast is not None
        decode = found.gpu_forecast.decode
        assert found.forecast.decode.likely < decode.likely == found.tok_s
        assert decode.low <= decode.likely <= decode.high < found.gpu_forecast.roofline
        prompt = found.gpu_forecast.prefill
        assert prompt.low <= prompt.likely <= prompt.high


def test_tiers_add_up_and_follow_the_plan() -> None:
    for gib, ram in ((8, 64), (24, 64), (24, 256), (5, 64), (180, 256)):
        tiers = predicted(machine(gib, ram=ram)).tiers
        assert tiers.gpu + tiers.memory + tiers.disk == pytest.approx(1)
    assert predicted(machine(180)).tiers.gpu == 1
    assert predicted(machine(24)).tiers.disk == 0 < predicted(machine(24, ram=64)).tiers.disk
    whole, nbytes = flash(), predicted(machine(180)).token_bytes
    state = whole.state_read_bytes(512)
    assert nbytes == TierBytes(whole.weight_bytes_per_token + state, 0, 0)
    split = predicted(machine(5)).token_bytes
    assert split.gpu + split.memory == pytest.approx(whole.weight_bytes_per_token + state)


def test_the_bottleneck_has_a_name() -> None:
    assert predicted(machine(180)).bottleneck == "GPU"
    assert predicted(machine(8)).bottleneck == "host"
    assert predicted(machine(16, ram=64, disk=1)).bottleneck == "disk"
    assert predicted(machine(16)).prompt_bottleneck == "PCIe"
    assert predicted(machine(180)).prompt_bottleneck == "GPU"
    assert predicted(machine(5)).prompt_bottleneck == "host"


def test_experts_on_the_gpu_need_no_disk() -> None:
    small, large = predicted(machine(24, ram=64)), predicted(machine(180, ram=64))
    assert small.disk_s > 0 == large.disk_s
    assert large.prefill == predicted(machine(180, ram=256)).prefill


def test_a_gpu_that_is_too_small_is_left_out() -> None:
    found = assessed(machine(1))
    assert found.gpu is None and found.gpu_forecast is None and found.tok_s > 0


def test_a_larger_gpu_is_a_change_a_smaller_one_is_none() -> None:
    def named(on: Machine) -> list[str]:
        changes = what_would_change(assessed(on), on, Request())
        return [change.what for change in changes if "GPU" in change.what]

    assert len(named(replace(machine(8), gpu=None))) == 2
    assert named(machine(16)) == ["a GPU of 24 GiB, 900 GB/s"]
    assert named(machine(24)) == []


def test_runs_with_a_gpu_do_not_correct_those_without() -> None:
    found = assessed(machine(24))
    assert found.plan and found.forecast and found.gpu and found.gpu_forecast
    plan, gpu = found.plan, found.gpu
    rate = found.gpu_forecast.decode.likely
    run = history.record_run("m", plan, found.gpu_forecast, 0.5 * rate, 100, gpu)
    assert run is not None and run.gpu == gpu.name and 0 < run.gpu_share < 1
    runs = history.past_runs("m")
    assert history.correction(runs, plan) == 1.0
    assert 0.5 < history.correction(runs, plan, gpu) < 1.0
    assert history.correction(runs, plan, replace(gpu, name="another")) == 1.0
    more = replace(gpu, experts=gpu.all_experts)
    assert history.correction(runs, plan, more) == 1.0


class FakeGpu:
    """A GPU of which memory is told, and nothing else."""

    name, total_bytes = "Some GPU", 24 * GIB
    closed = 0

    def free_bytes(self) -> int:
        return 20 * GIB

    def close(self) -> None:
        FakeGpu.closed += 1


def measured(monkeypatch: pytest.MonkeyPatch, options: GpuOptions, **rest: bool) -> Machine:
    roofs = RoofProfile(read_by_threads={1: 20e9}, int8_ops_s=1e12, measured_on=date(2026, 1, 1))
    monkeypatch.setattr(measuring, "_measure_roofs", lambda: roofs)
    return measured_machine(Wanted(gpu=options, **rest))


def test_a_gpu_is_measured_once_and_its_memory_read_every_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    monkeypatch.setattr(measuring, "has_library", lambda: True)
    monkeypatch.setattr(offload, "find_gpu", lambda _: FakeGpu())
    monkeypatch.setattr(probe, "measure", lambda gpu: told.append(gpu.name) or SPEED)
    auto, before = GpuOptions("auto"), FakeGpu.closed
    expected = GpuFacts("Some GPU", 24 * GIB, 20 * GIB, SPEED)
    assert [measured(monkeypatch, auto).gpu for _ in range(2)] == [expected] * 2
    assert told == ["Some GPU"] and FakeGpu.closed == before + 2
    assert measured(monkeypatch, auto, anew=True).gpu == expected and len(told) == 2
    known = known_gpu("Some GPU")
    assert known is not None and known.speed == SPEED
    assert measured(monkeypatch, GpuOptions("cpu")).gpu is None
    plan = assessed(replace(machine(24), gpu=expected))
    assert plan.plan is not None and plan.gpu is not None
    here = replace(machine(24), gpu=None)
    monkeypatch.setattr(expectation, "known_machine", lambda _: here)
    with_gpu = expectation.expect("m", flash(), plan.plan, Path(), 100, plan.gpu)
    assert isinstance(with_gpu, GpuForecast)


def test_without_the_extra_or_a_gpu_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(_: GpuOptions) -> None:
        raise GpuError("it is too old")

    monkeypatch.setattr(offload, "find_gpu", ask)
    monkeypatch.setattr(measuring, "has_library", lambda: True)
    assert measured(monkeypatch, GpuOptions("auto")).gpu is None
    with pytest.raises(DoesNotFitError, match="it is too old"):
        measured(monkeypatch, GpuOptions("cuda"))
    monkeypatch.setattr(offload, "find_gpu", None)  # calling it would fail
    monkeypatch.setattr(measuring, "has_library", lambda: False)
    assert measured(monkeypatch, GpuOptions("auto")).gpu is None
