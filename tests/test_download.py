"""Downloads: planned, resumed, checked, shared by processes, and safe from hostile hubs."""

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, hf_hub_download, scan_cache_dir
from loopback_hub import LoopbackHub, noise
from model_folders import FLASH_COMMIT, empty_home

from localv4.errors import BadFileError, DoesNotFitError, LocalV4Error, NotFoundError, UsageError
from localv4.library import download as module
from localv4.library import hub as door
from localv4.library.digests import read_record
from localv4.library.download import Plan, download, plan, stream_shard
from localv4.library.installed import list_installed, resolve
from localv4.library.published import find_published
from localv4.library.removal import plan_removal
from localv4.library.verification import check_files, expected_files

REPO = "deepseek-ai/DeepSeek-V4-Flash"
SHARDS = {f"model-{part:05d}-of-00003.safetensors": noise(900_000, part) for part in (1, 2, 3)}
CONFIG = b'{"model_type": "deepseek_v4"}'
FILES: dict[str, bytes] = {"config.json": CONFIG, **SHARDS}
OTHERS: dict[str, bytes | Path] = {
    "README.md": b"x",
    "modeling.py": b"import os",
    "pytorch_model.bin": noise(5000),
}
TOTAL = sum(map(len, FILES.values()))
LARGE = sum(map(len, SHARDS.values()))


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(door, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(module, "LOCK_POLL_S", 0.01)
    return empty_home(monkeypatch, tmp_path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        server.use(monkeypatch)
        server.add(REPO, {**FILES, **OTHERS}, FLASH_COMMIT)
        yield server


def planned(reference: str = "v4-flash", **options: Any) -> Plan:
    return plan(find_published(reference), **options)


def pull(reference: str = "v4-flash", notes: list[str] | None = None, **options: Any) -> Path:
    told = notes if notes is not None else []
    return download(planned(reference, **options), on_note=told.append)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files below a folder; hidden ones are no part of a model."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.relative_to(folder).as_posix().startswith(".")
    }


def parts(home: Path) -> list[Path]:
    return list(home.rglob("*.incomplete"))


# ---- what is fetched, and where it goes


def test_a_plan_says_what_would_be_fetched_and_writes_nothing(hub: LoopbackHub, home: Path) -> None:
    task = planned()
    assert [file.name for file in task.files] == sorted(FILES)
    assert (task.total, task.needed) == (TOTAL, TOTAL)
    assert task.listing.commit == FLASH_COMMIT
    assert task.free > 0
    assert list(home.iterdir()) == []
    assert hub.bytes_sent == 0


def test_a_pulled_model_is_installed_and_known_to_huggingface_hub(
    hub: LoopbackHub, home: Path
) -> None:
    seen: list[int] = []
    folder = download(planned(), on_bytes=seen.append)
    assert contents(folder) == FILES
    assert sum(seen) == TOTAL
    assert resolve("v4-flash").path == folder
    [repo] = scan_cache_dir(home / "hub").repos
    assert (repo.repo_id, repo.size_on_disk) == (REPO, TOTAL)
    asked = len(hub.requests)
    path = hf_hub_download(REPO, "config.json", revision=FLASH_COMMIT, cache_dir=home / "hub")
    assert Path(path).read_bytes() == CONFIG
    assert len(hub.requests) == asked
    assert parts(home) == []


def test_a_second_pull_fetches_nothing(hub: LoopbackHub) -> None:
    folder = pull()
    asked = len(hub.transfers())
    task = planned()
    assert (task.missing, task.needed) == ((), 0)
    assert download(task) == folder
    assert len(hub.transfers()) == asked


def test_files_that_huggingface_hub_has_fetched_are_not_fetched_again(
    hub: LoopbackHub, home: Path
) -> None:
    name = "model-00002-of-00003.safetensors"
    hf_hub_download(REPO, name, revision=FLASH_COMMIT, cache_dir=home / "hub")
    task = planned()
    assert task.needed == TOTAL - len(SHARDS[name])
    assert contents(download(task)) == FILES
    assert hub.bytes_sent == TOTAL


def test_force_fetches_everything_again(hub: LoopbackHub) -> None:
    folder = pull()
    (folder / "config.json").resolve().write_bytes(b"x" * len(CONFIG))
    pull()
    assert (folder / "config.json").read_bytes() != CONFIG
    assert contents(pull(force=True)) == FILES


def test_a_file_of_another_size_is_replaced(hub: LoopbackHub) -> None:
    shard = (pull() / "model-00001-of-00003.safetensors").resolve()
    shard.write_bytes(b"short")
    assert contents(pull()) == FILES


def test_a_folder_of_ones_own(hub: LoopbackHub, home: Path) -> None:
    folder = home / "mine"
    assert pull(local_dir=folder) == folder
    assert contents(folder) == FILES
    assert not (home / "hub").exists()
    assert resolve(str(folder)).problem is None
    assert planned(local_dir=folder).missing == ()
    (folder / "config.json").write_bytes(b"z" * len(CONFIG))
    (folder / ".localv4" / "pull.json").unlink()
    assert [file.name for file in planned(local_dir=folder).missing] == ["config.json"]


def test_revisions_and_references(hub: LoopbackHub, home: Path) -> None:
    newer = hub.add(REPO, {"config.json": CONFIG, "model.safetensors": noise(2000)})
    assert planned("hf://" + REPO).listing.commit == FLASH_COMMIT  # pinned
    wanted = find_published("deepseek-v4-flash", "main")
    folder = download(plan(wanted))
    assert folder.name == newer
    assert (home / "hub" / f"models--{REPO.replace('/', '--')}" / "refs" / "main").read_text() == (
        newer
    )
    assert resolve("v4-flash").path == folder
    for revision in ("../x", "", "a..b", "x\n", "-x"):
        with pytest.raises(UsageError, match="is no revision"):
            find_published("v4-flash", revision)
    with pytest.raises(NotFoundError, match="no such revision"):
        plan(find_published("v4-flash", "v9"))


def test_names_that_mean_nothing_or_too_much(home: Path) -> None:
    with pytest.raises(NotFoundError) as near:
        find_published("v4-flas")
    assert near.value.hint == "did you mean v4-flash"
    with pytest.raises(UsageError) as bare:
        find_published("org/name")
    assert bare.value.hint == "localv4 pull hf://org/name"
    for text in ("hf://x", "hf://a/../b", "hf://a/b/c", "hf://", "v4-flash:q4", "tiny-v4"):
        with pytest.raises(UsageError):
            find_published(text)
    with pytest.raises(UsageError) as several:
        find_published("ds4-flash")
    assert several.value.hint is not None
    assert "ds4-flash:q2-q4" in several.value.hint


def test_one_form_of_a_repository_of_gguf_files(hub: LoopbackHub) -> None:
    pairs = [("Q4_K_M", 1), ("Q4_K_M", 2), ("Q2_K", 1), ("Q2_K", 2)]
    files = {f"V4-{label}-{part:05d}-of-00002.gguf": noise(3000, part) for label, part in pairs}
    hub.add("org/DeepSeek-V4-GGUF", {**files, "mmproj-F16.gguf": noise(2000), "x.json": b"{}"})
    folder = pull("hf://org/DeepSeek-V4-GGUF:q2_k")
    assert set(contents(folder)) == {name for name in files if "Q2_K" in name}
    with pytest.raises(UsageError) as several:
        planned("hf://org/DeepSeek-V4-GGUF")
    assert several.value.hint == (
        "choose one: hf://org/DeepSeek-V4-GGUF:Q2_K, hf://org/DeepSeek-V4-GGUF:Q4_K_M"
    )
    hub.add("org/text", {"README.md": b"x", "model.bin": noise(5000)})
    with pytest.raises(NotFoundError, match="no weights"):
        planned("hf://org/text")


def test_another_architecture_stops_before_its_weights(hub: LoopbackHub) -> None:
    other = b'{"model_type": "llama"}'
    hub.add("org/llama", {"config.json": other, "model.safetensors": noise(5000)})
    with pytest.raises(LocalV4Error, match="is no DeepSeek-V4 model"):
        pull("hf://org/llama")
    assert hub.transfers() == []


@pytest.mark.parametrize("is_refused", [False, True])
def test_a_system_without_links(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, is_refused: bool
) -> None:
    def refuse(*_arguments: object) -> None:
        raise OSError("a privilege is missing")

    if is_refused:
        monkeypatch.setattr(Path, "symlink_to", refuse)
    else:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True, raising=False)
    folder = pull()
    assert contents(folder) == FILES
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert list((folder.parents[1] / "blobs").iterdir()) == []
    assert planned().missing == ()
    pull()
    reports = check_files(expected_files(resolve("v4-flash")))
    assert {report.state for report in reports} == {"right"}
    plan_removal("v4-flash").execute()
    assert not folder.exists()


