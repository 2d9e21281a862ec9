"""Many tokens times packed weights, a panel of 64 rows at a time.

A product of a panel has two steps, so that any way to multiply goes with any use of the result:

1. A function called `sums_...`, here or in `kernels.small_batches`, multiplies a panel with up to
   BATCH_TOKENS tokens; the sums, float32 [token][64 rows], stay in the scratch memory of the
   thread (SCRATCH_BYTES each, best on a cache line).
2. `store_sums`, `store_gated_sums` or `add_weighted_sums` puts them where they belong.

A token's sums have the same bits whoever its neighbours are. With activations of span FINE
(`kernels.panels`) they are the bits of the mat-vec too. `sums_mx4_coarse` wants span COARSE, merges
segments, and differs from the mat-vec by the rounding of the activations.

Arguments: `w` a packed matrix of `groups` groups, `panel` the number of a panel of it (the last may
be narrower); `q`, `d`, `s` the activations; `first` the first of `count` tokens, a multiple of
TILE_TOKENS as BATCH_TOKENS is.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from localv4.kernels.activations import swiglu
from localv4.kernels.device import device
from localv4.kernels.isa import ISA
from localv4.kernels.packed import BLOCK, F8_SPAN, PackedFormat
from localv4.kernels.panels import expand_mx4, expander
from localv4.kernels.readers import MX4_READER, Q4_READER, Q8_READER
from localv4.kernels.simd import (
    broadcast_f32,
    load_f32,
    multiply_add,
    read_i64,
    store_f32,
    zeros_f32,
)
from localv4.kernels.simd_blocks import SHIFTED_BIAS
from localv4.kernels.tiles import (
    LINE,
    STEP,
    TILE_GROUPS,
    TILE_TOKENS,
    WORD,
    add_byte_products,
    add_code_products,
    add_shifted_products,
    flush_sums,
    start_sums,
)

PANEL_GROUPS = 4
PANEL_ROWS = 16 * PANEL_GROUPS

BATCH_TOKENS = 240
"""Tokens of one call: their sums and activations stay in the second cache."""

SUMS_ROW = 4 * PANEL_ROWS
"""Bytes of the sums of a token, which start at the scratch memory."""

# Columns expanded at a time: at most 16 KiB of lines, which stay in the first cache beside the
# activations of a tile.
_CHUNK = 256
LINES_OFFSET = BATCH_TOKENS * SUMS_ROW
"""Where the expanded weights stand in the scratch memory."""

_SCALES = LINES_OFFSET + _CHUNK // 4 * LINE
_SEGMENTS = _SCALES + _CHUNK // BLOCK * LINE
# Float32 weights (`kernels.gemm_f8`) need more: a span and two sets of sums of a tile.
_FLOATS = LINES_OFFSET + F8_SPAN * LINE + 2 * LINE * TILE_TOKENS
SCRATCH_BYTES = max(_SEGMENTS + _CHUNK // BLOCK * 8, _FLOATS)
"""Memory that each thread needs for itself."""


def panels(rows: int) -> int:
    """Return the number of panels of a matrix."""
    return -(-rows // PANEL_ROWS)


@device
def panel_groups(panel: int, groups: int) -> int:
    """Return the number of groups in a panel of a matrix of `groups` groups."""
    return min(PANEL_GROUPS, groups - panel * PANEL_GROUPS)


def _summer(fmt: PackedFormat, expand: Any, add_products: Any, bias: int) -> Any:
    """Make the function that multiplies panels of a format."""
    columns, superblock_bytes, blocks = fmt.columns, fmt.superblock_bytes, fmt.columns // BLOCK
    chunk = _CHUNK // columns
    weight_bias = np.int32(bias)

    @device
    def add_tile(out: int, scratch: int, count: int, q: int, d: int, s: int) -> None:
        """Add the expanded superblocks times a tile of tokens to the sums at out."""
        lines, scales = scratch + LINES_OFFSET, scratch + _SCALES
        for i in range(count):
            parts = read_i64(scratch + _SEGMENTS + 8 * i)
            steps, skip = columns // (4 * STEP) // parts, blocks // parts * WORD
            for _ in range(parts):
                sums = start_sums(s, s + skip, weight_bias)
                for _ in range(steps):
                    sums = add_products(sums, lines, q)
                    lines, q = lines + STEP * LINE, q + STEP * WORD
                flush_sums(out, SUMS_ROW, sums, scales, d)
                scales, d, s = scales + LINE, d + skip, s + skip

    @device
    def sums(
        scratch: int,
        w: int,
        panel: int,
        groups: int,
        cols: int,
        q: int,
        d: int,
        s: int,
        first: int,
        count: int,
    ) -> None:
        superblocks, first_tile = cols // columns, first // TILE_TOKENS
        size, tiles = superblocks * superblock_bytes, (count + TILE_TOKENS - 1) // TILE_TOKENS
        lines, scales, segments = scratch + LINES_OFFSET, scratch + _SCALES, scratch + _SEGMENTS
        for i in range(tiles * TILE_TOKENS * PANEL_GROUPS):
            store_f32(scratch + 64 * i, zeros_f32())
        for start in range(0, superblocks, chunk):
            length = min(chunk, superblocks - start)
            for group in range(0, panel_groups(panel, groups), TILE_GROUPS):
                source = w + (panel * PANEL_GROUPS + group) * size + start * superblock_bytes
                width = min(TILE_GROUPS, panel_groups(panel, groups) - group)
                expand(lines, scales, segments, source, size, width, length)
                for tile in range(tiles):
                    out = scratch + tile * TILE_TOKENS * SUMS_ROW + 64 * group
                    block = (first_tile + tile) * (cols // BLOCK) + start * blocks
                    sum_at = s + (block + first_tile + tile) * WORD  # a tile has one more sum
                    add_tile(out, scratch, length, q + block * 8 * WORD, d + block * WORD, sum_at)

    return sums


Sums = Callable[[int, int, int, int, int, int, int, int, int, int], None]

_fine = (expander(MX4_READER), add_code_products, ISA.code_bias)
_coarse = (expand_mx4, add_shifted_products, SHIFTED_BIAS)
sums_mx4: Sums = _summer(MX4_READER.fmt, *_fine)
sums_mx4_coarse: Sums = _summer(MX4_READER.fmt, *_coarse)
sums_q4: Sums = _summer(Q4_READER.fmt, expander(Q4_READER), add_code_products, ISA.code_bias)
sums_q8: Sums = _summer(Q8_READER.fmt, expander(Q8_READER), add_byte_products, ISA.byte_bias)


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
def store_gated_sums(
    out: int,
    stride: int,
    scratch: int,
    panel: int,
    groups: int,
    first: int,
    count: int,
    limit: np.float32,
) -> None:
    """The same for alternating groups of gate and up: out = swiglu(gate, up), half as many rows."""
    for t in range(count):
        row = out + (first + t) * stride + panel * (SUMS_ROW // 2)
        for pair in range(panel_groups(panel, groups) // 2):
            at = scratch + t * SUMS_ROW + 128 * pair
            store_f32(row + 64 * pair, swiglu(load_f32(at), load_f32(at + 64), limit))


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
