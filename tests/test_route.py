"""The router against the exact one, and looking up where experts lie."""

import numba
import numpy as np
import pytest
from numba import njit
from operation_runs import F32, Floats, Indices, padded, run_all_ways, stride
from reference_packed import address, floats

from localv4.kernels import route, routing
from localv4.kernels.operation import WORDS, float_bits
from localv4.kernels.simd import load_f32, store_f32
from localv4.kernels.team import Team

pytestmark = pytest.mark.skipif(
    bool(numba.config.DISABLE_JIT), reason="kernels that take addresses need the compiler"
)

SCALING = 2.5


class Routed:
    """Outputs of the router for some tokens."""

    def __init__(self, logits: Floats, k: int) -> None:
        tokens = len(logits)
        self.logits, self.k = padded(logits), k
        self.experts, self.weights = np.full((tokens, k), -1), np.full((tokens, k), 7, F32)

    def run(self, bias: int, table: int = 0, ids: Indices | None = None) -> None:
        """Route all ways."""

        def words(first: int, count: int) -> list[int]:
            return [
                *(address(self.logits[first:]), stride(self.logits), self.logits.shape[1], bias),
                *(table, 0 if ids is None else address(ids[first:])),
                *(self.k, float_bits(SCALING)),
                *(address(self.experts[first:]), address(self.weights[first:]), count),
            ]

        run_all_ways(route.route, len(self.logits), [self.experts, self.weights], words)

    def assert_weights(self) -> None:
        """Compare with the weights of the exact router."""
        expected = np.empty_like(self.weights)
        logits = np.ascontiguousarray(self.logits)
        routing.route_weights(expected, self.experts, logits, F32(SCALING))
        np.testing.assert_allclose(self.weights, expected, rtol=2e-6)


@pytest.mark.parametrize(("n_experts", "k"), [(256, 6), (384, 8), (16, 4), (5, 5), (39, 1)])
def test_the_best_experts_are_chosen(n_experts: int, k: int) -> None:
    rng = np.random.default_rng(n_experts)
    logits = rng.standard_normal((7, n_experts), F32) * 10
    bias = rng.standard_normal(n_experts, F32)
    routed = Routed(logits, k)
    routed.run(address(bias))
    expected = np.empty((7, k), np.int64)
    routing.choose_experts(expected, logits, bias)
    np.testing.assert_array_equal(routed.experts, np.sort(expected, 1))
    routed.assert_weights()


def test_the_lower_of_equal_experts_is_chosen() -> None:
    logits = np.repeat(np.array([[0], [-60], [90]], F32), 40, axis=1)
    logits[0, [3, 20]] = 1
    routed = Routed(logits, 4)
    routed.run(address(np.zeros(40, F32)))
    np.testing.assert_array_equal(routed.experts, [[0, 1, 3, 20], [0, 1, 2, 3], [0, 1, 2, 3]])
    np.testing.assert_allclose(routed.weights[1:], SCALING / 4)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("everywhere", [True, False])
def test_strange_logits_give_experts_in_range(value: float, everywhere: bool) -> None:
    logits = np.zeros((2, 37), F32)
    logits[:, slice(None) if everywhere else 36] = value
    routed = Routed(logits, 6)
    routed.run(address(np.zeros(37, F32)))
    for row in routed.experts:
        assert len({*row}) == 6 and row.min() >= 0 and row.max() < 37
    if np.isnan(value):
        assert np.isnan(routed.weights).any()


def test_experts_of_a_table_row() -> None:
    rng = np.random.default_rng(2)
    logits = rng.standard_normal((5, 24), F32) * 4
    table = np.stack([rng.permutation(24)[:6] for _ in range(11)])
    ids = np.array([3, 10, 0, 3, 7])
    routed = Routed(logits, 6)
    routed.run(0, address(table), ids)
    np.testing.assert_array_equal(routed.experts, np.sort(table[ids], 1))
    routed.assert_weights()


def test_log1p() -> None:
    call = njit(lambda out, x: store_f32(out, route.log1p(load_f32(x))))
    x, out = floats(4096), floats(4096)
    x[:] = [*np.linspace(0, 1, 2048), *np.geomspace(1.2e-38, 1, 2048)]
    for i in range(0, 4096, 16):
        call(address(out[i:]), address(x[i:]))
    np.testing.assert_array_max_ulp(out, np.log1p(x.astype(np.float64)).astype(F32), 2)


