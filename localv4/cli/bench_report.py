"""What a benchmark found, written as Markdown, CSV or JSON."""

import csv
import io
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from localv4.cli import terminal
from localv4.cli.generation import format_bytes, peak_memory_bytes
from localv4.engine.benchmark import Benchmark, Case, Measurement
from localv4.engine.machine import ROOF_BYTES, machine_facts

if TYPE_CHECKING:
    from collections.abc import Iterator

SCHEMA = 1

HEADER = (
    *("model", "size", "params", "numerics", "threads", "test", "t/s", "median", "clean"),
    *("GB/s", "% of roof", "% of int8 peak", "peak RSS"),
)
NUMBERS = frozenset(range(1, len(HEADER))) - {3, 5}  # columns that are set to the right


class Report:
    """The finished measurements of one run, and what a reader must know beside them.

    `peak_bytes` is the process's peak before the probe's buffer was made.
    """

    def __init__(
        self, model: str, benchmark: Benchmark, skipped: Sequence[Case], peak_bytes: int
    ) -> None:
        self.model = model
        self.benchmark = benchmark
        self.skipped = skipped
        self.measurements: list[tuple[Measurement, int]] = []  # each with the peak after it
        self.is_complete = False
        self._peak_bytes = peak_bytes

    def add(self, measurement: Measurement) -> None:
        """Take in a finished measurement."""
        # the probe holds its buffer from the first test to the last: it is part of the new peak
        peak = max(self._peak_bytes, peak_memory_bytes() - ROOF_BYTES)
        self.measurements.append((measurement, peak))

    def markdown(self) -> str:
        """Return a table of the results, and one of the bytes that a token reads."""
        if not self.measurements:
            return ""
        lines = [*_table(HEADER, [self._cells(*row) for row in self.measurements], NUMBERS), ""]
        roofs = [roof for measurement, _ in self.measurements for roof in measurement.roofs]
        reads = [roof.read_bytes_s / 1e9 for roof in roofs]
        peaks = [roof.int8_ops_s / 1e12 for roof in roofs]
        lines.append(
            f"Roofs with {self.benchmark.threads} threads: read {min(reads):.1f} to "
            f"{max(reads):.1f} GB/s, int8 {min(peaks):.2f} to {max(peaks):.2f} Tops/s"
        )
        lines += ["", *self._traffic_table()]
        return "\n".join(lines)

    def csv(self) -> str:
        """Return a line per test; sizes in bytes, rates per second, shares from 0 to 1."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        rows = [self._flat(measurement, peak) for measurement, peak in self.measurements]
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
                "layers": self.benchmark.engine.config.n_layers,
            },
            "numerics": self.benchmark.numerics,
            "threads": self.benchmark.threads,
            "roof_buffer_bytes": ROOF_BYTES,
            "bytes_per_token": self.benchmark.weight_bytes,
            "skipped": [case.name for case in self.skipped],
            "tests": [self._document(*row) for row in self.measurements],
        }
        return json.dumps(document, ensure_ascii=False, indent=2)

    def _cells(self, measurement: Measurement, peak: int) -> tuple[str, ...]:
        rate = measurement.read_bytes_s
        return (
            self.model,
            format_bytes(self.benchmark.model_bytes),
            _count_text(self.benchmark.parameters),
            self.benchmark.numerics,
            str(self.benchmark.threads),
            measurement.case.name,
            f"{measurement.mean:.2f} ± {measurement.stdev:.2f}",
            f"{measurement.median:.2f}",
            f"{measurement.clean}/{len(measurement.samples)}",
            "" if rate is None else f"{rate / 1e9:.2f}",
            _percent(measurement.read_share),
            _percent(measurement.int8_share),
            format_bytes(peak),
        )

    def _flat(self, measurement: Measurement, peak: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "size_bytes": self.benchmark.model_bytes,
            "params": self.benchmark.parameters,
            "numerics": self.benchmark.numerics,
            "threads": self.benchmark.threads,
            **_figures(measurement, peak),
        }

    def _document(self, measurement: Measurement, peak: int) -> dict[str, Any]:
        samples = zip(measurement.samples, measurement.rates, strict=True)
        return {
            **_figures(measurement, peak),
            "token_bytes": measurement.token_bytes,
            "state_bytes": measurement.state_bytes,
            "token_multiply_adds": measurement.token_macs,
            "roofs": [
                {"read_bytes_s": roof.read_bytes_s, "int8_ops_s": roof.int8_ops_s}
                for roof in measurement.roofs
            ],
            "samples": [
                {"seconds": sample.seconds, "tok_s": rate, "foreign_cores": sample.foreign_cores}
                for sample, rate in samples
            ],
        }

    def _traffic_table(self) -> "Iterator[str]":
        parts = self.benchmark.weight_bytes
        total = sum(parts.values())
        rows = [(name, f"{n / 1e6:.2f}", f"{100 * n / total:.1f}") for name, n in parts.items()]
        rows.append(("all weights", f"{total / 1e6:.2f}", "100.0"))
        states = {m.case: m.state_bytes for m, _ in self.measurements if m.case.kind == "tg"}
        rows += [
            (f"state in {case.name}", f"{n / 1e6:.2f}", f"{100 * n / total:.1f}")
            for case, n in states.items()
        ]
        header = ("read for each generated token", "MB", "% of weights")
        yield from _table(header, rows, frozenset({1, 2}))


def write(report: Report, output: str) -> None:
    """Write a report to stdout; `output` is md, csv or json."""
    if output == "json":
        print(terminal.escape_json(report.json()))
        return
    text = report.csv() if output == "csv" else report.markdown()
    if text:
        print(terminal.sanitize(text))
    sys.stdout.flush()


def _figures(measurement: Measurement, peak: int) -> dict[str, Any]:
    """Return the numbers of a test in base units."""
    case = measurement.case
    return {
        "test": case.name,
        "kind": case.kind,
        "tokens": case.tokens,
        "depth": case.depth,
        "mean_tok_s": measurement.mean,
        "stdev_tok_s": measurement.stdev,
        "median_tok_s": measurement.median,
        "repeats": len(measurement.samples),
        "clean_repeats": measurement.clean,
        "read_bytes_s": measurement.read_bytes_s,
        "read_roof_share": measurement.read_share,
        "int8_peak_share": measurement.int8_share,
        "peak_rss_bytes": peak,
    }


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


def _cell(text: str) -> str:
    return terminal.sanitize_line(text).replace("|", "\\|")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _count_text(count: int) -> str:
    """Write a number of parameters as llama-bench does."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
