"""Both sides of a large product, prepared for the register tile (`kernels.tiles`).

A panel is 64 rows of packed weights, some columns at a time, expanded to bytes once and used for
many tokens: lines [columns / 4][TILE_GROUPS][16 rows][4 columns] and float32 scales, a row of
TILE_GROUPS * 16 for each segment. A superblock of Q4 or Q8 has two segments, one for each block.

For one of MX4 there is a choice. Weights of FP4 are small integers times a power of two, so the
four blocks of a row share one scale if they are shifted by the differences of their exponents:
then 128 columns are one segment. The shift is exact up to MOST_SHIFT; where exponents of any row
of the tile lie further apart, the superblock keeps four segments, and stays exact too.

Activations come in tiles of TILE_TOKENS tokens, the last one filled up with zeros:

| buffer | bytes of a tile        | holds, for token m of the tile, at WORD * i + 4 * m   |
|--------|------------------------|-------------------------------------------------------|
| q      | cols * TILE_TOKENS     | int8 of columns 4 * i ... 4 * i + 3                   |
| d      | cols / 32 * WORD       | float32 scale of block i                              |
| s      | (cols / 32 + 1) * WORD | int32 sum of q over the blocks before i               |

`span` columns share a scale: 32, where every product has the bits of the mat-vec, or 128, which
merged segments need; a relative error of 0.64 % instead of 0.52 % for normal inputs.
"""

from typing import Any

import numpy as np

from localv4.kernels.activations import LEVELS, PER_LEVEL, at_least_smallest
from localv4.kernels.device import device
from localv4.kernels.packed import BLOCK, MX4
from localv4.kernels.readers import HEAD_BYTES, Reader, prefetch_lines
from localv4.kernels.simd import (
    add_i32,
    e8m0_to_f32,
    highest_i32,
    largest_i32,
    largest_magnitude,
    load_e8m0,
    load_f32,
    load_u8,
    magnitudes,
    multiply,
    read_i64,
    round_i32,
    scatter_i8,
    smallest_i32,
    splat_f32,
    splat_i32,
    store_f32,
    subtract_i32,
    sum_i32,
    write_f32,
    write_i32,
    write_i64,
    zeros_i32,
)
from localv4.kernels.simd_blocks import MOST_SHIFT, mx4_codes, scatter_block, shifted_codes
from localv4.kernels.tiles import LINE, TILE_TOKENS, WORD

FINE, COARSE = 32, 128
"""The two spans of activations."""

_MX4_BYTES = MX4.superblock_bytes
_BLOCK_LINES = LINE * BLOCK // 4
_HALF = np.float32(0.5)
# doubled E2M1 values, shifted: a scale of the highest exponent is too large by this factor
_MERGED_UNIT = np.float32(0.5 ** (MOST_SHIFT + 1))
_ZERO = np.float32(0)


