"""The kernel cache is private, rebuilt when damaged, and the kernels hold in every JIT mode."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
START = (
    "from localv4.kernels import compiler, compression, routing;"
    "print(compiler.are_compiled(), compiler.CACHE_FOLDER);"
    "compiler.compile_kernels()"
)


def run(code: str, cache: Path, **variables: str) -> str:
    """Run Python code in a process of its own with the cache in a folder of the test."""
    environment = dict(os.environ, **variables)
    # platformdirs looks at one of these, by platform
    for name in ("XDG_CACHE_HOME", "HOME", "LOCALAPPDATA"):
        environment[name] = str(cache)
    environment.pop("LOCALV4_HOME", None)
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_cache_life(tmp_path: Path) -> None:
    compiled, folder = run(START, tmp_path).split()
    assert compiled == "False" and Path(folder).is_relative_to(tmp_path)
    if os.name == "posix":
        assert Path(folder).stat().st_mode & 0o077 == 0
    before = {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*.nbc")}
    assert before

    assert run(START, tmp_path) == f"True {folder}"
    assert before == {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*.nbc")}

    for path in Path(folder).rglob("*.nb[ci]"):
        path.write_bytes(path.read_bytes()[:20])
    run(START, tmp_path)
    assert run(START, tmp_path) == f"True {folder}"


FULL_DISK = """
import errno
from unittest import mock
from numba.core import caching
from localv4.kernels import compiler, compression, routing
full = OSError(errno.ENOSPC, "No space left on device")
with mock.patch.object(caching.IndexDataCacheFile, "save", side_effect=full):
    compiler.compile_kernels()
print(compiler.are_compiled(), compiler.can_keep())
"""


def test_a_full_disk_is_no_failure_and_no_complete_cache(tmp_path: Path) -> None:
    assert run(FULL_DISK, tmp_path) == "False True"


def test_a_file_in_place_of_the_cache_folder(tmp_path: Path) -> None:
    home = tmp_path / "file"
    home.touch()
    code = "from localv4.kernels import compiler; print(compiler.can_keep())"
    assert run(code, home) == "False"


def test_a_different_compiler_setting_has_its_own_cache(tmp_path: Path) -> None:
    code = "from localv4.kernels import compiler; print(compiler.CACHE_FOLDER)"
    assert run(code, tmp_path) != run(code, tmp_path, NUMBA_OPT="1")


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
