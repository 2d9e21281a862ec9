"""Headers of models on the hub: what opens models opens them, and little is fetched."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf_writer import GgufOptions, write_gguf
from golden_files import load_golden
from huggingface_hub import constants
from loopback_hub import LoopbackHub, noise

from localv4.errors import BadFileError, LocalV4Error, NotFoundError
from localv4.library import hub as door
from localv4.library import remote_headers as module
from localv4.library.installed import embedded_model_path
from localv4.library.published import find_published
from localv4.library.remote_headers import check_online, remote_headers
from localv4.planning.header_facts import facts_of_checkpoint
from localv4.planning.model_facts import ModelFacts
from localv4.planning.subject import facts_of_opened
from localv4.storage import open_checkpoint

REPO = "org/deepseek-v4-something"
REFERENCE = f"hf://{REPO}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    monkeypatch.setattr(door, "FIRST_WAIT_S", 0.001)
    with LoopbackHub() as server:
        server.use(monkeypatch)
        yield server


def files_in(folder: Path) -> dict[str, bytes | Path]:
    return {file.name: file for file in folder.iterdir() if file.is_file()}


def remote_facts(reference: str = REFERENCE) -> tuple[ModelFacts, int]:
    with remote_headers(find_published(reference)) as model:
        assert model.repo == REPO
        facts = facts_of_opened("m", model.path, model.weight_bytes)
    assert not model.path.exists()
    return facts, model.fetched


def local_facts(path: Path, download_bytes: int) -> ModelFacts:
    with open_checkpoint(path) as checkpoint:
        return facts_of_checkpoint("m", "", checkpoint, download_bytes=download_bytes)


def test_a_model_on_the_hub_is_as_one_that_is_here(hub: LoopbackHub) -> None:
    folder = embedded_model_path()
    hub.add(REPO, files_in(folder))
    facts, fetched = remote_facts()
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert facts == local_facts(folder, weights)
    assert facts.download_bytes == weights
    assert fetched < weights / 20
    assert hub.bytes_sent < fetched + 5000


def test_a_header_longer_than_the_first_piece_is_fetched_in_full(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_BYTES", 1000)
    folder = embedded_model_path()
    hub.add(REPO, files_in(folder))
    facts, fetched = remote_facts()
    assert facts.file_bytes == local_facts(folder, 0).file_bytes
    headers = 0
    for file in folder.glob("*.safetensors"):
        headers += 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert fetched == headers + (folder / "config.json").stat().st_size


@pytest.mark.parametrize("parts", [1, 3])
def test_a_gguf_model_is_read_piece_by_piece(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, parts: int
) -> None:
    monkeypatch.setattr(module, "FIRST_BYTES", 64)
    path, _ = write_gguf(load_golden("edges"), tmp_path / "m-Q8_0.gguf", GgufOptions(parts=parts))
    hub.add(REPO, {f"sub/{name}": file for name, file in files_in(tmp_path).items()})
    weights = sum(file.stat().st_size for file in tmp_path.iterdir())
    facts, fetched = remote_facts()
    assert facts == local_facts(path, weights)
    assert fetched < weights


def test_a_file_that_is_none_of_a_model_is_refused(hub: LoopbackHub) -> None:
    files = files_in(embedded_model_path())
    hub.add(REPO, files | {"model-00002-of-00002.safetensors": noise(5000)})
    with pytest.raises(BadFileError, match="header"):
        remote_facts()
    hub.add(REPO, {"m.gguf": b"GGUF" + noise(3000)})
    with pytest.raises(BadFileError):
        remote_facts()


def test_a_repository_without_weights_or_without_a_name(hub: LoopbackHub) -> None:
    hub.add(REPO, {"README.md": b"nothing"})
    with pytest.raises(NotFoundError):
        remote_facts()
    with pytest.raises(NotFoundError):
        remote_facts("hf://org/absent")


def test_files_are_counted_as_they_come(hub: LoopbackHub) -> None:
    hub.add(REPO, files_in(embedded_model_path()))
    seen: list[tuple[int, int]] = []
    with remote_headers(find_published(REFERENCE), lambda done, of: seen.append((done, of))):
        assert seen == [(1, 3), (2, 3), (3, 3)]


def test_offline_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    check_online()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LocalV4Error, match="offline"):
        check_online()
