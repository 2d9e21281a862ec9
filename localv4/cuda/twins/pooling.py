"""Twins of what puts keys into the state (`kernels.pooling`; `angles`, `key` of `kernels.rows`)."""

from localv4.cuda.twin import Kernel, Twin, Words

THREADS = 256
POOL_THREADS = 256


def _angle_blocks(words: Words) -> int:
    return -(-words[2] * words[6] // THREADS)


def _append_blocks(words: Words) -> int:
    return -(-words[9] * words[11] // THREADS)


def _pool_blocks(words: Words) -> int:
    """Return how many entries the tokens can complete at most, wherever they start."""
    ratio, tokens = words[5], words[13]
    return -(-tokens // ratio)


def _pool(name: str) -> Twin:
    return Twin("cciiiafaiciai", (Kernel("pooling.cu", name, POOL_THREADS, _pool_blocks, joins=4),))


POOLING = {
    "rows.angles": Twin(
        "aiaaai", (Kernel("pooling.cu", "angles", THREADS, _angle_blocks, joins=4),)
    ),
    "rows.key": Twin(
        "aiafaaiciiai", (Kernel("pooling.cu", "key", THREADS, lambda words: words[12], joins=6),)
    ),
    "pooling.append": Twin(
        "aaiaicciiai", (Kernel("pooling.cu", "append", THREADS, _append_blocks, joins=6),)
    ),
    **{
        f"row_operations.{name}": _pool(name)
        for name in ("f32_pool", "bf16_pool", "compact_pool", "compact_index_pool")
    },
}
