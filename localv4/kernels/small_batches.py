"""A few tokens times packed weights: each block of weights is decoded once for four tokens.

The sums of a panel as in `kernels.gemm`. Faster than large products for up to about 8 tokens.
"""

from typing import Any

import numpy as np

from localv4.kernels.activations import SUMS_BYTES, b_row, d_row, q_row
from localv4.kernels.device import device
from localv4.kernels.gemm import PANEL_GROUPS, SUMS_ROW, Sums, panel_groups
from localv4.kernels.packed import BLOCK, PackedFormat
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
    splat_f32,
    store_f32,
    to_f32,
    zeros_f32,
)

TOKENS = 4
"""Tokens that are multiplied at a time; of fewer the last one is computed several times."""


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
        out: int, w: int, cols: int, q: int, d: int, b: int, r1: int, r2: int, r3: int
    ) -> None:
        """Write the sums of a group with four rows of activations: the first, and r1 ... r3."""
        a0, a1, a2, a3 = zeros_f32(), zeros_f32(), zeros_f32(), zeros_f32()
        qr, dr, br = q_row(cols), d_row(cols), b_row(cols)
        b += sum_offset
        for _ in range(cols // columns):
            prefetch_lines(w, 1)
            for i in range(blocks):
                prefetch_lines(w + HEAD_BYTES + block_bytes * i, block_bytes // 64)
                block = decode(w + HEAD_BYTES + block_bytes * i)
                scale = load_scale(w + scale_bytes * i)
                a0 = add_block(a0, block, scale, q, d, b)
                a1 = add_block(a1, block, scale, q + r1 * qr, d + r1 * dr, b + r1 * br)
                a2 = add_block(a2, block, scale, q + r2 * qr, d + r2 * dr, b + r2 * br)
                a3 = add_block(a3, block, scale, q + r3 * qr, d + r3 * dr, b + r3 * br)
                q, d, b = q + BLOCK, d + 4, b + SUMS_BYTES
            w += superblock_bytes
        unit = splat_f32(factor)
        store_f32(out, multiply(a0, unit))
        store_f32(out + SUMS_ROW, multiply(a1, unit))
        store_f32(out + 2 * SUMS_ROW, multiply(a2, unit))
        store_f32(out + 3 * SUMS_ROW, multiply(a3, unit))

    return panel_sums(reader.fmt, multiply_four)


def panel_sums(fmt: PackedFormat, multiply_four: Any) -> Sums:
    """Make the function that multiplies panels of a format, four tokens at a time.

    `multiply_four(out, w, cols, q, d, b, r1, r2, r3)` writes the sums of a group with four rows of
    activations: the first, and those r1 ... r3 further on.
    """
    columns, superblock_bytes = fmt.columns, fmt.superblock_bytes

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
        size = cols // columns * superblock_bytes
        for group in range(panel_groups(panel, groups)):
            at = w + (panel * PANEL_GROUPS + group) * size
            for t in range(0, count, TOKENS):
                row, left = first + t, count - t - 1
                out = scratch + t * SUMS_ROW + 64 * group
                own_q, own_d = q + row * q_row(cols), d + row * d_row(cols)
                own_b = b + row * b_row(cols)
                last1, last2, last3 = min(1, left), min(2, left), min(3, left)
                multiply_four(out, at, cols, own_q, own_d, own_b, last1, last2, last3)

    return sums


few_sums_mx4 = _summer(MX4_READER)
few_sums_q4 = _summer(Q4_READER)
few_sums_q8 = _summer(Q8_READER)
