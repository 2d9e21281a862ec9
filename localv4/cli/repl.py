"""The state of a chat, and how one question is answered."""

from typing import TYPE_CHECKING, TextIO, cast

from rich.console import Console
from rich.text import Text

from localv4.cli import generation, terminal
from localv4.cli.conversation import Conversation
from localv4.cli.live_view import LiveView
from localv4.cli.settings import Settings
from localv4.cli.statistics import statistics_lines
from localv4.cli.view import PlainView, View
from localv4.errors import LocalV4Error

if TYPE_CHECKING:
    from localv4.cli.archive import Archive
    from localv4.cli.loading import Loaded
    from localv4.engine.reply import Reply
    from localv4.engine.session import Session


class Chat:
    """A loaded model, a conversation with it, and the settings of both."""

    def __init__(
        self,
        loaded: "Loaded",
        console: Console,
        settings: Settings,
        *,
        system: str | None,
        thinking: bool,
        effort: str | None,
        hide_thinking: bool,
        stats: bool = False,
        archive: "Archive | None" = None,
    ) -> None:
        """Without an archive nothing is saved; `stats` are told while and after answers come."""
        self.loaded = loaded
        self.console = console
        self.settings = settings
        self.thinking = thinking
        self.effort = effort
        self.hide_thinking = hide_thinking
        self.stats = stats
        self.conversation = Conversation(system=system)
        self.archive = archive
        self.session = loaded.engine.new_session()
        if archive is not None:
            self.session.store = archive.store
        self.last: Reply | None = None

    def ask(self, question: str) -> None:
        """Put a question, show the answer, keep both; keep neither when there is no answer."""
        self.conversation.ask(question)
        try:
            self._answer()
        except LocalV4Error as error:
            self.conversation.take_back()
            self.show_error(error)
        else:
            self.keep(self.session)

    def take_back(self) -> str | None:
        """Forget the last question and its answer; return the question, None if there is none."""
        question = self.conversation.take_back()
        if question is not None:
            self.keep()
        return question

    def keep(self, session: "Session | None" = None) -> None:
        """Save the conversation if it is to be saved, and what `session` knows of its tokens."""
        if self.archive is not None:
            self.archive.keep(self.conversation, session)
            for warning in self.archive.take_warnings():
                self.say(f"warning: {warning}")

    def clear(self) -> None:
        """Begin a new conversation; what was saved of this one stays."""
        if self.archive is not None:
            self.archive.release()
        self.conversation.messages.clear()
        self.session.reset()

    def say(self, text: str) -> None:
        """Print a dimmed remark of the program itself."""
        self.console.print(Text(terminal.sanitize(text), style="dim"))

    def show_error(self, error: LocalV4Error) -> None:
        """Print an error and its remedy; the chat goes on."""
        self.console.print(Text(f"error: {terminal.sanitize_line(error.message)}", style="red"))
        if error.hint:
            self.say(f"hint: {error.hint}")

    def status(self) -> str:
        """Return the line below the prompt: model, context, speed, memory; what fits the width."""
        from localv4.engine.machine import resident_bytes

        parts = [
            self.loaded.name,
            f"context {self.session.position}/{self.loaded.engine.ctx_size}",
            f"memory {generation.format_bytes(resident_bytes())}",
            "/help",
        ]
        if self.last is not None and self.last.stats.decode_tok_s:
            parts.insert(2, f"{self.last.stats.decode_tok_s:.1f} tok/s")
        while len(parts) > 1 and len(" | ".join(parts)) > self.console.width - 2:
            parts.pop()
        return f" {' | '.join(parts)[: max(0, self.console.width - 2)]} "

    def _answer(self) -> None:
        from localv4.engine.growing_answer import ReplyOptions

        engine = self.loaded.engine
        prompt = self.conversation.prompt(
            thinking=self.thinking, effort=self.effort, release=self.loaded.model.release
        )
        options = ReplyOptions(
            max_tokens=self.settings.max_tokens,
            sampling=self.settings.sampling(),
            thinking=self.thinking,
        )
        prompt_ids = engine.tokenizer.encode_prompt(prompt)
        running = generation.Generation(
            engine, self.session, prompt_ids, options, shows_paging=self.stats
        )
        with self._view() as view:
            for delta in running.deltas():
                if delta is not None:
                    view.show(delta)
                view.tick(running)
            view.finish(running.finished())
        self._keep(running.finished())
        for line in self.loaded.fresh_notes():
            self.say(line)
        if self.stats:
            self.tell_statistics()

    def tell_statistics(self) -> None:
        """Say how fast the last answer came, and what it cost."""
        if self.last is None:
            self.say("no answer yet")
            return
        for line in statistics_lines(self.loaded, self.last):
            self.say(line)

    def _view(self) -> View:
        stream = cast(TextIO, self.console.file)
        if terminal.can_move_cursor(stream):
            return LiveView(self.console, hide_thinking=self.hide_thinking)
        return PlainView(stream, None if self.hide_thinking else stream)

    def _keep(self, reply: "Reply") -> None:
        """Add the answer to the conversation and say why it ended, unless it just did."""
        self.last = reply
        if not self.conversation.settle(reply):
            self.say("(stopped before the answer began; the question is not kept)")
            return
        if reply.finish_reason == "cancelled":
            self.say("(stopped; /retry answers anew, /undo takes the question back)")
        elif reply.finish_reason == "length":
            is_full = self.session.position >= self.loaded.engine.ctx_size - 1
            self.say(
                "(the context is full: /clear, or start with a larger --ctx-size)"
                if is_full
                else f"(stopped after {len(reply.token_ids)} tokens: /set max-tokens)"
            )
        self.console.print()
