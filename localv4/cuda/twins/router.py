"""Twins of the router (`kernels.route`)."""

from localv4.cuda.twin import Kernel, Twin, Words

MOST_EXPERTS = 1024
"""Threads that sort experts, one for each."""

ROUTE_THREADS = 256

EXPERT_BYTES = 32
"""Shared memory for each expert while some are chosen (`Choice` in router.cu)."""

COUNTING = "iiiiii"
"""The kinds of the words by which the CPU counts uses and halts: they mean nothing to the GPU."""


def _one(words: Words) -> int:
    return 1


def _routed(words: Words) -> int:
    return words[11]


def _choice_bytes(words: Words) -> int:
    return EXPERT_BYTES * (words[3] + 1)


ROUTER = {
    "route.route": Twin(
        "aiiaaaifaai", (Kernel("router.cu", "route", ROUTE_THREADS, _routed, _choice_bytes),)
    ),
    "route.resolve": Twin("aitaia" + COUNTING, (Kernel("router.cu", "resolve", 32, _one),)),
    "route.group": Twin(
        "aitaia" + COUNTING + "iaaaai", (Kernel("router.cu", "group", MOST_EXPERTS, _one),)
    ),
}

ROUTE_AND_RESOLVE = Twin(
    "aiiaaaifaaitaia",
    (Kernel("router.cu", "route_and_resolve", ROUTE_THREADS, _routed, _choice_bytes, joins=4),),
)
"""Both of one token: words 12 ... 15 are words 3 ... 6 of `resolve`."""
