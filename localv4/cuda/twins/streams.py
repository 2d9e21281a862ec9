"""Twins of the hyper-connections (`kernels.streams`, `kernels.mixes`)."""

from localv4.cuda.twin import Kernel, Twin, Words

COLUMNS = 128
"""Columns of a stream that a block of threads takes."""

TOGETHER = 8
"""Tokens that share a piece of the matrix, where there are so many."""

ONE_THREADS, MANY_THREADS, ENTER_THREADS, MIX_THREADS = 512, 256, 1024, 256

ENTER_KINDS = "aaaifaafaiaaaaiiii"


def _one_blocks(words: Words) -> int:
    tokens, hidden = words[9], words[11]
    return tokens * (hidden // COLUMNS) if tokens < TOGETHER else 0


def _many_blocks(words: Words) -> int:
    tokens, hidden = words[9], words[11]
    return -(-tokens // TOGETHER) * (hidden // COLUMNS) if tokens >= TOGETHER else 0


def _parts(tokens: int, hidden: int) -> int:
    """Return how many blocks write a row of x: several where few tokens leave most of them idle."""
    return max(1, hidden // 1024) if tokens < TOGETHER else 1


def _entering(words: Words) -> int:
    return words[15] * _parts(words[15], words[17])


def _entering_head(words: Words) -> int:
    return words[13] * _parts(words[13], words[15])


def _piece_bytes(words: Words) -> int:
    return 4 * COLUMNS * words[10]


def _pieces_bytes(words: Words) -> int:
    return TOGETHER * _piece_bytes(words)


STREAMS = {
    "streams.leave_and_mix": Twin(
        "aaaiaaiaiii",
        (
            Kernel("streams.cu", "leave_and_mix_one", ONE_THREADS, _one_blocks, _piece_bytes),
            Kernel("streams.cu", "leave_and_mix", MANY_THREADS, _many_blocks, _pieces_bytes),
        ),
    ),
    "mixes.enter": Twin(
        ENTER_KINDS,
        (
            Kernel(
                *("streams.cu", "enter", ENTER_THREADS),
                _entering,
                lambda words: 4 * words[17],
            ),
        ),
        rest=Twin(
            ENTER_KINDS,
            (Kernel("streams.cu", "enter_mix", MIX_THREADS, lambda words: words[15], joins=4),),
        ),
    ),
    "mixes.enter_head": Twin(
        "aaafaafaiaaaiii",
        (
            Kernel(
                *("streams.cu", "enter_head", ENTER_THREADS),
                _entering_head,
                lambda words: 4 * words[15],
            ),
        ),
    ),
}
