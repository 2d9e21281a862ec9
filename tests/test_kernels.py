"""Every kernel equals its NumPy twin."""

import numpy as np
import pytest
import reference
from numpy.typing import NDArray

from localv4.kernels import (
    attention,
    blocks,
    compression,
    elementwise,
    hyper,
    indexer,
    matmul,
    routing,
)

Floats = NDArray[np.float32]
F32 = np.float32
NO_SCALE = np.zeros((1, 1), np.uint8)


def normal(seed: int, *shape: int) -> Floats:
    """Reproducible standard normal float32 values."""
    return np.random.default_rng(seed).standard_normal(shape).astype(F32)


def packed_f32(weight: Floats) -> NDArray[np.uint8]:
    """A float32 matrix as the bytes of its rows."""
    return np.ascontiguousarray(weight).view(np.uint8).reshape(weight.shape[0], -1)


def close(actual: Floats, expected: NDArray[np.float64], tolerance: float = 2e-5) -> None:
    """Compare at float32 accuracy relative to the size of the values."""
    size = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * size)


@pytest.mark.parametrize("tokens", [1, 3, 4, 9])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("cols", [5, 16, 37, 64])
def test_matmul(tokens: int, groups: int, cols: int) -> None:
    weight, x = normal(1, 12, cols), normal(2, tokens, groups * cols)
    per_group = 12 // groups
    expected = np.concatenate(
        [
            reference.wide(x[:, g * cols : (g + 1) * cols])
            @ reference.wide(weight[g * per_group : (g + 1) * per_group]).T
            for g in range(groups)
        ],
        1,
    )
    out = np.full((tokens, 12), np.nan, F32)
    scratch = np.empty(cols + 4, F32)
    matmul.matmul(out, x, blocks.F32, packed_f32(weight), NO_SCALE, groups, scratch)
    close(out, expected)


def test_a_token_has_the_same_bits_in_any_company() -> None:
    weight, x = normal(1, 33, 200), normal(2, 11, 200)
    together, alone = np.empty((11, 33), F32), np.empty((1, 33), F32)
    scratch = np.empty(204, F32)
    matmul.matmul(together, x, blocks.F32, packed_f32(weight), NO_SCALE, 1, scratch)
    for t in range(11):
        row = x[t : t + 1].copy()
        matmul.matmul(alone, row, blocks.F32, packed_f32(weight), NO_SCALE, 1, scratch)
        assert np.array_equal(alone[0], together[t])


@pytest.mark.parametrize("fmt", [blocks.F32, blocks.BF16])
@pytest.mark.parametrize("cols", [16, 48, 50])
def test_one_token_takes_float_rows_directly_with_the_same_bits(fmt: int, cols: int) -> None:
    raw = packed_f32(normal(1, 9, cols))
    if fmt == blocks.BF16:
        raw = np.ascontiguousarray(raw.view(np.uint16)[:, 1::2]).view(np.uint8)
    x = normal(2, 4, cols)
    together, alone = np.empty((4, 9), F32), np.empty((1, 9), F32)
    scratch = np.empty(cols + 4, F32)
    matmul.matmul(together, x, fmt, raw, NO_SCALE, 1, scratch)
    for t in range(4):
        matmul.matmul(alone, x[t : t + 1].copy(), fmt, raw, NO_SCALE, 1, scratch)
        assert np.array_equal(alone[0], together[t])


def test_gather_rows() -> None:
    weight = normal(3, 9, 7)
    rows = np.array([8, 0, 0, 5])
    out = np.empty((4, 7), F32)
    matmul.gather_rows(out, rows, blocks.F32, packed_f32(weight), NO_SCALE)
    assert np.array_equal(out, weight[rows])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", [1, 16, 50])
def test_rms_norm(weighted: bool, n: int) -> None:
    x = normal(1, 4, n)
    weight = normal(2, n) if weighted else np.empty(0, F32)
    out = np.empty_like(x)
    elementwise.rms_norm(out, x, weight, F32(1e-6))
    wide = reference.wide(weight) if weighted else None
    close(out, reference.rms_norm(reference.wide(x), wide, 1e-6))


@pytest.mark.parametrize("sign", [1, -1])
def test_rotate(sign: int) -> None:
    x, angles = normal(1, 3, 2, 10), normal(2, 3, 4)
    cos, sin = np.cos(angles), np.sin(angles)
    expected = reference.rotate(reference.wide(x), reference.wide(cos), reference.wide(sin), sign)
    elementwise.rotate(x, cos, sin, F32(sign))
    close(x, expected)


