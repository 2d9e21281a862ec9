"""Divergences against a twin in NumPy, and the floors beside them."""

from pathlib import Path

import numpy as np
import pytest
from terminal import needs_jit

from localv4.engine import logits_file
from localv4.engine.divergence import Comparison, Divergence, LiveBase, compare, measure
from localv4.engine.engine import Engine
from localv4.engine.scoring import log_softmax, logits_rows
from localv4.engine.setup import Setup
from localv4.engine.windows import Windows, cut
from localv4.library.installed import embedded_model_path

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def exact() -> Engine:
    """The built-in model in float32."""
    return Engine.load(embedded_model_path(), Setup(threads=2, numerics="exact"))


@pytest.fixture(scope="module")
def fast() -> Engine:
    """The built-in model with rounded activations."""
    return Engine.load(embedded_model_path(), Setup(threads=2, numerics="fast"))


@pytest.fixture(scope="module")
def windows(exact: Engine) -> Windows:
    """Three short windows of a text."""
    text = (GOLDEN / "heldout.txt").read_text(encoding="utf-8")
    return cut(exact.tokenizer.encode(text), 40, bos=0, most=3)


def test_divergence_of_two_coins() -> None:
    found = compare(np.log([0.5, 0.5]), np.log([0.75, 0.25]), 1)
    assert found.kld == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5))
    assert not compare(np.log([0.4, 0.6]), np.log([0.75, 0.25]), 1).same_top
    assert found.same_top
    assert np.exp([-found.loss, -found.base_loss]) == pytest.approx([0.5, 0.25])


def test_what_a_file_cannot_hold_is_left_out() -> None:
    base = np.log([1 - 1e-8, 1e-8])
    model = np.log([0.5, 0.5])
    assert compare(model, base, 0, -16.0).kld == pytest.approx(np.log(2), rel=1e-7)
    assert compare(model, base, 0).kld < compare(model, base, 0, -16.0).kld


def test_statistics() -> None:
    chance = np.random.default_rng(3)
    loss, base = chance.random(1001), chance.random(1001)
    kld, same = chance.random(1001), chance.random(1001) < 0.9
    found = Divergence.of([Comparison(*one) for one in zip(kld, same, loss, base, strict=True)])
    assert found.mean.value == pytest.approx(kld.mean())
    assert found.mean.error == pytest.approx(kld.std(ddof=1) / np.sqrt(1001))
    assert [found.percentile(50), found.percentile(90)] == [np.sort(kld)[500], np.sort(kld)[900]]
    assert found.most == kld.max()
    share = same.mean()
    assert found.agreement.value == share
    assert found.agreement.error == pytest.approx(np.sqrt(share * (1 - share) / 1000))
    change = np.exp(-loss) - np.exp(-base)
    assert found.mean_delta_p.value == pytest.approx(change.mean())
    root = np.sqrt((change**2).mean())
    assert found.rms_delta_p.value == pytest.approx(root)
    error = (change**2).std(ddof=1) / np.sqrt(1001)
    assert found.rms_delta_p.error == pytest.approx(error / (2 * root))
    assert found.ratio.value == pytest.approx(np.exp(loss.mean() - base.mean()))
    assert found.ratio.value == pytest.approx(found.perplexity.value / found.base_perplexity.value)
    # as llama.cpp writes it: the variances of both less twice their covariance
    covariance = np.cov(loss, base, ddof=0) / 1000
    spread = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    assert found.ratio.error == pytest.approx(found.ratio.value * np.sqrt(spread))


def test_models_that_agree_have_no_error() -> None:
    found = Divergence.of([Comparison(0.0, True, 1.0, 1.0)] * 3)
    assert (found.rms_delta_p.value, found.rms_delta_p.error) == (0.0, 0.0)
    assert (found.ratio.value, found.agreement.error) == (1.0, 0.0)


@needs_jit
def test_against_a_model_beside_it(exact: Engine, fast: Engine, windows: Windows) -> None:
    steps: list[tuple[int, int]] = []
    found = measure(fast, LiveBase(exact, windows), 1, lambda *step: steps.append(step))
    expected = []
    for index in range(3):
        own, other = (
            np.array(list(logits_rows(one, windows.inputs(index), windows.first)), np.float64)
            for one in (fast, exact)
        )
        p, q = (np.exp(rows) / np.exp(rows).sum(1, keepdims=True) for rows in (other, own))
        expected += (p * np.log(p / q)).sum(1).tolist()
    np.testing.assert_allclose(found.divergence.kld, expected, atol=1e-7)
    assert found.rounding is not None and found.storage is None
    assert found.rounding.kld.size == windows.counted
    assert steps == [(40, 120), (80, 120), (120, 120)]


@needs_jit
def test_a_model_against_itself(exact: Engine, windows: Windows) -> None:
    found = measure(exact, LiveBase(exact, windows), 3)
    assert np.abs(found.divergence.kld).max() == 0
    assert found.rounding is not None
    assert 0 < found.rounding.mean.value < 1e-8
    assert found.rounding.agreement.value == 1


@needs_jit
def test_against_its_own_file(exact: Engine, windows: Windows, tmp_path: Path) -> None:
    path = tmp_path / "base"
    rows = [
        logits_file.encode(row)
        for index in range(3)
        for row in logits_rows(exact, windows.inputs(index), windows.first)
    ]
    header = logits_file.header(windows, exact.config.vocab_size)
    path.write_bytes(header + b"".join(row.tobytes() for row in rows))
    with logits_file.LogitsFile(path, bos=0) as base:
        found = measure(exact, base, 3)
    assert found.storage is not None
    # the same rows through the file or not: the floor of the storage is all there is
    assert np.array_equal(found.storage.kld, found.divergence.kld)
    assert 0 < np.abs(found.divergence.kld).max() < 1e-3
    own = next(logits_rows(exact, windows.inputs(0), windows.first))
    target = windows.targets(0)[windows.first]
    assert found.divergence.loss[0] == pytest.approx(-log_softmax(own)[target])
