"""A conversation: what was said so far, as the messages that a prompt is rendered from."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localv4.cli import inputs
from localv4.errors import BadFileError, LocalV4Error

if TYPE_CHECKING:
    from localv4.engine.reply import Reply
    from localv4.engine.saved_sessions import SavedSession
    from localv4.text.completion import Completion
    from localv4.text.effort import Release
    from localv4.text.prompt import Prompt

Message = dict[str, Any]  # an OpenAI-style message


@dataclass(slots=True)
class Conversation:
    """Messages in order; every question is followed by its answer, except a pending last one."""

    system: str | None = None
    tools: list[Message] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)

    def ask(self, text: str) -> None:
        """Add a user message."""
        self.messages.append({"role": "user", "content": text})

    def answer(self, completion: "Completion") -> None:
        """Add the model's answer, finished or stopped."""
        shown = completion.content + (completion.raw_tool_text or "")
        message: Message = {"role": "assistant", "content": shown}
        if completion.reasoning:
            message["reasoning_content"] = completion.reasoning
        if completion.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in completion.tool_calls
            ]
        self.messages.append(message)

    def settle(self, reply: "Reply") -> bool:
        """Add the answer of a reply; take the question back when it was stopped before one.

        Returns whether there is an answer.
        """
        has_answer = reply.finish_reason != "cancelled" or bool(reply.token_ids)
        if has_answer:
            self.answer(reply.completion)
        else:
            self.take_back()
        return has_answer

    def take_back(self) -> str | None:
        """Remove the last question and its answer; return the question, None if there is none."""
        while self.messages:
            message = self.messages.pop()
            if message["role"] == "user":
                return str(message["content"])
        return None

    @classmethod
    def of_saved(cls, saved: "SavedSession") -> "Conversation":
        """Return the conversation that a file holds."""
        messages = [message.model_dump(exclude_none=True) for message in saved.messages]
        return cls(saved.system, list(saved.tools), messages)

    def to_save(self) -> dict[str, Any]:
        """Return the fields of a `SavedSession` that are the conversation's."""
        from localv4.engine.saved_sessions import SavedMessage
        from localv4.text.unicode import well_formed

        messages = []
        for message in self.messages:
            texts = {key: well_formed(v) for key, v in message.items() if isinstance(v, str)}
            messages.append(SavedMessage.model_validate({**message, **texts}))
        system = None if self.system is None else well_formed(self.system)
        return {"system": system, "tools": self.tools, "messages": messages}

    def prompt(self, *, thinking: bool, effort: str | None, release: "Release") -> "Prompt":
        """Render everything said so far, up to where the model goes on."""
        from localv4.text import prompt
        from localv4.text.effort import choose_effort

        head: list[Message] = []
        if self.system is not None or self.tools:
            head = [{"role": "system", "content": self.system or ""}]
            if self.tools:
                head[0]["tools"] = self.tools
        messages = prompt.parse_messages([*head, *self.messages])
        level = choose_effort(effort, release) if effort is not None else None
        return prompt.render(messages, thinking=thinking, effort=level, release=release)


def read_tools(path: Path) -> list[Message]:
    """Read a JSON list of OpenAI-style tools. Raises BadFileError when the list is not one."""
    from localv4.text import prompt

    tools = inputs.read_json(path)
    if not isinstance(tools, list):
        raise BadFileError(path, "not a JSON list of tools")
    try:
        prompt.parse_messages([{"role": "system", "content": "", "tools": tools}])
    except LocalV4Error as error:
        raise BadFileError(path, error.message) from error
    return tools
