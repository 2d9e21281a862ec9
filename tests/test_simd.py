"""The vector layer: choice of the instruction set, operations, and the code made for others."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest
from llvmlite import ir
from numba import njit, types
from numba.core.codegen import get_host_cpu_features
from numpy.typing import NDArray
from reference_blocks import e8m0
from reference_packed import address, aligned, floats

from localv4.errors import UsageError
from localv4.kernels import activations, simd, simd_dots, simd_ir
from localv4.kernels.isa import ISA, LEVELS, Isa, available_levels, choose, restricted_features

F32 = np.float32
needs_jit = pytest.mark.skipif(
    bool(numba.config.DISABLE_JIT), reason="vector values exist in compiled code only"
)

HASWELL = frozenset(("avx2", "fma", "f16c"))
ALDER_LAKE = HASWELL | {"avxvnni"}
ZEN_4 = HASWELL | {*("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "avx512vbmi")}
MACHINES = {
    "znver4": ("x86_64-linux-gnu", ZEN_4, "avx512-vnni"),
    "cascadelake": ("x86_64-linux-gnu", ZEN_4 - {"avx512vbmi"}, "avx512-vnni"),
    "alderlake": ("x86_64-pc-windows-msvc", ALDER_LAKE, "avx-vnni"),
    "haswell": ("x86_64-apple-darwin", HASWELL, "avx2"),
    "x86-64": ("x86_64-linux-gnu", frozenset[str](), "generic"),
    "apple-m1": ("arm64-apple-darwin", frozenset[str](), "neon-dotprod"),
    "neoverse-n1": ("aarch64-linux-gnu", frozenset(("dotprod",)), "neon-dotprod"),
    "cortex-a57": ("aarch64-linux-gnu", frozenset[str](), "generic"),
}
# an emulator shows the processor beneath: there a variable tells
TOLD_FEATURES = os.environ.get("NUMBA_CPU_FEATURES") or get_host_cpu_features()
HOST_FEATURES = frozenset(name[1:] for name in TOLD_FEATURES.split(",") if name.startswith("+"))
HOST_LEVELS = available_levels(llvm.get_default_triple(), HOST_FEATURES)
# what the compiler of this process may use: less than the host has where a level is forced
LEVELS_HERE = HOST_LEVELS[HOST_LEVELS.index(ISA.level) :]


@pytest.mark.parametrize("cpu", MACHINES)
def test_the_best_level_of_a_machine_is_chosen(cpu: str) -> None:
    triple, features, level = MACHINES[cpu]
    assert choose(triple, features).level == level
    assert available_levels(triple, features)[-1] == "generic"


def test_a_lower_level_can_be_forced() -> None:
    for level in ("avx-vnni", "avx2", "generic"):
        assert choose("x86_64-linux-gnu", ZEN_4 | {"avxvnni"}, level).level == level
    assert choose("arm64-apple-darwin", frozenset(), "generic").level == "generic"


@pytest.mark.parametrize("wanted", ["avx512-vnni", "neon-dotprod", "AVX2", "fast"])
def test_an_impossible_level_is_refused_with_the_possible_ones(wanted: str) -> None:
    with pytest.raises(UsageError) as caught:
        choose("x86_64-linux-gnu", HASWELL, wanted)
    assert wanted in caught.value.message
    assert caught.value.hint == "allowed here: avx2, generic"


def test_the_variable_is_checked_at_import() -> None:
    code = (
        "from localv4.errors import UsageError\n"
        "try:\n    import localv4.kernels.isa\nexcept UsageError as error: print(error.message)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=dict(os.environ, LOCALV4_ISA="quantum"),
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == "LOCALV4_ISA=quantum is not possible on this machine"


def test_features_above_a_forced_level_are_switched_off() -> None:
    everything = "+64bit,+sse,+sse2,+avx,+avx2,+fma,+f16c,+avxvnni,+avx512f,+avx512vnni,+amx-int8"
    forced = restricted_features(Isa("avx-vnni", "x86"), everything)
    assert forced == everything.replace("+avx512", "-avx512").replace("+amx", "-amx")
    forced = restricted_features(Isa("avx2", "x86"), everything)
    assert "-avxvnni" in forced and "+avx2" in forced and "-avx512f" in forced
    forced = restricted_features(Isa("generic", "x86"), everything)
    assert re.findall(r"\+[^,]*", forced) == ["+64bit", "+sse", "+sse2"]
    assert restricted_features(Isa("generic", "arm"), "+neon,+dotprod") == "+neon,-dotprod"


# --- operations, by machine level where they differ ---


def bound(level: str) -> Isa:
    """The level as the emitters see it; the host can run its code whatever level it uses."""
    return choose(llvm.get_default_triple(), HOST_FEATURES, level)


@needs_jit
@pytest.mark.parametrize("kind", ["mx4", "q4", "q8"])
@pytest.mark.parametrize("level", LEVELS_HERE)
def test_block_products(level: str, kind: str) -> None:
    isa = bound(level)
    decode = {
        "mx4": simd_dots.mx4_codes,
        "q4": simd_dots.q4_codes,
        "q8": simd_dots.q8_bytes,
    }[kind]
    add = simd_dots.add_byte_dots if kind == "q8" else simd_dots.add_code_dots
    bias = isa.byte_bias if kind == "q8" else isa.code_bias

    @simd.operation(types.void, types.int64, types.int64, types.int64)
    def product(b: Any, out: Any, weights: Any, q: Any) -> None:
        start = simd_ir.load(b, simd_ir.INTS, out)
        columns = simd_dots.activations(b, q)
        simd_ir.store(b, add(b, isa, start, decode(b, isa, weights), columns), out)

    run = njit(lambda out, weights, q: product(out, weights, q))
    rng = np.random.default_rng(4)
    for fill in (None, 0x00, 0x77, 0x7F, 0x80, 0x88, 0xFF):
        weights = aligned(rng.integers(0, 256, 512, dtype=np.uint8))
        if fill is not None:
            weights[:] = fill
        q = aligned(rng.integers(-127, 128, 32).astype(np.int8)).view(np.int8)
        if fill is not None:
            q[:] = 127 if fill < 0x80 else -127
        out = aligned(np.full(16, -bias * int(q.astype(int).sum()), np.int32)).view(np.int32)
        run(address(out), address(weights), address(q))
        assert np.array_equal(out, block_twin(kind, weights) @ q.astype(int))


def block_twin(kind: str, raw: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The integers (16 rows, 32 columns) of a block."""
    if kind == "q8":
        return raw.view(np.int8).reshape(8, 16, 4).transpose(1, 0, 2).reshape(16, 32).astype(int)
    lines = raw[:256].reshape(4, 16, 4)
    codes = np.stack([lines & 15, lines >> 4], axis=1).transpose(2, 0, 1, 3).reshape(16, 32)
    table = simd_dots.E2M1_DOUBLED if kind == "mx4" else simd_dots.OFFSET_8
    return np.array(table)[codes]


