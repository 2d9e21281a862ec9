"""Packed weight formats: sixteen rows interleaved, so that one register lane is one row.

Row r is lane r % 16 of group r // 16. Groups follow one another, each contiguous over all columns.
A line is 64 bytes; a buffer starts on a line and so does every superblock.

| format | bits | superblock           | bytes | first line (two or four blocks of 32 columns)     |
|--------|------|----------------------|-------|---------------------------------------------------|
| MX4    | 4.25 | 16 rows, 128 columns | 1088  | UE8M0 scales: byte 16 * block + lane              |
| Q4     | 4.5  | 16 rows, 64 columns  | 576   | f16 scales: half 16 * block + lane                |
| Q8     | 8.5  | 16 rows, 64 columns  | 1088  | f16 scales: half 16 * block + lane                |
| F8     | 8    | 16 rows, 1 column    | 16    | none: the scales are apart                        |

After the scales come the blocks. A block of MX4 or Q4 has four lines: byte 4 * lane + i of line j
holds the code of column 8 * j + i in its low half and of column 8 * j + 4 + i in its high half.
A block of Q8 has eight lines: byte 4 * lane + i of line j is the int8 of column 4 * j + i.
A column of F8 is sixteen E4M3 codes, one a row; its scales are a float32 matrix of their own,
one for 128 x 128 values (rows / 128 rounded up).

Values: MX4 = E2M1 code * 2^(scale - 127); Q4 = (code - 8) * scale; Q8 = int8 * scale;
F8 = E4M3 code * scale. A product reads the MX4 scale code 0 as 0 instead of 2^-127, which changes
it by less than 1e-37 for each unit of activation: below the rounding of any sum that matters. MX4
scale code 255 (NaN) and the F8 codes 0x7F and 0xFF (NaN) would be read as numbers; the packers
count them, so that their caller can refuse the matrix.

An expert is one record: the groups of gate and up alternate (gate 0, up 0, gate 1, ...), then come
the groups of down. So one reader streams it, and SwiGLU happens in registers.
"""

from dataclasses import dataclass

GROUP_ROWS = 16
BLOCK = 32  # columns with one scale
F8_SPAN = 128  # rows and columns with one scale


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """Sizes of one format: a superblock is `columns` of sixteen rows in `superblock_bytes`."""

    name: str
    columns: int
    superblock_bytes: int
    columns_unit: int  # the number of columns of a matrix is a multiple of it


MX4 = PackedFormat("MX4", 128, 1088, 128)
Q4 = PackedFormat("Q4", 64, 576, 64)
Q8 = PackedFormat("Q8", 64, 1088, 64)
F8 = PackedFormat("F8", 1, 16, 128)
FORMATS = (MX4, Q4, Q8, F8)


def can_pack(fmt: PackedFormat, rows: int, cols: int) -> bool:
    """Tell whether a matrix of this shape has the packed form."""
    return rows > 0 and cols > 0 and rows % GROUP_ROWS == 0 and cols % fmt.columns_unit == 0


def group_bytes(fmt: PackedFormat, cols: int) -> int:
    """Return the bytes of sixteen rows of `cols` columns."""
    return cols // fmt.columns * fmt.superblock_bytes


def packed_bytes(fmt: PackedFormat, rows: int, cols: int) -> int:
    """Return the bytes of a packed matrix, the scales of F8 not counted.

    Raises ValueError if the shape has no packed form.
    """
    if not can_pack(fmt, rows, cols):
        raise ValueError(f"a matrix of {rows} x {cols} has no packed form {fmt.name}")
    return rows // GROUP_ROWS * group_bytes(fmt, cols)


def expert_bytes(fmt: PackedFormat, hidden: int, inner: int) -> int:
    """Return the bytes of an expert record: gate and up (inner, hidden), down (hidden, inner)."""
    return down_offset(fmt, hidden, inner) + packed_bytes(fmt, hidden, inner)


def down_offset(fmt: PackedFormat, hidden: int, inner: int) -> int:
    """Return where the down projection starts in an expert record."""
    return 2 * packed_bytes(fmt, inner, hidden)
