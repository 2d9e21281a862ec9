"""`localv4 chat`: its parts in this process, and dialogues on a pseudo-terminal."""

import io
import os
import signal
import stat
import time
from pathlib import Path

import pytest
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, InMemoryHistory
from terminal import Terminal, needs_jit, needs_pty

from localv4 import paths
from localv4.cli import commands, line_editor, terminal
from localv4.cli.loading import Loaded
from localv4.cli.repl import Chat
from localv4.cli.settings import Settings
from localv4.engine.engine import Engine
from localv4.errors import LocalV4Error, UsageError
from localv4.library.installed import resolve

pytestmark = needs_jit

READY = "| /help"  # the end of the line below the prompt
CAPITAL = "What is the capital of France?"


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    model = resolve("tiny-v4")
    return Loaded(Engine.load(model.path), model)


@pytest.fixture
def chat(loaded: Loaded) -> Chat:
    """A greedy chat that writes plain text into a buffer."""
    return Chat(
        loaded,
        terminal.make_console(io.StringIO()),
        Settings(temp=0.0, max_tokens=80),
        system=None,
        thinking=False,
        effort=None,
        hide_thinking=False,
    )


def output(chat: Chat) -> str:
    """Return what was printed since the last call."""
    out = chat.console.file
    assert isinstance(out, io.StringIO)
    text = out.getvalue()
    out.seek(0)
    out.truncate()
    return text


def command(chat: Chat, line: str) -> str:
    """Run a slash command as the loop does; return what it printed."""
    question = commands.execute(chat, line)
    if question is not None:
        chat.ask(question)
    return output(chat)


def test_conversation(chat: Chat) -> None:
    chat.ask("My name is Anna.")
    assert output(chat) == "Nice to meet you, Anna! How can I help you?\n\n"
    chat.ask("What is my name?")
    assert output(chat) == "Your name is Anna.\n\n"
    assert chat.last is not None
    assert chat.last.stats.reused_tokens > 10
    assert len(chat.conversation.messages) == 4


def test_undo_retry_clear(chat: Chat) -> None:
    chat.ask("My name is Anna.")
    chat.ask(CAPITAL)
    output(chat)
    assert command(chat, "/retry").endswith("The capital of France is Paris.\n\n")
    assert len(chat.conversation.messages) == 4
    assert CAPITAL in command(chat, "/undo")
    assert len(chat.conversation.messages) == 2
    command(chat, "/undo")
    with pytest.raises(UsageError):
        command(chat, "/undo")
    with pytest.raises(UsageError):
        command(chat, "/retry")
    chat.ask(CAPITAL)
    command(chat, "/clear")
    assert chat.conversation.messages == []
    assert chat.session.position == 0


def test_thinking(chat: Chat) -> None:
    assert "thinking: on, effort max" in command(chat, "/think max")
    assert chat.effort == "max"
    command(chat, "/think")
    chat.ask("What is 148 + 276?")
    assert output(chat).endswith("148 + 276 = 424\n\n")
    assert chat.conversation.messages[-1]["reasoning_content"].startswith("I need to add")
    chat.hide_thinking = True
    command(chat, "/clear")
    chat.ask("What is 148 + 276?")
    assert output(chat) == "148 + 276 = 424\n\n"
    command(chat, "/nothink")
    assert not chat.thinking


def test_settings_and_system(chat: Chat) -> None:
    assert "0.25" in command(chat, "/set temp 0.25")
    assert chat.settings.temp == 0.25
    assert "max-tokens" in command(chat, "/set")
    assert "be brief" in command(chat, "/system be brief")
    assert "be brief" in command(chat, "/show")
    assert "none" in command(chat, "/system none")
    assert chat.conversation.system is None


def test_read(chat: Chat, tmp_path: Path) -> None:
    file = tmp_path / "a question.txt"
    file.write_text(f"{CAPITAL}\n")
    assert commands.execute(chat, f'/read "{file}"') == f"{CAPITAL}\n"
    assert commands.execute(chat, f"/read '{file}' Say it.") == f"{CAPITAL}\n\nSay it."


