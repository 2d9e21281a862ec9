"""Twins of attention (`kernels.attend`, `kernels.attend_keys`).

For one token `attend_query`, `attend_scores` and `attend_softmax` do all the work, in memory that
belongs to the CPU's scratch memory (`attention.cu` has its layout). That itself is not used.
"""

from localv4.cuda.twin import Kernel, Twin, Words

HEADS = 16
"""Heads of a tile."""

THREADS = 256
"""For a tile of heads: a warp for 64 of up to 512 channels."""

SPLITS, KEYS = 32, 16
"""Parts of the keys of one token, and the least keys of a part."""

FORMATS = ("f32", "bf16", "compact")


def _tiles(heads: int) -> int:
    return -(-heads // HEADS)


def _scratch_bytes(heads: int, n: int) -> int:
    rows = HEADS * _tiles(heads)
    return 64 + 4 * rows * n + SPLITS * rows * (8 + 4 * n)


def _parts(words: Words) -> int:
    """Return how many parts the keys can have at most, as far as the words tell."""
    span, ratio, chosen, top_k = words[2], words[3], words[5], words[6]
    if ratio != 0 and chosen == 0:
        return SPLITS
    return min(SPLITS, -(-(span + (top_k if ratio else 0)) // KEYS))


def _query() -> Twin:
    kernel = Kernel(
        *("attention.cu", "attend_query", 32),
        lambda words: HEADS * _tiles(words[2]),
        scratch=lambda words: _scratch_bytes(words[2], words[3]),
        joins=4,
    )
    return Twin("aiiaaifii", (kernel,), owner=8)


def _scores(name: str) -> Twin:
    kernel = Kernel(
        *("attention.cu", f"{name}_attend_scores", THREADS),
        lambda words: _tiles(words[10]) * _parts(words),
        scratch=lambda words: _scratch_bytes(words[10], words[11]),
    )
    return Twin("aiiaaicic" + "iiii", (kernel,), owner=12)


def _softmax(name: str, *more: str) -> Twin:
    kernel = Kernel(
        *("attention.cu", name, 128),
        lambda words: words[5] * -(-words[6] // 256),
        scratch=lambda words: _scratch_bytes(words[5], words[6]),
    )
    return Twin("aiiaiiaii" + "".join(more), (kernel,), owner=8)


def _many(name: str) -> Twin:
    kernel = Kernel(
        *("attention_chunk.cu", f"{name}_attend", THREADS),
        lambda words: words[12] * _tiles(words[13]),
    )
    return Twin("aiiaaicic" + "aiiiiaaifaii", (kernel,))


ATTENTION = {
    "attend_keys.attend_query": _query(),
    "attend_keys.attend_softmax": _softmax("attend_softmax"),
    **{f"row_operations.{name}_attend_scores": _scores(name) for name in FORMATS},
    **{f"row_operations.{name}_attend_values": Twin("aiiaiiaaiia", ()) for name in FORMATS},
    **{f"row_operations.{name}_attend": _many(name) for name in FORMATS},
}

SOFTMAX_ROUNDED = _softmax("attend_softmax_rounded", "a", "aaai")
"""A softmax whose output is rounded in parts: more words are the output, q, d and b of the parts,
which are the rows of one buffer, and their columns. A head has a multiple of 256 channels."""
