"""Tests of predicted speeds: bounds that must hold, and what moves them in which direction."""

from dataclasses import replace

import numpy as np
import pytest

from localv4.planning.assessment import Request, assess, choose, what_would_change
from localv4.planning.forecast import Forecast, _Layer, _layer_s, make_forecast
from localv4.planning.hit_rate import CountedRouting, TypicalText
from localv4.planning.machine import DiskFacts, KernelShares, Machine
from localv4.planning.memory import Memory
from localv4.planning.model_facts import ModelFacts, facts_of_recipe
from localv4.planning.plan import GIB, make_plan
from localv4.planning.recipes import load_recipes
from localv4.planning.subject import flash_network

HERE = Machine(Memory(16 * GIB, 15 * GIB), 4, read_bytes_s=40e9)


def machine(ram: int = 64, bandwidth: float = 90, disk: float = 7, cores: int = 8) -> Machine:
    return HERE.with_assumptions(
        ram=ram * GIB, bandwidth=bandwidth * 1e9, disk=disk * 1e9, cores=cores
    )


def flash(recipe: str = "q8") -> ModelFacts:
    return facts_of_recipe("v4-flash", flash_network(), load_recipes().by_name[recipe])


def predicted(on: Machine, recipe: str = "q8") -> Forecast:
    facts = flash(recipe)
    return make_forecast(facts, make_plan(facts, on.memory), on)


@pytest.mark.parametrize(
    ("ram", "bandwidth", "disk", "low", "high"),
    [
        # the simulated target table of docs/planning.md, of which 0.5 to 1.0 must be promised
        (64, 60, 7, 5.1, 5.4),
        (64, 90, 3, 3.6, 4.8),
        (64, 90, 7, 6.6, 7.5),
        (64, 90, 14, 8.0, 8.2),
        (96, 90, 7, 7.9, 8.2),
        (96, 220, 7, 12.7, 15.3),
        (128, 120, 3, 8.8, 9.8),
        (128, 90, 7, 8.3, 8.3),
    ],
)
def test_forecasts_agree_with_an_independent_simulation(
    ram: int, bandwidth: float, disk: float, low: float, high: float
) -> None:
    found = predicted(machine(ram, bandwidth, disk, cores=16)).decode
    assert 0.5 * low < found.low <= found.likely <= found.high
    assert 0.6 * (low + high) / 2 < found.likely < 1.05 * high


def test_nothing_is_faster_than_memory_allows() -> None:
    for recipe in load_recipes().by_name:
        for ram in (32, 64, 128, 256):
            found = predicted(machine(ram), recipe)
            assert found.decode.high < found.roofline


def test_a_resident_model_does_not_care_about_the_disk() -> None:
    slow, fast = predicted(machine(256, disk=0.5)), predicted(machine(256, disk=14))
    assert slow.decode == fast.decode
    assert slow.disk_s == 0 and slow.hit_rate.low == 1.0 and slow.bottleneck == "memory"


def test_more_of_anything_is_never_slower() -> None:
    base = predicted(machine()).decode.likely
    assert predicted(machine(ram=96)).decode.likely > base
    assert predicted(machine(bandwidth=120)).decode.likely > base
    assert predicted(machine(disk=14)).decode.likely > base
    assert predicted(machine(), "q4").decode.likely > base
    assert predicted(machine(), "q2").decode.likely > predicted(machine(), "q3").decode.likely


def test_the_bottleneck_has_a_name() -> None:
    assert predicted(machine(32, 220, 1)).bottleneck == "disk"
    assert predicted(machine(256, 90, 7)).bottleneck == "memory"
    assert predicted(machine(256, 220, 7, cores=4)).bottleneck == "compute"
    two = replace(machine(256), cores=2, read_by_threads={1: 20e9, 2: 39e9}, read_bytes_s=39e9)
    assert predicted(two).bottleneck == "compute"  # a third core would read more
    full = replace(two, cores=4, read_by_threads={1: 20e9, 4: 39e9})
    assert predicted(full).bottleneck == "memory"


