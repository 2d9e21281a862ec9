"""What `rm` and `prune` remove, and what they leave alone."""

import mmap
import shutil
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from huggingface_hub import scan_cache_dir
from model_folders import (
    FLASH_COMMIT,
    OTHER_COMMIT,
    empty_home,
    make_gguf,
    make_model,
    make_packed,
    names_of,
    snapshot,
)

from localv4.errors import LocalV4Error, NotFoundError, UsageError
from localv4.library.installed import list_incomplete, list_installed
from localv4.library.removal import find_leftovers, plan_removal

FLASH = "deepseek-ai/DeepSeek-V4-Flash"
needs_links = pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege")


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    return empty_home(monkeypatch, tmp_path)


def remove(reference: str) -> int:
    removal = plan_removal(reference)
    removal.execute()
    return removal.nbytes


def all_names() -> list[str]:
    return names_of([*list_installed(), *list_incomplete()])


def files_below(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()
    )


def in_cache(folder: Path) -> Path:
    """Turn the files of a snapshot into links to blobs, as huggingface_hub keeps them."""
    blobs = folder.parents[1] / "blobs"
    blobs.mkdir(exist_ok=True)
    for file in [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]:
        blob = blobs / f"{abs(hash(file.read_bytes() + file.name.encode())):040x}"
        shutil.move(file, blob)
        file.symlink_to(blob)
    return folder


# ---- models of the home


def test_models_of_the_home(home: Path) -> None:
    models = home / "home" / "models"
    make_model(models / "plain")
    make_model(models / "two" / "q4")
    make_packed(models / "two" / "q8")
    make_gguf(models / "single-Q4_0.gguf")
    make_gguf(models / "split" / "x-Q4_0.gguf", parts=3)
    make_model(models / "broken", absent=(1,))
    assert remove("plain") > 20
    assert not (models / "plain").exists()
    remove("two:q4")
    assert files_below(models / "two")[0].startswith("q8/")
    remove("two")
    assert not (models / "two").exists()
    assert remove("single-q4_0") == 10
    assert remove("split") == 30
    remove("broken")
    assert list(models.iterdir()) == []
    assert all_names() == ["tiny-v4"]


def test_one_of_several_gguf_files_in_a_folder(home: Path) -> None:
    folder = home / "home" / "models" / "mix"
    for name in ("a-Q4_0.gguf", "b-Q8_0.gguf"):
        make_gguf(folder / name)
    assert remove("mix:q4_0") == 10
    assert files_below(folder) == ["b-Q8_0.gguf"]


def test_a_model_with_other_forms_in_subfolders_leaves_those(home: Path) -> None:
    folder = home / "home" / "models" / "mine"
    make_model(folder)
    make_model(folder / "q4")
    remove("mine")
    assert all_names() == ["mine", "tiny-v4"]
    assert [name for name in files_below(folder) if not name.startswith("q4/")] == []


@pytest.mark.parametrize(
    ("reference", "error", "said"),
    [
        ("nobody", NotFoundError, "not installed"),
        ("v4-flash", NotFoundError, "not installed"),
        ("hf://a/b", NotFoundError, "not installed"),
        ("/", NotFoundError, "not installed"),
        ("../home", NotFoundError, "not installed"),
        ("tiny-v4", UsageError, "stays"),
        ("two", UsageError, "several forms"),
        ("two:q2", NotFoundError, "not installed"),
    ],
)
def test_what_is_not_removed(home: Path, reference: str, error: type[Exception], said: str) -> None:
    for name in ("q4", "q8"):
        make_model(home / "home" / "models" / "two" / name)
    before = files_below(home)
    with pytest.raises(error, match=said):
        plan_removal(reference)
    assert files_below(home) == before


def test_a_path_means_a_model_only_where_models_are_kept(home: Path) -> None:
    own = make_model(home / "home" / "models" / "mine")
    foreign = make_model(home / "elsewhere" / "mine")
    with pytest.raises(NotFoundError):
        plan_removal(str(foreign))
    remove(str(own))
    assert foreign.is_dir()
    assert not own.exists()


def test_planning_removes_nothing(home: Path) -> None:
    folder = make_model(home / "home" / "models" / "mine")
    plan_removal("mine")
    assert folder.is_dir()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows refuses instead")
def test_a_reader_keeps_its_mapped_file(home: Path) -> None:
    file = home / "home" / "models" / "mine" / "model-00001-of-00001.safetensors"
    make_model(file.parent, shards=1)
    file.write_bytes(b"weights" * 1000)
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as view:
        remove("mine")
        assert not file.exists()
        assert view[:] == b"weights" * 1000
        opened.seek(7)
        assert opened.read(7) == b"weights"


# ---- models of the hub's cache


