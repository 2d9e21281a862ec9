"""Mapped memory is brought in before it is needed."""

import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from localv4.paging.populate import PIECE_BYTES, Populator
from localv4.storage.mapped_file import MappedFile


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell what is in memory")
def test_pages_come_in(tmp_path: Path) -> None:
    path = tmp_path / "records"
    path.write_bytes(bytes(PIECE_BYTES + 8192))
    with closing(MappedFile(path)) as file:
        file.map()
        first = _mapped_kib(path)
        populator = Populator([(file.address + 100, PIECE_BYTES + 5000)])
        populator.wait()
        assert _mapped_kib(path) - first >= PIECE_BYTES // 1024
        assert np.count_nonzero(file.bytes(0, PIECE_BYTES)) == 0


def test_a_wrong_range_ends_it_quietly() -> None:
    Populator([(1 << 46, 4096)]).wait()


def _mapped_kib(path: Path) -> int:
    found = 0
    is_file = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line[:1] in "0123456789abcdef":
            is_file = line.endswith(str(path))
        if is_file and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found
