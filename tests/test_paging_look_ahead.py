"""Whether to guess: windows of tokens with and without, and only what tells something counts."""

import pytest

from localv4.paging.look_ahead import STAY, WINDOW, LookAhead


def run(decider: LookAhead, windows: int, on_s: float, off_s: float) -> list[bool]:
    """Return what was decided for each window."""
    found = []
    for _ in range(windows):
        found.append(decider.on)
        for _ in range(WINDOW):
            decider.note(on_s if decider.on else off_s, True)
    return found


@pytest.mark.parametrize(
    ("on_s", "off_s", "winner"), [(1.0, 1.2, True), (1.2, 1.0, False), (1.0, 1.001, False)]
)
def test_the_faster_way_stays_and_is_compared_again(
    on_s: float, off_s: float, winner: bool
) -> None:
    decided = run(LookAhead(), 2 + STAY + 3, on_s, off_s)
    assert decided[:2] == [True, False]
    assert decided[2 : 2 + STAY] == [winner] * STAY
    assert (not winner) in decided[2 + STAY :]


def test_tokens_that_needed_nothing_do_not_count() -> None:
    decider = LookAhead()
    for _ in range(10 * WINDOW):
        decider.note(0.1, False)
    assert decider.on
    for _ in range(WINDOW):
        decider.note(1.0, True)
    assert not decider.on
