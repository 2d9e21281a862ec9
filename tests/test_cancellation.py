"""A wish to stop ends the program that runs, and leaves the state as it was."""

import threading
import time

import numpy as np
import pytest
from networks import wide_network
from numpy.typing import NDArray
from terminal import needs_jit
from test_fast import make_fast

from localv4.cancellation import Cancellation
from localv4.errors import Cancelled
from localv4.kernels.operation import COUNTER
from localv4.model import fast_network
from localv4.model.fast import FastTransformer
from localv4.model.fast_network import NO_CHUNK
from localv4.model.matrix import Matrix
from localv4.model.state import State

pytestmark = needs_jit
IDS = np.random.default_rng(0).integers(0, 90, 420)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> FastTransformer:
    folder = tmp_path_factory.mktemp("model")
    return make_fast(wide_network(folder), 2)


def test_the_listener_is_told_once_it_is_set() -> None:
    event, told = Cancellation(), []
    event.set()
    event.clear()
    event.listener = lambda: told.append(event.is_set())
    event.set()
    assert told == [True]


def stop_in(network: FastTransformer, part: NDArray[np.int64], state: State, turn: int) -> bool:
    """Stop a forward pass in its program number `turn`; say whether that was cut short."""
    event, inner, cut = Cancellation(), network._network, []
    run, count = inner.team.run, 0

    def watched(program: NDArray[np.int64]) -> int:
        nonlocal count
        count += 1
        if count != turn:
            return run(program)

        def stop() -> None:
            deadline = time.monotonic() + 5
            while program[0, COUNTER] == 0 and time.monotonic() < deadline:
                pass  # it has begun when a chunk was taken
            event.set()

        program[:, COUNTER] = 0
        thread = threading.Thread(target=stop)
        thread.start()
        done = run(program)
        thread.join()
        cut.append(done < len(program) or bool((program[:, COUNTER] >= NO_CHUNK).all()))
        return done

    inner.team.run = watched  # type: ignore[method-assign]
    network.cancelled = event
    try:
        with pytest.raises(Cancelled):
            network.forward(part, state)
    finally:
        network.cancelled = None
        del inner.team.run
    return cut == [True]


@pytest.mark.parametrize(("first", "count"), [(130, 290), (300, 1), (400, 7)])
def test_what_was_cut_short_can_be_done_again(
    network: FastTransformer, first: int, count: int
) -> None:
    part = IDS[first : first + count]
    clean = network.new_state()
    network.forward(IDS[:first], clean)
    expected = network.forward(part, clean)
    state, cut = network.new_state(), 0
    network.forward(IDS[:first], state)
    for turn in (1, 1, 1) if count == 1 else (1, 2, 3, 5, 8):
        cut += stop_in(network, part, state, turn)
        assert state.position == first
    assert cut
    assert np.array_equal(network.forward(part, state), expected)


def test_rows_that_were_cut_short_can_be_done_again(network: FastTransformer) -> None:
    states = [network.new_state() for _ in range(3)]
    for number, state in enumerate(states):
        network.forward(IDS[: 130 + number], state)
    event = Cancellation()
    network.cancelled = event
    event.set()
    with pytest.raises(Cancelled):
        network.decode_rows(IDS[:3], states)
    network.cancelled = None
    assert [state.position for state in states] == [130, 131, 132]
    expected = [network.forward(IDS[n : n + 1], _again(network, n)) for n in range(3)]
    assert np.array_equal(network.decode_rows(IDS[:3], states), np.concatenate(expected))


def _again(network: FastTransformer, number: int) -> State:
    state = network.new_state()
    network.forward(IDS[: 130 + number], state)
    return state


def test_embeddings_are_read_in_parts(
    network: FastTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    event, sizes, look_up = Cancellation(), [], fast_network.look_up

    def watched(matrix: Matrix, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        sizes.append(len(ids))
        if len(sizes) == 3:
            event.set()
        return look_up(matrix, ids)

    monkeypatch.setattr(fast_network, "look_up", watched)
    state, network.cancelled = network.new_state(), event
    with pytest.raises(Cancelled):
        network.forward(IDS, state)
    network.cancelled = None
    assert sizes == [fast_network.LOOKED_UP] * 3 and state.position == 0
