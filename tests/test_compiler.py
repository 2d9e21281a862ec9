"""The kernel cache is private, rebuilt when damaged, and the kernels hold in every JIT mode."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import pytest

from localv4.kernels.device import device

TESTS = Path(__file__).parent
START = """
from localv4.kernels import compiler, routing
steps = []
print(compiler.are_compiled(), compiler.CACHE_FOLDER)
compiler.compile_kernels(on_progress=lambda done, total: steps.append((done, total)))
assert steps[0] == (0, 3) and steps[-1] == (3, 3), steps
print(sum(sum(f.stats.cache_hits.values()) for f in (
    routing.choose_experts, routing.route_weights, routing.add_rows)))
"""
PROCESSORS = "from localv4.kernels import compiler; compiler.usable_processors = lambda: {}\n"


def run(code: str, cache: Path, **variables: str) -> str:
    """Run Python code in a process of its own with the cache in a folder of the test."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(cache, **variables),
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def environment(cache: Path, **variables: str) -> dict[str, str]:
    """Return the variables of a process whose cache is in a folder of the test."""
    changed = dict(os.environ, **variables)
    # platformdirs looks at one of these, by platform
    for name in ("XDG_CACHE_HOME", "HOME", "LOCALAPPDATA"):
        changed[name] = str(cache)
    changed.pop("LOCALV4_HOME", None)
    return changed


