"""`localv4 batch`: a file of prompts in, a file of answers out."""

import re
import shlex
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from localv4.cancellation import Cancellation
from localv4.cli import options
from localv4.cli.engine_options import EngineOptions, TraceRoutes
from localv4.cli.option_groups import option, with_groups
from localv4.cli.sampling_options import SamplingOptions, ThinkingOptions
from localv4.errors import Cancelled, UsageError

if TYPE_CHECKING:
    from localv4.cli.batch_report import Report
    from localv4.cli.settings import Settings
    from localv4.engine.batch_input import BatchInput, Place, Row
    from localv4.engine.batch_request import BatchSettings
    from localv4.engine.batch_results import Document, ResultFile, Results
    from localv4.engine.setup import Setup
    from localv4.library.installed import InstalledModel
    from localv4.storage import Checkpoint

ROWS_FAILED, INTERRUPTED, TERMINATED = 3, 130, 143
MOST_SHARDS = 1_000_000

_option = partial(option, panel="Batch", env=False)
Input = Annotated[
    Path,
    _option(
        "-i",
        "--input",
        metavar="FILE",
        help="Rows to answer: JSONL as for OpenAI's Batch API, or .txt with one prompt a line.",
    ),
]
Output = Annotated[
    Path,
    _option(
        "-o",
        "--output",
        metavar="FILE",
        help="Where results go. Rows that are there already are not answered again.",
    ),
]
Overwrite = Annotated[
    bool,
    _option(
        "--overwrite",
        metavar="",
        help="Begin anew: discard what the output holds.",
    ),
]
Parallel = Annotated[
    int | None,
    option(
        "--parallel",
        panel="Batch",
        metavar="N",
        min=1,
        max=64,
        help="Rows that decode together. Default: what processor and memory allow.",
    ),
]
Shard = Annotated[
    str | None,
    _option(
        "--shard",
        metavar="I/N",
        help="Answer only the lines I, I + N, I + 2N ...: one of N equal parts.",
    ),
]
Ray = Annotated[
    str | None,
    _option(
        "--ray",
        metavar="ADDRESS",
        help="Answer rows on all nodes of the Ray cluster there; auto: the one of this machine.",
    ),
]


@dataclass(frozen=True, slots=True)
class Machine:
    """How the engine is to use this machine, or each one of the cluster at `ray`."""

    setup: "Setup"
    parallel: int | None
    ray: str | None


