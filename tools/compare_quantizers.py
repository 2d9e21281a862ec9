#!/usr/bin/env python3
"""Compare the quantizers with those of llama.cpp: errors at equal bits, and speed, in one run.

Examples:
  compare_quantizers.py
  compare_quantizers.py MODEL_FOLDER --text TEXT --llama-python ENVIRONMENT/bin/python

The tensors are those of the model (default: the built-in one) and random ones. Both sides get the
same importance of columns, or none; errors are weighted with it. The importance is measured on one
half of a text; the error of outputs, which decides between methods for few bits, on the other.
Speeds are those of one thread, by its processor time, so that others may work beside it. Exits with
1 unless every ratio to llama.cpp's error is at most 1, 4 bits are searched at least as fast as its
Q4_K, and FP4 is repacked at 0.5 GB of source a second.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ggml_quantizers
import second_moments
from ggml_quantizers import GgmlQuantizers, decoded

from localv4.kernels.packed import GROUP_ROWS, MX4, packed_bytes
from localv4.kernels.packing import pack_fp4
from quant.quantizers import prepare_feedback, quantize_rows

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

EMBEDDED = Path(__file__).resolve().parents[1] / "localv4" / "embedded" / "tiny-v4"
TEXT = EMBEDDED.parent / "heldout.txt"
TYPES = (
    *("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "IQ4_XS", "MXFP4", "Q3_K", "Q2_K"),
    "IQ2_XXS",
)
FEW_BITS = ("Q4_K", "Q3_K", "Q2_K", "IQ2_XXS")
SLOW, SLOW_ROWS = "IQ2_XXS", 32
"""What takes llama.cpp minutes is compared in a part of each tensor."""

ROWS, COLS = 256, 2048
MOST_MATRICES = 48
REPEATS = 3
LEAST_REPACK = 0.5
"""GB per second."""


@dataclass(frozen=True)
class Sample:
    """A matrix, how much its columns count, and the second moments of two halves of a text.

    The first half has `tokens`.
    """

    kind: str
    values: Floats
    importance: Floats
    learnt: Doubles | None = None
    judged: Doubles | None = None
    tokens: int = 0


def main() -> int:
    """Print all tables; return 1 unless the promises of the description hold."""
    options = _parser().parse_args()
    try:
        ggml = GgmlQuantizers(options.llama_python)
    except FileNotFoundError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    text = options.text.read_text(encoding="utf-8")
    real = list(_matrices(options.model, text, options.tokens))
    samples = [*real, *_random_matrices()]
    worst = _print_errors(samples, ggml)
    _print_outputs(real, ggml)
    slowest = _print_speeds(ggml)
    repack = _print_repack()
    _say(f"\nlargest ratio of errors {worst:.4f}, smallest ratio of 4-bit speeds {slowest:.2f}")
    return int(worst > 1 or slowest < 1 or repack < LEAST_REPACK)


def _parser() -> argparse.ArgumentParser:
    summary, _, description = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary,
        epilog=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, nargs="?", default=EMBEDDED, help="a model folder")
    parser.add_argument("--text", type=Path, default=TEXT, help="what the model reads")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text (default: 8192)")
    parser.add_argument(
        "--llama-python",
        default=ggml_quantizers.this_python(),
        help="Python of the environment in which llama-cpp-python is (default: this one)",
    )
    return parser


def _matrices(path: Path, text: str, tokens: int) -> Iterator[Sample]:
    """Yield matrices of the model that have whole superblocks, evenly chosen."""
    met = [m for m in second_moments.record(path, text, tokens) if m.matrix.cols % 256 == 0]
    # fewer activations than columns say nothing about them
    met = [m for m in met if min(part.tokens for part in m.parts) > 2 * m.matrix.cols]
    for item in met[:: max(1, len(met) // MOST_MATRICES)]:
        learnt, judged = (part.mean() for part in item.parts)
        importance = np.diag(learnt).astype(np.float32)
        tokens = item.parts[0].tokens
        yield Sample("model", item.values()[:1024], importance, learnt, judged, tokens)


def _random_matrices() -> Iterator[Sample]:
    """Yield Gaussian and heavy-tailed weights, and those of FP4 and of FP8."""
    rng = np.random.default_rng(0)
    importance = np.exp(rng.standard_normal(COLS)).astype(np.float32)
    shape = (ROWS, COLS)
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    powers = np.repeat(2.0 ** rng.integers(-8, -4, (ROWS, COLS // 32)), 32, axis=1)
    fp4 = rng.choice(levels, shape) * rng.choice([-1, 1], shape) * powers
    normal = rng.standard_normal(shape)
    exponents = np.floor(np.log2(np.maximum(np.abs(normal), 2.0**-6)))
    fp8 = np.round(normal / 2 ** (exponents - 3)) * 2 ** (exponents - 3)
    for kind, values in (
        ("Gaussian", rng.standard_normal(shape) * 0.03),
        ("heavy tails", rng.standard_t(4, shape) * 0.03),
        ("FP4", fp4),
        ("FP8", fp8 / 64),
    ):
        yield Sample(kind, values.astype(np.float32), importance)


def _print_errors(samples: list[Sample], ggml: GgmlQuantizers) -> float:
    """Print ratios of weighted RMS errors by type and kind of tensor; return the largest."""
    kinds = list(dict.fromkeys(sample.kind for sample in samples))
    _say("Weighted RMS error as a multiple of llama.cpp's: without importance / with importance")
    _row("type", *kinds)
    worst = 0.0
    for name in TYPES:
        cells = []
        for kind in kinds:
            own = [sample for sample in samples if sample.kind == kind]
            ratios = [_ratio(own, name, ggml, weighted) for weighted in (False, True)]
            worst = max(worst, *ratios)
            cells.append(" / ".join(f"{ratio:.3f}" for ratio in ratios))
        _row(name, *cells)
    return worst


def _ratio(samples: list[Sample], name: str, ggml: GgmlQuantizers, weighted: bool) -> float:
    """Return the ratio of RMS errors over some tensors, each counted by its own energy."""
    ours = theirs = 0.0
    for sample in samples:
        importance = sample.importance if weighted else None
        weights = sample.importance if weighted else np.ones(sample.values.shape[1], np.float32)
        values = sample.values[:SLOW_ROWS] if name == SLOW else sample.values
        blocks = quantize_rows(values, name, importance).blocks
        # without any importance llama.cpp refuses this type
        peer = ggml(values, name, weights if name == SLOW else importance)
        energy = _weighted(values, weights)
        ours += _weighted(values - decoded(blocks, name), weights) / energy
        theirs += _weighted(values - decoded(peer, name), weights) / energy
    return math.sqrt(ours / theirs) if theirs else float(ours > 0)


def _weighted(values: Floats, weights: Floats) -> float:
    return float((values.astype(np.float64) ** 2 * weights).sum())


def _print_outputs(samples: list[Sample], ggml: GgmlQuantizers) -> None:
    """Print the error of outputs on the other half of the text by method."""
    _say("\nError of outputs |(W - Q) x| / |W x| on text that no method has seen, geometric mean")
    _row("type", "llama.cpp", "round", "search", "+ importance", "feedback")
    errors: dict[str, list[list[float]]] = {name: [] for name in FEW_BITS}
    for sample in samples:
        assert sample.learnt is not None
        values, importance = sample.values, sample.importance
        hessian = prepare_feedback(sample.learnt, sample.tokens)
        for name in FEW_BITS:
            options: list[dict[str, Any]] = [
                {"method": "round"},
                {},
                {"importance": importance},
                {"method": "feedback", "hessian": hessian},
            ]
            if name == SLOW:
                values = sample.values[:SLOW_ROWS]
            rounded = [ggml(values, name, importance)]
            rounded += [quantize_rows(values, name, **option).blocks for option in options]
            errors[name].append([_output_error(sample, decoded(b, name)) for b in rounded])
    for name, rows in errors.items():
        means = np.exp(np.log(rows).mean(0))
        _row(name, *(f"{mean:.4f}" for mean in means))


def _output_error(sample: Sample, rounded: Floats) -> float:
    """Return the relative RMS error of the products with the activations to judge by."""
    assert sample.judged is not None
    size = sample.values[: len(rounded)].astype(np.float64)
    rest = size - rounded
    error, energy = (((m @ sample.judged) * m).sum() for m in (rest, size))
    return math.sqrt(error / energy)


def _print_speeds(ggml: GgmlQuantizers) -> float:
    """Print speeds on one core; return the least ratio of our 4-bit searches to their Q4_K."""
    rng = np.random.default_rng(1)
    values = (rng.standard_normal((ROWS, 4 * COLS)) * 0.03).astype(np.float32)
    importance = np.exp(rng.standard_normal(4 * COLS)).astype(np.float32)
    _say("\nMillion weights per second on one core: without importance / with importance")
    _row("type", "llama.cpp", "search", "ratio")
    slowest = math.inf
    for name in TYPES:
        part = values[:SLOW_ROWS] if name == SLOW else values
        given = (importance if name == SLOW else None, importance)
        peer = [_speed(partial(ggml, part, name, w), part.size) for w in given]
        own = [_speed(partial(quantize_rows, part, name, w), part.size) for w in given]
        if name == "Q4_K":
            q4_k = peer
        ratios = [o / p for o, p in zip(own, peer, strict=True)]
        _row(name, *(" / ".join(f"{x:.1f}" for x in pair) for pair in (peer, own, ratios)))
        if name in ("Q4_K", "Q4_0", "IQ4_XS"):
            slowest = min(slowest, *(o / p for o, p in zip(own, q4_k, strict=True)))
    return slowest


def _print_repack() -> float:
    """Print and return the gigabytes of official FP4 that one core packs in a second."""
    rng = np.random.default_rng(2)
    data = rng.integers(0, 256, COLS * 4 * ROWS // 2, np.uint8)
    scales = rng.integers(100, 140, COLS * 4 * ROWS // 32, np.uint8)
    out = np.zeros(packed_bytes(MX4, ROWS, 4 * COLS), np.uint8)
    work = partial(pack_fp4, out, data, scales, 4 * COLS, 0, ROWS // GROUP_ROWS, 1)
    speed = _speed(work, data.nbytes + scales.nbytes) / 1e3
    _say(f"\nFP4 to MX4, bit by bit: {speed:.2f} GB of source per second on one core")
    return speed


def _speed(work: Callable[[], object], count: int) -> float:
    """Return millions per second of processor time, of the best of some runs."""
    best = math.inf
    for _ in range(REPEATS):
        start = time.thread_time()
        work()
        best = min(best, time.thread_time() - start)
    return count / best / 1e6


def _row(*cells: str) -> None:
    _say(cells[0].ljust(8) + "".join(cell.rjust(18) for cell in cells[1:]))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
