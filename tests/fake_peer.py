"""llama.cpp for tests: the real worker process on a stand-in for llama-cpp-python."""

import json
import os
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parent / "fake_llama"


def use_fake_llama(
    monkeypatch: pytest.MonkeyPatch, trouble: str = "", log: Path | None = None
) -> None:
    """Let worker processes that start from now on find the stand-in; `trouble` is its fault."""
    settings = {"trouble": trouble} | ({"log": str(log)} if log is not None else {})
    monkeypatch.setenv("FAKE_LLAMA", json.dumps(settings))
    others = os.environ.get("PYTHONPATH")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(PACKAGES), *([others] if others else [])])
    )


def decoded(log: Path) -> list[tuple[int, int, list[int]]]:
    """Return (first position, tokens, which of them with logits) of each batch in a log."""
    lines = log.read_text("utf-8").splitlines() if log.exists() else []
    return [(first, count, wanted) for first, count, wanted in map(json.loads, lines)]