@needs_jit
@pytest.mark.parametrize("fast", [False, True])
def test_every_half_is_converted_exactly(fast: bool) -> None:
    if fast and not ISA.fast_half:
        pytest.skip("this level has no such instruction")

    @simd.operation(types.void, types.int64, types.int64)
    def convert(b: Any, out: Any, source: Any) -> None:
        halves = simd_ir.load(b, simd_ir.vector(simd_ir.I16, 16), source)
        simd_ir.store(b, simd_ir.halves_to_floats(b, fast, halves), out)

    @njit
    def run(out: int, source: int) -> None:
        for i in range(4096):
            convert(out + 64 * i, source + 32 * i)

    halves = aligned(np.arange(65536, dtype=np.uint16))
    out = floats(65536)
    run(address(out), address(halves))
    with np.errstate(invalid="ignore"):  # ARM notes the NaNs that signal
        expected = halves.view(np.float16).astype(F32)
    assert np.array_equal(np.isnan(out), np.isnan(expected))
    numbers = ~np.isnan(expected)
    assert np.array_equal(out[numbers].view(np.uint32), expected[numbers].view(np.uint32))


@needs_jit
def test_scales_are_read_as_the_format_says() -> None:
    @njit
    def run(out: int, source: int) -> None:
        for i in range(16):
            simd.store_f32(out + 64 * i, simd.load_e8m0(source + 16 * i))

    codes, out = aligned(np.arange(256, dtype=np.uint8)), floats(256)
    run(address(out), address(codes))
    assert np.array_equal(out[1:255], e8m0(codes[1:255]))
    assert out[0] == 0 and out[255] == np.inf


