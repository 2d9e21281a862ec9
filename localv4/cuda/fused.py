"""Operations of one token in fewer and shorter steps.

Some that follow each other are one: what a block of threads has left in its registers or in shared
memory the next operation takes from there, and a step less is waited for. And experts that nobody
chooses, the shared one, do not wait for the choice of the others.
"""

from collections.abc import Callable, Sequence

from localv4.cuda.twin import Twin, Words
from localv4.cuda.twins.attention import ATTENTION, SOFTMAX_ROUNDED
from localv4.cuda.twins.products import KNOWN_GATE_UPS, PRODUCTS
from localv4.cuda.twins.router import ROUTE_AND_RESOLVE, ROUTER
from localv4.cuda.twins.rows import ROWS
from localv4.kernels.activations import row_bytes

Operation = tuple[Twin, Words]
"""A twin and all words of its operation, those for the CPU."""

Group = Sequence[Operation]
"""Operations that may run at the same time."""

QUANTIZE = ROWS["single_token.quantize"]
SOFTMAX = ATTENTION["attend_keys.attend_softmax"]
ROUTE, RESOLVE = ROUTER["route.route"], ROUTER["route.resolve"]
GATE_UPS = tuple(KNOWN_GATE_UPS)
MATVECS = tuple(twin for name, twin in PRODUCTS.items() if name.endswith("_matvec"))
DOWNS = tuple(twin for name, twin in PRODUCTS.items() if name.endswith("_down"))
VALUES = tuple(twin for name, twin in ATTENTION.items() if name.endswith("_attend_values"))

CHANNELS = 256
"""Of a head, that a block of threads of `attend_softmax` has."""


def fused(groups: Sequence[Group]) -> list[Group]:
    """Return the groups, with better ones in the place of some neighbours."""
    result: list[Group] = []
    for group in groups:
        result.append(group)
        for count, way in WAYS:
            if len(result) >= count and (better := way(*result[-count:])) is not None:
                result[-count:] = better
    return result


def _route_and_resolve(first: Group, second: Group) -> list[Group] | None:
    """Return the choice of one token's experts that looks them up."""
    (route, words), (resolve, others) = first[0], second[0]
    if len(first) + len(second) > 2 or route is not ROUTE or resolve is not RESOLVE:
        return None
    if words[11] != 1 or words[9] != others[1]:
        return None
    return [[(ROUTE_AND_RESOLVE, [*words[:12], *others[3:7], *words[16:]])]]


def _gate_up_earlier(first: Group, second: Group) -> list[Group] | None:
    """Let the experts that nobody chooses be computed while the others are chosen."""
    (twin, words), *more = first
    if more or twin is not ROUTE_AND_RESOLVE or not _are(second, GATE_UPS):
        return None
    start, end = words[15], words[15] + 8 * words[7] * words[14]
    chosen = [(each, own) for each, own in second if start <= own[1] < end]
    known = [
        (KNOWN_GATE_UPS[each], [*own[:10], 1, *own[11:]])
        for each, own in second
        if not start <= own[1] < end
    ]
    return [[*first, *known], chosen] if chosen and known else None


def _round_earlier(first: Group, second: Group) -> list[Group] | None:
    """Let hidden layers be rounded that are computed already."""
    if not _are(first, GATE_UPS) or not _are(second, (QUANTIZE,)):
        return None
    hidden = {words[8] for _, words in first}
    return _moved(first, second, [words[1] not in hidden for _, words in second])


def _down_earlier(first: Group, second: Group) -> list[Group] | None:
    """Let those hidden layers be multiplied with down that are rounded already."""
    if not _are(first, (QUANTIZE,)) or not _are(second, (*MATVECS, *DOWNS)):
        return None
    rounded = {words[6] for _, words in first}
    inputs = [words[4] if twin in MATVECS else words[5] for twin, words in second]
    return _moved(first, second, [q not in rounded for q in inputs])


def _are(group: Group, twins: Sequence[Twin]) -> bool:
    """Say whether a group has no other operations."""
    return all(twin in twins for twin, _ in group)


def _moved(first: Group, second: Group, moves: Sequence[bool]) -> list[Group] | None:
    """Return the groups when some operations of the second are in the first."""
    if all(moves) or not any(moves):
        return None
    earlier = [each for each, goes in zip(second, moves, strict=True) if goes]
    later = [each for each, goes in zip(second, moves, strict=True) if not goes]
    return [[*first, *earlier], later]


def _softmax_and_round(first: Group, second: Group, third: Group) -> list[Group] | None:
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
    return [[(SOFTMAX_ROUNDED, [*words[:10], x, *starts[1:], cols, *words[15:]])]]


WAYS: Sequence[tuple[int, Callable[..., list[Group] | None]]] = (
    (2, _route_and_resolve),
    (2, _gate_up_earlier),
    (2, _round_earlier),
    (2, _down_earlier),
    (3, _softmax_and_round),
)
"""How many neighbours become what, or stay as they are."""
