"""Folders that look like models: right names, no weights."""

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from localv4 import paths
from localv4.library.installed import InstalledModel, resolve
from localv4.library.model_files import INDEX_NAME
from localv4.library.verification import check_files, expected_files

FLASH_COMMIT = "60d8d70770c6776ff598c94bb586a859a38244f1"
OTHER_COMMIT = "0123456789" * 4


def empty_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Give the test an empty home, configuration and Hugging Face cache below `tmp_path`."""
    monkeypatch.setenv("LOCALV4_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LOCALV4_MODEL", raising=False)
    monkeypatch.setattr(paths, "config_dir", lambda: tmp_path / "config")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def make_model(folder: Path, shards: int = 2, absent: tuple[int, ...] = ()) -> Path:
    """Write a folder that looks like a sharded model: 10 bytes a shard."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "deepseek_v4"}')
    names = [f"model-{part:05d}-of-{shards:05d}.safetensors" for part in range(1, shards + 1)]
    index = {"weight_map": {f"tensor{number}": name for number, name in enumerate(names)}}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    for part, name in enumerate(names, start=1):
        if part not in absent:
            (folder / name).write_bytes(bytes(10))
    return folder


def make_gguf(file: Path, parts: int = 1, absent: tuple[int, ...] = ()) -> Path:
    """Write an empty GGUF file of 10 bytes or a split of that many parts; return the first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    names = [file.name]
    if parts > 1:
        names = [f"{file.stem}-{part:05d}-of-{parts:05d}.gguf" for part in range(1, parts + 1)]
    for part, name in enumerate(names, start=1):
        if part not in absent:
            (file.parent / name).write_bytes(bytes(10))
    return file.parent / names[0]


def make_packed(folder: Path, config: str = "config.json", absent: tuple[str, ...] = ()) -> Path:
    """Write a folder that looks like a packed model: two shards of 10 bytes, and its `config`."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("layer-00000.safetensors", "embedding-and-head.safetensors", config)
    for name in names:
        if name not in absent:
            data = b'{"model_type": "deepseek_v4"}' if name == "config.json" else bytes(10)
            (folder / name).write_bytes(data)
    manifest = {
        "container": {"format": "localv4-packed", "version": 1},
        "source": "a test",
        "files": {name: {"bytes": 10, "sha256": "0" * 64} for name in names},
        "matrices": {},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def snapshot(home: Path, repo: str, commit: str = OTHER_COMMIT, *, main: bool = True) -> Path:
    """Make the folder of a downloaded revision as huggingface_hub lays it out."""
    entry = home / "hub" / f"models--{repo.replace('/', '--')}"
    folder = entry / "snapshots" / commit
    folder.mkdir(parents=True)
    if main:
        (entry / "refs").mkdir(exist_ok=True)
        (entry / "refs" / "main").write_text(commit)
    return folder


def names_of(models: list[InstalledModel]) -> list[str]:
    return [model.name for model in models]


def damaged_files(folder: Path) -> list[str]:
    """Name the files of a model whose digests are not what they should be."""
    reports = check_files(expected_files(resolve(str(folder))))
    return [report.name for report in reports if report.state != "right"]
