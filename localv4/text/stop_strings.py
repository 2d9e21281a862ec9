"""Cut a text that arrives in pieces at the first stop string."""

from collections.abc import Iterable, Sequence

from localv4.errors import UsageError


def held_length(text: str, patterns: Iterable[str]) -> int:
    """Return how many characters at the end of `text` may be the beginning of a pattern."""
    longest = 0
    for pattern in patterns:
        for length in range(min(len(pattern) - 1, len(text)), longest, -1):
            if text.endswith(pattern[:length]):
                longest = length
                break
    return longest


class StopFilter:
    """Let text through up to a stop string, of which no character ever gets out.

    The string that is complete first wins, and of two that end together the longer one. So the
    result does not depend on how the text was cut into pieces.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        if any(not pattern for pattern in stop):
            raise UsageError("--stop must not be empty")
        self.stopped = False
        self._stop = tuple(stop)
        self._held = ""

    def feed(self, text: str) -> str:
        """Return the text that is certainly not part of a stop string."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(text.find(pattern), pattern) for pattern in self._stop]
        matches = [(at + len(pattern), at) for at, pattern in found if at >= 0]
        if matches:
            self.stopped = True
            self._held = ""
            return text[: min(matches)[1]]
        passed = len(text) - held_length(text, self._stop)
        self._held = text[passed:]
        return text[:passed]

    def flush(self) -> str:
        """Return what was held back, when no more text follows."""
        held, self._held = self._held, ""
        return held