def test_few_cores_bound_decoding() -> None:
    few, many = predicted(machine(256, cores=2)), predicted(machine(256, cores=16))
    assert few.decode.likely < 0.5 * many.decode.likely


def test_measured_shares_replace_constants_and_narrow_the_range() -> None:
    assumed = machine(256)
    measured = replace(assumed, kernels=KernelShares(0.9, 0.5, 0.0))
    first, second = predicted(assumed), predicted(measured)
    assert second.decode.likely > first.decode.likely
    spread = [(f.decode.high - f.decode.low) / f.decode.likely for f in (first, second)]
    assert spread[1] < 0.13 < spread[0]
    slow_layers = replace(assumed, kernels=KernelShares(0.9, 0.5, 1e-3))
    extra = 1 / predicted(slow_layers).decode.likely - 1 / second.decode.likely
    assert extra == pytest.approx(43e-3)


def test_a_machine_that_was_not_measured_has_no_forecast() -> None:
    facts = flash()
    plan = make_plan(facts, Memory(64 * GIB, 60 * GIB))
    blank = Machine(Memory(64 * GIB, 60 * GIB), 8)
    for unknown in (blank, replace(blank, read_bytes_s=90e9)):
        with pytest.raises(ValueError, match="not measured"):
            make_forecast(facts, plan, unknown)
        assert assess(facts, unknown).forecast is None


def test_a_layer_waits_only_for_what_it_cannot_hide() -> None:
    layer = _Layer(before=1.0, shared=0.3, experts=0.6)
    resident = _layer_s(layer, 6, 0.0, 0.0, 5.0, 0.0)
    assert resident == pytest.approx(1.9)
    # everything missing: the last expert and down of half of the others come after all reads
    remains = 0.6 / 6 + 0.6 / 3 / 2
    everything = _layer_s(layer, 6, 1.0, 0.0, 5.0, 0.0)
    assert everything == pytest.approx(1.0 + 300e-6 + 30.0 + remains, rel=1e-9)
    # what was foretold is read during attention
    foretold = _layer_s(layer, 6, 1.0, 1.0, 5.0, 0.0)
    assert foretold == pytest.approx(everything - 1.0)
    some = _layer_s(layer, 6, 0.2, 0.5, 5.0, 0.0)
    assert _layer_s(layer, 6, 0.2, 1.0, 5.0, 0.0) < some < _layer_s(layer, 6, 0.2, 0.0, 5.0, 0.0)
    fast_disk = _layer_s(layer, 6, 0.2, 0.0, 1e-6, 0.0)
    assert resident < fast_disk < resident + 2 * 300e-6 + remains


def test_reading_a_prompt_is_bound_by_compute_or_by_the_disk() -> None:
    fast, slow = predicted(machine(64, disk=14)), predicted(machine(64, disk=0.5))
    assert slow.prefill.likely < fast.prefill.likely
    facts = flash()
    plan = make_plan(facts, machine(64).memory)
    disk_s = (1 - plan.resident_share) * facts.all_expert_bytes / 0.5e9
    assert 1920 / slow.prefill.high == pytest.approx(disk_s)
    resident = predicted(machine(256)).prefill.likely
    assert 1920 / slow.prefill.likely == pytest.approx(disk_s + 1920 / resident)
    more_cores = predicted(machine(256, cores=16)).prefill.likely
    assert more_cores == pytest.approx(2 * predicted(machine(256, cores=8)).prefill.likely)


def test_hit_rates_rise_with_the_share_of_experts() -> None:
    text = TypicalText(6 / 256)
    shares = np.linspace(0, 1, 101)
    rates = [text.hit_rate(float(share)) for share in shares]
    for name in ("low", "likely", "high"):
        values = [getattr(rate, name) for rate in rates]
        assert values == sorted(values) and values[-1] == 1.0
    assert rates[2].high == 0.0  # less than one token's experts
    assert text.hit_rate(0.34).low == pytest.approx(0.816)
    assert all(rate.low <= rate.likely <= rate.high for rate in rates)


