"""Tiles of AMX: where they are used, and that their sums are those of the vector registers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from localv4.kernels.isa import ISA, LEVELS, VARIABLE, choose, restricted_features

TRIPLE = "x86_64-linux-gnu"
SAPPHIRE_RAPIDS = LEVELS["avx512-vnni"][1] | {
    "avxvnni",
    "avx512vbmi",
    "amx-tile",
    "amx-int8",
    "amx-bf16",
}


def test_tiles_are_for_machines_that_have_them() -> None:
    assert choose(TRIPLE, SAPPHIRE_RAPIDS).amx
    for missing in ("amx-tile", "amx-int8", "amx-bf16", "avx512bw"):
        assert not choose(TRIPLE, SAPPHIRE_RAPIDS - {missing}).amx


@pytest.mark.parametrize("level", ["avx512-vnni", "avx-vnni", "avx2", "generic"])
def test_a_level_that_was_asked_for_has_no_tiles(level: str) -> None:
    isa = choose(TRIPLE, SAPPHIRE_RAPIDS, level)
    assert not isa.amx
    assert "-amx-int8" in restricted_features(isa, "+avx512f,+amx-int8").split(",")


def test_the_best_level_keeps_the_features_of_tiles() -> None:
    isa = choose(TRIPLE, SAPPHIRE_RAPIDS)
    assert restricted_features(isa, "+avx512f,+amx-int8") == "+avx512f,+amx-int8"


def facts(prelude: str, level: str = "") -> str:
    """Whether a new process has tiles, and what its compiler may use, after some first lines."""
    code = (
        f"import numba, sys\n{prelude}\n"
        "from localv4.kernels.isa import ISA\n"
        "features = numba.config.CPU_FEATURES\n"
        "print(ISA.level, ISA.amx, features is None or '+amx-tile' in features.split(','))"
    )
    environment = {k: v for k, v in os.environ.items() if k != VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | ({VARIABLE: level} if level else {}),
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.skipif(not ISA.amx, reason="needs a machine with AMX")
def test_without_permission_the_compiler_makes_no_tiles() -> None:
    assert facts("") == "avx512-vnni True True"
    assert facts("sys.platform = 'other'") == "avx512-vnni False False"
    refused = "import ctypes\nctypes.CDLL(None).__class__.__getattr__ = lambda *_: lambda *_: -1"
    assert facts(refused) == "avx512-vnni False False"


@pytest.mark.skipif(not ISA.amx, reason="needs a machine with AMX")
def test_a_level_without_tiles_can_be_forced() -> None:
    assert facts("", "avx512-vnni") == "avx512-vnni False False"
