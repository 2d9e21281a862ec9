"""Snapshots of one timeline at ever larger steps, so that a way back is never the whole way.

The rule: rungs stand at multiples of 128 tokens. From a rung to the tip of the timeline it may be
less than 512 tokens for every multiple to have one, less than 1,024 for every second, less than
2,048 for every fourth, and so on. So going back d tokens leaves fewer than max(128, 2/3 d) to
process anew, and T > 512 tokens have at most 5 + 2 log2(T / 512) rungs, 27 at a million. Of a
prompt that is read in large chunks, only those at the ends of the chunks can be had.

The rungs next to the ends of the last prompts stay whatever the rule says: a question that is asked
anew or changed is the most common way back, however long its answer was.
"""

import bisect

from localv4.model.snapshot import Snapshot

STEP_TOKENS = 128
"""Rungs stand at its multiples: there the released models have no unfinished entries."""

NEAR_STEPS = 4
"""As many steps behind the tip all rungs are kept; twice as far every second, and so on."""

KEPT_PROMPTS = 8
"""Ends of prompts whose rungs are kept."""


def is_wanted(position: int, tip: int) -> bool:
    """Say whether the rule asks for a rung at `position` when the timeline ends at `tip`.

    What is not wanted now is not wanted later, so that a rung can be dropped for good.
    """
    step = STEP_TOKENS
    while tip - position >= NEAR_STEPS * step:
        step *= 2
    return position % step == 0


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
        """Drop what a timeline that ends at `tip` does not want."""
        self._rungs = [
            rung
            for rung in self._rungs
            if is_wanted(rung.position, tip) or rung.position in self._prompt_ends
        ]

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
