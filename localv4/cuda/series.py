"""Operations side by side that do the same at addresses which are steadily apart, as one operation.

The parts of the grouped output projection are such: each of them alone leaves most of a GPU idle.
"""

from collections.abc import Callable, Sequence

import numpy as np

from localv4.cuda.fused import Group, Operation

IsSteady = Callable[[int, int, int], bool]
"""Says whether so many addresses from one on, so far apart, are as far apart on the GPU."""


def as_series(group: Sequence[Operation], is_steady: IsSteady) -> Group:
    """Return a group as one operation where its twin says how (`Twin.series`), else as it is."""
    twin, first = group[0]
    if len(group) == 1 or not twin.series or any(other is not twin for other, _ in group):
        return group
    steps = np.diff([words[1 : twin.series] for _, words in group], axis=0)
    arrays = [place for place, kind in enumerate(twin.kinds) if kind == "a"]
    if (steps != steps[0]).any() or np.delete(steps[0], arrays).any():
        return group
    distances = steps[0, arrays].tolist()
    starts = [first[1 + place] for place in arrays]
    if not all(map(is_steady, starts, distances, [len(group)] * len(arrays))):
        return group
    words = list(first)
    words[twin.series : twin.series + 1 + len(arrays)] = [len(group), *distances]
    return [(twin, words)]
