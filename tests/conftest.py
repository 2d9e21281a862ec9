"""What tests of several modules ask pytest for."""

from pathlib import Path

import pytest

from localv4 import paths


@pytest.fixture
def own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let nothing matter that this machine has measured or run before."""
    monkeypatch.setattr(paths, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(paths, "state_dir", lambda: tmp_path / "state")
