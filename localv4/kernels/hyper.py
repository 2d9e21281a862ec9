"""Hyper-connections (mHC): N residual streams mixed by a doubly stochastic matrix."""

import math

import numpy as np

from localv4.kernels.arrays import Floats, Scalar
from localv4.kernels.compiler import kernel
from localv4.kernels.device import device


@device
def sigmoid(x: Scalar) -> Scalar:
    """Return 1 / (1 + exp(-x)) for one f32."""
    return np.float32(1) / (np.float32(1) + math.exp(-x))


@device
def normalise_rows(comb: Floats, eps: Scalar) -> None:
    """Divide each row of comb (n, n) by its sum + eps, in place."""
    for j in range(comb.shape[0]):
        s = eps
        for k in range(comb.shape[1]):
            s += comb[j, k]
        for k in range(comb.shape[1]):
            comb[j, k] /= s


@device
def normalise_columns(comb: Floats, eps: Scalar) -> None:
    """Divide each column of comb (n, n) by its sum + eps, in place."""
    for k in range(comb.shape[1]):
        s = eps
        for j in range(comb.shape[0]):
            s += comb[j, k]
        for j in range(comb.shape[0]):
            comb[j, k] /= s


@kernel("void(f4[:, ::1], f4[:, ::1], f4[:, :, ::1], f4[:, ::1], f4[::1], f4[::1], i8, f4)")
def split_mixes(
    pre: Floats,
    post: Floats,
    comb: Floats,
    mixes: Floats,
    scale: Floats,
    base: Floats,
    iterations: int,
    eps: Scalar,
) -> None:
    """Turn the raw mixes of a site into its weights; comb becomes doubly stochastic (Sinkhorn).

    pre, post (tokens, n); comb (tokens, n, n), first index the source stream; mixes and base hold
    n pre, n post and n * n comb values; scale (3,); all f32.
    """
    n = pre.shape[1]
    for t in range(mixes.shape[0]):
        for i in range(n):
            pre[t, i] = sigmoid(mixes[t, i] * scale[0] + base[i]) + eps
            post[t, i] = np.float32(2) * sigmoid(mixes[t, n + i] * scale[1] + base[n + i])
        matrix = comb[t]
        for j in range(n):
            row = matrix[j]
            largest = np.float32(-np.inf)
            for k in range(n):
                at = 2 * n + j * n + k
                row[k] = mixes[t, at] * scale[2] + base[at]
                largest = max(largest, row[k])
            s = np.float32(0)
            for k in range(n):
                row[k] = math.exp(row[k] - largest)
                s += row[k]
            for k in range(n):
                row[k] = row[k] / s + eps
        normalise_columns(matrix, eps)
        for _ in range(iterations - 1):
            normalise_rows(matrix, eps)
            normalise_columns(matrix, eps)


@kernel("void(f4[:, ::1], f4[:, ::1], f4[::1], f4[::1], f4)")
def head_mixes(pre: Floats, mixes: Floats, scale: Floats, base: Floats, eps: Scalar) -> None:
    """pre = sigmoid(mixes * scale[0] + base) + eps; pre, mixes (tokens, n) f32."""
    for t in range(mixes.shape[0]):
        for i in range(mixes.shape[1]):
            pre[t, i] = sigmoid(mixes[t, i] * scale[0] + base[i]) + eps


@kernel("void(f4[:, ::1], f4[:, ::1], f4[:, :, ::1])")
def collapse(out: Floats, pre: Floats, streams: Floats) -> None:
    """out[t] = sum over n of pre[t, n] * streams[t, n]; out (tokens, d), streams (tokens, n, d)."""
    for t in range(out.shape[0]):
        for i in range(out.shape[1]):
            out[t, i] = 0
        for n in range(streams.shape[1]):
            weight = pre[t, n]
            for i in range(out.shape[1]):
                out[t, i] += weight * streams[t, n, i]


@kernel(
    "void(f4[:, :, ::1], f4[:, ::1], f4[:, :, ::1], f4[:, ::1], f4[:, :, ::1])",
)
def expand(out: Floats, post: Floats, comb: Floats, update: Floats, streams: Floats) -> None:
    """out[t, k] = post[t, k] * update[t] + sum over j of comb[t, j, k] * streams[t, j]

    out, streams (tokens, n, d), not the same array; update (tokens, d); all f32.
    """
    for t in range(out.shape[0]):
        for k in range(out.shape[1]):
            weight = post[t, k]
            for i in range(out.shape[2]):
                out[t, k, i] = weight * update[t, i]
            for j in range(streams.shape[1]):
                weight_j = comb[t, j, k]
                for i in range(out.shape[2]):
                    out[t, k, i] += weight_j * streams[t, j, i]
