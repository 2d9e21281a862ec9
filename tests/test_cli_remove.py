"""`localv4 rm` and `localv4 prune`: told, asked, done."""

from pathlib import Path

import pytest
from huggingface_hub import constants
from model_folders import make_model
from terminal import Ended, Terminal, needs_pty, run_here

REPO = "models--deepseek-ai--DeepSeek-V4-Flash"


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    return tmp_path / "hf" / "hub"


def run(home: Path, *arguments: str) -> Ended:
    return run_here(*arguments, home=home)


def models(home: Path) -> Path:
    return home / "data" / "models"


def test_nobody_to_ask(tmp_path: Path) -> None:
    folder = make_model(models(tmp_path) / "mine")
    done = run(tmp_path, "rm", "mine")
    assert done.code == 2
    assert "add -y" in done.stderr
    assert str(folder) in done.stdout
    assert folder.is_dir()


def test_dry_run_and_yes(tmp_path: Path) -> None:
    folders = [make_model(models(tmp_path) / name) for name in ("mine", "yours", "theirs")]
    done = run(tmp_path, "rm", "mine", "yours", "mine", "--dry-run")
    assert done.code == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["NAME", "mine", "yours"]
    assert all(folder.is_dir() for folder in folders)
    done = run(tmp_path, "rm", "mine", "yours", "-y")
    assert (done.code, "freed" in done.stderr) == (0, True)
    assert [folder.is_dir() for folder in folders] == [False, False, True]


def test_one_wrong_name_removes_nothing(tmp_path: Path) -> None:
    folder = make_model(models(tmp_path) / "mine")
    for other, code in (("nobody", 1), ("tiny-v4", 2)):
        assert run(tmp_path, "rm", "-y", "mine", other).code == code
    assert folder.is_dir()


def test_prune(tmp_path: Path, cache: Path) -> None:
    assert run(tmp_path, "prune").stderr == "nothing to remove\n"
    part = cache / REPO / "blobs" / f"{'a' * 64}.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(2048))
    listed = run(tmp_path, "list")
    assert "unfinished downloads: 2.0 KiB" in listed.stderr
    assert run(tmp_path, "prune").code == 2
    shown = run(tmp_path, "prune", "--dry-run").stdout
    assert "deepseek-ai/DeepSeek-V4-Flash: unfinished aaaaaaaaaaaa" in shown
    assert part.exists()
    assert run(tmp_path, "prune", "-y").stderr == "2.0 KiB freed\n"
    assert not part.exists()
    assert run(tmp_path, "list").stderr == ""


@needs_pty
@pytest.mark.parametrize(("answer", "is_left"), [("y\n", False), ("\n", True), ("no\n", True)])
def test_asked_on_a_terminal(tmp_path: Path, answer: str, is_left: bool) -> None:
    folder = make_model(models(tmp_path) / "mine")
    with Terminal("rm", "mine", home=tmp_path) as terminal:
        terminal.wait_for("Remove this? [y/N] ")
        terminal.send(answer)
        assert terminal.wait() == 0
    assert folder.exists() is is_left
