"""Pooling of consecutive tokens into one compressed key row."""

import math

import numpy as np
from numba import prange

from localv4.kernels.arrays import Floats
from localv4.kernels.compiler import EXACT, kernel


@kernel("void(f4[:, ::1], f4[:, ::1], f4[:, ::1], i8, i8)", parallel=True, family=EXACT)
def pool(out: Floats, keys: Floats, gates: Floats, first_entry: int, ratio: int) -> None:
    """out[i, c] = sum over the slots of entry (first_entry + i) of softmax(gate)[slot, c] * key

    out (entries, n) f32. keys, gates (capacity, m) f32 are rings indexed by position % capacity
    and hold all positions of the slots. Without overlap (m = n) the slots of entry w are its own
    window: positions ratio * w ... ratio * w + ratio - 1. With overlap (m = 2n) they are the
    previous window with its first n channels and then the own window with its last n channels;
    entry 0 has no previous window.
    """
    n = out.shape[1]
    capacity = keys.shape[0]
    overlap = keys.shape[1] == 2 * n
    for i in prange(out.shape[0]):
        own = (first_entry + i) * ratio
        first = own - ratio if overlap and own > 0 else own
        for c in range(n):
            largest = np.float32(-np.inf)
            for p in range(first, own + ratio):
                shift = n if overlap and p >= own else 0
                largest = max(largest, gates[p % capacity, shift + c])
            weights = np.float32(0)
            value = np.float32(0)
            for p in range(first, own + ratio):
                shift = n if overlap and p >= own else 0
                weight = math.exp(gates[p % capacity, shift + c] - largest)
                weights += weight
                value += weight * keys[p % capacity, shift + c]
            out[i, c] = value / weights
