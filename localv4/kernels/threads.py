"""How many threads the kernels use."""

import numba

from localv4.kernels.cores import quota, usable_cpus


def most_threads() -> int:
    """Return the largest number of threads that kernels can use in this process.

    That is NUMBA_NUM_THREADS, by default the number of logical processors that it may run on.
    """
    return int(numba.config.NUMBA_NUM_THREADS)


def default_threads() -> int:
    """Return the number of physical performance cores that this process may use.

    Never more than its quota of processor time allows without pauses, or `most_threads`.
    """
    fast = {cpu.core for cpu in usable_cpus() if cpu.is_fast}
    return max(1, int(min(len(fast), quota(), most_threads())))


def usable_processors() -> int:
    """Return how many logical processors this process may keep busy."""
    return max(1, int(min(len(usable_cpus()), quota())))


def use_threads(count: int) -> None:
    """Let kernels called from this Python thread use `count` threads, at most `most_threads()`."""
    numba.set_num_threads(min(count, most_threads()))