# ---- links that break, servers that lie


@pytest.mark.parametrize("drops", [[0.3], [0.99], [0.3, 0.5, 0.99]])
def test_dropped_links(hub: LoopbackHub, drops: list[float]) -> None:
    hub.faults.drop_at = drops
    assert contents(pull()) == FILES
    assert hub.bytes_sent < 1.1 * TOTAL


def test_a_download_that_was_stopped_goes_on(hub: LoopbackHub, home: Path) -> None:
    hub.faults.drop_at = [0.5] * 30
    with pytest.raises(LocalV4Error, match="was lost"):
        download(planned(), jobs=1)
    hub.faults.drop_at = []
    task = planned()
    assert 0 < task.needed < TOTAL
    seen: list[int] = []
    assert contents(download(task, on_bytes=seen.append)) == FILES
    assert sum(seen) == task.needed
    assert hub.bytes_sent < 1.1 * TOTAL
    assert parts(home) == []


def test_a_server_that_ignores_ranges(hub: LoopbackHub) -> None:
    hub.faults.ignore_range = True
    hub.faults.drop_at = [0.3]
    assert contents(pull()) == FILES


def test_a_damaged_file_is_fetched_once_more(hub: LoopbackHub, home: Path) -> None:
    hub.faults.wrong_bytes = 1
    notes: list[str] = []
    seen: list[int] = []
    folder = download(planned(), on_bytes=seen.append, on_note=notes.append)
    assert contents(folder) == FILES
    assert [note for note in notes if "arrived damaged" in note] == notes
    assert sum(seen) == TOTAL
    assert len(hub.transfers()) == 4


