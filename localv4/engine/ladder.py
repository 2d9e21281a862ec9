"""Snapshots of one timeline at ever larger steps, so that a way back is never the whole way.

The rule: rungs stand at multiples of 128 tokens; every one is put up, and those are taken down that
are not needed for this: between a rung that is d tokens behind the tip of the timeline and the next
one below it there are no more than max(128, d / 2) tokens. So going back d tokens leaves fewer than
max(128, d / 2) to process anew. The distances of every second rung grow by half or more, so that T
tokens have at most 6 + 3.5 log2(T / 256) rungs, and 27 at a million where they can be anywhere.
A prompt that is read in chunks gets those that its chunks pass (`model.snapshot.Passing`) where the
host computes; a GPU leaves those at the ends of the chunks.

The rungs next to the ends of the last prompts stay whatever the rule says: a question that is asked
anew or changed is the most common way back, however long its answer was.
"""

import bisect
from collections.abc import Sequence

from localv4.model.snapshot import Snapshot

STEP_TOKENS = 128
"""Rungs stand at its multiples: there the released models have no unfinished entries."""

KEPT_PROMPTS = 8
"""Ends of prompts whose rungs are kept."""


def allowed_gap(back: int) -> int:
    """Return how far below a rung the next may be, when it is `back` tokens behind the tip.

    It grows as the timeline does, so that what is taken down is not missed later.
    """
    return max(STEP_TOKENS, back // 2)


def last_step(position: int) -> int:
    """Return the last multiple of STEP_TOKENS that is not beyond `position`."""
    return position // STEP_TOKENS * STEP_TOKENS


class Ladder:
    """The rungs of one timeline, by position."""

    def __init__(self) -> None:
        self._rungs: list[Snapshot] = []
        self._prompt_ends: list[int] = []

    @property
    def positions(self) -> list[int]:
        """Where the rungs stand, in ascending order."""
        return [rung.position for rung in self._rungs]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the rungs take; forks share them."""
        return sum(rung.nbytes for rung in self._rungs)

    @property
    def landmarks(self) -> list[Snapshot]:
        """The rungs worth writing down: at the ends of prompts, and the highest."""
        wanted = {*self._prompt_ends, *self.positions[-1:]}
        return [rung for rung in self._rungs if rung.position in wanted]

    def add(self, rung: Snapshot) -> None:
        """Put in a rung, instead of another one at its position."""
        index = bisect.bisect_left(self.positions, rung.position)
        del self._rungs[index : index + (rung.position in self.positions)]
        self._rungs.insert(index, rung)

    def note_prompt(self, end: int) -> None:
        """Keep the rung next to the end of a prompt, of the newest KEPT_PROMPTS of them."""
        place = last_step(end)
        if place not in self._prompt_ends[-1:]:
            self._prompt_ends = [*self._prompt_ends, place][-KEPT_PROMPTS:]

    def thin_out(self, tip: int) -> None:
        """Take down what a timeline that ends at `tip` does not need."""
        needed = _needed(self.positions, tip) | set(self._prompt_ends)
        self._rungs = [rung for rung in self._rungs if rung.position in needed]

    def below(self, position: int) -> Snapshot | None:
        """Return the highest rung that is not beyond `position`."""
        index = bisect.bisect_right(self.positions, position)
        return self._rungs[index - 1] if index else None

    def cut(self, position: int) -> None:
        """Forget the rungs beyond `position`: what follows it will be other tokens."""
        self._rungs = [rung for rung in self._rungs if rung.position <= position]
        self._prompt_ends = [end for end in self._prompt_ends if end <= position]

    def copy(self) -> "Ladder":
        """Return a ladder with the same rungs, to change by itself."""
        twin = Ladder()
        twin._rungs, twin._prompt_ends = self._rungs.copy(), self._prompt_ends.copy()
        return twin


def wanted_rungs(position: int, tip: int) -> list[int]:
    """Return where a timeline that goes from `position` to `tip` at once wants rungs."""
    steps = range(last_step(position) + STEP_TOKENS, tip + 1, STEP_TOKENS)
    return sorted(_needed(steps, tip))


def _needed(positions: Sequence[int], tip: int) -> set[int]:
    """Return those of some ascending positions that a timeline that ends at `tip` needs."""
    index, needed = len(positions) - 1, set[int]()
    while index >= 0:
        place = positions[index]
        needed.add(place)
        lowest = bisect.bisect_left(positions, place - allowed_gap(tip - place))
        index = min(lowest, index - 1)
    return needed
