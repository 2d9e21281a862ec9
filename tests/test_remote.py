"""Ranges of files on the hub: right bytes over bad links, no token to strangers."""

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from loopback_hub import LoopbackHub, noise

from localv4.errors import BadFileError, LocalV4Error, NotFoundError
from localv4.library import hub as door
from localv4.library.remote import RemoteFile, open_remote

REPO = "org/name"
DATA = noise(3_000_000)
SMALL = b'{"model_type": "deepseek_v4"}'


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    monkeypatch.setattr(door, "FIRST_WAIT_S", 0.001)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with LoopbackHub() as server:
        server.use(monkeypatch)
        server.add(REPO, {"model.safetensors": DATA, "config.json": SMALL})
        yield server


def test_ranges_are_read_and_nothing_else(hub: LoopbackHub) -> None:
    file = open_remote(REPO, "model.safetensors")
    assert (file.size, file.revision) == (len(DATA), hub.tree(REPO, "main")[0])  # type: ignore[index]
    assert hub.bytes_sent == 0
    assert file.read(1_234_567, 70_000) == DATA[1_234_567:1_304_567]
    assert file.read(len(DATA) - 5, 5) == DATA[-5:]
    assert file.read(7, 0) == b""
    assert hub.bytes_sent == 70_005
    assert open_remote(REPO, "config.json").read(2, 10) == SMALL[2:12]


def test_later_ranges_go_to_the_storage_at_once_and_without_the_token(hub: LoopbackHub) -> None:
    file = open_remote(REPO, "model.safetensors")
    file.read(0, 10)
    asked = len(hub.requests)
    file.read(10, 10)
    assert [made.to_storage for made in hub.requests[asked:]] == [True]
    tokens = {made.to_storage: made.headers.get("authorization") for made in hub.requests}
    assert tokens == {False: "Bearer hf_secret", True: None}


def test_a_link_that_has_expired_is_asked_for_again(hub: LoopbackHub) -> None:
    file = open_remote(REPO, "model.safetensors")
    file.read(0, 10)
    hub.faults.statuses = [(403, {})]
    assert file.read(10, 10) == DATA[10:20]


@pytest.mark.parametrize("drops", [[0.3], [0.99], [0.3, 0.5, 0.99], [0.0, 0.0, 0.0]])
def test_dropped_links_are_taken_up_where_they_broke(hub: LoopbackHub, drops: list[float]) -> None:
    hub.faults.drop_at, count = list(drops), len(drops)
    waits: list[str] = []
    file = open_remote(REPO, "model.safetensors", on_wait=waits.append)
    assert b"".join(file.stream()) == DATA
    assert hub.bytes_sent == len(DATA)
    assert len(waits) == count
    assert "trying again in" in waits[0]


def test_a_link_that_always_drops_ends_with_one_line(hub: LoopbackHub) -> None:
    hub.faults.drop_at = [0.0] * 50
    with pytest.raises(LocalV4Error, match="was lost") as error:
        open_remote(REPO, "model.safetensors").read(0, 10)
    assert error.value.hint is not None
    assert len(hub.transfers()) == door.MAX_FAILURES + 1


def test_a_server_that_ignores_ranges(hub: LoopbackHub) -> None:
    hub.faults.ignore_range = True
    hub.faults.drop_at = [0.3]
    assert b"".join(open_remote(REPO, "model.safetensors").stream()) == DATA
    assert open_remote(REPO, "model.safetensors").read(2_000_000, 9) == DATA[2_000_000:2_000_009]


