"""Twins of the operations on rows of activations (`kernels.rows`)."""

from localv4.cuda.twin import Kernel, Twin, Words

THREADS = 256


def _blocks_of_values(words: Words) -> int:
    return -(-words[3] * words[4] // THREADS)


ROWS = {
    "rows.clear": Twin("aiii", (Kernel("rows.cu", "clear", THREADS, _blocks_of_values),)),
}
