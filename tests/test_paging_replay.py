"""The compiled replay against a cache written down plainly, and what a bound must hold."""

from itertools import product

import numpy as np
import pytest

from localv4.paging.policy import make_policy
from localv4.paging.replay import OPTIMAL, least_bytes, replay, unscored
from localv4.paging.synthetic_routes import RECORD_BYTES, STYLES, synthetic_trace
from localv4.paging.trace import Trace, TraceHead
from localv4.paging.uses import Uses

LAYERS, EXPERTS, K = 4, 12, 3
SIZES = (20, 16, 20, 12)


def random_trace(
    seed: int, tokens: int, prompts: slice = slice(0), sizes: tuple[int, ...] = SIZES
) -> Trace:
    rng = np.random.default_rng(seed)
    likely = rng.random((len(sizes), EXPERTS)) ** 3
    keys = np.log(likely) - np.log(rng.exponential(size=(tokens, len(sizes), EXPERTS)))
    chosen = np.sort(np.argsort(-keys, axis=2)[:, :, :K], axis=2).astype(np.int16)
    is_prompt = np.zeros(tokens, bool)
    is_prompt[prompts] = True
    return Trace(TraceHead("", "random", len(sizes), EXPERTS, K, sizes), chosen, is_prompt)


def plain_misses(trace: Trace, name: str, capacity: int) -> float:
    """Bytes missed per scored token by a cache in plain Python that asks the policy itself."""
    sizes = np.array(trace.head.record_bytes)
    uses = Uses(len(sizes), EXPERTS)
    policy = make_policy(name, uses)
    resident = np.zeros((len(sizes), EXPERTS), bool)
    start, missed = unscored(len(trace.chosen)), 0
    for t, token in enumerate(trace.chosen):
        uses.clock += 1
        for layer, numbers in enumerate(token):
            uses.record(layer, numbers)
            absent = [n for n in numbers if not resident[layer, n]]
            missed += len(absent) * int(sizes[layer]) * (t >= start)
            if not absent:
                continue
            keep = np.zeros_like(resident)
            keep[layer, numbers] = True
            held = int((resident * sizes[:, None]).sum())
            need = held + len(absent) * int(sizes[layer]) - capacity
            for key in policy.victims(uses, resident, sizes, need, keep):
                resident[key] = False
            resident[layer, absent] = True
        policy.observe(uses)
    return missed / (len(trace.chosen) - start)


@pytest.mark.parametrize("name", ["lru", "lfu", "decay"])
@pytest.mark.parametrize("seed", range(3))
def test_the_replay_is_what_the_policy_does(name: str, seed: int) -> None:
    trace = random_trace(seed, 120)
    capacities = [330, 500, 640]
    found = replay(trace, [name], capacities)
    assert found.scored == 80
    expected = [plain_misses(trace, name, capacity) for capacity in capacities]
    assert [o.bytes_read for o in found.outcomes[name]] == pytest.approx(expected)


def fewest_misses(trace: Trace, capacity: int) -> int:
    """The least misses of any choice of victims, by trying all: one layer, records of one byte."""
    reachable = {frozenset[int](): 0}
    for token in trace.chosen:
        wanted = {int(n) for n in token[0]}
        following: dict[frozenset[int], int] = {}
        for members, missed in reachable.items():
            count = missed + len(wanted - members)
            others = sorted(members - wanted)
            room = max(0, capacity - len(wanted))
            for kept in product(*[(False, True)] * len(others)):
                if sum(kept) > room:
                    continue
                after = frozenset(wanted | {n for n, k in zip(others, kept, strict=True) if k})
                following[after] = min(following.get(after, count), count)
        reachable = following
    return min(reachable.values())


@pytest.mark.parametrize("seed", range(3))
def test_the_optimum_is_the_optimum(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localv4.paging.replay.MOST_UNSCORED", 0)
    trace = random_trace(seed, 14, sizes=(1,))
    for capacity in (4, 6, 8):
        (outcome,) = replay(trace, [OPTIMAL], [capacity]).outcomes[OPTIMAL]
        assert round(outcome.misses * 14) == fewest_misses(trace, capacity)


def test_with_room_for_all_nothing_is_read_twice() -> None:
    trace = random_trace(1, 300)
    total = EXPERTS * sum(SIZES)
    found = replay(trace, ["lru", OPTIMAL], [total, least_bytes(trace)])
    for outcomes in found.outcomes.values():
        assert [o.capacity_bytes for o in outcomes] == [least_bytes(trace), total]
        assert outcomes[1].resident == 1
        late = {tuple(x) for x in np.argwhere(np.ones((LAYERS, EXPERTS)))}
        for token in trace.chosen[:100]:
            late -= {(layer, int(n)) for layer, row in enumerate(token) for n in row}
        assert outcomes[1].misses * 200 <= len(late)
        assert outcomes[0].hits < outcomes[1].hits
        assert np.mean(outcomes[0].hits_by_layer) == pytest.approx(outcomes[0].hits)


def test_layers_without_records_are_left_out() -> None:
    with_hole = random_trace(2, 90, sizes=(20, 0, 20))
    head = TraceHead("", "two", 2, EXPERTS, K, (20, 20))
    without = Trace(head, with_hole.chosen[:, [0, 2]], with_hole.is_prompt)
    assert replay(with_hole, ["decay"], [300]) == replay(without, ["decay"], [300])


def test_prompts_pass_by_and_choose_what_is_in_memory() -> None:
    trace = random_trace(3, 300, prompts=slice(0, 200))
    for name in ("decay", "lru", OPTIMAL):
        (warm,) = replay(trace, [name], [400]).outcomes[name]
        head = Trace(trace.head, trace.chosen[200:], trace.is_prompt[200:])
        (cold,) = replay(head, [name], [400]).outcomes[name]
        assert warm.hits > 0.3
        assert warm.capacity_bytes == cold.capacity_bytes
    assert replay(trace, ["lru"], [400]).scored == 100
    all_prompt = Trace(trace.head, trace.chosen, np.ones(300, bool))
    assert replay(all_prompt, ["lru"], [400]).scored == 0


def test_progress_is_reported() -> None:
    seen: list[tuple[int, int]] = []
    replay(random_trace(0, 130), ["lru", "lfu"], [400], lambda *at: seen.append(at))
    assert seen == [(0, 260), (64, 260), (128, 260), (130, 260), (194, 260), (258, 260)]


@pytest.mark.parametrize("style", STYLES)
def test_synthetic_routes_have_the_hit_rates_they_were_fitted_to(style: str) -> None:
    published = {"calibrated": (61.4, 75.9), "diverse": (54.4, 68.4)}[style]
    trace = synthetic_trace(STYLES[style], 900, seed=4)
    total = trace.head.experts * sum(trace.head.record_bytes)
    found = replay(trace, ["lru", "decay", OPTIMAL], [total // 10, total // 5])
    for place, expected in enumerate(published):
        lru, decay, optimal = (100 * found.outcomes[p][place].hits for p in found.outcomes)
        assert lru == pytest.approx(expected, abs=3)  # of 600 tokens only
        assert lru < decay < optimal


def test_synthetic_routes_are_those_of_their_seed() -> None:
    one, same, other = (synthetic_trace(STYLES["diverse"], 20, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.chosen, same.chosen)
    assert (one.chosen != other.chosen).any()
    assert one.head.record_bytes == (RECORD_BYTES,) * 43
    assert (np.diff(one.chosen, axis=2) > 0).all()
