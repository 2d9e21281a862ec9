"""Threads that read records: order, parts, errors, faults, and no write after they are closed."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from localv4.errors import BadFileError, LocalV4Error
from localv4.paging.arena import Arena
from localv4.paging.faults import Faults
from localv4.paging.file_reads import PART_BYTES, FileReads, Piece
from localv4.paging.raw_file import ALIGNMENT, Io, memory
from localv4.paging.readers import Finished, Key, ReadError, Readers
from localv4.paging.record_file import RecordFile

RECORD = 3 * PART_BYTES
LONGEST_S = 10.0


class Gate:
    """A load that waits until it is let through, and notes the order in which it was called."""

    def __init__(self) -> None:
        self.called: list[Key] = []
        self.open = threading.Event()

    def __call__(self, key: Key, address: int) -> int:
        opening = self.open
        self.called.append(key)
        assert opening.wait(LONGEST_S)
        return address


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


def collect(readers: Readers, count: int) -> list[Finished]:
    found: list[Finished] = []
    while len(found) < count:
        new = readers.wait(LONGEST_S)
        assert new
        found += new
    return found


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LONGEST_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_urgent_records_come_before_guesses(gate: Gate) -> None:
    readers = Readers(gate, 1)
    readers.submit((0, 0), 10)
    until(lambda: gate.called == [(0, 0)])
    readers.submit_all([((1, 1), 11), ((1, 2), 12), ((1, 3), 13)], urgent=False)
    readers.submit((0, 4), 14)
    readers.make_urgent([(1, 2), (7, 7)])
    assert readers.pending == 5 and not readers.is_idle
    assert readers.finished() == [] and readers.wait(0.01) == []
    gate.open.set()
    found = collect(readers, 5)
    assert gate.called == [(0, 0), (0, 4), (1, 2), (1, 1), (1, 3)]
    assert [(done.key, done.address, done.nbytes) for done in found][:2] == [
        ((0, 0), 10, 10),
        ((0, 4), 14, 14),
    ]
    assert readers.pending == 0 and readers.is_idle and readers.wait() == []
    readers.close()


def test_guesses_begin_when_nothing_urgent_waits_and_leave_threads_free(gate: Gate) -> None:
    readers = Readers(gate, 4)
    urgent = [((0, expert), expert) for expert in range(5)]
    readers.submit_all(urgent)
    for expert in range(1, 5):
        readers.submit((1, expert), 10 + expert, urgent=False)
    until(lambda: len(gate.called) == 4)
    assert set(gate.called) < {key for key, _ in urgent} and not readers.has_begun_all
    readers.make_urgent([(1, 3)])
    first, gate.open = gate.open, threading.Event()  # later calls wait for another opening
    first.set()
    until(lambda: len(gate.called) == 8)
    assert readers.has_begun_all
    # what was urgent, and two guesses of those asked for last: half of the threads
    assert set(gate.called[4:]) == {urgent[4][0], (1, 3), (1, 4), (1, 2)}
    gate.open.set()
    assert len(collect(readers, 9)) == 9
    readers.close()


def test_half_of_the_threads_are_free_for_what_becomes_urgent(gate: Gate) -> None:
    readers = Readers(gate, 4)
    readers.submit_all([((1, expert), expert) for expert in range(6)], urgent=False)
    until(lambda: len(gate.called) == 2 and readers._idle == 2)
    readers.submit((0, 0), 9)
    until(lambda: len(gate.called) == 3)
    assert gate.called[2] == (0, 0)
    gate.open.set()
    assert len(collect(readers, 7)) == 7
    readers.close()


def test_guesses_that_have_not_begun_can_be_forgotten(gate: Gate) -> None:
    readers = Readers(gate, 2)
    readers.submit_all([((1, expert), 50 + expert) for expert in range(4)], urgent=False)
    until(lambda: gate.called == [(1, 0)])
    readers.submit((0, 0), 9)
    until(lambda: len(gate.called) == 2)
    assert readers.cancel([(1, 0), (1, 2), (0, 0), (5, 5), (1, 2)]) == [((1, 2), 52)]
    gate.open.set()
    assert sorted(done.key for done in collect(readers, 4)) == [(0, 0), (1, 0), (1, 1), (1, 3)]
    assert readers.is_idle and (1, 2) not in gate.called
    readers.close()


def test_the_rest_of_a_guess_waits_for_what_is_urgent(gate: Gate) -> None:
    begun: list[str] = []

    def split(key: Key, address: int, parts: int) -> list[Callable[[], int]]:
        def read(part: int) -> int:
            begun.append(f"{key[1]}{'abcd'[part]}")
            return gate(key, address)

        return [partial(read, part) for part in range(parts)]

    readers = Readers(gate, 4, split)
    for expert in (1, 2):
        readers.submit((1, expert), 1, urgent=False)
        until(lambda: readers._idle == 2)
    assert len(begun) == 2 and all(name[0] == "1" for name in begun)
    readers.make_urgent([(1, 2)])
    until(lambda: len(begun) == 4)
    assert sorted(name[0] for name in begun) == ["1", "1", "2", "2"]
    gate.open.set()
    assert [done.key for done in sorted(collect(readers, 2), key=str)] == [(1, 1), (1, 2)]
    readers.close()


def test_an_error_belongs_to_its_record() -> None:
    def load(key: Key, address: int) -> int:
        if key == (3, 1):
            raise ReadError("broken")
        return 7

    readers = Readers(load, 2)
    for expert in range(3):
        readers.submit((3, expert), expert)
    errors = {done.key: done.error for done in collect(readers, 3)}
    assert isinstance(errors.pop((3, 1)), ReadError)
    assert set(errors.values()) == {None}
    readers.close()


def test_nothing_is_written_after_closing(gate: Gate) -> None:
    written: list[int] = []

    def load(key: Key, address: int) -> int:
        gate(key, address)
        written.append(address)
        return 1

    readers = Readers(load, 2)
    for expert in range(6):
        readers.submit((0, expert), expert)
    until(lambda: len(gate.called) == 2)
    threading.Timer(0.05, gate.open.set).start()
    readers.close()
    assert sorted(written) == [0, 1]
    with pytest.raises(ValueError, match="closed"):
        readers.submit((0, 0), 0)


def test_a_lone_record_is_read_by_all_threads() -> None:
    together = threading.Barrier(4, timeout=LONGEST_S)
    asked: list[int] = []

    def split(key: Key, address: int, parts: int) -> list[Callable[[], int]]:
        asked.append(parts)
        return [lambda: together.wait() * 0 + 5] * parts

    readers = Readers(lambda key, address: 1, 4, split)
    until(lambda: readers._idle == 4)
    readers.submit((0, 0), 0)
    (done,) = collect(readers, 1)
    assert asked == [4] and done.nbytes == 20
    readers.close()


def test_a_record_is_finished_when_its_last_part_is_even_if_the_first_failed(gate: Gate) -> None:
    def fail() -> int:
        raise OSError("first part")

    def split(key: Key, address: int, parts: int) -> list[Callable[[], int]]:
        return [fail, lambda: gate(key, 9)]

    readers = Readers(lambda key, address: 1, 2, split)
    until(lambda: readers._idle == 2)
    readers.submit((0, 0), 0)
    until(lambda: gate.called == [(0, 0)])
    assert readers.wait(0.02) == []
    gate.open.set()
    (done,) = collect(readers, 1)
    assert str(done.error) == "first part" and done.nbytes == 9
    readers.close()


def test_a_split_that_fails_leaves_the_error_to_load() -> None:
    def load(key: Key, address: int) -> int:
        raise ReadError("no such expert")

    def split(key: Key, address: int, parts: int) -> list[Callable[[], int]]:
        raise KeyError(key)

    readers = Readers(load, 2, split)
    until(lambda: readers._idle == 2)
    readers.submit((0, 0), 0)
    assert str(collect(readers, 1)[0].error) == "no such expert"
    readers.close()


@pytest.mark.parametrize("seed", range(3))
def test_every_record_ends_once_in_any_course_of_events(seed: int) -> None:
    """Threads, guesses that come true, and parts, all at random."""
    choose = random.Random(seed)

    def load(key: Key, address: int) -> int:
        time.sleep((key[1] % 4) * 1e-4)
        if key[1] % 7 == 0:
            raise ReadError(str(key))
        return 6

    def split(key: Key, address: int, parts: int) -> list[Callable[[], int]]:
        return [lambda: load(key, address) // 3 for _ in range(3)]

    readers = Readers(load, 6, split)
    expected: set[Key] = set()
    found: list[Finished] = []
    for expert in range(400):
        key = (choose.randrange(40), expert)
        readers.submit(key, expert, urgent=choose.random() < 0.5)
        expected.add(key)
        if choose.random() < 0.1:
            readers.make_urgent(choose.sample(sorted(expected), min(3, len(expected))))
        if choose.random() < 0.3:
            found += readers.wait(0.001) if choose.random() < 0.5 else readers.finished()
    while new := readers.wait(LONGEST_S):
        found += new
    assert sorted(done.key for done in found) == sorted(expected)
    for done in found:
        assert done.address == done.key[1]
        assert (done.error is not None) == (done.key[1] % 7 == 0)
        assert done.error is not None or done.nbytes == 6
    assert readers.is_idle and readers.statistics.reads == len(found)
    readers.close()


def test_statistics_count_bytes_and_overlap() -> None:
    def load(key: Key, address: int) -> int:
        time.sleep(0.05)
        return 1000

    readers = Readers(load, 2)
    assert readers.statistics.bytes_s == 0.0
    for expert in range(4):
        readers.submit((0, expert), 0)
    collect(readers, 4)
    seen = readers.statistics
    assert (seen.nbytes, seen.reads) == (4000, 4)
    assert seen.busy_s < seen.depth_s and 1.0 < seen.mean_depth <= 2.0
    assert 0.05 <= seen.p50_s <= seen.p99_s
    assert 0 <= seen.cpu_s < seen.busy_s
    assert seen.since(seen).reads == 0
    readers.close()


# --- files ---


def write_records(folder: Path, count: int, nbytes: int = RECORD) -> tuple[Path, np.ndarray]:
    data = np.random.default_rng(5).integers(0, 256, (count, nbytes), np.uint8)
    path = folder / "records"
    path.write_bytes(data.tobytes())
    return path, data


def table_of(path: Path, count: int, nbytes: int = RECORD) -> dict[Key, tuple[Piece, ...]]:
    return {(2, i): (Piece(path, i * nbytes, nbytes),) for i in range(count)}


def check_all(reads: FileReads, data: np.ndarray, readers: Readers) -> None:
    """Read all records and compare them with what they should be."""
    arena = Arena(data.size)
    for expert in range(len(data)):
        address = arena.take(data.shape[1])
        assert address is not None
        readers.submit((2, expert), address)
    for done in collect(readers, len(data)):
        assert done.error is None and done.nbytes == data.shape[1]
        assert bytes(memory(done.address, done.nbytes)) == data[done.key[1]].tobytes()
    readers.close()
    reads.close()
    arena.close()


@pytest.mark.parametrize("io", ["direct", "buffered"])
@pytest.mark.parametrize("count", [1, 8])
def test_records_of_a_file(tmp_path: Path, io: Io, count: int) -> None:
    path, data = write_records(tmp_path, 4)
    reads = FileReads(table_of(path, 4), io)
    check_all(reads, data, Readers(reads.load, count, reads.split))


def test_parts_cover_a_record_once(tmp_path: Path) -> None:
    path, _ = write_records(tmp_path, 2)
    reads = FileReads({(0, 0): (Piece(path, 1000, RECORD),)}, "direct")
    arena = Arena(4 * RECORD)
    address = (arena.take(reads.room((0, 0))) or 0) + reads.places((0, 0))[0]
    for parts, expected in ((1, 1), (2, 2), (3, 3), (100, 4)):
        spans = [part.args for part in reads.split((0, 0), address - 1000, parts)]  # type: ignore[attr-defined]
        assert len(spans) in (expected, expected + 1)
        at = 1000
        for _, _, where, offset, nbytes in spans:
            assert offset == at and where - address == at - 1000
            assert nbytes <= max(PART_BYTES, -(-RECORD // parts)) + ALIGNMENT
            at += nbytes
        assert at == 1000 + RECORD
        assert all(offset % ALIGNMENT == 0 for _, _, _, offset, _ in spans[1:])
    reads.close()
    arena.close()


@pytest.mark.parametrize("io", ["direct", "buffered"])
def test_a_record_of_several_pieces(tmp_path: Path, io: Io) -> None:
    path, data = write_records(tmp_path, 2)
    flat = data.ravel()
    pieces = [(777, 100_001), (RECORD + 5, 60_000), (200_000, 4096)]
    reads = FileReads({(0, 0): tuple(Piece(path, at, n) for at, n in pieces)}, io)
    arena = Arena(1 << 20)
    address = arena.take(reads.room((0, 0))) or 0
    for read in (reads.load, lambda key, at: sum(part() for part in reads.split(key, at, 4))):
        memory(address, 1 << 18)[:] = bytes(1 << 18)
        assert read((0, 0), address) == sum(n for _, n in pieces)
        for (at, n), place in zip(pieces, reads.places((0, 0)), strict=True):
            assert place % ALIGNMENT == at % ALIGNMENT
            assert bytes(memory(address + place, n)) == flat[at : at + n].tobytes()
    reads.close()
    arena.close()


@pytest.mark.parametrize("io", ["direct", "buffered"])
@pytest.mark.parametrize("count", [1, 8])
def test_faults_change_nothing(tmp_path: Path, io: Io, count: int) -> None:
    path, data = write_records(tmp_path, 8)
    faults = Faults(seed=count, short=0.5, eio_once=0.5, delay_s=0.004, reorder=True)
    reads = FileReads(table_of(path, 8), io, faults.open_file)
    check_all(reads, data, faults.readers(reads.load, count, reads.split))
    assert faults.counts["short"] > 1 and faults.counts["eio"] > 0


def test_reordering_changes_the_order() -> None:
    orders = set()
    for seed in range(4):
        readers = Faults(seed=seed, reorder=True).readers(lambda key, address: 1, 1)
        for expert in range(6):
            readers.submit((0, expert), 0)
        until(lambda readers=readers: readers.is_idle)  # type: ignore[misc]
        orders.add(tuple(done.key[1] for done in collect(readers, 6)))
        readers.close()
    assert len(orders) > 1


def test_an_error_that_stays_names_everything(tmp_path: Path) -> None:
    path, _ = write_records(tmp_path, 2)
    faults = Faults(seed=1, broken=(("records", RECORD + 100),))
    reads = FileReads(table_of(path, 2), "direct", faults.open_file)
    arena = Arena(2 * RECORD)
    address = arena.take(RECORD) or 0
    assert reads.load((2, 0), address) == RECORD
    with pytest.raises(ReadError) as caught:
        reads.load((2, 1), address)
    assert caught.value.exit_code == 1
    assert caught.value.message == (
        f"expert 1 of layer 2 cannot be read ({path} at offset {RECORD}: Input/output error)"
    )
    assert faults.counts["eio"] == 4  # once, and three times again
    reads.close()
    arena.close()


def test_what_cannot_be_read_past_the_page_cache_is_read_through_it(tmp_path: Path) -> None:
    path, data = write_records(tmp_path, 1)
    faults = Faults(seed=1, broken=(("records", 100),))
    opened: list[Io] = []

    def open_file(path: Path, io: Io) -> RecordFile:
        opened.append(io)
        return faults.open_file(path, io) if io == "direct" else RecordFile.open(path, io)

    reads = FileReads(table_of(path, 1), "direct", open_file)
    arena = Arena(RECORD)
    address = arena.take(RECORD) or 0
    for _ in range(2):
        assert reads.load((2, 0), address) == RECORD
        assert bytes(memory(address, RECORD)) == data[0].tobytes()
    assert opened == ["direct", "buffered"]
    reads.close()
    arena.close()


def test_a_file_that_was_cut_is_told_as_such(tmp_path: Path) -> None:
    path, _ = write_records(tmp_path, 2)
    reads = FileReads(table_of(path, 2), "direct")
    arena = Arena(RECORD)
    address = arena.take(RECORD) or 0
    reads.check_unchanged()
    with path.open("r+b") as file:
        file.truncate(RECORD + 4096)
    with pytest.raises(BadFileError, match="changed while in use"):
        reads.load((2, 1), address)
    with pytest.raises(BadFileError, match="changed while in use"):
        reads.check_unchanged()
    reads.close()
    arena.close()


@pytest.mark.parametrize(("offset", "nbytes"), [(RECORD, RECORD + 1), (-1, 10), (0, 0)])
def test_a_piece_outside_of_its_file_is_refused(tmp_path: Path, offset: int, nbytes: int) -> None:
    path, _ = write_records(tmp_path, 2)
    with pytest.raises(BadFileError, match="of an expert at"):
        FileReads({(0, 0): (Piece(path, offset, nbytes),)}, "direct")


def test_a_missing_file_is_a_plain_error(tmp_path: Path) -> None:
    with pytest.raises(LocalV4Error, match="no absent in"):
        FileReads({(0, 0): (Piece(tmp_path / "absent", 0, 1),)}, "direct")
