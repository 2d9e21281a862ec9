"""The lightning indexer: score every visible compressed entry and keep the best."""

import numpy as np
from numba import prange

from localv4.kernels.arrays import Floats, Indices, Ints, Scalar
from localv4.kernels.compiler import EXACT, kernel
from localv4.kernels.device import device
from localv4.kernels.matmul import dot


@device
def order_key(score: Scalar) -> np.int64:
    """Map an f32 to an i64 that sorts as the float does (-0 and +0 are one value)."""
    bits = np.int64(np.float32(score + np.float32(0)).view(np.int32))
    return bits if bits >= 0 else np.int64(-2147483648) - bits


@device
def kth_largest_key(scores: Floats, k: int) -> np.int64:
    """Return the order key of the k-th largest of scores by bisection over the 32-bit keys."""
    low, high = np.int64(-2147483648), np.int64(2147483647)
    while low < high:
        middle = (low + high + 1) >> 1
        above = np.int64(0)
        for i in range(scores.shape[0]):
            above += order_key(scores[i]) >= middle
        if above >= k:
            low = middle
        else:
            high = middle - 1
    return low


@device
def select_top(chosen: Ints, scores: Floats) -> None:
    """Write the indices of the chosen.shape[0] best scores in ascending order.

    Of equal scores at the edge the lowest indices win.
    """
    k = chosen.shape[0]
    edge = kth_largest_key(scores, k)
    spare = np.int64(k)
    for i in range(scores.shape[0]):
        spare -= order_key(scores[i]) > edge
    n = 0
    for i in range(scores.shape[0]):
        key = order_key(scores[i])
        if key == edge and spare > 0:
            spare -= 1
        elif key <= edge:
            continue
        chosen[n] = i
        n += 1


@kernel(
    "void(i4[:, ::1], i8[::1], f4[:, :, ::1], f4[:, ::1], f4[:, ::1], i8, i8, f4[:, ::1])",
    parallel=True,
    family=EXACT,
)
def select_entries(
    selected: Ints,
    counts: Indices,
    query: Floats,
    weights: Floats,
    keys: Floats,
    position: int,
    ratio: int,
    scores: Floats,
) -> None:
    """selected[t, :counts[t]] = the best entries that the token at `position + t` may see

    Entry w is visible once its window is complete: w < (position + t + 1) // ratio. Its score is
    sum over h of weights[t, h] * relu(query[t, h] . keys[w]). selected (tokens, top_k) i32, rows
    ascending; counts (tokens,) i64; query (tokens, heads, n); weights (tokens, heads); keys
    (entries, n) f32. scores (threads, >= entries) f32 is scratch.
    """
    tokens = query.shape[0]
    top_k = selected.shape[1]
    parts = scores.shape[0]
    for part in prange(parts):
        for t in range(part, tokens, parts):
            visible = (position + t + 1) // ratio
            counts[t] = min(visible, top_k)
            if visible <= top_k:
                for w in range(visible):
                    selected[t, w] = w
                continue
            own = scores[part, :visible]
            for w in range(visible):
                s = np.float32(0)
                for h in range(query.shape[1]):
                    s += weights[t, h] * max(dot(query[t, h], keys[w]), np.float32(0))
                own[w] = s
            select_top(selected[t], own)
