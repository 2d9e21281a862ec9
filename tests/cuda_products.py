"""What tests of the twins of products share: formats, random weights, rounded activations."""

import numpy as np
from operation_runs import F32, Rounded, run
from reference_packed import Bytes, address, floats, random_weights

from localv4.kernels.packed import MX4, Q4, Q8, PackedFormat
from localv4.kernels.packed_kquants import IQ2, KQUANTS, Q3, Q6
from localv4.kernels.single_token import quantize

FORMATS = (MX4, Q4, Q8, *KQUANTS)


def random_packed(seed: int, fmt: PackedFormat, rows: int, cols: int) -> Bytes:
    """Random packed weights with finite scales of ordinary size and all codes."""
    weights = random_weights(seed, fmt, rows, cols)
    if fmt in (Q6, Q3, IQ2):  # a float32 for each row, not a half
        heads = weights.reshape(-1, fmt.superblock_bytes)[:, :64]
        scales = np.random.default_rng(seed).normal(0, 0.01, (len(heads), 16))
        heads[...] = scales.astype(F32).view(np.uint8)
    return weights


def rounded(count: int, cols: int, kind: str = "normal") -> Rounded:
    """Rounded rows of activations."""
    x = floats(count, cols)
    x[:] = np.random.default_rng(cols).standard_normal((count, cols)) * 4
    if kind == "largest":
        x[:] = np.where(x > 0, 1, -1)
    result = Rounded(count, cols)
    run(1, quantize, (address(x), cols, 0, count, cols, *result.addresses(0)))
    return result
