"""One layer as operations: attention, then experts, each between two hyper-connections."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from localv4.kernels import mixes, streams
from localv4.kernels.operation import float_bits
from localv4.kernels.row_operations import RowFormat
from localv4.model.config import ModelConfig
from localv4.model.experts import Experts
from localv4.model.fast_attention import Cells, FastAttention, Part
from localv4.model.fast_moe import FastMoe
from localv4.model.matrix import Floats, decode
from localv4.model.program import Input, Program
from localv4.model.weights import HyperConnection, Layer
from localv4.model.workspace import AttentionBuffers, ChunkBuffers
from localv4.paging.store import ExpertStore


class Site:
    """A hyper-connection: what a block reads from the streams, and how its output joins them."""

    def __init__(self, weights: HyperConnection, norm: Floats, config: ModelConfig) -> None:
        self.weights, self.norm, self.config = weights, norm, config
        self.rows = weights.fn.rows
        self.fn = streams.pack_mixing(decode(weights.fn), config.hc_mult)
        self.eps, self.hc_eps = float_bits(config.rms_eps), float_bits(config.hc_eps)

    def add_mixing(
        self, program: Program, chunk: ChunkBuffers, tokens: int, *, updates: int = 1, leaves: bool
    ) -> None:
        """Write the updates of the block before into the streams, then mix them for this site.

        `leaves`: there is a block before; `updates`: 2 if the shared expert's belongs to it.
        """
        update, config = chunk.update, self.config
        program.add(
            streams.leave_and_mix,
            chunk.streams.ctypes.data,
            *(update.at(), chunk.shared_update.at() if updates == 2 else 0, update.stride),
            *(chunk.mix.ctypes.data if leaves else 0, self.fn.ctypes.data, self.rows),
            *(chunk.partials.ctypes.data, tokens, config.hc_mult, config.hidden_size),
        )

    def add_entry(
        self, program: Program, chunk: ChunkBuffers, tokens: int, *, binary: bool = False
    ) -> None:
        """Collapse the streams into the normed input of the block.

        `binary`: it is rounded with scales that are powers of two (`kernels.activations`).
        """
        weights, config = self.weights, self.config
        program.add(
            mixes.enter,
            *(chunk.partials.ctypes.data, weights.scale.ctypes.data, weights.base.ctypes.data),
            *(config.hc_iterations, self.hc_eps, chunk.streams.ctypes.data),
            *(self.norm.ctypes.data, self.eps, chunk.x.at(), chunk.x.stride),
            *(chunk.mix.ctypes.data, *chunk.x_rounded.addresses),
            *(tokens, config.hc_mult, config.hidden_size, int(binary)),
        )

    def add_head_entry(self, program: Program, chunk: ChunkBuffers, tokens: int) -> None:
        """Collapse the streams after the last layer into the normed input of the output matrix."""
        weights, config = self.weights, self.config
        program.add(
            mixes.enter_head,
            *(chunk.partials.ctypes.data, weights.scale.ctypes.data, weights.base.ctypes.data),
            *(self.hc_eps, chunk.streams.ctypes.data, self.norm.ctypes.data, self.eps),
            *(chunk.x.at(), chunk.x.stride, *chunk.x_rounded.addresses),
            *(tokens, config.hc_mult, config.hidden_size),
        )


class FastLayer:
    """One layer; `cells` name the addresses of its state, `entries` the format of its rows."""

    def __init__(
        self,
        index: int,
        layer: Layer,
        config: ModelConfig,
        experts: Experts,
        store: ExpertStore,
        cells: NDArray[np.int64],
        slack: int,
        entries: RowFormat,
    ) -> None:
        kind, ratio = config.layer_kinds[index], config.ratios[index]
        self.attn_site = Site(layer.attn_hc, layer.attn_norm, config)
        self.attention = FastAttention(layer.attention, kind, ratio, config, slack, entries)
        self.ffn_site = Site(layer.ffn_hc, layer.ffn_norm, config)
        self.moe = FastMoe(index, layer.router, layer.shared, experts, store, config)
        self.cells = Cells.of(cells)
        self.is_first = index == 0

    def add_attention(
        self,
        program: Program,
        chunk: ChunkBuffers,
        buffers: AttentionBuffers,
        tokens: int,
        parts: Sequence[Part] = (),
    ) -> None:
        """Enter the attention and compute its update.

        The tokens belong to the sequence of `cells`, or to those of `parts`.
        """
        self.attn_site.add_entry(program, chunk, tokens)
        x = Input(chunk.x, chunk.x_rounded)
        own = Part(buffers, self.cells, tokens, by_token=tokens > 1)
        self.attention.add(program, buffers, x, chunk.update, parts or [own], tokens)

    def add_router(
        self, program: Program, chunk: ChunkBuffers, tokens: int, *, leaves: bool = True
    ) -> None:
        """Leave the attention unless it was not run, enter the experts, and choose them."""
        self.ffn_site.add_mixing(program, chunk, tokens, leaves=leaves)
        self.ffn_site.add_entry(program, chunk, tokens, binary=self.moe.has_binary_inputs)
        self.moe.add_router(program, chunk, tokens)

    def add_mixing(self, program: Program, chunk: ChunkBuffers, tokens: int) -> None:
        """Leave the experts of the layer before, if there is one, and mix for this one."""
        leaves = not self.is_first
        self.attn_site.add_mixing(program, chunk, tokens, updates=2, leaves=leaves)
