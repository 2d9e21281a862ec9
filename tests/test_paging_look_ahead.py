"""Whether to guess: tokens with and without in turns, and only what tells something counts."""

from collections.abc import Callable

import pytest

from localv4.paging.look_ahead import STAY_TOKENS, TURN_TOKENS, TURNS, LookAhead

COMPARED = len(TURNS) * TURN_TOKENS


def run(decider: LookAhead, tokens: int, seconds: Callable[[int, bool], float]) -> list[bool]:
    """Return what was decided for each token, which took `seconds(number, on)`."""
    found = []
    for number in range(tokens):
        found.append(decider.on)
        decider.note(seconds(number, decider.on), True)
    return found


@pytest.mark.parametrize(
    ("on_s", "off_s", "winner"), [(1.0, 1.2, True), (1.2, 1.0, False), (1.0, 1.001, False)]
)
def test_the_faster_way_stays_and_is_compared_again(
    on_s: float, off_s: float, winner: bool
) -> None:
    decided = run(LookAhead(), 2 * COMPARED + STAY_TOKENS + 1, lambda _, on: on_s if on else off_s)
    turns = [on for on in TURNS for _ in range(TURN_TOKENS)]
    assert decided[:COMPARED] == turns
    assert decided[COMPARED : COMPARED + STAY_TOKENS] == [winner] * STAY_TOKENS
    assert decided[COMPARED + STAY_TOKENS : -1] == turns
    assert decided[-1] == winner


@pytest.mark.parametrize("slope", [-0.02, 0.02])
@pytest.mark.parametrize(("on_s", "off_s"), [(1.0, 1.1), (1.1, 1.0)])
def test_a_text_that_gets_slower_or_faster_does_not_decide(
    on_s: float, off_s: float, slope: float
) -> None:
    decided = run(
        LookAhead(), COMPARED + 1, lambda i, on: (on_s if on else off_s) * (2 + slope * i)
    )
    assert decided[-1] == (on_s < off_s)


def test_tokens_that_tell_nothing_do_not_count() -> None:
    decider = LookAhead()
    for _ in range(10 * COMPARED):
        decider.note(0.1, False)
    assert decider.on
    for _ in range(TURN_TOKENS):
        decider.note(1.0, True)
    assert not decider.on
