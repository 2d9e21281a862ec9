"""Twins of the operations on rows of activations (`kernels.rows`), and of rounding."""

from localv4.cuda.twin import Kernel, Twin, Words

THREADS = 256
SPAN = 1024
"""Columns of a row that a block of threads does (`rows.cu`)."""

ROUNDINGS = 12
"""The word of a rounding that has the number of those that it stands for."""

NORM_THREADS = 512
MOST_NORMS = 4096
"""Blocks of threads that norm rows in turn: more than run at the same time anywhere."""


def _spans(rows: int, cols: int) -> int:
    return rows * -(-cols // SPAN)


def _cleared(words: Words) -> int:
    return _spans(words[3], words[4])


def _rounded(words: Words) -> int:
    return max(1, words[ROUNDINGS]) * _spans(words[4], words[5])


def _gated(words: Words) -> int:
    return _spans(words[7], words[8])


def _normed(words: Words) -> int:
    return min(MOST_NORMS, words[10])


def _normed_bytes(words: Words) -> int:
    return 4 * words[11]


def _spread(words: Words) -> int:
    return _spans(words[3], words[4])


SPREAD = Twin("aiiiai", (Kernel("rows.cu", "spread", THREADS, _spread),))
"""Copies rows of x to each of several streams (rows, streams, columns) of an array."""

ROWS = {
    "rows.clear": Twin("aiii", (Kernel("rows.cu", "clear", THREADS, _cleared),)),
    "rows.norm": Twin(
        "aiafaiaaaii",
        (Kernel("rows.cu", "rows_norm", NORM_THREADS, _normed, _normed_bytes, joins=6),),
    ),
    "rows.swiglu": Twin("aaiaifii", (Kernel("rows.cu", "swiglu", THREADS, _gated),)),
    "single_token.quantize": Twin(
        "aiaiiaaai",
        (Kernel("rows.cu", "quantize", THREADS, _rounded, joins=6),),
        series=ROUNDINGS,
    ),
}
