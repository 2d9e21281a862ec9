"""A few tokens times packed weights: each block of weights is decoded once for four tokens.

The sums of a panel as in `kernels.gemm`, with the activations of the mat-vec: `q`, `d`, `b` hold
those of any number of tokens, row after row; entries first ... first + count - 1 of the int64 at
`rows` say which of them to multiply. Each token gets the bits of the mat-vec. Faster than large
products for up to about 8 tokens.
"""

from collections.abc import Callable

import numpy as np

from localv4.kernels.device import device
from localv4.kernels.gemm import PANEL_GROUPS, SUMS_ROW, panel_groups
from localv4.kernels.packed import BLOCK
from localv4.kernels.readers import (
    HEAD_BYTES,
    MX4_READER,
    Q4_READER,
    Q8_READER,
    Reader,
    prefetch_lines,
)
from localv4.kernels.simd import (
    Vector,
    broadcast_f32,
    broadcast_i32,
    multiply,
    multiply_add,
    read_i64,
    splat_f32,
    store_f32,
    to_f32,
    zeros_f32,
)

TOKENS = 4
"""Tokens that are multiplied at a time; of fewer the last one is computed several times."""

Sums = Callable[[int, int, int, int, int, int, int, int, int, int, int], None]


def _summer(reader: Reader) -> Sums:
    """Make the function that multiplies panels of a format with a few tokens."""
    decode, add_dots, load_scale = reader.decode, reader.add_dots, reader.load_scale
    columns, superblock_bytes = reader.fmt.columns, reader.fmt.superblock_bytes
    blocks, block_bytes, scale_bytes = reader.blocks, reader.block_bytes, reader.scale_bytes
    sum_offset, factor = reader.sum_offset, np.float32(reader.factor)

    @device
    def add_block(acc: Vector, weights: Vector, scale: Vector, q: int, d: int, b: int) -> Vector:
        dots = to_f32(add_dots(broadcast_i32(b), weights, q))
        return multiply_add(dots, multiply(scale, broadcast_f32(d)), acc)

    @device
    def multiply_four(
        out: int, w: int, cols: int, q: int, d: int, b: int, t0: int, t1: int, t2: int, t3: int
    ) -> None:
        """Write the sums of a group with the rows t0 ... t3 of the activations."""
        a0, a1, a2, a3 = zeros_f32(), zeros_f32(), zeros_f32(), zeros_f32()
        d_row, b_row = cols // BLOCK * 4, cols // BLOCK * 8
        b += sum_offset
        for _ in range(cols // columns):
            prefetch_lines(w, 1)
            for i in range(blocks):
                prefetch_lines(w + HEAD_BYTES + block_bytes * i, block_bytes // 64)
                block = decode(w + HEAD_BYTES + block_bytes * i)
                scale = load_scale(w + scale_bytes * i)
                a0 = add_block(a0, block, scale, q + t0 * cols, d + t0 * d_row, b + t0 * b_row)
                a1 = add_block(a1, block, scale, q + t1 * cols, d + t1 * d_row, b + t1 * b_row)
                a2 = add_block(a2, block, scale, q + t2 * cols, d + t2 * d_row, b + t2 * b_row)
                a3 = add_block(a3, block, scale, q + t3 * cols, d + t3 * d_row, b + t3 * b_row)
                q, d, b = q + 32, d + 4, b + 8
            w += superblock_bytes
        unit = splat_f32(factor)
        store_f32(out, multiply(a0, unit))
        store_f32(out + SUMS_ROW, multiply(a1, unit))
        store_f32(out + 2 * SUMS_ROW, multiply(a2, unit))
        store_f32(out + 3 * SUMS_ROW, multiply(a3, unit))

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
        rows: int,
        first: int,
        count: int,
    ) -> None:
        size, last = cols // columns * superblock_bytes, first + count - 1
        for group in range(panel_groups(panel, groups)):
            at = w + (panel * PANEL_GROUPS + group) * size
            for t in range(first, first + count, TOKENS):
                t0, t1 = read_i64(rows + 8 * t), read_i64(rows + 8 * min(t + 1, last))
                t2 = read_i64(rows + 8 * min(t + 2, last))
                t3 = read_i64(rows + 8 * min(t + 3, last))
                out = scratch + (t - first) * SUMS_ROW + 64 * group
                multiply_four(out, at, cols, q, d, b, t0, t1, t2, t3)

    return sums


few_sums_mx4 = _summer(MX4_READER)
few_sums_q4 = _summer(Q4_READER)
few_sums_q8 = _summer(Q8_READER)
