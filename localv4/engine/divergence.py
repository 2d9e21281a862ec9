"""How far a model's predictions are from those of a base model, token by token."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from localv4.engine.engine import Engine
from localv4.engine.logits_file import decode, encode
from localv4.engine.noise import RoundingNoise
from localv4.engine.scoring import Estimate, Row, exponential, log_softmax, logits_rows, mean
from localv4.engine.windows import Windows

OnTokens = Callable[[int, int], None]


class Base(Protocol):
    """Where the base model's log-probabilities come from."""

    @property
    def vocab(self) -> int:
        """Tokens of the vocabulary."""

    @property
    def windows(self) -> Windows:
        """What the base model has read."""

    @property
    def least_log_p(self) -> float:
        """Tokens that the base takes for less likely than this are left out of the divergence."""

    def rows(self, index: int) -> Iterator[Row]:
        """Yield log p (vocab,) for each counted prediction of a window."""


class LiveBase:
    """A base model that is loaded beside the other; nothing of its distributions is cut off."""

    least_log_p = -np.inf

    def __init__(self, engine: Engine, windows: Windows) -> None:
        self.windows = windows
        self.vocab = engine.config.vocab_size
        self._engine = engine

    def rows(self, index: int) -> Iterator[Row]:
        """Yield log p (vocab,) for each counted prediction of a window."""
        for logits in logits_rows(self._engine, self.windows.inputs(index), self.windows.first):
            yield log_softmax(logits)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One prediction of two models: divergence in nats, losses -log p of the true token."""

    kld: float
    same_top: bool
    loss: float
    base_loss: float


@dataclass(frozen=True)
class Divergence:
    """All comparisons of two models: the fields of Comparison as arrays (predictions,)."""

    kld: Row
    same_top: NDArray[np.bool_]
    loss: Row
    base_loss: Row

    @classmethod
    def of(cls, comparisons: list[Comparison]) -> "Divergence":
        """Collect comparisons; there is at least one."""
        return cls(
            np.array([one.kld for one in comparisons]),
            np.array([one.same_top for one in comparisons]),
            np.array([one.loss for one in comparisons]),
            np.array([one.base_loss for one in comparisons]),
        )

    @property
    def mean(self) -> Estimate:
        """Mean divergence, in nats."""
        return mean(self.kld)

    @property
    def most(self) -> float:
        """The largest divergence."""
        return float(self.kld.max())

    def percentile(self, percent: float) -> float:
        """Return the divergence that so many percent do not exceed, interpolated linearly."""
        return float(np.percentile(self.kld, percent))

    @property
    def agreement(self) -> Estimate:
        """Share of predictions whose likeliest token is the same."""
        share = float(self.same_top.mean())
        return Estimate(share, float(np.sqrt(share * (1 - share) / max(1, self.kld.size - 1))))

    @cached_property
    def delta_p(self) -> Row:
        """Change of the probability of the true token."""
        change: Row = np.exp(-self.loss) - np.exp(-self.base_loss)
        return change

    @property
    def rms_delta_p(self) -> Estimate:
        """Root of the mean square of that change."""
        square = mean(self.delta_p**2)
        root = float(np.sqrt(square.value))
        return Estimate(root, 0.5 * square.error / root if root else 0.0)

    @property
    def mean_delta_p(self) -> Estimate:
        """Mean of that change: a model that became worse has it below 0."""
        return mean(self.delta_p)

    @property
    def perplexity(self) -> Estimate:
        """Of the model."""
        return exponential(mean(self.loss))

    @property
    def base_perplexity(self) -> Estimate:
        """Of the base model."""
        return exponential(mean(self.base_loss))

    @property
    def ratio(self) -> Estimate:
        """Perplexity of the model over that of the base; the error knows that both go together."""
        return exponential(mean(self.loss - self.base_loss))


@dataclass(frozen=True, slots=True)
class Measured:
    """A divergence, and what it would be for the same model (over the first windows only).

    `rounding`: the model under rounding noise against itself. `storage`: the model against its
    own row as a file holds it, where the base is a file. None where not measured.
    """

    divergence: Divergence
    rounding: Divergence | None
    storage: Divergence | None


def compare(log_p: Row, base: Row, target: int, least_log_p: float = -np.inf) -> Comparison:
    """Compare log p (vocab,) of a model with that of a base for one prediction.

    KLD = sum of p_base (log p_base - log p) over the tokens with log p_base > least_log_p.
    """
    weights = np.exp(base)
    if least_log_p > -np.inf:
        weights[base <= least_log_p] = 0.0
    return Comparison(
        float((weights * (base - log_p)).sum()),
        bool(log_p.argmax() == base.argmax()),
        -float(log_p[target]),
        -float(base[target]),
    )


def measure(
    engine: Engine, base: Base, noisy_windows: int = 0, on_tokens: OnTokens | None = None
) -> Measured:
    """Compare a model with a base on all its windows; the noise floors come from the first ones.

    `on_tokens(done, total)` is called after each window. The vocabularies must be of one size.
    """
    windows = base.windows
    found: dict[str, list[Comparison]] = {"model": [], "rounding": [], "storage": []}
    noise = RoundingNoise(engine.network.weights)
    for index in range(len(windows)):
        floors = noise if index < noisy_windows else None
        for name, comparison in _compare_window(engine, base, index, floors):
            found[name].append(comparison)
        if on_tokens is not None:
            on_tokens((index + 1) * windows.size, windows.tokens.size)
    floor = {name: Divergence.of(found[name]) if found[name] else None for name in found}
    return Measured(Divergence.of(found["model"]), floor["rounding"], floor["storage"])


def _compare_window(
    engine: Engine, base: Base, index: int, noise: RoundingNoise | None
) -> Iterator[tuple[str, Comparison]]:
    windows, least = base.windows, base.least_log_p
    ids, targets = windows.inputs(index), windows.targets(index)[windows.first :]
    own = logits_rows(engine, ids, windows.first)
    others = base.rows(index)
    noisy = None if noise is None else logits_rows(engine, ids, windows.first, noise)
    for target, logits, other in zip(targets, own, others, strict=True):
        log_p = log_softmax(logits)
        yield "model", compare(log_p, other, target, least)
        if noisy is None:
            continue
        yield "rounding", compare(log_softmax(next(noisy)), log_p, target, least)
        if least > -np.inf:
            stored = decode(encode(logits), base.vocab)
            yield "storage", compare(log_p, stored, target, least)
