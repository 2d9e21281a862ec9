"""The storage types of tensors: how many elements make a block and how many bytes it takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class DType:
    """One storage type; a plain number is a block of one element."""

    name: str
    block: int
    block_bytes: int

    def nbytes(self, count: int) -> int:
        """Return the bytes of `count` elements; `count` is a multiple of `block`."""
        return count // self.block * self.block_bytes


_F32 = DType("F32", 1, 4)
_F16 = DType("F16", 1, 2)
_BF16 = DType("BF16", 1, 2)
_I32 = DType("I32", 1, 4)

SAFETENSORS_DTYPES: Mapping[str, DType] = MappingProxyType(
    {
        dtype.name: dtype
        for dtype in (
            _F32,
            _F16,
            _BF16,
            DType("F8_E4M3", 1, 1),
            DType("F8_E8M0", 1, 1),
            DType("I8", 1, 1),
            _I32,
            DType("I64", 1, 8),
        )
    }
)
"""The types read from safetensors files, by the name in the header."""

GGML_DTYPES: Mapping[int, DType] = MappingProxyType(
    {
        0: _F32,
        1: _F16,
        2: DType("Q4_0", 32, 18),
        8: DType("Q8_0", 32, 34),
        10: DType("Q2_K", 256, 84),
        11: DType("Q3_K", 256, 110),
        12: DType("Q4_K", 256, 144),
        13: DType("Q5_K", 256, 176),
        14: DType("Q6_K", 256, 210),
        16: DType("IQ2_XXS", 256, 66),
        20: DType("IQ4_NL", 32, 18),
        23: DType("IQ4_XS", 256, 136),
        26: _I32,
        30: _BF16,
        39: DType("MXFP4", 32, 17),
    }
)
"""The types read from GGUF files, by the ggml type id."""
