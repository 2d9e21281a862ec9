"""Replay a trace through cache policies: what would have been read with this much memory?"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localv4.paging import replay_kernels as kernels
from localv4.paging.policy import make_policy
from localv4.paging.trace import Trace
from localv4.paging.uses import Uses

OPTIMAL = "optimal"
"""Belady's bound: give up what is needed again last. No policy that does not know the future can
reach it."""

_KINDS = {"decay": kernels.HOT, "lfu": kernels.HOT, "lru": kernels.RECENT, OPTIMAL: kernels.NEXT}

MOST_UNSCORED = 1000

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one policy does with one amount of memory for experts, per generated token.

    `hits` is the share of uses whose record was in memory; `hits_by_layer` the same by layer.
    """

    policy: str
    capacity_bytes: int
    resident: float  # share of all record bytes that fits
    hits: float
    misses: float
    bytes_read: float
    hits_by_layer: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Replay:
    """Outcomes by policy, of ascending capacities; `scored` tokens were counted."""

    outcomes: dict[str, tuple[Outcome, ...]]
    scored: int


def unscored(tokens: int) -> int:
    """Return how many tokens at the start fill the caches and are not counted."""
    return min(MOST_UNSCORED, tokens // 3)


def least_bytes(trace: Trace) -> int:
    """Return the least capacity that is replayed: what one token and a half uses."""
    return math.ceil(1.5 * trace.head.k * sum(trace.head.record_bytes))


def replay(
    trace: Trace,
    policies: Sequence[str],
    capacities: Sequence[int],
    on_progress: Progress | None = None,
) -> Replay:
    """Replay a trace with each of some policies (names, or OPTIMAL) and capacities in bytes.

    The first tokens fill the caches and are not counted, nor are those of prompts: they pass by
    the cache and choose what is in it when generating begins. Layers whose records have no bytes
    are left out. `on_progress(done, total)` counts tokens.
    """
    layers = np.flatnonzero(trace.head.record_bytes)
    chosen = np.ascontiguousarray(trace.chosen[:, layers])
    sizes = np.array(trace.head.record_bytes, np.int64)[layers]
    next_uses = np.empty(chosen.shape, np.int64)
    kernels.find_next_uses(next_uses, chosen, trace.is_prompt, trace.head.experts)
    start = unscored(len(chosen))
    scored = int(np.count_nonzero(~trace.is_prompt[start:]))
    outcomes = {}
    for number, policy in enumerate(policies):
        run = _Run(policy, trace.head.experts, sizes, sorted(capacities))
        for t in range(len(chosen)):
            if t == start:
                run.misses[:] = 0
            run.step(chosen, next_uses, trace.is_prompt, t)
            if on_progress is not None and t % 64 == 0:
                on_progress(number * len(chosen) + t, len(policies) * len(chosen))
        outcomes[policy] = run.outcomes(max(1, scored), chosen.shape[2])
    return Replay(outcomes, scored)


class _Run:
    """Caches of several capacities under one policy."""

    def __init__(
        self, policy: str, experts: int, nbytes: NDArray[np.int64], capacities: Sequence[int]
    ) -> None:
        layers, caches = len(nbytes), len(capacities)
        self.name, self.nbytes = policy, nbytes
        self.uses = Uses(layers, experts)
        self.policy = make_policy("lru" if policy == OPTIMAL else policy, self.uses)
        self.upcoming = np.full((layers, experts), kernels.NEVER, np.int64)
        self.capacity = np.array(capacities, np.int64)
        self.held, self.count = np.zeros(caches, np.int64), np.zeros(caches, np.int64)
        self.members = np.zeros((caches, layers * experts), np.int32)
        self.places = np.full((caches, layers * experts), -1, np.int32)
        self.misses = np.zeros((caches, layers), np.int64)

    def step(
        self,
        chosen: NDArray[np.int16],
        next_uses: NDArray[np.int64],
        is_prompt: NDArray[np.bool_],
        t: int,
    ) -> None:
        """Serve token t."""
        uses = self.uses
        uses.clock += 1
        if is_prompt[t]:
            for layer in range(len(self.nbytes)):
                uses.record(layer, chosen[t, layer])
                self.upcoming[layer, chosen[t, layer]] = next_uses[t, layer]
            if t + 1 == len(chosen) or not is_prompt[t + 1]:
                self._refill()
            return
        kernels.decode_token(
            *(chosen[t], _KINDS[self.name], uses.heat, uses.last, uses.decay, int(uses.clock[0])),
            *(next_uses[t], self.upcoming, self.nbytes, self.capacity, self.held, self.count),
            *(self.members, self.places, self.misses),
        )
        self.policy.observe(uses)

    def _refill(self) -> None:
        """Fill the caches after a prompt with what it used most; the optimum is fill by next use.

        A layer keeps as many records as it had, or its share of the capacity.
        """
        shape = self.uses.heat.shape
        worth = -self.upcoming.astype(float) if self.name == OPTIMAL else self.uses.scores()
        order = np.argsort(-worth, axis=1, kind="stable")
        ranks = np.argsort(order, axis=1)
        for cache, capacity in enumerate(self.capacity.tolist()):
            resident = self.places[cache].reshape(shape) >= 0
            share = capacity // int(self.nbytes.sum())
            # first the share of each layer, then the rest by worth as far as there is room
            quota = np.maximum(share, resident.sum(1))[:, None]
            first = np.where(ranks < quota, 0, 1) if self.name != OPTIMAL else np.zeros(shape)
            wanted = np.lexsort((-worth.ravel(), first.ravel()))
            sizes = np.repeat(self.nbytes, shape[1])[wanted]
            known = wanted[: int(np.searchsorted(np.cumsum(sizes), capacity, side="right"))]
            self.places[cache] = -1
            self.places[cache, known] = np.arange(len(known))
            self.members[cache, : len(known)] = known
            self.count[cache] = len(known)
            self.held[cache] = sizes[: len(known)].sum()

    def outcomes(self, tokens: int, k: int) -> tuple[Outcome, ...]:
        """Return what was counted over some tokens."""
        total = int(self.nbytes.sum()) * self.uses.heat.shape[1]
        missed = self.misses / tokens
        return tuple(
            Outcome(
                policy=self.name,
                capacity_bytes=capacity,
                resident=min(1.0, capacity / total),
                hits=1 - float(missed[cache].mean()) / k,
                misses=float(missed[cache].sum()),
                bytes_read=float(missed[cache] @ self.nbytes),
                hits_by_layer=tuple((1 - missed[cache] / k).tolist()),
            )
            for cache, capacity in enumerate(self.capacity.tolist())
        )
