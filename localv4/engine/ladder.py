"""Snapshots of one timeline at ever larger steps, so that a way back is never the whole way.

`model.rungs` tells where they stand. A prompt that is read in chunks gets those that its chunks
pass (`model.snapshot.Passing`) where the host computes; a GPU leaves those at the ends of the
chunks.
"""

import bisect

from localv4.model.rungs import KEPT_PROMPTS, last_step, needed_rungs
from localv4.model.snapshot import Snapshot


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
        needed = needed_rungs(self.positions, tip) | set(self._prompt_ends)
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
