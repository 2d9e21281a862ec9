"""Sampling settings: ranges, /set, and what a model recommends."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from localv4.cli.settings import Settings, recommended
from localv4.errors import BadFileError, UsageError


def test_flags_change_only_what_is_given() -> None:
    changed = Settings(temp=0.7, top_p=0.9).with_values({"temp": 0.0, "top_p": None, "seed": 3})
    assert changed == Settings(temp=0.0, top_p=0.9, seed=3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temp", -0.1),
        ("temp", float("nan")),
        ("temp", float("inf")),
        ("temp", 1e9),
        ("top_p", 1.1),
        ("top_p", -1),
        ("top_k", -1),
        ("top_k", 2**31),
        ("min_p", 2),
        ("repeat_penalty", 0),
        ("seed", -1),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("temp", True),
        ("temp", "1"),
    ],
)
def test_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name.replace("_", "-") + " must be"):
        Settings().with_values({name: value})


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [
        ("temp", "0.5", "temp", 0.5),
        ("TOP-P", "0", "top_p", 0.0),
        ("top_k", "40", "top_k", 40),
        ("seed", "7", "seed", 7),
        ("seed", "random", "seed", None),
        ("max-tokens", "none", "max_tokens", None),
    ],
)
def test_set(name: str, text: str, field: str, value: Any) -> None:
    assert getattr(Settings(seed=1, max_tokens=1).with_text(name, text), field) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [("tmep", "1"), ("temp", "warm"), ("temp", "nan"), ("top-k", "1.5"), ("temp", "none")],
)
def test_set_refuses(name: str, text: str) -> None:
    with pytest.raises(UsageError, match=name):
        Settings().with_text(name, text)


def test_lines_name_every_setting() -> None:
    lines = dict(Settings(temp=0.7).lines())
    assert lines["temp"] == "0.7"
    assert lines["seed"] == "random"
    assert lines["max-tokens"] == "none"
    for name, value in lines.items():
        Settings().with_text(name, value)


def test_whole_numbers_are_shown_with_all_digits() -> None:
    lines = dict(Settings(seed=1234567, max_tokens=2_000_000).lines())
    assert (lines["seed"], lines["max-tokens"]) == ("1234567", "2000000")
    with pytest.raises(UsageError, match=f"from 0 to {2**63 - 1}, not {2**63}"):
        Settings().with_values({"seed": 2**63})


def write_config(folder: Path, text: str) -> Path:
    (folder / "generation_config.json").write_text(text)
    return folder


def test_recommended(tmp_path: Path) -> None:
    assert recommended(tmp_path, {}) == Settings()
    write_config(tmp_path, json.dumps({"temperature": 0.6, "top_p": 0.95, "do_sample": True}))
    assert recommended(tmp_path, {}) == Settings(temp=0.6, top_p=0.95)
    write_config(tmp_path, json.dumps({"do_sample": False, "temperature": 0.6}))
    assert recommended(tmp_path, {}) == Settings(temp=0.0)
    write_config(tmp_path, json.dumps({"temperature": None, "eos_token_id": [1, 2]}))
    assert recommended(tmp_path, {}) == Settings()


def test_recommended_by_gguf(tmp_path: Path) -> None:
    metadata = {"general.sampling.temp": 0.25, "general.sampling.top_k": 20, "other": "x"}
    assert recommended(tmp_path / "model.gguf", metadata) == Settings(temp=0.25, top_k=20)
    with pytest.raises(BadFileError, match="temp must be"):
        recommended(tmp_path / "model.gguf", {"general.sampling.temp": "hot"})


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"temperature": "hot"}', '{"top_p": 7}', '{"temperature": NaN}']
)
def test_damaged_config(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadFileError, match="generation_config"):
        recommended(write_config(tmp_path, text), {})


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_config_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "generation_config.json")
    with pytest.raises(BadFileError, match="not a regular file"):
        recommended(tmp_path, {})


def test_sampling() -> None:
    sampling = Settings(temp=0.5, top_k=4, repeat_penalty=1.1, seed=9).sampling()
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (0.5, 4, 9)
    assert sampling.repetition_penalty == 1.1
