"""Operations on many tokens: panels of packed weights against all tokens at once."""

import numpy as np
from numba import carray

from localv4.kernels import packed
from localv4.kernels.blocks import FP4
from localv4.kernels.device import device
from localv4.kernels.gemm import (
    BATCH_TOKENS,
    PANEL_GROUPS,
    SCRATCH_BYTES,
    add_weighted_sums,
    store_gated_sums,
    store_sums,
    sums_mx4,
    sums_q4,
    sums_q8,
)
from localv4.kernels.gemm_f8 import copy_tiles, sums_f8
from localv4.kernels.matmul import product_rows
from localv4.kernels.memory import pointer_to
from localv4.kernels.operation import (
    F8,
    GEMM,
    GEMM_DOWN,
    GEMM_GATE_UP,
    INPUTS,
    LARGEST_CHUNK,
    MX4,
    Q4,
    Q8,
    float_at,
    take_chunk,
    word,
)
from localv4.kernels.panels import FINE, quantize_tiles
from localv4.kernels.small_batches import few_sums_mx4, few_sums_q4, few_sums_q8
from localv4.kernels.tiles import TILE_TOKENS


@device
def prepare_tiles(operation: int) -> None:
    """Round the activations of many tokens and sort them into tiles."""
    q, d, s, x = word(operation, 1), word(operation, 2), word(operation, 3), word(operation, 4)
    rows, count, cols = word(operation, 5), word(operation, 6), word(operation, 7)
    tile = take_chunk(operation)
    while tile * TILE_TOKENS < count:
        quantize_tiles(q, d, s, x, rows, count, cols, FINE, tile, tile + 1)
        tile = take_chunk(operation)


@device
def prepare_float_tiles(operation: int) -> None:
    """Sort the activations of many tokens into tiles, for FP8 weights."""
    tiles, x, rows = word(operation, 1), word(operation, 2), word(operation, 3)
    count, cols = word(operation, 4), word(operation, 5)
    tile = take_chunk(operation)
    while tile * TILE_TOKENS < count:
        copy_tiles(tiles, x, rows, count, cols, tile, tile + 1)
        tile = take_chunk(operation)


@device
def multiply_panels(operation: int, kind: int, member: int) -> None:
    """One of the GEMM family: panels of 64 rows, each for all tokens."""
    groups, count = word(operation, 3), word(operation, 8)
    scratch = word(operation, 11) + member * SCRATCH_BYTES
    panel = take_chunk(operation)
    while panel * PANEL_GROUPS < groups:
        for first in range(0, count, BATCH_TOKENS):
            tokens = min(BATCH_TOKENS, count - first)
            if word(operation, INPUTS) == 0:
                sum_tiles(operation, scratch, panel, first, tokens)
            else:
                sum_few(operation, scratch, panel, first, tokens)
            use_sums(operation, kind, scratch, panel, first, tokens)
        panel = take_chunk(operation)


@device
def sum_tiles(operation: int, scratch: int, panel: int, first: int, tokens: int) -> None:
    """Multiply a panel with tokens in tiles; the sums stay in scratch."""
    fmt, w, groups = word(operation, 1), word(operation, 2), word(operation, 3)
    cols, q, d, s = word(operation, 4), word(operation, 5), word(operation, 6), word(operation, 7)
    if fmt == MX4:
        sums_mx4(scratch, w, panel, groups, cols, q, d, s, first, tokens)
    elif fmt == Q4:
        sums_q4(scratch, w, panel, groups, cols, q, d, s, first, tokens)
    elif fmt == Q8:
        sums_q8(scratch, w, panel, groups, cols, q, d, s, first, tokens)
    elif fmt == F8:
        sums_f8(scratch, w, panel, groups, cols, q, d, first, tokens)


@device
def sum_few(operation: int, scratch: int, panel: int, first: int, tokens: int) -> None:
    """Multiply a panel with tokens in rows, which is faster for a few of them."""
    fmt, w, groups = word(operation, 1), word(operation, 2), word(operation, 3)
    cols, q, d, b = word(operation, 4), word(operation, 5), word(operation, 6), word(operation, 7)
    rows = word(operation, INPUTS)
    if fmt == MX4:
        few_sums_mx4(scratch, w, panel, groups, cols, q, d, b, rows, first, tokens)
    elif fmt == Q4:
        few_sums_q4(scratch, w, panel, groups, cols, q, d, b, rows, first, tokens)
    elif fmt == Q8:
        few_sums_q8(scratch, w, panel, groups, cols, q, d, b, rows, first, tokens)


@device
def use_sums(operation: int, kind: int, scratch: int, panel: int, first: int, tokens: int) -> None:
    """Put the sums of a panel where the operation wants them."""
    groups, out, stride = word(operation, 3), word(operation, 9), word(operation, 10)
    if kind == GEMM:
        store_sums(out, stride, scratch, panel, groups, first, tokens)
    elif kind == GEMM_GATE_UP:
        limit = float_at(operation + 8 * 12)
        store_gated_sums(out, stride, scratch, panel, groups, first, tokens, limit)
    elif kind == GEMM_DOWN:
        rows, weights = word(operation, 12), word(operation, 13)
        add_weighted_sums(out, stride, scratch, panel, groups, first, tokens, rows, weights)


@device
def stored(operation: int, member: int, members: int) -> None:
    """out = matrix . x for all tokens, in the arithmetic of `matmul`."""
    fmt, rows, row_bytes = word(operation, 1), word(operation, 3), word(operation, 4)
    tokens, width, groups = word(operation, 8), word(operation, 9), word(operation, 10)
    scale_rows = rows if fmt == FP4 else -(-rows // packed.F8_SPAN)
    data = carray(pointer_to(word(operation, 2)), (rows, row_bytes), np.uint8)
    scale = carray(pointer_to(word(operation, 5)), (scale_rows, word(operation, 6)), np.uint8)
    x = carray(pointer_to(word(operation, 7)), (tokens, width), np.float32)
    out = carray(pointer_to(word(operation, 11)), (tokens, rows), np.float32)
    scratch = carray(pointer_to(word(operation, 12)), (members, word(operation, 13)), np.float32)
    chunk = max(1, min(LARGEST_CHUNK * packed.GROUP_ROWS, rows // (4 * members)))
    first = take_chunk(operation) * chunk
    while first < rows:
        end = min(first + chunk, rows)
        product_rows(out, x, fmt, data, scale, groups, scratch[member], first, end)
        first = take_chunk(operation) * chunk
