"""Twins of the operations on rows, against the CPU's."""

import numpy as np
from cuda_twins import needs_compiler, run_twin
from operation_runs import assert_same_bits, padded, run, stride
from reference_packed import address

from localv4.kernels import rows

pytestmark = needs_compiler


def test_clear() -> None:
    values = np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32)
    mine, theirs = padded(values), padded(values)
    run(1, rows.clear, (address(theirs), stride(theirs), 5, 48))
    run_twin(rows.clear, (address(mine), stride(mine), 5, 48))
    assert_same_bits(mine, theirs)
    assert not mine[:, :48].any()
    assert mine[:, 48:].any()
