"""Sharing out the rows of a matrix: every group once, small pieces at the end."""

import numpy as np
import pytest
from numba import config

from localv4.kernels.operation import LAST_GROUPS, piece
from localv4.kernels.single_token import expert_piece

pytestmark = pytest.mark.skipif(bool(config.DISABLE_JIT), reason="members need the compiler")


def pieces(groups: int, members: int) -> list[tuple[int, int]]:
    """All pieces of a matrix, in their order."""
    found: list[tuple[int, int]] = []
    while True:
        first, end = piece(len(found), groups, members)
        if first >= groups:
            return found
        found.append((first, end))


@pytest.mark.parametrize("members", [1, 2, 3, 16, 32, 100])
def test_pieces_have_every_group_once(members: int) -> None:
    for groups in (*range(1, 70), 127, 128, 255, 256, 2048, 8080):
        shared = [group for part in pieces(groups, members) for group in range(*part)]
        assert shared == list(range(groups))


@pytest.mark.parametrize(("groups", "members"), [(256, 2), (2048, 2), (256, 16), (8080, 32)])
def test_the_last_pieces_are_small_but_not_too_small(groups: int, members: int) -> None:
    sizes = [end - first for first, end in pieces(groups, members)]
    assert sizes[-1] <= LAST_GROUPS
    assert all(size % 2 == 0 for size in sizes)


@pytest.mark.parametrize(("groups", "members"), [(256, 2), (2048, 2), (256, 16), (8080, 32)])
def test_pieces_are_few_and_leave_half_to_whoever_is_quick(groups: int, members: int) -> None:
    sizes = [end - first for first, end in pieces(groups, members)]
    assert sum(sizes[:members]) <= groups / 2
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) <= members * (2 + np.log2(groups / members))


@pytest.mark.parametrize(("groups", "members"), [(128, 2), (128, 3), (3, 16), (40, 16)])
def test_experts_are_shared_out_one_after_the_other(groups: int, members: int) -> None:
    count = 6
    found, number = [], 0
    while True:
        first, end, expert = expert_piece(number, count, groups, members)
        if first >= groups:
            break
        found += [(expert, group) for group in range(first, end)]
        number += 1
    assert found == [(expert, group) for expert in range(count) for group in range(groups)]
