"""Conversations that are kept: by chat, by `run --session`, and what `sessions` does with them."""

import io
import json
import multiprocessing
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from terminal import Terminal, needs_jit, needs_pty, run_here
from test_cli_chat import CAPITAL, READY, command, output

from localv4.cli import commands, session_commands, terminal
from localv4.cli.archive import Archive, open_archive
from localv4.cli.loading import Loaded
from localv4.cli.repl import Chat
from localv4.cli.settings import Settings
from localv4.engine.engine import Engine
from localv4.engine.saved_sessions import SavedSessions
from localv4.errors import BadFileError, LocalV4Error, NotFoundError, UsageError
from localv4.library.installed import resolve

pytestmark = needs_jit

TEXT = " ".join(f"word{number} is the number {number}." for number in range(40))
KEEPS = {"LOCALV4_NOHISTORY": "0"}


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    model = resolve("tiny-v4")
    return Loaded(Engine.load(model.path), model)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOCALV4_HOME", str(tmp_path))
    monkeypatch.delenv("LOCALV4_NOHISTORY", raising=False)
    monkeypatch.delenv("LOCALV4_SESSIONS_MAX", raising=False)
    return tmp_path


def new_chat(loaded: Loaded, archive: Archive | None = None) -> Chat:
    return Chat(
        loaded,
        terminal.make_console(io.StringIO()),
        Settings(temp=0.0, max_tokens=40),
        system=None,
        thinking=False,
        effort=None,
        hide_thinking=False,
        archive=archive or open_archive(loaded),
    )


@pytest.fixture
def chat(loaded: Loaded, home: Path) -> Iterator[Chat]:
    chat = new_chat(loaded)
    yield chat
    assert chat.archive is not None
    chat.archive.release()


def saved_in(chat: Chat) -> SavedSessions:
    assert chat.archive is not None
    return chat.archive.saved


def reused(chat: Chat) -> int:
    assert chat.last is not None
    return chat.last.stats.reused_tokens


def test_what_is_said_is_kept_and_continued(chat: Chat, loaded: Loaded) -> None:
    chat.ask(f"{TEXT} My name is Anna.")
    (name,) = saved_in(chat).names()
    assert name.startswith("chat-20")
    expected = chat.session.fork()
    chat.archive.release()  # type: ignore[union-attr]
    again = new_chat(loaded)
    session_commands.resume(again)
    shown = output(again)
    assert f"({name}: 2 messages)" in shown and "word0" in shown
    again.ask("What is my name?")
    assert reused(again) >= 256 and reused(again) % 128 == 0
    ids = again.session.tokens
    assert expected.reuse(ids) > reused(again)
    assert (expected.extend(ids[expected.position :])).tobytes() == (
        loaded.engine.new_session().extend(ids).tobytes()
    )
    assert len(saved_in(again).read(name).messages) == 4
    again.archive.release()  # type: ignore[union-attr]


