"""`localv4 run`: one prompt in, one answer out."""

import sys
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

import typer

from localv4.cli import options, terminal
from localv4.cli.engine_options import EngineOptions, TraceRoutes
from localv4.cli.option_groups import with_groups
from localv4.cli.sampling_options import SamplingOptions, ThinkingOptions
from localv4.errors import UsageError

if TYPE_CHECKING:
    from localv4.cli.conversation import Conversation
    from localv4.cli.generation import Generation
    from localv4.cli.loading import Loaded
    from localv4.cli.settings import Settings
    from localv4.cli.view import View
    from localv4.engine.reply import Reply

INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked, and how."""

    prompt: str
    system: str | None
    tools: tuple[dict[str, Any], ...]
    raw: bool
    thinking: bool
    effort: str | None
    stop: tuple[str, ...]
    session: str | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """How the answer is shown."""

    as_json: bool
    as_terminal: bool  # --format human: like on a terminal, also into a pipe
    hide_thinking: bool
    stream: bool
    stats: bool
    quiet: bool
    no_color: bool


@with_groups
def run(
    prompt: options.Prompt = None,
    *,
    model: options.Model = None,
    ctx_size: options.ContextSize = None,
    engine: EngineOptions,
    trace_routes: TraceRoutes = None,
    prompt_option: options.PromptOption = None,
    file: options.PromptFile = None,
    system: options.System = None,
    tools: options.Tools = None,
    raw: options.Raw = False,
    session: options.SessionName = None,
    sampling: SamplingOptions,
    stop: options.Stop = None,
    thought: ThinkingOptions,
    hide_thinking: options.HideThinking = False,
    output_format: options.Format = options.OutputFormat.AUTO,
    as_json: options.Json = False,
    stats: options.Stats = False,
    no_stream: options.NoStream = False,
    quiet: options.Quiet = False,
    no_color: options.NoColor = False,
) -> None:
    """Answer one prompt: an argument, a file and stdin, joined by blank lines.

    stdout carries the answer and nothing else. On a terminal, reasoning is shown dimmed before the
    answer; a pipe gets the answer alone (all of it with --format human), JSON has both as fields.
    """
    from localv4.cli import inputs, loading
    from localv4.cli.conversation import read_tools

    given = options.one_of(prompt, prompt_option, "--prompt")
    thinking, effort = thought.mode()
    if raw and (thinking or system is not None or tools is not None or session is not None):
        raise UsageError("--raw has no chat format: no system prompt, tools, thinking or session")
    values = sampling.values()
    known_tools = tuple(read_tools(tools)) if tools is not None else ()
    text = inputs.read_prompt(given, file, exact=raw, warn=loading.warn)
    setup = engine.setup(ctx_size)
    loaded = loading.load_engine(model, setup, quiet=quiet, no_color=no_color)
    request = Request(text, system, known_tools, raw, thinking, effort, tuple(stop or ()), session)
    output = Output(
        as_json=options.wants_json(output_format, as_json),
        as_terminal=output_format is options.OutputFormat.HUMAN,
        hide_thinking=hide_thinking,
        stream=not no_stream,
        stats=stats,
        quiet=quiet,
        no_color=no_color,
    )
    with ExitStack() as stack:
        if trace_routes is not None:
            stack.enter_context(loaded.record_routes(trace_routes))
        _answer(loaded, request, loaded.settings(values), output)


def _answer(loaded: "Loaded", request: Request, settings: "Settings", output: Output) -> None:
    """Generate and show the answer. Raises typer.Exit(130) when it was interrupted."""
    from localv4.cli.archive import open_archive
    from localv4.cli.conversation import Conversation
    from localv4.cli.generation import Generation
    from localv4.cli.loading import warn
    from localv4.cli.statistics import statistics_lines
    from localv4.engine.growing_answer import ReplyOptions

    reply_options = ReplyOptions(
        max_tokens=settings.max_tokens,
        sampling=settings.sampling(),
        thinking=request.thinking,
        stop=request.stop,
    )
    if not request.raw and not loaded.knows_chat:
        warn(f"{loaded.name} is a base model that knows no chat format: use --raw")
    engine, session = loaded.engine, loaded.engine.new_session()
    archive = None if request.session is None else open_archive(loaded)
    conversation = Conversation(system=request.system, tools=list(request.tools))
    if archive is not None and request.session is not None:
        session.store = archive.store
        conversation = _continued(conversation, archive.enter(request.session, warn))
    conversation.ask(request.prompt)
    prompt_ids = _prompt_ids(loaded, request, conversation)
    generation = Generation(engine, session, prompt_ids, reply_options, shows_paging=output.stats)
    reply = _watch(generation, _view(request, output, loaded.model.name), output)
    if archive is not None:
        conversation.settle(reply)
        archive.keep(conversation, session)
        archive.release()
        for warning in archive.take_warnings():
            warn(warning)
    for line in loaded.fresh_notes() if not output.quiet else ():
        warn(line)
    if output.stats and not output.quiet:
        sys.stdout.flush()
        sys.stderr.write("\n".join(statistics_lines(loaded, reply)) + "\n")
    if reply.finish_reason == "cancelled":
        raise typer.Exit(INTERRUPTED)


def _continued(given: "Conversation", saved: "Conversation") -> "Conversation":
    """Return a saved conversation with the system prompt and the tools that were given now."""
    saved.system = saved.system if given.system is None else given.system
    saved.tools = given.tools or saved.tools
    return saved


def _prompt_ids(loaded: "Loaded", request: Request, conversation: "Conversation") -> list[int]:
    """Return the token ids of the prompt, in the chat format or plain."""
    tokenizer = loaded.engine.tokenizer
    if request.raw:
        return [tokenizer.bos_id, *tokenizer.encode(request.prompt)]
    prompt = conversation.prompt(
        thinking=request.thinking, effort=request.effort, release=loaded.model.release
    )
    return tokenizer.encode_prompt(prompt)


def _watch(generation: "Generation", view: "View", output: Output) -> "Reply":
    """Follow the generation to its end."""
    from localv4.cli.progress import Progress

    quiet = output.quiet or view.shows_progress
    with Progress(quiet=quiet, no_color=output.no_color) as progress, view:
        for delta in generation.deltas():
            if delta is not None:
                progress.close()
                view.show(delta)
            elif generation.is_reading:
                progress("reading the prompt", *generation.prefill)
            view.tick(generation)
        progress.close()
        view.finish(generation.finished())
    return generation.finished()


def _view(request: Request, output: Output, model: str) -> "View":
    """Choose how to show the answer: live Markdown only on a terminal that can be redrawn."""
    from localv4.cli import live_view, view

    if output.as_json:
        return view.JsonView(sys.stdout, model)
    chosen: View
    if terminal.can_move_cursor(sys.stdout) and not request.raw:
        console = terminal.make_console(sys.stdout, no_color=output.no_color)
        chosen = live_view.LiveView(console, hide_thinking=output.hide_thinking)
    else:
        chosen = view.PlainView(sys.stdout, _reasoning_stream(output))
    return chosen if output.stream else view.HeldView(chosen)


def _reasoning_stream(output: Output) -> TextIO | None:
    """Say where plain reasoning goes: never into a pipe, where only the answer is wanted."""
    if output.hide_thinking:
        return None
    if terminal.is_terminal(sys.stdout) or output.as_terminal:
        return sys.stdout
    return sys.stderr if terminal.is_terminal(sys.stderr) and not output.quiet else None
