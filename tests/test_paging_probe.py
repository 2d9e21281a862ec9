"""The speed of a disk is measured within its time, and nothing is left behind."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from localv4.errors import LocalV4Error
from localv4.paging import probe, raw_file
from localv4.paging.file_reads import FileReads
from localv4.paging.probe import measure_disk, random_records, read_for, write_random
from localv4.paging.readers import Key

RECORD = 100_000
TOOL = Path(__file__).parents[1] / "tools" / "measure_reads.py"


def model_file(folder: Path, records: int, name: str = "layer.safetensors") -> Path:
    path = folder / name
    path.write_bytes(np.random.default_rng(1).bytes(records * RECORD))
    return path


def test_a_file_is_measured(tmp_path: Path) -> None:
    path = model_file(tmp_path, 50)
    begun = time.monotonic()
    speed = measure_disk(path, RECORD, readers=2, seconds=0.5)
    assert time.monotonic() - begun < 3
    assert speed.bytes_s > 1e5 and speed.core_s_per_gb > 0
    assert 0 < speed.p50_s <= speed.p99_s < 1
    assert speed.io in ("direct", "buffered")
    assert measure_disk(path, RECORD, readers=1, seconds=0.2, io="buffered").io == "buffered"


def test_the_largest_model_file_of_a_folder_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_file(tmp_path, 10, "a.gguf")
    largest = model_file(tmp_path, 20, "b.gguf")
    model_file(tmp_path, 30, "photo.raw")
    read: list[Path] = []

    def note(path: Path, nbytes: int, seed: int = 1) -> object:
        read.append(path)
        return random_records(path, nbytes, seed)

    monkeypatch.setattr(probe, "random_records", note)
    measure_disk(tmp_path, RECORD, readers=2, seconds=0.1)
    assert read == [largest]


def test_a_scratch_file_is_made_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "SCRATCH_BYTES", 64 * RECORD)
    small = model_file(tmp_path, 2)
    assert measure_disk(small, RECORD, readers=2, seconds=0.3).bytes_s > 0
    assert list(tmp_path.iterdir()) == [small]
    with pytest.raises(LocalV4Error, match="cannot measure the disk of"):
        measure_disk(tmp_path / "absent" / "deeper", RECORD, readers=2, seconds=0.1)


def test_writing_stops_in_time_but_not_before_the_least(tmp_path: Path) -> None:
    path = tmp_path / "scratch"
    write_random(path, 10 << 20, 1 << 40, 0.0)
    assert 10 << 20 <= path.stat().st_size < 20 << 20
    write_random(path, 0, (5 << 20) + 3, 60.0)
    assert path.stat().st_size == (5 << 20) + 3
    data = np.fromfile(path, np.uint8)
    assert (data[: 1 << 20] != data[4 << 20 : 5 << 20]).mean() > 0.9


def test_records_are_aligned_and_within_the_file(tmp_path: Path) -> None:
    table = random_records(model_file(tmp_path, 10), RECORD)
    offsets = [piece.offset for (piece,) in table.values()]
    assert len(set(offsets)) == len(offsets) == 9  # 102,400 bytes from one to the next
    assert offsets != sorted(offsets)
    assert all(at % 4096 == 0 and at + RECORD <= 10 * RECORD for at in offsets)
    assert random_records(tmp_path / "layer.safetensors", RECORD, seed=2) != table


def test_each_record_is_read_once_in_groups(tmp_path: Path) -> None:
    reads = FileReads(random_records(model_file(tmp_path, 10), RECORD), "buffered")
    asked: list[Key] = []

    def load(key: Key, address: int) -> int:
        asked.append(key)
        return reads.load(key, address)

    keys = [(0, i) for i in range(9)]
    for at_once in (0, 1, 4):
        asked.clear()
        done = read_for(load, None, keys, RECORD, 1, 10.0, at_once)
        assert asked == keys and done.nbytes == 9 * RECORD
    reads.close()


def test_reading_ends_in_time() -> None:
    def load(key: Key, address: int) -> int:
        time.sleep(0.01)
        return 1

    done = read_for(load, None, [(0, i) for i in range(5000)], RECORD, 2, 0.1)
    assert 2 <= done.reads <= 60


def test_writing_takes_its_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "SCRATCH_BYTES", 10 * RECORD)
    monkeypatch.setattr(probe, "write_random", lambda path, *_: model_file(path, 10, ""))
    given: list[float] = []

    def note(*arguments: object) -> object:
        assert isinstance(arguments[-1], float)
        given.append(arguments[-1])
        return read_for(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(probe, "read_for", note)
    measure_disk(tmp_path, RECORD, readers=2, seconds=0.5)
    assert 0 < given[0] < 0.5


def test_the_comparison_of_ways(tmp_path: Path) -> None:
    path = model_file(tmp_path, 20)
    options = ["--record", "0.1", "--readers", "1,2", "--seconds", "0.1", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, str(TOOL), str(path), *options], capture_output=True, text=True, check=True
    )
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["| direct"] * 4 + ["| buffered"] * 4 + ["| mmap"] * 2
    assert all(float(row[3]) > 0 for row in rows)


def test_on_macos_neither_reads_nor_the_scratch_file_fill_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fcntl = pytest.importorskip("fcntl")
    nocache, read_ahead, told = 48, 45, list[tuple[int, int]]()
    monkeypatch.setattr(raw_file.sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_NOCACHE", nocache, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda _, command, value: told.append((command, value)))
    path = tmp_path / "scratch"
    write_random(path, 1, 4096, 0.1)
    assert told == [(nocache, 1), (read_ahead, 0)]
    file = raw_file.PosixFile(path, "direct")
    file.close()
    assert told[2:] == [(nocache, 1), (read_ahead, 0)]
