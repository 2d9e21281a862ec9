"""Render a conversation into the DeepSeek-V4 prompt format.

The steps follow section 3 of the format description. System texts, user texts, tool results,
schemas and the history of the assistant are untrusted: they are plain text whatever they hold.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from localv4.errors import UsageError
from localv4.text.dsml import write_calls, write_tools
from localv4.text.effort import Effort, Release, effort_text
from localv4.text.messages import Message, parse_messages
from localv4.text.pieces import Piece, Prompt, PromptBuilder, plain_prompt
from localv4.text.special_tokens import (
    ASSISTANT,
    BOS,
    END_THINK,
    EOS,
    LATEST_REMINDER,
    TASKS,
    THINK,
    USER,
)

__all__ = [
    "Effort",
    "Message",
    "Piece",
    "Prompt",
    "Release",
    "parse_messages",
    "plain_prompt",
    "render",
]

_FORMAT = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"


@dataclass(slots=True)
class _Turn:
    """A message, or a user turn into which tool results and user texts were fused."""

    message: Message
    blocks: list[Message] = field(default_factory=list)  # of a user turn, in order

    @property
    def asks(self) -> bool:
        """Whether the assistant answers this turn."""
        return self.message.role in ("user", "developer")


def render(
    messages: Sequence[Message],
    *,
    thinking: bool,
    effort: Effort | None = None,
    release: Release = "preview",
    drop_reasoning: bool = True,
) -> Prompt:
    """Return the prompt that asks for the next assistant turn.

    Reasoning of turns before the last question is dropped unless `drop_reasoning` is off or any
    message has tools. Raise UsageError for an empty or impossible conversation.
    """
    if not messages:
        raise UsageError("there are no messages to answer")
    turns = _sort_results(_merge(messages))
    drops = drop_reasoning and not any(turn.message.tools for turn in turns)
    if thinking and drops:
        turns = _drop_old(turns)
    last_question = _last_question(turns)
    out = PromptBuilder()
    out.trusted(BOS)
    if thinking:
        out.trusted(effort_text(effort, release))
    opens_reasoning = False
    for index, turn in enumerate(turns):
        if turn.message.role == "assistant":
            after_task = index > 0 and turns[index - 1].message.task is not None
            kept = thinking and not after_task and (not drops or index > last_question)
            _write_assistant(out, turn.message, reasoning=kept)
        else:
            _write_turn(out, turn)
        following = turns[index + 1].message.role if index + 1 < len(turns) else None
        opens_reasoning = False
        if following in (None, "assistant", "latest_reminder"):
            thinks = thinking and (not drops or index >= last_question)
            opens_reasoning = _write_transition(out, turn, thinking=thinking, thinks=thinks)
    return Prompt(tuple(out.pieces), opens_reasoning)


def _merge(messages: Iterable[Message]) -> list[_Turn]:
    """Fuse tool results and user texts that follow each other into one user turn."""
    turns: list[_Turn] = []
    for index, message in enumerate(messages):
        if message.role not in ("user", "tool"):
            turns.append(_Turn(message))
            continue
        last = turns[-1] if turns and turns[-1].message.role == "user" else None
        if last is None or (last.message.task is not None and message.role == "user"):
            turns.append(_Turn(replace(message, role="user"), [message]))
        elif message.task is None:
            last.blocks.append(message)
        else:
            # The official renderer fuses the text and forgets the task, which asks something else
            raise UsageError(
                f"messages[{index}].task: a message with a task cannot follow a user or tool "
                "message directly"
            )
    return turns


def _sort_results(turns: list[_Turn]) -> list[_Turn]:
    """Put the tool results of each user turn into the order of the calls; texts stay in place."""
    order: dict[str, int] = {}
    for turn in turns:
        if turn.message.tool_calls:
            order = {call.id: i for i, call in enumerate(turn.message.tool_calls) if call.id}
        results = [block for block in turn.blocks if block.role == "tool"]
        in_order = iter(sorted(results, key=lambda block: order.get(block.tool_call_id, 0)))
        turn.blocks = [next(in_order) if b.role == "tool" else b for b in turn.blocks]
    return turns


def _last_question(turns: Sequence[_Turn]) -> int:
    """Return the index of the last user or developer turn, -1 if there is none."""
    return max((index for index, turn in enumerate(turns) if turn.asks), default=-1)


def _drop_old(turns: Sequence[_Turn]) -> list[_Turn]:
    """Remove developer turns before the last question.

    The reasoning of older assistant turns stays in the message and is not written.
    """
    last = _last_question(turns)
    return [t for i, t in enumerate(turns) if i >= last or t.message.role != "developer"]


def _write_turn(out: PromptBuilder, turn: _Turn) -> None:
    """Append anything but an assistant turn."""
    message = turn.message
    if message.role == "latest_reminder":
        out.trusted(LATEST_REMINDER)
        out.untrusted(message.content)
        return
    if message.role != "system":
        out.trusted(USER)
    for index, block in enumerate(turn.blocks or [message]):
        if index:
            out.trusted("\n\n")
        if block.role == "tool":
            _write_result(out, block.content)
        else:
            out.untrusted(block.content)
    if message.tools:
        out.trusted("\n\n")
        write_tools(out, message.tools)
    if message.response_format:
        out.trusted(f"\n\n{_FORMAT}")
        out.untrusted(message.response_format)


def _write_result(out: PromptBuilder, content: str) -> None:
    """Append a tool result; the closing tag is plain text, so one inside the result is escaped."""
    out.trusted("<tool_result>")
    out.untrusted(content.replace("</tool_result>", "&lt;/tool_result>"))
    out.trusted("</tool_result>")


def _write_assistant(out: PromptBuilder, message: Message, *, reasoning: bool) -> None:
    """Append an assistant turn; its `<think>` belongs to the transition before it."""
    if reasoning:
        out.untrusted(message.reasoning or "")
        out.trusted(END_THINK)
    out.untrusted(message.content)
    if message.tool_calls:
        write_calls(out, message.tool_calls)
    if not message.prefix:
        out.trusted(EOS)


def _write_transition(out: PromptBuilder, turn: _Turn, *, thinking: bool, thinks: bool) -> bool:
    """Append what makes the assistant begin; return whether it begins with reasoning."""
    task = turn.message.task
    if task == "action":
        # Written inside <think> in thinking mode too, yet the answer to a task has no reasoning
        out.trusted(ASSISTANT + (THINK if thinking else END_THINK) + TASKS[task])
    elif task is not None:
        out.trusted(TASKS[task])
    elif turn.asks:
        out.trusted(ASSISTANT + (THINK if thinks else END_THINK))
        return thinks
    return False
