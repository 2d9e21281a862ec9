"""Whether to guess what the next layer needs: only while that makes tokens faster.

A guess that is right saves waiting; one that is wrong keeps the disk busy and takes a slot. Which
of both wins depends on disk, memory and text, so it is measured: some tokens with guesses and some
without, then the faster way for a while, and again. Both ways take turns so that neither has all
the earlier tokens: memory fills, and texts change.
"""

from statistics import median

TURNS = (True, False, False, True)
"""With guesses or not, in a comparison: whatever changes steadily meanwhile weighs the same."""

TURN_TOKENS = 8

STAY_TOKENS = 256
"""Tokens for which the winner stays before it is compared again."""

GAIN = 0.98
"""Guessing has to need less than this share of the time: what it saves must be worth the reads."""


class LookAhead:
    """Decides for each token; to be told how long tokens took."""

    def __init__(self) -> None:
        self.on = True
        self._times: dict[bool, list[float]] = {True: [], False: []}
        self._left = 0

    def note(self, seconds: float, tells: bool) -> None:
        """Count a token; `tells`: it waited for a record or was spared that by a guess.

        Others, and those of a time when memory is being filled, tell nothing.
        """
        if not tells:
            return
        if self._left > 0:
            self._left -= 1
            self.on = self.on if self._left else TURNS[0]
            return
        self._times[self.on].append(seconds)
        turn = sum(map(len, self._times.values())) // TURN_TOKENS
        if turn < len(TURNS):
            self.on = TURNS[turn]
            return
        self.on = median(self._times[True]) < GAIN * median(self._times[False])
        self._times, self._left = {True: [], False: []}, STAY_TOKENS
