"""Twins of host arrays in the memory of a GPU."""

import ctypes

import numpy as np
import pytest
from host_gpu import HostGpu

from localv4.cuda.mirrors import Mirrors


def test_a_view_does_not_stand_for_the_whole() -> None:
    """As the matrices of a record, which begin where it does and are shorter."""
    whole = np.arange(4096, dtype=np.uint8)
    first, second = whole[:3000].reshape(3, 1000)[:2], whole[3000:]
    mirrors = Mirrors(HostGpu())
    mirrors.add_all([first, second, whole])
    start = mirrors.address(whole.ctypes.data)
    assert ctypes.string_at(start, whole.nbytes) == whole.tobytes()
    assert mirrors.address(second.ctypes.data) == start + 3000
    assert mirrors.nbytes == whole.nbytes


def test_a_whole_behind_its_part_is_refused() -> None:
    whole = np.zeros(4096, np.uint8)
    mirrors = Mirrors(HostGpu())
    mirrors.add(whole[:3000])
    with pytest.raises(AssertionError, match="a part"):
        mirrors.add(whole)