@dataclass(frozen=True, slots=True)
class Asked:
    """Which model is to answer, and how; `weights` is its fingerprint."""

    model: "InstalledModel"
    weights: str
    settings: "BatchSettings"
    machine: Machine

    @property
    def identity(self) -> str:
        """What tells the results of equal rows apart."""
        setup = self.machine.setup
        return self.settings.identity(self.weights, setup.numerics, setup.ctx_size)

    @property
    def results(self) -> "Results":
        """What makes rows of the output."""
        from localv4.engine.batch_results import Results

        return Results(self.identity, self.settings.model)


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be answered, where it goes, and how much is told about it.

    `routes` is a file for the experts that tokens choose.
    """

    rows: "BatchInput"
    shard: tuple[int, int]
    output: Path
    overwrite: bool
    routes: Path | None
    as_json: bool
    stats: bool
    quiet: bool
    no_color: bool


@with_groups
def batch(
    input_file: Input,
    output: Output,
    *,
    model: options.Model = None,
    parallel: Parallel = None,
    shard: Shard = None,
    ray: Ray = None,
    overwrite: Overwrite = False,
    ctx_size: options.ContextSize = None,
    engine: EngineOptions,
    trace_routes: TraceRoutes = None,
    system: options.System = None,
    raw: options.Raw = False,
    sampling: SamplingOptions,
    stop: options.Stop = None,
    thought: ThinkingOptions,
    output_format: options.Format = options.OutputFormat.AUTO,
    as_json: options.Json = False,
    stats: options.Stats = False,
    quiet: options.Quiet = False,
    no_color: options.NoColor = False,
) -> None:
    """Answer every row of a file; many at a time, and resumable.

    Rows may be OpenAI Batch requests, {"prompt": ...} or {"messages": ...},
    each on a line; results have OpenAI's shape. Options hold for rows that do
    not say otherwise. The same command goes on where it was stopped; exit
    code 3 tells that some rows could not be answered.
    """
    from localv4.engine.batch_input import scan
    from localv4.engine.fingerprint import weights_fingerprint

    thinking, effort = thought.mode()
    if raw and (thinking or system is not None):
        raise UsageError("--raw has no chat format: no system prompt and no thinking")
    values = sampling.values()
    machine = Machine(engine.setup(ctx_size), parallel, ray)
    if ray is not None:
        _check_ray()
    part = parse_shard(shard)
    job = Job(
        rows=scan(input_file),
        shard=part,
        output=output,
        overwrite=overwrite,
        routes=_checked_routes(trace_routes, input_file, output, ray),
        as_json=options.wants_json(output_format, as_json),
        stats=stats,
        quiet=quiet,
        no_color=no_color,
    )
    found, checkpoint = _open_model(model)
    own = _recommended(found, checkpoint).with_values(values)
    settings = _settings(found, model, own, thinking, effort, tuple(stop or ()), system, raw)
    _run(job, Asked(found, weights_fingerprint(checkpoint), settings, machine))


def _check_ray() -> None:
    """Raise UsageError without the library, before there is an output."""
    from localv4.engine.ray_cluster import import_ray

    import_ray()


def parse_shard(text: str | None) -> tuple[int, int]:
    """Return (I, N) of a shard I/N, counted from 1; all rows are shard 1/1."""
    if text is None:
        return 1, 1
    found = re.fullmatch(r"(\d{1,7})/(\d{1,7})", text)
    number, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= number <= count <= MOST_SHARDS:
        raise UsageError(f"--shard is {text!r}, expected I/N with I from 1 to N, such as 3/8")
    return number, count


def _checked_routes(routes: Path | None, given: Path, output: Path, ray: str | None) -> Path | None:
    """Return where routes go; never over the rows."""
    if routes is None:
        return None
    if ray is not None:
        raise UsageError("--trace-routes and --ray cannot be used together: routes stay on nodes")
    if routes.resolve() in (given.resolve(), output.resolve()):
        raise UsageError(f"--trace-routes is {routes}: routes need a file of their own")
    return routes


def _open_model(reference: str | None) -> "tuple[InstalledModel, Checkpoint]":
    """Find the model; its weights are loaded later, if there is anything to answer."""
    from localv4.library import installed
    from localv4.storage import open_checkpoint

    found = installed.resolve(reference)
    return found, open_checkpoint(found.path)


def _recommended(model: "InstalledModel", checkpoint: "Checkpoint") -> "Settings":
    from localv4.cli.settings import recommended

    return recommended(model.path, checkpoint.metadata)


def _settings(
    model: "InstalledModel",
    reference: str | None,
    own: "Settings",
    thinking: bool,
    effort: str | None,
    stop: tuple[str, ...],
    system: str | None,
    raw: bool,
) -> "BatchSettings":
    """Return what holds for all rows."""
    from localv4.engine.batch_request import BatchSettings

    return BatchSettings(
        model=model.name,
        names=_names(model, reference),
        sampling=own.sampling(),
        release=model.release,
        max_tokens=own.max_tokens,
        stop=stop,
        thinking=thinking,
        effort=effort,
        system=system,
        raw=raw,
        seed=own.seed or 0,
    )


def _names(model: "InstalledModel", reference: str | None) -> frozenset[str]:
    """Return all names by which a row may ask for the model, in lower case."""
    names = {model.name, model.base_name, reference or model.name}
    if model.spec is not None:
        names |= {model.spec.repo, *model.spec.aliases}
    return frozenset(name.lower() for name in names)


def _run(job: Job, asked: Asked) -> None:
    """Answer what is not in the output yet. Raises typer.Exit unless every row has an answer."""
    from localv4.cli.batch_report import Report
    from localv4.engine.batch_results import ResultFile

    opened = ResultFile(job.output, job.rows, asked.results, overwrite=job.overwrite)
    with opened as file, ExitStack() as stack:
        number, count = job.shard
        mine = [place for place in job.rows.places if place.line % count == number % count]
        todo = [place for place in mine if place.custom_id not in file.done]
        before = len(mine) - len(todo)
        report = Report(
            *(job.output, asked.model.spec, len(mine), before, file.failed),
            *(job.quiet, job.no_color),
        )
        if todo:
            cancelled = Cancellation()
            if asked.machine.ray is None:
                documents = _on_this_machine(job, asked, todo, cancelled, report, stack)
            else:
                documents = _on_cluster(job, asked, todo, cancelled, report, asked.machine.ray)
            _collect(documents, cancelled, file, report)
        report.finish(as_json=job.as_json, stats=job.stats)
        if file.failed:
            raise typer.Exit(ROWS_FAILED)


def _on_this_machine(
    job: Job,
    asked: Asked,
    todo: "Sequence[Place]",
    cancelled: threading.Event,
    report: "Report",
    stack: ExitStack,
) -> "Iterator[Document]":
    """Load the model; return the results of the rows as they come. `stack` closes what is open."""
    from localv4.cli import loading
    from localv4.engine.batch_memory import plan_batch
    from localv4.engine.batch_run import answer_rows, make_run

    setup, settings = asked.machine.setup, asked.settings
    plan = plan_batch(
        asked.model.path,
        setup.memory,
        parallel=asked.machine.parallel,
        rows=len(todo),
        ctx_size=setup.ctx_size,
        threads=setup.threads,
        exact=setup.numerics == "exact",
    )
    setup = replace(setup, memory=plan.memory, gpu=replace(setup.gpu, state_bytes=plan.room))
    loaded = loading.load_engine(
        _reference(asked.model), setup, quiet=job.quiet, no_color=job.no_color
    )
    if not settings.raw and not loaded.knows_chat and not job.quiet:
        loading.warn(f"{loaded.name} is a base model that knows no chat format: use --raw")
    if job.routes is not None:
        stack.enter_context(loaded.record_routes(job.routes))
    plan = plan.within(loaded.engine.gpu_plan)
    run = make_run(
        loaded.engine, settings, asked.results, rows=plan.rows, room=plan.room, cancelled=cancelled
    )
    report.watch(loaded.engine.network, run.batcher.stats)
    return answer_rows(run, _rows(job.rows, todo))


def _on_cluster(
    job: Job,
    asked: Asked,
    todo: "Sequence[Place]",
    cancelled: threading.Event,
    report: "Report",
    address: str,
) -> "Iterator[Document]":
    """Return the results of the rows as they come from the nodes."""
    from localv4.engine.node_engine import EngineOrder
    from localv4.engine.ray_cluster import RayCluster

    order = EngineOrder(
        reference=_reference(asked.model),
        weights=asked.weights,
        identity=asked.identity,
        settings=asked.settings,
        parallel=asked.machine.parallel,
        rows=len(todo),
        setup=asked.machine.setup,
    )
    cluster = RayCluster(address, order, job.rows.is_text, report.tell, cancelled)
    return cluster.answer(job.rows.lines(todo))


def _reference(model: "InstalledModel") -> str:
    """Return what the model is called on every machine that has it."""
    return str(model.path.absolute()) if model.source == "path" else model.name


def _rows(source: "BatchInput", places: "Sequence[Place]") -> "Iterator[Row]":
    """Yield the rows at these places, read again."""
    from localv4.engine.batch_input import parse_row

    for place, data in source.lines(places):
        yield parse_row(place.line, data, source.is_text, place.digest)


def _collect(
    documents: "Iterator[Document]",
    cancelled: threading.Event,
    file: "ResultFile",
    report: "Report",
) -> None:
    """Write results as they come. On Ctrl-C and SIGTERM say how to go on, and leave."""
    from localv4.cli import worker
    from localv4.cli.signals import interrupt_sets, termination_calls

    code = INTERRUPTED

    def terminate() -> None:
        nonlocal code
        code = TERMINATED
        cancelled.set()

    try:
        with interrupt_sets(cancelled), termination_calls(terminate), report:
            for document in worker.stream(lambda: documents):
                if document is not None:
                    file.append(document)
                    report.note(document)
                report.tick()
    except (Cancelled, KeyboardInterrupt):
        report.interrupted(_resume_command())
        raise typer.Exit(code) from None


def _resume_command() -> str:
    """Return the command that goes on with what this one leaves undone."""
    kept = [argument for argument in sys.argv[1:] if argument != "--overwrite"]
    return shlex.join(["localv4", *kept])