def test_rotate_back_restores() -> None:
    x, angles = normal(1, 3, 2, 10), normal(2, 3, 5)
    turned, cos, sin = x.copy(), np.cos(angles), np.sin(angles)
    elementwise.rotate(turned, cos, sin, F32(1))
    assert np.abs(turned - x).max() > 0.1
    elementwise.rotate(turned, cos, sin, F32(-1))
    close(turned, reference.wide(x))


def test_swiglu_clamps_gate_from_above_only_and_up_on_both_sides() -> None:
    gate, up = 3 * normal(1, 5, 40), 3 * normal(2, 5, 40)
    expected = reference.swiglu(reference.wide(gate), reference.wide(up), 1.0)
    elementwise.swiglu(gate, up, F32(1.0))
    close(gate, expected)


@pytest.mark.parametrize("n", [1, 3, 4])
def test_split_mixes(n: int) -> None:
    mixes, scale, base = normal(1, 6, (2 + n) * n), normal(2, 3), normal(3, (2 + n) * n)
    pre, post, comb = np.empty((6, n), F32), np.empty((6, n), F32), np.empty((6, n, n), F32)
    hyper.split_mixes(pre, post, comb, mixes, scale, base, 20, F32(1e-6))
    expected = reference.hyper_weights(
        reference.wide(mixes), reference.wide(scale), reference.wide(base), n, 20, 1e-6
    )
    for actual, wanted in zip((pre, post, comb), expected, strict=True):
        close(actual, wanted)


def test_head_mixes() -> None:
    mixes, scale, base = normal(1, 6, 4), normal(2, 1), normal(3, 4)
    pre = np.empty((6, 4), F32)
    hyper.head_mixes(pre, mixes, scale, base, F32(1e-6))
    raw = reference.wide(mixes) * float(scale[0]) + reference.wide(base)
    close(pre, reference.sigmoid(raw) + 1e-6)


def test_collapse_and_expand() -> None:
    streams, pre, post = normal(1, 5, 3, 8), normal(2, 5, 3), normal(3, 5, 3)
    comb, update = normal(4, 5, 3, 3), normal(5, 5, 8)
    out = np.empty((5, 8), F32)
    hyper.collapse(out, pre, streams)
    close(out, np.einsum("tn,tnd->td", reference.wide(pre), reference.wide(streams)))
    mixed = np.empty_like(streams)
    hyper.expand(mixed, post, comb, update, streams)
    expected = np.einsum("tk,td->tkd", reference.wide(post), reference.wide(update))
    expected += np.einsum("tjk,tjd->tkd", reference.wide(comb), reference.wide(streams))
    close(mixed, expected)


