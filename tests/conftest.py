"""What a run of the whole suite begins with, and what tests of several modules ask pytest for."""

import importlib
import pkgutil
from pathlib import Path

import pytest

import localv4.kernels
from localv4 import paths
from localv4.kernels import compiler


def pytest_sessionstart(session: pytest.Session) -> None:
    """Compile all kernels before a run of everything, with all cores and once for all workers.

    A run of some files compiles what it needs, when it needs it.
    """
    config = session.config
    is_worker = hasattr(config, "workerinput")
    if is_worker or config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return
    for module in pkgutil.iter_modules(localv4.kernels.__path__, "localv4.kernels."):
        importlib.import_module(module.name)
    importlib.import_module("quant.quantizers")
    compiler.compile_kernels({unit.family for unit in compiler._units})


@pytest.fixture
def own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let nothing matter that this machine has measured or run before."""
    monkeypatch.setattr(paths, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(paths, "state_dir", lambda: tmp_path / "state")
