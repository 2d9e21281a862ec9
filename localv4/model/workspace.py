"""Buffers that the programs of all layers share: the activations of the tokens on their way."""

from copy import copy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localv4.kernels import attend, index_scores, rows, streams
from localv4.kernels.buffers import aligned_bytes
from localv4.kernels.gemm import SPARE_TOKENS
from localv4.kernels.packed import GROUP_ROWS
from localv4.model.config import LayerKind, ModelConfig
from localv4.model.matrix import F32
from localv4.model.program import Program, Rounded, Rows
from localv4.model.rotary import compress_rotary, main_rotary


class ChunkBuffers:
    """What a layer hands to the next one, for all tokens of a chunk.

    `streams` (tokens, n, hidden); `partials` sums of a site's mixing products by block of columns;
    `mix` how a block's output joins the streams; `x` the input of a block, also rounded; `update`
    its output, `shared_update` that of the shared expert; `logits` of the router, `chosen` and
    `shares` its experts and their weights; `ids` the tokens.
    """

    def __init__(self, config: ModelConfig, tokens: int) -> None:
        n, hidden = config.hc_mult, config.hidden_size
        row = streams.partial_row(2 * n + n * n)
        self.streams = np.empty((tokens, n, hidden), F32)
        self.partials = np.empty((tokens, hidden // streams.COLUMNS, row), F32)
        self.mix = np.empty((tokens, n + n * n), F32)
        self.x, self.x_rounded = Rows(tokens, hidden), Rounded(tokens, hidden)
        self.update, self.shared_update = Rows(tokens, hidden), Rows(tokens, hidden)
        self.logits = Rows(tokens, config.n_experts)
        self.ids = np.zeros(tokens, np.int64)
        self.chosen = np.zeros((tokens, config.experts_per_token), np.int64)
        self.shares = np.zeros((tokens, config.experts_per_token), F32)

    @property
    def tokens(self) -> int:
        """How many tokens there is room for."""
        return len(self.ids)

    def part(self, first: int) -> "ChunkBuffers":
        """Return the buffers of the tokens from `first` on."""
        part = copy(self)
        for name, value in vars(self).items():
            cut = value.part(first) if isinstance(value, (Rows, Rounded)) else value[first:]
            setattr(part, name, cut)
        return part


class CompressorBuffers:
    """Projected keys and gates of one compressor."""

    def __init__(self, tokens: int, width: int) -> None:
        self.keys, self.gates = Rows(tokens, width), Rows(tokens, width)

    def part(self, first: int) -> "CompressorBuffers":
        """Return the buffers of the tokens from `first` on."""
        part = copy(self)
        part.keys, part.gates = self.keys.part(first), self.gates.part(first)
        return part


@dataclass(frozen=True, slots=True)
class Seen:
    """What a token can see at most: keys of a layer, and entries that an indexer scores."""

    keys: int
    entries: int

    def covers(self, other: "Seen") -> bool:
        """Say whether these bounds hold for tokens with other ones, too."""
        return self.keys >= other.keys and self.entries >= other.entries

    @classmethod
    def before(cls, position: int, config: ModelConfig) -> "Seen":
        """Return the bounds for tokens before a position."""
        layers = list(zip(config.layer_kinds, config.ratios, strict=True))
        scored = [position // ratio for kind, ratio in layers if kind is LayerKind.CSA]
        plain = [position // ratio for kind, ratio in layers if kind is LayerKind.HCA]
        chosen = [min(count, config.index_top_k) for count in scored]
        return cls(config.window + max(plain + chosen, default=0), max(scored, default=0))


def _rounded_parts(tokens: int, count: int, cols: int) -> list[Rounded]:
    """Return buffers for neighbouring columns, parts of one; those of one token are its rows."""
    rows = tokens if tokens == 1 else tokens + SPARE_TOKENS
    together = Rounded(count * rows, cols)
    return [together.part(number * rows) for number in range(count)]


class AttentionBuffers:
    """Everything between the input and the output of attention, for some tokens at a time.

    `seen` says how much a token can see at most; `context` holds the position of the first
    token of each sequence. `angles` has cos and sin (2, tokens, pairs) by the kind of rotation, 0
    for that of sliding layers, `frequencies` those of the kinds.
    """

    def __init__(self, config: ModelConfig, tokens: int, seen: "Seen", members: int) -> None:
        heads, width, rank = config.n_heads, config.head_dim, config.q_lora_rank
        self.tokens, self.seen = tokens, seen
        self.context = np.zeros(tokens, np.int64)
        self.frequencies = (main_rotary(config).frequencies, compress_rotary(config).frequencies)
        self.angles = np.empty((2, 2, tokens, config.rope_dim // 2), F32)
        self.projected_latent, self.latent = Rows(tokens, rank), Rows(tokens, rank)
        self.latent_rounded = Rounded(tokens, rank)
        self.projected_key = Rows(tokens, width)
        self.query = Rows(tokens, heads * width)
        block = heads * width // config.o_groups
        self.out_rounded = _rounded_parts(tokens, config.o_groups, block)
        self.grouped = Rows(tokens, config.o_groups * config.o_lora_rank)
        self.grouped_rounded = Rounded(tokens, config.o_groups * config.o_lora_rank)
        self.compressor = CompressorBuffers(tokens, 2 * width)
        self.scratch_bytes = attend.scratch_bytes(heads, width, seen.keys)
        workers = 1 if tokens == 1 else members
        self.scratch = aligned_bytes(workers * self.scratch_bytes)
        self._add_indexer(config, tokens, workers)

    def part(self, sequence: int, first: int) -> "AttentionBuffers":
        """Return what belongs to the tokens from `first` on, those of a sequence."""
        part = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, (Rows, CompressorBuffers)):
                setattr(part, name, value.part(first))
        part.context, part.angles = self.context[sequence:], self.angles[:, :, first:]
        part.chosen, part.counts = self.chosen[first:], self.counts[first:]
        return part

    def row(self, index: int) -> "AttentionBuffers":
        """Return what belongs to one token, which has a sequence of its own.

        These buffers must have scratch memory for as many members as there are tokens.
        """
        row = self.part(index, index)
        row.scratch = self.scratch[index * self.scratch_bytes :]
        row.index_scratch = self.index_scratch[index * self.index_scratch_bytes :]
        return row

    def add_angles(self, program: Program, tokens: int) -> None:
        """Compute cos and sin for the positions of some tokens."""
        with program.alongside():
            for frequencies, (cos, sin) in zip(self.frequencies, self.angles, strict=True):
                program.add(
                    rows.angles,
                    *(frequencies.ctypes.data, len(frequencies), cos.ctypes.data, sin.ctypes.data),
                    *(self.context.ctypes.data, tokens),
                )

    def _add_indexer(self, config: ModelConfig, tokens: int, workers: int) -> None:
        heads, width = config.index_heads, config.index_head_dim
        self.index_compressor = CompressorBuffers(tokens, 2 * width)
        self.index_query = Rows(tokens, heads * width)
        self.head_weights = Rows(tokens, -(-heads // GROUP_ROWS) * GROUP_ROWS)
        self.chosen = np.zeros((tokens, config.index_top_k), np.int32)
        self.counts = np.zeros(tokens, np.int64)
        entries = self.seen.entries
        self.index_scratch_bytes = index_scores.scratch_bytes(heads, width, entries)
        together = 1 if tokens == 1 else index_scores.TOKENS
        self.index_scratch = aligned_bytes(workers * together * self.index_scratch_bytes)


def buffer_bytes(owner: object) -> int:
    """Return the bytes of all buffers that an object of this module, or one like them, holds."""
    total = 0
    for value in vars(owner).values():
        if isinstance(value, (Rows, Rounded, np.ndarray)):
            total += value.nbytes
        elif isinstance(value, (list, tuple)):
            items = [item for item in value if isinstance(item, (Rounded, np.ndarray))]
            total += sum({_start(item): item.nbytes for item in items}.values())  # parts are one
        elif hasattr(value, "__dict__") and not isinstance(value, type):
            total += buffer_bytes(value)
    return total


def _start(item: Rounded | NDArray[np.generic]) -> int:
    """Return where the memory starts that an item, or what it is a part of, holds."""
    address: int = item.start if isinstance(item, Rounded) else item.ctypes.data
    return address
