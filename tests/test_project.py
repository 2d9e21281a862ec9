"""Rules for the project as a whole: sizes, finished code, imports, the files around it."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import localv4

ROOT = Path(__file__).parents[1]
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80

TEXT_SUFFIXES = {
    ".py",
    ".md",
    ".toml",
    ".yml",
    ".cfg",
    ".ini",
    ".sh",
    ".txt",
    ".cu",
    ".cuh",
    ".h",
    "",
}
NOT_OURS = {"venv", "build", "dist", "node_modules", "golden", "__pycache__"}

KERNEL_LIBRARIES = {"numpy", "numba", "llvmlite"}
KERNEL_PACKAGES = ("localv4.kernels", "localv4.paths", "localv4.errors")


def project_files() -> Iterator[Path]:
    """Yield the text files that people write, hidden ones such as .ci/run too."""
    for folder, subfolders, names in os.walk(ROOT):
        kept = {".ci", ".github"}
        subfolders[:] = [
            name
            for name in subfolders
            if (not name.startswith(".") or name in kept)
            and name not in NOT_OURS
            and not name.endswith(".egg-info")
        ]
        for name in names:
            file = Path(folder) / name
            if file.suffix in TEXT_SUFFIXES and name != ".git":  # a file in a linked worktree
                yield file


PYTHON_FILES = sorted(file for file in project_files() if file.suffix == ".py")


def shown(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def functions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def imported_modules(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_there_is_something_to_check() -> None:
    names = {shown(file) for file in project_files()}
    assert {"localv4/errors.py", "tests/test_project.py", ".ci/run", "pyproject.toml"} <= names
    assert not any(".venv" in name for name in names)


def test_files_are_short() -> None:
    lengths = {shown(file): len(file.read_text("utf-8").splitlines()) for file in PYTHON_FILES}
    assert {name: n for name, n in lengths.items() if n > MAX_FILE_LINES} == {}


def test_functions_are_short() -> None:
    long = [
        f"{shown(file)}:{node.lineno} {node.name}"
        for file in PYTHON_FILES
        for node in functions(file)
        if (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert long == []


def test_public_functions_of_the_package_have_docstrings_and_types() -> None:
    bare = [
        f"{shown(file)}:{node.lineno} {node.name}"
        for file in PYTHON_FILES
        if shown(file).startswith(("localv4/", "quant/")) and "kernels" not in shown(file)
        for node in functions(file)
        if node.returns is None
    ]
    assert bare == []
    assert [
        shown(file)
        for file in PYTHON_FILES
        if not ast.get_docstring(ast.parse(file.read_text("utf-8")))
    ] == []


def test_nothing_is_left_unfinished() -> None:
    # put together here, so that this file does not hold them
    marks = [
        "TO" + "DO",
        "FIX" + "ME",
        "X" * 3,
        "NotImplemented" + "Error",
        "pragma: no " + "cover",
    ]
    found = [
        f"{shown(file)}: {mark}"
        for file in project_files()
        if file.suffix in {".py", ".md", ".toml"}
        for mark in marks
        if re.search(rf"\b{mark}\b", file.read_text("utf-8"))
    ]
    assert found == []


def test_no_path_of_one_machine_is_written_down() -> None:
    folders = "|".join(["work", "farm", "root", "home", "Users"])
    pattern = re.compile(rf"(?:^|[^A-Za-z0-9_.~])/(?:{folders})/", re.MULTILINE)
    found = [shown(file) for file in project_files() if pattern.search(file.read_text("utf-8"))]
    assert found == []


def test_kernels_are_leaves() -> None:
    wrong = [
        f"{shown(file)}: {module}"
        for file in PYTHON_FILES
        if shown(file).startswith("localv4/kernels/")
        for module in imported_modules(file)
        if module.split(".")[0] not in KERNEL_LIBRARIES | set(sys.stdlib_module_names)
        and not module.startswith(KERNEL_PACKAGES)
    ]
    assert wrong == []


def test_import_contract_is_kept() -> None:
    pytest.importorskip("importlinter", reason="comes with the dev extra")
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as run; run()",
    ]
    done = subprocess.run(
        [*command, "--no-logo", "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_version_is_readable_and_in_the_changelog() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z]+\d+)?", localv4.__version__)
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert "## [Unreleased]" in changelog
    assert localv4.__version__ in changelog


def test_packaging_ships_what_the_program_reads() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    wheel = table["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"]["models.toml"] == "localv4/models.toml"
    assert set(wheel["packages"]) == {"localv4", "quant"}
    assert "MIT License" in (ROOT / "LICENSE").read_text("utf-8")
    for name in ("LICENSE", "SECURITY.md", "CHANGELOG.md", "models.toml"):
        assert (ROOT / name).stat().st_size > 500


needs_bash = pytest.mark.skipif(
    sys.platform == "win32" or shutil.which("bash") is None, reason="runs a bash script"
)


def readme_command(name: str, readme: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / ".ci" / "command"), name, str(readme)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@needs_bash
def test_commands_are_taken_from_the_readme(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(
        "```\nnot this\n```\n<!-- command: test -->\n```bash\n"
        "python3 -m venv .venv && \\\n  .venv/bin/python -m pytest\n```\n```\nnor this\n```\n"
        "<!-- command: run -->\ntext between\n```\nlocalv4 run\n```\n"
    )
    test = readme_command("test", readme, OS="")
    assert test.stdout == "python3 -m venv .venv && \\\n  .venv/bin/python -m pytest\n"
    assert readme_command("run", readme).stdout == "localv4 run\n"
    windows = readme_command("test", readme, OS="Windows_NT")
    assert windows.stdout == "python -m venv .venv && \\\n  .venv/Scripts/python -m pytest\n"


@needs_bash
def test_a_command_that_the_readme_lacks_is_an_error(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# no commands\n")
    done = readme_command("test", readme)
    assert (done.returncode, done.stdout) == (1, "")
    assert "has no command called test" in done.stderr


def test_ci_calls_the_commands_of_the_readme() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8")
    assert ".ci/command run" in workflow
    assert ".ci/command test" in workflow
    assert "- run: .ci/run" in workflow
    assert ".ci/command test" in (ROOT / ".ci" / "run").read_text("utf-8")
