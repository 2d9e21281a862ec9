"""Notice that the topic has changed, and remember which experts an earlier topic used.

What a text is about decides which experts are hot. Within a topic, the longer one counts the
better the order; at a change the counts are wrong at once, and waiting until they have decayed
costs a miss for each expert of the new topic. So counts decay slowly here, and at a change of
topic they are put aside. When the next tokens are explained well by counts that were put aside
before, those are taken up again: that topic is back.
"""

import numpy as np
from numpy.typing import NDArray

from localv4.paging.uses import Heat, Uses

MOST_TOPICS = 16
"""Topics that are remembered, 44 kB each for Flash; the one that was met longest ago goes first."""

_DRIFT, _ALARM = 1.0, 8.0  # in standard deviations of a token's surprise (Page's CUSUM)
_LEARNING = 16  # first tokens, which show what surprise is usual in a topic
_WINDOW = 64  # tokens over which the usual surprise is averaged then
_LEAST_DEVIATION = 0.02  # a perfectly steady text is no reason for an alarm
_RECENT = 0.5 ** (1 / 4)  # a half-life of 4 tokens tells the new topic from the old at an alarm
_BACKGROUND = 8.0  # tokens for which the mixture of all topics counts when a new one begins
_WAIT = 6  # tokens that show which topic is back
_MARGIN = 0.1  # nats per use by which it must be likelier than the mixture of all topics
_UNSEEN, _UNKNOWN = 0.05, 0.1  # uses that every expert is credited with, in counts and in shares
_LEAST_TOKENS = 32  # a shorter stretch is no topic to remember


class TopicMemory:
    """Watches the tokens of one `Uses` and rewrites its heats when the topic changes.

    `topics` are the scores (layers, experts) of earlier topics, the one met last at the end.
    """

    def __init__(self) -> None:
        self.topics: list[Heat] = []
        self.changes = 0
        self.recalls = 0
        self._recent: Heat | None = None
        self._clock = -1
        self._is_known = False  # whether the present topic was remembered before
        self._restart()

    def observe(self, uses: Uses) -> None:
        """Learn from the token that has the clock's time and whose uses are recorded."""
        clock = int(uses.clock[0])
        scores = uses.scores()
        used = uses.last == clock
        if not used.any():
            return
        if self._recent is None or clock != self._clock + 1:  # the first token, or after a prompt
            self._recent = np.zeros_like(scores)
            is_known = self._is_known
            self._restart()
            self._is_known, self._is_unsettled = is_known, True
        self._clock = clock
        self._recent *= _RECENT
        self._recent[used] += 1
        self._age += 1
        if self._is_change(_surprise(scores, used)):
            self._leave(uses, scores, int(np.count_nonzero(used)))
        elif self._age == _WAIT and self._is_unsettled:
            self._recall(uses, scores)

    def remember(self, uses: Uses) -> None:
        """Put the present topic aside too, at the end of a session."""
        if self._age >= _LEAST_TOKENS or self._is_known:
            self._keep(uses.scores())

    def _restart(self) -> None:
        """Begin to learn what surprise is usual."""
        self._age = 0  # tokens since the topic began
        self._mean = self._variance = self._sum = 0.0
        self._is_unsettled = self._is_known = False

    def _is_change(self, surprise: float) -> bool:
        """Say whether surprises have been larger than usual for so long that it is no accident."""
        if self._age <= _WAIT:
            return False  # what begins is surprising, but only at first
        if self._age <= _LEARNING:
            share = 1 / (self._age - _WAIT)
        else:
            share = 1 / _WINDOW
            deviation = max(self._variance**0.5, _LEAST_DEVIATION)
            self._sum = max(0.0, self._sum + (surprise - self._mean) / deviation - _DRIFT)
            if self._sum > _ALARM:
                return True
        self._mean += (surprise - self._mean) * share
        self._variance += ((surprise - self._mean) ** 2 - self._variance) * share
        return False

    def _leave(self, uses: Uses, scores: Heat, uses_per_token: int) -> None:
        """Put the old topic's counts aside and go on with those of the last tokens.

        What nothing is known of yet is ordered by the mixture of all topics, the old one among
        them.
        """
        assert self._recent is not None
        old = np.maximum(scores - self._recent, 0)
        if self._age >= _LEAST_TOKENS or self._is_known:
            self._keep(old)
        mixture = np.sum([*self.topics, old], axis=0)
        share = _BACKGROUND * uses_per_token / max(float(mixture.sum()), 1.0)
        uses.restart(share * mixture + self._recent)
        self._recent[:] = 0
        self._restart()
        self._is_unsettled = True
        self.changes += 1

    def _keep(self, scores: Heat) -> None:
        self.topics = [*self.topics[-MOST_TOPICS + 1 :], scores]

    def _recall(self, uses: Uses, scores: Heat) -> None:
        """Take a remembered topic up again if it explains the first tokens of this one."""
        self._is_unsettled = False
        if not self.topics:
            return
        assert self._recent is not None
        used = self._recent > 0
        weights = self._recent[used] / self._recent.sum()
        known = [_explanation(topic, used, weights) for topic in self.topics]
        best = int(np.argmax(known))
        mixture = np.sum(self.topics, axis=0)
        # alone it is the mixture too: then it must beat not knowing anything
        rival = _explanation(mixture, used, weights) if len(known) > 1 else 0.0
        if known[best] > rival + _MARGIN:
            uses.restart(scores + self.topics.pop(best))
            self._is_known = True
            self.recalls += 1


def _surprise(scores: Heat, used: NDArray[np.bool_]) -> float:
    """Return how unexpected a token's experts were, in nats per use; 0 if all are equally hot."""
    before = scores[used] - 1
    mean = (float(scores.sum()) - len(before)) / scores.size
    return float(np.log(mean + _UNSEEN) - np.log(np.maximum(before, 0) + _UNSEEN).mean())


def _explanation(topic: Heat, used: NDArray[np.bool_], weights: Heat) -> float:
    """Return the mean logarithm of the shares, in a topic, of experts that were used."""
    shares = topic[used] / topic.mean() + _UNKNOWN
    return float(np.log(shares) @ weights)
