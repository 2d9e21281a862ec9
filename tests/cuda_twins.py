"""Running the CUDA twin of an operation: compiled for the host (`tests/cuda_host`), or on a GPU."""

import ctypes
import functools
import hashlib
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import real_gpu
from filelock import FileLock

from localv4.cuda.compiler import definitions
from localv4.cuda.twin import SCRATCH, Kernel
from localv4.cuda.twins import TWINS
from localv4.kernels.compiler import Entry
from localv4.kernels.operation import WORDS

HOST = Path(__file__).parent / "cuda_host"
KERNELS = Path(__file__).parents[1] / "localv4" / "cuda" / "kernels"
FLAGS = ("-std=c++17", "-O2", "-mfma", "-mf16c", "-ffp-contract=off", "-fno-strict-aliasing")

COMPILER = shutil.which("g++")
needs_compiler = pytest.mark.skipif(
    not real_gpu.IS_WANTED and (COMPILER is None or platform.machine() not in ("x86_64", "AMD64")),
    reason="needs g++ on x86-64 to run CUDA kernels on the host",
)


_owned: dict[tuple[int, int], np.ndarray] = {}
"""Scratch memory that belongs to an array, by its address and the bytes that are needed."""


def padded_words(operands: Sequence[int]) -> list[int]:
    """All words of an operation."""
    return [0, *operands, *[0] * (WORDS - 1 - len(operands))]


def twin_name(entry: Entry) -> str:
    """The name of an operation in TWINS."""
    function = entry.function
    return f"{function.__module__.removeprefix('localv4.kernels.')}.{function.__name__}"


@functools.cache
def library(source: str) -> ctypes.CDLL:
    """A file of kernels, compiled for this machine."""
    is_text = "\n" in source  # of several operations (`localv4.cuda.merged`)
    name = "merged.cu" if is_text else source
    kernels = source if is_text else f'#include "{source}"\n'
    files = [KERNELS / part for part in re.findall(r'#include "(\w+\.cu)"', kernels)]
    headers = sorted([*KERNELS.glob("*.cuh"), *HOST.iterdir(), *files])
    parts = [definitions().encode(), kernels.encode(), *(path.read_bytes() for path in headers)]
    digest = hashlib.sha256(b"".join(parts)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"localv4-cuda-host-{digest}"
    target = folder / f"{name}.so"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / f"{name}.lock"):  # several processes run tests
        if not target.exists():
            _compile(kernels, target)
    return ctypes.CDLL(str(target))


def _compile(kernels: str, target: Path) -> None:
    unit, made = target.with_suffix(".cpp"), target.with_suffix(".new")
    unit.write_text(definitions() + kernels + '#include "launch.cpp"\n')
    command = [COMPILER or "g++", *FLAGS, "-DLOCALV4_HOST", "-shared", "-fPIC", "-w"]
    command += [f"-I{HOST}", f"-I{KERNELS}", str(unit), "-o", str(made)]
    subprocess.run(command, check=True)
    made.replace(target)


def launch(kernel: Kernel, words: Sequence[int], blocks: int | None = None) -> None:
    """Run one kernel; `words` are all of an operation, which say how many blocks there are."""
    blocks = kernel.blocks(words) if blocks is None else blocks
    if real_gpu.IS_WANTED:
        real_gpu.launch(kernel, words, blocks)
        return
    shared = library(kernel.source)
    given = (ctypes.c_int64 * len(words))(*words)
    function = ctypes.cast(getattr(shared, kernel.name), ctypes.c_void_p)
    if blocks:
        size = (ctypes.c_uint(n) for n in (blocks, kernel.threads, kernel.shared(words)))
        shared.cuda_host_launch(function, *size, given)


def run_twin(entry: Entry, operands: Sequence[int]) -> None:
    """Run the twin of an operation on memory of the host, with the operands of the CPU's one."""
    twin = TWINS[twin_name(entry)]
    assert len(twin.kinds) == len(operands), f"{twin_name(entry)} has {len(twin.kinds)} operands"
    words = [0, *operands, *[0] * (WORDS - 1 - len(operands))]
    needed = twin.scratch(words)
    scratch = np.full(needed // 8 + 16, -1, np.int64)
    if twin.owner:
        scratch = _owned.setdefault((words[twin.owner], needed), scratch)
    if needed:
        words[SCRATCH] = (scratch.ctypes.data + 127) // 128 * 128
    rest = twin.rest.kernels if twin.rest is not None else ()
    for kernel in (*twin.kernels, *rest):
        launch(kernel, words)
