"""Choose the next token from logits.

Order of the steps, as in transformers: repetition penalty, temperature, top-k, top-p, min-p. Of
tokens that are equally likely at a border, those with the lowest ids stay.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localv4.engine.scores import Scores
from localv4.errors import UsageError
from localv4.kernels.survey import ERROR

_FIRST_SORTED = 256  # tokens that top-p sorts at first; a sharp distribution needs no more
_GROWTH = 8
_DEPTHS = (4, 8, 16)  # temperatures below the best where the tokens of top-p are looked for
_PENALTY_BOUNDS = (0.01, 100.0)  # no logit overflows, and no setting beyond makes sense

Floats = NDArray[np.float32] | NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose tokens; raises UsageError for impossible settings.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 are off;
    `top_p` 0 keeps the most likely token. Without a `seed` each run differs.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("--temp", self.temperature, 0.0, math.inf)
        _check("--top-p", self.top_p, 0.0, 1.0)
        _check("--top-k", self.top_k, 0, math.inf)
        _check("--min-p", self.min_p, 0.0, 1.0)
        _check("--repeat-penalty", self.repetition_penalty, *_PENALTY_BOUNDS)
        if self.seed is not None:
            _check("--seed", self.seed, 0, math.inf)


def _check(flag: str, value: float, low: float, high: float) -> None:
    """Raise UsageError unless `value` is a finite number from `low` to `high`."""
    if low <= value <= high and value != math.inf:
        return
    bounds = f"{low:g} or more" if high == math.inf else f"from {low:g} to {high:g}"
    raise UsageError(f"{flag} must be {bounds}, not {value}")


class Sampler:
    """Picks tokens for one answer; equal settings, seed and logits give equal tokens.

    It looks at few tokens where those certainly lead to the one that all would lead to.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def pick(self, logits: NDArray[np.float32], recent: Sequence[int] = ()) -> int:
        """Return a token id.

        logits (vocab,) f32, where -inf forbids a token; `recent` are the ids that the repetition
        penalty applies to. Raise NumericsError for NaN, +inf, or when nothing is allowed.
        """
        settings = self._sampling
        greedy = settings.temperature == 0 or settings.top_p == 0 or settings.top_k == 1
        selects = settings.top_k > 0 or (settings.top_p == 1 and settings.min_p > 0)
        weighed = None if greedy or selects else settings.temperature
        scores = Scores(logits, recent, settings.repetition_penalty, weighed)
        if greedy:
            return scores.best_id()
        chance = self._random.random()
        picked = self._pick_from_few(scores, chance)
        return self._pick_from_all(scores, chance) if picked is None else picked

    def _pick_from_all(self, scores: Scores, chance: float) -> int:
        ids, weights = self._candidates(scores.all())
        return int(ids[_draw(weights, chance)])

    def _pick_from_few(self, scores: Scores, chance: float) -> int | None:
        """Do the same without looking at all tokens; None if the result is not certain."""
        settings = self._sampling
        if settings.top_k > 0:
            few = scores.highest(settings.top_k)
        elif settings.top_p < 1:
            return self._pick_from_nucleus(scores, chance)
        elif settings.min_p > 0:
            few = scores.at_least(scores.best + settings.temperature * _log_below(settings.min_p))
        else:
            return scores.draw(chance)
        if few is None:
            return None
        ids, own = few
        places, weights = self._candidates(own)
        return int(ids[places[_draw(weights, chance)]])

    def _pick_from_nucleus(self, scores: Scores, chance: float) -> int | None:
        settings = self._sampling
        mass = scores.mass()
        if mass is None:
            return None
        share = settings.top_p * mass * np.array([1 - ERROR, 1 + ERROR])
        for depth in _DEPTHS:
            few = scores.at_least(scores.best - depth * settings.temperature)
            if few is None:
                return None
            ids, own = few
            weights = _weights(own, settings.temperature)
            order = np.argsort(-weights, kind="stable")
            held = np.cumsum(weights[order])
            if held[-1] < share[1]:
                continue
            least, most = np.searchsorted(held, share).tolist()
            # whoever is not among the few must come after those that are kept
            if least != most or weights[order[least]] <= math.exp(-depth) * (1 + ERROR):
                return None
            kept = np.sort(order[: least + 1])
            kept = kept[weights[kept] >= settings.min_p]
            return int(ids[kept[_draw(weights[kept], chance)]])
        return None

    def _candidates(self, scores: Floats) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the ids that may be picked, ascending, and their weights.

        ids (n,) i64; weights (n,) f64, 1 for the most likely token, not normalised.
        """
        settings = self._sampling
        ids = _largest(scores, settings.top_k or scores.size)
        weights = _weights(scores[ids], settings.temperature)
        if settings.top_p < 1:
            kept = _nucleus(weights, settings.top_p)
            ids, weights = ids[kept], weights[kept]
        if settings.min_p > 0:
            likely = weights >= settings.min_p
            ids, weights = ids[likely], weights[likely]
        return ids, weights


def _log_below(share: float) -> float:
    """Return a number just below the logarithm of a share above 0."""
    return math.log(share) - 1e-9


def _largest(values: Floats, count: int) -> NDArray[np.int64]:
    """Return the ids of the `count` largest values, ascending; of equals the lowest ids."""
    if count >= values.size:
        return np.arange(values.size)
    border = np.partition(values, values.size - count)[values.size - count]
    above = np.flatnonzero(values > border)
    at_border = np.flatnonzero(values == border)[: count - above.size]
    return np.sort(np.concatenate([above, at_border]))


def _weights(scores: Floats, temperature: float) -> NDArray[np.float64]:
    """Return exp(score / temperature), scaled so that the largest is 1."""
    below_best = scores.astype(np.float64) - float(scores.max())
    with np.errstate(over="ignore"):  # a tiny temperature: the quotient is -inf, its weight 0
        return np.exp(below_best / temperature)


def _nucleus(weights: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """Return the places, ascending, of the fewest weights that hold the share `top_p` of all."""
    target = top_p * float(weights.sum())
    count = _FIRST_SORTED
    while True:
        places = _largest(weights, count)
        places = places[np.argsort(-weights[places], kind="stable")]
        held = np.cumsum(weights[places])
        if held[-1] >= target or places.size == weights.size:
            return np.sort(places[: int(np.searchsorted(held, target)) + 1])
        count *= _GROWTH


def _draw(weights: NDArray[np.float64], chance: float) -> int:
    """Return the place of the weight at which `chance`, from 0 to below 1, falls.

    A weight of 0 is never drawn: the place is the first whose running sum is above the chance, and
    even the greatest chance below 1 times the sum rounds to less than the sum.
    """
    held = np.cumsum(weights)
    return int(np.searchsorted(held, chance * held[-1], side="right"))