@pytest.mark.parametrize("missing", [None, 0, -1])
def test_resolving_experts(missing: int | None) -> None:
    table, forms = np.arange(1000, 1012), np.array([0, 1] * 6)
    table[7] = 99 if missing is None else missing
    heat, last = np.full(12, F32(4)), np.full(12, 490)
    last[11] = -5
    decay = F32(0.5) ** np.arange(100, dtype=F32)
    experts, records, clock = np.array([2, 7, 11]), np.full((2, 3), 5), np.array([492])
    team = Team(3)
    program = np.zeros((2, WORDS), np.int64)
    program[0, :13] = (
        *(route.resolve.address, address(experts), 3, address(table), address(forms), 2),
        *(address(records), address(heat), address(last), address(clock)),
        *(address(decay), len(decay), team.halt_address),
    )
    program[1] = program[0]
    assert team.run(program[: 1 + (missing is not None)]) == 1
    team.close()
    if missing is not None:
        assert (heat == 4).all() and last[2] == 490
        return
    np.testing.assert_array_equal(records, [[1002, 0, 0], [0, 99, 1011]])
    assert [*heat[[2, 7, 11]]] == [2, 2, 4 * decay[-1] + 1] and (heat[3:7] == 4).all()
    assert [*last] == [490, 490, 492, *[490] * 4, 492, *[490] * 3, 492]


@pytest.mark.parametrize(("state", "done"), [(0, 1), (-1, 2), (99, 2)])
def test_glancing_at_experts(state: int, done: int) -> None:
    table, experts = np.array([7, -1, state, 9]), np.array([0, 1, 2])
    team = Team(2)
    program = np.zeros((2, WORDS), np.int64)
    words = (address(experts), 3, address(table), team.halt_address)
    program[:, :5] = (route.glance.address, *words)
    assert team.run(program) == done
    team.close()


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("form_count", [1, 3])
def test_grouping_the_experts_of_several_tokens(form_count: int, missing: bool) -> None:
    rng = np.random.default_rng(form_count)
    tokens, k, n_experts = 7, 4, 12
    experts = np.stack([np.sort(rng.permutation(n_experts)[:k]) for _ in range(tokens)])
    forms = rng.integers(0, form_count, n_experts)
    table = np.arange(1000, 1000 + n_experts)
    if missing:
        table[experts[5, 2]] = 0
    weights, shares = rng.random((tokens, k), F32), np.zeros(tokens * k, F32)
    records = np.full((form_count, tokens * k), 77)
    starts = np.full((form_count, tokens * k + 1), -7)
    places = np.full(tokens * k, -1)
    heat, last, clock = np.full(n_experts, F32(2)), np.full(n_experts, 90), np.array([91])
    decay = F32(0.5) ** np.arange(100, dtype=F32)
    team = Team(2)
    program = np.zeros((1, WORDS), np.int64)
    program[0, :19] = (
        *(route.group.address, address(experts), k, address(table), address(forms), form_count),
        *(address(records), address(heat), address(last), address(clock), address(decay)),
        *(len(decay), team.halt_address, tokens, address(starts), address(places)),
        *(address(weights), address(shares), n_experts),
    )
    team.run(program)
    team.close()
    if missing:
        assert (heat == 2).all()
        return
    order = sorted(
        (forms[e], e, t, w)
        for t in range(tokens)
        for e, w in zip(experts[t], weights[t], strict=True)
    )
    assert places.tolist() == [t for _, _, t, _ in order]
    assert shares.tolist() == [w for _, _, _, w in order]
    for form in range(form_count):
        used = [e for e in range(n_experts) if forms[e] == form and (experts == e).any()]
        assert records[form, : len(used)].tolist() == table[used].tolist()
        spans = np.diff(starts[form])
        assert spans[: len(used)].tolist() == [(experts == e).sum() for e in used]
        assert not spans[len(used) :].any()
        assert starts[form, 0] == sum(f < form for f, *_ in order)
    counts = np.bincount(experts.ravel(), minlength=n_experts)
    np.testing.assert_array_equal(heat, np.where(counts > 0, 1 + counts, 2))
    assert (last == np.where(counts > 0, 91, 90)).all()