@pytest.mark.parametrize("processors", [1, 3])
def test_cache_life(processors: int, tmp_path: Path) -> None:
    code = PROCESSORS.format(processors) + START + "assert steps == sorted(steps)"
    compiled, folder, from_helpers = run(code, tmp_path).split()
    assert compiled == "False" and Path(folder).is_relative_to(tmp_path)
    assert from_helpers == ("0" if processors == 1 else "3")
    if os.name == "posix":
        assert Path(folder).stat().st_mode & 0o077 == 0
    before = {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*.nbc")}
    assert len(before) == 3

    assert run(code, tmp_path) == f"True {folder}\n3"
    assert before == {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*.nbc")}


@pytest.mark.parametrize(("processors", "pattern"), [(1, "*.nb[ci]"), (2, "*add_rows*.nbc")])
def test_damaged_files_are_replaced(processors: int, pattern: str, tmp_path: Path) -> None:
    code = PROCESSORS.format(processors) + START
    folder = run(code, tmp_path).split()[1]
    damaged = list(Path(folder).rglob(pattern))
    assert damaged
    for path in damaged:
        path.write_bytes(path.read_bytes()[:20])
    run(code, tmp_path)
    run(code, tmp_path)  # what was in memory when the cache was wiped
    assert run(code, tmp_path) == f"True {folder}\n3"


def test_an_unfinished_build_is_completed(tmp_path: Path) -> None:
    code = PROCESSORS.format(2) + START
    folder = Path(run(code, tmp_path).split()[1])
    (folder / "common.complete").unlink()
    next(folder.rglob("*add_rows*.nbc")).unlink()
    assert run(code, tmp_path) == f"False {folder}\n3"
    assert run(code, tmp_path) == f"True {folder}\n3"


LATER_FAMILY = """
from localv4.kernels import compiler, probes, routing
print(compiler.are_compiled({probes.PROBES}))
compiler.find_unit("localv4.kernels.routing:add_rows").make(keep=True)  # as its first call does
compiler.compile_kernels({probes.PROBES})
"""


def test_another_family_is_complete_though_some_kernel_was_called_before(tmp_path: Path) -> None:
    run(PROCESSORS.format(2) + START, tmp_path)
    code = PROCESSORS.format(2) + LATER_FAMILY
    assert [run(code, tmp_path) for _ in range(2)] == ["False", "True"]


FULL_DISK = """
import errno
from unittest import mock
from numba.core import caching
from localv4.kernels import compile_pool, compiler, routing
patch = '''
import errno
from unittest import mock
from numba.core import caching
full = OSError(errno.ENOSPC, "No space left on device")
mock.patch.object(caching.IndexDataCacheFile, "save", side_effect=full).start()
'''
exec(patch)
compile_pool._CODE = patch + compile_pool._CODE
compiler.compile_kernels()
print(list(compiler.CACHE_FOLDER.glob("*.complete")), compiler.can_keep())
"""


def test_a_full_disk_is_no_failure_and_no_complete_cache(tmp_path: Path) -> None:
    assert run(FULL_DISK, tmp_path) == "[] True"


WRONG_PROGRESS = """
from localv4.kernels import compiler, routing
def fail(done, total):
    if done == total:
        raise ValueError("no terminal")
try:
    compiler.compile_kernels(on_progress=fail)
except ValueError:
    print(len(list(compiler.CACHE_FOLDER.rglob("*.nbc"))))
"""


def test_an_error_of_the_caller_is_no_damage(tmp_path: Path) -> None:
    assert run(WRONG_PROGRESS, tmp_path) == "3"


WRONG_KERNEL = """
from pathlib import Path
from localv4.kernels import compiler, routing
from numba.core.errors import TypingError
compiler.compile_kernels()
@compiler.kernel("i8(i8)", family="wrong")
def wrong(number):
    return unknown(number)
try:
    compiler.compile_kernels({"wrong"})
except TypingError:
    print(len(list(compiler.CACHE_FOLDER.rglob("*.nbc"))))
"""


def test_a_wrong_kernel_is_no_damage(tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text(WRONG_KERNEL)
    assert run(f"import runpy; runpy.run_path({str(file)!r})", tmp_path) == "3"


def test_a_file_in_place_of_the_cache_folder(tmp_path: Path) -> None:
    home = tmp_path / "file"
    home.touch()
    code = PROCESSORS.format(2) + START + "print(compiler.can_keep())"
    _, folder, from_helpers, can_keep = run(code, home).split()
    assert from_helpers == "0" and can_keep == "False" and not Path(folder).exists()


def test_a_different_compiler_setting_has_its_own_cache(tmp_path: Path) -> None:
    code = "from localv4.kernels import compiler; print(compiler.CACHE_FOLDER)"
    assert run(code, tmp_path) != run(code, tmp_path, NUMBA_OPT="1")
    assert run(code, tmp_path) == run(code, tmp_path, NUMBA_NUM_THREADS="1")


@pytest.mark.skipif(os.name != "posix" or os.getuid() == 0, reason="root may write everywhere")
def test_a_read_only_cache_folder_is_no_failure(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert str(tmp_path) not in run(START, tmp_path)


@pytest.mark.parametrize("mode", ["NUMBA_DISABLE_JIT", "NUMBA_BOUNDSCHECK"])
def test_kernels_in_another_jit_mode(mode: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, "test_kernels.py", "test_blocks.py"],
        env=dict(os.environ, **{mode: "1"}),
        cwd=TESTS,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout[-3000:]


def _made_by_a_factory(number: int) -> Any:
    @device
    def made(x: int) -> int:
        return x + number

    return made


@pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="needs the compiler")
def test_functions_of_a_factory_have_names_of_their_own() -> None:
    made = [_made_by_a_factory(number) for number in range(3)]
    assert len({function.py_func.__qualname__ for function in made}) == 3


EXTRA = """
from localv4.kernels.compiler import kernel
from extra.sums import double
@kernel("i8(i8)", family="extra")
def quadruple(number):
    return double(double(number))
"""

DOUBLE = """
from localv4.kernels.device import device
@device
def double(number):
    return {} * number
"""

USE_EXTRA = """
import sys
sys.path.insert(0, {!r})
from extra.kernels import quadruple
from localv4.kernels import compiler
print(compiler.are_compiled({{"extra"}}))
compiler.compile_kernels({{"extra"}})
print(quadruple(10))
"""


def test_kernels_of_another_package_follow_its_sources(tmp_path: Path) -> None:
    package = tmp_path / "extra"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "kernels.py").write_text(EXTRA)
    (package / "sums.py").write_text(DOUBLE.format(2))
    code = USE_EXTRA.format(str(tmp_path))
    assert run(code, tmp_path) == "False\n40"
    assert run(code, tmp_path) == "True\n40"
    (package / "sums.py").write_text(DOUBLE.format(3))
    assert run(code, tmp_path) == "False\n90"
