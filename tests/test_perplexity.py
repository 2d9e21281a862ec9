"""Windows, losses, errors and curves of perplexity: by hand, and against transformers' figures."""

import json
from pathlib import Path

import numpy as np
import pytest
from terminal import needs_jit

from localv4.engine.engine import Engine
from localv4.engine.noise import RoundingNoise
from localv4.engine.perplexity import Perplexity, measure
from localv4.engine.scoring import logits_rows
from localv4.engine.setup import Setup
from localv4.engine.windows import cut
from localv4.errors import DoesNotFitError, UsageError
from localv4.library.installed import embedded_model_path

GOLDEN = Path(__file__).parent / "golden"
IDS = list(range(100, 117))  # 17 tokens


@pytest.fixture(scope="module", params=["fast", "exact"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """The built-in model in both arithmetics."""
    return Engine.load(embedded_model_path(), Setup(threads=2, numerics=request.param))


def test_windows_lie_side_by_side_and_begin_with_bos() -> None:
    windows = cut(IDS, 6, bos=0)
    assert windows.tokens.tolist() == [
        [0, 100, 101, 102, 103, 104],
        [105, 106, 107, 108, 109, 110],
        [111, 112, 113, 114, 115, 116],
    ]
    assert windows.inputs(1) == [0, 106, 107, 108, 109]
    assert windows.targets(1).tolist() == [106, 107, 108, 109, 110]
    assert (windows.first, windows.counted) == (3, 2)  # of 105..110, 109 and 110 count


def test_windows_without_bos_and_of_odd_size() -> None:
    windows = cut(IDS, 5, bos=None, most=2)
    assert windows.tokens.tolist() == [IDS[:5], IDS[5:10]]
    assert windows.inputs(1) == IDS[5:9]
    assert (windows.first, windows.counted) == (2, 2)


def test_strides_count_every_later_token_once() -> None:
    windows = cut(IDS, 8, bos=0, stride=3)
    counted = [windows.targets(index)[windows.first :].tolist() for index in range(len(windows))]
    assert [token for part in counted for token in part] == list(range(104, 116))
    assert windows.tokens[1, 0] == 102


@pytest.mark.parametrize(
    ("size", "stride", "error"),
    [(1, None, UsageError), (8, 8, UsageError), (8, 0, UsageError), (19, None, DoesNotFitError)],
)
def test_windows_that_cannot_be(size: int, stride: int | None, error: type[Exception]) -> None:
    with pytest.raises(error):
        cut(IDS, size, bos=0, stride=stride)


def test_figures_of_known_losses() -> None:
    losses = np.log([[9.0, 9.0, 2.0, 8.0], [9.0, 9.0, 4.0, 4.0]])
    found = Perplexity(losses, 2, losses[:1] + np.log(1.5))
    assert found.tokens == 4
    assert found.value.value == pytest.approx(4.0)  # 2 * 8 * 4 * 4 = 4^4
    spread = np.log(2) * np.sqrt(2 / 4)
    assert found.value.error == pytest.approx(4 * spread / np.sqrt(3))
    assert found.between_windows == pytest.approx(0.0)
    assert found.floor is not None
    assert found.floor.value == pytest.approx(0.5)
    assert found.floor.error == pytest.approx(0.0)
    assert np.isnan(Perplexity(losses[:1], 2, losses[:0]).between_windows)
    assert Perplexity(losses[:1], 2, losses[:0]).floor is None


def test_curve_has_every_prediction_once() -> None:
    losses = np.log(np.arange(1.0, 41.0))[None].repeat(2, axis=0)
    curve = Perplexity(losses, 20, losses[:0]).curve()
    assert [(b.least, b.most, b.tokens) for b in curve] == [(1, 15, 30), (16, 31, 32), (32, 40, 18)]
    assert curve[2].perplexity.value == pytest.approx(np.prod(np.arange(32.0, 41.0)) ** (1 / 9))


@needs_jit
def test_losses_are_those_of_transformers(engine: Engine) -> None:
    reference = json.loads((GOLDEN / "perplexity.json").read_text(encoding="utf-8"))
    ids = engine.tokenizer.encode((GOLDEN / "heldout.txt").read_text(encoding="utf-8"))
    for size, loss in reference["first_window_nll"].items():
        windows = cut(ids, int(size), bos=engine.tokenizer.bos_id, most=1)
        found = measure(engine, windows)
        tolerance = 1e-5 if engine.network.name == "exact" else 5e-3
        assert found.losses.shape == (1, int(size) - 1)
        assert found.losses.mean() == pytest.approx(loss, rel=tolerance)


@needs_jit
def test_noise_moves_little_and_leaves_nothing_behind(engine: Engine) -> None:
    ids, noise = [0, *IDS * 8], RoundingNoise(engine.network.weights)
    calm = np.array(list(logits_rows(engine, ids)))
    with noise:
        under_noise = np.array(list(logits_rows(engine, ids)))
    assert np.array_equal(np.array(list(logits_rows(engine, ids))), calm)
    moved = np.abs(under_noise - calm).max()
    assert 0 < moved < (1e-3 if engine.network.name == "exact" else 3)


@needs_jit
def test_rows_with_and_without_noise_in_turns(engine: Engine) -> None:
    # long enough for several chunks: the noise comes and goes between them
    ids, noise = ([0] + IDS * 20)[:300], RoundingNoise(engine.network.weights)
    calm = np.array(list(logits_rows(engine, ids, 250)))
    with noise:
        under_noise = np.array(list(logits_rows(engine, ids, 250)))
    both = (logits_rows(engine, ids, 250), logits_rows(engine, ids, 250, noise))
    pairs = list(zip(*both, strict=True))
    assert len(pairs) == 50
    assert np.array_equal(np.array([pair[0] for pair in pairs]), calm)
    assert np.array_equal(np.array([pair[1] for pair in pairs]), under_noise)


@needs_jit
def test_the_floor_is_measured_on_the_first_windows(engine: Engine) -> None:
    text = (GOLDEN / "heldout.txt").read_text(encoding="utf-8")
    windows = cut(engine.tokenizer.encode(text), 100, bos=0, most=3)
    steps: list[tuple[int, int]] = []
    found = measure(engine, windows, 2, lambda done, total: steps.append((done, total)))
    assert found.losses.shape == (3, 99) and found.noisy.shape == (2, 99)
    assert steps == [(99 * step, 99 * 5) for step in range(1, 6)]
    assert found.floor is not None
    assert 0 < found.floor.error < 0.05
