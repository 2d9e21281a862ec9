"""A timeline can be rewound, cut anywhere and interleaved with others; results never change."""

import threading
from pathlib import Path

import numpy as np
import pytest
from golden_files import load_golden, write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import logits, open_network

from localv4.engine.session import Session
from localv4.errors import Cancelled, DoesNotFitError, UsageError
from localv4.model.state import SLACK_TOKENS
from localv4.model.transformer import CHUNK_TOKENS, Transformer

IDS = load_golden("tiny300").input_ids


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    """A network with every kind of layer."""
    return open_network(write_model(load_golden("tiny300"), tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def clean(network: Transformer) -> np.ndarray:
    """Logits after every token of an undisturbed run."""
    return logits(network, IDS)


def new_session(network: Transformer, ctx_size: int = 1000) -> Session:
    """An empty timeline."""
    return Session(network, ctx_size)


@pytest.mark.parametrize("start", [1, 3, 4, 5, 126, 127, 128, 129, 131, 250, 255, 256, 257])
@pytest.mark.parametrize("detour", [1, 2, 5, 40])
def test_rolling_back_over_other_tokens(
    network: Transformer, clean: np.ndarray, start: int, detour: int
) -> None:
    session = new_session(network)
    session.extend(IDS[:start])
    session.extend([7] * detour)
    session.rollback(start)
    assert session.position == start and session.tokens == IDS[:start]
    assert np.array_equal(session.all_logits(IDS[start:]), clean[start:])


def test_rolling_back_as_far_as_the_rings_reach(network: Transformer, clean: np.ndarray) -> None:
    session = new_session(network)
    session.extend(IDS)
    session.rollback(len(IDS) - SLACK_TOKENS)
    assert session.position == len(IDS) - SLACK_TOKENS
    rest = IDS[session.position :]
    assert np.array_equal(session.all_logits(rest), clean[-len(rest) :])


def test_rolling_back_further_starts_anew(network: Transformer, clean: np.ndarray) -> None:
    session = new_session(network)
    session.extend(IDS)
    session.rollback(len(IDS) - SLACK_TOKENS - 1)
    assert session.position == 0 and session.tokens == []
    assert np.array_equal(session.extend(IDS), clean[-1])


def test_the_reach_counts_from_the_furthest_token_ever_written(network: Transformer) -> None:
    session = new_session(network)
    session.extend(IDS)
    session.rollback(len(IDS) - 200)
    session.rollback(len(IDS) - 200 - 60)
    assert session.position == 0


@settings(max_examples=25, deadline=None)
@given(steps=st.lists(st.tuples(st.booleans(), st.integers(0, 140)), min_size=1, max_size=12))
def test_any_walk_ends_as_a_clean_run(
    network: Transformer, clean: np.ndarray, steps: list[tuple[bool, int]]
) -> None:
    session = new_session(network)
    for forward, amount in steps:
        if forward:
            part = IDS[session.position : session.position + amount]
            if part:
                session.extend(part)
        else:
            session.rollback(max(0, session.position - amount))
    rest = IDS[session.position :] or IDS[-1:]
    if session.position == len(IDS):
        session.rollback(len(IDS) - 1)
        rest = IDS[session.position :]
    assert np.array_equal(session.extend(rest), clean[-1])


def test_two_interleaved_sequences(network: Transformer, clean: np.ndarray) -> None:
    other_ids = IDS[::-1]
    other_clean = logits(network, other_ids)
    mine, other = new_session(network), new_session(network)
    for start in range(0, len(IDS), 37):
        part = slice(start, start + 37)
        assert np.array_equal(mine.all_logits(IDS[part]), clean[part])
        assert np.array_equal(other.all_logits(other_ids[part]), other_clean[part])


def test_threads_change_no_bit(tmp_path: Path, clean: np.ndarray) -> None:
    folder = write_model(load_golden("tiny300"), tmp_path)
    assert np.array_equal(logits(open_network(folder, threads=1), IDS), clean)


def test_reuse_keeps_the_common_prefix_but_the_last_token(network: Transformer) -> None:
    session = new_session(network)
    session.extend(IDS[:50])
    assert session.reuse(IDS[:60]) == 50
    assert session.reuse(IDS[:50]) == 49
    assert session.reuse([*IDS[:20], 1, 2]) == 20
    assert session.reuse([9, 9]) == 0


def test_cancelling_keeps_finished_chunks_and_continues(
    network: Transformer, clean: np.ndarray
) -> None:
    session, cancelled = new_session(network), threading.Event()
    with pytest.raises(Cancelled):
        session.extend(IDS, on_progress=lambda done, total: cancelled.set(), cancelled=cancelled)
    first = len(IDS) // -(-len(IDS) // CHUNK_TOKENS)  # chunks are of equal length
    assert session.position == first and session.tokens == IDS[:first]
    assert np.array_equal(session.extend(IDS[first:]), clean[-1])


def test_an_interrupted_layer_leaves_no_trace(
    network: Transformer, clean: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = new_session(network)
    session.extend(IDS[:100])
    with monkeypatch.context() as patch:
        patch.setattr(network.blocks[4], "moe", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            session.extend([5] * 60)
    assert session.position == 100
    assert np.array_equal(session.extend(IDS[100:]), clean[-1])


def test_what_does_not_fit_or_make_sense(network: Transformer) -> None:
    session = new_session(network, ctx_size=10)
    with pytest.raises(DoesNotFitError, match="11 tokens"):
        session.extend(IDS[:11])
    with pytest.raises(UsageError, match="no tokens"):
        session.extend([])
    with pytest.raises(UsageError, match="outside the vocabulary"):
        session.extend([network.config.vocab_size])
    with pytest.raises(UsageError, match="-1"):
        session.extend([-1])
    session.extend(IDS[:10])
    with pytest.raises(UsageError):
        session.rollback(11)


def test_running_out_of_memory_is_told(
    network: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = new_session(network)

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(network, "forward", full)
    with pytest.raises(DoesNotFitError, match="out of memory") as caught:
        session.extend(IDS[:3])
    assert "--ctx-size" in (caught.value.hint or "")
    session.store = FullStore()
    with pytest.raises(DoesNotFitError, match="not enough memory for a stored session") as caught:
        session.reuse(IDS)
    assert "--numerics fast" in (caught.value.hint or "")  # this network is exact
    monkeypatch.setattr(network, "new_state", full)
    with pytest.raises(DoesNotFitError, match="not enough memory") as caught:
        new_session(network)
    assert caught.value.hint == "close other programs"


class FullStore:
    """Has what is wanted, and finds no memory for it."""

    def load(self, *_: object) -> None:
        raise MemoryError


def test_state_grows_with_the_context_only(network: Transformer) -> None:
    session = new_session(network)
    session.extend(IDS[:1])
    before = session.state_bytes
    session.extend(IDS[1:])
    assert before < session.state_bytes < before + 64 * len(IDS) * 64
