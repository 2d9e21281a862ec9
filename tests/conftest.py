"""What a run of the whole suite begins with."""

import importlib
import pkgutil

import pytest

import localv4.kernels
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
