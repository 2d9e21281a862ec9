"""What asks for weights before the products that want them: only a GPU has that."""

from collections.abc import Sequence

from localv4.cuda.twin import Kernel, Range, Twin
from localv4.kernels.operation import WORDS

BLOCKS, THREADS = 128, 256

MOST_RANGES = 9
"""Ranges of memory of one operation."""

LINE = 16
"""Ranges are asked for by whole lines."""

FETCH_AHEAD = Twin(
    "ai" * MOST_RANGES,
    (Kernel("ahead.cu", "fetch_ahead", THREADS, lambda words: BLOCKS, joins=8),),
)
"""Words: addresses and bytes of ranges, no more behind an address of 0."""


def fetching(ranges: Sequence[Range]) -> list[int]:
    """Return all words of the operation for some ranges of memory."""
    pairs = [(address, nbytes // LINE * LINE) for address, nbytes in ranges[:MOST_RANGES]]
    words = [word for pair in pairs for word in pair]
    return [0, *words, *[0] * (WORDS - 1 - len(words))]
