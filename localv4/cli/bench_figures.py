"""The measurement of a test as plain numbers, for CSV and JSON."""

from dataclasses import asdict
from typing import Any

from localv4.engine.gpu_measurement import GpuResult
from localv4.engine.measurement import Measurement, PeerResult, Series


def figures(measurement: Measurement) -> dict[str, Any]:
    """Return the numbers of a test: bytes, operations and tokens per second, shares from 0 to 1."""
    case = measurement.case
    return {
        "test": case.name,
        "kind": case.kind,
        "tokens": case.tokens,
        "depth": case.depth,
        **_statistics(measurement.own),
        "read_bytes_s": measurement.read_bytes_s,
        "read_roof_share": measurement.read_share,
        "int8_peak_share": measurement.int8_share,
        "peak_rss_bytes": measurement.memory.peak,
        **({} if measurement.gpu is None else _gpu_figures(measurement, measurement.gpu)),
    }


def _gpu_figures(measurement: Measurement, gpu: GpuResult) -> dict[str, Any]:
    """Return the columns of runs with a GPU; what only generating has is empty for prompts."""
    nbytes, shares = gpu.token_bytes, gpu.stats.tiers.shares()
    seconds = sum(sample.seconds for sample in measurement.own.samples)
    return {
        "gpu": gpu.stats.name,
        "gpu_copy_bytes_s": gpu.copy_bytes_s,
        "gpu_used_bytes": gpu.stats.used_bytes,
        "gpu_layers": gpu.stats.layers,
        **{f"{tier}_token_bytes": getattr(nbytes, tier, None) for tier in shares},
        **{f"experts_{tier}_share": None if nbytes is None else n for tier, n in shares.items()},
        "uploaded_bytes": gpu.stats.uploaded_bytes,
        "bound_tok_s": gpu.bound(measurement.read_roof),
        "bound_share": measurement.bound_share,
        "bound_by": gpu.stats.bound(seconds),
    }


def _statistics(series: Series) -> dict[str, Any]:
    return {
        "mean_tok_s": series.mean,
        "stdev_tok_s": series.stdev,
        "median_tok_s": series.median,
        "clean_median_tok_s": series.clean_median,
        "repeats": len(series.samples),
        "clean_repeats": series.clean,
    }


def compared(measurement: Measurement, result: PeerResult) -> dict[str, Any]:
    """Return the columns of the comparison; empty where llama.cpp failed."""
    series = result.series
    names = ("mean_tok_s", "stdev_tok_s", "median_tok_s", "clean_median_tok_s", "repeats")
    found = dict.fromkeys((*names, "clean_repeats")) if series is None else _statistics(series)
    return {
        **{f"peer_{name}": value for name, value in found.items()},
        "ratio": measurement.ratio,
        "clean_ratio": measurement.clean_ratio,
        "logits_correlation": result.agreement,
        "peer_peak_rss_bytes": result.peak_bytes,
        "peer_problem": result.problem,
    }


def with_samples(measurement: Measurement) -> dict[str, Any]:
    """Return all that is known of a test, for a document."""
    return {
        **figures(measurement),
        "token_bytes": measurement.token_bytes,
        "state_bytes": measurement.state_bytes,
        "token_multiply_adds": measurement.token_macs,
        "memory_bytes": measurement.memory.parts,
        "roofs": [
            {"read_bytes_s": roof.read_bytes_s, "int8_ops_s": roof.int8_ops_s}
            for roof in measurement.roofs
        ],
        "samples": _samples(measurement.own),
        "peer": None if measurement.peer is None else _peer_test(measurement, measurement.peer),
    }


def _peer_test(measurement: Measurement, result: PeerResult) -> dict[str, Any]:
    series = result.series
    return {
        "problem": result.problem,
        **({} if series is None else _statistics(series)),
        "ratio": measurement.ratio,
        "clean_ratio": measurement.clean_ratio,
        "logits_correlation": result.agreement,
        "peak_rss_bytes": result.peak_bytes,
        "context": None if result.context is None else asdict(result.context),
        "samples": [] if series is None else _samples(series),
    }


def _samples(series: Series) -> list[dict[str, float]]:
    return [
        {"seconds": sample.seconds, "tok_s": rate, "foreign_cores": sample.foreign_cores}
        for sample, rate in zip(series.samples, series.rates, strict=True)
    ]
