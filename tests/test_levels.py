"""The products are right at every level of instructions that this machine can run."""

import os
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import numba
import pytest
from numba.core.codegen import get_host_cpu_features

from localv4.kernels.isa import ISA, VARIABLE, available_levels

# those whose code differs between levels
SOME = (
    "test_matvec.py::test_matvec",
    "test_matvec.py::test_matvec_of_extreme_weights",
    "test_matvec.py::test_f8_matvec_knows_every_code",
    "test_gemm.py::test_some_tokens_have_the_bits_of_one[80-384-17-MX4]",
    "test_gemm.py::test_some_tokens_have_the_bits_of_one[80-384-17-Q8]",
    "test_row_forms.py::test_rows_are_stored_as_the_twin_stores_them",
    "test_row_forms.py::test_rows_read_as_what_is_stored",
    "test_index_scores.py::test_scores_are_those_of_the_indexer[3-many, compact]",
    "test_index_scores.py::test_scores_are_those_of_the_indexer[3-small, compact]",
    "test_index_scores.py::test_scores_are_those_of_the_indexer[3-released size, compact]",
)


def lower_levels() -> tuple[str, ...]:
    told = os.environ.get("NUMBA_CPU_FEATURES") or get_host_cpu_features()
    names = {name[1:] for name in told.split(",") if name.startswith("+")}
    levels = available_levels(llvm.get_default_triple(), names)
    # a level that is asked for by name has no AMX
    return levels[levels.index(ISA.level) + (0 if ISA.amx else 1) :]


@pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="needs the compiler")
def test_products_at_lower_levels() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *SOME]
    running = {
        level: subprocess.Popen(
            command,
            env=dict(os.environ, **{VARIABLE: level}),
            cwd=Path(__file__).parent,
            stdout=subprocess.PIPE,
            text=True,
        )
        for level in lower_levels()
    }
    output = {level: process.communicate(timeout=600)[0] for level, process in running.items()}
    failed = [level for level, process in running.items() if process.returncode]
    assert failed == [], output[failed[0]][-3000:]
