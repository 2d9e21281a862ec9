"""Tests of how memory is shared out: modes, budgets, contexts, and what does not fit."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from localv4.errors import DoesNotFitError, UsageError
from localv4.kernels.row_operations import F32
from localv4.library.installed import embedded_model_path
from localv4.model.config_json import read_config
from localv4.model.state import SLACK_TOKENS, State
from localv4.planning import network, plan
from localv4.planning.header_facts import facts_of_checkpoint
from localv4.planning.memory import Memory, read_memory
from localv4.planning.model_facts import ModelFacts, facts_of_recipe, held_state_bytes
from localv4.planning.plan import GIB, MIB, make_plan
from localv4.planning.recipes import load_recipes
from localv4.storage import open_checkpoint

NETWORKS = Path(network.__file__).parent / "networks"


def flash(recipe: str = "lossless") -> ModelFacts:
    config = read_config(NETWORKS / "flash.json")
    return facts_of_recipe("v4-flash", config, load_recipes().by_name[recipe])


def machine(total: int, available: int | None = None) -> Memory:
    return Memory(total * GIB, (total if available is None else available) * GIB)


def tiny() -> ModelFacts:
    with open_checkpoint(embedded_model_path()) as checkpoint:
        return facts_of_checkpoint("tiny-v4", "", checkpoint)


def test_the_sum_of_all_components_is_what_may_be_used() -> None:
    found = make_plan(flash(), machine(64, 60))
    assert found.mode == "arena" and not found.fits
    assert found.reserve == int(64 * GIB * 0.08)
    assert found.total == found.usable == 60 * GIB - found.reserve
    assert found.expert_budget + sum(found.fixed.values()) == found.usable
    assert found.paged_bytes == found.all_experts - found.expert_budget
    assert set(found.components()) == {*found.fixed, "experts"}


def test_what_fits_is_mapped_and_takes_no_more_than_it_needs() -> None:
    found = make_plan(flash(), machine(256))
    assert found.mode == "map" and found.fits and found.paged_bytes == 0
    assert found.total == sum(found.fixed.values()) + 147_169_738_752
    unpacked = make_plan(replace(flash(), is_packed=False), machine(256))
    assert unpacked.mode == "arena" and unpacked.fits


@pytest.mark.parametrize(("io", "mode"), [("direct", "arena"), ("buffered", "arena")])
def test_a_way_of_reading_asks_for_the_arena_even_where_all_fits(io: plan.Io, mode: str) -> None:
    found = make_plan(flash(), machine(256), io=io)
    assert (found.mode, found.io, found.fits) == (mode, io, True)


def test_map_that_is_asked_for_may_lean_on_the_page_cache() -> None:
    assert make_plan(flash(), machine(64), io="map").mode == "map"


def test_ram_bounds_the_process_and_reserve_what_is_left_to_others() -> None:
    assert make_plan(flash(), machine(64), ram=30 * GIB).total == 30 * GIB
    assert make_plan(flash(), machine(64), reserve=10 * GIB).total == 54 * GIB
    both = make_plan(flash(), machine(64), ram=60 * GIB, reserve=10 * GIB)
    assert both.total == 54 * GIB
    assert make_plan(flash(), machine(64, 40), ram=60 * GIB).total == 40 * GIB


def test_the_floor_is_one_and_a_half_tokens_of_experts() -> None:
    found = make_plan(flash(), machine(64))
    assert found.floor == int(1.5 * 43 * 6 * 13_369_344)
    least = sum(found.fixed.values()) + found.floor
    assert make_plan(flash(), machine(64), ram=least).expert_budget == found.floor
    with pytest.raises(
        DoesNotFitError, match=r"needs at least 1\d\.\d GiB .* are usable"
    ) as caught:
        make_plan(flash(), machine(64), ram=least - 1)
    assert caught.value.exit_code == 4


def test_a_long_context_that_does_not_fit_tells_the_one_that_does() -> None:
    wide = replace(flash(), rows=F32)
    with pytest.raises(DoesNotFitError) as caught:
        make_plan(wide, machine(24), ctx=1 << 20)
    hint = caught.value.hint or ""
    tokens = int(hint.split()[2])
    assert hint.startswith("use --ctx-size") and 32_768 < tokens < 1 << 20
    found = make_plan(wide, machine(24), ctx=tokens)
    assert found.ctx_size == tokens and found.expert_budget >= found.floor
    assert found.most_ctx == tokens
    with pytest.raises(DoesNotFitError):
        make_plan(wide, machine(24), ctx=tokens + 256)


def test_the_remedy_for_too_small_a_bound_is_a_larger_one() -> None:
    with pytest.raises(DoesNotFitError) as caught:
        make_plan(flash(), machine(64), ram=2 * GIB)
    size = int((caught.value.hint or "").removeprefix("use --ram ").removesuffix("GiB"))
    assert make_plan(flash(), machine(64), ram=size * GIB).mode == "arena"


def test_too_little_memory_tells_how_much_is_missing() -> None:
    with pytest.raises(DoesNotFitError) as caught:
        make_plan(flash(), machine(8))
    assert "fewer bits" in (caught.value.hint or "")


def test_the_reserve_is_never_most_of_a_small_machine() -> None:
    assert plan.default_reserve(machine(256)) == int(256 * GIB * 0.08)
    assert plan.default_reserve(machine(24)) == 4 * GIB
    assert plan.default_reserve(machine(8)) == 2 * GIB
    assert plan.default_reserve(Memory(64 * GIB, 8 * GIB, limit=8 * GIB)) == 2 * GIB
    assert plan.default_reserve(Memory(8 * GIB, GIB)) == GIB // 4


def test_the_built_in_model_fits_into_a_gigabyte() -> None:
    found = make_plan(tiny(), Memory(8 * GIB, GIB))
    assert found.fits and found.total < 700 * MIB and found.ctx_size == 4096


@pytest.mark.parametrize(
    "wrong", [{"ctx": 0}, {"ram": 0}, {"reserve": -1}], ids=["ctx", "ram", "reserve"]
)
def test_numbers_that_make_no_sense_are_usage_errors(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        make_plan(flash(), machine(64), **wrong)  # type: ignore[arg-type]


def test_memory_of_the_decoder_state_is_that_of_the_state_itself() -> None:
    config = read_config(embedded_model_path() / "config.json")
    state = State(config, SLACK_TOKENS)
    for tokens in (256, 1024):
        state.begin(tokens - state.position)
        state.advance(tokens - state.position)
        least = 64 * sum(4 * ((128 + 128) if r == 4 else 128) for r in config.ratios if r)
        # arrays of entries have room for 64 at least, and for the tokens that were asked for
        assert abs(state.nbytes - held_state_bytes(config, tokens, F32)) <= least


def test_the_state_of_flash_takes_as_much_per_token_as_the_documents_say() -> None:
    wide, default = replace(flash(), rows=F32), flash()
    assert wide.state_bytes_per_token == 13_760 and default.state_bytes_per_token == 3514.25
    assert wide.state_bytes(10_000) - wide.state_bytes(0) == 137_600_000
    assert default.state_bytes(10_000) - default.state_bytes(0) == 35_142_500


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are of Linux")
def test_the_limit_of_a_control_group_counts(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("0::/outer/inner\n")
    inner = groups / "outer" / "inner"
    inner.mkdir(parents=True)
    for folder, limit in ((inner, "max"), (groups / "outer", str(GIB))):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text(str(GIB // 2))
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {GIB // 4}\n")
    found = read_memory(proc, groups)
    assert found.limit == found.most == GIB
    assert found.available == 3 * GIB // 4
    (groups / "outer" / "memory.max").write_text("max")
    assert read_memory(proc, groups).limit is None


def test_a_plan_is_made_of_plain_numbers() -> None:
    found = make_plan(flash("q4"), machine(64))
    json.dumps({**found.components(), "most_ctx": found.most_ctx, "readers": found.readers})
