"""Compressed keys: how tokens become entries, and which entries a token may see."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localv4.kernels import compression, elementwise, indexer
from localv4.model.config import ModelConfig
from localv4.model.matrix import F32, Floats, Numerics
from localv4.model.norm import rms_norm
from localv4.model.rotary import Rotary
from localv4.model.state import CompressorState
from localv4.model.weights import Compressor, Indexer


@dataclass(frozen=True, slots=True)
class Selection:
    """The entries that each token attends to.

    Token t sees entries[chosen[t, :counts[t]]], or the first counts[t] entries when `chosen`
    (tokens, any) has no columns. entries (any, head_dim).
    """

    entries: Floats
    chosen: NDArray[np.int32]
    counts: NDArray[np.int64]


class CompressorBlock:
    """Pools each window of `ratio` tokens into one entry: projections, softmax over slots, norm,
    rotation at the window's first token. With two series of channels (CSA, indexer) the pooled
    slots reach back over the previous window."""

    def __init__(
        self, weights: Compressor, rotary: Rotary, config: ModelConfig, numerics: Numerics
    ) -> None:
        self.weights = weights
        self.rotary = rotary
        self.eps = config.rms_eps
        self.numerics = numerics

    def new_entries(self, x: Floats, state: CompressorState, position: int) -> tuple[int, Floats]:
        """Take in x (tokens, hidden); return (index of the first, rows) of the completed entries.

        The rows are normed and rotated, but not yet stored.
        """
        ratio = self.weights.ratio
        positions = np.arange(position, position + x.shape[0])
        gates = self.numerics.linear(x, self.weights.wgate) + self.weights.ape[positions % ratio]
        state.keys.write(position, self.numerics.linear(x, self.weights.wkv))
        state.gates.write(position, gates)

        first, end = position // ratio, (position + x.shape[0]) // ratio
        pooled = np.empty((end - first, self.weights.norm.shape[0]), F32)
        compression.pool(pooled, state.keys.values, state.gates.values, first, ratio)
        rows = rms_norm(pooled, self.weights.norm, self.eps)
        cos, sin = self.rotary.angles(np.arange(first, end) * ratio)
        elementwise.rotate(rows[:, None, :], cos, sin, F32(1))
        return first, rows


class IndexerBlock:
    """The lightning indexer of a CSA layer: scores all visible entries, keeps the top k."""

    def __init__(
        self, weights: Indexer, rotary: Rotary, config: ModelConfig, numerics: Numerics
    ) -> None:
        self.weights = weights
        self.rotary = rotary
        self.config = config
        self.numerics = numerics
        self.compressor = CompressorBlock(weights.compressor, rotary, config, numerics)

    def choose(
        self, x: Floats, latent: Floats, state: CompressorState, position: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return (chosen (tokens, top_k), counts (tokens,)) for inputs x and query latents."""
        config, tokens, ratio = self.config, x.shape[0], self.weights.compressor.ratio
        first, rows = self.compressor.new_entries(x, state, position)
        state.entries.write(first, self.numerics.index_rows(rows))

        query = self.numerics.linear(latent, self.weights.wq_b)
        query = query.reshape(tokens, config.index_heads, config.index_head_dim)
        cos, sin = self.rotary.angles(np.arange(position, position + tokens))
        elementwise.rotate(query, cos, sin, F32(1))
        # both factors of the score, per head and per channel, are folded into the head's weight
        factor = F32((config.index_heads * config.index_head_dim) ** -0.5)
        heads = self.numerics.linear(x, self.weights.weights_proj) * factor

        visible = (position + tokens) // ratio
        chosen = np.empty((tokens, min(config.index_top_k, visible)), np.int32)
        counts = np.empty(tokens, np.int64)
        scores = np.empty((self.numerics.threads, max(visible, 1)), F32)
        indexer.select_entries(
            chosen, counts, query, heads, state.entries.floats, position, ratio, scores
        )
        return chosen, counts
