"""Twins of the operations on rows of activations (`kernels.rows`), and of rounding."""

from localv4.cuda.twin import Kernel, Twin, Words

THREADS = 256
MOST_BLOCKS = 2048
"""Blocks of threads that go through rows in turn: more than run at the same time anywhere."""

NORM_THREADS = 512


def _blocks_for(values: int) -> int:
    return min(MOST_BLOCKS, -(-values // THREADS))


def _cleared(words: Words) -> int:
    return _blocks_for(words[3] * words[4])


def _rounded(words: Words) -> int:
    return _blocks_for(words[4] * words[5])


def _gated(words: Words) -> int:
    return _blocks_for(words[7] * words[8])


def _normed(words: Words) -> int:
    return min(MOST_BLOCKS, words[10])


ROWS = {
    "rows.clear": Twin("aiii", (Kernel("rows.cu", "clear", THREADS, _cleared),)),
    "rows.norm": Twin("aiafaiaaaii", (Kernel("rows.cu", "rows_norm", NORM_THREADS, _normed),)),
    "rows.swiglu": Twin("aaiaifii", (Kernel("rows.cu", "swiglu", THREADS, _gated),)),
    "single_token.quantize": Twin("aiaiiaaa", (Kernel("rows.cu", "quantize", THREADS, _rounded),)),
}
