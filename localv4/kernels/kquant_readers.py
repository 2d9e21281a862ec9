"""Operations of kernels on superblocks of the formats of `kernels.packed_kquants`."""

from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from localv4.kernels import simd_dots, simd_ir
from localv4.kernels.activations import SUMS_BYTES
from localv4.kernels.isa import ISA
from localv4.kernels.kquant_blocks import (
    IQ2_KIND,
    Q2_KIND,
    Q3_KIND,
    Q4K_KIND,
    Q6_KIND,
    Step,
    iq2_step,
    prefetch_behind,
    q2_step,
    q3_step,
    q4k_step,
    q6_step,
)
from localv4.kernels.kquant_kinds import Kind
from localv4.kernels.kquant_lattice import turned
from localv4.kernels.packed import BLOCK, PackedFormat
from localv4.kernels.packed_kquants import IQ2, Q2, Q3, Q4K, Q6, SUPERBLOCK
from localv4.kernels.simd import operation
from localv4.kernels.simd_ir import F32, FLOATS, Builder, Value
from localv4.kernels.vectors import f32x16


@dataclass(frozen=True, slots=True)
class TokenOperations:
    """Operations for a fixed number of tokens, on the row sums of sixteen rows for each of them.

    `nothing()` are sums of nothing, and `no_parts()` those of the parts of a superblock.
    `prefetch_head(w)` asks for what is some way behind head and scales of the superblock at w.
    `arrange(q)` gives the addresses of the activations of a superblock as `add_step` wants them.
    `add_step(parts, w, step, q, d, b)` adds the products of a step of the superblock at w; q, d, b:
    for each token where the activations of the step are. `finish(sums, parts, w)` adds the parts of
    a whole superblock to sums.
    """

    nothing: Any
    no_parts: Any
    prefetch_head: Any
    arrange: Any
    add_step: Any
    finish: Any


@dataclass(frozen=True, slots=True, eq=False)
class SuperblockReader:
    """How to multiply with a format.

    `decode` makes the blocks of a step, of a kind. `codes_at` is where the codes begin in a
    superblock. `is_turned` tells that the activations of a block have to be in the order of
    `kquant_lattice.turned`.
    """

    fmt: PackedFormat
    decode: Step
    kind: Kind
    codes_at: int
    is_turned: bool = False

    def head(self, b: Builder, w: Value) -> list[Value]:
        """Read what the whole numbers of a superblock are to be multiplied with."""
        if self.kind.numbers == 1:
            return [simd_ir.load(b, FLOATS, w)]
        least = simd_dots.load_f16(b, ISA, simd_ir.offset(b, w, 32))
        return [simd_dots.load_f16(b, ISA, w), b.fneg(least)]

    def operations(self, tokens: int) -> TokenOperations:
        """Make the operations for some tokens at a time."""
        return TokenOperations(
            _zeros(tokens),
            _zeros(self.kind.numbers * tokens),
            _head_prefetcher(self),
            turner(self, tokens),
            _step_adder(self, tokens),
            _finisher(self, tokens),
        )


def _zeros(count: int) -> Any:
    @operation(types.UniTuple(f32x16, count))
    def zeros(b: Builder) -> list[Value]:
        """Return so many vectors of zeros."""
        return [simd_ir.filled(FLOATS, 0.0)] * count

    return zeros


def stack_bytes(b: Builder, count: int) -> Value:
    """Return the address of so many bytes that live as long as the function does."""
    with b.goto_entry_block():
        return b.ptrtoint(b.alloca(ir.ArrayType(simd_ir.I8, count)), simd_ir.I64)


def _head_prefetcher(reader: SuperblockReader) -> Any:
    @operation(types.void, types.int64)
    def prefetch_head(b: Builder, w: Value) -> None:
        """Ask for the lines behind head and scales."""
        for i in range(reader.codes_at // 64):
            prefetch_behind(b, simd_ir.offset(b, w, 64 * i))

    return prefetch_head


def turner(reader: SuperblockReader, tokens: int) -> Any:
    """Make the operation that gives the activations of a superblock the order of a format."""
    addresses = types.UniTuple(types.int64, tokens)

    @operation(addresses, addresses)
    def same(b: Builder, q: Value) -> list[Value]:
        """Return the addresses."""
        return list(cgutils.unpack_tuple(b, q))

    @operation(addresses, addresses)
    def turn(b: Builder, q: Value) -> list[Value]:
        """Return the addresses of the turned activations, valid until the next call."""
        results = []
        for source in cgutils.unpack_tuple(b, q):
            target = stack_bytes(b, SUPERBLOCK)
            for at in range(0, SUPERBLOCK, BLOCK):
                turned(b, simd_ir.offset(b, target, at), simd_ir.offset(b, source, at))
            results.append(target)
        return results

    return turn if reader.is_turned else same


def _step_adder(reader: SuperblockReader, tokens: int) -> Any:
    sums = types.UniTuple(f32x16, reader.kind.numbers * tokens)
    addresses = types.UniTuple(types.int64, tokens)

    @operation(sums, sums, types.int64, types.int64, addresses, addresses, addresses)
    def add_step(
        b: Builder, parts: Value, w: Value, step: Value, q: Value, d: Value, s: Value
    ) -> list[Value]:
        """parts + whole products of a step * scale of the activations"""
        totals = cgutils.unpack_tuple(b, parts)
        places = [cgutils.unpack_tuple(b, addresses) for addresses in (q, d, s)]
        for i, block in enumerate(reader.decode(b, ISA, w, step)):
            for token, (own_q, own_d, own_s) in enumerate(zip(*places, strict=True)):
                block_q = simd_ir.offset(b, own_q, BLOCK * i)
                block_s = simd_ir.offset(b, own_s, SUMS_BYTES * i)
                factor = simd_ir.load(b, F32, simd_ir.offset(b, own_d, 4 * i))
                factors = simd_ir.splat(b, factor)
                for k, whole in enumerate(block.products(b, ISA, reader.kind, block_q, block_s)):
                    at = reader.kind.numbers * token + k
                    product = b.sitofp(whole, FLOATS)
                    totals[at] = simd_ir.multiply_add(b, product, factors, totals[at])
        return list(totals)

    return add_step


def _finisher(reader: SuperblockReader, tokens: int) -> Any:
    sums, parts = (types.UniTuple(f32x16, n * tokens) for n in (1, reader.kind.numbers))

    @operation(sums, sums, parts, types.int64)
    def finish(b: Builder, before: Value, added: Value, w: Value) -> list[Value]:
        """before + d * sums - m * sums of least values"""
        totals, news = cgutils.unpack_tuple(b, before), cgutils.unpack_tuple(b, added)
        factors = reader.head(b, w)
        for i, new in enumerate(news):
            token, kind = divmod(i, reader.kind.numbers)
            totals[token] = simd_ir.multiply_add(b, new, factors[kind], totals[token])
        return list(totals)

    return finish


Q4K_READER = SuperblockReader(Q4K, q4k_step, Q4K_KIND, 256)
Q6_READER = SuperblockReader(Q6, q6_step, Q6_KIND, 320)
Q3_READER = SuperblockReader(Q3, q3_step, Q3_KIND, 256)
Q2_READER = SuperblockReader(Q2, q2_step, Q2_KIND, 320)
IQ2_READER = SuperblockReader(IQ2, iq2_step, IQ2_KIND, 64, is_turned=True)