def test_help_names_every_command(chat: Chat) -> None:
    text = command(chat, "/help")
    assert all(f"/{name}" in text for name in commands.COMMANDS)


def test_stats(chat: Chat) -> None:
    assert "no answer yet" in command(chat, "/stats")
    chat.ask(CAPITAL)
    output(chat)
    assert "gen 8 tok" in command(chat, "/stats")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/foo", "no command /foo"),
        ("/", "no command /"),
        ("/\x1b[2J", "no command"),
        ("/think hard", "no such effort"),
        ("/set temp", "needs a value"),
        ("/set temp hot", "temp must be"),
        ("/set tmep 1", "no setting"),
        ("/clear all", "takes nothing more"),
        ("/read", "needs a file"),
        ("/read /no/such/file", "no such file"),
    ],
)
def test_mistakes(line: str, said: str, chat: Chat) -> None:
    with pytest.raises(LocalV4Error, match=said) as caught:
        commands.execute(chat, line)
    chat.show_error(caught.value)
    assert "\x1b" not in output(chat)


def test_near_commands_are_suggested(chat: Chat) -> None:
    with pytest.raises(UsageError) as caught:
        commands.execute(chat, "/hlep")
    assert "/help" in str(caught.value.hint)


@pytest.mark.parametrize("line", ["/exit", "/bye", "/quit"])
def test_leaving(line: str, chat: Chat) -> None:
    with pytest.raises(EOFError):
        commands.execute(chat, line)


def test_question_that_does_not_fit_is_not_kept(chat: Chat) -> None:
    chat.ask("word " * 5000)
    text = output(chat)
    assert text.startswith("error: ")
    assert chat.conversation.messages == []
    chat.ask(CAPITAL)
    assert "Paris" in output(chat)


def test_length_is_told(chat: Chat) -> None:
    chat.settings = Settings(temp=0.0, max_tokens=3)
    chat.ask(CAPITAL)
    assert "(stopped after 3 tokens: /set max-tokens)" in output(chat)


@pytest.mark.parametrize("width", [1, 10, 40, 80, 200])
def test_status_fits(width: int, chat: Chat) -> None:
    chat.ask(CAPITAL)
    chat.console.width = width
    assert len(chat.status()) <= max(2, width)
    if width >= 80:
        for part in ("tiny-v4", "context", "tok/s", "memory"):
            assert part in chat.status()


@pytest.mark.parametrize(
    ("text", "is_open", "inner"),
    [
        ('"""', True, ""),
        ('"""a\nb', True, "a\nb"),
        ('"""a\nb"""', False, "a\nb"),
        ('"""\na\n"""', False, "a"),
        ('""""', True, '"'),
        ('a """', False, 'a """'),
        ("plain", False, "plain"),
    ],
)
def test_quotes(text: str, is_open: bool, inner: str) -> None:
    assert line_editor.is_open_quote(text) is is_open
    assert line_editor.unquote(text) == inner


def test_commands_are_completed() -> None:
    completer = line_editor._CommandCompleter(["help", "set", "show"])

    def complete(text: str) -> list[str]:
        found = completer.get_completions(Document(text), None)  # type: ignore[arg-type]
        return [completion.text for completion in found]

    assert complete("/s") == ["/set", "/show"]
    assert complete("s") == []
    assert complete("/set x") == []


def test_history_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "state_dir", lambda: tmp_path / "state")
    monkeypatch.delenv("LOCALV4_NOHISTORY", raising=False)
    warnings: list[str] = []
    history = line_editor.open_history(warnings.append)
    history.append_string("first\nsecond")
    file = tmp_path / "state" / "history"
    assert isinstance(history, FileHistory)
    assert b"+second" in file.read_bytes()
    if os.name != "nt":
        file.chmod(0o666)
        line_editor.open_history(warnings.append)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert warnings == []


def test_no_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "state_dir", lambda: tmp_path / "state")
    monkeypatch.setenv("LOCALV4_NOHISTORY", "1")
    assert isinstance(line_editor.open_history(print), InMemoryHistory)
    assert not (tmp_path / "state").exists()


