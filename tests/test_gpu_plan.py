"""How the memory of a GPU is shared out, and what is said when it is too little."""

import pytest

from localv4.cuda.options import GpuOptions
from localv4.errors import DoesNotFitError, UsageError
from localv4.planning.gpu_plan import RESERVE_BYTES, SCRATCH_BYTES, GpuPlan, plan_gpu
from localv4.planning.model_facts import ModelFacts, facts_of_recipe
from localv4.planning.plan import workspace_bytes
from localv4.planning.recipes import load_recipes
from localv4.planning.subject import flash_network

GIB = 1 << 30
CTX = 8192


@pytest.fixture(scope="module")
def facts() -> ModelFacts:
    return facts_of_recipe("v4-flash", flash_network(), load_recipes().by_name["q4"])


def plan(facts: ModelFacts, gib: float, memory: int | None = None) -> GpuPlan:
    return plan_gpu(facts, "a GPU", int(gib * GIB), memory=memory, ctx=CTX)


def test_everything_fits(facts: ModelFacts) -> None:
    found = plan(facts, 190)
    assert found.fits and found.layers == 43 and found.resident_share == 1


@pytest.mark.parametrize("gib", [12, 16, 24, 80])
def test_what_is_left_over_is_for_experts(facts: ModelFacts, gib: int) -> None:
    found = plan(facts, gib)
    assert found.layers == 43 and not found.fits
    assert sum(found.components().values()) == gib * GIB - RESERVE_BYTES == found.budget
    assert found.workspace == workspace_bytes(facts.config, CTX, 1) + SCRATCH_BYTES
    assert 0 < found.resident_share < 1


def test_layers_are_split_where_the_dense_weights_do_not_fit(facts: ModelFacts) -> None:
    found = plan(facts, 5)
    assert 0 < found.layers < 43
    assert found.head == 0, "the output matrix follows the last layer"
    assert sum(found.components().values()) <= found.budget
    assert plan(facts, 4.5).layers < found.layers


def test_a_bound_is_kept(facts: ModelFacts) -> None:
    assert plan(facts, 80, 16 * GIB).budget == 16 * GIB
    assert plan(facts, 8, 16 * GIB).budget == 8 * GIB - RESERVE_BYTES


def test_too_little_memory_is_told(facts: ModelFacts) -> None:
    with pytest.raises(DoesNotFitError, match=r"v4-flash needs at least .* GiB of a GPU's memory"):
        plan(facts, 1)
    with pytest.raises(UsageError, match="--gpu-mem is 0"):
        plan(facts, 80, 0)


@pytest.mark.parametrize(
    ("text", "name", "number"),
    [("auto", "auto", 0), ("cpu", "cpu", 0), ("cuda", "cuda", 0), ("cuda:3", "cuda", 3)],
)
def test_devices(text: str, name: str, number: int) -> None:
    options = GpuOptions.parse(text)
    assert (options.name, options.number) == (name, number)


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:x", "cpu:1", "", "cuda:-1"])
def test_what_is_no_device(text: str) -> None:
    with pytest.raises(UsageError, match="--device is"):
        GpuOptions.parse(text)
