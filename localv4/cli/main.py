"""The `localv4` command: its subcommands, its exit codes, and where every error is printed."""

import errno
import os
import sys
import traceback
from typing import Annotated, NoReturn

import typer

from localv4 import __version__
from localv4.cli import (
    batch,
    bench,
    chat,
    doctor,
    evaluate,
    fit,
    models,
    pull,
    quantize,
    remove,
    run,
    sessions,
    show,
    terminal,
    tune,
    verify,
)
from localv4.cli.precedence import Command
from localv4.cli.signals import Terminated, unwind_on_termination
from localv4.errors import LocalV4Error

INTERRUPTED = 130
TERMINATED = 143

# Spellings that people bring along from other programs: accepted, not advertised.
SPELLINGS = {
    "temperature": "temp",
    "ctx": "ctx-size",
    "nothink": "no-think",
    "system-prompt": "system",
}

# What the libraries that read numbers say of them, and what people understand.
WORDS = {
    "Value error, ": "",
    "Input should be a valid integer": "expected a whole number",
    "Input should be a valid number": "expected a number",
    "Input should be greater than or equal to": "expected at least",
    "Input should be less than or equal to": "expected at most",
    ", unable to parse string as an integer": "",
    ", unable to parse string as a number": "",
    "is not a valid integer": "is not a whole number",  # other versions of typer
}

app = typer.Typer(
    name="localv4",
    help="Run DeepSeek-V4 models on this computer; a GPU helps where there is one.",
    epilog="Most options have a twin in the environment: --ctx-size is LOCALV4_CTX_SIZE.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: SPELLINGS.get(name, name),
    },
)
app.command("run", cls=Command)(run.run)
app.command("chat", cls=Command)(chat.chat)
app.command("batch", cls=Command)(batch.batch)
app.command("pull", cls=Command)(pull.pull)
app.command("quantize", cls=Command)(quantize.quantize)
app.command("list", cls=Command)(models.list_models)
app.command("ls", hidden=True)(models.list_models)
app.command("verify", cls=Command)(verify.verify)
app.command("rm", cls=Command)(remove.remove)
app.command("prune", cls=Command)(remove.prune)
app.command("show", cls=Command)(show.show)
app.command("fit", cls=Command)(fit.fit)
app.command("doctor", cls=Command)(doctor.doctor)
app.command("tune", cls=Command)(tune.tune)
app.command("bench", cls=Command)(bench.bench)
app.add_typer(evaluate.app, name="eval")
app.add_typer(sessions.app, name="sessions")

# typer has moved this class between releases; every one of them derives BadParameter from it
CommandLineError: type[Exception] = typer.BadParameter.__mro__[1]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"localv4 {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            metavar="",
            callback=_print_version,
            is_eager=True,
            help="Show the version.",
        ),
    ] = False,
) -> None:
    pass


def main() -> NoReturn:
    """Run the command line in `sys.argv` and leave the process with its exit code."""
    code = _guarded()
    try:
        sys.stdout.flush()
    except OSError as error:
        code = _report_output_failure(error)
    leave(code)


def leave(code: int) -> NoReturn:
    """End the process now; work still running on another thread cannot hold it up."""
    from localv4.cli.worker import is_busy

    if is_busy():
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _guarded() -> int:
    """Run the command; turn every way it can fail into a line on stderr and an exit code."""
    try:
        terminal.prepare_streams()
        unwind_on_termination()
        return _dispatch()
    except LocalV4Error as error:
        _print_error(error.message, error.hint, error)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except Terminated:
        return TERMINATED
    except OSError as error:
        return _report_os_error(error)
    except MemoryError as error:
        _print_error("out of memory", "try a smaller --ctx-size", error)
        return 4
    except Exception as error:
        what = f"internal error: {type(error).__name__}: {error}"
        _print_error(what, "set LOCALV4_DEBUG=1 to see where, and please report it", error)
        return 1


def _dispatch() -> int:
    """Let typer parse and call; return the exit code."""
    command = typer.main.get_command(app)
    try:
        result = command.main(prog_name="localv4", standalone_mode=False)
    except CommandLineError as error:
        return _print_usage_error(error)
    except typer.Abort:
        return INTERRUPTED
    except SystemExit as error:  # completion ends so, and typer's own answer to a broken pipe
        return error.code if isinstance(error.code, int) else 1
    return result if isinstance(result, int) else 0


def _print_usage_error(error: Exception) -> int:
    """Print a mistake in the command line; a call without arguments prints the help instead."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "localv4"
    message = getattr(error, "format_message", lambda: str(error))()
    if type(error).__name__ == "NoArgsIsHelpError":
        sys.stderr.write(message)  # empty when typer has printed the help itself
    else:
        line = " ".join(message.split())
        for words, ours in WORDS.items():
            line = line.replace(words, ours)
        _print_error(line, f"{path} --help", None)
    return 2


def _print_error(message: str, hint: str | None, error: BaseException | None) -> None:
    """Write `error: ...` and `hint: ...` to stderr, and the traceback when debugging."""
    if error is not None and os.environ.get("LOCALV4_DEBUG", "0") not in ("", "0"):
        sys.stderr.write(terminal.sanitize("".join(traceback.format_exception(error))))
    sys.stderr.write(f"error: {terminal.sanitize_line(message)}\n")
    if hint:
        sys.stderr.write(f"hint: {terminal.sanitize_line(hint)}\n")
    sys.stderr.flush()


def _report_os_error(error: OSError) -> int:
    """Report a failed read or write that no command gave a meaning to."""
    if isinstance(error, BrokenPipeError):
        terminal.silence_stdout()
        return 1
    if error.errno == errno.ENOSPC and not error.filename:
        return _report_output_failure(error)
    place = f" ({error.filename})" if error.filename else ""
    _print_error(f"{error.strerror or error}{place}", None, error)
    terminal.silence_stdout()
    return 1


def _report_output_failure(error: OSError) -> int:
    """Report that stdout did not take the last of the output; a closed pipe needs no words."""
    if not isinstance(error, BrokenPipeError):
        _print_error(f"cannot write the output: {error.strerror}", None, error)
    terminal.silence_stdout()
    return 1
