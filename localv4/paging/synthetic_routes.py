"""Made-up routes with the statistics of real ones, for whoever has no trace yet.

Experts of a layer are likely by Zipf's law, in an order of their own for each topic, mixed with an
order that all topics share. Topics change at random and come back. Some experts of a token are
those of the token before. In hash layers the token decides: words are likely by Zipf's law too,
half of them in an order of the topic.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localv4.paging.trace import Chosen, Trace, TraceHead

LAYERS, HASH_LAYERS, EXPERTS, K = 43, 3, 256, 6
"""Of DeepSeek-V4-Flash."""

RECORD_BYTES = 13_369_344
"""An expert of Flash at 4.25 bits per weight."""

_VOCABULARY, _WORD_EXPONENT = 4096, 1.05
_TINY = np.float32(1e-30)


@dataclass(frozen=True, slots=True)
class Style:
    """How routes are distributed.

    `exponent` is that of Zipf's law, `common` the share of the order of all topics, `kept` the
    chance that an expert stays for the next token; a topic lasts `topic_tokens` on average.
    """

    exponent: float
    kept: float
    common: float = 0.4
    topics: int = 8
    topic_tokens: int = 450


STYLES = {
    "calibrated": Style(exponent=1.4, kept=0.1),
    "diverse": Style(exponent=1.2, kept=0.2),
}
"""Fitted to the hit rates of LRU that were published for Flash (docs/paging_policy.md): in
`calibrated` as for one conversation, in `diverse` flatter."""


def synthetic_trace(
    style: Style, tokens: int, seed: int = 0, record_bytes: int = RECORD_BYTES
) -> Trace:
    """Return the routes of a generated text: the same for the same arguments."""
    rng = np.random.default_rng(seed)
    topic = _topics(rng, style, tokens)
    likely = _likelihoods(rng, style)
    hashed = _hash_routes(rng, style, topic)
    chosen = np.empty((tokens, LAYERS, K), np.int16)
    chosen[:, :HASH_LAYERS] = hashed
    rows = np.arange(LAYERS - HASH_LAYERS)[:, None]
    for t in range(tokens):
        # the k largest of log p + Gumbel noise are k draws without replacement
        noise = rng.standard_exponential(likely.shape[1:], np.float32)
        merit = likely[topic[t]] - np.log(np.maximum(noise, _TINY))
        if t > 0:
            stay = rng.random((len(rows), K)) < style.kept
            merit[rows, chosen[t - 1, HASH_LAYERS:]] += np.where(stay, np.float32(1000), 0)
        chosen[t, HASH_LAYERS:] = np.argpartition(merit, EXPERTS - K, axis=1)[:, -K:]
    chosen.sort(axis=2)
    head = TraceHead("0" * 64, "synthetic", LAYERS, EXPERTS, K, (record_bytes,) * LAYERS)
    return Trace(head, chosen, np.zeros(tokens, bool))


def _zipf(count: int, exponent: float) -> NDArray[np.float64]:
    weights = np.arange(1, count + 1.0) ** -exponent
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares


def _topics(rng: np.random.Generator, style: Style, tokens: int) -> NDArray[np.int64]:
    """Return the topic of each token; one follows upon another."""
    topics: list[int] = []
    topic = int(rng.integers(style.topics))
    while len(topics) < tokens:
        topics += [topic] * int(rng.geometric(1 / style.topic_tokens))
        topic = int(topic + rng.integers(1, style.topics)) % style.topics
    return np.array(topics[:tokens])


def _likelihoods(rng: np.random.Generator, style: Style) -> NDArray[np.float32]:
    """Return the logarithms of shares of experts (topics, layers, experts), hash layers apart."""
    shares = _zipf(EXPERTS, style.exponent)
    shape = (1 + style.topics, LAYERS - HASH_LAYERS, EXPERTS)
    orders = rng.permuted(np.broadcast_to(shares, shape), axis=2)
    mixed = style.common * orders[0] + (1 - style.common) * orders[1:]
    logarithms: NDArray[np.float32] = np.log(mixed).astype(np.float32)
    return logarithms


def _hash_routes(rng: np.random.Generator, style: Style, topic: NDArray[np.int64]) -> Chosen:
    """Return the experts of hash layers (tokens, layers, k)."""
    words = rng.choice(_VOCABULARY, len(topic), p=_zipf(_VOCABULARY, _WORD_EXPONENT))
    of_topic = np.stack([rng.permutation(_VOCABULARY) for _ in range(style.topics)])
    words = np.where(rng.random(len(topic)) < 0.5, of_topic[topic, words], words)
    table = rng.random((_VOCABULARY, HASH_LAYERS, EXPERTS), np.float32)
    experts = np.argpartition(table, K, axis=2)[:, :, :K].astype(np.int16)
    routes: Chosen = experts[words]
    return routes