def test_a_file_that_stays_damaged_is_not_kept(hub: LoopbackHub, home: Path) -> None:
    hub.faults.wrong_bytes = 100
    with pytest.raises(BadFileError, match="twice") as error:
        download(planned(), jobs=1)
    assert error.value.exit_code == 5
    assert len(hub.transfers()) == 2
    assert parts(home) == []
    with pytest.raises(NotFoundError):
        resolve("v4-flash")


def test_a_damaged_beginning_of_an_earlier_run_is_noticed(hub: LoopbackHub, home: Path) -> None:
    task = planned()
    [first] = [file for file in task.files if file.name.endswith("00001-of-00003.safetensors")]
    part = task.store.part(first)
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(1000))
    assert contents(pull()) == FILES
    part.write_bytes(bytes(first.nbytes + 1))
    assert contents(pull(force=True)) == FILES


def test_a_new_commit_does_not_go_on_with_the_old_file(hub: LoopbackHub, home: Path) -> None:
    hub.add("org/v4", {"config.json": CONFIG, "model.safetensors": noise(400_000, 1)})
    hub.faults.drop_at = [0.5] * 30
    with pytest.raises(LocalV4Error):
        pull("hf://org/v4")
    hub.faults.drop_at = []
    newer = noise(400_000, 2)
    hub.add("org/v4", {"config.json": CONFIG, "model.safetensors": newer})
    assert contents(pull("hf://org/v4"))["model.safetensors"] == newer


@pytest.mark.parametrize(
    ("name", "is_refused"),
    [
        ("../../.bashrc", True),
        ("/etc/passwd", True),
        ("C:\\x.json", True),
        ("C:x.json", True),
        ("\\\\host\\share.json", True),
        ("a\0.json", True),
        ("a//b.json", True),
        ("a/./b.json", True),
        ("x" * 300 + ".json", True),
        ("nul.json", True),
        ("dot.", True),
        ("a\x1b[2J.json", True),
        ("", True),
        ("deeper/down/config.json", False),
        ("spaces are fine.json", False),
    ],
)
def test_hostile_names(hub: LoopbackHub, home: Path, name: str, is_refused: bool) -> None:
    hub.faults.listed_names = {"config.json": name}
    if not is_refused:
        assert name in [file.name for file in planned().files]
        return
    with pytest.raises(BadFileError) as error:
        pull()
    assert error.value.exit_code == 5
    assert "\0" not in error.value.message
    assert "\x1b" not in error.value.message
    assert list(home.iterdir()) == []


def test_programs_and_pickles_are_not_fetched_even_when_a_registry_asks(
    hub: LoopbackHub, home: Path
) -> None:
    (home / "config").mkdir()
    (home / "config" / "models.toml").write_text(
        "schema = 1\n[models.mine]\n"
        f'repo = "{REPO}"\narch = "deepseek_v4"\nformat = "safetensors"\nrelease = "0731"\n'
        f'revision = "{FLASH_COMMIT}"\nallow = ["*"]\n'
    )
    assert [file.name for file in planned("mine").files] == sorted([*FILES, "README.md"])


