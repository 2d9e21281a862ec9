"""Operations that run at the same time as one launch: a kernel made of the bodies of theirs.

A recorded graph starts a kernel that follows another one, and nothing else, long before it is its
turn (`let_follow` in common.cuh). Where operations run side by side, each a launch of its own, that
is lost twice: where they begin and where they end. As one launch they cost what one costs.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import TypeVar

from localv4.cuda.gpu import Launch
from localv4.cuda.twin import BESIDE, MERGED_THREADS, Kernel

Item = TypeVar("Item")

NAME = "merged"

MOST = 64
"""Operations of a launch, whose words are its parameters: 12 KiB of the 32 that there may be."""


def merge(launches: Sequence[Launch]) -> list[Launch]:
    """Return as few launches as possible that do what some do which may run at the same time.

    What has few blocks comes first: begun last, they would end behind all others.
    """
    blocks: dict[Kernel, int] = {}
    for launch in launches:
        blocks[launch.kernel] = blocks.get(launch.kernel, 0) + launch.blocks
    ordered = sorted(launches, key=lambda launch: (blocks[launch.kernel], launch.kernel.name))
    parts = [ordered[first : first + MOST] for first in range(0, len(ordered), MOST)]
    return [_merged(part) if len(part) > 1 else part[0] for part in parts]


def _merged(launches: Sequence[Launch]) -> Launch:
    words: list[int] = []
    blocks = 0
    for launch in launches:
        own = list(launch.words)
        own[BESIDE : BESIDE + 2] = [blocks, blocks + launch.blocks]
        words += own
        blocks += launch.blocks
    kernels = [launch.kernel for launch in launches]
    names = tuple((kernel.source, kernel.name) for kernel in kernels)
    source = _source(names, min(kernel.joins for kernel in kernels))
    shared = max(launch.shared for launch in launches)
    kernel = Kernel(source, NAME, MERGED_THREADS, lambda _: blocks, lambda _: shared)
    return Launch(kernel, blocks, shared, tuple(words))


@cache
def _source(names: tuple[tuple[str, str], ...], together: int) -> str:
    """Return the text of a kernel for operations of these files and names, in this order."""
    files = _unique(source for source, _ in names)
    cases = []
    for source, name in _unique(names):
        end = len(names) - names[::-1].index((source, name))
        cases.append(f"    if (i < {end}) return {name}_merged(all.ops[i]);")
    return "\n".join(
        [
            "#define MERGED",
            *(f'#include "{source}"' for source in files),
            f"struct Merged {{ Words ops[{len(names)}]; }};",
            f'extern "C" __global__ void __launch_bounds__({MERGED_THREADS}, {together})',
            f"{NAME}(const __grid_constant__ Merged all) {{",
            "    let_follow();",
            "    int i = 0;",
            f"    while ((int)blockIdx.x >= all.ops[i].words[{BESIDE + 1}]) ++i;",
            *cases,
            "}",
            "",
        ]
    )


def _unique(items: Iterable[Item]) -> list[Item]:
    """Return the items once each, in order."""
    return list(dict.fromkeys(items))
