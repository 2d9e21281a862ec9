"""Tiles of AMX: the unit of some x86 processors that multiplies matrices of bytes.

A tile is a register of up to sixteen rows of 64 bytes. A tile of activations, 32 int8 of each
token, times a tile of weights, the eight lines of a block (`kernels.simd_dots`) without a bias, is
a tile of int32 sums, exact: a row of sixteen for each token. Only memory leads from there to the
vector registers, where the sums are scaled and added. So that both units have work, blocks are
done in steps of two: `both` multiplies a step while it adds the one before.

Memory of a step: sums [block][token][16 weight rows]. Scales as in `kernels.panels`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from localv4.kernels import simd_dots, simd_ir
from localv4.kernels.isa import ISA, Isa
from localv4.kernels.packed import BLOCK
from localv4.kernels.simd import operation
from localv4.kernels.simd_blocks import block
from localv4.kernels.simd_ir import BYTES, F32, FLOATS, I8, I64, INTS, VOID, Builder, Value
from localv4.kernels.tiles import LINE
from localv4.kernels.vectors import f32x16

STEP = 2
"""Blocks of a step."""

TOKENS, SOME_TOKENS, FEW_TOKENS = 16, 12, 8
"""Tokens of a tile, and of smaller ones that take less time."""

CONFIGURATION_BYTES = 64

WHOLE = 16
"""Rows of the largest tile."""

BLOCK_LINES = BLOCK // 4
_ROW = 64  # bytes of a row of a tile, as stored

_WEIGHTS = (6, 7)  # numbers of tiles

_address = types.int64
Call = tuple[Any, ...]  # name and operands of an instruction


class _Signed(Isa):
    """This machine as the decoders see it where weights are signed: they add no bias."""

    __slots__ = ()

    @property
    def unsigned_weights(self) -> bool:
        """Products take weights as they are."""
        return False


_SIGNED = _Signed(ISA.level, ISA.family, ISA.bytes_permute, ISA.fast_half)


def _tiles(tokens: int) -> tuple[tuple[int, int], int]:
    """Return the numbers of the tiles of sums, one for each block, and of the activations."""
    return ((0, 1), 4) if tokens == TOKENS else ((2, 3), 5)


def _configuration(small: int) -> bytes:
    """Return the sizes of the tiles as the processor reads them (palette 1).

    small: the number of tokens of smaller tiles.
    """
    widths, heights = bytearray(32), bytearray(16)

    def describe(tile: int, height: int, width: int) -> None:
        heights[tile], widths[2 * tile] = height, width

    for tokens in (TOKENS, small):
        sums, activations = _tiles(tokens)
        describe(activations, tokens, BLOCK)
        for tile in sums:
            describe(tile, tokens, _ROW)
    for tile in _WEIGHTS:
        describe(tile, BLOCK_LINES, _ROW)
    return bytes((1, *bytes(15), *widths, *heights))


@operation(types.void, _address, types.int64)
def begin_tiles(b: Builder, memory: Value, small: Value) -> None:
    """Let this thread use tiles of TOKENS and of `small` tokens.

    memory: CONFIGURATION_BYTES to spare; small: SOME_TOKENS or FEW_TOKENS.
    """
    some, few = (simd_ir.constant(BYTES, _configuration(n)) for n in (SOME_TOKENS, FEW_TOKENS))
    is_some = b.icmp_signed("==", small, ir.Constant(I64, SOME_TOKENS))
    simd_ir.store(b, b.select(is_some, some, few), memory)
    emit(b, ("ldtilecfg", pointer(b, memory)))


@operation(types.void, _address)
def begin_whole_tiles(b: Builder, memory: Value) -> None:
    """Let this thread use eight tiles of WHOLE rows of 64 bytes; memory: CONFIGURATION_BYTES."""
    sizes = bytes((1, *bytes(15), *(_ROW, 0) * 8, *bytes(16), *(WHOLE,) * 8, *bytes(8)))
    simd_ir.store(b, simd_ir.constant(BYTES, sizes), memory)
    emit(b, ("ldtilecfg", pointer(b, memory)))


@operation(types.void)
def end_tiles(b: Builder) -> None:
    """Forget the tiles, so that the system need not keep them for this thread."""
    emit(b, ("tilerelease",))


@operation(block, _address)
def mx4_codes(b: Builder, address: Value) -> list[Value]:
    """Decode the 256 bytes of an MX4 block, unbiased: twice its values."""
    return simd_dots.mx4_codes(b, _SIGNED, address)


@operation(block, _address)
def q4_codes(b: Builder, address: Value) -> list[Value]:
    """Decode the 256 bytes of a Q4 block, unbiased."""
    return simd_dots.q4_codes(b, _SIGNED, address)


@dataclass(frozen=True, slots=True)
class TileOperations:
    """Operations for a fixed number of tokens, whose float32 sums are a tuple of vectors.

    `load(address, stride)` and `store(address, stride, sums)` move the sums, `stride` bytes apart.
    `multiply(out, lines, q, q_row)` writes the int32 sums of a step to out. `add(sums, step,
    scales, d, d_row)` returns sums + step * scale[block][weight row] * d[token][block].
    `both(sums, step, scales, d, d_row, out, lines, q, q_row)` does both.
    """

    load: Any
    store: Any
    multiply: Any
    add: Any
    both: Any


def tile_operations(tokens: int, line: int) -> TileOperations:
    """Make the operations for a tile of TOKENS, SOME_TOKENS or FEW_TOKENS.

    line: the bytes from a line of weights to the next one.
    """
    sums = types.UniTuple(f32x16, tokens)

    @operation(sums, _address, _address)
    def load(b: Builder, address: Value, stride: Value) -> list[Value]:
        """Read the sums."""
        places = (_of_token(b, address, stride, token) for token in range(tokens))
        return [simd_ir.load(b, FLOATS, place) for place in places]

    @operation(types.void, _address, _address, sums)
    def store(b: Builder, address: Value, stride: Value, totals: Value) -> None:
        """Write the sums."""
        for token, total in enumerate(cgutils.unpack_tuple(b, totals)):
            simd_ir.store(b, total, _of_token(b, address, stride, token))

    @operation(types.void, _address, _address, _address, _address)
    def multiply(b: Builder, out: Value, lines: Value, q: Value, q_row: Value) -> None:
        """Write the sums of a step."""
        for call in _multiplication(b, tokens, line, out, lines, q, q_row):
            emit(b, call)

    @operation(sums, sums, _address, _address, _address, _address)
    def add(
        b: Builder, totals: Value, step: Value, scales: Value, d: Value, d_row: Value
    ) -> list[Value]:
        """Add a step."""
        values: list[Value] = cgutils.unpack_tuple(b, totals)
        _add(b, values, step, scales, d, d_row, lambda _: None)
        return values

    @operation(sums, sums, *[_address] * 8)
    def both(
        b: Builder,
        totals: Value,
        step: Value,
        scales: Value,
        d: Value,
        d_row: Value,
        out: Value,
        lines: Value,
        q: Value,
        q_row: Value,
    ) -> list[Value]:
        """Add a step and multiply another one, evenly mixed."""
        calls, rows = _multiplication(b, tokens, line, out, lines, q, q_row), STEP * tokens

        def emit_share(row: int) -> None:
            for call in calls[len(calls) * row // rows : len(calls) * (row + 1) // rows]:
                emit(b, call)

        values: list[Value] = cgutils.unpack_tuple(b, totals)
        _add(b, values, step, scales, d, d_row, emit_share)
        return values

    return TileOperations(load, store, multiply, add, both)


def _multiplication(
    b: Builder, tokens: int, line: int, out: Value, lines: Value, q: Value, q_row: Value
) -> list[Call]:
    """Return the instructions that multiply a step."""
    sums, activations = _tiles(tokens)
    line_bytes, row = ir.Constant(I64, line), ir.Constant(I64, _ROW)
    calls: list[Call] = []
    for i in range(STEP):
        own_q = simd_ir.offset(b, q, BLOCK * i)
        own_lines = simd_ir.offset(b, lines, BLOCK_LINES * line * i)
        calls += [
            ("tilezero", sums[i]),
            ("tileloadd64", activations, pointer(b, own_q), q_row),
            ("tileloadd64", _WEIGHTS[i], pointer(b, own_lines), line_bytes),
            ("tdpbssd", sums[i], activations, _WEIGHTS[i]),
        ]
    for i in range(STEP):
        place = simd_ir.offset(b, out, _ROW * tokens * i)
        calls.append(("tilestored64", sums[i], pointer(b, place), row))
    return calls


def _add(
    b: Builder,
    totals: list[Value],
    step: Value,
    scales: Value,
    d: Value,
    d_row: Value,
    before: Callable[[int], None],
) -> None:
    """Add a step to the totals, in place; `before(i)` is called before the i-th row of sums."""
    for i in range(STEP):
        scale = simd_ir.load(b, FLOATS, simd_ir.offset(b, scales, LINE * i))
        for token in range(len(totals)):
            row = len(totals) * i + token
            before(row)
            whole = simd_ir.load(b, INTS, simd_ir.offset(b, step, _ROW * row))
            factor = simd_ir.load(b, F32, _of_token(b, d, d_row, token, 4 * i))
            scaled = b.fmul(scale, simd_ir.splat(b, factor))
            product = b.sitofp(whole, FLOATS)
            totals[token] = simd_ir.multiply_add(b, product, scaled, totals[token])


def _of_token(b: Builder, address: Value, stride: Value, token: int, distance: int = 0) -> Value:
    """Return an address in the row of a token."""
    start = b.add(address, b.mul(stride, ir.Constant(I64, token)))
    return simd_ir.offset(b, start, distance)


def pointer(b: Builder, address: Value) -> Value:
    return b.inttoptr(address, I8.as_pointer())


def emit(b: Builder, call: Call) -> None:
    """Emit an instruction; its numbers are those of tiles."""
    name, *operands = call
    values = [ir.Constant(I8, x) if isinstance(x, int) else x for x in operands]
    simd_ir.call(b, f"llvm.x86.{name}", VOID, *values)
