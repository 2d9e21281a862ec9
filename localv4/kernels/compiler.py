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
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Set
from contextlib import closing, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import llvmlite
import llvmlite.binding as llvm
import numba
from numba import cfunc, njit
from numba.core.errors import NumbaError

from localv4 import paths
from localv4.errors import LocalV4Error
from localv4.kernels.code_size import code_size
from localv4.kernels.compile_pool import CompilePool
from localv4.kernels.isa import VARIABLE
from localv4.kernels.threads import usable_processors

Function = TypeVar("Function", bound=Callable[..., Any])

COMMON = "common"
"""The family of kernels that every model needs."""

EXACT = "exact"
"""The family of kernels that only the arithmetic `exact` needs."""

# Between kernels the OpenMP helpers shall sleep, not spin: on a machine that is busy otherwise,
# spinning helpers keep the thread that they wait for off its core (measured: 10 times slower).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_units: "list[Unit]" = []


_NOT_IN_CODE = frozenset(("NUMBA_NUM_THREADS", "NUMBA_THREADING_LAYER"))
"""Variables that change nothing before the code runs."""


def _source_digest(package: Path) -> "hashlib._Hash":
    """Digest the sources of a package, and their place and time, by which Numba finds its files."""
    digest = hashlib.sha256(str(package).encode())
    for source in sorted(package.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
        digest.update(str(source.stat().st_mtime_ns).encode())
    return digest


def _digest() -> str:
    """Name everything that shapes the machine code: kernel sources, compilers, CPU, overrides."""
    digest = _source_digest(Path(__file__).parent)
    features = sorted(name for name, on in llvm.get_host_cpu_features().items() if on)
    overrides = [
        f"{k}={v}"
        for k, v in sorted(os.environ.items())
        if (k.startswith("NUMBA_") or k == VARIABLE) and k not in _NOT_IN_CODE
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
"""Where the machine code of this package is; that of others lies in folders inside."""


@cache
def _folder_of(package: str) -> Path:
    """Return the folder for the machine code of a package; a change in its sources makes a new one.

    Kernels of other packages call functions of this one, so theirs is a folder inside.
    """
    place = getattr(sys.modules.get(package), "__file__", None)
    if package == __package__ or place is None:
        return CACHE_FOLDER
    digest = _source_digest(Path(place).parent).hexdigest()[:24]
    return paths.private_dir(CACHE_FOLDER / f"{package}-{digest}")


class _DamagedError(Exception):
    """The cache cannot be read."""


class Unit(ABC):
    """One function that is compiled, or loaded from the cache, as a whole.

    `is_kept` says whether this process knows its machine code to be in the cache, in `folder`.
    """

    def __init__(self, function: Callable[..., Any], family: str) -> None:
        self.function = function
        self.folder = _folder_of(function.__module__.rpartition(".")[0])
        self.name = f"{function.__module__}:{function.__qualname__}"
        self.family = family
        self.is_kept = False
        _units.append(self)

    @abstractmethod
    def is_ready(self) -> bool:
        """Say whether the machine code is in this process."""

    @abstractmethod
    def make(self, keep: bool) -> None:
        """Load or compile the machine code; `keep` says whether to use the cache."""


class _Kernel(Unit):
    """A leaf that Python calls."""

    def __init__(self, dispatcher: Any, signature: str, family: str) -> None:
        super().__init__(dispatcher.py_func, family)
        self._dispatcher, self._signature = dispatcher, signature

    def is_ready(self) -> bool:
        return bool(self._dispatcher.signatures)

    def make(self, keep: bool) -> None:
        try:
            self._dispatcher.compile(self._signature)
        finally:
            if self.is_ready():
                # a call with other types is a bug of the caller, not a reason to compile
                self._dispatcher.disable_compile()


class Entry(Unit):
    """An operation that programs call by its address (`kernels.operation`)."""

    def __init__(self, function: Callable[[int, int, int], None], family: str) -> None:
        super().__init__(function, family)
        self._callback: Any = None

    def is_ready(self) -> bool:
        return self._callback is not None

    def make(self, keep: bool) -> None:
        numba.config.CACHE_DIR = str(self.folder)
        declare = cfunc("void(i8, i8, i8)", nopython=True, cache=keep, error_model="numpy")
        self._callback = declare(self.function)

    @property
    def address(self) -> int:
        """Where the machine code is; compiled now if it was not yet."""
        if self._callback is None:
            _despite_damage(lambda: _make_ready(self))
        address: int = self._callback.address
        return address


def kernel(
    signature: str, *, parallel: bool = False, family: str = COMMON
) -> Callable[[Function], Function]:
    """Declare a compiled leaf with the one type signature that it is ever called with.

    The machine code ignores Python's lock while it runs. `compile_kernels` loads or compiles it;
    until then the first call does.
    """

    def declare(function: Function) -> Function:
        folder = _folder_of(function.__module__.rpartition(".")[0])
        numba.config.CACHE_DIR = str(folder)
        dispatcher = njit(cache=True, nogil=True, parallel=parallel, error_model="numpy")(function)
        if not numba.config.DISABLE_JIT:
            _Kernel(dispatcher, signature, family)
        return dispatcher  # type: ignore[no-any-return]

    return declare


def entry(family: str) -> Callable[[Callable[[int, int, int], None]], Entry]:
    """Declare an operation of programs: a function (operation, member, members), see `Entry`.

    A function of a module, not a closure: only those are found in the cache again.
    """
    return lambda function: Entry(function, family)


def can_keep() -> bool:
    """Say whether machine code outlives this process: its folder can be written."""
    return CACHE_FOLDER.is_relative_to(paths.cache_dir())


def are_compiled(families: Set[str] = frozenset()) -> bool:
    """Say whether these families and COMMON are ready or in the cache: a start will be quick."""
    names = {COMMON, *families}
    if numba.config.DISABLE_JIT or all(u.is_ready() for u in _units if u.family in names):
        return True
    return all(_mark(name).exists() for name in names)


def _mark(family: str) -> Path:
    """Return the file whose existence says that all of a family is in the cache."""
    folders = (unit.folder for unit in _units if unit.family == family)
    return next(folders, CACHE_FOLDER) / f"{family}.complete"


def find_unit(name: str) -> Unit:
    """Return the kernel or entry "module:function" of a module that has been imported."""
    return next(unit for unit in _units if unit.name == name)


def compile_kernels(
    families: Set[str] = frozenset(), on_progress: Callable[[int, int], None] | None = None
) -> None:
    """Load every kernel of COMMON and of some families from the cache, compiling what is missing.

    That is done by helper processes, one on each processor, and what they cannot do is done here.
    `on_progress(done, total)` is called at the start and as kernels become available. A damaged
    cache is wiped and built anew.
    """
    if numba.config.DISABLE_JIT:
        return
    names = {COMMON, *families}
    wanted = [unit for unit in _units if unit.family in names]
    _despite_damage(lambda: _build(wanted, on_progress or _ignore))
    with suppress(OSError):
        for name in names:
            if all(unit.is_kept for unit in wanted if unit.family == name):
                _mark(name).touch()


def _ignore(done: int, total: int) -> None:
    """Show no progress."""


def _build(wanted: list[Unit], on_progress: Callable[[int, int], None]) -> None:
    """Compile what the cache lacks, then make everything ready in this process."""
    on_progress(0, len(wanted))
    available: set[Unit] = set()
    missing = [u for u in wanted if not u.is_kept and not _mark(u.family).exists()]
    with closing(_compile_together(missing)) as made:
        for unit in made:
            available.add(unit)
            on_progress(len(available), len(wanted))
    for unit in wanted:
        _make_ready(unit)
        available.add(unit)
        on_progress(len(available), len(wanted))


def _compile_together(units: list[Unit]) -> Generator[Unit, None, None]:
    """Let helper processes put units into the cache; yield those that are there."""
    helpers = min(usable_processors(), len(units))
    if helpers < 2 or not can_keep():
        return
    by_name = {unit.name: unit for unit in units}
    with CompilePool(helpers, CACHE_FOLDER.name) as pool:
        for name in pool.compile(_groups(units)):
            by_name[name].is_kept = True
            yield by_name[name]


def _groups(units: list[Unit]) -> list[list[str]]:
    """Return the names of units, those together that share code, the longest work first.

    Otherwise one helper would end with the longest while the others have nothing to do.
    """
    known: dict[Callable[..., Any], int] = {}
    sizes = {unit: code_size(unit.function, known) for unit in units}
    groups: dict[tuple[str, str], list[Unit]] = {}
    for unit in sorted(units, key=lambda unit: -sizes[unit]):
        groups.setdefault((unit.function.__module__, unit.family), []).append(unit)
    longest_first = sorted(groups.values(), key=lambda group: -sum(sizes[u] for u in group))
    return [[unit.name for unit in group] for group in longest_first]


def _make_ready(unit: Unit) -> None:
    """Load or compile a unit in this process; a disk that does not take it is no failure."""
    if unit.is_ready():
        return
    try:
        unit.make(keep=True)
        unit.is_kept = True
    except OSError:
        if not unit.is_ready():
            unit.make(keep=False)
    except NumbaError:
        raise  # the kernel is wrong, not the cache
    except Exception as error:
        # Numba passes on whatever a cut or altered cache file makes pickle raise
        raise _DamagedError from error


def _despite_damage(build: Callable[[], None]) -> None:
    """Do something that reads the cache; once more with an empty one when that is damaged."""
    try:
        build()
    except _DamagedError:
        shutil.rmtree(CACHE_FOLDER, ignore_errors=True)
        for unit in _units:
            paths.private_dir(unit.folder)
            unit.is_kept = False
        build()
