"""How many threads the kernels use."""

import numba


def most_threads() -> int:
    """Return the largest number of threads that kernels can use in this process."""
    return int(numba.config.NUMBA_NUM_THREADS)


def use_threads(count: int) -> None:
    """Let kernels called from this Python thread use `count` threads, at most `most_threads()`."""
    numba.set_num_threads(min(count, most_threads()))
