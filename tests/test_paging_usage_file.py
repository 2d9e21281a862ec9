"""Usage that is kept between sessions: whole, of this model, or not at all."""

from pathlib import Path

import numpy as np
import pytest

from localv4.errors import BadFileError
from localv4.paging.topics import MOST_TOPICS, TopicMemory
from localv4.paging.usage_file import KEPT, Usage, load_usage, save_usage, usage_path
from localv4.paging.uses import Uses

MODEL, OTHER = "ab" * 32, "cd" * 32
SHAPE = (3, 5)


def example(topics: int = 2) -> Usage:
    rng = np.random.default_rng(0)
    scores = [rng.integers(0, 400, SHAPE).astype(np.float32) for _ in range(1 + topics)]
    return Usage(scores[0], tuple(scores[1:]))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path, usage = tmp_path / "usage" / "u", example()
    save_usage(path, MODEL, usage)
    found = load_usage(path, MODEL, SHAPE)
    assert found is not None
    np.testing.assert_array_equal(found.scores, usage.scores)
    np.testing.assert_array_equal(found.topics, usage.topics)
    assert [p.name for p in path.parent.iterdir()] == ["u"]
    save_usage(path, MODEL, example(0))
    again = load_usage(path, MODEL, SHAPE)
    assert again is not None and again.topics == ()


def test_no_file_is_no_usage(tmp_path: Path) -> None:
    assert load_usage(tmp_path / "none", MODEL, SHAPE) is None


def test_usage_is_kept_by_model_in_the_users_data(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LOCALV4_HOME", str(tmp_path))
    assert usage_path(MODEL).is_relative_to(tmp_path)
    assert usage_path(MODEL) != usage_path(OTHER)


def test_scores_and_topics_too_large_for_the_file_are_cut(tmp_path: Path) -> None:
    usage = Usage(np.full(SHAPE, 1e9, np.float32), example(MOST_TOPICS + 4).topics)
    save_usage(tmp_path / "u", MODEL, usage)
    found = load_usage(tmp_path / "u", MODEL, SHAPE)
    assert found is not None and len(found.topics) == MOST_TOPICS
    np.testing.assert_array_equal(found.topics[-1], usage.topics[-1])
    assert (found.scores > 60_000).all()


@pytest.mark.parametrize("where", [*range(0, 60, 3), -1])
def test_any_changed_byte_is_noticed(tmp_path: Path, where: int) -> None:
    path = tmp_path / "u"
    save_usage(path, MODEL, example())
    data = bytearray(path.read_bytes())
    data[where] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(BadFileError):
        load_usage(path, MODEL, SHAPE)


@pytest.mark.parametrize("length", [0, 7, 20, 59, 60, 61, 89])
def test_a_cut_file_is_noticed(tmp_path: Path, length: int) -> None:
    path = tmp_path / "u"
    save_usage(path, MODEL, example())
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(BadFileError):
        load_usage(path, MODEL, SHAPE)


def test_usage_of_another_model_is_refused(tmp_path: Path) -> None:
    save_usage(tmp_path / "u", OTHER, example())
    with pytest.raises(BadFileError, match="another model"):
        load_usage(tmp_path / "u", MODEL, SHAPE)
    with pytest.raises(BadFileError, match="another model"):
        load_usage(tmp_path / "u", OTHER, (3, 6))


@pytest.mark.parametrize("value", [np.nan, -1.0])
def test_scores_that_are_no_counts_are_refused(tmp_path: Path, value: float) -> None:
    scores = np.zeros(SHAPE, np.float32)
    topic = scores.copy()
    topic[1, 1] = value
    save_usage(tmp_path / "u", MODEL, Usage(scores, (topic,)))
    with pytest.raises(BadFileError, match="counts"):
        load_usage(tmp_path / "u", MODEL, SHAPE)


def test_a_session_goes_on_from_the_last_one() -> None:
    uses, memory = Uses(*SHAPE), TopicMemory()
    for _ in range(40):
        uses.clock += 1
        uses.record(1, np.array([0, 4]))
        memory.observe(uses)
    usage = Usage.of(uses, memory)
    assert len(usage.topics) == 1
    fresh, fresh_memory = Uses(*SHAPE), TopicMemory()
    usage.begin(fresh, fresh_memory)
    np.testing.assert_allclose(fresh.scores(), KEPT * uses.scores(), rtol=1e-5)
    assert len(fresh_memory.topics) == 1


def test_the_hottest_records_that_fit_come_first() -> None:
    scores = np.array([[1, 9, 0], [5, 7, 3]], np.float32)
    nbytes = np.array([[10, 10, 10], [20, 0, 20]])
    assert Usage(scores).hottest(nbytes, 100) == [(0, 1), (1, 0), (1, 2), (0, 0)]
    assert Usage(scores).hottest(nbytes, 49) == [(0, 1), (1, 0)]
