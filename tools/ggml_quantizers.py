"""The quantizers of ggml itself, called in the library that llama-cpp-python brings along."""

import ctypes
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

_FIND = "import llama_cpp, pathlib; print(pathlib.Path(llama_cpp.__file__).parent / 'lib')"
_NAMES = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")


class GgmlQuantizers:
    """`ggml_quantize_chunk` of one library."""

    def __init__(self, python: str) -> None:
        """Load the library of the environment of a Python interpreter.

        Raises FileNotFoundError when it has none.
        """
        result = subprocess.run(  # noqa: S603
            [python, "-c", _FIND], capture_output=True, text=True, check=False
        )
        folder = Path(result.stdout.strip() or "nowhere")
        found = [folder / name for name in _NAMES if (folder / name).exists()]
        if not found:
            raise FileNotFoundError(f"{python} has no llama-cpp-python (pip install .[compare])")
        library = ctypes.CDLL(str(found[0]))
        self._quantize = library.ggml_quantize_chunk
        self._quantize.restype = ctypes.c_size_t
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._quantize.argtypes = [
            *(ctypes.c_int, pointer, pointer),
            *(number, number, number, pointer),
        ]

    def __call__(self, values: Floats, name: str, importance: Floats | None) -> Bytes:
        """Return values (rows, cols) as rows of blocks (rows, bytes)."""
        kind = gguf.GGMLQuantizationType[name]
        columns, nbytes = gguf.GGML_QUANT_SIZES[kind]
        rows, cols = values.shape
        out = np.empty((rows, cols // columns * nbytes), np.uint8)
        given = None if importance is None else importance.ctypes.data
        self._quantize(kind.value, values.ctypes.data, out.ctypes.data, 0, rows, cols, given)
        return out


def decoded(blocks: Bytes, name: str) -> Floats:
    """Return what the `gguf` package reads."""
    values: Floats = gguf.dequantize(blocks, gguf.GGMLQuantizationType[name])
    return values


def this_python() -> str:
    """Return the interpreter that runs."""
    return sys.executable
