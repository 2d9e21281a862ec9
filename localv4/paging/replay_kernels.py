"""Caches of several sizes that see the same tokens: compiled, since a trace has millions of uses.

A cache has a list of its members and, for each expert, its place in that list or -1. All arrays of
caches have one row for each of them.
"""

from typing import Any

import numpy as np

from localv4.kernels.compiler import kernel
from localv4.kernels.device import device
from localv4.paging.uses import GUARD_TOKENS

Array = Any

FAMILY = "replay"
NEVER = 1 << 40

RECENT, HOT, NEXT = 0, 1, 2
"""What makes an expert worth keeping: its last use, its score, or its next use."""


@kernel("void(i8[:, :, ::1], i2[:, :, ::1], b1[::1], i8)", family=FAMILY)
def find_next_uses(out: Array, chosen: Array, is_prompt: Array, experts: int) -> None:
    """out (tokens, layers, k) = when the same expert is used next, far away if it is not.

    When: token x layers + layer. Tokens of prompts do not count: their experts pass by the cache.
    """
    tokens, layers, k = chosen.shape
    upcoming = np.full((layers, experts), NEVER, np.int64)
    for t in range(tokens - 1, -1, -1):
        for layer in range(layers):
            for i in range(k):
                number = chosen[t, layer, i]
                out[t, layer, i] = upcoming[layer, number]
                if not is_prompt[t]:
                    upcoming[layer, number] = t * layers + layer


@kernel(
    "void(i2[:, ::1], i8, f4[:, ::1], i8[:, ::1], f4[::1], i8, i8[:, ::1], i8[:, ::1], i8[::1],"
    " i8[::1], i8[::1], i8[::1], i4[:, ::1], i4[:, ::1], i8[:, ::1])",
    family=FAMILY,
)
def decode_token(
    chosen: Array,
    kind: int,
    heat: Array,
    last: Array,
    decay: Array,
    clock: int,
    next_uses: Array,
    upcoming: Array,
    nbytes: Array,
    capacity: Array,
    held: Array,
    count: Array,
    members: Array,
    places: Array,
    misses: Array,
) -> None:
    """Let all caches serve the experts of one token, layer by layer, and count their misses.

    chosen, next_uses (layers, k); heat, last (layers, experts), decay and clock as in `uses.Uses`;
    upcoming (layers, experts) is the next use of each; nbytes (layers,); capacity, held and count
    (caches,) are bytes allowed, bytes and number of members; members and places (caches, layers x
    experts); misses (caches, layers).
    """
    layers, k = chosen.shape
    experts = heat.shape[1]
    smallest = nbytes.min()
    wanted = np.empty(k, np.int64)
    for layer in range(layers):
        for i in range(k):
            wanted[i] = layer * experts + chosen[layer, i]
            use(chosen[layer, i], heat[layer], last[layer], decay, clock)
            upcoming[layer, chosen[layer, i]] = next_uses[layer, i]
        for cache in range(len(capacity)):
            absent = 0
            for key in wanted:
                absent += places[cache, key] < 0
            if absent == 0:
                continue
            misses[cache, layer] += absent
            excess = held[cache] + absent * nbytes[layer] - capacity[cache]
            for tier in range(2):
                if excess > 0:
                    lowest = choose(
                        tier, excess, kind, wanted, heat.ravel(), last.ravel(), decay, clock,
                        upcoming.ravel(), smallest, members[cache, : count[cache]],
                    )  # fmt: skip
                    for key in lowest:
                        if excess > 0:
                            size = nbytes[key // experts]
                            excess -= size
                            held[cache] -= size
                            count[cache] -= 1
                            remove(key, count[cache], members[cache], places[cache])
            for key in wanted:
                if places[cache, key] < 0:
                    places[cache, key] = count[cache]
                    members[cache, count[cache]] = key
                    count[cache] += 1
                    held[cache] += nbytes[layer]


@device
def use(number: int, heat: Array, last: Array, decay: Array, clock: int) -> None:
    """Note a use, as `uses.Uses.record` does."""
    age = min(clock - last[number], len(decay) - 1)
    heat[number] = heat[number] * decay[age] + np.float32(1)
    last[number] = clock


@device
def remove(key: int, end: int, members: Array, places: Array) -> None:
    """Take a member out of the list, whose last one (at `end`) gets its place."""
    place = places[key]
    places[key] = -1
    moved = members[end]
    if moved != key:
        members[place] = moved
        places[moved] = place


@device
def choose(
    tier: int,
    need: int,
    kind: int,
    wanted: Array,
    heat: Array,
    last: Array,
    decay: Array,
    clock: int,
    upcoming: Array,
    smallest: int,
    members: Array,
) -> Array:
    """Return the members that are worth least, the least first: enough to free `need` bytes.

    Tier 0 are those that no recent token used, tier 1 the others; with the knowledge of the future
    recent uses mean nothing, and all are of tier 0. Members that the layer wants are of no tier.
    heat, last, upcoming (layers x experts,) are flat here, and `wanted` are keys.
    """
    most = min(len(members), -(-need // smallest))
    worths = np.empty(most, np.float64)
    lowest = np.empty(most, np.int64)
    found = 0
    oldest = np.int64(len(decay) - 1)
    for member in members:
        key = np.uint32(member)  # not negative: no wrapping around of indices
        if kind == NEXT:
            if tier == 1:
                break
            worth = -np.float64(upcoming[key])
        else:
            age = clock - last[key]
            if (age < GUARD_TOKENS) != (tier == 1):
                continue
            if kind == HOT:
                worth = np.float64(heat[key] * decay[min(age, oldest)])
            else:
                worth = -np.float64(age)
        if (found < most or worth <= worths[found - 1]) and not contains(wanted, member):
            found = insert(member, worth, lowest, worths, found)
    return lowest[:found]


@device
def contains(numbers: Array, number: int) -> bool:
    """Say whether one of a few numbers is `number`."""
    found = False
    for other in numbers:
        found |= other == number
    return found


@device
def insert(key: int, worth: float, keys: Array, worths: Array, count: int) -> int:
    """Keep the lowest in ascending order, the lower key first among equals; return how many."""
    at = count if count < len(keys) else len(keys)
    while at > 0 and (worths[at - 1] > worth or (worths[at - 1] == worth and keys[at - 1] > key)):
        at -= 1
    if at == len(keys):
        return count
    end = min(count, len(keys) - 1)
    for i in range(end, at, -1):
        keys[i], worths[i] = keys[i - 1], worths[i - 1]
    keys[at], worths[at] = key, worth
    return end + 1
