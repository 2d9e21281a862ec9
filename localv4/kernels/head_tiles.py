"""The register tiles of attention: query heads in the lanes, keys or channels beside one another.

All heads share one key row per token. So an element of a key is multiplied with sixteen heads at a
time, and nothing is ever added across lanes. A tile is TILE_VECTORS vectors of heads times some
rows of sums, as many as the registers hold: rows are keys where queries are multiplied with keys,
and channels where weights are. Sums are added in the order of channels or keys, one at a time, so
they do not depend on how a caller cuts the loop.
"""

from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from localv4.kernels import simd_dots, simd_ir
from localv4.kernels.isa import ISA
from localv4.kernels.simd import operation
from localv4.kernels.simd_ir import F32, FLOATS, I64, Builder, Value
from localv4.kernels.vectors import f32x16

# Sums that fit the registers together with the heads of a step and an element of a key.
TILE_VECTORS, TILE_ROWS = {
    "avx512-vnni": (4, 6),
    "avx-vnni": (1, 6),
    "avx2": (1, 6),
    "neon-dotprod": (1, 6),
    "generic": (1, 2),
}[ISA.level]

CHANNELS = 16
"""Channels that are summed over keys together: three tiles at most, the last one is narrower."""

STEP = 4
"""Channels of one call of `Tile.add_channels`."""

_address = types.int64


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """The operations on a tile of `rows` rows of sums; sums are a tuple in registers.

    `zeros()` returns sums of nothing; `load(address, stride)` and `store(address, stride, sums)`
    move sums from and to memory, rows `stride` bytes apart. `addresses(address, stride)` reads one
    i64 for each row; `places(address, stride, count)` returns the addresses of rows `stride` bytes
    apart, of which there are `count`: that of the last one in place of those behind it.
    `prefetch(keys, offset)` asks for a cache line of each of the addresses `keys`.
    `add_channels(sums, queries, stride, keys, offset)` adds STEP channels: lanes of heads at
    `queries`, channels `stride` bytes apart, times the floats `offset` bytes behind each of the
    addresses `keys`. `add_key(sums, weights, key)` adds one key: lanes of heads at `weights` times
    the floats at `key`, one for each row.
    """

    rows: int
    zeros: Any
    load: Any
    store: Any
    addresses: Any
    places: Any
    prefetch: Any
    add_channels: Any
    add_key: Any


def _add_products(
    b: Builder, totals: list[Value], heads: Value, elements: list[Value]
) -> list[Value]:
    """Return totals + heads * elements: the heads at an address, scalars at one for each row."""
    vectors = [
        simd_ir.load(b, FLOATS, simd_ir.offset(b, heads, 64 * v)) for v in range(TILE_VECTORS)
    ]
    sums = []
    for row, element in enumerate(elements):
        factor = simd_ir.splat(b, simd_ir.load(b, F32, element))
        for v, vector in enumerate(vectors):
            sums.append(simd_ir.multiply_add(b, vector, factor, totals[TILE_VECTORS * row + v]))
    return sums


def _places(b: Builder, address: Value, stride: Value, rows: int) -> list[Value]:
    """Return the addresses of rows that are `stride` bytes apart."""
    places = [address]
    for _ in range(rows - 1):
        places.append(b.add(places[-1], stride))
    return places


def _make_tile(rows: int) -> Tile:
    sums = types.UniTuple(f32x16, TILE_VECTORS * rows)
    keys = types.UniTuple(_address, rows)

    @operation(sums)
    def zeros(b: Builder) -> list[Value]:
        """Return sums of nothing."""
        return [simd_ir.filled(FLOATS, 0.0)] * (TILE_VECTORS * rows)

    @operation(sums, _address, _address)
    def load(b: Builder, address: Value, stride: Value) -> list[Value]:
        """Read sums."""
        return [
            simd_ir.load(b, FLOATS, simd_ir.offset(b, place, 64 * v))
            for place in _places(b, address, stride, rows)
            for v in range(TILE_VECTORS)
        ]

    @operation(types.void, _address, _address, sums)
    def store(b: Builder, address: Value, stride: Value, values: Value) -> None:
        """Write sums."""
        totals = cgutils.unpack_tuple(b, values)
        for row, place in enumerate(_places(b, address, stride, rows)):
            for v in range(TILE_VECTORS):
                total = totals[TILE_VECTORS * row + v]
                simd_ir.store(b, total, simd_ir.offset(b, place, 64 * v))

    @operation(keys, _address, _address)
    def addresses(b: Builder, address: Value, stride: Value) -> list[Value]:
        """Read an address for each row."""
        return [simd_ir.load(b, I64, place) for place in _places(b, address, stride, rows)]

    @operation(keys, _address, _address, _address)
    def places(b: Builder, address: Value, stride: Value, count: Value) -> list[Value]:
        """Return an address for each row."""
        results = [address]
        for row in range(1, rows):
            exists = b.icmp_signed("<", ir.Constant(I64, row), count)
            step = b.select(exists, stride, ir.Constant(I64, 0))
            results.append(b.add(results[-1], step))
        return results

    @operation(types.void, keys, _address)
    def prefetch(b: Builder, rows_of: Value, offset: Value) -> None:
        """Ask for cache lines to be in the second cache soon."""
        for key in cgutils.unpack_tuple(b, rows_of):
            simd_dots.prefetch(b, b.add(key, offset), 2)

    @operation(sums, sums, _address, _address, keys, _address)
    def add_channels(
        b: Builder, values: Value, queries: Value, stride: Value, rows_of: Value, offset: Value
    ) -> list[Value]:
        """Return sums + queries * keys over STEP channels."""
        totals: list[Value] = cgutils.unpack_tuple(b, values)
        starts = [b.add(key, offset) for key in cgutils.unpack_tuple(b, rows_of)]
        for channel, heads in enumerate(_places(b, queries, stride, STEP)):
            elements = [simd_ir.offset(b, start, 4 * channel) for start in starts]
            totals = _add_products(b, totals, heads, elements)
        return totals

    @operation(sums, sums, _address, _address)
    def add_key(b: Builder, values: Value, weights: Value, key: Value) -> list[Value]:
        """Return sums + weights * key."""
        elements = [simd_ir.offset(b, key, 4 * row) for row in range(rows)]
        return _add_products(b, cgutils.unpack_tuple(b, values), weights, elements)

    return Tile(rows, zeros, load, store, addresses, places, prefetch, add_channels, add_key)


TILE = _make_tile(TILE_ROWS)
LAST_TILE = _make_tile((CHANNELS - 1) % TILE_ROWS + 1)
"""The tile for what remains of CHANNELS."""