@needs_links
def test_a_revision_of_the_cache(home: Path) -> None:
    folder = in_cache(make_model(snapshot(home, FLASH, FLASH_COMMIT)))
    assert remove("v4-flash") >= 20
    assert not folder.parents[1].exists()
    assert all_names() == ["tiny-v4"]


@needs_links
def test_a_revision_that_shares_files_with_another(home: Path) -> None:
    pinned = in_cache(make_model(snapshot(home, FLASH, FLASH_COMMIT)))
    other = snapshot(home, FLASH, OTHER_COMMIT)
    for file in pinned.iterdir():
        (other / file.name).symlink_to(file.readlink())
    assert remove("v4-flash") == 0
    assert not pinned.exists()
    assert (other / "config.json").read_text() == '{"model_type": "deepseek_v4"}'
    assert names_of(list_installed()) == ["deepseek-v4-flash", "tiny-v4"]
    assert remove("v4-flash") > 20
    assert not (home / "hub" / f"models--{FLASH.replace('/', '--')}").exists()


@needs_links
def test_one_form_of_several_in_a_repository(home: Path) -> None:
    folder = snapshot(home, "unsloth/DeepSeek-V4-Flash-0731-GGUF")
    for label in ("UD-Q4_K_XL", "UD-IQ1_S"):
        make_gguf(folder / label / f"DeepSeek-V4-Flash-0731-{label}.gguf", parts=3)
    in_cache(folder)
    assert remove("unsloth-0731:ud-q4_k_xl") == 30
    assert [path.name for path in folder.iterdir()] == ["UD-IQ1_S"]
    assert len(list((folder.parents[1] / "blobs").iterdir())) == 3
    [repo] = scan_cache_dir(home / "hub").repos
    assert repo.size_on_disk == 30
    remove("unsloth-0731")
    assert all_names() == ["tiny-v4"]


@needs_links
def test_a_form_that_another_revision_has_too_keeps_its_contents(home: Path) -> None:
    first = snapshot(home, "org/DeepSeek-V4-GGUF")
    for label in ("Q4_0", "Q8_0"):
        make_gguf(first / f"x-{label}.gguf")
    in_cache(first)
    second = snapshot(home, "org/DeepSeek-V4-GGUF", FLASH_COMMIT, main=False)
    (second / "x-Q4_0.gguf").symlink_to((first / "x-Q4_0.gguf").readlink())
    assert remove("hf://org/DeepSeek-V4-GGUF:q4_0") == 0
    assert (second / "x-Q4_0.gguf").read_bytes() == bytes(10)


@needs_links
def test_an_incomplete_download_can_be_removed(home: Path) -> None:
    in_cache(make_model(snapshot(home, FLASH, FLASH_COMMIT), shards=46, absent=(7,)))
    remove("v4-flash")
    assert all_names() == ["tiny-v4"]


# ---- leftovers


def leftover_names() -> list[str]:
    return [item.path.name for item in find_leftovers()]


@needs_links
def test_leftovers_of_downloads(home: Path) -> None:
    folder = in_cache(make_model(snapshot(home, FLASH, FLASH_COMMIT)))
    blobs = folder.parents[1] / "blobs"
    names = [f"{'a' * 64}.incomplete", f"{'b' * 64}.0a1b2c3d.incomplete", "c" * 64]
    for name in names:
        (blobs / name).write_bytes(bytes(7))
    foreign = home / "hub" / "models--org--other" / "blobs" / f"{'d' * 64}.incomplete"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(bytes(7))
    found = list(find_leftovers())
    assert [item.path.name for item in found] == names
    assert sum(item.nbytes for item in found) == 21
    for item in found:
        item.execute()
    assert leftover_names() == []
    assert foreign.exists()
    assert names_of(list_installed()) == ["deepseek-v4-flash", "tiny-v4"]


def test_what_another_process_works_on_is_left_alone(home: Path) -> None:
    entry = home / "hub" / f"models--{FLASH.replace('/', '--')}"
    (entry / "blobs").mkdir(parents=True)
    part = entry / "blobs" / f"{'a' * 64}.incomplete"
    part.write_bytes(bytes(7))
    locks = home / "hub" / ".locks" / entry.name
    locks.mkdir(parents=True)
    [idle] = find_leftovers()
    with FileLock(locks / f"{'a' * 64}.lock"):
        assert leftover_names() == []
        with pytest.raises(LocalV4Error, match="another process"):
            idle.execute()
        assert part.exists()
    assert leftover_names() == [part.name]


def test_a_removal_that_was_stopped_is_finished_by_prune(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(home / "home" / "models" / "mine")

    def fail(_path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr("localv4.library.removal.shutil.rmtree", fail)
        with pytest.raises(LocalV4Error, match="cannot remove"):
            remove("mine")
    assert all_names() == ["tiny-v4"]
    [left] = find_leftovers()
    left.execute()
    assert list((home / "home" / "models").iterdir()) == []
