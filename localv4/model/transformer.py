"""The DeepSeek-V4 network: embedding, blocks between hyper-connections, head."""

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from localv4.kernels import row_operations
from localv4.model.attention import AttentionBlock
from localv4.model.config import LayerKind, ModelConfig
from localv4.model.hyper_connections import HyperConnectionSite
from localv4.model.matrix import Floats, Numerics, look_up
from localv4.model.moe import MoeBlock
from localv4.model.norm import rms_norm
from localv4.model.rotary import Rotary, compress_rotary, main_rotary
from localv4.model.state import SLACK_TOKENS, LayerState, State
from localv4.model.weights import Layer, Weights
from localv4.paging.row_memory import RowMemory


class Block:
    """One layer: attention, then experts, each reading and writing all residual streams."""

    def __init__(
        self, index: int, layer: Layer, rotary: Rotary, config: ModelConfig, numerics: Numerics
    ) -> None:
        self.eps = config.rms_eps
        self.attn_hc = HyperConnectionSite(layer.attn_hc, config, numerics)
        self.attn_norm = layer.attn_norm
        self.attention = AttentionBlock(layer.attention, rotary, config, numerics)
        self.ffn_hc = HyperConnectionSite(layer.ffn_hc, config, numerics)
        self.ffn_norm = layer.ffn_norm
        self.moe = MoeBlock(layer, index, config, numerics)

    def __call__(
        self, streams: Floats, token_ids: NDArray[np.int64], state: LayerState, position: int
    ) -> Floats:
        """Return the streams (tokens, n, hidden) after this layer."""
        u, mix = self.attn_hc.enter(streams)
        update = self.attention(rms_norm(u, self.attn_norm, self.eps), state, position)
        streams = self.attn_hc.leave(streams, update, mix)
        u, mix = self.ffn_hc.enter(streams)
        update = self.moe(rms_norm(u, self.ffn_norm, self.eps), token_ids)
        return self.ffn_hc.leave(streams, update, mix)


CHUNK_TOKENS = 128
"""Tokens of one forward pass: each row of weights is decoded once for all of them."""

MOST_ROWS = 64
"""Sequences of which one token each can be processed in one call."""


class Transformer:
    """Immutable weights and the forward pass over them; sequences live in `State` objects."""

    name = "exact"
    chunk_tokens = CHUNK_TOKENS
    slack = SLACK_TOKENS
    most_rows = MOST_ROWS
    reads_together = False
    rows = row_operations.F32
    row_memory = RowMemory()

    def __init__(self, config: ModelConfig, weights: Weights, numerics: Numerics) -> None:
        self.config = config
        self.numerics = numerics
        self.weights = weights
        self.head_hc = HyperConnectionSite(weights.head_hc, config, numerics)
        main, compress = main_rotary(config), compress_rotary(config)
        self.blocks = [
            Block(
                index,
                layer,
                main if config.layer_kinds[index] is LayerKind.SLIDING else compress,
                config,
                numerics,
            )
            for index, layer in enumerate(weights.layers)
        ]

    @property
    def threads(self) -> int:
        """How many threads multiply."""
        return self.numerics.threads

    def memory(self) -> dict[str, int]:
        """Return the bytes held by component, but for decoder state and mapped files."""
        return {}

    @property
    def cancelled(self) -> threading.Event | None:
        """The event that makes a forward pass raise Cancelled."""
        return self.numerics.cancelled

    @cancelled.setter
    def cancelled(self, event: threading.Event | None) -> None:
        self.numerics.cancelled = event

    def new_state(self) -> State:
        """Return the state of an empty sequence."""
        return State(self.config, SLACK_TOKENS, self.rows, self.row_memory)

    def forward(
        self, token_ids: NDArray[np.int64], state: State, wanted: int | None = None
    ) -> Floats:
        """Process tokens at `state.position` and return their final vectors (tokens, hidden).

        token_ids (tokens,) must be in the vocabulary and at most `state.slack` many; only the
        vectors of the last `wanted`, one or more, are returned, if given. When anything is raised
        on the way, the state still stands before the tokens.
        """
        state.begin(token_ids.shape[0])
        embedded = look_up(self.weights.embed, token_ids)
        streams = np.repeat(embedded[:, None, :], self.config.hc_mult, axis=1)
        for index, (block, layer_state) in enumerate(zip(self.blocks, state.layers, strict=True)):
            state.make_way(token_ids.shape[0], index)
            streams = block(streams, token_ids, layer_state, state.position)
        state.advance(token_ids.shape[0])
        first = 0 if wanted is None else max(0, token_ids.shape[0] - wanted)
        return self.head_hc.collapse_head(streams[first:])

    def decode_rows(self, token_ids: NDArray[np.int64], states: Sequence[State]) -> Floats:
        """Process one token (rows,) of each of several sequences, one after the other.

        Returns their final vectors (rows, hidden). When anything is raised, the sequences that
        were finished have advanced.
        """
        each = zip(token_ids, states, strict=True)
        return np.concatenate([self.forward(np.array([token]), state) for token, state in each])

    def logits(self, vectors: Floats) -> Floats:
        """Return logits (tokens, vocab) for final vectors (tokens, hidden)."""
        normed = rms_norm(vectors, self.weights.norm, self.config.rms_eps)
        return self.numerics.linear(normed, self.weights.head)