def test_no_answer_is_asked_for_that_is_too_long(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localv4.library.remote.MAX_REQUEST_BYTES", 1_000_000)
    file = open_remote(REPO, "model.safetensors")
    assert b"".join(file.stream(10)) == DATA[10:]
    ranges = [made.headers["range"] for made in hub.transfers()]
    assert ranges == ["bytes=10-1000009", "bytes=1000010-2000009", "bytes=2000010-2999999"]


def test_a_small_part_is_not_worth_a_whole_file(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localv4.library.remote.MAX_SKIPPED_BYTES", 1_000_000)
    hub.faults.ignore_range = True
    file = open_remote(REPO, "model.safetensors")
    assert file.read(1_000_000, 9) == DATA[1_000_000:1_000_009]
    with pytest.raises(LocalV4Error, match="does not serve parts"):
        file.read(1_000_001, 9)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(hub: LoopbackHub, status: int) -> None:
    hub.faults.statuses = [(status, {}), (status, {"Retry-After": "0"})]
    file = open_remote(REPO, "model.safetensors")
    hub.faults.statuses = [(status, {})]
    assert file.read(5, 5) == DATA[5:10]
    assert hub.faults.statuses == []


def test_retry_after_is_waited_for_but_not_for_ever(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("localv4.library.hub.time.sleep", slept.append)
    hub.faults.statuses = [(429, {"Retry-After": "17"})]
    open_remote(REPO, "model.safetensors")
    assert slept == [17]
    hub.faults.statuses = [(429, {"Retry-After": "3600"})]
    with pytest.raises(LocalV4Error, match="limits how often") as error:
        open_remote(REPO, "model.safetensors")
    assert error.value.hint == "try again in 3600 s"


def test_refusals_are_told_apart(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFoundError, match="no repository org/nothing"):
        open_remote("org/nothing", "config.json")
    with pytest.raises(NotFoundError, match=r"has no absent\.json"):
        open_remote(REPO, "absent.json")
    with pytest.raises(NotFoundError, match="no such revision"):
        open_remote(REPO, "config.json", "v9")
    hub.faults.statuses = [(403, {})]
    with pytest.raises(LocalV4Error, match="refuses access"):
        open_remote(REPO, "config.json")
    hub.token = "hf_other"
    with pytest.raises(LocalV4Error, match="does not accept your token"):
        open_remote(REPO, "config.json")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(NotFoundError, match="or a private one"):
        open_remote(REPO, "config.json")
    hub.token = None
    hub.gated.add(REPO)
    with pytest.raises(LocalV4Error, match="its terms must be accepted") as gated:
        open_remote(REPO, "config.json")
    assert f"{hub.endpoint}/{REPO}" in str(gated.value.hint)


def test_no_message_holds_the_token(hub: LoopbackHub) -> None:
    hub.token = "hf_other"
    with pytest.raises(LocalV4Error) as error:
        open_remote(REPO, "config.json")
    assert "hf_secret" not in f"{error.value.message} {error.value.hint} {error.value.__cause__!r}"


def test_unreachable_hubs(monkeypatch: pytest.MonkeyPatch, hub: LoopbackHub) -> None:
    def message(endpoint: str) -> str:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        with pytest.raises(LocalV4Error) as error:
            open_remote(REPO, "config.json")
        return error.value.message

    monkeypatch.setattr("time.sleep", lambda _s: pytest.fail("there is nothing to wait for"))
    assert message("http://127.0.0.1:9") == "127.0.0.1 refuses connections"
    assert message("http://hub.invalid") == "cannot find hub.invalid in the network"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert message(hub.endpoint) == "offline, and config.json is not here"
    assert not any("config.json" in made.path for made in hub.requests)


def test_a_certificate_that_nobody_signed_is_final(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _s: pytest.fail("there is nothing to wait for"))
    error = ConnectionError("handshake")
    error.__cause__ = ssl.SSLCertVerificationError("self-signed certificate")
    with pytest.raises(LocalV4Error, match="cannot be trusted") as refused:
        door.Patience(REPO, "x").wait(error)
    assert "SSL_CERT_FILE" in str(refused.value.hint)


def test_a_host_that_disappears_later_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    patience = door.Patience(REPO, "x", sleep=slept.append)
    for _ in range(door.MAX_FAILURES):
        patience.wait(socket.gaierror("no address"))
    assert slept == [1, 2, 4, 8, 16, 30, 30]
    with pytest.raises(LocalV4Error, match="cannot find"):
        patience.wait(socket.gaierror("no address"))
    patience.progressed()
    patience.wait(socket.gaierror("no address"))
    assert slept[-1] == 1


def test_answers_that_do_not_fit_the_question(hub: LoopbackHub) -> None:
    right = open_remote(REPO, "model.safetensors")
    wrong = RemoteFile(REPO, right.revision, right.name, right.size + 1, right.etag)
    with pytest.raises(BadFileError, match="but listed 3000001"):
        wrong.read(0, 10)
    with pytest.raises(ValueError, match="of 3000000 bytes"):
        right.read(2_999_999, 2)


def test_a_local_file_is_read_from_disk_by_the_loopback_hub(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    (tmp_path / "x").write_bytes(DATA)
    hub.add("org/files", {"x.gguf": tmp_path / "x"})
    assert open_remote("org/files", "x.gguf").read(100, 7) == DATA[100:107]
