"""Programs: lists of operations on memory addresses that a team of threads runs together.

A program is an array (operations, WORDS) of i64. Word 0 says what to do, the last word counts the
chunks of work that have been taken, the others are the operands in the order below. All members run
each operation, and none begins the next before all have finished, except after an operation whose
word ALONGSIDE is 1: that one shares its inputs with the next and both may run at the same time.
Members take chunks of row groups as they come, so a slow core holds nobody up; each output is
computed by one member in one order, so who took it changes nothing.

| operation | operands |
|---|---|
| QUANTIZE | x, blocks of 32 values, q, d, b |
| MATVEC | format, matrix, row groups, columns, q (F8: x), d (F8: scale), b, out |
| GATE_UP | format, records, count, row groups, columns, q, d, b, h, limit as f32 bits |
| DOWN | format, records, count, row groups, columns, q, d, b, out, weights, offset in a record |
| TILES | q, d, s, x, rows, tokens, columns |
| FLOAT_TILES | tiles of float32, x, rows, tokens, columns |
| GEMM | format, matrix, row groups, columns, q, d, s, tokens, out, stride, scratch, 0, 0, inputs |
| GEMM_GATE_UP | as GEMM, with h for out; limit as f32 bits, 0, inputs |
| GEMM_DOWN | as GEMM; rows, weights, inputs |
| STORED | format, data, rows, row bytes, scale, its columns, x, tokens, its columns, groups, out, |
| | scratch, its columns |

A format is an index into `packed.FORMATS`; for STORED one of `blocks`.

QUANTIZE to DOWN work on one token. `records` is the address of `count` addresses of packed experts;
h (count, width) f32 is their hidden layer, `weights` (count,) f32 their share in `out`.

TILES to GEMM_DOWN work on many tokens at once, with the same bits for each. `rows` (tokens,) i64
names the rows of x that TILES prepares (for F8 it is FLOAT_TILES, and q, d are its tiles and the
scales of the matrix) and the rows of out that GEMM_DOWN adds to, multiplied by
`weights` (tokens,) f32. `inputs` is 0 for tokens in tiles; else q, d, s are those of QUANTIZE for
any number of tokens, and `inputs` (tokens,) i64 names the ones to take: faster for a few. The
scratch has `gemm.SCRATCH_BYTES` for each member.

STORED multiplies a matrix in any storage format as `matmul` does; its scratch has a row for each
member.
"""

from localv4.kernels.device import device
from localv4.kernels.many_tokens import multiply_panels, prepare_float_tiles, prepare_tiles, stored
from localv4.kernels.operation import (
    DOWN,
    FLOAT_TILES,
    GATE_UP,
    MATVEC,
    QUANTIZE,
    STORED,
    TILES,
    word,
)
from localv4.kernels.single_token import down, gate_up, matvec, quantize


@device
def run_operation(operation: int, member: int, members: int) -> None:
    """Do a member's share of the operation at an address."""
    kind = word(operation, 0)
    if kind == QUANTIZE:
        quantize(operation)
    elif kind == MATVEC:
        matvec(operation, members)
    elif kind == GATE_UP:
        gate_up(operation, members)
    elif kind == DOWN:
        down(operation, members)
    elif kind == STORED:
        stored(operation, member, members)
    elif kind == TILES:
        prepare_tiles(operation)
    elif kind == FLOAT_TILES:
        prepare_float_tiles(operation)
    else:
        multiply_panels(operation, kind, member)
