"""The formats that recipes name, for packed folders and for GGUF files."""

from collections.abc import Mapping
from dataclasses import dataclass

from localv4.kernels import blocks
from localv4.kernels.packed import GROUP_ROWS, MX4, Q4, Q8, PackedFormat
from localv4.kernels.packed_kquants import IQ2, Q2, Q3, Q4K, Q6
from localv4.kernels.packing_floats import B16

KEEP = "keep"
"""In the place of a format: the values stay what they are in the source."""


@dataclass(frozen=True, slots=True)
class Target:
    """A format to round weights to: matrices have whole units of columns and of rows."""

    name: str
    bits: float
    columns: int
    rows: int
    group: int  # rows that are stored together; the last group is filled up
    kin: str  # nearest format of the other kind: of packed folders, or of GGUF files

    def fits(self, rows: int, cols: int) -> bool:
        """Tell whether a matrix of this shape can have the format."""
        return rows % self.rows == 0 and cols % self.columns == 0

    def nbytes(self, rows: int, cols: int) -> int:
        """Return the bytes of a matrix that fits."""
        return int(-(-rows // self.group) * self.group * cols * self.bits) // 8


def _packed(fmt: PackedFormat, kin: str, rows: int = GROUP_ROWS) -> Target:
    bits = 8 * fmt.superblock_bytes / (GROUP_ROWS * fmt.columns)
    return Target(fmt.name, bits, fmt.columns_unit, rows, GROUP_ROWS, kin)


def _ggml(name: str, kin: str) -> Target:
    columns, nbytes = blocks.UNITS[blocks.FORMATS.index(name)]
    return Target(name, 8 * nbytes / columns, columns, 1, 1, kin)


PACKED_TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        _packed(IQ2, "IQ2_XXS"),
        _packed(Q2, "Q2_K"),
        _packed(Q3, "Q3_K"),
        _packed(MX4, "MXFP4"),
        _packed(Q4, "Q4_0"),
        _packed(Q4K, "Q4_K"),
        _packed(Q6, "Q6_K"),
        _packed(Q8, "Q8_0"),
        _packed(B16, "BF16", rows=1),
    )
}
"""What weights are rounded to in a packed folder, the smallest first."""

GGML_TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        _ggml("IQ2_XXS", "IQ2"),
        _ggml("Q2_K", "Q2"),
        _ggml("Q3_K", "Q3"),
        _ggml("IQ4_XS", "MX4"),
        _ggml("MXFP4", "MX4"),
        _ggml("Q4_0", "Q4"),
        _ggml("Q4_K", "Q4K"),
        _ggml("Q5_K", "Q6"),
        _ggml("Q6_K", "Q6"),
        _ggml("Q8_0", "Q8"),
        _ggml("BF16", "B16"),
        _ggml("F32", "B16"),
    )
}
"""What weights are rounded to in a GGUF file, the smallest first."""
