"""Hybrid attention: a raw sliding window plus compressed entries under one softmax.

Sliding layers see the window only. Heavily compressed layers (HCA) see all entries, each pooled
from 128 tokens in the released models; compressed sparse layers (CSA) see the indexer's choice of
entries of 4 tokens. One key row per token serves all heads and is the value, too.
"""

import numpy as np

from localv4.kernels import attention as attention_kernels
from localv4.kernels import elementwise
from localv4.model.compressor import CompressorBlock, IndexerBlock, Selection
from localv4.model.config import ModelConfig
from localv4.model.matrix import F32, Floats, Numerics
from localv4.model.norm import rms_norm
from localv4.model.rotary import Rotary
from localv4.model.state import LayerState
from localv4.model.weights import Attention

_NO_ENTRIES = np.empty((0, 1), F32)


class AttentionBlock:
    """The attention of one layer."""

    def __init__(
        self, weights: Attention, rotary: Rotary, config: ModelConfig, numerics: Numerics
    ) -> None:
        self.weights = weights
        self.rotary = rotary
        self.config = config
        self.numerics = numerics
        self.compressor, self.indexer = None, None
        if weights.compressor is not None:
            self.compressor = CompressorBlock(weights.compressor, rotary, config, numerics)
        if weights.indexer is not None:
            self.indexer = IndexerBlock(weights.indexer, rotary, config, numerics)

    def __call__(self, x: Floats, state: LayerState, position: int) -> Floats:
        """Return the output (tokens, hidden) for normed inputs x (tokens, hidden)."""
        weights, config, linear = self.weights, self.config, self.numerics.linear
        tokens = x.shape[0]
        cos, sin = self.rotary.angles(np.arange(position, position + tokens))

        latent = rms_norm(linear(x, weights.wq_a), weights.q_norm, config.rms_eps)
        heads = linear(latent, weights.wq_b).reshape(-1, config.head_dim)
        query = rms_norm(heads, None, config.rms_eps)
        query = query.reshape(tokens, config.n_heads, config.head_dim)
        elementwise.rotate(query, cos, sin, F32(1))

        key = rms_norm(linear(x, weights.wkv), weights.kv_norm, config.rms_eps)
        elementwise.rotate(key[:, None, :], cos, sin, F32(1))
        state.window.write(position, self.numerics.key_rows(key))

        selection = self._select(x, latent, state, position)
        out = self._attend(query, state, selection, position)
        # values carry the rotation of their own position: turn the sum back at the query's
        elementwise.rotate(out, cos, sin, F32(-1))
        grouped = linear(out.reshape(tokens, -1), weights.wo_a, groups=config.o_groups)
        return linear(grouped, weights.wo_b)

    def _select(self, x: Floats, latent: Floats, state: LayerState, position: int) -> Selection:
        """Store the entries that these tokens complete; return what each token sees of them."""
        tokens = x.shape[0]
        everything = np.empty((tokens, 0), np.int32)
        if self.compressor is None or state.compressor is None:
            return Selection(_NO_ENTRIES, everything, np.zeros(tokens, np.int64))
        first, rows = self.compressor.new_entries(x, state.compressor, position)
        state.compressor.entries.write(first, self.numerics.key_rows(rows))
        entries = state.compressor.entries.floats
        if self.indexer is None or state.indexer is None:
            ratio = self.compressor.weights.ratio
            return Selection(
                entries, everything, np.arange(position + 1, position + tokens + 1) // ratio
            )
        chosen, counts = self.indexer.choose(x, latent, state.indexer, position)
        return Selection(entries, chosen, counts)

    def _attend(
        self, query: Floats, state: LayerState, selection: Selection, position: int
    ) -> Floats:
        config = self.config
        most = config.window + int(selection.counts.max())
        scores = np.empty((self.numerics.threads, config.n_heads, most), F32)
        out = np.empty_like(query)
        attention_kernels.attend(
            out,
            query,
            state.window.values,
            config.window,
            position,
            selection.entries,
            selection.chosen,
            selection.counts,
            self.weights.sinks,
            scores,
        )
        return out