def test_nothing_is_kept_of_those_who_do_not_want_it(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.setenv("LOCALV4_NOHISTORY", "1")
    chat.ask(CAPITAL)
    assert not (home / "sessions").exists()
    command(chat, "/save france")
    chat.ask(CAPITAL)
    assert len(saved_in(chat).read("france").messages) == 4


def test_save_names_and_copies(chat: Chat) -> None:
    chat.ask(CAPITAL)
    (unnamed,) = saved_in(chat).names()
    assert f"saved as {unnamed}" in command(chat, "/save")
    assert "saved as france" in command(chat, "/save france")
    assert saved_in(chat).names() == ["france"]
    chat.ask("What is the capital of Italy?")
    assert len(saved_in(chat).read("france").messages) == 4
    command(chat, "/save italy")
    command(chat, "/undo")
    assert len(saved_in(chat).read("france").messages) == 4
    assert len(saved_in(chat).read("italy").messages) == 2
    with pytest.raises(UsageError, match="a session france already"):
        command(chat, "/save france")


def test_load_and_branch(chat: Chat) -> None:
    chat.ask(f"{TEXT} My name is Anna.")
    command(chat, "/save anna")
    assert "(anna is kept; this is anna-2 now)" in command(chat, "/branch")
    chat.ask("My name is Tom.")
    assert "this is toms now" in command(chat, "/branch toms")
    command(chat, "/undo")
    chat.ask("What is my name?")
    assert sorted(saved_in(chat).names()) == ["anna", "anna-2", "toms"]
    command(chat, "/clear")
    chat.ask("Hello.")
    assert "> My name is Tom." in command(chat, "/load anna-2")
    chat.ask("What is my name?")
    assert reused(chat) >= 256
    assert len(saved_in(chat).read("anna-2").messages) == 6
    assert len(saved_in(chat).read("anna").messages) == 2


def test_retry_is_saved(chat: Chat) -> None:
    chat.ask(CAPITAL)
    command(chat, "/save france")
    command(chat, "/retry")
    assert len(saved_in(chat).read("france").messages) == 2
    command(chat, "/undo")
    assert saved_in(chat).read("france").messages == []


def test_sessions_are_listed_and_completed(chat: Chat) -> None:
    assert "(no saved conversations)" in command(chat, "/sessions")
    chat.ask(CAPITAL)
    command(chat, "/save france")
    table = command(chat, "/sessions")
    assert "france" in table and "tiny-v4" in table and CAPITAL in table
    (saved_in(chat).folder / "broken.json").write_text("{")
    assert "warning: bad file" in command(chat, "/sessions")
    found = list(commands.Completions(chat))
    assert {"load", "load france", "sessions", "quit", "think max"} <= set(found)


@pytest.mark.parametrize(
    ("line", "error", "said"),
    [
        ("/load", UsageError, "needs a name"),
        ("/load nothing", NotFoundError, "no session nothing"),
        ("/load ../x", UsageError, "cannot be the name"),
        ("/save a/b", UsageError, "cannot be the name"),
        ("/branch", UsageError, "nothing to branch"),
    ],
)
def test_mistakes(line: str, error: type[LocalV4Error], said: str, chat: Chat) -> None:
    with pytest.raises(error, match=said):
        commands.execute(chat, line)


def test_two_chats_do_not_share_a_file(chat: Chat, loaded: Loaded) -> None:
    chat.ask(CAPITAL)
    command(chat, "/save france")
    other = new_chat(loaded)
    with pytest.raises(UsageError, match="in use by another"):
        command(other, "/load france")
    session_commands.resume(other)
    assert "france is open in another chat" in output(other)
    other.ask("What is the capital of Italy?")
    assert len(saved_in(chat).read("france").messages) == 2
    assert len(saved_in(chat).names()) == 2
    other.archive.release()  # type: ignore[union-attr]


def test_another_model_goes_on_with_the_text(chat: Chat, loaded: Loaded) -> None:
    chat.ask(CAPITAL)
    command(chat, "/save france")
    assert chat.archive is not None
    chat.archive.release()
    other = new_chat(loaded, Archive("bigger", "other weights", "other bits"))
    session_commands.resume(other)
    assert "no conversation with this model" in output(other)
    assert "with tiny-v4 so far: read anew" in command(other, "/load france")
    other.ask("And Italy?")
    assert reused(other) == 0
    assert saved_in(other).read("france").model == "bigger"
    other.archive.release()  # type: ignore[union-attr]


def test_trouble_with_the_folder_is_told_once(chat: Chat, home: Path) -> None:
    (home / "sessions").write_text("a file where a folder is due")
    chat.ask(CAPITAL)
    assert output(chat).count("warning: this conversation is not saved") == 1
    chat.ask(CAPITAL)
    assert "warning" not in output(chat)


def test_damaged_blocks_are_told_after_the_answer(chat: Chat, loaded: Loaded, home: Path) -> None:
    chat.ask(f"{TEXT} My name is Anna.")
    for path in (home / "sessions").rglob("*.safetensors"):
        path.write_bytes(b"x")
    chat.archive.release()  # type: ignore[union-attr]
    again = new_chat(loaded)
    session_commands.resume(again)
    output(again)
    again.ask("What is my name?")
    text = output(again)
    assert text.count("warning") == 1 and "computed anew" in text
    assert reused(again) == 0
    again.archive.release()  # type: ignore[union-attr]


# run --session


def reused_tokens(stats: str) -> int:
    found = re.search(r"\(\+(\d+) reused\)", stats)
    return int(found[1]) if found else 0


def test_run_continues_a_conversation(tmp_path: Path) -> None:
    options = ("run", "-m", "tiny-v4", "--greedy", "-n", "20", "--session", "anna")
    first = run_here(*options, f"{TEXT} My name is Anna.", home=tmp_path)
    assert (first.code, first.stderr) == (0, "")
    second = run_here(*options, "--stats", "What is my name?", home=tmp_path)
    assert second.code == 0 and reused_tokens(second.stderr) >= 256
    shown = json.loads(run_here("sessions", "show", "anna", "--json", home=tmp_path).stdout)
    assert [message["role"] for message in shown["messages"]] == ["user", "assistant"] * 2
    assert shown["messages"][3]["content"] == second.stdout.rstrip("\n")
    assert shown["named"] and shown["tokens"] > 256


def test_run_keeps_the_system_prompt_until_another_is_given(tmp_path: Path) -> None:
    options = ("run", "-m", "tiny-v4", "--greedy", "-n", "3", "--session", "s")
    run_here(*options, "-s", "Be brief.", "Hello.", home=tmp_path)
    run_here(*options, "Hello.", home=tmp_path)
    show = ("sessions", "show", "s", "--json")
    assert json.loads(run_here(*show, home=tmp_path).stdout)["system"] == "Be brief."
    run_here(*options, "-s", "Be kind.", "Hello.", home=tmp_path)
    assert json.loads(run_here(*show, home=tmp_path).stdout)["system"] == "Be kind."


def test_what_run_refuses(tmp_path: Path) -> None:
    assert run_here("run", "--raw", "--session", "x", "Hi", home=tmp_path).code == 2
    wrong = run_here("run", "--session", "../x", "Hi", home=tmp_path)
    assert wrong.code == 2 and "cannot be the name" in wrong.stderr
    (tmp_path / "data" / "sessions" / "names").mkdir(parents=True, exist_ok=True)
    (tmp_path / "data" / "sessions" / "names" / "bad.json").write_text("{}")
    bad = run_here("run", "-m", "tiny-v4", "--session", "bad", "Hi", home=tmp_path)
    assert bad.code == 5 and "bad.json" in bad.stderr
    limit = run_here(
        *("run", "-m", "tiny-v4", "--session", "x", "Hi"),
        home=tmp_path,
        changes={"LOCALV4_SESSIONS_MAX": "much"},
    )
    assert limit.code == 2 and "LOCALV4_SESSIONS_MAX" in limit.stderr


def _hold(folder: str, ready: "multiprocessing.synchronize.Event") -> None:
    lock = SavedSessions(Path(folder)).claim("busy", 0)
    ready.set()
    time.sleep(1.5)
    lock.release()


def test_run_waits_for_another_process(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    folder = str(tmp_path / "data" / "sessions")
    process = context.Process(target=_hold, args=(folder, ready))
    process.start()
    assert ready.wait(60)
    removed = run_here("sessions", "rm", "busy", "-y", home=tmp_path)
    assert removed.code == 1  # there is no file yet
    ended = run_here(
        "run", "-m", "tiny-v4", "--greedy", "--session", "busy", CAPITAL, home=tmp_path
    )
    process.join()
    assert ended.code == 0 and "Paris" in ended.stdout
    assert "waiting: another localv4 uses the session busy" in ended.stderr


# sessions list, show, rm


def held_bytes(home: Path) -> int:
    files = (home / "data" / "sessions").rglob("*.safetensors")
    return sum(path.stat().st_size for path in files)


def test_list_show_rm(tmp_path: Path) -> None:
    for name, text in (("a", f"{TEXT} A"), ("b", f"{TEXT} B"), ("c", CAPITAL)):
        run_here("run", "-m", "tiny-v4", "-n", "3", "--session", name, text, home=tmp_path)
    listed = run_here("sessions", "list", home=tmp_path)
    assert listed.code == 0 and listed.stdout.split()[0] == "NAME"
    assert all(f"\n{name}  " in listed.stdout for name in "abc")
    assert "of at most" in listed.stderr
    rows = json.loads(run_here("sessions", "list", "--json", home=tmp_path).stdout)
    assert {row["name"]: row["bytes"] > 0 for row in rows} == {"a": True, "b": True, "c": False}
    assert "> " + CAPITAL in run_here("sessions", "show", "c", home=tmp_path).stdout
    refused = run_here("sessions", "rm", "a", home=tmp_path)
    assert refused.code == 2 and "nobody to ask" in refused.stderr
    before = held_bytes(tmp_path)
    assert run_here("sessions", "rm", "a", "-y", home=tmp_path).code == 0
    assert 0 < held_bytes(tmp_path) < before  # b begins as a did: those blocks are still needed
    again = run_here("run", "-m", "tiny-v4", "--stats", "--session", "b", "Hi", home=tmp_path)
    assert reused_tokens(again.stderr) >= 256
    before = held_bytes(tmp_path)
    assert run_here("sessions", "rm", "b", "c", "-y", home=tmp_path).code == 0
    assert held_bytes(tmp_path) < before
    assert run_here("sessions", "rm", "a", "-y", home=tmp_path).code == 1
    assert run_here("sessions", "rm", "-y", home=tmp_path).code == 2
    assert run_here("sessions", "rm", "--all", "-y", home=tmp_path).code == 0
    assert held_bytes(tmp_path) == 0


def test_damaged_sessions_can_be_listed_and_removed(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "sessions" / "names"
    folder.mkdir(parents=True)
    (folder / "bad.json").write_text("{")
    listed = run_here("sessions", "list", home=tmp_path)
    assert listed.code == 0 and "bad.json" in listed.stderr
    assert run_here("sessions", "show", "bad", home=tmp_path).code == BadFileError.exit_code
    assert run_here("sessions", "rm", "bad", "-y", home=tmp_path).code == 0
    assert not (folder / "bad.json").exists()


def test_foreign_text_does_not_command_the_terminal(tmp_path: Path) -> None:
    run_here("run", "-m", "tiny-v4", "-n", "2", "--session", "a", "\x1b[2J Hi", home=tmp_path)
    assert "\x1b" not in run_here("sessions", "list", home=tmp_path).stdout


def test_sessions_are_listed_without_the_engine() -> None:
    """The compiler alone takes longer to import than all the rest."""
    script = (
        "import sys, localv4.cli.sessions, localv4.cli.archive, localv4.engine.session_folder;"
        "sys.exit('numba' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@needs_pty
def test_a_dialogue_goes_on_in_another_process(tmp_path: Path) -> None:
    with Terminal("chat", "tiny-v4", "--greedy", home=tmp_path, changes=KEEPS) as screen:
        screen.wait_for("context 0/4096")
        screen.send("My name is Anna.\r")
        screen.wait_for("Nice to meet you, Anna!")
        screen.wait_for(READY)
        screen.send("/save anna\r")
        screen.wait_for("(saved as anna)")
        screen.wait_for(READY)
        screen.send("\x04")
        assert screen.wait() == 0
    with Terminal("chat", "tiny-v4", "--continue", "--greedy", home=tmp_path) as screen:
        screen.wait_for("Nice to meet you, Anna!")
        screen.wait_for("(anna: 2 messages)")
        screen.wait_for(READY)
        screen.send("What is my name?\r")
        screen.wait_for("Your name is Anna.")
        screen.wait_for(READY)
        screen.send("/load a\t\r")
        screen.wait_for("/load anna")
        screen.wait_for("(anna: 4 messages)")
        screen.wait_for(READY)
        screen.send("\x04")
        assert screen.wait() == 0
    with Terminal("sessions", "rm", "anna", home=tmp_path) as screen:
        screen.wait_for("Remove anna? [y/N]")
        screen.send("y\r")
        assert screen.wait() == 0
    assert not list((tmp_path / "data" / "sessions" / "names").glob("*.json"))
