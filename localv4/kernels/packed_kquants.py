"""Packed weight formats of 2 to 6 bits whose scales are themselves small integers.

They hold the ggml types of superblocks value for value, and weights of our own. As in
`kernels.packed`, sixteen rows are interleaved (row r is lane r % 16 of group r // 16), groups
follow one another, and a line is 64 bytes. A superblock is 256 columns of sixteen rows:

| format | bits  | ggml    | bits   | lines: head, scales, codes | value                        |
|--------|-------|---------|--------|----------------------------|------------------------------|
| Q4K    | 4.5   | Q4_K    | 4.5    | 1, 3, 32                   | d * scale * code - m * least |
| Q6     | 6.625 | Q6_K    | 6.5625 | 1, 4, 48                   | d * scale * (code - 32)      |
| Q3     | 3.5   | Q3_K    | 3.4375 | 1, 3, 24                   | d * (scale - 32) * (code - 4)|
| Q2     | 2.625 | Q2_K    | 2.625  | 1, 4, 16                   | d * scale * code - m * least |
| IQ2    | 2.125 | IQ2_XXS | 2.0625 | 1, 0, 16                   | see below                    |

The head has d: float32 number `lane`; with a least value it is two rows of f16 instead, d: number
`lane`, m: number 16 + `lane`. Scales and codes come in steps of 64 columns, step p = 0 ... 3 behind
the one before. A step has two blocks of 32 columns or four parts of 16 columns.

Six-bit numbers n0 ... n3 of a step and row are in Q4K the scales and least values of its two
blocks, in Q3 the scales of its four parts. A u16, number 16 * p + lane of the first two lines of
scales, holds n0 in bits 0-5, n1 in bits 8-13, the lowest two bits of n2 in bits 6-7, those of n3 in
bits 14-15; the u8 number 16 * p + lane of the third line holds the upper four bits of n2, then
those of n3. Q6 has a scale for each part: int8 number 64 * p + 16 * part + lane. Q2 has a u32,
number 16 * p + lane, of eight nibbles, lowest first: the scales of parts 0 and 2, their least
values, then the same of parts 1 and 3.

Codes: byte 4 * lane + i of a line is about column i of four; the lines of a block or part are

* Q4K, a block: as in Q4. Four lines; line j has columns 8 * j + i low, 8 * j + 4 + i high.
* Q6, a part: three lines. Line j has columns 4 * j + i in its low six bits; the upper two bits of
  lines 0, 1, 2 are bits 0-1, 2-3, 4-5 of columns 12 + i.
* Q3, a block: three lines. Line j has columns 8 * j + i in bits 0-2, 8 * j + 4 + i in bits 3-5.
  Bits 6-7 of lines 0 and 1 are the lowest two bits of columns 24 + i and 28 + i, whose highest bits
  are bits 6 and 7 of line 2.
* Q2, a part: one line. Columns 4 * j + i are in bits 2 * j and 2 * j + 1.
* IQ2, a block: two lines. Byte 4 * lane + i of the first is the number of a point of the lattice,
  which gives the magnitudes of columns 8 * i ... 8 * i + 7. In the second bits 2, 5, 3, 4, 6, 1, 0
  are the signs of the columns but the seventh (1: minus); the number of minus signs is even. Bits
  7, for i = 0 ... 3, are the four bits of the scale of the block, lowest first.
  The value is d * (2 * scale + 1) * signed magnitude (d of ggml is eight times as much).
"""

from localv4.kernels.packed import PackedFormat

SUPERBLOCK = 256
STEP = 64  # columns
STEPS = SUPERBLOCK // STEP

Q4K = PackedFormat("Q4K", SUPERBLOCK, 36 * 64, SUPERBLOCK)
Q6 = PackedFormat("Q6", SUPERBLOCK, 53 * 64, SUPERBLOCK)
Q3 = PackedFormat("Q3", SUPERBLOCK, 28 * 64, SUPERBLOCK)
Q2 = PackedFormat("Q2", SUPERBLOCK, 21 * 64, SUPERBLOCK)
IQ2 = PackedFormat("IQ2", SUPERBLOCK, 17 * 64, SUPERBLOCK)
KQUANTS = (Q4K, Q6, Q3, Q2, IQ2)
