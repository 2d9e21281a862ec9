"""NumPy twins of the kernels in float64, written from the formulas and nothing else."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def wide(x: NDArray[np.float32]) -> Array:
    """The same values in float64."""
    return x.astype(np.float64)


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x))"""
    return 1 / (1 + np.exp(-x))


def softmax(x: Array, axis: int) -> Array:
    """exp(x), normalised along an axis."""
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def rms_norm(x: Array, weight: Array | None, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps), times weight."""
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return y if weight is None else y * weight


def rotate(x: Array, cos: Array, sin: Array, sign: int) -> Array:
    """Rotate trailing pairs of x (tokens, heads, n) as complex numbers."""
    pairs = cos.shape[1]
    tail = x[..., -2 * pairs :]
    turned = (tail[..., 0::2] + 1j * tail[..., 1::2]) * (cos + sign * 1j * sin)[:, None]
    y = x.copy()
    y[..., -2 * pairs :: 2], y[..., -2 * pairs + 1 :: 2] = turned.real, turned.imag
    return y


def swiglu(gate: Array, up: Array, limit: float) -> Array:
    """silu(min(gate, limit)) * clip(up)"""
    g = np.minimum(gate, limit)
    return g * sigmoid(g) * np.clip(up, -limit, limit)


def hyper_weights(
    mixes: Array, scale: Array, base: Array, n: int, iterations: int, eps: float
) -> tuple[Array, Array, Array]:
    """(pre, post, comb) of one hyper-connection site for mixes (tokens, (2 + n) * n)."""
    pre = sigmoid(mixes[:, :n] * scale[0] + base[:n]) + eps
    post = 2 * sigmoid(mixes[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    raw = (mixes[:, 2 * n :] * scale[2] + base[2 * n :]).reshape(-1, n, n)
    comb = softmax(raw, -1) + eps
    comb = comb / (comb.sum(1, keepdims=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(2, keepdims=True) + eps)
        comb = comb / (comb.sum(1, keepdims=True) + eps)
    return pre, post, comb


def pool(keys: Array, gates: Array, ratio: int, width: int) -> Array:
    """All entries of keys, gates (positions, width or 2 * width), positions in order."""
    entries = []
    for w in range(len(keys) // ratio):
        own = slice(w * ratio, (w + 1) * ratio)
        k, g = keys[own, -width:], gates[own, -width:]
        if keys.shape[1] == 2 * width and w > 0:
            previous = slice((w - 1) * ratio, w * ratio)
            k = np.concatenate([keys[previous, :width], k])
            g = np.concatenate([gates[previous, :width], g])
        entries.append((softmax(g, 0) * k).sum(0))
    return np.array(entries).reshape(-1, width)


def attend(query: Array, keys: Array, visible: NDArray[np.bool_], sinks: Array) -> Array:
    """query (tokens, heads, n), keys (all, n), visible (tokens, all) -> (tokens, heads, n)."""
    scores = np.einsum("thc,kc->htk", query, keys) / np.sqrt(query.shape[2])
    scores = np.where(visible[None], scores, -np.inf)
    sink = np.broadcast_to(sinks[:, None, None], (*scores.shape[:2], 1))
    weights = softmax(np.concatenate([scores, sink], 2), 2)[:, :, :-1]
    return np.einsum("htk,kc->thc", weights, keys)


def index_scores(query: Array, weights: Array, keys: Array) -> Array:
    """Scores (tokens, entries) of the lightning indexer."""
    products = np.maximum(np.einsum("thc,kc->thk", query, keys), 0)
    return np.einsum("th,thk->tk", weights, products)


def affinity(logits: Array) -> Array:
    """sqrt(softplus(logits))"""
    return np.sqrt(np.logaddexp(logits, 0))
