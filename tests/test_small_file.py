"""Small files that come with a model: bounded, and never waited for."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from localv4.errors import BadFileError, LocalV4Error, NotFoundError
from localv4.library.installed import InstalledModel, list_incomplete, list_installed
from localv4.library.model_files import find_weight_sets
from localv4.model.config_json import read_config
from localv4.small_file import read_small_file
from localv4.text.tokenizer_json import read_tokenizer_json

needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")


def test_bytes_up_to_the_limit(tmp_path: Path) -> None:
    file = tmp_path / "small"
    file.write_bytes(b"12345")
    assert read_small_file(file, 5) == b"12345"
    with pytest.raises(BadFileError, match="larger than 4 bytes"):
        read_small_file(file, 4)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=f"no config.json in {tmp_path.name}"):
        read_small_file(Path(tmp_path.name) / "config.json", 5)
    (tmp_path / "file").touch()
    with pytest.raises(LocalV4Error):
        read_small_file(tmp_path / "file" / "config.json", 5)
    with pytest.raises(BadFileError, match="not a regular file"):
        read_small_file(tmp_path, 5)


@needs_pipes
@pytest.mark.parametrize("read", [read_config, read_tokenizer_json])
def test_pipe_is_not_waited_for(read: Callable[[Path], Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(BadFileError, match="not a regular file"):
        read(tmp_path / "pipe.json")


@needs_pipes
def test_listing_waits_for_no_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALV4_HOME", str(tmp_path))
    folder = tmp_path / "models" / "piped"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x")
    for name in ("config.json", "model.safetensors.index.json"):
        os.mkfifo(folder / name)
    find_weight_sets(folder)
    found: list[InstalledModel] = [*list_installed(), *list_incomplete()]
    assert [model.problem is None for model in found if model.name == "piped"] != [True]
