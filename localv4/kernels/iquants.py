"""Rows of the ggml I-quants with superblocks of 256 values: IQ4_XS and IQ2_XXS.

Products are taken in float32 in the order of gguf-py, so that results are equal to the bit.
"""

import numpy as np
from numpy.typing import NDArray

from localv4.kernels.device import device
from localv4.kernels.floats import f16_at
from localv4.kernels.quants import decode_iq4_nibbles

SUPERBLOCK = 256
IQ4_XS_BYTES = 136
IQ2_XXS_BYTES = 66

# The E8 lattice points of IQ2_XXS (ggml `iq2xxs_grid`): each word holds eight 2-bit digits, lowest
# first; the digits 0, 1, 2 stand for the magnitudes 8, 25, 43.
GRID_MAGNITUDES = np.array([8, 25, 43], np.float32)
GRID_WORDS = """
0000 0002 0005 0008 000a 0011 0014 0020 0022 0028 002a 0041 0044 0050 0058 0061
0064 0080 0082 008a 00a2 0101 0104 0110 0115 0140 0184 0198 0200 0202 0222 0282
0401 0404 0410 0421 0424 0440 0442 0448 0460 0481 0484 0490 04a4 0500 0502 0508
0520 0546 0569 0580 0591 0609 0610 0640 0684 06a4 0800 0805 0808 0814 0828 0841
0844 0850 0852 0888 0904 0940 0a02 0a14 1001 1004 1010 1021 1040 1060 1084 1090
1095 1100 1108 1120 1150 115a 1180 1224 1245 1400 1408 1420 1425 1449 1480 1518
1562 1600 1616 1801 1804 1810 1840 1881 1900 1905 19a0 1a51 2000 2002 200a 2044
2061 2080 2082 2129 2148 2200 2202 2401 2404 2410 2440 2456 2500 2541 2564 2690
2808 2820 2894 2a44 4001 4004 4010 4018 4021 4024 4040 4048 4056 4060 4081 4084
4090 4100 4120 4161 4180 4185 4201 4210 4248 4256 4268 4400 4408 4420 4480 4499
4512 4524 4600 4801 4804 4810 4840 4845 4900 4958 4961 4982 4a45 4a90 5000 5008
5011 5019 5020 5080 5088 5104 5142 51a4 5291 5490 5492 550a 5601 5654 5800 5811
5819 5864 5940 5a08 6004 6010 6040 6068 6100 6155 6218 6260 6400 6405 6510 6512
6584 6842 8000 8002 800a 8041 8082 8104 8118 8140 8211 8401 8404 8410 8415 8440
8460 8500 8546 8594 8609 8640 8660 8802 8904 8a11 9004 9010 9024 9040 90a1 9116
9180 9245 9400 9422 9444 9551 9881 9920 a002 a050 a085 a109 a200 a418 a850 a904
"""


def _grid() -> NDArray[np.float32]:
    """Return the lattice points (256, 8) f32."""
    words = np.array([int(word, 16) for word in GRID_WORDS.split()])
    points: NDArray[np.float32] = GRID_MAGNITUDES[(words[:, None] >> np.arange(0, 16, 2)) & 3]
    return points


GRID = _grid()


@device
def decode_iq4_xs(out: NDArray[np.float32], raw: NDArray[np.uint8]) -> None:
    """out (cols,) f32 from superblocks: d f16, 2 B + 4 B of 6-bit scales, 128 B of nibbles."""
    for block in range(out.size // SUPERBLOCK):
        at = IQ4_XS_BYTES * block
        factor = f16_at(raw, at)
        for group in range(8):
            low = raw[at + 4 + (group >> 1)] >> np.uint8(4 * (group & 1))
            high = raw[at + 2 + (group >> 2)] >> np.uint8(2 * (group & 3))
            joined = np.int32((low & np.uint8(15)) | ((high & np.uint8(3)) << np.uint8(4)))
            step = factor * np.float32(np.int32(joined - np.int32(32)))
            start = SUPERBLOCK * block + 32 * group
            decode_iq4_nibbles(out, start, raw, at + 8 + 16 * group, step)


@device
def decode_iq2_xxs(out: NDArray[np.float32], raw: NDArray[np.uint8]) -> None:
    """out (cols,) f32 from superblocks: d f16, then 8 groups of 4 grid indices and a u32.

    The u32 holds four sign patterns of 7 bits (an eighth makes the number of minus signs even) and
    the 4-bit scale of the group.
    """
    for block in range(out.size // SUPERBLOCK):
        at = IQ2_XXS_BYTES * block
        factor = f16_at(raw, at)
        for group in range(8):
            points = at + 2 + 8 * group
            word = _u32_at(raw, points + 4)
            step = factor * (np.float32(0.5) + np.float32(np.int32(word >> np.uint32(28))))
            step = step * np.float32(0.25)
            for k in range(4):
                signs = _even_signs((word >> np.uint32(7 * k)) & np.uint32(127))
                point = GRID[raw[points + k]]
                start = SUPERBLOCK * block + 32 * group + 8 * k
                for j in range(8):
                    value = step * point[j]
                    negative = (signs >> np.uint32(j)) & np.uint32(1)
                    out[start + j] = -value if negative else value


@device
def _u32_at(raw: NDArray[np.uint8], at: int) -> np.uint32:
    low = np.uint32(raw[at]) | (np.uint32(raw[at + 1]) << np.uint32(8))
    high = np.uint32(raw[at + 2]) | (np.uint32(raw[at + 3]) << np.uint32(8))
    return np.uint32(low | (high << np.uint32(16)))


@device
def _even_signs(pattern: np.uint32) -> np.uint32:
    """Return the 7 sign bits with an eighth that makes their number even."""
    folded = pattern ^ (pattern >> np.uint32(4))
    folded = folded ^ (folded >> np.uint32(2))
    parity = (folded ^ (folded >> np.uint32(1))) & np.uint32(1)
    return np.uint32(pattern | (parity << np.uint32(7)))
