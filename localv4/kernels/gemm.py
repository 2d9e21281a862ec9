"""Many tokens times packed weights, a panel of 64 rows at a time.

A product of a panel has two steps, so that any way to multiply goes with any use of the result:

1. A function called `sums_...`, here or in `kernels.small_batches`, multiplies a panel with up to
   BATCH_TOKENS tokens; the sums, float32 [token][64 rows], stay in the scratch memory of the
   thread (SCRATCH_BYTES each, best on a cache line).
2. `store_sums`, `round_gated_sums` or `add_weighted_sums` puts them where they belong.

A token's sums have the bits of the mat-vec, whoever its neighbours are.

Arguments: `w` a packed matrix of `groups` groups, `panel` the number of a panel of it (the last
may be narrower); `q`, `d`, `b` the activations (`kernels.activations`), rows of `cols`; `first` the
first of `count` tokens. Rows of activations behind the last token are read, but not used: there
must be room for SPARE_TOKENS of them.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from localv4.kernels import amx_gemm, pair_gemm
from localv4.kernels.activations import (
    SUMS_BYTES,
    b_row,
    d_row,
    q_row,
    quantize_block,
    swiglu,
)
from localv4.kernels.device import device
from localv4.kernels.isa import ISA
from localv4.kernels.packed import BLOCK
from localv4.kernels.pairs import PAIRS_ROW, store_pairs
from localv4.kernels.panels import (
    BATCH_TOKENS,
    CHUNK,
    LINES_OFFSET,
    PANEL_GROUPS,
    PANEL_ROWS,
    SCALES_OFFSET,
    SPARE_TOKENS,
    SUMS_ROW,
    expander,
    panel_groups,
    panels,
)
from localv4.kernels.readers import MX4_READER, Q4_READER, Q8_READER, Reader
from localv4.kernels.simd import (
    broadcast_f32,
    load_f32,
    multiply_add,
    read_i64,
    store_f32,
    zeros_f32,
)
from localv4.kernels.tiles import (
    FEW_TOKENS,
    LINE,
    STEP,
    TILE_GROUPS,
    TILE_TOKENS,
    TileOperations,
    tile_operations,
)

__all__ = [
    "BATCH_TOKENS",
    "PANEL_GROUPS",
    "PANEL_ROWS",
    "SCRATCH_BYTES",
    "SPARE_TOKENS",
    "SUMS_ROW",
    "Sums",
    "add_weighted_sums",
    "panel_groups",
    "panels",
    "round_gated_sums",
    "store_sums",
    "sums_mx4",
    "sums_q4",
    "sums_q8",
]

SCRATCH_BYTES = 100 << 10
"""Memory that each thread needs for itself, whatever it multiplies with."""

assert max(amx_gemm.SCRATCH_BYTES, pair_gemm.SCRATCH_BYTES) <= SCRATCH_BYTES


Sums = Callable[[int, int, int, int, int, int, int, int, int, int], None]


def _tile_adder(tile: TileOperations, add_products: Any) -> Any:
    """Make the function that adds an expanded chunk of columns to the sums of a tile of tokens."""
    start_sums, flush_sums = tile.start_sums, tile.flush_sums

    @device
    def add_tile(out: int, scratch: int, count: int, cols: int, q: int, d: int, b: int) -> None:
        """Add `count` expanded blocks times a tile of tokens to the sums at out."""
        lines, scales = scratch + LINES_OFFSET, scratch + SCALES_OFFSET
        for _ in range(count):
            sums = start_sums(b, b_row(cols))
            for _ in range(8 // STEP):
                sums = add_products(sums, lines, q, q_row(cols))
                lines, q = lines + STEP * LINE, q + 4 * STEP
            flush_sums(out, SUMS_ROW, sums, scales, d, d_row(cols))
            scales, d, b = scales + LINE, d + 4, b + SUMS_BYTES

    return add_tile


def _summer(reader: Reader) -> Sums:
    """Make the function that multiplies panels of a format."""
    fmt, expand, sum_offset = reader.fmt, expander(reader, reader.decode), reader.sum_offset
    columns, superblock_bytes, blocks = fmt.columns, fmt.superblock_bytes, fmt.columns // BLOCK
    chunk = CHUNK // columns
    add_tile, add_few = (
        _tile_adder(tile, tile.add_bytes if reader is Q8_READER else tile.add_codes)
        for tile in (tile_operations(TILE_TOKENS), tile_operations(FEW_TOKENS))
    )

    @device
    def sums(
        scratch: int,
        w: int,
        panel: int,
        groups: int,
        cols: int,
        q: int,
        d: int,
        b: int,
        first: int,
        count: int,
    ) -> None:
        superblocks = cols // columns
        size = superblocks * superblock_bytes
        lines, scales = scratch + LINES_OFFSET, scratch + SCALES_OFFSET
        for i in range((count + TILE_TOKENS - 1) * PANEL_GROUPS):
            store_f32(scratch + 64 * i, zeros_f32())
        for start in range(0, superblocks, chunk):
            length = min(chunk, superblocks - start)
            at = start * blocks
            for group in range(0, panel_groups(panel, groups), TILE_GROUPS):
                source = w + (panel * PANEL_GROUPS + group) * size + start * superblock_bytes
                width = min(TILE_GROUPS, panel_groups(panel, groups) - group)
                expand(lines, scales, source, size, width, length)
                for token in range(0, count, TILE_TOKENS):
                    out, row = scratch + token * SUMS_ROW + 64 * group, first + token
                    own_q = q + row * q_row(cols) + BLOCK * at
                    own_d = d + row * d_row(cols) + 4 * at
                    own_b = b + row * b_row(cols) + SUMS_BYTES * at + sum_offset
                    if count - token > FEW_TOKENS:
                        add_tile(out, scratch, length * blocks, cols, own_q, own_d, own_b)
                    else:
                        add_few(out, scratch, length * blocks, cols, own_q, own_d, own_b)

    return sums


def _best_summer(reader: Reader) -> Sums:
    """The same with the best unit that this machine has."""
    here: Sums = amx_gemm.summer(reader) if ISA.amx else _summer(reader)
    return here


sums_mx4 = _best_summer(MX4_READER)
sums_q4 = _best_summer(Q4_READER)
sums_q8 = _best_summer(Q8_READER)


@device
def store_sums(
    out: int, stride: int, scratch: int, panel: int, groups: int, first: int, count: int
) -> None:
    """out[first + t][rows of the panel] = sums[t] for t < count; tokens are `stride` bytes apart"""
    for t in range(count):
        row = out + (first + t) * stride + panel * SUMS_ROW
        for group in range(panel_groups(panel, groups)):
            store_f32(row + 64 * group, load_f32(scratch + t * SUMS_ROW + 64 * group))


@device
def round_gated_sums(
    q: int,
    d: int,
    b: int,
    scratch: int,
    panel: int,
    groups: int,
    first: int,
    count: int,
    limit: np.float32,
    binary: int,
    pairs: int,
    distance: int,
) -> None:
    """Round swiglu(gate, up) of alternating groups of gate and up: a block of 32 for each token.

    q, d, b, pairs: activations of groups * 8 columns, of which the panel makes block number
    `panel`; pairs may be 0.
    """
    inner = groups * 8
    for t in range(count):
        at, row = scratch + t * SUMS_ROW, first + t
        low = swiglu(load_f32(at), load_f32(at + 64), limit)
        high = swiglu(load_f32(at + 128), load_f32(at + 192), limit)
        own_q, own_d = q + row * q_row(inner) + BLOCK * panel, d + row * d_row(inner) + 4 * panel
        quantize_block(own_q, own_d, b + row * b_row(inner) + SUMS_BYTES * panel, low, high, binary)
        if pairs != 0:
            store_pairs(pairs + distance * panel + PAIRS_ROW * row, own_q, own_d)


@device
def add_weighted_sums(
    out: int,
    stride: int,
    scratch: int,
    panel: int,
    groups: int,
    first: int,
    count: int,
    rows: int,
    weights: int,
) -> None:
    """out[rows[i]][rows of the panel] += weights[i] * sums[t] for i = first + t

    rows: int64, a place in out for each token; weights: float32.
    """
    for t in range(count):
        row = out + read_i64(rows + 8 * (first + t)) * stride + panel * SUMS_ROW
        weight = broadcast_f32(weights + 4 * (first + t))
        for group in range(panel_groups(panel, groups)):
            product, at = load_f32(scratch + t * SUMS_ROW + 64 * group), row + 64 * group
            store_f32(at, multiply_add(product, weight, load_f32(at)))
