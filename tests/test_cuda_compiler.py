"""All CUDA kernels compile for all generations of GPUs, with no GPU here."""

import importlib.util
import re
from pathlib import Path

import pytest

from localv4.cuda import compiler
from localv4.cuda.compiler import compile_source, compiled, sources
from localv4.cuda.driver import FOLLOWERS
from localv4.cuda.gpu import GpuError
from localv4.cuda.twins import TWINS

KERNELS = Path(compiler.__file__).parent / "kernels"

HAS_NVRTC = all(
    importlib.util.find_spec(name) for name in ("cuda", "cuda.core", "cuda.bindings.nvrtc")
)
needs_nvrtc = pytest.mark.skipif(not HAS_NVRTC, reason="needs localv4[cuda]: NVRTC")

ARCHITECTURES = ("sm_75", "sm_90", "sm_120")
"""Turing, the first that is supported; Hopper, whose code is that of Ampere, too; Blackwell."""


@needs_nvrtc
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", sources())
def test_kernels_compile(source: str, arch: str) -> None:
    code = compile_source(source, arch)
    assert code.startswith(b"\x7fELF")
    for name in {k.name for twin in TWINS.values() for k in twin.kernels if k.source == source}:
        assert name.encode() in code


def test_no_load_is_one_of_constants() -> None:
    """Such loads may be moved before the wait for what other kernels write (`common.cuh`)."""
    for file in KERNELS.glob("*.cu*"):
        code = re.sub("//.*", "", file.read_text("utf-8"))
        assert not re.search(r"\bld\.[\w.]*\.nc\b|LOADERS\([^)]*\bnc\b|__ldg", code), file.name


def test_every_kernel_of_a_twin_is_in_its_file() -> None:
    for twin in TWINS.values():
        for kernel in twin.kernels:
            assert kernel.source in sources()


@needs_nvrtc
def test_machine_code_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiled("rows.cu", "sm_90", tmp_path)
    monkeypatch.setattr(compiler, "compile_source", lambda *_: pytest.fail("compiled again"))
    assert compiled("rows.cu", "sm_90", tmp_path) == first


@needs_nvrtc
def test_another_source_is_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled("rows.cu", "sm_90", tmp_path)
    monkeypatch.setattr(
        compiler, "definitions", lambda: "#define CODE_BIAS 1\n#define BYTE_BIAS 2\n"
    )
    compiler._text.cache_clear()
    compiled("rows.cu", "sm_90", tmp_path)
    compiler._text.cache_clear()
    assert len(list(tmp_path.iterdir())) == 2


@needs_nvrtc
def test_damaged_machine_code_is_made_anew(tmp_path: Path) -> None:
    good = compiled("rows.cu", "sm_90", tmp_path)
    next(tmp_path.iterdir()).write_bytes(good[:1000])
    assert compiled("rows.cu", "sm_90", tmp_path) == good


@needs_nvrtc
def test_a_source_that_does_not_compile_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_text", lambda _: "this is no C++")
    with pytest.raises(GpuError, match=r"rows\.cu do not compile for sm_90"):
        compile_source("rows.cu", "sm_90")


def test_kernels_that_follow_wait() -> None:
    for source in FOLLOWERS:
        assert "__global__" not in (KERNELS / source).read_text("utf-8"), source
    declared = [
        path.name for path in KERNELS.glob("*.cuh") if "__global__" in path.read_text("utf-8")
    ]
    assert set(declared) <= {"common.cuh", "gemm.cuh", "gemm_experts.cuh"}
