"""Helpers compile what they can; whatever happens, nothing hangs and none is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numba
import psutil
import pytest
from test_compiler import TESTS, environment

from localv4.kernels import compile_pool, compiler
from localv4.kernels.compile_pool import CompilePool

if numba.config.DISABLE_JIT:
    pytest.skip("there is nothing to compile", allow_module_level=True)

NAMES = [f"localv4.kernels.routing:{name}" for name in ("choose_experts", "add_rows")]
GREETING = compiler.CACHE_FOLDER.name


def compiled(names: list[str], count: int = 2, greeting: str = GREETING) -> list[str]:
    """Return the names that helpers say they have compiled; none of them lives on."""
    before = set(psutil.Process().children())
    with CompilePool(count, greeting) as pool:
        done = sorted(pool.compile([[name] for name in names]))
    assert set(psutil.Process().children()) <= before
    return done


def test_all_is_compiled() -> None:
    assert compiled(NAMES) == sorted(NAMES)


def test_nothing_to_do() -> None:
    assert compiled([]) == []


def test_what_cannot_be_compiled_is_left_out() -> None:
    assert compiled(["no.such.module:f", NAMES[0], "localv4.kernels.routing:none"], 1) == NAMES[:1]


def test_a_helper_with_another_cache_gets_no_work() -> None:
    assert compiled(NAMES, greeting="another") == []


@pytest.mark.parametrize("executable", ["", "no-such-python", __file__])
def test_python_cannot_be_started(executable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    assert compiled(NAMES) == []


@pytest.mark.parametrize(
    "code",
    [
        "raise SystemExit(1)",
        "print('usage: something else')",
        f"import sys; print({GREETING!r}, flush=True); sys.stdin.readline()",
        f"print({GREETING!r}, flush=True); print(input()[:3], flush=True)",
        "import time; time.sleep(1000)",
        f"import time; print({GREETING!r}, flush=True); time.sleep(1000)",
    ],
    ids=["fails", "is another program", "dies at work", "answers nonsense", "hangs", "hangs later"],
)
def test_helpers_that_are_none(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_pool, "_CODE", code)
    monkeypatch.setattr(compile_pool, "SILENCE_S", 1.0)
    assert compiled(NAMES) == []


def test_modules_are_found_as_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "from localv4.kernels.compiler import kernel\n@kernel('i8(i8)')\ndef f(n): return n\n"
    (tmp_path / "of_the_test.py").write_text(source)
    assert compiled(["of_the_test:f"], 1) == []
    monkeypatch.syspath_prepend(tmp_path)
    assert compiled(["of_the_test:f"], 1) == ["of_the_test:f"]


WAITING = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
sys.path.insert(0, {folder!r})
from localv4.kernels import compiler
from localv4.kernels.compile_pool import CompilePool
with CompilePool(2, compiler.CACHE_FOLDER.name) as pool:
    list(pool.compile([["busy_module:first", "busy_module:second"]]))
"""
BUSY = """
import time, os
from pathlib import Path
Path(__file__).with_name(f"{os.getpid()}.busy").touch()
time.sleep(600)
"""


@pytest.mark.parametrize("ending", ["kill", "interrupt"])
def test_helpers_end_with_whoever_started_them(ending: str, tmp_path: Path) -> None:
    if ending == "interrupt" and os.name == "nt":
        pytest.skip("a process cannot send Ctrl-C to another one there")
    (tmp_path / "busy_module.py").write_text(BUSY)
    code = WAITING.format(folder=str(tmp_path))
    starter = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment(tmp_path),
        cwd=TESTS.parent,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while len(busy := list(tmp_path.glob("*.busy"))) < 2:
        assert starter.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    helpers = [psutil.Process(int(file.stem)) for file in busy]
    if ending == "kill":
        starter.kill()
    else:
        starter.send_signal(signal.SIGINT)
    starter.wait(30)
    _, alive = psutil.wait_procs(helpers, timeout=30)
    assert not alive
