"""`localv4 quantize`: the plan, the place of the result, and every refusal in one line."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numba
import pytest
from conversions import converted, official_model
from filelock import FileLock
from terminal import run_here

from localv4.cli import quantize_progress
from localv4.cli.quantize_progress import QuantizeProgress
from quant.errors_made import ErrorTotals
from quant.task import Progress
from quant.tensor_class import TensorClass
from quant.workplace import LOCK_NAME

pytestmark = pytest.mark.skipif(
    bool(numba.config.DISABLE_JIT), reason="kernels that take addresses need the compiler"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return official_model(tmp_path_factory.mktemp("models") / "small")


def test_a_dry_run_prints_the_plan_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    done = run_here("quantize", str(source), "--recipe", "q2", "--dry-run", home=tmp_path)
    assert done.code == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["TENSORS", "MATRICES", "FROM", "TO", "SIZE", "WAS"]
    rows = {line.split()[0]: line for line in lines[1:]}
    assert "FP4" in rows["gate_up"] and "every value kept" in rows["router"]
    assert any(line.startswith("note: ") and "does not fit" in line for line in lines)
    assert "read per token" in lines[-3]
    assert lines[-2].startswith("on this machine: it fits into memory")
    assert lines[-1] == f"to {tmp_path / 'data' / 'models' / 'small' / 'q2'}"
    assert not (tmp_path / "data").exists()


def test_a_dry_run_as_json_tells_the_size_to_the_byte(source: Path, tmp_path: Path) -> None:
    for form in ("packed", "gguf"):
        target = tmp_path / ("out" if form == "packed" else "out.gguf")
        arguments = ("quantize", str(source), "--format", form, "-o", str(target), "--json")
        document = json.loads(run_here(*arguments, "--dry-run", home=tmp_path).stdout)
        done = run_here(*arguments, home=tmp_path)
        result = json.loads(done.stdout)
        assert done.code == 0
        assert result.pop("error") > 0 and result == document
        for entry in document["files"]:
            place = target / entry["name"] if form == "packed" else tmp_path / entry["name"]
            assert place.stat().st_size == entry["bytes"]
        assert document["bytes"] == sum(entry["bytes"] for entry in document["files"])


def test_the_result_is_found_by_its_name(source: Path, tmp_path: Path) -> None:
    done = run_here("quantize", str(source), "-q", home=tmp_path)
    assert (done.code, done.stdout, done.stderr) == (0, "", "")
    listed = run_here("list", home=tmp_path).stdout
    assert "small" in listed
    shown = run_here("show", "-m", "small:q4", "--json", home=tmp_path)
    assert shown.code == 0 and json.loads(shown.stdout)["format"] == "packed"
    again = run_here("quantize", str(source), home=tmp_path)
    assert again.code == 2 and "is a finished model already" in again.stderr


def test_a_recipe_of_ones_own(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('summary = "s"\n[[rules]]\ntensors = ["head"]\nformats = ["Q8"]\n')
    done = run_here(
        "quantize", str(source), "--recipe", str(recipe), "--dry-run", "--json", home=tmp_path
    )
    document = json.loads(done.stdout)
    assert document["recipe"] == "mine"
    formats = {row["class"]: row["formats"] for row in document["classes"]}
    assert formats["head"] == {"Q8": 1}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--recipe", "q5"], 2, 'no recipe "q5"'),
        (["--recipe", "none.toml"], 1, "no none.toml"),
        (["--recipe", "mixed"], 2, "needs to know which experts"),
        (["--split-size", "many"], 2, "--split-size"),
        (["--format", "gguf", "-o", "x"], 2, "is no .gguf file"),
        (["--imatrix", "none.gguf"], 1, "none.gguf"),
        (["-t", "0"], 2, "--threads"),
    ],
)
def test_refusals(
    arguments: list[str],
    code: int,
    message: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_here("quantize", str(source), *arguments, home=tmp_path)
    assert (done.code, done.stdout) == (code, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr and "MATRICES" not in done.stderr


def test_a_target_that_is_there_is_refused_before_anything_is_computed(
    source: Path, tmp_path: Path
) -> None:
    folder = converted(source, tmp_path / "packed", "lossless")
    done = run_here("quantize", str(source), "-o", str(folder), home=tmp_path)
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.splitlines()[0] == f"error: {folder} is a finished model already"


def test_a_packed_source(source: Path, tmp_path: Path) -> None:
    folder = converted(source, tmp_path / "packed", "lossless")
    done = run_here("quantize", str(folder), "--recipe", "q2", home=tmp_path)
    assert done.code == 2 and "is packed already" in done.stderr


@pytest.mark.parametrize("form", ["packed", "gguf"])
def test_a_second_process_is_refused(form: str, source: Path, tmp_path: Path) -> None:
    name, lock = ("out", f"out/{LOCK_NAME}") if form == "packed" else ("out.gguf", ".out.lock")
    (tmp_path / lock).parent.mkdir(exist_ok=True)
    arguments = ("quantize", str(source), "-o", str(tmp_path / name), "--format", form)
    with FileLock(tmp_path / lock):
        done = run_here(*arguments, home=tmp_path)
    assert done.code == 1 and "another process is writing" in done.stderr
    assert not list(tmp_path.rglob("*.partial")) and not (tmp_path / "out.gguf").exists()


def test_files_that_may_not_become_large_enough(source: Path, tmp_path: Path) -> None:
    """As on a full disk: exit code 4, and the same command goes on when there is space."""
    target = tmp_path / "out"
    command = [sys.executable, "-m", "localv4", "quantize", str(source), "-o", str(target), "-q"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, check=False)
    assert done.returncode == 4, done.stderr
    assert done.stderr.startswith("error: ") and "hint: free some space" in done.stderr
    assert not (target / "manifest.json").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (target / "manifest.json").exists()


def test_progress_tells_what_is_done_the_time_left_and_the_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter((0.0, 0.0, 5.0, 20.0))
    monkeypatch.setattr(quantize_progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    errors = ErrorTotals()
    errors.add(TensorClass.HEAD, 1.0, 400.0)
    state = Progress(0, 4 << 30, 0, 4, errors)
    with QuantizeProgress(quiet=False) as report:
        report(state)  # too early for a line, and so is the next one
        report(state)
        state.bytes_done, state.tensors_done = 1 << 30, 1
        report(state)
    captured = capsys.readouterr()
    line = "1.0 GiB of 4.0 GiB, 1 of 4 tensors, 51.2 MiB/s, 60 s left, error 5.00 %\n"
    assert (captured.out, captured.err) == ("", line)
