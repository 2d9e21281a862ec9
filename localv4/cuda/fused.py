"""Operations of one token that follow each other as one: what a block of threads has left in its
registers the next operation takes from there, and a step less is waited for."""

from collections.abc import Sequence

from localv4.cuda.twin import Twin, Words
from localv4.cuda.twins.attention import ATTENTION, SOFTMAX_ROUNDED
from localv4.cuda.twins.rows import ROWS
from localv4.kernels.activations import row_bytes

Operation = tuple[Twin, Words]
"""A twin and all words of its operation, those for the CPU."""

Group = Sequence[Operation]
"""Operations that may run at the same time."""

QUANTIZE = ROWS["single_token.quantize"]
SOFTMAX = ATTENTION["attend_keys.attend_softmax"]
VALUES = tuple(twin for name, twin in ATTENTION.items() if name.endswith("_attend_values"))

CHANNELS = 256
"""Of a head, that a block of threads of `attend_softmax` has."""


def fused(groups: Sequence[Group]) -> list[Group]:
    """Return the groups, those that can be one in the place of two or more neighbours."""
    result: list[Group] = []
    for group in groups:
        result.append(group)
        if len(result) > 2 and (together := _softmax_and_round(*result[-3:])) is not None:
            result[-3:] = [together]
    return result


def _softmax_and_round(first: Group, second: Group, third: Group) -> Group | None:
    """Return a softmax that rounds its output, which is what comes two groups later.

    In between is the operation that says where the output is; it has nothing to do on a GPU.
    """
    (softmax, words), (values, others) = first[0], second[0]
    if softmax is not SOFTMAX or values not in VALUES or len(first) + len(second) > 2:
        return None
    heads, n, x = words[5], words[6], others[11]
    parts = [given for twin, given in third if twin is QUANTIZE and given[3] == 0]
    cols = parts[0][5] if parts else 0
    if len(parts) < len(third) or n % CHANNELS or cols % n or cols * len(parts) != heads * n:
        return None
    starts, steps = (x, *parts[0][6:9]), (4 * cols, *row_bytes(cols))
    for number, given in enumerate(parts):
        expected = [start + number * step for start, step in zip(starts, steps, strict=True)]
        if [given[1], *given[6:9]] != expected:
            return None
    return [(SOFTMAX_ROUNDED, [*words[:10], x, *starts[1:], cols, *words[15:]])]
