"""What a benchmark found, written as Markdown, CSV or JSON."""

import csv
import io
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from localv4.cli import terminal
from localv4.cli.bench_figures import compared, figures, with_samples
from localv4.cli.bench_peer import Rival
from localv4.cli.generation import format_bytes
from localv4.engine.benchmark import Benchmark
from localv4.engine.machine import machine_facts
from localv4.engine.measurement import Case, Measurement, PeerResult, Series

if TYPE_CHECKING:
    from collections.abc import Iterator

SCHEMA = 1

HEADER = (
    *("model", "size", "params", "numerics", "threads", "test", "t/s", "median", "clean"),
    *("GB/s", "% of roof", "% of int8 peak", "peak RSS"),
)
NUMBERS = frozenset(range(1, len(HEADER))) - {3, 5}  # columns that are set to the right

PEER_HEADER = (
    *("test", "localv4", "clean", "llama.cpp", "clean", "ratio", "of clean", "same logits"),
    "peak RSS of llama.cpp",
)


class Report:
    """The finished measurements of one run, and what a reader must know beside them."""

    def __init__(
        self, model: str, benchmark: Benchmark, skipped: Sequence[Case], rival: Rival | None
    ) -> None:
        self.model = model
        self.benchmark = benchmark
        self.skipped = skipped
        self.rival = rival
        self.measurements: list[Measurement] = []
        self.is_complete = False

    def markdown(self) -> str:
        """Return tables: the results, the comparison, the bytes of a token, the memory."""
        if not self.measurements:
            return ""
        lines = [*_table(HEADER, [self._cells(m) for m in self.measurements], NUMBERS), ""]
        roofs = [roof for measurement in self.measurements for roof in measurement.roofs]
        reads = [roof.read_bytes_s / 1e9 for roof in roofs]
        peaks = [roof.int8_ops_s / 1e12 for roof in roofs]
        lines.append(
            f"Roofs with {self.benchmark.threads} threads: read {min(reads):.1f} to "
            f"{max(reads):.1f} GB/s, int8 {min(peaks):.2f} to {max(peaks):.2f} Tops/s"
        )
        lines += gpu_lines(self.measurements)
        if self.rival is not None:
            lines += ["", *self._peer_lines(self.rival)]
        lines += ["", *self._traffic_table(), "", *self._memory_table()]
        return "\n".join(lines)

    def csv(self) -> str:
        """Return a line per test; sizes in bytes, rates per second, shares from 0 to 1."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        rows = [self._flat(measurement) for measurement in self.measurements]
        writer.writerow(rows[0] if rows else ())
        writer.writerows(row.values() for row in rows)
        return out.getvalue().removesuffix("\n") if rows else ""

    def json(self) -> str:
        """Return everything as one document."""
        document = {
            "schema": SCHEMA,
            "complete": self.is_complete,
            "machine": machine_facts(),
            "model": {
                "name": self.model,
                "bytes": self.benchmark.model_bytes,
                "parameters": self.benchmark.parameters,
                "layers": self.benchmark.n_layers,
            },
            "numerics": self.benchmark.numerics,
            "threads": self.benchmark.threads,
            "roof_buffer_bytes": self.benchmark.roof_bytes,
            "bytes_per_token": self.benchmark.weight_bytes,
            "peer": self._peer_document(),
            "skipped": [case.name for case in self.skipped],
            "tests": [with_samples(measurement) for measurement in self.measurements],
        }
        return json.dumps(document, ensure_ascii=False, indent=2)

    def _cells(self, measurement: Measurement) -> tuple[str, ...]:
        rate, own = measurement.read_bytes_s, measurement.own
        return (
            self.model,
            format_bytes(self.benchmark.model_bytes),
            _count_text(self.benchmark.parameters),
            self.benchmark.numerics,
            str(self.benchmark.threads),
            measurement.case.name,
            f"{own.mean:.2f} ± {own.stdev:.2f}",
            f"{own.median:.2f}",
            _clean_text(own),
            "" if rate is None else f"{rate / 1e9:.2f}",
            _percent(measurement.read_share),
            _percent(measurement.int8_share),
            format_bytes(measurement.memory.peak),
        )

    def _flat(self, measurement: Measurement) -> dict[str, Any]:
        return {
            "model": self.model,
            "size_bytes": self.benchmark.model_bytes,
            "params": self.benchmark.parameters,
            "numerics": self.benchmark.numerics,
            "threads": self.benchmark.threads,
            **figures(measurement),
            **({} if measurement.peer is None else compared(measurement, measurement.peer)),
        }

    def _peer_lines(self, rival: Rival) -> "Iterator[str]":
        """Yield the comparison: a table, what failed, and how it was made."""
        pairs = [(m, m.peer) for m in self.measurements if m.peer is not None]
        rows = [_peer_cells(measurement, result) for measurement, result in pairs]
        yield from _table(PEER_HEADER, rows, frozenset(range(1, len(PEER_HEADER))))
        yield ""
        for problem in dict.fromkeys(result.problem for _, result in pairs if result.problem):
            yield f"No figure: {problem}"
        yield f"{rival.name}: {rival.facts.system}"
        contexts = [result.context for _, result in pairs if result.context is not None]
        flash = [context.flash_attention for context in contexts] or [
            rival.settings.flash_attention
        ]
        weights = "repacked" if rival.settings.repack else "as in the file"
        yield (
            f"Set for llama.cpp: {self.benchmark.threads} threads, n_batch {rival.settings.batch}, "
            f"n_ubatch {rival.settings.ubatch}, flash attention {', '.join(dict.fromkeys(flash))}, "
            f"weights {weights}, no GPU"
        )
        if used := self._gpus():
            yield f"Not like with like: localv4 computed with {used}, llama.cpp without a GPU"
        yield f"Medians of samples {self._turns()}"

    def _gpus(self) -> str:
        """Return the names of GPUs that helped us; empty without one."""
        found = (measurement.gpu for measurement in self.measurements)
        return ", ".join(dict.fromkeys(gpu.stats.name for gpu in found if gpu is not None))

    def _turns(self) -> str:
        if self.benchmark.together:
            return "in turns, both models in memory"
        return "of one engine after the other in each test: memory holds one of the two at a time"

    def _peer_document(self) -> dict[str, Any] | None:
        if self.rival is None:
            return None
        return {
            "name": "llama.cpp",
            "package": self.rival.facts.package,
            "ggml": self.rival.facts.ggml,
            "system": self.rival.facts.system,
            "python": self.rival.facts.python,
            "n_batch": self.rival.settings.batch,
            "n_ubatch": self.rival.settings.ubatch,
            "flash_attention": self.rival.settings.flash_attention,
            "repack": self.rival.settings.repack,
            "in_memory_together": self.benchmark.together,
            "gpu": None,
            "own_gpu": self._gpus() or None,
        }

    def _traffic_table(self) -> "Iterator[str]":
        parts = self.benchmark.weight_bytes
        total = sum(parts.values())
        rows = [(name, f"{n / 1e6:.2f}", f"{100 * n / total:.1f}") for name, n in parts.items()]
        rows.append(("all weights", f"{total / 1e6:.2f}", "100.0"))
        states = {m.case: m.state_bytes for m in self.measurements if m.case.kind == "tg"}
        rows += [
            (f"state in {case.name}", f"{n / 1e6:.2f}", f"{100 * n / total:.1f}")
            for case, n in states.items()
        ]
        header = ("read for each generated token", "MB", "% of weights")
        yield from _table(header, rows, frozenset({1, 2}))

    def _memory_table(self) -> "Iterator[str]":
        names = dict.fromkeys(name for m in self.measurements for name in m.memory.parts)
        header = ("memory after", *names, "together", "peak RSS")
        rows = [
            (
                measurement.case.name,
                *(format_bytes(measurement.memory.parts.get(name, 0)) for name in names),
                format_bytes(measurement.memory.total),
                format_bytes(measurement.memory.peak),
            )
            for measurement in self.measurements
        ]
        yield from _table(header, rows, frozenset(range(1, len(header))))


def write(report: Report, output: str) -> None:
    """Write a report to stdout; `output` is md, csv or json."""
    if output == "json":
        print(terminal.escape_json(report.json()))
        return
    text = report.csv() if output == "csv" else report.markdown()
    if text:
        print(terminal.sanitize(text))
    sys.stdout.flush()


def _peer_cells(measurement: Measurement, result: PeerResult) -> tuple[str, ...]:
    own, theirs = measurement.own, result.series
    return (
        measurement.case.name,
        f"{own.median:.2f}",
        _clean_text(own),
        "failed" if theirs is None else f"{theirs.median:.2f}",
        "" if theirs is None else _clean_text(theirs),
        _times(measurement.ratio),
        _times(measurement.clean_ratio),
        "" if result.agreement is None else f"{result.agreement:.4f}",
        "" if result.peak_bytes is None else format_bytes(result.peak_bytes),
    )


def _clean_text(series: Series) -> str:
    return f"{series.clean}/{len(series.samples)}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def _table(
    header: Sequence[str], rows: Sequence[Sequence[str]], numbers: frozenset[int]
) -> list[str]:
    """Return the lines of a Markdown table that is also readable as it is."""
    cells = [[_cell(text) for text in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        padded = (
            text.rjust(width) if column in numbers else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append(f"| {' | '.join(padded)} |")
    marks = (
        "-" * (width + 1) + ":" if column in numbers else "-" * (width + 2)
        for column, width in enumerate(widths)
    )
    return [lines[0], f"|{'|'.join(marks)}|", *lines[1:]]


GPU_HEADER = (
    *("test", "GPU, MB/token", "memory", "disk", "experts on the GPU", "in memory", "on disk"),
    *("bound t/s", "% of bound", "limited by"),
)


def gpu_lines(measurements: Sequence[Measurement]) -> list[str]:
    """Return the GPU's roof, and for generated tokens the bound of the tiers; nothing without."""
    found = [(m, m.gpu) for m in measurements if m.gpu is not None]
    if not found:
        return []
    copies = [gpu.copy_bytes_s / 1e9 for _, gpu in found]
    stats = found[-1][1].stats
    text = (
        f"{stats.name}: copies {min(copies):.0f} to {max(copies):.0f} GB/s; "
        f"{format_bytes(stats.used_bytes)} of {format_bytes(stats.total_bytes)} taken, "
        f"{stats.layers} of {stats.all_layers} layers"
    )
    rows = []
    for measurement, gpu in found:
        nbytes, bound = gpu.token_bytes, gpu.bound(measurement.read_roof)
        if nbytes is None or bound is None:
            continue
        seconds = sum(sample.seconds for sample in measurement.own.samples)
        rows.append(
            (
                measurement.case.name,
                *(f"{part / 1e6:.2f}" for part in (nbytes.gpu, nbytes.memory, nbytes.disk)),
                *(f"{100 * share:.1f} %" for share in gpu.stats.tiers.shares().values()),
                f"{bound:.2f}",
                _percent(measurement.bound_share),
                gpu.stats.bound(seconds),
            )
        )
    table = _table(GPU_HEADER, rows, frozenset(range(1, len(GPU_HEADER) - 1))) if rows else []
    return [text, *([""] if table else []), *table]


def _cell(text: str) -> str:
    return terminal.sanitize_line(text).replace("|", "\\|")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _count_text(count: int) -> str:
    """Write a number of parameters as llama-bench does."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
