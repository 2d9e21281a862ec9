"""How the kernels read the packed integer formats: one description for each."""

from collections.abc import Callable
from dataclasses import dataclass

from localv4.kernels import packed
from localv4.kernels.device import device
from localv4.kernels.packed import MX4, Q4, Q8, PackedFormat
from localv4.kernels.simd import Vector, load_e8m0, load_f16, prefetch, prefetch_far
from localv4.kernels.simd_blocks import (
    add_byte_dots,
    add_code_dots,
    mx4_codes,
    q4_codes,
    q8_bytes,
)

HEAD_BYTES = 64
"""Bytes of the scales at the start of a superblock."""

# How far ahead of its reads a kernel asks for memory, in the second and then in the first cache.
# The hardware alone leaves 10 to 20 % of the bandwidth unused; requests for the first cache alone
# run out of its few line buffers.
FAR_BYTES, NEAR_BYTES = 3264, 1088

# The same where two streams of integer weights are decoded at a time: with more on its way than
# these two hold, a core loses up to 8 % of its bandwidth.
PAIR_FAR_BYTES, PAIR_NEAR_BYTES = 2176, 1632


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """How to read a superblock: `blocks` blocks of 32 columns of sixteen rows.

    `decode(address)` yields the eight vectors of a block, `add_dots(acc, vectors, q)` adds their
    products with 32 int8, `load_scale(address)` reads the sixteen scales of a block; `factor`
    corrects what `decode` yields. `sum_offset` is where the buffer b of `kernels.activations`
    keeps the format's correction.
    """

    fmt: PackedFormat
    decode: Callable[[int], Vector]
    add_dots: Callable[[Vector, Vector, int], Vector]
    load_scale: Callable[[int], Vector]
    block_bytes: int
    scale_bytes: int
    sum_offset: int
    factor: float

    @property
    def blocks(self) -> int:
        """Number of blocks in a superblock."""
        return self.fmt.columns // packed.BLOCK


MX4_READER = Reader(MX4, mx4_codes, add_code_dots, load_e8m0, 256, 16, 0, 0.5)
Q4_READER = Reader(Q4, q4_codes, add_code_dots, load_f16, 256, 32, 0, 1.0)
Q8_READER = Reader(Q8, q8_bytes, add_byte_dots, load_f16, 512, 32, 4, 1.0)


@device
def prefetch_lines(address: int, count: int) -> None:
    """Ask for what will be needed soon after the `count` cache lines from an address."""
    for line in range(count):
        prefetch(address + NEAR_BYTES + 64 * line)
        prefetch_far(address + FAR_BYTES + 64 * line)


@device
def prefetch_pair_lines(address: int, count: int) -> None:
    """The same for one of two streams that are read at a time."""
    for line in range(count):
        prefetch(address + PAIR_NEAR_BYTES + 64 * line)
        prefetch_far(address + PAIR_FAR_BYTES + 64 * line)
