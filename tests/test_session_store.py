"""Prefixes on the disk: loading one changes no bit, and no file on the disk is believed."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from golden_files import load_golden, write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import CONTEXT, logits, open_network
from numpy.typing import NDArray
from safetensors import safe_open
from test_ladder import IDS, KINDS, OTHER

from localv4.engine import session_store
from localv4.engine.fingerprint import arithmetic_fingerprint, weights_fingerprint
from localv4.engine.session import Network, Session
from localv4.engine.session_blocks import BLOCK_TOKENS, chain
from localv4.engine.session_folder import (
    LIMIT_VARIABLE,
    SessionFolder,
    open_folder,
    sessions_dir,
)
from localv4.engine.session_store import SessionStore
from localv4.errors import DoesNotFitError
from localv4.model.snapshot import restore
from localv4.storage import open_checkpoint

LIMIT = 1 << 30


@pytest.fixture(scope="module", params=KINDS)
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Network:
    return KINDS[request.param](tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def clean(network: Network) -> NDArray[np.float32]:
    return logits(network, IDS)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Network:
    """The network of the tests that have nothing to do with its kind."""
    return KINDS["exact"](tmp_path_factory.mktemp("tiny"))


class Disk:
    """A folder, and the warnings of those who used it."""

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        self.folder = SessionFolder(folder / "sessions", limit)
        self.warnings: list[str] = []

    def store(self, fingerprint: str = "a model") -> SessionStore:
        return SessionStore(self.folder, fingerprint, self.warnings.append)

    def session(self, network: Network, fingerprint: str = "a model") -> Session:
        session = Session(network, CONTEXT)
        session.store = self.store(fingerprint)
        return session

    def save(self, session: Session) -> None:
        self.store().save(session)

    def names(self, kind: str = "*") -> list[str]:
        return sorted(path.name for path in self.folder.folder.glob(f"{kind}/??/*"))


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


def saved(disk: Disk, network: Network, *parts: list[int]) -> Session:
    session = disk.session(network)
    for part in parts:
        session.extend(part)
    disk.save(session)
    return session


@pytest.mark.parametrize("length", [129, 255, 256, 257, 400, 511, 540])
def test_a_loaded_prefix_goes_on_as_a_clean_run(
    length: int, network: Network, clean: NDArray[np.float32], disk: Disk
) -> None:
    saved(disk, network, IDS[:length])
    session = disk.session(network)
    reused = session.reuse(IDS)
    assert reused == length // BLOCK_TOKENS * BLOCK_TOKENS
    assert session.tokens == IDS[:reused]
    assert np.array_equal(session.all_logits(IDS[reused:]), clean[reused:])
    assert disk.warnings == []


def test_what_is_in_memory_is_not_read_again(
    network: Network, clean: NDArray[np.float32], disk: Disk
) -> None:
    saved(disk, network, IDS[:520])
    session = disk.session(network)
    session.extend(IDS[:300])
    for name in chain(session.store._root(session.state), IDS)[:2]:  # type: ignore[union-attr]
        disk.folder.block(name).unlink()
    assert session.reuse(IDS) == 512
    assert np.array_equal(session.all_logits(IDS[512:]), clean[512:])
    session.extend(OTHER[:400])
    session.ladder.cut(0)  # of the way back only the disk knows
    assert session.reuse(IDS) == 512
    assert np.array_equal(session.all_logits(IDS[512:]), clean[512:])


def test_branches_share_blocks_and_lie_side_by_side(
    network: Network, clean: NDArray[np.float32], disk: Disk
) -> None:
    saved(disk, network, IDS[:300], OTHER[:200])
    before = set(disk.names("blocks"))
    saved(disk, network, IDS[:520])
    assert len(before) == 3 and len(set(disk.names("blocks")) - before) == 2
    session = disk.session(network)
    assert session.reuse([*IDS[:300], *OTHER[:200]]) == 384
    session.extend(OTHER[84:200])
    assert session.reuse(IDS) == 512
    assert np.array_equal(session.all_logits(IDS[512:]), clean[512:])


def test_forks_spare_each_other_when_one_loads(
    network: Network, clean: NDArray[np.float32], disk: Disk
) -> None:
    saved(disk, network, IDS[:520])
    session = disk.session(network)
    session.extend([*IDS[:200], *OTHER[:100]])
    expected = Session(network, CONTEXT)
    expected.extend([*IDS[:200], *OTHER[:100]])
    fork = session.fork()
    assert session.reuse(IDS) == 512
    assert np.array_equal(fork.extend(OTHER[100:200]), expected.extend(OTHER[100:200]))
    assert np.array_equal(session.all_logits(IDS[512:]), clean[512:])


def test_short_sessions_leave_no_files(tiny: Network, disk: Disk) -> None:
    saved(disk, tiny, IDS[:127])
    assert disk.names() == []
    assert disk.session(tiny).reuse(IDS) == 0


def test_saving_again_writes_what_is_new(tiny: Network, disk: Disk) -> None:
    session = saved(disk, tiny, IDS[:300])
    times = {path: path.stat().st_ino for path in disk.folder.folder.rglob("*.safetensors")}
    session.extend(IDS[300:500])
    disk.save(session)
    assert all(path.stat().st_ino == inode for path, inode in times.items())
    assert len(disk.names("blocks")) == 3 and len(disk.names("snapshots")) == 2


def test_files_are_safetensors_of_this_user_alone(tiny: Network, disk: Disk) -> None:
    saved(disk, tiny, IDS[:300])
    for path in disk.folder.folder.rglob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            assert file.metadata() == {"localv4-session": "1"}
        if path.parents[1].name == "blocks":
            first = IDS[: 2 * BLOCK_TOKENS]
            assert arrays["ids"].tolist() in (first[:BLOCK_TOKENS], first[BLOCK_TOKENS:])
    if os.name != "nt":
        assert disk.folder.folder.stat().st_mode & 0o777 == 0o700


def test_other_models_modes_and_layouts_have_other_names(
    tiny: Network, disk: Disk, tmp_path: Path
) -> None:
    saved(disk, tiny, IDS[:300])
    assert disk.session(tiny, "another").reuse(IDS) == 0
    wide = open_network(write_model(load_golden("wide"), tmp_path / "wide"))
    assert disk.session(wide).reuse(IDS) == 0
    assert disk.warnings == []


def test_fingerprints(tmp_path: Path, tiny: Network) -> None:
    model = load_golden("tiny300")
    folders = [write_model(model, tmp_path / name, shards=1) for name in ("a", "b")]
    one, same = map(open_checkpoint, folders)
    assert weights_fingerprint(one) == weights_fingerprint(same)
    network = open_network(folders[0])
    before = arithmetic_fingerprint(one, network)
    network.name = "other"  # type: ignore[misc]
    assert arithmetic_fingerprint(one, network) != before
    del network.name
    assert arithmetic_fingerprint(one, network) == before
    # the middle of one matrix: another release of the same model
    changed = folders[1] / "model.safetensors"
    data, tensor = bytearray(changed.read_bytes()), same.tensors["layers.3.attn.wq_a.weight"]
    data[tensor.offset + tensor.nbytes // 2 + 5] ^= 1
    changed.write_bytes(data)
    with open_checkpoint(folders[1]) as other:
        assert weights_fingerprint(other) != weights_fingerprint(one)


# damage

DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: os.truncate(path, path.stat().st_size + 1),
    "empty": lambda path: os.truncate(path, 0),
    "huge": lambda path: os.truncate(path, 1 << 40),
    "bit": lambda path: flip(path, path.stat().st_size // 2),
    "header": lambda path: flip(path, 20),
    "checksum": lambda path: flip(path, path.stat().st_size - 1),
    "folder": lambda path: (path.unlink(), path.mkdir())[1],
    "pipe": lambda path: (path.unlink(), os.mkfifo(path))[1],
    "link": lambda path: (path.unlink(), path.symlink_to("/dev/zero"))[1],
}


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


@pytest.mark.skipif(os.name == "nt", reason="pipes and links")
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["blocks", "snapshots"])
def test_damaged_files_are_told_once_and_computed_anew(
    kind: str, damage: str, tiny: Network, disk: Disk
) -> None:
    saved(disk, tiny, IDS[:300])
    for path in (disk.folder.folder / kind).glob("??/*"):
        DAMAGES[damage](path)
    session = disk.session(tiny)
    start = time.monotonic()
    assert session.reuse(IDS) == 0
    assert time.monotonic() - start < 5
    assert len(disk.warnings) == 1
    session.extend(IDS[:300])
    disk.save(session)
    # a folder is not removed: whoever made it may have a reason
    assert disk.session(tiny).reuse(IDS) == (0 if damage == "folder" else 256)


def test_one_bad_block_costs_what_follows_it(tiny: Network, disk: Disk) -> None:
    session = saved(disk, tiny, IDS[:300], IDS[300:520])
    name = chain(session.store._root(session.state), IDS)[2]  # type: ignore[union-attr]
    flip(disk.folder.block(name), 3000)
    again = disk.session(tiny)
    assert again.reuse(IDS) == 256
    assert not disk.folder.block(name).exists()
    again.extend(IDS[256:520])
    disk.save(again)
    assert disk.session(tiny).reuse(IDS) == 512
    assert len(disk.warnings) == 1


def test_a_block_under_another_name_is_foreign(tiny: Network, disk: Disk) -> None:
    session = saved(disk, tiny, IDS[:300])
    first, second = chain(session.store._root(session.state), IDS)[:2]  # type: ignore[union-attr]
    shutil.copy(disk.folder.block(first), disk.folder.block(second))
    assert disk.session(tiny).reuse(IDS) == 0
    assert "other tokens" in disk.warnings[0]


@pytest.fixture(scope="module")
def pristine(tiny: Network, tmp_path_factory: pytest.TempPathFactory) -> Disk:
    disk = Disk(tmp_path_factory.mktemp("pristine"))
    saved(disk, tiny, IDS[:200])
    return disk


@settings(max_examples=60, deadline=None)
@given(place=st.integers(0), value=st.integers(0, 255), data=st.data())
def test_any_changed_byte_is_noticed(
    place: int, value: int, data: st.DataObject, tiny: Network, pristine: Disk
) -> None:
    path = data.draw(st.sampled_from(sorted(pristine.folder.folder.rglob("*.safetensors"))))
    before = path.read_bytes()
    place %= len(before)
    path.write_bytes(before[:place] + bytes([value]) + before[place + 1 :])
    reused = pristine.session(tiny).reuse(IDS)
    path.write_bytes(before)
    assert reused == (128 if before[place] == value else 0)


# limits


def test_the_least_recently_used_goes_first(tiny: Network, tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    paths = [[number, *IDS[:299]] for number in range(6)]
    saved(disk, tiny, paths[0])
    one = sum(file.nbytes for file in disk.folder.files())
    disk.folder.limit = 4 * one
    for ids in paths[1:4]:
        saved(disk, tiny, ids)
    assert disk.session(tiny).reuse([*paths[0], 1]) == 256  # used again: younger than 1 ... 3
    for ids in paths[4:]:
        saved(disk, tiny, ids)
        assert sum(file.nbytes for file in disk.folder.files()) <= disk.folder.limit
    found = [disk.session(tiny).reuse([*ids, 1]) for ids in paths]
    assert found[0] == found[4] == found[5] == 256
    assert found[1] == found[2] == 0
    assert disk.warnings == []


def test_beginnings_outlive_what_follows_them(tiny: Network, tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    session = saved(disk, tiny, IDS[:150], IDS[150:520])
    names = chain(session.store._root(session.state), IDS)[:4]  # type: ignore[union-attr]
    disk.folder.limit = sum(file.nbytes for file in disk.folder.files()) - 1
    disk.folder.make_room(0)
    assert disk.folder.block(names[0]).exists() and not disk.folder.snapshot(names[3]).exists()
    assert disk.session(tiny).reuse(IDS) == 128


def test_what_is_too_large_is_not_kept(tiny: Network, tmp_path: Path) -> None:
    disk = Disk(tmp_path, limit=1000)
    saved(disk, tiny, IDS[:300])
    assert disk.names() == [] and LIMIT_VARIABLE in disk.warnings[0]
    nothing = Disk(tmp_path, limit=0)
    saved(nothing, tiny, IDS[:300])
    assert nothing.names() == nothing.warnings == []


def test_a_full_disk_is_left_alone(
    tiny: Network, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(disk.folder.folder.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    saved(disk, tiny, IDS[:300])
    assert disk.names() == [] and "nearly full" in disk.warnings[0]


def test_a_folder_that_cannot_be_made_is_a_warning(tiny: Network, tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    disk.folder.folder.write_text("a file where a folder is due")
    session = saved(disk, tiny, IDS[:300])
    assert session.reuse(IDS) == 300 and len(disk.warnings) == 1


def test_unfinished_files_are_removed_when_they_are_old(tiny: Network, disk: Disk) -> None:
    saved(disk, tiny, IDS[:300])
    folder = next((disk.folder.folder / "blocks").glob("??"))
    old, young = folder / ".a.part", folder / ".b.part"
    for path in (old, young):
        path.write_bytes(b"x")
    os.utime(old, (1, 1))
    list(disk.folder.files())
    assert young.exists() and not old.exists()


def test_a_failed_write_leaves_nothing_half_made(
    tiny: Network, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(100))

    def fail(descriptor: int) -> None:
        if next(calls) == 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("localv4.finished_file.os.fsync", fail)
    saved(disk, tiny, IDS[:300])
    assert len(disk.warnings) == 1 and "No space" in disk.warnings[0]
    assert not any(name.startswith(".") for name in disk.names())
    monkeypatch.undo()
    saved(disk, tiny, IDS[:300])
    assert disk.session(tiny).reuse(IDS) == 256


def test_two_at_once(tiny: Network, tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    session = Session(tiny, CONTEXT)
    session.extend(IDS[:520])
    disk.folder.limit = 10**6
    threads = [threading.Thread(target=disk.store().save, args=(session,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(name.endswith(".part") for name in disk.names())
    assert disk.warnings == [] or "larger" in disk.warnings[0]


def test_a_killed_writer_leaves_whole_files_only(tmp_path: Path) -> None:
    """A process is killed again and again while it writes; what has a name is whole."""
    script = tmp_path / "write.py"
    script.write_text(
        "import sys, numpy as np\nfrom pathlib import Path\n"
        "from localv4.engine.session_blocks import Form, write_file\n"
        "values = np.arange(1 << 18, dtype=np.float32)\n"
        "form = Form((('a', values.dtype, values.shape),))\n"
        "print('ready', flush=True)\n"
        "for number in range(10**6):\n"
        "    write_file(Path(sys.argv[1]) / f'{number}', form, [values])\n"
    )
    from localv4.engine.session_blocks import Form, read_file

    form = Form((("a", np.dtype(np.float32), (1 << 18,)),))
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        with subprocess.Popen(
            [sys.executable, str(script), str(folder)], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            time.sleep(0.05 + 0.017 * attempt)
            process.kill()
        whole = [path for path in folder.iterdir() if not path.name.startswith(".")]
        for path in whole:
            assert len(read_file(path, form)[0]) == 1 << 18


def test_running_out_of_memory_is_told(
    tiny: Network, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(disk, tiny, IDS[:300])
    session = disk.session(tiny)

    def full(first: int, end: int) -> None:
        raise MemoryError

    monkeypatch.setattr(session.state, "open_rows", full)
    with pytest.raises(DoesNotFitError, match="not enough memory"):
        session.reuse(IDS)


def test_the_default_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALV4_HOME", str(tmp_path / "not" / "there"))
    assert sessions_dir() == tmp_path / "not" / "there" / "sessions"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(total=10 << 30))
    assert open_folder().limit == 1 << 30
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(total=10 << 40))
    assert open_folder().limit == 8 << 30 and open_folder(5).limit == 5


def test_a_state_that_was_restored_is_saved_as_before(tiny: Network, disk: Disk) -> None:
    session = saved(disk, tiny, IDS[:300], IDS[300:520])
    before = {path: path.read_bytes() for path in disk.folder.folder.rglob("*.safetensors")}
    rung = session.ladder.below(256)
    assert rung is not None
    restore(session.state, rung)
    del session.tokens[256:]
    session.ladder.cut(256)
    session.extend(IDS[256:520])
    for path in before:
        path.unlink()
    disk.save(session)
    assert all(path.read_bytes() == before[path] for path in before if path.exists())
    assert sum(path.exists() for path in before) >= 5


def test_the_header_tells_what_is_inside(tiny: Network, disk: Disk) -> None:
    session = saved(disk, tiny, IDS[:300])
    path = disk.folder.block(chain(session.store._root(session.state), IDS)[0])  # type: ignore[union-attr]
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    fields = json.loads(data[8 : 8 + length])
    assert fields["ids"] == {"dtype": "I32", "shape": [128], "data_offsets": [0, 512]}
    assert session_store.BLOCK_TOKENS == 128
