"""Blocks of the packed formats of superblocks: their integers at every level, code for others."""

import re
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest
from llvmlite import ir
from numba import njit, types
from numpy.typing import NDArray
from reference_blocks import HALVES, TWINS, iq2_xxs, random_blocks
from reference_packed import Bytes, address, aligned
from test_simd import LEVELS_HERE, MACHINES, bound

from localv4.kernels import iquants, kquant_readers, kquants, packing_kquants, simd, simd_ir
from localv4.kernels.buffers import aligned_bytes
from localv4.kernels.isa import Isa, choose
from localv4.kernels.kquant_lattice import turned
from localv4.kernels.kquant_readers import SuperblockReader
from localv4.kernels.packed_kquants import IQ2, Q2, Q3, Q4K, Q6, SUPERBLOCK

needs_jit = pytest.mark.skipif(
    bool(numba.config.DISABLE_JIT), reason="vector values exist in compiled code only"
)

SOURCES = {
    Q4K: ("Q4_K", kquants.Q4_K_BYTES, packing_kquants.pack_q4_k, kquant_readers.Q4K_READER),
    Q6: ("Q6_K", kquants.Q6_K_BYTES, packing_kquants.pack_q6_k, kquant_readers.Q6_READER),
    Q3: ("Q3_K", kquants.Q3_K_BYTES, packing_kquants.pack_q3_k, kquant_readers.Q3_READER),
    Q2: ("Q2_K", kquants.Q2_K_BYTES, packing_kquants.pack_q2_k, kquant_readers.Q2_READER),
    IQ2: (
        "IQ2_XXS",
        iquants.IQ2_XXS_BYTES,
        packing_kquants.pack_iq2_xxs,
        kquant_readers.IQ2_READER,
    ),
}
READERS = [source[3] for source in SOURCES.values()]
formats = pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.fmt.name)

# the best level of machines without a lookup across 64 bytes
NO_PERMUTE = Isa("avx512-vnni", "x86", bytes_permute=False, fast_half=True)


def integers(ggml: str, blocks: Bytes, d: float, least: float) -> NDArray[np.int64]:
    """The values of blocks (n, bytes) with such factors instead of their own: whole numbers."""
    blocks = blocks.copy()
    for at, factor in zip(HALVES[ggml], (d, least), strict=False):
        blocks[:, at : at + 2] = np.array([factor], "<f2").view(np.uint8)
    decoded = iq2_xxs(blocks, iquants.GRID) if ggml == "IQ2_XXS" else TWINS[ggml](blocks)
    return np.rint(decoded).astype(np.int64)


def emit_step(b: Any, isa: Isa, reader: SuperblockReader, places: Any, step: Any) -> None:
    """Store the whole numbers of a step: places are those of out, weights, q, sums."""
    out, w, q, sums = places
    for i, block in enumerate(reader.decode(b, isa, w, step)):
        block_q, block_sums = simd_ir.offset(b, q, 32 * i), simd_ir.offset(b, sums, 16 * i)
        numbers = block.products(b, isa, reader.kind, block_q, block_sums)
        for k, number in enumerate(numbers):
            at = 64 * (reader.kind.numbers * i + k)
            simd_ir.store(b, number, simd_ir.offset(b, out, at))


