"""Perplexity of a model over a text: one figure, and how it falls as the context grows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localv4.engine.engine import Engine
from localv4.engine.noise import RoundingNoise
from localv4.engine.scoring import Estimate, Row, exponential, log_softmax, logits_rows, mean
from localv4.engine.windows import Windows

OnTokens = Callable[[int, int], None]

FIRST_BUCKET = 16
"""Tokens up to the end of the first bucket of a curve; each further one ends at twice as many."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """The perplexity of predictions that saw `least` to `most` tokens before, `tokens` of them."""

    least: int
    most: int
    tokens: int
    perplexity: Estimate


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Losses -log p (windows, size - 1) of all tokens but the first of each window, in nats.

    Column i belongs to the token at position i + 1, which has i + 1 tokens before it; columns from
    `first` on count. `noisy` has the losses of the first windows under rounding noise.
    """

    losses: Row
    first: int
    noisy: Row

    @property
    def tokens(self) -> int:
        """How many predictions count."""
        return self.losses[:, self.first :].size

    @property
    def value(self) -> Estimate:
        """exp(mean loss), with the standard error of tokens taken as independent."""
        return exponential(mean(self.losses[:, self.first :]))

    @property
    def between_windows(self) -> float:
        """The standard error that follows from the spread of whole windows; NaN for one window.

        It does not take neighbouring tokens as independent, but needs many windows.
        """
        if len(self.losses) < 2:
            return float("nan")
        own = self.losses[:, self.first :].mean(axis=1)
        return self.value.value * float(own.std(ddof=1) / np.sqrt(len(own)))

    @property
    def floor(self) -> Estimate | None:
        """The relative change of the perplexity by rounding noise; None where it was not measured.

        The error is that of the mean difference of the losses of the same tokens.
        """
        if not len(self.noisy):
            return None
        calm = self.losses[: len(self.noisy), self.first :]
        change = exponential(mean(self.noisy[:, self.first :] - calm))
        return Estimate(change.value - 1, change.error)

    def curve(self) -> list[Bucket]:
        """Return the perplexity by the number of tokens before: 1 to 15, 16 to 31, 32 to 63, ...

        All predictions are in it, also those that do not count for `value`.
        """
        width, buckets, least, end = self.losses.shape[1], [], 1, FIRST_BUCKET
        while least <= width:
            most = min(end - 1, width)
            part = self.losses[:, least - 1 : most]
            buckets.append(Bucket(least, most, part.size, exponential(mean(part))))
            least, end = end, 2 * end
        return buckets


def measure(
    engine: Engine, windows: Windows, noisy_windows: int = 0, on_tokens: OnTokens | None = None
) -> Perplexity:
    """Read all windows; the first `noisy_windows` of them once more under rounding noise.

    `on_tokens(done, total)` is called after each window.
    """
    per_window, repeated = windows.size - 1, min(noisy_windows, len(windows))
    total, done = per_window * (len(windows) + repeated), 0
    runs: dict[bool, list[Row]] = {False: [], True: []}
    noise = RoundingNoise(engine.network.weights)
    for index, is_noisy in _order(len(windows), repeated):
        runs[is_noisy].append(_losses(engine, windows, index, noise if is_noisy else None))
        done += per_window
        if on_tokens is not None:
            on_tokens(done, total)
    noisy = np.array(runs[True]).reshape(repeated, per_window)
    return Perplexity(np.array(runs[False]), windows.first, noisy)


def _order(count: int, repeated: int) -> Iterator[tuple[int, bool]]:
    for index in range(count):
        yield index, False
        if index < repeated:
            yield index, True


def _losses(engine: Engine, windows: Windows, index: int, noise: RoundingNoise | None) -> Row:
    """Return -log p of every token of a window but the first, given those before it."""
    targets: NDArray[np.int32] = windows.targets(index)
    rows = logits_rows(engine, windows.inputs(index), noise=noise)
    return np.array([-log_softmax(row)[token] for row, token in zip(rows, targets, strict=True)])
