"""Machine code of the kernels for one GPU: made by NVRTC at first use, kept in a private folder."""

import hashlib
from contextlib import suppress
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from localv4 import paths
from localv4.cuda.gpu import GpuError, no_library
from localv4.errors import LocalV4Error
from localv4.finished_file import finished_file
from localv4.kernels.isa import ISA

FLAGS = ("--std=c++17", "--fmad=false", "--extra-device-vectorization")
"""No products are fused with sums behind our back: bits are those of the CPU."""

DIGEST_BYTES = 32
"""Of SHA-256, before the machine code in its file."""

OLDEST = 75
"""The first architecture with integer tensor cores, which NVRTC still knows."""


def compiled(source: str, arch: str, folder: Path | None = None) -> bytes:
    """Return the machine code (cubin) of a file of kernels for an architecture such as `sm_90`.

    `source` can also be the text of kernels that are made of those of files (`cuda.merged`).
    `folder` is where machine code is kept, by default one of this user. Raises GpuError when NVRTC
    is missing or refuses the source.
    """
    target = _target(source, arch, folder)
    if (kept := _kept(target)) is not None:
        return kept
    code = compile_source(source, arch)
    with suppress(LocalV4Error):  # it is made again the next time
        paths.private_dir(target.parent)
        with finished_file(target) as file:
            file.write(hashlib.sha256(code).digest() + code)
    return code


def is_kept(source: str, arch: str, folder: Path | None = None) -> bool:
    """Say whether `compiled` finds its machine code in the cache."""
    return _kept(_target(source, arch, folder)) is not None


def length(source: str) -> int:
    """Return the characters that are compiled for a source: a guess of how long that takes."""
    return len(_text(source))


def _target(source: str, arch: str, folder: Path | None) -> Path:
    """Return the file of the machine code."""
    folder = folder or paths.cache_dir() / "cuda"
    return folder / f"{Path(_name(source)).stem}-{arch}-{_digest(source, arch)}.cubin"


def _kept(target: Path) -> bytes | None:
    """Return machine code from its file; None if there is none, or it is damaged."""
    with suppress(OSError):
        kept = target.read_bytes()
        if hashlib.sha256(kept[DIGEST_BYTES:]).digest() == kept[:DIGEST_BYTES]:
            return kept[DIGEST_BYTES:]
    return None


def compile_source(source: str, arch: str) -> bytes:
    """Compile a file of kernels now."""
    core = _core()
    options = core.ProgramOptions(
        name=_name(source), arch=arch, std="c++17", fma=False, extra_device_vectorization=True
    )
    try:
        program = core.Program(_text(source), "c++", options)
        return bytes(program.compile("cubin").code)
    except Exception as error:  # NVRTC's own types differ between its versions
        reason = " ".join(str(error).split())[:300]
        raise GpuError(f"kernels of {_name(source)} do not compile for {arch}: {reason}") from None


def sources() -> list[str]:
    """Return the files of kernels."""
    folder = resources.files("localv4.cuda") / "kernels"
    return sorted(file.name for file in folder.iterdir() if file.name.endswith(".cu"))


@cache
def _text(source: str) -> str:
    """Return a file or text with all that it includes, once each: NVRTC gets no folders."""
    text = source if "\n" in source else f'#include "{source}"\n'
    return definitions() + _expanded(text, set())


def _name(source: str) -> str:
    return "merged.cu" if "\n" in source else source


def definitions() -> str:
    """Return what the kernels have to know about the CPU: the biases of its weights."""
    return f"#define CODE_BIAS {ISA.code_bias}\n#define BYTE_BIAS {ISA.byte_bias}\n"


def _expanded(text: str, seen: set[str]) -> str:
    lines, folder = [], resources.files("localv4.cuda") / "kernels"
    for line in text.splitlines():
        parts = line.split('"')
        if line.startswith("#include") and len(parts) == 3 and parts[1] != "cuda_host.h":
            if parts[1] not in seen:
                seen.add(parts[1])
                lines.append(_expanded((folder / parts[1]).read_text("utf-8"), seen))
        elif not line.startswith("#pragma once"):
            lines.append(line)
    return "\n".join(lines) + "\n"


def _digest(source: str, arch: str) -> str:
    """Return what machine code depends on: the source, the architecture, flags and NVRTC."""
    content = "\n".join([_text(source), arch, *FLAGS, toolkit()])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@cache
def toolkit() -> str:
    """Return the version of NVRTC; raises GpuError when it is missing."""
    _core()
    from cuda.bindings import nvrtc

    try:
        _, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:
        raise GpuError(f"NVRTC, the compiler of CUDA, cannot be loaded: {error}") from None
    return f"{major}.{minor}"


def _core() -> Any:
    try:
        import cuda.core
    except ImportError as error:
        raise no_library(error) from None
    return cuda.core
