"""Compiling CUDA kernels ahead: in several processes, all that a network can need."""

from pathlib import Path

import numpy as np
import pytest
from cuda_twins import needs_compiler
from host_gpu import HostGpu
from test_cuda_compiler import needs_nvrtc

from localv4.cuda import compile_helpers, compiler, offload
from localv4.cuda.compile_helpers import compile_all
from localv4.cuda.compiler import compiled, is_kept
from localv4.cuda.gpu import GpuError
from localv4.cuda.options import GpuOptions
from localv4.cuda.transformer import GpuTransformer
from localv4.engine.engine import COMPILING_FOR_GPU, Engine
from localv4.engine.setup import Setup
from localv4.library.installed import embedded_model_path

ARCH = "sm_90"
SMALL = ["rows.cu", "router.cu", '#define MERGED\n#include "rows.cu"\n']
"""Two files and a text that take NVRTC a fraction of a second."""


@needs_nvrtc
def test_helpers_leave_in_the_cache_what_is_made_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_helpers, "usable_processors", lambda: 2)
    told: list[tuple[int, int]] = []
    compile_all([*SMALL, SMALL[0]], ARCH, lambda *done: told.append(done), tmp_path)
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert all(is_kept(source, ARCH, tmp_path) for source in SMALL)
    kept = compiled(SMALL[0], ARCH, tmp_path)
    assert kept == compiler.compile_source(SMALL[0], ARCH)
    told.clear()
    compile_all(SMALL, ARCH, lambda *done: told.append(done), tmp_path)
    assert told == [], "nobody hears of what is there"


@needs_nvrtc
def test_what_does_not_compile_is_told_by_whoever_wants_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_helpers, "usable_processors", lambda: 2)
    wrong = "no kernel\n"
    compile_all([wrong, SMALL[0]], ARCH, folder=tmp_path)
    assert is_kept(SMALL[0], ARCH, tmp_path) and not is_kept(wrong, ARCH, tmp_path)
    with pytest.raises(GpuError, match="do not compile for sm_90"):
        compiled(wrong, ARCH, tmp_path)


@needs_nvrtc
def test_without_helpers_nothing_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_helpers, "usable_processors", lambda: 2)
    monkeypatch.setattr(compile_helpers, "_CODE", "raise SystemExit")
    compile_all(SMALL, ARCH, folder=tmp_path)
    assert not any(is_kept(source, ARCH, tmp_path) for source in SMALL)


@needs_compiler
def test_all_that_a_network_launches_was_made_ready_while_it_was_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = HostGpu(2 << 30)
    monkeypatch.setattr(offload, "find_gpu", lambda _: gpu)
    phases: list[str] = []
    engine = Engine.load(
        embedded_model_path(),
        Setup(ctx_size=64, threads=2, gpu=GpuOptions("cuda")),
        on_progress=lambda phase, *_: phases.append(phase),
    )
    assert COMPILING_FOR_GPU in phases and gpu.launches == 0
    network = engine.network
    assert isinstance(network, GpuTransformer)
    state = network.new_state()
    network.forward(np.arange(5), state)
    network.logits(network.forward(np.arange(1), state))
    assert gpu.launches > 0 and gpu.late == set()
    assert not any("kquant" in source for source in gpu.ready), "it has none of their formats"