def check_step(isa: Isa, reader: SuperblockReader) -> None:
    """All steps of a superblock of random weights have the integers of the twin."""
    ggml, size, pack, _ = SOURCES[reader.fmt]

    @simd.operation(types.void, *[types.int64] * 5)
    def products(b: Any, out: Any, w: Any, q: Any, sums: Any, step: Any) -> None:
        emit_step(b, isa, reader, (out, w, q, sums), step)

    run = njit(lambda *words: products(*words))
    rng, kind = np.random.default_rng(6), reader.kind
    blocks = random_blocks(rng, ggml, 16, size)
    weights = aligned_bytes(reader.fmt.superblock_bytes)
    pack(weights, blocks.reshape(-1), SUPERBLOCK, 0, 1, 1)
    x = rng.integers(-127, 128, SUPERBLOCK).astype(np.int8)
    x[64:128], x[128:192] = 127, -127
    sums = np.zeros((8, 4), np.int32)
    sums[:, 2:] = x.reshape(8, 2, 16).sum(2)
    turned_x = x.reshape(8, 4, 8).transpose(0, 2, 1) if reader.is_turned else x
    q, s = aligned(np.ascontiguousarray(turned_x)), aligned(sums)
    parts = [integers(ggml, blocks, 8 if reader.is_turned else 1, 0)]
    parts += [-integers(ggml, blocks, 0, 1)] * (kind.numbers - 1)
    wide = x.astype(np.int64).reshape(8, 32)
    expected = [np.einsum("rbc,bc->br", part.reshape(16, 8, 32), wide) for part in parts]
    for step in range(4):
        out = aligned(np.zeros((2, kind.numbers, 16), np.int32))
        run(address(out), address(weights), address(q) + 64 * step, address(s) + 32 * step, step)
        found = out.view(np.int32).reshape(2, kind.numbers, 16)
        for k, part in enumerate(expected):
            assert np.array_equal(found[:, k], part[2 * step : 2 * step + 2])


@needs_jit
@formats
@pytest.mark.parametrize("level", LEVELS_HERE)
def test_blocks(level: str, reader: SuperblockReader) -> None:
    check_step(bound(level), reader)


@needs_jit
@pytest.mark.skipif("avx512-vnni" not in LEVELS_HERE, reason="needs a machine with AVX-512")
@pytest.mark.parametrize("reader", READERS[2:], ids=lambda reader: reader.fmt.name)
def test_blocks_without_a_lookup_across_64_bytes(reader: SuperblockReader) -> None:
    check_step(NO_PERMUTE, reader)


@needs_jit
def test_turned_activations() -> None:
    @simd.operation(types.void, types.int64, types.int64)
    def turn(b: Any, target: Any, source: Any) -> None:
        turned(b, target, source)

    x, out = aligned(np.arange(32, dtype=np.uint8)), aligned(np.zeros(32, np.uint8))
    njit(lambda target, source: turn(target, source))(address(out), address(x))
    assert np.array_equal(out, np.arange(32).reshape(4, 8).T.ravel())


# --- code for other machines ---


def instructions(cpu: str, reader: SuperblockReader) -> list[str]:
    """The mnemonics of a step of a format for a processor."""
    triple, features, _ = MACHINES[cpu]
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        target = llvm.Target.from_triple(triple)
    except RuntimeError:
        pytest.skip(f"this LLVM makes no code for {triple}")
    module = ir.Module("step")
    module.triple = triple
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 5)
    function = ir.Function(module, kind, "step")
    b = ir.IRBuilder(function.append_basic_block())
    emit_step(b, choose(triple, features), reader, function.args[:4], function.args[4])
    b.ret_void()
    machine = target.create_target_machine(cpu=cpu, opt=3)
    assembly = machine.emit_assembly(llvm.parse_assembly(str(module)))
    return re.findall(r"^\s+(?:\{\w+\}\s+)?([a-z][a-z0-9]*)", assembly, re.MULTILINE)


DOTS = {
    "znver4": ("vpdpbusd", 16),
    "cascadelake": ("vpdpbusd", 16),
    "alderlake": ("vpdpbusd", 32),
    "haswell": ("vpmaddubsw", 32),
    "apple-m1": ("sdot", 64),
    "neoverse-n1": ("sdot", 64),
}


LOOKUPS = {
    "znver4": ("vpermb", 16),
    "cascadelake": ("vpshufb", 82),
    "alderlake": ("vpshufb", 164),
    "haswell": ("vpshufb", 164),
    "apple-m1": ("tbx", 48),
    "neoverse-n1": ("tbx", 48),
}


@formats
@pytest.mark.parametrize("cpu", DOTS)
def test_code_for_a_processor(cpu: str, reader: SuperblockReader) -> None:
    found, (dot, count) = instructions(cpu, reader), DOTS[cpu]
    lattice = reader.fmt is IQ2  # whose scales are products, too
    assert found.count(dot) == (count * 9 // 8 if lattice else count)
    assert len(found) < (1500 if lattice else 600)
    if lattice:
        name, times = LOOKUPS[cpu]
        assert found.count(name) == times
