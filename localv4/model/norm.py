"""Root-mean-square normalisation."""

import numpy as np

from localv4.kernels import elementwise
from localv4.model.matrix import F32, Floats

_NO_WEIGHT = np.empty(0, F32)


def rms_norm(x: Floats, weight: Floats | None, eps: float) -> Floats:
    """Return x (rows, n) / sqrt(mean(x^2) + eps), times weight (n,) if there is one."""
    out = np.empty_like(x)
    elementwise.rms_norm(out, x, _NO_WEIGHT if weight is None else weight, F32(eps))
    return out