@needs_jit
def test_exp_is_within_two_units_in_the_last_place() -> None:
    @njit
    def run(out: int, x: int, n: int) -> None:
        for i in range(n // 16):
            simd.store_f32(out + 64 * i, activations.exp(simd.load_f32(x + 64 * i)))

    x = floats(80000)
    x[:] = np.random.default_rng(1).uniform(-87, 88, x.size)
    x[:16] = [0, -0.0, 1, -1, 88, -87, 1e-30, 89, 1e9, np.inf, -88, -np.inf, np.nan, 2, 3, 4]
    out = floats(80000)
    run(address(out), address(x), x.size)
    expected = np.exp(np.clip(x.astype(np.float64), -87, 88))
    assert np.isnan(out[12])
    numbers = ~np.isnan(x)
    error = np.abs(out[numbers] - expected[numbers]) / np.spacing(expected[numbers].astype(F32))
    assert error.max() < 2


@needs_jit
def test_bounds_rounding_and_sizes_know_nan() -> None:
    nan, inf = np.nan, np.inf

    @njit
    def bounds(x: int, low: float, high: float) -> None:
        value = simd.at_most(simd.load_f32(x), simd.splat_f32(high))
        simd.store_f32(x, simd.at_least(value, simd.splat_f32(low)))

    x = aligned(np.array([nan, -nan, inf, -inf, 0, 3, -3, 1.5] * 2, F32)).view(F32)
    bounds(address(x), F32(-2), F32(2))
    assert np.array_equal(x, np.array([nan, nan, 2, -2, 0, 2, -2, 1.5] * 2), equal_nan=True)

    @njit
    def rounded(out: int, x: int) -> None:
        simd.store_f32(out, simd.to_f32(simd.round_i32(simd.load_f32(x))))

    x[:8] = [0.5, 1.5, 2.5, -0.5, -1.5, 126.5, nan, 3e9]
    x[8:] = 0
    out = floats(16)
    rounded(address(out), address(x))
    assert out[:8].tolist() == [0, 2, 2, 0, -2, 126, 2.0**30, 2.0**30]

    @njit
    def size(x: int) -> Any:
        return simd.largest_magnitude(simd.magnitudes(simd.load_f32(x)))

    for place in range(16):
        x[:] = np.linspace(-1, 1, 16)
        x[place] = -7
        assert size(address(x)) == 7
        x[place] = nan
        assert np.isnan(size(address(x)))
        x[place] = -inf
        assert size(address(x)) == inf


# --- code for other machines ---


def block_kernel(isa: Isa, triple: str) -> ir.Module:
    """A module with one function: a block of MX4 of sixteen rows, with its scales."""
    module = ir.Module("block")
    module.triple = triple
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 4)
    function = ir.Function(module, kind, "mx4_block")
    b = ir.IRBuilder(function.append_basic_block())
    weights, q, out, scales = function.args
    codes = simd_dots.mx4_codes(b, isa, weights)
    start = simd_ir.filled(simd_ir.INTS, 0)
    dots = simd_dots.add_code_dots(b, isa, start, codes, simd_dots.activations(b, q))
    total = b.sitofp(dots, simd_ir.FLOATS)
    before = simd_ir.load(b, simd_ir.FLOATS, out)
    result = simd_ir.multiply_add(b, total, simd_dots.load_e8m0(b, scales), before)
    simd_ir.store(b, result, out)
    b.ret_void()
    return module


def instructions(cpu: str) -> list[str]:
    """The mnemonics of the block kernel for a processor."""
    triple, features, _ = MACHINES[cpu]
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        target = llvm.Target.from_triple(triple)
    except RuntimeError:
        pytest.skip(f"this LLVM makes no code for {triple}")
    machine = target.create_target_machine(cpu=cpu, opt=3)
    module = llvm.parse_assembly(str(block_kernel(choose(triple, features), triple)))
    assembly = machine.emit_assembly(module)
    return re.findall(r"^\s+(?:\{\w+\}\s+)?([a-z][a-z0-9]*)", assembly, re.MULTILINE)


@pytest.mark.parametrize(
    ("cpu", "wanted", "most"),
    [
        ("znver4", {"vpdpbusd": 8, "vpermb": 8}, 60),
        ("cascadelake", {"vpdpbusd": 8, "vpshufb": 8}, 60),
        ("alderlake", {"vpdpbusd": 16, "vpshufb": 16}, 110),
        ("haswell", {"vpmaddubsw": 16, "vpshufb": 16, "vpmaddwd": 4}, 150),
        ("apple-m1", {"sdot": 32, "tbl": 32}, 400),
        ("neoverse-n1", {"sdot": 32, "tbl": 32}, 400),
        ("x86-64", {}, 3000),
        ("cortex-a57", {}, 3000),
    ],
)
def test_code_for_a_processor(cpu: str, wanted: dict[str, int], most: int) -> None:
    found = instructions(cpu)
    assert {name: found.count(name) for name in wanted} == wanted
    assert len(found) <= most


@needs_jit
@pytest.mark.skipif("avx512-vnni" not in HOST_LEVELS, reason="needs a machine with AVX-512")
def test_a_forced_level_leaves_no_trace_of_a_higher_one() -> None:
    code = (
        "from numba import int64\n"
        "from localv4.kernels import matvec\n"
        "matvec.matvec_mx4.compile((int64,) * 8)\n"
        "print('\\n'.join(matvec.matvec_mx4.inspect_asm().values()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=dict(os.environ, LOCALV4_ISA="avx2"),
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "vpmaddubsw" in done.stdout, done.stderr
    assert "zmm" not in done.stdout and "vpdpbusd" not in done.stdout


def test_levels_are_described_where_they_are_used() -> None:
    text = simd_dots.__doc__ or ""
    assert all(re.search(rf"\| {level}\s*\|", text) for level in LEVELS)