@pytest.mark.parametrize("overlap", [1, 2])
@pytest.mark.parametrize("ratio", [1, 4, 7])
def test_pool_through_a_ring(overlap: int, ratio: int) -> None:
    width, positions = 6, 4 * ratio + 1
    keys, gates = normal(1, positions, overlap * width), normal(2, positions, overlap * width)
    expected = reference.pool(reference.wide(keys), reference.wide(gates), ratio, width)
    capacity = overlap * ratio + 1
    ring_k = np.full((capacity, overlap * width), np.nan, F32)
    ring_g = ring_k.copy()
    for p in range(positions):
        ring_k[p % capacity], ring_g[p % capacity] = keys[p], gates[p]
        if (p + 1) % ratio == 0:
            out = np.empty((1, width), F32)
            compression.pool(out, ring_k, ring_g, p // ratio, ratio)
            close(out[0], expected[p // ratio])


@pytest.mark.parametrize("chosen", [False, True])
def test_attend(chosen: bool) -> None:
    tokens, heads, n, span, position = 5, 3, 20, 4, 9
    capacity = span + 6
    keys, entries = normal(1, position + tokens, n), normal(2, 7, n)
    query, sinks = normal(3, tokens, heads, n), normal(4, heads)
    window = np.full((capacity, n), np.nan, F32)
    for p in range(position - span, position + tokens):
        window[p % capacity] = keys[p]
    counts = np.array([0, 1, 3, 3, 2])
    selected = np.empty((tokens, 0), np.int32)
    if chosen:
        selected = np.array([[6, 6, 6], [5, 0, 0], [0, 3, 6], [1, 2, 4], [0, 6, 3]], np.int32)
    out = np.full_like(query, np.nan)
    scores = np.full((2, heads, span + 3), np.nan, F32)
    attention.attend(out, query, window, span, position, entries, selected, counts, sinks, scores)
    visible = np.zeros((tokens, len(keys) + len(entries)), bool)
    for t in range(tokens):
        visible[t, position + t - span + 1 : position + t + 1] = True
        rows = selected[t, : counts[t]] if chosen else np.arange(counts[t])
        visible[t, len(keys) + rows] = True
    everything = reference.wide(np.concatenate([keys, entries]))
    close(out, reference.attend(reference.wide(query), everything, visible, reference.wide(sinks)))


def test_attend_at_the_start_of_a_sequence_sees_only_what_exists() -> None:
    keys, query, sinks = normal(1, 3, 8), normal(2, 3, 2, 8), normal(3, 2)
    window = np.full((10, 8), np.nan, F32)
    window[:3] = keys
    out, scores = np.empty_like(query), np.empty((1, 2, 4), F32)
    nothing = np.empty((3, 0), np.int32)
    attention.attend(
        out, query, window, 4, 0, np.empty((0, 8), F32), nothing, np.zeros(3, int), sinks, scores
    )
    visible = np.tril(np.ones((3, 3), bool))
    wide = [reference.wide(a) for a in (query, keys, sinks)]
    close(out, reference.attend(wide[0], wide[1], visible, wide[2]))


@pytest.mark.parametrize("top_k", [1, 5, 40])
def test_select_entries(top_k: int) -> None:
    tokens, heads, n, ratio, position = 6, 5, 12, 4, 50
    visible = (position + tokens) // ratio
    query, weights, keys = normal(1, tokens, heads, n), normal(2, tokens, heads), normal(3, 20, n)
    chosen = np.full((tokens, min(top_k, visible)), -1, np.int32)
    counts, scores = np.empty(tokens, np.int64), np.empty((2, visible), F32)
    indexer.select_entries(chosen, counts, query, weights, keys, position, ratio, scores)
    expected = reference.index_scores(
        reference.wide(query), reference.wide(weights), reference.wide(keys)
    )
    for t in range(tokens):
        seen = (position + t + 1) // ratio
        best = np.sort(np.argsort(-expected[t, :seen], kind="stable")[:top_k])
        assert chosen[t, : counts[t]].tolist() == best.tolist()


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_select_top_takes_the_lowest_of_equals(k: int) -> None:
    scores = np.array([0.0, 3.0, -0.0, -1.0, 3.0, 0.0, -np.inf, 2.0], F32)
    chosen = np.full(k, -1, np.int32)
    indexer.select_top(chosen, scores)
    order = np.argsort(-(scores + 0), kind="stable")
    assert chosen.tolist() == sorted(order[:k].tolist())


def test_choose_experts_by_affinity_plus_bias() -> None:
    logits, bias = 3 * normal(1, 8, 10), normal(2, 10)
    experts = np.full((8, 3), -1, np.int64)
    routing.choose_experts(experts, logits, bias)
    ranked = np.argsort(-(reference.affinity(reference.wide(logits)) + bias), 1, kind="stable")
    assert experts.tolist() == ranked[:, :3].tolist()


def test_choose_experts_prefers_low_numbers_among_equals() -> None:
    experts = np.full((1, 3), -1, np.int64)
    routing.choose_experts(experts, np.zeros((1, 6), F32), np.zeros(6, F32))
    assert experts.tolist() == [[0, 1, 2]]


def test_route_weights() -> None:
    logits = 10 * normal(1, 4, 10)
    logits[0, 0] = 100  # softplus is linear there, and exp(100) is no float32
    experts = np.array([[0, 1, 2], [3, 4, 5], [9, 9, 0], [7, 8, 1]])
    weights = np.empty((4, 3), F32)
    routing.route_weights(weights, experts, logits, F32(1.5))
    chosen = np.take_along_axis(reference.affinity(reference.wide(logits)), experts, 1)
    close(weights, chosen / chosen.sum(1, keepdims=True) * 1.5)


def test_add_rows_adds_repeated_tokens() -> None:
    out, rows, weights = np.zeros((3, 4), F32), normal(1, 3, 4), normal(2, 3)
    routing.add_rows(out, rows, np.array([2, 0, 2]), weights)
    expected = np.zeros((3, 4))
    for i, t in enumerate([2, 0, 2]):
        expected[t] += reference.wide(rows[i]) * float(weights[i])
    close(out, expected)