def tiles(tokens: int) -> int:
    """Return the number of tiles for some tokens."""
    return -(-tokens // TILE_TOKENS)


def q_bytes(tokens: int, cols: int) -> int:
    """Return the bytes of the buffer q."""
    return tiles(tokens) * TILE_TOKENS * cols


def d_bytes(tokens: int, cols: int) -> int:
    """Return the bytes of the buffer d."""
    return tiles(tokens) * (cols // BLOCK) * WORD


def s_bytes(tokens: int, cols: int) -> int:
    """Return the bytes of the buffer s."""
    return tiles(tokens) * (cols // BLOCK + 1) * WORD


@device
def quantize_tiles(
    q: int,
    d: int,
    s: int,
    x: int,
    rows: int,
    count: int,
    cols: int,
    span: int,
    first: int,
    end: int,
) -> None:
    """Fill tiles first ... end - 1 of the buffers q, d, s.

    x: float32 (any, cols); rows: `count` int64, the rows of x that are the tokens.
    """
    blocks = cols // BLOCK
    for tile in range(first, end):
        for m in range(TILE_TOKENS):
            tile_q = q + tile * TILE_TOKENS * cols + 4 * m
            tile_d = d + tile * blocks * WORD + 4 * m
            tile_s = s + tile * (blocks + 1) * WORD + 4 * m
            token = tile * TILE_TOKENS + m
            if token < count:
                source = x + 4 * cols * read_i64(rows + 8 * token)
                _quantize_token(tile_q, tile_d, tile_s, source, blocks, span // BLOCK)
            else:
                _fill_token(tile_q, tile_d, tile_s, blocks)


@device
def _quantize_token(q: int, d: int, s: int, x: int, blocks: int, share: int) -> None:
    before = np.int32(0)
    for start in range(0, blocks, share):
        sizes = zeros_i32()
        for i in range(start, start + share):
            low, high = load_f32(x + 128 * i), load_f32(x + 128 * i + 64)
            sizes = largest_i32(sizes, largest_i32(magnitudes(low), magnitudes(high)))
        size = at_least_smallest(largest_magnitude(sizes))
        factor = splat_f32(LEVELS / size)
        for i in range(start, start + share):
            low = round_i32(multiply(load_f32(x + 128 * i), factor))
            high = round_i32(multiply(load_f32(x + 128 * i + 64), factor))
            scatter_i8(q + 8 * WORD * i, WORD, low)
            scatter_i8(q + 8 * WORD * i + 4 * WORD, WORD, high)
            write_f32(d + WORD * i, size * PER_LEVEL)
            write_i32(s + WORD * i, before)
            before = np.int32(before + sum_i32(add_i32(low, high)))
    write_i32(s + WORD * blocks, before)


@device
def _fill_token(q: int, d: int, s: int, blocks: int) -> None:
    for i in range(blocks):
        scatter_i8(q + 8 * WORD * i, WORD, zeros_i32())
        scatter_i8(q + 8 * WORD * i + 4 * WORD, WORD, zeros_i32())
        write_f32(d + WORD * i, _ZERO)
        write_i32(s + WORD * i, np.int32(0))
    write_i32(s + WORD * blocks, np.int32(0))


def expander(reader: Reader) -> Any:
    """Make the function that expands superblocks of a format, a segment for each block."""
    decode, load_scale = reader.decode, reader.load_scale
    blocks, block_bytes, scale_bytes = reader.blocks, reader.block_bytes, reader.scale_bytes
    superblock_bytes, unit = reader.fmt.superblock_bytes, np.float32(reader.factor)

    @device
    def expand(
        lines: int, scales: int, segments: int, w: int, size: int, groups: int, count: int
    ) -> None:
        """Expand `count` superblocks from w on, of `groups` groups that are `size` bytes apart.

        segments: int64, gets the number of segments of each superblock.
        """
        for i in range(count):
            for group in range(groups):
                source = w + group * size + i * superblock_bytes
                prefetch_lines(source, superblock_bytes // 64)
                for block in range(blocks):
                    target = lines + _BLOCK_LINES * block + 64 * group
                    scatter_block(target, LINE, decode(source + HEAD_BYTES + block_bytes * block))
                    scale = multiply(load_scale(source + scale_bytes * block), splat_f32(unit))
                    store_f32(scales + LINE * block + 64 * group, scale)
            write_i64(segments + 8 * i, blocks)
            lines, scales = lines + _BLOCK_LINES * blocks, scales + LINE * blocks

    return expand


@device
def expand_mx4(
    lines: int, scales: int, segments: int, w: int, size: int, groups: int, count: int
) -> None:
    """Expand superblocks of MX4 like `expander`, merging segments wherever that is exact."""
    for i in range(count):
        source = w + i * _MX4_BYTES
        merged = largest_spread(source, size, groups) <= MOST_SHIFT
        parts = 1 if merged else 4
        for group in range(groups):
            at = source + group * size
            prefetch_lines(at, _MX4_BYTES // 64)
            if merged:
                _expand_merged(lines + 64 * group, scales + 64 * group, at)
            else:
                _expand_split(lines + 64 * group, scales + 64 * group, at)
        write_i64(segments + 8 * i, parts)
        lines, scales = lines + 4 * _BLOCK_LINES, scales + parts * LINE


@device
def largest_spread(w: int, size: int, groups: int) -> int:
    """Return how far the exponents of a row of a superblock lie apart, at most."""
    widest = zeros_i32()
    for group in range(groups):
        at = w + group * size
        low = high = load_u8(at)
        for block in range(1, 4):
            codes = load_u8(at + 16 * block)
            low, high = smallest_i32(low, codes), largest_i32(high, codes)
        widest = largest_i32(widest, subtract_i32(high, low))
    spread: int = highest_i32(widest)
    return spread


@device
def _expand_merged(lines: int, scales: int, w: int) -> None:
    top = load_u8(w)
    for block in range(1, 4):
        top = largest_i32(top, load_u8(w + 16 * block))
    below = subtract_i32(top, splat_i32(np.int32(MOST_SHIFT)))
    for block in range(4):
        shift = subtract_i32(load_u8(w + 16 * block), below)
        codes = shifted_codes(mx4_codes(w + HEAD_BYTES + 256 * block), shift)
        scatter_block(lines + _BLOCK_LINES * block, LINE, codes)
    store_f32(scales, multiply(e8m0_to_f32(top), splat_f32(_MERGED_UNIT)))


@device
def _expand_split(lines: int, scales: int, w: int) -> None:
    for block in range(4):
        codes = shifted_codes(mx4_codes(w + HEAD_BYTES + 256 * block), zeros_i32())
        scatter_block(lines + _BLOCK_LINES * block, LINE, codes)
        scale = multiply(load_e8m0(w + 16 * block), splat_f32(_HALF))
        store_f32(scales + LINE * block, scale)
