"""One operation of a program: its words, and how members share its work."""

import numpy as np

from localv4.kernels.device import device
from localv4.kernels.memory import atomic_add, atomic_load
from localv4.kernels.simd import read_u32

WORDS = 17
INPUTS, ALONGSIDE, COUNTER = 14, 15, 16
QUANTIZE, MATVEC, GATE_UP, DOWN, STORED = range(5)
TILES, FLOAT_TILES, GEMM, GEMM_GATE_UP, GEMM_DOWN = range(5, 10)

# indices into `packed.FORMATS`, as constants of the compiler
MX4, Q4, Q8, F8 = range(4)

LARGEST_CHUNK = 16
"""Row groups that a member takes at once: enough for the prefetchers to get going."""


@device
def word(operation: int, index: int) -> int:
    """Return a word of an operation."""
    value: int = atomic_load(operation + 8 * index)
    return value


@device
def float_at(address: int) -> np.float32:
    """Return the f32 at an address."""
    value: np.float32 = np.uint32(read_u32(address)).view(np.float32)
    return value


@device
def take_chunk(operation: int) -> int:
    """Return the number of a chunk that nobody else has taken."""
    taken: int = atomic_add(operation + 8 * COUNTER, 1)
    return taken


@device
def chunk_groups(groups: int, members: int) -> int:
    """Return how many row groups make a chunk: at least four chunks for each member."""
    return max(1, min(LARGEST_CHUNK, groups // (4 * members)))
