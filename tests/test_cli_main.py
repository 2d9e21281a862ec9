"""The command itself: help, exit codes, and how failures are told. All in real processes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from terminal import COMMAND, ROOT, environment, needs_pty, run_here, run_localv4, start_localv4

import localv4


def test_help_is_quick_and_names_the_commands(tmp_path: Path) -> None:
    start = time.monotonic()
    done = run_localv4("--help", home=tmp_path)
    assert time.monotonic() - start < 10  # measured: 0.3 s; this only rules out heavy imports
    assert done.returncode == 0
    text = done.stdout.decode()
    for command in ("run", "chat", "list", "show", "eval"):
        assert f" {command} " in text
    assert "╭" in text  # UTF-8 into the pipe
    assert done.stderr == b""


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from localv4.cli import main; "
        "print([m for m in ('numpy', 'numba', 'prompt_toolkit', 'tokenizers', 'pydantic', "
        "'rich.markdown', 'huggingface_hub') if m in sys.modules])"
    )
    # typer brings pydantic along
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, cwd=ROOT, env=environment(tmp_path)
    )
    loaded = done.stdout.decode().strip()
    assert loaded in ("[]", "['pydantic']")


@pytest.mark.parametrize("arguments", [["-h"], ["run", "-h"], ["chat", "--help"], ["eval", "-h"]])
def test_short_help(arguments: list[str], tmp_path: Path) -> None:
    done = run_localv4(*arguments, home=tmp_path)
    assert done.returncode == 0
    assert b"Usage: localv4" in done.stdout


def test_unfinished_commands_are_not_there(tmp_path: Path) -> None:
    for command in ("serve", "stop"):
        assert run_here(command, home=tmp_path).code == 2


def test_version(tmp_path: Path) -> None:
    done = run_localv4("--version", home=tmp_path)
    assert done.stdout.decode() == f"localv4 {localv4.__version__}\n"


def test_no_arguments_show_the_help(tmp_path: Path) -> None:
    done = run_localv4(home=tmp_path)
    assert done.returncode == 2
    assert b"Usage: localv4" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "said", "hint"),
    [
        (["rnu"], "Did you mean 'run'?", "localv4 --help"),
        (["run", "--tmep", "1"], "--temp", "localv4 run --help"),
        (["run", "-n", "many", "x"], "whole number", "localv4 run --help"),
        (["run", "--readers", "0", "x"], "--readers", "localv4 run --help"),
        (["eval", "logits"], "--tokens", ""),
        (["chat"], "needs a terminal", "localv4 run"),
        (["run", "x", "-p", "y"], "given twice", ""),
        (["run", "--raw", "--think", "x"], "--raw", ""),
        (["run", "--no-think", "--think-effort", "max", "x"], "contradicts", ""),
        (["run", "--temp", "nan", "x"], "temp must be", ""),
        (["run", "-n", "0", "x"], "from 1 to 2147483647", ""),
        (["run", "--format", "xml", "x"], "'--format': 'xml' is not", "localv4 run --help"),
    ],
)
def test_wrong_usage(arguments: list[str], said: str, hint: str, tmp_path: Path) -> None:
    done = run_here(*arguments, home=tmp_path)
    lines = done.stderr.splitlines()
    assert done.code == 2
    assert done.stdout == ""
    assert lines[0].startswith("error: ")
    assert said in lines[0]
    assert hint in "".join(lines[1:])
    assert len(lines) <= 2


def test_bad_file_has_its_exit_code_and_no_traceback(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + b"\xff" * 60)
    done = run_localv4("run", "-m", str(bad), "x", home=tmp_path)
    assert done.returncode == 5
    assert done.stderr.decode().startswith("error: bad file (")
    assert "Traceback" not in done.stderr.decode()
    debugged = run_localv4(
        "run", "-m", str(bad), "x", home=tmp_path, changes={"LOCALV4_DEBUG": "1"}
    )
    assert debugged.returncode == 5
    assert "Traceback" in debugged.stderr.decode()


def test_debugging_prints_no_secret(tmp_path: Path) -> None:
    secret = {"LOCALV4_DEBUG": "1", "HF_TOKEN": "hf_secret"}
    done = run_localv4("run", "-m", "./nowhere", "x", home=tmp_path, changes=secret)
    assert done.returncode == 1
    assert b"hf_secret" not in done.stdout + done.stderr


@pytest.mark.parametrize("debug", ["0", "1"])
def test_hostile_file_name_is_printed_harmlessly(debug: str, tmp_path: Path) -> None:
    arguments = ("run", "-m", "./\x1b]0;x\x07\n/y", "x")
    done = run_here(*arguments, home=tmp_path, changes={"LOCALV4_DEBUG": debug})
    assert done.code == 1
    assert "\x1b" not in done.stderr
    assert (len(done.stderr.splitlines()) == 1) is (debug == "0")


def test_closed_pipe_is_silent(tmp_path: Path) -> None:
    process = start_localv4("show", "--json", "--tensors", home=tmp_path)
    assert process.stdout is not None
    process.stdout.read(10)
    process.stdout.close()
    _, said = process.communicate(timeout=60)
    assert said == b""
    assert process.returncode in (0, 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["list", "--json"]])
def test_full_disk_is_one_line(arguments: list[str], tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        process = start_localv4(*arguments, home=tmp_path, stdout=full.fileno())
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.decode() == "error: cannot write the output: No space left on device\n"


@needs_pty  # POSIX shells can close descriptors
@pytest.mark.parametrize(
    ("closed", "code"), [("<&-", 0), (">&-", 1), ("2>&-", 0), ("<&- >&- 2>&-", 1)]
)
def test_closed_streams(closed: str, code: int, tmp_path: Path) -> None:
    command = " ".join([*COMMAND, "list"])
    done = subprocess.run(
        f"{command} {closed}",
        shell=True,
        capture_output=True,
        cwd=ROOT,
        env=environment(tmp_path),
    )
    assert done.returncode == code
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("changes", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}])
def test_ascii_locale(changes: dict[str, str], tmp_path: Path) -> None:
    done = run_localv4("run", "--help", home=tmp_path, changes=changes)
    assert done.returncode == 0
    assert b"--max-tokens" in done.stdout
    assert done.stderr == b""


def test_completion_script(tmp_path: Path) -> None:
    shell = {
        "_LOCALV4_COMPLETE": "complete_bash",
        "COMP_WORDS": "localv4 sh",
        "COMP_CWORD": "1",
    }
    done = run_localv4(home=tmp_path, changes=shell)
    assert b"show" in done.stdout


INTERRUPTED_IMPORT = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "localv4.cli.main":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Finder())
from localv4.__main__ import main
main()
"""


def test_interrupt_during_the_imports_is_quiet() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED_IMPORT], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_module_and_command_are_the_same() -> None:
    script = Path(sys.executable).with_name("localv4" + (".exe" if os.name == "nt" else ""))
    if not script.exists():
        pytest.skip("the package is not installed")
    done = subprocess.run([script, "--version"], capture_output=True)
    assert done.stdout.decode().startswith("localv4 ")


ENDING = """
import atexit, sys
import localv4.cli.main as cli
from localv4.__main__ import main

class Late:
    def __del__(self):
        print("taken apart")

def run(command=cli.main):
    atexit.register(print, "cleaned up")  # as what is imported on the way does
    command()

late, cli.main = Late(), run
sys.argv = ["localv4", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize(("argument", "code"), [("--version", 0), ("--no-such-option", 2)])
def test_a_process_cleans_up_and_ends(argument: str, code: int) -> None:
    command = [sys.executable, "-c", ENDING, argument]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert "cleaned up" in done.stdout and "taken apart" not in done.stdout
