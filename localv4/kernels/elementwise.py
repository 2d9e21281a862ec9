"""Operations on single vectors: normalisation, rotary embedding, the clamped SwiGLU."""

import math

import numpy as np

from localv4.kernels.arrays import Floats, Scalar
from localv4.kernels.compiler import kernel
from localv4.kernels.matmul import dot


@kernel("void(f4[:, ::1], f4[:, ::1], f4[::1], f4)")
def rms_norm(out: Floats, x: Floats, weight: Floats, eps: Scalar) -> None:
    """out[t] = weight * x[t] / sqrt(mean(x[t]^2) + eps)

    out, x (rows, n) f32; weight (n,) f32, or (0,) for a norm without weight. `out` may be `x`.
    """
    n = x.shape[1]
    for t in range(x.shape[0]):
        inverse = np.float32(1) / math.sqrt(dot(x[t], x[t]) / np.float32(n) + eps)
        if weight.shape[0] == 0:
            for i in range(n):
                out[t, i] = x[t, i] * inverse
        else:
            for i in range(n):
                out[t, i] = weight[i] * (x[t, i] * inverse)


@kernel("void(f4[:, :, ::1], f4[:, ::1], f4[:, ::1], f4)")
def rotate(x: Floats, cos: Floats, sin: Floats, sign: Scalar) -> None:
    """Rotate the trailing channels of x in place by its token's angles, in pairs (2i, 2i + 1).

    x (tokens, heads, n) f32; cos, sin (tokens, pairs) f32, pairs <= n / 2; sign 1, or -1 for the
    inverse rotation.
    """
    pairs = cos.shape[1]
    first = x.shape[2] - 2 * pairs
    for t in range(x.shape[0]):
        for h in range(x.shape[1]):
            for i in range(pairs):
                c = cos[t, i]
                s = sin[t, i] * sign
                even = x[t, h, first + 2 * i]
                odd = x[t, h, first + 2 * i + 1]
                x[t, h, first + 2 * i] = even * c - odd * s
                x[t, h, first + 2 * i + 1] = even * s + odd * c


@kernel("void(f4[:, ::1], f4[:, ::1], f4)")
def swiglu(gate: Floats, up: Floats, limit: Scalar) -> None:
    """gate = silu(min(gate, limit)) * clip(up, -limit, limit), in place; gate, up (tokens, n) f32.

    The gate is clamped from above only, and before the silu.
    """
    for t in range(gate.shape[0]):
        for i in range(gate.shape[1]):
            g = min(gate[t, i], limit)
            u = min(max(up[t, i], -limit), limit)
            gate[t, i] = g / (np.float32(1) + math.exp(-g)) * u
