"""Compile kernels ahead of their first use and keep the machine code in a private cache.

Numba's own cache is not enough: it does not notice a change in another module, and its files are
pickles. So the cache folder is named by a digest of everything that shapes the machine code, is
readable and writable by its owner alone, and is thrown away at the first sign of damage.
"""

import atexit
import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import llvmlite
import llvmlite.binding as llvm
import numba
from numba import njit

from localv4 import paths
from localv4.errors import LocalV4Error

Function = TypeVar("Function", bound=Callable[..., Any])

# Between kernels the OpenMP helpers shall sleep, not spin: on a machine that is busy otherwise,
# spinning helpers keep the thread that they wait for off its core (measured: 10 times slower).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_kernels: list[tuple[Any, str]] = []


def _digest() -> str:
    """Name everything that shapes the machine code: kernel sources, compilers, CPU, overrides."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    features = sorted(name for name, on in llvm.get_host_cpu_features().items() if on)
    overrides = [
        f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(("NUMBA_", "LOCALV4_ISA"))
    ]
    facts = (
        numba.__version__,
        llvmlite.__version__,
        platform.python_version(),
        llvm.get_host_cpu_name(),
        *features,
        *overrides,
    )
    digest.update("\0".join(facts).encode())
    return digest.hexdigest()[:24]


def _cache_folder() -> Path:
    """Return the private folder for this build of the kernels, or a fresh one for this run only."""
    try:
        folder = paths.private_dir(paths.cache_dir() / "kernels" / _digest())
        if os.access(folder, os.W_OK):
            return folder
    except LocalV4Error:
        pass  # a read-only or foreign cache location: compile for this run only
    folder = Path(tempfile.mkdtemp(prefix="localv4-kernels-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


CACHE_FOLDER = _cache_folder()
numba.config.CACHE_DIR = str(CACHE_FOLDER)


def kernel(signature: str, *, parallel: bool = False) -> Callable[[Function], Function]:
    """Declare a compiled leaf with the one type signature that it is ever called with.

    The machine code ignores Python's lock while it runs. `compile_kernels` loads or compiles it;
    until then the first call does.
    """

    def declare(function: Function) -> Function:
        dispatcher = njit(cache=True, nogil=True, parallel=parallel, error_model="numpy")(function)
        if not numba.config.DISABLE_JIT:
            _kernels.append((dispatcher, signature))
        return dispatcher  # type: ignore[no-any-return]

    return declare


def can_keep() -> bool:
    """Say whether machine code outlives this process: its folder can be written."""
    return CACHE_FOLDER.is_relative_to(paths.cache_dir())


def are_compiled() -> bool:
    """Say whether the cache holds a complete build, so that a start will be quick."""
    return bool(numba.config.DISABLE_JIT) or (CACHE_FOLDER / "complete").exists()


def compile_kernels(on_progress: Callable[[int, int], None] | None = None) -> None:
    """Load every kernel from the cache, compiling what is not there.

    `on_progress(done, total)` is called at the start and after each. A damaged cache is wiped and
    built anew.
    """
    if on_progress is not None:
        on_progress(0, len(_kernels))
    all_kept = True
    for done, (dispatcher, signature) in enumerate(_kernels, start=1):
        if not dispatcher.signatures:
            all_kept &= _compile(dispatcher, signature)
        if on_progress is not None:
            on_progress(done, len(_kernels))
    if all_kept:
        with suppress(OSError):
            (CACHE_FOLDER / "complete").touch()


def _compile(dispatcher: Any, signature: str) -> bool:
    """Make a kernel ready; return False when the disk did not take its machine code."""
    kept = True
    try:
        dispatcher.compile(signature)
    except Exception:
        kept = not dispatcher.signatures
        if kept:
            # Numba passes on whatever a cut or altered cache file makes pickle raise
            shutil.rmtree(CACHE_FOLDER, ignore_errors=True)
            paths.private_dir(CACHE_FOLDER)
            dispatcher.compile(signature)
    # a call with other types is a bug of the caller, not a reason to compile for seconds
    dispatcher.disable_compile()
    return kept
