"""The instruction set that the vector kernels are written for, chosen once at import.

The choice follows the feature string that Numba hands to LLVM, never the operating system's list:
LLVM refuses an instruction of a feature that it was not given. LOCALV4_ISA forces a lower level
and takes the features above it away from the compiler, so that the level behaves as on a machine
that has no more.
"""

import ctypes
import os
import sys
from collections.abc import Set
from dataclasses import dataclass, replace

import llvmlite.binding as llvm
import numba
from numba.core.codegen import get_host_cpu_features

from localv4.errors import UsageError

VARIABLE = "LOCALV4_ISA"

_AVX2 = frozenset(("avx2", "fma", "f16c"))
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni"}
_AMX = frozenset(("amx-tile", "amx-int8", "amx-bf16"))
# Best first. A level is available where the machine is of the family and has all the features.
LEVELS = {
    "avx512-vnni": ("x86", _AVX512),
    "avx-vnni": ("x86", _AVX2 | {"avxvnni"}),
    "avx2": ("x86", _AVX2),
    "neon-dotprod": ("arm", frozenset(("dotprod",))),
    "generic": ("any", frozenset[str]()),
}
# What LLVM must not use at a level: names that begin so. Newer extensions imply older ones.
_ABOVE_AVX_VNNI = ("avx512", "avx10", "evex", "amx", "egpr")
_ABOVE = {
    "avx512-vnni": ("amx",),
    "avx-vnni": _ABOVE_AVX_VNNI,
    "avx2": (*_ABOVE_AVX_VNNI, "avxvnni", "avxifma", "avxneconvert"),
    "neon-dotprod": ("i8mm", "sve", "sme", "bf16"),
    "generic": ("dotprod", "i8mm", "sve", "sme", "bf16"),
}
# Linux on x86-64: the number of the system call, its request, and the part of the registers
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18
# The baseline of every 64-bit x86; the generic level keeps nothing else there.
_X86_64 = frozenset(("64bit", "cmov", "cx8", "fxsr", "mmx", "sse", "sse2"))


@dataclass(frozen=True, slots=True)
class Isa:
    """What the emitters of machine-dependent code need to know.

    `level` is a key of LEVELS, `family` "x86", "arm" or "other". `bytes_permute` says that bytes
    can be looked up across a whole 512-bit register. `fast_half` says that halves are converted
    to float32 by an instruction. `amx` says that tiles (`kernels.amx`) may be used.
    """

    level: str
    family: str
    bytes_permute: bool = False
    fast_half: bool = False
    amx: bool = False

    @property
    def unsigned_weights(self) -> bool:
        """Tell that byte products take an unsigned weight: it is kept as value + bias."""
        return self.level in ("avx512-vnni", "avx-vnni", "avx2")

    @property
    def vnni(self) -> bool:
        """Tell that one instruction multiplies bytes and adds four products into 32 bits."""
        return self.level in ("avx512-vnni", "avx-vnni")

    @property
    def code_bias(self) -> int:
        """Bias of a decoded 4-bit weight, whose values lie in -12 ... 12."""
        return 12 if self.unsigned_weights else 0

    @property
    def byte_bias(self) -> int:
        """Bias of an 8-bit weight; without VNNI sums of two such products do not fit 16 bits."""
        return 128 if self.vnni else 0


def available_levels(triple: str, features: Set[str]) -> tuple[str, ...]:
    """Return the levels that a machine can run, best first.

    `triple` is LLVM's name of the machine, `features` the names of those that are on.
    """
    family = _family(triple)
    # every Apple processor has the dot product, whether LLVM lists it or not
    known = features | {"dotprod"} if family == "arm" and "apple" in triple else features
    return tuple(
        level
        for level, (needed_family, needed) in LEVELS.items()
        if needed_family in (family, "any") and needed <= known
    )


def choose(triple: str, features: Set[str], wanted: str | None = None) -> Isa:
    """Return the level called `wanted`, or the best one of the machine.

    Raises UsageError if `wanted` is no level of this machine.
    """
    levels = available_levels(triple, features)
    if wanted is not None and wanted not in levels:
        raise UsageError(
            f"{VARIABLE}={wanted} is not possible on this machine",
            hint=f"allowed here: {', '.join(levels)}",
        )
    level = wanted or levels[0]
    family = _family(triple)
    return Isa(
        level,
        family,
        bytes_permute=level == "avx512-vnni" and "avx512vbmi" in features,
        fast_half=family == "arm" or level in ("avx512-vnni", "avx-vnni", "avx2"),
        # a level that was asked for is that level and no more
        amx=level == "avx512-vnni" and wanted is None and features >= _AMX,
    )


def restricted_features(isa: Isa, features: str) -> str:
    """Return LLVM's feature string with everything above the level of `isa` switched off."""
    banned = () if isa.amx else _ABOVE[isa.level]
    kept = []
    for feature in features.split(","):
        name = feature[1:]
        above = name.startswith(banned) if banned else False
        if isa.level == "generic" and isa.family == "x86":
            above = name not in _X86_64
        kept.append("-" + name if above else feature)
    return ",".join(feature for feature in kept if len(feature) > 1)


def _family(triple: str) -> str:
    if triple.startswith(("x86_64", "amd64")):
        return "x86"
    return "arm" if triple.startswith(("aarch64", "arm64")) else "other"


def _enabled(features: str) -> frozenset[str]:
    return frozenset(feature[1:] for feature in features.split(",") if feature.startswith("+"))


def _choose_for_this_process() -> Isa:
    given = numba.config.CPU_FEATURES
    features = get_host_cpu_features() if given is None else given
    wanted = os.environ.get(VARIABLE) or None
    isa = choose(llvm.get_default_triple(), _enabled(features), wanted)
    refused = isa.amx and not _may_use_tiles()
    if refused:
        isa = replace(isa, amx=False)
    if wanted is not None or refused:
        numba.config.CPU_FEATURES = restricted_features(isa, features)
    return isa


def _may_use_tiles() -> bool:
    """Ask for the permission to use AMX, which Linux gives to a whole process."""
    if sys.platform != "linux":
        return False
    try:
        system_call = ctypes.CDLL(None).syscall
    except (OSError, AttributeError):
        return False
    numbers = (_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)
    return bool(system_call(*map(ctypes.c_long, numbers)) == 0)


ISA = _choose_for_this_process()
