"""The committed reference files are what transformers computes here and now."""

import numpy as np
import pytest
from golden.presets import PRESETS
from golden_files import load_golden
from numpy.typing import NDArray

# The packages of the reference warn about much that is not our concern.
pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("ignore")]

# A different BLAS or thread count changes the order of sums. Relative to the largest value.
TOLERANCE = 5e-6


@pytest.fixture(autouse=True)
def _reference() -> None:
    pytest.importorskip("torch", reason="the reference needs torch")
    pytest.importorskip(
        "transformers.models.deepseek_v4", reason="the reference needs transformers with V4"
    )


@pytest.mark.parametrize("name", PRESETS)
def test_the_reference_still_says_the_same(name: str) -> None:
    from golden.make_oracle import prefill

    content, margins = prefill(PRESETS[name])
    golden = load_golden(name)
    assert content.keys() == golden.oracle.keys()
    assert min(margins.router, margins.index) > 2e-5
    for key, expected in golden.oracle.items():
        if key.endswith("_topk") or key == "input_ids":
            assert np.array_equal(content[key], expected), key
        else:
            assert_close(content[key], expected)


@pytest.mark.parametrize("sizes", [(1,), (1, 3, 4, 5, 120, 127)])
def test_the_reference_agrees_with_itself_in_chunks(sizes: tuple[int, ...]) -> None:
    from golden.make_oracle import in_chunks

    logits = in_chunks(PRESETS["rates"], sizes)
    assert_close(logits, load_golden("rates").logits)


def assert_close(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    """Equal up to rounding, measured by the largest value."""
    assert np.abs(actual - expected).max() < TOLERANCE * np.abs(expected).max()
