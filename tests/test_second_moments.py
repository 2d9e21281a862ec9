"""Rounding of matrices of the built-in model for the activations that they really meet."""

import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from quant.quantizers import prepare_feedback, quantize_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import second_moments
from ggml_quantizers import GgmlQuantizers, decoded
from second_moments import Met

ROOT = Path(__file__).parents[1] / "localv4" / "embedded"
TOKENS = 1024


@pytest.fixture(scope="module")
def met() -> list[Met]:
    text = (ROOT / "heldout.txt").read_text(encoding="utf-8")
    return second_moments.record(ROOT / "tiny-v4", text, TOKENS)


def relative(values: NDArray[np.float32], rounded: NDArray[np.float32], item: Met) -> float:
    """RMS error of the output on the second half of the text, by that of the output."""
    judged = item.parts[1].mean()
    rest, size = values.astype(np.float64) - rounded, values.astype(np.float64)
    return float(np.sqrt(((rest @ judged) * rest).sum() / ((size @ judged) * size).sum()))


def test_moments_are_sums_of_squares_of_both_halves(met: list[Met]) -> None:
    dense = [item for item in met if item.parts[0].tokens == TOKENS // 2]
    assert len(dense) > 40
    for item in dense[::8]:
        assert item.parts[1].tokens == TOKENS // 2
        for part in item.parts:
            mean = part.mean()
            np.testing.assert_allclose(mean, mean.T, rtol=1e-5, atol=1e-6 * np.trace(mean))
            assert np.linalg.eigvalsh(mean).min() > -1e-6 * np.trace(mean)


@pytest.mark.parametrize("name", ["Q3_K", "Q2_K", "IQ2_XXS"])
def test_feedback_learnt_on_one_half_helps_on_the_other(met: list[Met], name: str) -> None:
    chosen = [i for i in met if i.matrix.cols == 256 and i.parts[0].tokens == TOKENS // 2]
    ratios = []
    for item in chosen[::6]:
        values, learnt = item.values()[:256], item.parts[0].mean()
        importance = np.diag(learnt).astype(np.float32)
        search = quantize_rows(values, name, importance)
        feedback = prepare_feedback(learnt, item.parts[0].tokens)
        fed = quantize_rows(values, name, method="feedback", hessian=feedback)
        errors = [relative(values, decoded(found.blocks, name), item) for found in (fed, search)]
        ratios.append(errors[0] / errors[1])
    assert np.exp(np.mean(np.log(ratios))) < 0.9


def test_an_environment_without_llama_cpp_is_said_so() -> None:
    with pytest.raises(FileNotFoundError, match="has no llama-cpp-python"):
        GgmlQuantizers("/usr/bin/false")
