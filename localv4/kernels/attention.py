"""Attention of many query heads over one shared key row per token, with a sink per head."""

import math

import numpy as np
from numba import prange

from localv4.kernels.arrays import Floats, Indices, Ints, Scalar
from localv4.kernels.compiler import EXACT, kernel
from localv4.kernels.device import device
from localv4.kernels.matmul import dot


@device
def score_row(scores: Floats, at: int, query: Floats, key: Floats, scale: Scalar) -> None:
    """scores[h, at] = query[h] . key * scale for every head; query (heads, n), key (n,) f32."""
    for h in range(query.shape[0]):
        scores[h, at] = dot(query[h], key) * scale


@device
def add_row(out: Floats, scores: Floats, at: int, key: Floats) -> None:
    """out[h] += scores[h, at] * key for every head; out (heads, n), key (n,) f32."""
    for h in range(out.shape[0]):
        weight = scores[h, at]
        for c in range(out.shape[1]):
            out[h, c] += weight * key[c]


@device
def softmax_with_sink(scores: Floats, count: int, sinks: Floats) -> None:
    """Normalise scores[h, :count] in place; the sink takes part in maximum and sum only."""
    for h in range(scores.shape[0]):
        largest = sinks[h]
        for j in range(count):
            largest = max(largest, scores[h, j])
        s = np.float32(0)
        for j in range(count):
            scores[h, j] = math.exp(scores[h, j] - largest)
            s += scores[h, j]
        s += math.exp(sinks[h] - largest)
        for j in range(count):
            scores[h, j] /= s


@kernel(
    "void(f4[:, :, ::1], f4[:, :, ::1], f4[:, ::1], i8, i8, f4[:, ::1], i4[:, ::1], i8[::1],"
    " f4[::1], f4[:, :, ::1])",
    parallel=True,
    family=EXACT,
)
def attend(
    out: Floats,
    query: Floats,
    window: Floats,
    span: int,
    position: int,
    entries: Floats,
    selected: Ints,
    counts: Indices,
    sinks: Floats,
    scores: Floats,
) -> None:
    """Attend over the raw window and the chosen compressed entries; keys are the values, too.

    out, query (tokens, heads, n) f32, token t at `position + t`. window (capacity, n) f32: ring of
    key rows indexed by position % capacity; a query sees the last `span` positions, its own
    included. entries (any, n) f32: compressed rows. Token t sees counts[t] of them: the rows
    selected[t, :counts[t]], or the first counts[t] rows if selected has no columns. sinks (heads,).
    scores (threads, heads, >= span + max(counts)) f32 is scratch.
    """
    tokens = query.shape[0]
    capacity = window.shape[0]
    scale = np.float32(1) / np.float32(math.sqrt(query.shape[2]))
    parts = scores.shape[0]
    for part in prange(parts):
        own = scores[part]
        for t in range(part, tokens, parts):
            last = position + t
            first = max(0, last - span + 1)
            n = 0
            for p in range(first, last + 1):
                score_row(own, n, query[t], window[p % capacity], scale)
                n += 1
            for i in range(counts[t]):
                entry = i if selected.shape[1] == 0 else selected[t, i]
                score_row(own, n, query[t], entries[entry], scale)
                n += 1
            softmax_with_sink(own, n, sinks)
            out[t] = 0
            n = 0
            for p in range(first, last + 1):
                add_row(out[t], own, n, window[p % capacity])
                n += 1
            for i in range(counts[t]):
                entry = i if selected.shape[1] == 0 else selected[t, i]
                add_row(out[t], own, n, entries[entry])
                n += 1
