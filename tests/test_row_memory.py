"""Rows of the context in memory and in files: addresses stay, bounds hold, nothing is left."""

import errno
import gc
import os
import sys
from dataclasses import replace
from pathlib import Path

import numba
import numpy as np
import pytest
from terminal import needs_jit

from localv4.engine.engine import Engine
from localv4.engine.memory import MemoryOptions, row_limits, row_memory
from localv4.engine.setup import Setup
from localv4.errors import DoesNotFitError, LocalV4Error, UsageError
from localv4.kernels.row_operations import COMPACT, F32
from localv4.library.installed import embedded_model_path
from localv4.model import state as state_module
from localv4.model.config_json import read_config
from localv4.model.fast_network import FastNetwork
from localv4.model.snapshot import fork
from localv4.model.state import BLOCK, State
from localv4.paging import address_space, row_file
from localv4.paging import row_memory as memory_module
from localv4.paging.row_file import CHUNK, RowFile
from localv4.paging.row_memory import RowMemory, Wanted, view
from localv4.planning.model_facts import held_state_bytes
from localv4.planning.subject import NETWORKS

CONFIG = read_config(NETWORKS / "flash.json")
needs_linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs a system that tells what is in memory"
)


def fill(state: State, positions: int) -> None:
    """Process `positions` tokens whose entries are bytes that tell the layer and the position."""
    first, end = state.position, state.position + positions
    state.begin(positions)
    for index, layer in enumerate(state.layers):
        for rows in layer.entries:
            numbers = np.arange(first // layer.ratio, end // layer.ratio)
            rows.values[numbers] = ((31 * index + numbers) % 251)[:, None]
    state.advance(positions)


def check(state: State) -> None:
    """Check that all entries are what `fill` has written."""
    for index, layer in enumerate(state.layers):
        for rows in layer.entries:
            count = state.position // layer.ratio
            expected = ((31 * index + np.arange(count)) % 251).astype(rows.values.dtype)
            assert (rows.values[:count] == expected[:, None]).all()


def test_arrays_grow_by_blocks_and_stay_where_they_are() -> None:
    state = State(CONFIG, 256, COMPACT)
    fill(state, 5)
    places, sizes = state.addresses.copy(), state.nbytes
    fill(state, BLOCK - 5)
    assert state.nbytes == sizes
    fill(state, 3000)
    assert np.array_equal(state.addresses, places)
    check(state)


@pytest.mark.parametrize("rows", [F32, COMPACT], ids=lambda rows: rows.name)
def test_bytes_per_token_of_the_longest_context(rows: object) -> None:
    state = State(CONFIG, 256, rows)  # type: ignore[arg-type]
    before = state.nbytes
    state.begin(CONFIG.max_positions)
    per_token = (state.nbytes - before) / CONFIG.max_positions
    assert per_token == pytest.approx(13_760 if rows is F32 else 3_514, abs=0.5)


def test_only_touched_rows_take_memory() -> None:
    def anonymous() -> int:
        text = Path("/proc/self/status").read_text("ascii")
        return next(int(line.split()[1]) for line in text.splitlines() if "RssAnon" in line) << 10

    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    before = anonymous()
    state = State(CONFIG, 256, F32)
    state.begin(CONFIG.max_positions)
    assert anonymous() - before < 300 << 20  # of 14.4 GB: the rings, and pages in part


def test_without_addresses_rows_move_as_they_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    reserve = address_space.reserve

    def reserve_little(nbytes: int, *, huge: bool, step: int) -> object:
        if nbytes > 8 << 20:
            raise MemoryError
        return reserve(nbytes, huge=huge, step=step)

    monkeypatch.setattr(memory_module.address_space, "reserve", reserve_little)
    state = State(CONFIG, 256, COMPACT)
    fill(state, 100)
    before = state.addresses.copy()
    fill(state, 2000)
    assert not np.array_equal(state.addresses, before)
    check(state)


def test_a_file_has_the_rows_that_are_chosen(tmp_path: Path) -> None:
    state = State(CONFIG, 256, COMPACT, RowMemory(tmp_path))
    plain = State(CONFIG, 256, COMPACT)
    for each in (state, plain):
        fill(each, 700)
    check(state)
    assert list(tmp_path.iterdir()) == []  # no name, so nothing is left by a crash
    twin = fork(state)
    fill(twin, 300)
    fill(state, 100)
    check(twin)
    check(state)
    state.roll_back(790)
    fill(state, 300)
    check(state)


@needs_linux
def test_a_bound_holds_and_nothing_is_lost(tmp_path: Path) -> None:
    sizes = [6 * CHUNK, 3 * CHUNK]
    memory = RowMemory(tmp_path)
    arrays = memory.make([Wanted(size, is_sparse=True) for size in sizes])
    views = []
    for array in arrays:
        array.commit(array.nbytes)
        views.append(view(array, array.nbytes // 512, 512, np.dtype(np.uint8)))
    rng = np.random.default_rng(0)
    expected = [rng.integers(0, 256, v.shape, np.uint8) for v in views]
    for values, wanted in zip(views, expected, strict=True):
        values[:] = wanted
    (file,) = memory._files
    assert file.look() == file.resident == 9 * CHUNK
    gone = file.evict(4 * CHUNK)
    file.look()
    if Path(tmp_path).stat().st_dev != Path("/dev/shm").stat().st_dev:  # that one is memory itself
        assert 4 * CHUNK <= gone <= 5 * CHUNK
        assert file.resident <= 5 * CHUNK
    for values, wanted in zip(views, expected, strict=True):
        assert np.array_equal(values, wanted)


@needs_linux
def test_settling_takes_rows_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "LEAST_KEYS_BYTES", 1 << 20)
    cap = 24 << 20
    memory = RowMemory(tmp_path, cap)
    state = State(CONFIG, 256, COMPACT, memory)
    before = state.nbytes
    for _ in range(8):
        state.make_way_to_copy(2048)
        fill(state, 2048)
    whole = State(CONFIG, 256, COMPACT)
    whole.begin(8 * 2048)
    assert whole.nbytes - before > 2 * cap
    assert memory._always + pages_of(memory) <= cap
    check(state)


@needs_linux
def test_a_bound_holds_while_tokens_read_scattered_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the shape of V4-Flash are touched as attention would; every page is counted."""
    skip_where_disk_is_memory(tmp_path)
    monkeypatch.setattr(memory_module, "KEYS_BYTES", 24 << 20)
    config = replace(CONFIG, index_top_k=64)
    memory = RowMemory(tmp_path)
    state = State(config, 256, COMPACT, memory)
    for _ in range(16):
        state.make_way_to_copy(1024)
        fill(state, 1024)
        assert pages_of(memory) <= 24 << 20
    rng, seen = np.random.default_rng(0), []
    sparse = [layer.compressor.entries for layer in state.layers if layer.indexer is not None]  # type: ignore[union-attr]
    for _ in range(12):
        state.make_way(1)
        for rows in sparse:
            rows.values[rng.integers(0, state.position // 4, 64)].sum()
        seen.append(pages_of(memory))
    assert 12 << 20 < max(seen) <= 24 << 20
    assert state.reads(1) > 8 << 20
    check(state)


@needs_linux
@needs_jit
def test_a_bound_holds_within_prompts_tokens_and_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_where_disk_is_memory(tmp_path)
    for name in ("KEYS_BYTES", "LEAST_KEYS_BYTES"):
        monkeypatch.setattr(memory_module, name, 26 << 12)
    monkeypatch.setattr(state_module, "_COPIED", 4 << 12)
    options = MemoryOptions(kv="bf16", kv_dir=tmp_path)
    engine = Engine.load(embedded_model_path(), Setup(threads=1, memory=options))
    memory, most = engine.network.row_memory, [0]
    run = FastNetwork.run

    def counted(network: FastNetwork, program: object) -> None:
        run(network, program)  # type: ignore[arg-type]
        most[0] = max(most[0], pages_of(memory))

    monkeypatch.setattr(FastNetwork, "run", counted)
    ids = np.random.default_rng(0).integers(10, 8000, 1200).tolist()
    session = engine.new_session()
    session.read(ids[:900])
    assert 8 << 12 < most[0] <= 26 << 12  # of which all layers together would have far more
    assert session.state.reads(900) > 2 * (26 << 12)
    twins = [session.fork() for _ in range(3)]
    for twin in twins:
        twin.read(ids[900:1000])
    assert most[0] <= 26 << 12
    network = engine.network
    for token in ids[1000:1010]:
        network.decode_rows(np.array([token] * 3), [twin.state for twin in twins])
        # what a single token reads cannot be less; that of three would be three times as much
        assert pages_of(memory) <= max(26 << 12, twins[0].state.reads(1))


def pages_of(memory: RowMemory) -> int:
    """Return the bytes that rows in files have in memory at this moment."""
    return sum(file.look() for file in memory._files)


def skip_where_disk_is_memory(folder: Path) -> None:
    """Skip a test on a tmpfs: its pages stay."""
    if folder.stat().st_dev == Path("/dev/shm").stat().st_dev:
        pytest.skip("this folder is memory itself")


def test_rows_that_every_token_reads_must_fit(tmp_path: Path) -> None:
    state = State(CONFIG, 256, COMPACT, RowMemory(tmp_path, 24 << 20))
    state.begin(1024)
    state.advance(1024)
    with pytest.raises(DoesNotFitError, match="--kv-ram is 24 MiB") as caught:
        state.begin(65_536)
    assert caught.value.exit_code == 4
    assert "--kv-ram" in str(caught.value.hint)


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    state = State(CONFIG, 256, COMPACT, RowMemory(tmp_path))
    fill(state, 100)
    monkeypatch.setattr(row_file, "_allocate", full)
    with pytest.raises(DoesNotFitError, match="no space for") as caught:
        state.begin(100_000)
    assert "--kv-dir" in str(caught.value.hint)
    monkeypatch.undo()
    fill(state, 1000)  # the state is as it was
    check(state)


def test_a_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LocalV4Error, match="cannot keep rows in"):
        RowFile(tmp_path / "file", [CHUNK])


def test_files_go_with_their_states(tmp_path: Path) -> None:
    memory = RowMemory(tmp_path)
    state = State(CONFIG, 256, COMPACT, memory)
    fill(state, 10)
    values = state.layers[2].compressor.entries.values  # type: ignore[union-attr]
    del state
    gc.collect()
    assert len(memory._files) == 1  # an array of it is still in use
    assert values[0, 0] == 62
    del values
    gc.collect()
    assert len(memory._files) == 0


def test_plans_count_what_stays_in_memory() -> None:
    config = read_config(embedded_model_path() / "config.json")
    for options in (MemoryOptions(), MemoryOptions(kv_dir=Path("x"))):
        limits = row_limits(options)
        unbounded = held_state_bytes(config, 4096, F32)
        assert held_state_bytes(config, 4096, F32, limits=limits) == unbounded
    capped = row_limits(MemoryOptions(kv_dir=Path("x"), kv_ram=1 << 30))
    whole, bounded = (
        held_state_bytes(CONFIG, 1 << 20, F32, limits=x)
        for x in (row_limits(MemoryOptions()), capped)
    )
    assert whole - bounded == 13_760 * (1 << 20) - (1 << 30)
    keys = row_limits(MemoryOptions(kv_dir=Path("x")))
    assert bounded < held_state_bytes(CONFIG, 1 << 20, F32, limits=keys) < whole
    with pytest.raises(UsageError, match="--kv-ram needs a folder"):
        row_memory(MemoryOptions(kv_ram=1 << 30))


@pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="packed kernels need the compiler")
def test_logits_are_the_same_from_a_file(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(10, 8000, 900).tolist()
    options = MemoryOptions(kv="compact", kv_dir=tmp_path, kv_ram=64 << 20)
    found = []
    for memory in (MemoryOptions(kv="compact"), options):
        engine = Engine.load(embedded_model_path(), Setup(threads=1, memory=memory))
        session = engine.new_session()
        session.extend(ids[:-2])
        found.append([session.extend([token]) for token in ids[-2:]])
        has_file = len(session.state.memory._files)
        assert has_file == (memory is options)
    assert np.array_equal(*found)
    assert list(tmp_path.iterdir()) == []
