"""Twins of the products of one token with packed floats (`kernels.float_operations`)."""

from collections.abc import Callable

from localv4.cuda.twin import BESIDE, Kernel, Twin, Words
from localv4.kernels.packed import GROUP_ROWS

SOURCE = "float_matvec.cu"
KINDS = "aiiaaaa"

SIZES = {"_few": 1024, "_some": 512, "_short": 128, "": 256}
"""Threads for a group, by the name of the kernel."""

FEW_GROUPS, SOME_GROUPS = 132, 264
"""Row groups up to which a group gets more threads: those that a large GPU has at a time."""

SHORT_COLUMNS = 1024
"""Columns up to which a group of many gets fewer threads, lest they have nothing to load."""


def _size(words: Words) -> str:
    """Return which kernel suits the row groups and columns of a matrix.

    Beside others, whose blocks keep a GPU busy, too, it is the one that can be merged with them.
    """
    if words[BESIDE] > 1:
        return ""
    if words[2] <= FEW_GROUPS:
        return "_few"
    if words[2] <= SOME_GROUPS:
        return "_some"
    return "_short" if words[3] <= SHORT_COLUMNS else ""


def _kernel(name: str, size: str) -> Kernel:
    def blocks(words: Words) -> int:
        return words[2] if _size(words) == size else 0

    return Kernel(SOURCE, f"{name}_matvec{size}", SIZES[size], blocks, joins=0 if size else 3)


def _weights(nbytes: int) -> Callable[[Words], int]:
    """Return what tells the bytes of a matrix whose numbers have so many."""
    return lambda words: nbytes * GROUP_ROWS * words[2] * words[3]


FLOAT_PRODUCTS = {
    f"float_operations.{name}_matvec": Twin(
        KINDS, tuple(_kernel(name, size) for size in SIZES), weights=_weights(nbytes)
    )
    for name, nbytes in (("f8", 1), ("b16", 2), ("f32r", 4))
}
