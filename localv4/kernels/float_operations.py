"""The operations of the packed formats of floats, and where to find them by its name."""

from dataclasses import dataclass
from typing import Any

from localv4.kernels import float_rows, gemm_floats
from localv4.kernels.compiler import Entry, entry
from localv4.kernels.device import device
from localv4.kernels.gemm import BATCH_TOKENS, PANEL_GROUPS, panel_groups, store_sums
from localv4.kernels.gemm_floats import SCRATCH_BYTES
from localv4.kernels.operation import take_chunk, word
from localv4.kernels.single_token import share_matvec
from localv4.kernels.tiles import TILE_TOKENS

FEW_TOKENS = 3
"""Tokens up to which one mat-vec for each is faster than expanding the weights."""

SMALLEST_BATCH = 24
"""Tokens that are worth expanding the weights for."""


@device
def batch_size(tokens: int, panels: int, members: int) -> int:
    """Return how many tokens are multiplied at once: few enough that all members have work."""
    wanted = tokens * panels // (4 * members)
    whole = wanted // TILE_TOKENS * TILE_TOKENS
    return min(BATCH_TOKENS, max(SMALLEST_BATCH, whole))


@device
def share_float_gemm(
    operation: int, member: int, members: int, multiply_one: Any, many_sums: Any
) -> None:
    """out[t] = matrix . x[t] for each token.

    Words: matrix, row groups, columns, x, scales, x row stride in floats, tokens, out, its row
    stride in bytes, scratch.
    """
    w, groups, cols = word(operation, 1), word(operation, 2), word(operation, 3)
    x, scale, row = word(operation, 4), word(operation, 5), word(operation, 6)
    tokens, out, stride = word(operation, 7), word(operation, 8), word(operation, 9)
    scratch = word(operation, 10) + member * SCRATCH_BYTES
    panels = (groups + PANEL_GROUPS - 1) // PANEL_GROUPS
    batch = batch_size(tokens, panels, members)
    batches = (tokens + batch - 1) // batch
    taken = take_chunk(operation)
    while taken < batches * panels:
        panel, first = taken // batches, taken % batches * batch
        count = min(batch, tokens - first)
        if count <= FEW_TOKENS:
            g0 = panel * PANEL_GROUPS
            g1 = g0 + panel_groups(panel, groups)
            for t in range(first, first + count):
                multiply_one(out + t * stride, w, g0, g1, cols, x + 4 * row * t, scale, 0)
        else:
            many_sums(scratch, w, panel, groups, cols, x, scale, row, first, count)
            store_sums(out, stride, scratch, panel, groups, first, count)
        taken = take_chunk(operation)


@dataclass(frozen=True, slots=True)
class FloatOperations:
    """Products with one token and with many."""

    matvec: Entry
    gemm: Entry


@entry("B16")
def b16_matvec(operation: int, member: int, members: int) -> None:
    """`single_token.share_matvec`"""
    share_matvec(operation, members, float_rows.matvec_b16)


@entry("B16")
def b16_gemm(operation: int, member: int, members: int) -> None:
    """`share_float_gemm`"""
    share_float_gemm(operation, member, members, float_rows.matvec_b16, gemm_floats.sums_b16)


@entry("F32R")
def f32r_matvec(operation: int, member: int, members: int) -> None:
    """`single_token.share_matvec`"""
    share_matvec(operation, members, float_rows.matvec_f32r)


@entry("F32R")
def f32r_gemm(operation: int, member: int, members: int) -> None:
    """`share_float_gemm`"""
    share_float_gemm(operation, member, members, float_rows.matvec_f32r, gemm_floats.sums_f32r)


@entry("F8")
def f8_matvec(operation: int, member: int, members: int) -> None:
    """`single_token.share_matvec`"""
    share_matvec(operation, members, float_rows.matvec_f8)


@entry("F8")
def f8_gemm(operation: int, member: int, members: int) -> None:
    """`share_float_gemm`"""
    share_float_gemm(operation, member, members, float_rows.matvec_f8, gemm_floats.sums_f8)


OPERATIONS = {
    "B16": FloatOperations(b16_matvec, b16_gemm),
    "F32R": FloatOperations(f32r_matvec, f32r_gemm),
    "F8": FloatOperations(f8_matvec, f8_gemm),
}
"""By the name of the format."""