@pytest.mark.parametrize(
    "answer", [b"<html>hello</html>", b"[]", b'{"sha": "main", "siblings": []}', b"{}"]
)
def test_something_that_is_no_hub(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    monkeypatch.setattr("loopback_hub.json.dumps", lambda _value: answer.decode())
    with pytest.raises(LocalV4Error, match="does not answer as a hub does"):
        planned()


# ---- disks


def test_what_does_not_fit_is_refused_before_the_first_byte(
    hub: LoopbackHub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "free_bytes", lambda _folder: TOTAL)
    with pytest.raises(DoesNotFitError, match="are needed") as error:
        pull()
    assert error.value.exit_code == 4
    assert list(home.iterdir()) == []
    monkeypatch.setattr(module, "SPARE_BYTES", 0)
    assert contents(pull()) == FILES


def test_a_disk_that_fills_up_ends_with_4_and_goes_on(
    hub: LoopbackHub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0
    true_write = os.write

    def write(descriptor: int, data: Any) -> int:
        nonlocal written
        if written > 1_000_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = true_write(descriptor, data)
        written += done
        return done

    monkeypatch.setattr(os, "write", write)
    hub.faults.bytes_per_s = 1e7  # else the network holds more than the disk has taken
    with pytest.raises(DoesNotFitError) as error:
        download(planned(), jobs=1)
    assert error.value.exit_code == 4
    monkeypatch.setattr(os, "write", true_write)
    assert contents(pull()) == FILES
    assert hub.bytes_sent < 1.1 * TOTAL


def test_a_place_that_cannot_be_written(hub: LoopbackHub, home: Path) -> None:
    (home / "hub").write_text("a file")
    with pytest.raises(LocalV4Error, match="cannot write"):
        pull()


# ---- several at once


def test_two_pulls_at_once_share_the_work(hub: LoopbackHub) -> None:
    hub.faults.bytes_per_s = 3e6
    notes: list[str] = []
    tasks = [planned(), planned()]
    folders: list[Path] = []
    threads = [
        threading.Thread(
            target=lambda task=task: folders.append(download(task, on_note=notes.append))
        )
        for task in tasks
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 2
    assert contents(folders[0]) == FILES
    assert hub.bytes_sent < 1.1 * TOTAL
    assert any("another process is fetching" in note for note in notes)


def test_the_first_failure_ends_the_other_transfers(hub: LoopbackHub) -> None:
    hub.faults.storage_status = 404
    with pytest.raises(NotFoundError):
        pull()
    assert len(hub.transfers()) <= module.DEFAULT_JOBS


# ---- the record


def test_what_was_fetched_is_recorded(hub: LoopbackHub, home: Path) -> None:
    pull()
    [path] = home.rglob(f"{FLASH_COMMIT}.json")
    record = read_record(path)
    assert record is not None
    assert set(record.files) == set(FILES)
    name = "model-00001-of-00003.safetensors"
    assert record.files[name].bytes == len(SHARDS[name])
    path.write_text("{")
    assert read_record(path) is None
    assert planned().missing == ()


# ---- single shards


def test_one_shard_for_a_conversion(hub: LoopbackHub, tmp_path: Path) -> None:
    name = "model-00002-of-00003.safetensors"
    hub.faults.drop_at = [0.4]
    hub.faults.wrong_bytes = 1
    path = stream_shard(REPO, FLASH_COMMIT, name, tmp_path / "shards")
    assert path == tmp_path / "shards" / name
    assert path.read_bytes() == SHARDS[name]
    asked = len(hub.transfers())
    assert stream_shard(REPO, FLASH_COMMIT, name, tmp_path / "shards") == path
    assert len(hub.transfers()) == asked
    path.write_bytes(b"x" * len(SHARDS[name]))
    stream_shard(REPO, FLASH_COMMIT, name, tmp_path / "shards")
    assert path.read_bytes() == SHARDS[name]


def test_a_shard_needs_room(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "free_bytes", lambda _folder: 100)
    with pytest.raises(DoesNotFitError):
        stream_shard(REPO, FLASH_COMMIT, "model-00001-of-00003.safetensors", tmp_path)


def test_nothing_is_installed_by_looking(home: Path) -> None:
    assert [model.name for model in list_installed()] == ["tiny-v4"]
