"""Where files go, and that private folders are private."""

import os
import stat
import sys
from pathlib import Path

import pytest

from localv4 import paths
from localv4.errors import BadFileError, LocalV4Error

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes and owners")


def test_home_is_the_variable_if_it_is_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOCALV4_HOME", str(tmp_path / "here"))
    assert paths.home_dir() == tmp_path / "here"
    assert paths.models_dir() == tmp_path / "here" / "models"
    assert not paths.home_dir().exists()


@pytest.mark.parametrize("value", [None, "", "  "])
def test_home_is_the_platform_folder_otherwise(
    monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv("LOCALV4_HOME", raising=False)
    if value is not None:
        monkeypatch.setenv("LOCALV4_HOME", value)
    assert paths.home_dir().is_absolute()
    assert paths.home_dir().name == "localv4"


def test_home_expands_the_tilde_and_is_absolute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LOCALV4_HOME", "~/models-disk")
    assert paths.home_dir() == Path.home() / "models-disk"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCALV4_HOME", "~nobody-of-that-name/x")
    assert paths.home_dir() == tmp_path / "~nobody-of-that-name" / "x"
    monkeypatch.setenv("LOCALV4_HOME", "relative")
    assert paths.home_dir() == tmp_path / "relative"


def test_four_kinds_of_files_lie_apart() -> None:
    folders = [paths.home_dir(), paths.cache_dir(), paths.state_dir(), paths.config_dir()]
    assert all(folder.is_absolute() for folder in folders)
    assert paths.cache_dir() not in (paths.home_dir(), paths.state_dir(), paths.config_dir())


@posix_only
def test_private_dir_is_for_the_user_alone(tmp_path: Path) -> None:
    made = paths.private_dir(tmp_path / "a" / "b")
    assert stat.S_IMODE(made.stat().st_mode) == 0o700


@posix_only
def test_private_dir_narrows_a_wide_folder(tmp_path: Path) -> None:
    folder = tmp_path / "wide"
    folder.mkdir(mode=0o755)
    folder.chmod(0o777)
    paths.private_dir(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@posix_only
def test_private_dir_of_another_user_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(BadFileError, match="another user") as error:
        paths.private_dir(tmp_path)
    assert error.value.exit_code == 5


def test_private_dir_on_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(BadFileError, match="a file where a folder is due"):
        paths.private_dir(file)


def test_private_dir_below_a_file_is_one_clear_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(LocalV4Error, match="cannot create") as error:
        paths.private_dir(file / "below")
    assert error.value.exit_code == 1