def test_counted_routing_hits_the_most_frequent() -> None:
    counts = np.full((2, 10), 100)
    counts[:, :2] = 3600
    routing = CountedRouting(counts)
    assert routing.hit_rate(0.2).likely == pytest.approx(1 - 1.1 * 0.1)
    assert routing.hit_rate(0.1).likely == pytest.approx(1 - 1.1 * 0.55)
    assert routing.hit_rate(1.0).low == 1.0
    for nothing in (np.zeros((2, 3)), np.zeros((0, 3)), np.full((2, 2), -1.0)):
        with pytest.raises(ValueError, match="no expert"):
            CountedRouting(nothing)


@pytest.mark.parametrize("choices", [300, 1000, 20_000])
def test_few_choices_do_not_make_even_routing_look_uneven(choices: int) -> None:
    rng = np.random.default_rng(1)
    counts = np.bincount(rng.integers(0, 512, choices), minlength=512)
    half = 1 - (1 - CountedRouting(counts).hit_rate(0.5).likely) / 1.1
    in_sample = np.sort(counts)[256:].sum() / choices
    assert abs(half - 0.5) < 0.08
    assert choices > 10_000 or in_sample > half + 0.1


def test_uneven_routing_is_seen_in_few_choices() -> None:
    rng = np.random.default_rng(2)
    chances = 1.0 / np.arange(1, 513)
    chosen = rng.choice(512, 2000, p=chances / chances.sum())
    found = CountedRouting(np.bincount(chosen, minlength=512)).hit_rate(0.2).likely
    true = np.sort(chances)[::-1][:102].sum() / chances.sum()
    assert found == pytest.approx(1 - 1.1 * (1 - true), abs=0.05)


def test_the_default_is_recommended_unless_it_is_too_slow() -> None:
    def recommended(on: Machine) -> str:
        found = [assess(flash(name), on) for name in load_recipes().by_name]
        return choose(found, "q4").facts.quant

    assert recommended(machine(64)) == recommended(machine(256)) == "q4"
    assert recommended(machine(32, 60, 3)) == "q2"  # q4 and q3 are below three tokens a second
    assert recommended(machine(8, 60, 3)) in load_recipes().by_name


def test_what_would_change_is_computed_and_faster() -> None:
    on, request = machine(64), Request()
    chosen = assess(flash("q4"), on, request)
    changes = what_would_change(chosen, on, request, [flash("q4"), flash("q2"), flash("lossless")])
    assert all(change.tok_s > 1.05 * chosen.tok_s for change in changes)
    by_name = {change.what: change for change in changes}
    assert "q2: fewer bits" in by_name and "lossless: fewer bits" not in by_name
    more = replace(on, memory=Memory(on.memory.total + 64 * GIB, on.memory.available + 64 * GIB))
    assert by_name["64 GiB more memory"].tok_s == assess(flash("q4"), more).tok_s
    assert by_name["an SSD of 14 GB/s"].tok_s == assess(flash("q4"), machine(64, disk=14)).tok_s
    fitting = assess(flash("q2"), machine(128), request)
    changes = what_would_change(fitting, machine(128), request)
    assert [change.what.partition(",")[0] for change in changes] == [
        "a GPU of 16 GiB",
        "a GPU of 24 GiB",
    ]


def test_what_does_not_fit_is_a_result() -> None:
    found = assess(flash(), machine(8))
    assert found.verdict == "does not fit" and found.tok_s == 0
    assert found.refusal is not None and found.refusal.exit_code == 4


def test_assumptions_replace_what_was_measured() -> None:
    measured = replace(
        HERE, kernels=KernelShares(0.9, 0.4, 0.0), read_by_threads={1: 2e10}, cpu="a CPU"
    )
    other = measured.with_assumptions(bandwidth=90e9)
    assert (other.cores, other.kernels, other.cpu) == (8, None, "")
    assert other.assumed == {"bandwidth", "cores"}
    same = measured.with_assumptions(disk=7e9)
    assert same.kernels == measured.kernels and same.disk == DiskFacts(7e9)
    assert measured.with_assumptions() == measured
