"""Twins of the router (`kernels.route`)."""

from localv4.cuda.twin import Kernel, Twin, Words

MOST_EXPERTS = 1024
"""Threads that sort experts, one for each."""

ROUTE_THREADS = 1024

COUNTING = "iiiiii"
"""The kinds of the words by which the CPU counts uses and halts: they mean nothing to the GPU."""


def _one(words: Words) -> int:
    return 1


ROUTER = {
    "route.route": Twin(
        "aiiaaaifaai", (Kernel("router.cu", "route", ROUTE_THREADS, lambda words: words[11]),)
    ),
    "route.resolve": Twin("aitaia" + COUNTING, (Kernel("router.cu", "resolve", 32, _one),)),
    "route.group": Twin(
        "aitaia" + COUNTING + "iaaaai", (Kernel("router.cu", "group", MOST_EXPERTS, _one),)
    ),
}
