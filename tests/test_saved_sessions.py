"""Files of conversations: what is written comes back, and nothing else is believed."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localv4.engine import saved_sessions
from localv4.engine.saved_sessions import (
    SavedMessage,
    SavedSession,
    SavedSessions,
    checked_name,
    now,
)
from localv4.errors import BadFileError, LocalV4Error, NotFoundError, UsageError


@pytest.fixture
def saved(tmp_path: Path) -> SavedSessions:
    return SavedSessions(tmp_path / "sessions")


def example(name: str, **changes: Any) -> SavedSession:
    time = now()
    fields: dict[str, Any] = {"named": True, "model": "m", "weights": "0", "created": time}
    fields |= {"used": time, "messages": [SavedMessage(role="user", content="Why?\nSay.")]}
    return SavedSession(name=name, **(fields | changes))


def put(saved: SavedSessions, name: str, data: bytes) -> Path:
    saved.write(example(name))
    saved.path(name).write_bytes(data)
    return saved.path(name)


def test_what_is_written_comes_back(saved: SavedSessions) -> None:
    session = example("one", tokens=300, blocks=["0" * 40], system="Be brief.", tools=[{"a": []}])
    saved.write(session)
    assert saved.read("one") == session and session.title == "Why? Say."
    assert saved.names() == ["one"] and saved.exists("one")
    if os.name != "nt":
        assert stat.S_IMODE(saved.folder.stat().st_mode) == 0o700
    saved.remove("one")
    with pytest.raises(NotFoundError, match="no session one"):
        saved.read("one")


@pytest.mark.parametrize(
    "name", ["", "..", "a/b", "a\\b", ".hidden", "a b", "x" * 49, "\x00", "a\n"]
)
def test_names_stay_inside(name: str, saved: SavedSessions) -> None:
    with pytest.raises(UsageError, match="cannot be the name"):
        saved.path(name)


def test_names_in_any_script(saved: SavedSessions) -> None:
    for name in ("ärger-2", "会话", "notes.v1"):
        saved.write(example(checked_name(name)))
        assert saved.read(name).name == name
    assert checked_name("a\u0308") == "ä"


DAMAGES = {
    "not JSON": b"{",
    "empty": b"",
    "binary": bytes(range(256)),
    "deep": b"[" * 100_000,
    "deep tools": b'{"tools": [' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"]}",
    "other format": b'{"format": "x", "version": 1}',
    "surrogate": b'{"format": "\\ud800", "version": 1}',
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_told_and_left_out(damage: str, saved: SavedSessions) -> None:
    saved.write(example("good"))
    path = put(saved, "bad", DAMAGES[damage])
    with pytest.raises(BadFileError, match="is not a saved session"):
        saved.read("bad")
    found, faults = saved.read_all()
    assert [session.name for session in found] == ["good"]
    assert [str(path) in fault.message for fault in faults] == [True]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2, "news": 1}, "newer version"),
        ({"news": 1}, "news"),
        ({"tokens": -1}, "tokens"),
        ({"tokens": "5"}, "tokens"),
        ({"blocks": ["../../etc/passwd"]}, "blocks"),
        ({"blocks": ["G" * 40]}, "blocks"),
        ({"messages": [{"role": "system", "content": ""}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"used": "yesterday"}, "used"),
        ({"used": "2026-01-01T00:00:00"}, "used"),
        ({"name": "other"}, "another name"),
    ],
)
def test_fields_are_checked(change: dict[str, Any], said: str, saved: SavedSessions) -> None:
    fields = json.loads(example("one").model_dump_json(exclude_none=True))
    put(saved, "one", json.dumps(fields | change).encode())
    with pytest.raises(BadFileError, match=said):
        saved.read("one")


def test_a_large_file_is_not_read(saved: SavedSessions, monkeypatch: pytest.MonkeyPatch) -> None:
    saved.write(example("one"))
    os.truncate(saved.path("one"), saved_sessions.MAX_FILE_BYTES + 1)
    with pytest.raises(BadFileError, match="larger than"):
        saved.read("one")


@settings(max_examples=200, deadline=None)
@given(place=st.integers(0, 300), value=st.integers(0, 255))
def test_a_changed_byte_is_a_valid_session_or_a_bad_file(
    place: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    saved = SavedSessions(tmp_path_factory.getbasetemp() / "fuzz")
    data = bytearray(example("one", messages=[]).model_dump_json().encode())
    data[place % len(data)] = value
    path = put(saved, "one", bytes(data))
    try:
        assert saved.read("one").name == "one"
    except BadFileError as error:
        assert error.path == path


def test_a_failed_write_keeps_the_old_file(
    saved: SavedSessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved.write(example("one"))

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("localv4.finished_file.os.fsync", fail)
        with pytest.raises(LocalV4Error, match="No space left"):
            saved.write(example("one", tokens=5))
    assert saved.read("one").tokens == 0
    assert [path.name for path in saved.folder.iterdir()] == ["one.json"]


def test_one_process_at_a_time(saved: SavedSessions) -> None:
    lock = saved.claim("one", 0)
    with pytest.raises(UsageError, match="in use by another"):
        saved.claim("one", 0.01)
    other = saved.claim("two", 0)
    lock.release()
    saved.claim("one", 0).release()
    other.release()
    assert saved.names() == []


def test_free_names(saved: SavedSessions) -> None:
    assert saved.free_name("chat") == "chat"
    for _ in range(3):
        saved.write(example(saved.free_name("chat")))
    assert sorted(saved.names()) == ["chat", "chat-2", "chat-3"]
    saved.write(example(saved.free_name("x" * 48)))
    saved.write(example(saved.free_name("x" * 48)))
    assert len(saved.names()) == 5


def test_only_so_many_without_a_name(saved: SavedSessions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_sessions, "MOST_UNNAMED", 3)
    saved.write(example("kept"))
    for number in range(5):
        used = now().replace(year=2020 + number)
        saved.write(example(f"chat-{number}", named=False, used=used))
    assert sorted(saved.names()) == ["chat-2", "chat-3", "chat-4", "kept"]
