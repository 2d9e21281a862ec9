"""Rounding with feedback: the rule of its description, and less error of the output."""

from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from quant.quantizers import Feedback, Quantized, prepare_feedback, quantize_rows
from quant.quantizers.choice import GRIDS, choose
from quant.quantizers.error_feedback import DAMPING, choose_with_feedback, trust
from quant.quantizers.grids import AffineGrid, PowerGrid, UniformGrid

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

TYPES = ("Q8_0", "Q4_0", "Q6_K", "Q3_K", "IQ4_XS", "Q4_K", "Q2_K", "IQ2_XXS")


def activations(tokens: int, cols: int, seed: int = 0) -> Doubles:
    """Correlated, with columns of different sizes and a mean."""
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((tokens, cols // 8))
    mixed = hidden @ rng.standard_normal((cols // 8, cols)) / np.sqrt(cols / 8)
    noise = rng.standard_normal((tokens, cols))
    x: Doubles = (0.9 * mixed + 0.4 * noise + 0.2) * np.exp(0.5 * rng.standard_normal(cols))
    return x


def moments(cols: int) -> Doubles:
    x = activations(4 * cols, cols)
    return x.T @ x / len(x)


def weights(rows: int, cols: int, seed: int = 5) -> Floats:
    values = np.random.default_rng(seed).standard_normal((rows, cols)) * 0.03
    return values.astype(np.float32)


def decoded(result: Quantized) -> Floats:
    values: Floats = gguf.dequantize(result.blocks, gguf.GGMLQuantizationType[result.ggml])
    return values


def output_error(values: Floats, rounded: Floats, second_moments: Doubles) -> Doubles:
    """Squared error of each output, as a mean over activations."""
    rest = values.astype(np.float64) - rounded
    errors: Doubles = ((rest @ second_moments) * rest).sum(1)
    return errors


@pytest.mark.parametrize("name", TYPES)
def test_output_is_nearer_than_with_the_best_search(name: str) -> None:
    second, values = moments(512), weights(48, 512)
    importance = np.diag(second).astype(np.float32)
    search = quantize_rows(values, name, importance)
    feedback = quantize_rows(
        values, name, importance, method="feedback", hessian=prepare_feedback(second, np.inf)
    )
    assert feedback.blocks.shape == search.blocks.shape
    before = output_error(values, decoded(search), second).sum()
    assert output_error(values, decoded(feedback), second).sum() < 0.7 * before


@pytest.mark.parametrize("name", TYPES)
def test_reported_error_is_that_of_the_output(name: str) -> None:
    second, values = moments(256), weights(21, 256)
    damped = second + DAMPING * np.trace(second) / 256 * np.eye(256)
    result = quantize_rows(
        values, name, method="feedback", hessian=prepare_feedback(second, np.inf)
    )
    expected = output_error(values, decoded(result), damped)
    np.testing.assert_allclose(result.row_errors, expected, rtol=2e-3)


def twin_codes(values: Floats, steps: Floats, offsets: Floats, factor: Doubles) -> Doubles:
    """The values that the rule arrives at with given scales, in float64."""
    work, out = values.astype(np.float64), np.zeros(values.shape)
    for j in range(values.shape[1]):
        step, offset = steps[:, j], offsets[:, j]
        code = np.rint((work[:, j] + offset) / step)
        out[:, j] = step * np.clip(code, -4 if offset.max() == 0 else 0, 3) - offset
        error = work[:, j] - out[:, j]
        work[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
    return out


@pytest.mark.parametrize("name", ["Q3_K", "Q2_K"])
def test_codes_follow_the_rule(name: str) -> None:
    second, values = moments(512), weights(16, 512)
    feedback, grid = prepare_feedback(second, np.inf), _uniform(name)
    chosen = choose_with_feedback(values, grid, feedback, passes=0)
    damped = second + DAMPING * np.trace(second) / 512 * np.eye(512)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    steps = np.repeat(chosen.steps(), 16, 1)
    offsets = np.repeat(chosen.offsets(), 16, 1) if chosen.minima.size else 0 * steps
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = twin_codes(values, steps, offsets, upper / np.diag(upper)[:, None])
    # a code that is a tie but for rounding may differ, and then what comes after it in its row
    same_rows = (np.abs(chosen.values() - expected) < 1e-6).all(1)
    assert same_rows.mean() > 0.7


@pytest.mark.parametrize("name", ["Q3_K", "Q2_K", "Q4_0"])
def test_no_code_can_be_improved_alone(name: str) -> None:
    second, values, grid = moments(256), weights(16, 256), _uniform(name)
    feedback = prepare_feedback(second, np.inf)
    plain, chosen = (choose_with_feedback(values, grid, feedback, passes=n) for n in (0, 50))
    assert chosen.errors.sum() < 0.98 * plain.errors.sum()
    damped = second + DAMPING * np.trace(second) / 256 * np.eye(256)
    steps = np.repeat(chosen.steps(), 256 // chosen.steps().shape[1], 1).astype(np.float64)
    slopes = (values.astype(np.float64) - chosen.values()) @ damped
    low, high = (0, grid.high) if isinstance(grid, AffineGrid) else (grid.low, grid.high)
    for up in (-1, 1):
        allowed = (chosen.codes + up >= low) & (chosen.codes + up <= high)
        change = (up * steps) ** 2 * np.diag(damped) - 2 * up * steps * slopes
        assert (change[allowed] > -1e-5 * np.abs(change).mean()).all()


def test_scales_of_the_first_unit_are_those_of_the_search() -> None:
    values, grid = weights(16, 256), _uniform("Q2_K")
    feedback = prepare_feedback(moments(256), np.inf)
    searched = choose(values, grid, feedback.weights)
    chosen = choose_with_feedback(values, grid, feedback)
    for name in ("scales", "minima", "factors", "floors"):
        np.testing.assert_array_equal(getattr(chosen, name), getattr(searched, name))


def _uniform(name: str) -> UniformGrid:
    grid = GRIDS[name]
    assert not isinstance(grid, PowerGrid)
    return grid


def test_without_correlation_it_is_the_search() -> None:
    importance = np.exp(np.random.default_rng(0).standard_normal(256))
    values = weights(20, 256)
    damped = importance + DAMPING * importance.mean()
    feedback = prepare_feedback(np.diag(importance), np.inf)
    np.testing.assert_allclose(feedback.weights * feedback.scale, damped, rtol=1e-5)
    for name in TYPES:
        alone = quantize_rows(values, name, feedback.weights)
        fed = quantize_rows(values, name, method="feedback", hessian=feedback)
        np.testing.assert_array_equal(fed.blocks, alone.blocks)


def test_without_second_moments_and_for_mxfp4_it_is_the_search() -> None:
    values, feedback = weights(4, 256), prepare_feedback(moments(256), np.inf)
    searched = quantize_rows(values, "Q3_K")
    fed = quantize_rows(values, "Q3_K", method="feedback")
    np.testing.assert_array_equal(fed.blocks, searched.blocks)
    searched = quantize_rows(values, "MX4")
    fed = quantize_rows(values, "MX4", method="feedback", hessian=feedback)
    np.testing.assert_array_equal(fed.blocks, searched.blocks)


def test_rows_are_independent_of_company_and_threads() -> None:
    values, feedback = weights(37, 512), prepare_feedback(moments(512), np.inf)

    def quantize(first: int, end: int) -> Quantized:
        return quantize_rows(values[first:end], "Q3", method="feedback", hessian=feedback)

    borders = (0, 3, 19, 37)
    with ThreadPoolExecutor(3) as pool:
        parts = list(pool.map(quantize, borders, borders[1:]))
    whole = quantize(0, 37)
    np.testing.assert_array_equal(np.concatenate([p.blocks for p in parts]), whole.blocks)
    np.testing.assert_array_equal(np.concatenate([p.row_errors for p in parts]), whole.row_errors)


def test_values_beyond_the_format_become_its_largest() -> None:
    values, feedback = weights(4, 256), prepare_feedback(moments(256), np.inf)
    values[1, 7] = 3e30
    result = quantize_rows(values, "Q4_0", method="feedback", hessian=feedback)
    assert np.isfinite(decoded(result)).all()
    assert result.row_errors[1] > 1e55 > result.row_errors[0]


def test_second_moments_are_checked() -> None:
    with pytest.raises(ValueError, match="square"):
        prepare_feedback(np.ones((4, 5)), np.inf)
    with pytest.raises(ValueError, match="finite"):
        prepare_feedback(np.full((4, 4), np.nan), np.inf)
    with pytest.raises(ValueError, match="semidefinite"):
        prepare_feedback(np.array([[1.0, 5.0], [5.0, 1.0]]), np.inf)
    feedback = prepare_feedback(moments(256), np.inf)
    with pytest.raises(ValueError, match="256 columns, not 512"):
        quantize_rows(weights(1, 512), "Q4", method="feedback", hessian=feedback)


def test_activations_that_never_were_give_plain_feedback() -> None:
    feedback = prepare_feedback(np.zeros((256, 256)), np.inf)
    assert isinstance(feedback, Feedback)
    values = weights(4, 256)
    fed = quantize_rows(values, "Q4_K", method="feedback", hessian=feedback)
    np.testing.assert_array_equal(fed.blocks, quantize_rows(values, "Q4_K").blocks)
    assert fed.squared_error == 0


def test_few_activations_are_believed_less() -> None:
    second = moments(256)
    believed = []
    for tokens in (0, 64, 256, 4096, np.inf):
        factor = prepare_feedback(second, tokens).factor
        believed.append(np.abs(np.triu(factor, 1)).sum())
    assert believed[0] == 0
    assert (np.diff(believed) > 0).all()
    assert trust(256, 256) == pytest.approx(1 / 3)
    assert trust(256, np.inf) == 1


def test_chance_is_not_taken_for_correlation() -> None:
    x = activations(256, 256, seed=9)
    second, values = moments(256), weights(32, 256)
    learnt = x.T @ x / len(x)
    doubting = prepare_feedback(learnt, len(x))
    believing = prepare_feedback(learnt, np.inf)
    errors = [
        output_error(values, decoded(found), second).sum()
        for found in (
            quantize_rows(values, "Q3", method="feedback", hessian=feedback)
            for feedback in (doubting, believing)
        )
    ]
    assert errors[0] < 0.95 * errors[1]
