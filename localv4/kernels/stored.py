"""The operation that multiplies with a matrix as it is stored, in the arithmetic of `matmul`."""

import numpy as np
from numba import carray

from localv4.kernels import packed
from localv4.kernels.blocks import FP4
from localv4.kernels.compiler import COMMON, entry
from localv4.kernels.matmul import product_rows
from localv4.kernels.memory import pointer_to
from localv4.kernels.operation import LARGEST_CHUNK, take_chunk, word


@entry(COMMON)
def stored_product(operation: int, member: int, members: int) -> None:
    """out = matrix . x for all tokens.

    Words: format (of `blocks`), data, rows, row bytes, scale, its columns, x, its row stride in
    floats, tokens, columns of the matrix, groups, out, its row stride in floats, scratch, its
    columns. Scratch has a row for each member.
    """
    fmt, rows, row_bytes = word(operation, 1), word(operation, 3), word(operation, 4)
    tokens, cols, groups = word(operation, 9), word(operation, 10), word(operation, 11)
    scale_rows = rows if fmt == FP4 else -(-rows // packed.F8_SPAN)
    data = carray(pointer_to(word(operation, 2)), (rows, row_bytes), np.uint8)
    scale = carray(pointer_to(word(operation, 5)), (scale_rows, word(operation, 6)), np.uint8)
    x = carray(pointer_to(word(operation, 7)), (tokens, word(operation, 8)), np.float32)
    out = carray(pointer_to(word(operation, 12)), (tokens, word(operation, 13)), np.float32)
    scratch = carray(pointer_to(word(operation, 14)), (members, word(operation, 15)), np.float32)
    chunk = max(1, min(LARGEST_CHUNK * packed.GROUP_ROWS, rows // (4 * members)))
    first = take_chunk(operation) * chunk
    while first < rows:
        end = min(first + chunk, rows)
        product_rows(out, x, fmt, data, scale, cols, groups, scratch[member], first, end)
        first = take_chunk(operation) * chunk
