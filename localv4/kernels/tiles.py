"""The register tile of large products: integer sums of some rows times some tokens.

A tile is TILE_GROUPS groups of sixteen rows times TILE_TOKENS tokens, as many sums as the registers
hold. Its weights are lines of 64 bytes, four columns of sixteen rows; its activations are words of
four int8. Integer sums run over a block of columns that shares one scale of each row and token;
then they are scaled and added to float32 sums in memory.
"""

from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from localv4.kernels import simd_dots, simd_ir
from localv4.kernels.isa import ISA
from localv4.kernels.simd import i32x16, operation
from localv4.kernels.simd_ir import BYTES, F32, FLOATS, I32, I64, Builder, Value

# Sums that fit the registers together with the weights of a step and an activation.
TILE_GROUPS, TILE_TOKENS = {
    "avx512-vnni": (4, 6),
    "avx-vnni": (1, 6),
    "avx2": (1, 6),
    "neon-dotprod": (1, 6),
    "generic": (1, 2),
}[ISA.level]
FEW_TOKENS = TILE_TOKENS // 2
"""Tokens of a smaller tile, for what whole ones leave."""

STEP = 4 if ISA.level == "avx2" else 2
"""Lines of each group in one call of the `add` operations; AVX2 sums four before it widens."""

LINE = 64 * TILE_GROUPS
"""Bytes from a line of a group to the next one of the same group."""

_address = types.int64


@dataclass(frozen=True, slots=True)
class TileOperations:
    """Operations on a tile of `tokens` tokens, the sums of which are a tuple of int32 vectors.

    `start_sums(starts, row)` returns in all lanes the int32 of each token; those lie `row` bytes
    apart. `add_codes` and `add_bytes(sums, lines, words, row)` return sums + products of STEP lines
    of 4-bit or 8-bit weights with the words of activations; those of a token follow one another,
    tokens are `row` bytes apart. `flush_sums(out, stride, sums, scales, factors, row)` does
    out[token][weight row] += sums * scales[weight row] * factors[token]; out: float32, tokens
    `stride` bytes apart; scales: sixteen float32 for each group; factors: one float32 for each
    token, `row` bytes apart.
    """

    tokens: int
    start_sums: Any
    add_codes: Any
    add_bytes: Any
    flush_sums: Any


def tile_operations(tokens: int) -> TileOperations:
    """Make the operations for TILE_TOKENS or FEW_TOKENS."""
    return TileOperations(
        tokens,
        _starter(tokens),
        _adder(tokens, simd_dots.add_code_lines),
        _adder(tokens, simd_dots.add_byte_lines),
        _flusher(tokens),
    )


def _sums(tokens: int) -> Any:
    return types.UniTuple(i32x16, TILE_GROUPS * tokens)


def _of_token(b: Builder, address: Value, row: Value, token: int, distance: int = 0) -> Value:
    """Return an address in the row of a token of the tile."""
    start = b.add(address, b.mul(row, ir.Constant(I64, token)))
    return simd_ir.offset(b, start, distance)


def _starter(tokens: int) -> Any:
    @operation(_sums(tokens), _address, _address)
    def start_sums(b: Builder, starts: Value, row: Value) -> list[Value]:
        """Return what the sums start from."""
        sums = []
        for token in range(tokens):
            start = simd_ir.load(b, I32, _of_token(b, starts, row, token))
            sums += [simd_ir.splat(b, start)] * TILE_GROUPS
        return sums

    return start_sums


def _adder(tokens: int, add_lines: Any) -> Any:
    sums_type = _sums(tokens)

    @operation(sums_type, sums_type, _address, _address, _address)
    def add_products(b: Builder, sums: Value, lines: Value, words: Value, row: Value) -> Value:
        """Return sums + products of STEP lines."""
        totals = cgutils.unpack_tuple(b, sums)
        weights = [
            [
                simd_ir.load(b, BYTES, simd_ir.offset(b, lines, LINE * step + 64 * group))
                for step in range(STEP)
            ]
            for group in range(TILE_GROUPS)
        ]
        for token in range(tokens):
            places = [_of_token(b, words, row, token, 4 * step) for step in range(STEP)]
            loaded = [simd_ir.load(b, I32, place) for place in places]
            columns = [b.bitcast(simd_ir.splat(b, word), BYTES) for word in loaded]
            for group in range(TILE_GROUPS):
                i = TILE_GROUPS * token + group
                totals[i] = add_lines(b, ISA, totals[i], weights[group], columns)
        return totals

    return add_products


def _flusher(tokens: int) -> Any:
    @operation(types.void, _address, _address, _sums(tokens), _address, _address, _address)
    def flush_sums(
        b: Builder,
        out: Value,
        stride: Value,
        sums: Value,
        scales: Value,
        factors: Value,
        row: Value,
    ) -> None:
        """Scale the sums and add them to others."""
        totals = cgutils.unpack_tuple(b, sums)
        rows = [
            simd_ir.load(b, FLOATS, simd_ir.offset(b, scales, 64 * group))
            for group in range(TILE_GROUPS)
        ]
        for token in range(tokens):
            factor = simd_ir.splat(b, simd_ir.load(b, F32, _of_token(b, factors, row, token)))
            start = b.add(out, b.mul(stride, ir.Constant(I64, token)))
            for group, scale in enumerate(rows):
                address = simd_ir.offset(b, start, 64 * group)
                total = b.sitofp(totals[TILE_GROUPS * token + group], FLOATS)
                before = simd_ir.load(b, FLOATS, address)
                result = simd_ir.multiply_add(b, total, b.fmul(scale, factor), before)
                simd_ir.store(b, result, address)

    return flush_sums
