"""Tests of what is kept: forecasts against runs, and the profile of the machine."""

from dataclasses import replace
from datetime import date
from itertools import pairwise
from pathlib import Path

import pytest

from localv4 import paths
from localv4.planning import history, measuring, profile
from localv4.planning.assessment import assess
from localv4.planning.forecast import Forecast
from localv4.planning.machine import DiskFacts, KernelShares, Machine
from localv4.planning.measuring import Wanted, known_machine, measured_machine
from localv4.planning.memory import Memory
from localv4.planning.model_facts import facts_of_recipe
from localv4.planning.plan import GIB, Plan
from localv4.planning.profile import RoofProfile
from localv4.planning.recipes import load_recipes
from localv4.planning.subject import flash_network

pytestmark = pytest.mark.usefixtures("own_folders")

MODEL = "v4-flash:q4"


def paging() -> tuple[Plan, Forecast]:
    machine = Machine(Memory(64 * GIB, 60 * GIB), 8, read_bytes_s=90e9, disk=DiskFacts(7e9))
    facts = facts_of_recipe(MODEL, flash_network(), load_recipes().default)
    found = assess(facts, machine)
    assert found.plan is not None and found.forecast is not None
    return found.plan, found.forecast


def test_a_run_is_kept_and_read_again() -> None:
    plan, forecast = paging()
    run = history.record_run(MODEL, plan, forecast, achieved=5.0, tokens=100)
    assert run is not None and run.verdict == "pages"
    assert history.past_runs(MODEL) == [run]
    assert history.past_runs("another") == []
    assert run.error == pytest.approx(forecast.decode.likely / 5.0 - 1)


@pytest.mark.parametrize(("achieved", "tokens"), [(0.0, 100), (5.0, 3), (float("inf"), 99)])
def test_runs_that_tell_nothing_are_not_kept(achieved: float, tokens: int) -> None:
    assert history.record_run(MODEL, *paging(), achieved=achieved, tokens=tokens) is None
    assert history.past_runs(MODEL) == []


def test_earlier_runs_correct_the_next_forecast_but_not_themselves() -> None:
    plan, forecast = paging()
    assert history.correction([], plan) == 1.0
    for _ in range(4):
        runs = history.past_runs(MODEL)
        factor = history.correction(runs, plan)
        corrected = replace(forecast, decode=forecast.decode.scaled(factor), correction=factor)
        history.record_run(MODEL, plan, corrected, 0.8 * forecast.decode.likely, 100)
    runs = history.past_runs(MODEL)
    assert [run.predicted for run in runs] == pytest.approx([forecast.decode.likely] * 4)
    factors = [history.correction(runs[:count], plan) for count in range(5)]
    assert factors[0] == 1.0 and factors[1] == pytest.approx(0.8**0.5)
    assert all(0.8 < later < before for before, later in pairwise(factors))


def test_runs_with_another_share_in_memory_do_not_count() -> None:
    plan, forecast = paging()
    history.record_run(MODEL, plan, forecast, 1.0, 100)
    runs = history.past_runs(MODEL)
    assert history.correction(runs, plan) == history.LEAST_CORRECTION
    larger = replace(plan, expert_budget=2 * plan.expert_budget)
    resident = replace(plan, expert_budget=plan.all_experts)
    assert history.correction(runs, larger) == history.correction(runs, resident) == 1.0


def test_the_file_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MAX_RUNS", 10)
    plan, forecast = paging()
    for number in range(1, 25):
        history.record_run(MODEL, plan, forecast, float(number), 100)
        assert len(history.past_runs(MODEL)) <= 10
    assert history.past_runs(MODEL)[-1].achieved == 24.0


def test_damaged_lines_are_left_out() -> None:
    plan, forecast = paging()
    history.record_run(MODEL, plan, forecast, 5.0, 100)
    path = paths.state_dir() / history.FILE_NAME
    good = path.read_text()
    path.write_text("{}\nnot json\n" + good + good.replace("pages", "flies") + '{"at": 1')
    assert len(history.past_runs(MODEL)) == 1
    path.write_bytes(b"\xff" * 100)
    assert history.past_runs(MODEL) == []
    assert history.record_run(MODEL, plan, forecast, 5.0, 100) is not None


def test_what_is_kept_names_neither_host_nor_folders() -> None:
    history.record_run(MODEL, *paging(), achieved=5.0, tokens=100)
    text = (paths.state_dir() / history.FILE_NAME).read_text()
    assert str(Path.home()) not in text and len(text) < 400


def test_a_profile_belongs_to_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    roofs = RoofProfile(read_by_threads={1: 1e10}, int8_ops_s=1e12, measured_on=date(2026, 1, 2))
    here = profile.load_profile()
    profile.save_profile(here.model_copy(update={"roofs": roofs}))
    assert profile.load_profile().roofs == roofs
    other = here.machine.model_copy(update={"cpu": "another one"})
    monkeypatch.setattr(profile, "this_machine", lambda: other)
    assert profile.load_profile().roofs is None


def test_a_damaged_profile_counts_as_none() -> None:
    profile.save_profile(profile.load_profile())
    path = paths.cache_dir() / profile.FILE_NAME
    for text in ("", "[]", "{", path.read_text().replace(": 1,", ": 99,", 1)):
        path.write_text(text)
        assert profile.load_profile().roofs is None


def test_machines_are_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[str] = []

    def disk(*_: object) -> profile.DiskProfile:
        calls.append("disk")
        return profile.DiskProfile(
            bytes_s=1e9, core_s_per_gb=0.1, readers=8, record_bytes=1, io="direct",
            measured_on=date(2026, 1, 2),
        )  # fmt: skip

    def roofs() -> RoofProfile:
        calls.append("roofs")
        return RoofProfile(
            read_by_threads={1: 1e10, 2: 2e10}, int8_ops_s=1e12, measured_on=date(2026, 1, 2)
        )

    monkeypatch.setattr(measuring, "_measure_disk", disk)
    monkeypatch.setattr(measuring, "_measure_roofs", roofs)
    monkeypatch.setattr(measuring, "measure_kernels", lambda *_: KernelShares(0.8, 0.4, 1e-5))
    place = tmp_path / "not" / "yet"
    assert known_machine(place).read_bytes_s is None
    told: list[str] = []
    wanted = Wanted(place, kernels=(flash_network(), load_recipes().default))
    found = measured_machine(wanted, told.append)
    assert found.read_bytes_s == 2e10 and found.disk is not None and found.disk.bytes_s == 1e9
    assert found.kernels == KernelShares(0.8, 0.4, 1e-5) and len(told) == 3
    again = measured_machine(wanted)
    assert again == replace(found, memory=again.memory, disk_free=again.disk_free)
    assert calls == ["roofs", "disk"]
    measured_machine(Wanted(place, anew=True))
    assert calls == ["roofs", "disk"] * 2
    assert known_machine(place).measured_on == "2026-01-02"
