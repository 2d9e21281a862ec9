"""The router: which experts a token uses, and with what weight."""

import math

import numpy as np

from localv4.kernels.arrays import Floats, Indices, Scalar
from localv4.kernels.compiler import kernel
from localv4.kernels.device import device


@device
def affinity(logit: Scalar) -> Scalar:
    """Return sqrt(softplus(logit)) for one f32; softplus is linear above 20, as in torch."""
    softplus = logit if logit > np.float32(20) else math.log1p(math.exp(logit))
    return math.sqrt(softplus)


@kernel("void(i8[:, ::1], f4[:, ::1], f4[::1])")
def choose_experts(experts: Indices, logits: Floats, bias: Floats) -> None:
    """experts[t] = indices of the largest affinity + bias, the lower index first among equals

    experts (tokens, k) i64; logits (tokens, experts) f32; bias (experts,) f32 takes part in the
    choice only.
    """
    for t in range(logits.shape[0]):
        for i in range(experts.shape[1]):
            best = -1
            best_score = np.float32(-np.inf)
            for e in range(logits.shape[1]):
                score = np.float32(affinity(logits[t, e])) + bias[e]
                taken = False
                for j in range(i):
                    taken |= experts[t, j] == e
                if not taken and (best < 0 or score > best_score):
                    best, best_score = e, score
            experts[t, i] = best


@kernel("void(f4[:, ::1], i8[:, ::1], f4[:, ::1], f4)")
def route_weights(weights: Floats, experts: Indices, logits: Floats, scaling: Scalar) -> None:
    """weights[t] = the affinities of the chosen experts, normalised to sum to `scaling`

    weights (tokens, k) f32; experts (tokens, k) i64 in range; logits (tokens, experts) f32.
    """
    for t in range(logits.shape[0]):
        s = np.float32(0)
        for i in range(experts.shape[1]):
            weights[t, i] = affinity(logits[t, experts[t, i]])
            s += weights[t, i]
        for i in range(experts.shape[1]):
            weights[t, i] = weights[t, i] / (s + np.float32(1e-20)) * scaling


@kernel("void(f4[:, ::1], f4[:, ::1], i8[::1], f4[::1])")
def add_rows(out: Floats, rows: Floats, tokens: Indices, weights: Floats) -> None:
    """out[tokens[i]] += weights[i] * rows[i]; out, rows (any, n) f32."""
    for i in range(rows.shape[0]):
        for c in range(rows.shape[1]):
            out[tokens[i], c] += weights[i] * rows[i, c]
