"""`localv4 pull`: a model from the Hugging Face hub to this computer, resumed and checked."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localv4.cli import options, terminal, worker
from localv4.cli.signals import Terminated
from localv4.errors import LocalV4Error, UsageError

if TYPE_CHECKING:
    from localv4.library.download import Plan

Reference = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Name, name:quant, or hf://org/repo[:quant]; see list --all."
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        "--revision", metavar="REV", help="Commit, branch or tag. Default: the one that is pinned."
    ),
]
LocalDir = Annotated[
    Path | None,
    typer.Option(
        "--local-dir", metavar="DIR", help="Put plain files here instead of the hub's cache."
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", metavar="", help="Show what would be fetched, and stop.")
]
Force = Annotated[
    bool, typer.Option("--force", metavar="", help="Fetch files again that are here already.")
]
Offline = Annotated[
    bool,
    typer.Option(
        "--offline", metavar="", help="Open no connection: only tell whether the model is here."
    ),
]
Jobs = Annotated[
    int, typer.Option("--jobs", "-j", metavar="N", min=1, max=64, help="Files fetched at a time.")
]


def pull(
    model: Reference,
    revision: Revision = None,
    local_dir: LocalDir = None,
    dry_run: DryRun = False,
    force: Force = False,
    offline: Offline = False,
    jobs: Jobs = 4,
    output_format: options.Format = options.OutputFormat.AUTO,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    no_color: options.NoColor = False,
) -> None:
    """Download a model; what was begun goes on, what is here stays."""
    wants_json = options.wants_json(output_format, as_json)
    if offline:
        _report_offline(model, revision, local_dir, force, wants_json)
        return
    worker.call(_import)
    from localv4.library import hub

    if hub.is_offline():
        _report_offline(model, revision, local_dir, force, wants_json)
        return
    if not quiet and (note := hub.ignored_settings()):
        terminal.say(f"note: {note}")
    try:
        task = worker.call(lambda: _plan(model, revision, local_dir, force, quiet))
        if wants_json and dry_run:
            _print_json(task, None)
            return
        if not quiet:
            _print_plan(task)
        task.check_space()
        if dry_run:
            return
        folder = _carry_out(task, jobs, quiet, no_color)
    except (KeyboardInterrupt, Terminated):
        terminal.say(f"stopped; to go on: localv4 pull {model}")
        raise
    if wants_json:
        _print_json(task, folder)
    else:
        print(terminal.sanitize_line(str(folder)))
    if not quiet:
        terminal.say(_next_step(task, folder, local_dir))


def _import() -> None:
    """Import what takes long, on the thread that Ctrl-C does not wait for."""
    import localv4.library.download  # noqa: F401


def _plan(
    model: str, revision: str | None, local_dir: Path | None, force: bool, quiet: bool
) -> "Plan":
    from localv4.library import download
    from localv4.library.published import find_published

    def note(text: str) -> None:
        if not quiet:
            terminal.say(f"note: {text}")

    wanted = find_published(model, revision)
    if local_dir is not None and local_dir.exists() and not local_dir.is_dir():
        raise UsageError(f"--local-dir: {local_dir} is a file")
    return download.plan(wanted, local_dir=local_dir, force=force, on_note=note)


def _carry_out(task: "Plan", jobs: int, quiet: bool, no_color: bool) -> Path:
    from localv4.cli.transfer import Transfer
    from localv4.library.download import download

    missing = sum(file.nbytes for file in task.missing)
    label = task.wanted.name
    with Transfer(label, missing, missing - task.needed, quiet=quiet, no_color=no_color) as bar:
        return worker.call(
            lambda: download(task, jobs=jobs, on_bytes=bar.advance, on_note=bar.note)
        )


def _print_plan(task: "Plan") -> None:
    """Tell on stderr what will be fetched, from where, to where."""
    from localv4.cli.generation import format_bytes

    store = task.store
    terminal.say(f"{task.wanted.name}: {task.wanted.repo} at {task.listing.commit[:12]}")
    here = f", {format_bytes(task.total - task.needed)} is here" if task.needed < task.total else ""
    if task.missing:
        here += f", {format_bytes(task.needed)} to fetch"
    terminal.say(f"  files   {len(task.files)}, {format_bytes(task.total)}{here}")
    terminal.say(f"  to      {store.folder}")
    terminal.say(f"  disk    {format_bytes(task.free)} free")
    if (line := worker.call(lambda: fit_line(task.wanted.name))) is not None:
        terminal.say(f"  memory  {line}")


def fit_line(reference: str) -> str | None:
    """Say in a line how a model goes with this machine's memory; None where nothing is known.

    Nothing is measured, and no connection is opened.
    """
    from localv4.cli.generation import format_bytes
    from localv4.planning.assessment import assess
    from localv4.planning.measuring import known_machine
    from localv4.planning.subject import find_subject

    try:
        subject = find_subject(reference)
        if not subject.forms:
            return None
        # of weights as they were published the first form is the nearest: it drops nothing
        found = assess(subject.forms[subject.chosen or 0], known_machine())
    except LocalV4Error:
        return None
    if found.plan is None:
        return found.refusal.message if found.refusal is not None else None
    needed = format_bytes(found.plan.total)
    if found.plan.fits:
        return f"fits: {needed} of {format_bytes(found.plan.usable)}"
    paged = format_bytes(found.plan.paged_bytes)
    return f"{needed} used, {paged} stay on the disk; how fast: localv4 fit {reference}"


def _next_step(task: "Plan", folder: Path, local_dir: Path | None) -> str:
    if local_dir is None:
        return f"try it: localv4 run -m {task.wanted.name} 'Hello'"
    first = task.files[0].name
    place = folder if not first.endswith(".gguf") else folder / first
    return f"try it: localv4 run -m {place} 'Hello'"


def _report_offline(
    model: str, revision: str | None, local_dir: Path | None, force: bool, wants_json: bool
) -> None:
    """Say whether the model is here, from what is on the disk alone; exit code 1 when not."""
    from localv4.library import installed

    if force or revision is not None:
        raise UsageError("offline there is nothing to fetch again, and no revision to look up")
    found = installed.resolve(str(local_dir.absolute()) if local_dir is not None else model)
    if wants_json:
        terminal.print_json({"name": found.name, "path": str(found.path), "bytes": found.nbytes})
    else:
        print(terminal.sanitize_line(str(found.path)))


def _print_json(task: "Plan", folder: Path | None) -> None:
    missing = {file.name for file in task.missing}
    document: dict[str, Any] = {
        "name": task.wanted.name,
        "repo": task.wanted.repo,
        "revision": task.listing.commit,
        "path": str(task.store.folder),
        "bytes": task.total,
        "bytes_to_fetch": task.needed,
        "bytes_free": task.free,
        "done": folder is not None,
        "files": [
            {"name": file.name, "bytes": file.nbytes, "digest": file.etag}
            | {"was_here": file.name not in missing}
            for file in task.files
        ],
    }
    terminal.print_json(document)