def test_impossible_history_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCALV4_NOHISTORY", raising=False)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "history").mkdir(parents=True)
    for place in ("file", "folder"):
        monkeypatch.setattr(paths, "state_dir", lambda place=place: tmp_path / place)
        warnings: list[str] = []
        assert isinstance(line_editor.open_history(warnings.append), InMemoryHistory)
        assert len(warnings) == 1


def test_history_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "state_dir", lambda: tmp_path)
    monkeypatch.setattr(line_editor, "MAX_HISTORY_BYTES", 1000)
    monkeypatch.delenv("LOCALV4_NOHISTORY", raising=False)
    history = line_editor.open_history(print)
    for number in range(100):
        history.append_string(f"question {number}")
    again = line_editor.open_history(print)
    assert (tmp_path / "history").stat().st_size <= 1000
    kept = list(again.load_history_strings())
    assert kept[0] == "question 99"
    assert all(line.startswith("question ") for line in kept)


@needs_pty
def test_dialogue(tmp_path: Path) -> None:
    with Terminal("chat", "tiny-v4", "--greedy", home=tmp_path) as screen:
        screen.wait_for("/help for help")
        screen.wait_for("context 0/4096")
        screen.send(f"{CAPITAL}\r")
        screen.wait_for("The capital of France is Paris.")
        screen.wait_for("context 18/4096")
        screen.send("/undo\r")
        screen.wait_for(f"(taken back: {CAPITAL})")
        screen.wait_for(READY)
        screen.send('"""My name\ris Anna."""\r')
        screen.wait_for("Nice to meet you, Anna!")
        screen.wait_for(READY)
        screen.send("/retry\r")
        screen.wait_for("Nice to meet you, Anna!")
        screen.wait_for(READY)
        screen.send("half a line\x03")
        screen.wait_for("(Ctrl-D or /exit leaves)")
        screen.wait_for(READY)
        screen.send("\x04")
        assert screen.wait() == 0
        assert screen.echoes()


@needs_pty
def test_interrupt_keeps_the_answer(tmp_path: Path) -> None:
    with Terminal("chat", "--temp", "100", "--seed", "1", home=tmp_path) as screen:
        screen.wait_for("built-in demo model")
        screen.wait_for("context 0/4096")
        screen.send("Tell me a story.\r")
        screen.wait_for("writing")
        start = time.monotonic()
        screen.send("\x03")
        screen.wait_for("(stopped; /retry")
        assert time.monotonic() - start < 10  # measured: 0.03 s
        screen.wait_for(READY)
        screen.send("/show\r")
        screen.wait_for("messages")
        assert "2" in screen.wait_for("system")
        screen.send("/exit\r")
        assert screen.wait() == 0


@needs_pty
@pytest.mark.parametrize("busy", [False, True], ids=["at the prompt", "in an answer"])
def test_end_signal_restores_the_terminal(busy: bool, tmp_path: Path) -> None:
    with Terminal("chat", "tiny-v4", "--temp", "100", home=tmp_path) as screen:
        screen.wait_for("context 0/4096")
        if busy:
            screen.send("Tell me a story.\r")
            screen.wait_for("writing")
        screen.kill(signal.SIGTERM)
        assert screen.wait() == 143
        assert screen.echoes()
        assert screen.written.rfind("\x1b[?25h") > screen.written.rfind("\x1b[?25l")
        assert "Traceback" not in screen.text


@needs_pty
def test_dumb_terminal(tmp_path: Path) -> None:
    with Terminal("chat", "tiny-v4", "--greedy", home=tmp_path, changes={"TERM": "dumb"}) as screen:
        screen.wait_for("/help for help")
        screen.wait_for("> ")
        screen.send(f"{CAPITAL}\r")
        screen.wait_for("The capital of France is Paris.")
        screen.wait_for("> ")
        time.sleep(0.2)  # a dumb terminal shows no sign of when the line is read
        screen.send("\x04")
        assert screen.wait() == 0
