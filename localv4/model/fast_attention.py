"""Hybrid attention as operations: a raw window plus compressed entries under one softmax.

The same steps as in `model.attention`, which explains them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localv4.kernels import attend_keys, index_scores, pooling, rows
from localv4.kernels.head_lanes import spread
from localv4.kernels.operation import float_bits
from localv4.kernels.row_operations import RowFormat
from localv4.model.config import LayerKind, ModelConfig
from localv4.model.program import Input, Program, Rows
from localv4.model.rings import pooling_shape, window_shape
from localv4.model.weights import Attention, Compressor
from localv4.model.workspace import AttentionBuffers, CompressorBuffers

Step = tuple[Any, ...]
"""An operation: its entry and its words."""


class FastAttention:
    """The attention of one layer, whose state has rings with room for `slack` more positions.

    `entries` is the format of its compressed rows.
    """

    def __init__(
        self,
        weights: Attention,
        kind: LayerKind,
        ratio: int,
        config: ModelConfig,
        slack: int,
        entries: RowFormat,
    ) -> None:
        self.weights, self.kind, self.ratio, self.config = weights, kind, ratio, config
        self.entries = entries
        self.rotation = 0 if kind is LayerKind.SLIDING else 1
        self.sinks = spread(weights.sinks)
        self.eps = float_bits(config.rms_eps)
        self.window_capacity = window_shape(config).capacity(slack)
        self.capacity = pooling_shape(config.head_dim, ratio, self.reach).capacity(slack)

    @property
    def reach(self) -> int:
        """Windows that are pooled into an entry."""
        return 2 if self.kind is LayerKind.CSA else 1

    def add(
        self,
        program: Program,
        buffers: AttentionBuffers,
        x: Input,
        update: Rows,
        sequences: "Sequence[Part]",
        tokens: int,
    ) -> None:
        """Compute update (tokens, hidden) from the normed input x (tokens, hidden).

        The tokens are those of one sequence, or of several, one after the other; what only depends
        on the token itself is computed for all of them together.
        """
        self._project(program, buffers, x, tokens)
        self._store(program, buffers, sequences, tokens)
        self._pool(program, buffers, sequences, tokens)
        turning = [self._turning(each) for each in sequences if each.tokens == 1]
        if self.weights.indexer is not None:
            _add_in_steps(program, [self._choosing(each) for each in sequences], turning)
        else:
            _add_together(program, turning)
        _add_in_steps(program, [self._attending(each) for each in sequences])
        with program.alongside():
            for number, part in enumerate(buffers.out_rounded):
                program.round(part, buffers.query, tokens, column=number * part.cols)
        blocks = buffers.out_rounded
        program.multiply_blocks(buffers.grouped, self.weights.wo_a, buffers.query, blocks, tokens)
        program.round(buffers.grouped_rounded, buffers.grouped, tokens)
        grouped = Input(buffers.grouped, buffers.grouped_rounded)
        program.multiply(update, self.weights.wo_b, grouped, tokens)

    def _project(self, program: Program, buffers: AttentionBuffers, x: Input, tokens: int) -> None:
        """Multiply everything that sees the input itself."""
        weights = self.weights
        with program.alongside():
            program.multiply(buffers.projected_latent, weights.wq_a, x, tokens)
            program.multiply(buffers.projected_key, weights.wkv, x, tokens)
            for compressor, own in self._compressors(buffers):
                program.multiply(own.keys, compressor.wkv, x, tokens)
                program.multiply(own.gates, compressor.wgate, x, tokens)
            if weights.indexer is not None:
                program.multiply(buffers.head_weights, weights.indexer.weights_proj, x, tokens)

    def _compressors(
        self, buffers: AttentionBuffers
    ) -> Iterator[tuple[Compressor, CompressorBuffers]]:
        """The compressors of the layer with their buffers."""
        if self.weights.compressor is not None:
            yield self.weights.compressor, buffers.compressor
        if self.weights.indexer is not None:
            yield self.weights.indexer.compressor, buffers.index_compressor

    def _store(
        self,
        program: Program,
        buffers: AttentionBuffers,
        sequences: "Sequence[Part]",
        tokens: int,
    ) -> None:
        """Put keys and compressor inputs into the states; norm the latents."""
        raw, latent = buffers.projected_latent, buffers.latent
        with program.alongside():
            program.add(
                rows.norm,
                *(raw.at(), raw.stride, self.weights.q_norm.ctypes.data, self.eps),
                *(latent.at(), latent.stride, *buffers.latent_rounded.addresses),
                *(tokens, self.config.q_lora_rank),
            )
            for each in sequences:
                self._store_one(program, each)

    def _store_one(self, program: Program, part: "Part") -> None:
        weights, config, cells = self.weights, self.config, part.cells
        buffers, tokens = part.buffers, part.tokens
        key, context = buffers.projected_key, buffers.context.ctypes.data
        program.add(
            rows.key,
            *(key.at(), key.stride, weights.kv_norm.ctypes.data, self.eps),
            *(*self._angles(buffers), cells.window, self.window_capacity, config.head_dim),
            *(context, tokens),
        )
        parts = zip(self._compressors(buffers), cells.compressors, strict=False)
        for (compressor, own), (keys, gates, _) in parts:
            program.add(
                pooling.append,
                *(own.keys.at(), own.gates.at(), own.keys.stride),
                *(compressor.ape.ctypes.data, self.ratio, keys, gates, self.capacity),
                *(compressor.ape.shape[1], context, tokens),
            )

    def _pool(
        self,
        program: Program,
        buffers: AttentionBuffers,
        sequences: "Sequence[Part]",
        tokens: int,
    ) -> None:
        """Complete entries of the compressors; expand the latents to queries meanwhile."""
        latent = Input(buffers.latent, buffers.latent_rounded)
        with program.alongside():
            for each in sequences:
                self._pool_one(program, each)
            program.multiply(buffers.query, self.weights.wq_b, latent, tokens)
            if self.weights.indexer is not None:
                program.multiply(buffers.index_query, self.weights.indexer.wq_b, latent, tokens)

    def _pool_one(self, program: Program, part: "Part") -> None:
        buffers = part.buffers
        frequencies = buffers.frequencies[self.rotation]
        operations = (self.entries.pool, self.entries.index_pool)
        parts = zip(self._compressors(buffers), part.cells.compressors, operations, strict=False)
        for (compressor, _), (keys, gates, entries), pool in parts:
            program.add(
                pool,
                *(keys, gates, self.capacity, compressor.ape.shape[1], self.ratio),
                *(compressor.norm.ctypes.data, self.eps),
                *(frequencies.ctypes.data, len(frequencies)),
                *(entries, len(compressor.norm), buffers.context.ctypes.data, part.tokens),
            )

    def _choosing(self, part: "Part") -> Iterator[Step]:
        """Yield how the indexer chooses the entries that each token sees, step by step."""
        buffers, tokens = part.buffers, part.tokens
        config, query, weights = self.config, buffers.index_query, buffers.head_weights
        heads, width = config.index_heads, config.index_head_dim
        seen = (buffers.context.ctypes.data, self.ratio, config.index_top_k, heads, width)
        entries, turn = part.cells.compressors[1][2], self._angles(buffers)
        # both factors of the score, per head and per channel, are folded into the head's weight
        factor, scratch = float_bits((heads * width) ** -0.5), buffers.index_scratch.ctypes.data
        found = (buffers.chosen.ctypes.data, buffers.counts.ctypes.data)
        if part.by_token:
            yield (
                self.entries.index_choose,
                *(*seen, entries, query.at(), query.stride, tokens, *turn),
                *(weights.at(), weights.stride, factor, *found, scratch),
                buffers.index_scratch_bytes,
            )
            return
        inputs = (query.at(), heads, width, *turn, weights.at(), factor, scratch)
        yield (self.entries.index_query, *inputs)
        yield (self.entries.index_scores, *seen, entries, scratch, turn[2])
        yield (index_scores.index_rank, *seen, scratch)
        yield (index_scores.index_select, *seen, scratch, *found)

    def _turning(self, part: "Part") -> Step:
        """Return how the queries of one token are prepared; that is a step of its own for one."""
        buffers, size = part.buffers, (self.config.n_heads, self.config.head_dim)
        turn, scratch = self._angles(buffers), buffers.scratch.ctypes.data
        words = (buffers.query.at(), *size, *turn, self.eps, scratch, int(self.entries.tiled))
        return (attend_keys.attend_query, *words)

    def _attending(self, part: "Part") -> Iterator[Step]:
        """Yield how the queries are replaced by the output of attention, step by step."""
        buffers, cells, tokens = part.buffers, part.cells, part.tokens
        config, query, scratch = self.config, buffers.query, buffers.scratch.ctypes.data
        heads, width = config.n_heads, config.head_dim
        indexed = self.weights.indexer is not None
        counts = buffers.counts.ctypes.data if indexed else 0
        chosen = buffers.chosen.ctypes.data if indexed else 0
        seen = (buffers.context.ctypes.data, config.window, self.ratio, counts)
        entries = cells.compressors[0][2]
        rows_of = (chosen, config.index_top_k, cells.window, self.window_capacity, entries)
        turn, sinks = self._angles(buffers), self.sinks.ctypes.data
        if part.by_token:
            yield (
                self.entries.attend,
                *(*seen, *rows_of, query.at(), query.stride, tokens, heads, width),
                *(*turn, self.eps, sinks, scratch, buffers.scratch_bytes),
            )
            return
        yield (self.entries.attend_scores, *seen, *rows_of, heads, width, scratch, turn[2])
        tiled = int(self.entries.tiled)
        yield (attend_keys.attend_softmax, *seen, heads, width, sinks, scratch, tiled)
        yield (self.entries.attend_values, *seen, heads, width, *turn, scratch, query.at())

    def _angles(self, buffers: AttentionBuffers) -> tuple[int, int, int]:
        """Return addresses of cos and sin, and the number of pairs."""
        cos, sin = buffers.angles[self.rotation]
        return cos.ctypes.data, sin.ctypes.data, cos.shape[1]


def _add_in_steps(
    program: Program, sequences: Sequence[Iterator[Step]], beside: Sequence[Step] = ()
) -> None:
    """Add the steps of several sequences, each together with the same step of the others.

    What is `beside` runs together with the first steps.
    """
    for together in zip(*sequences, strict=True):
        _add_together(program, [*beside, *together])
        beside = ()


def _add_together(program: Program, steps: Sequence[Step]) -> None:
    """Add steps that run at the same time."""
    with program.alongside():
        for entry, *words in steps:
            program.add(entry, *words)


@dataclass(frozen=True, slots=True)
class Cells:
    """Where the addresses of a layer's state are: window; keys, gates, entries by compressor."""

    window: int
    compressors: tuple[tuple[int, int, int], tuple[int, int, int]]

    @classmethod
    def of(cls, addresses: NDArray[np.int64]) -> "Cells":
        """Name the cells (CELLS,) of a layer, which are filled before a program runs."""
        at = [addresses.ctypes.data + 8 * i for i in range(len(addresses))]
        return cls(at[0], ((at[1], at[2], at[3]), (at[4], at[5], at[6])))


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens of one sequence: their part of the buffers, and where the state is.

    `by_token`: members of the team take whole tokens, each in scratch memory of its own; otherwise
    they share the keys and heads of the only one.
    """

    buffers: AttentionBuffers
    cells: Cells
    tokens: int
    by_token: bool
