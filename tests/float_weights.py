"""Random matrices of float formats, packed without the project's code, and their values."""

import numpy as np
from reference_packed import F32, Wide, address, aligned, floats, unpack_f8


class FloatWeights:
    """A matrix of B16, F32R or F8, filled up with rows of zeros to whole groups of sixteen."""

    def __init__(self, name: str, rows: int, cols: int) -> None:
        rng = np.random.default_rng(rows + cols)
        self.name, self.groups, self.cols = name, -(-rows // 16), cols
        self.rows = 16 * self.groups
        self.scale = floats(1, 1)
        if name == "F8":
            codes = rng.integers(0, 256, rows * cols, dtype=np.uint8)
            codes[codes & 0x7F == 0x7F] = 3
            self.packed = aligned(codes)
            shape = (-(-rows // 128), cols // 128)
            self.scale = (np.exp2(rng.integers(-12, 3, shape)) * 1.25).astype(F32)
            self.values: Wide = unpack_f8(self.packed, self.scale, rows, cols).astype(np.float64)
            return
        values = np.zeros((self.rows, cols), F32)
        values[:rows] = rng.standard_normal((rows, cols))
        bits = values.view(np.uint32)
        if name == "B16":
            bits &= np.uint32(0xFFFF0000)
        lanes = bits.reshape(-1, 16, cols).transpose(0, 2, 1)
        self.packed = aligned((lanes >> 16).astype(np.uint16) if name == "B16" else lanes)
        self.values = values.astype(np.float64)

    @property
    def words(self) -> tuple[int, int, int]:
        """The operands that name the matrix."""
        return address(self.packed), self.groups, self.cols
