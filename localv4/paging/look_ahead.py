"""Whether to guess what the next layer needs: only while that makes tokens faster.

A guess that is right saves waiting; one that is wrong keeps the disk busy and takes a slot. Which
of both wins depends on disk, memory and text, so it is measured: a window of tokens with guesses,
one without, then the faster way for a while, and again.
"""

from statistics import median

WINDOW = 24
"""Tokens in a window of a comparison."""

STAY = 8
"""Windows for which the winner stays before it is compared again."""

GAIN = 0.98
"""Guessing has to need less than this share of the time: what it saves must be worth the reads."""


class LookAhead:
    """Decides for each token; to be told how long tokens took."""

    def __init__(self) -> None:
        self.on = True
        self._times: dict[bool, float] = {}
        self._window: list[float] = []
        self._left = 0

    def note(self, seconds: float, lacked: bool) -> None:
        """Count a token; `lacked`: it waited for a record or was spared that by a guess.

        Tokens that needed nothing tell nothing.
        """
        if not lacked:
            return
        self._window.append(seconds)
        if len(self._window) < WINDOW:
            return
        self._times[self.on] = median(self._window)
        self._window = []
        if self._left > 0:
            self._left -= 1
        elif len(self._times) < 2:
            self.on = not self.on
        else:
            self.on = self._times[True] < GAIN * self._times[False]
            self._times, self._left = {}, STAY
