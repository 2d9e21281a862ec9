"""The processor by name, as the system tells it."""

import ctypes
import ctypes.util
import os
import platform
import sys
from pathlib import Path

MAX_CPU_INFO_BYTES = 1 << 16


def cpu_name() -> str:
    """Return the processor's own name, or the best that the system tells."""
    name = None
    if sys.platform == "linux":
        name = _linux_cpu_name(Path("/proc/cpuinfo"))
    elif sys.platform == "darwin":
        name = _darwin_cpu_name()
    elif sys.platform == "win32":
        name = os.environ.get("PROCESSOR_IDENTIFIER")
    return name or platform.processor() or platform.machine()


def _linux_cpu_name(path: Path) -> str | None:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            lines = file.read(MAX_CPU_INFO_BYTES).splitlines()
    except OSError:
        return None
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None)


def _darwin_cpu_name() -> str | None:
    system = ctypes.CDLL(ctypes.util.find_library("c"))
    text, size = ctypes.create_string_buffer(256), ctypes.c_size_t(256)
    failed = system.sysctlbyname(
        b"machdep.cpu.brand_string", text, ctypes.byref(size), None, ctypes.c_size_t(0)
    )
    return None if failed else text.value.decode("utf-8", "replace")
