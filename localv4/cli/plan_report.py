"""Plans and forecasts for people and for programs: rows of text, and JSON values."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from localv4.cli.generation import BOUNDS, format_bytes
from localv4.cli.gpu_report import (
    COMPONENT_NAMES,
    gpu_document,
    gpu_forecast_document,
    gpu_plan_document,
    gpu_speed_rows,
    gpu_text,
)
from localv4.planning.assessment import Assessment, Change
from localv4.planning.forecast import PROMPT_TOKENS, Forecast
from localv4.planning.gpu_forecast import GpuForecast
from localv4.planning.history import Run
from localv4.planning.hit_rate import Bounds
from localv4.planning.machine import Machine
from localv4.planning.plan import Plan
from localv4.planning.recipes import load_recipes

Rows = list[tuple[str, str]]

SHOWN_RUNS = 3
HOUR_S, MINUTE_S = 3600, 60

BOTTLENECKS = {
    "memory": "memory bandwidth",
    "compute": "the processor's cores",
    "disk": "the disk",
}


def bottleneck_of(forecast: Forecast | GpuForecast) -> str:
    """Name what bounds decoding, in a word or two."""
    if isinstance(forecast, GpuForecast):
        return BOUNDS[forecast.bottleneck]
    return BOTTLENECKS[forecast.bottleneck]


COLOURS = {"fits": "green", "pages": "yellow", "does not fit": "red"}


def headline(one: Assessment) -> str:
    """Say in a line whether a model fits."""
    if one.plan is None:
        return "does not fit"
    if one.plan.fits:
        return f"fits: everything stays in memory ({format_bytes(one.plan.total)})"
    return f"pages {format_bytes(one.plan.paged_bytes)} of its experts from the disk"


def speed_rows(one: Assessment) -> Rows:
    """Return the predicted speed, with its formula and what bounds it."""
    forecast, plan = one.forecast, one.plan
    if forecast is None or plan is None:
        return [("decode", "unknown: the machine was not measured")]
    if one.gpu_forecast is not None:
        return gpu_speed_rows(one.gpu_forecast, forecast)
    rows = [
        ("decode", f"{bounds_text(forecast.decode)} tokens/s"),
        *(("", line) for line in formula(forecast)),
        ("prompt", f"{bounds_text(forecast.prefill)} tokens/s, for {PROMPT_TOKENS:,} tokens"),
    ]
    if not plan.fits:
        missed = format_bytes(int(forecast.missed_bytes))
        hits = f"{100 * forecast.hit_rate.low:.0f} to {100 * forecast.hit_rate.high:.0f} %"
        rows.append(("experts in memory", f"{hits} of those chosen ({forecast.routing})"))
        rows.append(("read from disk", f"{missed} for each token"))
    rows.append(("limited by", BOTTLENECKS[forecast.bottleneck]))
    if forecast.correction != 1.0:
        rows.append(("corrected", f"by {forecast.correction:.2f}, from earlier runs"))
    return rows


def formula(forecast: Forecast) -> list[str]:
    """Write the terms of a likely token, a line for memory and one for the disk."""
    busy_ms = 1e3 * max(forecast.memory_s, forecast.compute_s)
    roof = f"{forecast.roofline:.1f} tokens/s at full bandwidth x {forecast.decode_share:.2f}"
    lines = [f"{forecast.token_bytes / 1e9:.2f} GB read in {busy_ms:.0f} ms ({roof})"]
    if forecast.disk_s > 0:
        missed, disk_ms = forecast.missed_bytes / 1e9, 1e3 * forecast.disk_s
        lines.append(f"{missed:.2f} GB from disk in {disk_ms:.0f} ms, partly at the same time")
    return lines


def memory_rows(plan: Plan) -> list[tuple[str, str, str]]:
    """Return the memory by component: name, size, remark."""
    rows = []
    for name, nbytes in plan.components().items():
        remark = ""
        if name == "decoder state":
            remark = f"for {plan.ctx_size:,} tokens; up to {plan.most_ctx:,} would fit"
        if name == "snapshots":
            remark = "to go back in the context"
        if name == "experts" and not plan.fits:
            remark = f"{100 * plan.resident_share:.0f} % of {format_bytes(plan.all_experts)}"
        rows.append((COMPONENT_NAMES.get(name, name), format_bytes(nbytes), remark))
    left = f"{format_bytes(plan.reserve)} are left to other programs"
    usable = f"of {format_bytes(plan.usable)} usable; {left}"
    return [*rows, ("together", format_bytes(plan.total), usable)]


def disk_rows(one: Assessment, rate: float, free: int | None) -> Rows:
    """Return what the model takes on disk and how long it takes to get; `rate` in bytes/s."""
    facts = one.facts
    is_made = facts.quant in load_recipes().by_name and facts.download_bytes != facts.file_bytes
    text = format_bytes(facts.file_bytes)
    rows = []
    if is_made and facts.download_bytes is not None:
        both = format_bytes(facts.file_bytes + facts.download_bytes)
        text += f"; {both} if the download is kept until it is converted"
    rows.append(("needed", text))
    if free is not None:
        rows.append(("free", format_bytes(free)))
    if facts.download_bytes is not None:
        seconds = facts.download_bytes / rate
        rows.append(
            (
                "download",
                f"{format_bytes(facts.download_bytes)}, {duration(seconds)} at "
                f"{rate * 8 / 1e6:,.0f} Mbit/s",
            )
        )
    return rows


def change_rows(changes: Sequence[Change], chosen: Assessment) -> Rows:
    """Return what would make decoding faster."""
    rows = []
    for change in changes:
        text = f"{rate_text(change.tok_s)} tokens/s"
        if change.fits and chosen.verdict != "fits":
            text += ", everything in memory"
        rows.append((change.what, text))
    return rows


def run_rows(runs: Sequence[Run]) -> Rows:
    """Return the last runs: predicted against achieved."""
    return [
        (
            run.at.date().isoformat(),
            f"predicted {run.predicted:.2f}, achieved {run.achieved:.2f} tokens/s "
            f"({100 * run.error:+.0f} %)" + (" with the GPU" if run.gpu is not None else ""),
        )
        for run in runs[-SHOWN_RUNS:]
    ]


def machine_rows(machine: Machine) -> Rows:
    """Return the machine; what was assumed is marked."""
    memory = machine.memory
    total = f"{format_bytes(memory.total)}, {format_bytes(memory.available)} available"
    if memory.limit is not None:
        total += f", limited to {format_bytes(memory.limit)}"
    rows = []
    if machine.cpu and "cores" not in machine.assumed:
        rows.append(("processor", f"{machine.cpu} ({machine.isa})"))
    rows.append(("cores", _marked(str(machine.cores), "cores", machine)))
    rows.append(("memory", _marked(total, "ram", machine)))
    if machine.read_bytes_s is not None:
        text = f"{machine.read_bytes_s / 1e9:.1f} GB/s"
        by_threads = ", ".join(
            f"{n}: {rate / 1e9:.1f}" for n, rate in sorted(machine.read_by_threads.items())
        )
        text += f" (by threads: {by_threads})" if by_threads else ""
        rows.append(("memory bandwidth", _marked(text, "bandwidth", machine)))
    if machine.int8_ops_s is not None:
        rows.append(("int8 peak", f"{machine.int8_ops_s / 1e12:.2f} Tops/s"))
    if machine.kernels is not None:
        shares = machine.kernels
        rows.append(
            (
                "kernels",
                f"{100 * shares.decode:.0f} % of the bandwidth, "
                f"{100 * shares.prefill:.0f} % of the int8 peak, "
                f"{1e6 * shares.layer_s:.0f} µs for each layer",
            )
        )
    if machine.disk is not None:
        text = f"{machine.disk.bytes_s / 1e9:.2f} GB/s at random"
        rows.append(("disk", _marked(text, "disk", machine)))
    if machine.disk_free is not None:
        rows.append(("disk free", format_bytes(machine.disk_free)))
    if memory.swap_total:
        kind = ", compressed memory" if machine.swap_is_compressed else ""
        used = f"{format_bytes(memory.swap_used)} of {format_bytes(memory.swap_total)} used"
        rows.append(("swap", used + kind))
    rows += _graphics_rows(machine)
    if machine.measured_on is not None and "bandwidth" not in machine.assumed:
        rows.append(("measured", machine.measured_on))
    return rows


def _graphics_rows(machine: Machine) -> Rows:
    """Return the GPU that helps, and the cards that do not."""
    card = machine.gpu
    used = [] if card is None else [("GPU", _marked(gpu_text(card), "gpu", machine))]
    others = [name for name in machine.gpus if card is None or card.name not in name]
    return used + [("graphics", f"{name} (not used)") for name in others]


def _marked(text: str, name: str, machine: Machine) -> str:
    return f"{text} (assumed)" if name in machine.assumed else text


def bounds_text(bounds: Bounds) -> str:
    """Write a range: `4.4 to 6.6, likely 5.0`; one number where all are the same."""
    low, likely, high = (rate_text(value) for value in (bounds.low, bounds.likely, bounds.high))
    return likely if low == high else f"{low} to {high}, likely {likely}"


def range_text(bounds: Bounds) -> str:
    """Write the ends of a range: `4.4-6.6`."""
    low, high = rate_text(bounds.low), rate_text(bounds.high)
    return low if low == high else f"{low}-{high}"


def rate_text(value: float) -> str:
    """Write tokens per second with two or three digits."""
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}"


def duration(seconds: float) -> str:
    """Write a time in the unit that suits it."""
    if seconds < 2 * MINUTE_S:
        return f"{seconds:.0f} s"
    if seconds < 2 * HOUR_S:
        return f"{seconds / MINUTE_S:.0f} min"
    return f"{seconds / HOUR_S:.1f} h"


def assessment_document(one: Assessment) -> dict[str, Any]:
    """Return an assessment as JSON values: bytes, seconds, tokens per second, shares of 1."""
    facts, plan, forecast = one.facts, one.plan, one.forecast
    return {
        "name": facts.name,
        "quant": facts.quant,
        "verdict": one.verdict,
        "sizes_are_exact": facts.is_exact,
        "file_bytes": facts.file_bytes,
        "download_bytes": facts.download_bytes,
        "bytes_per_token": facts.weight_bytes_per_token,
        "context_bytes_per_token": facts.state_bytes_per_token,
        "plan": None if plan is None else _plan_document(plan),
        "forecast": None if forecast is None else _forecast_document(forecast),
        **({} if one.gpu is None else {"gpu_plan": gpu_plan_document(one.gpu)}),
        **(
            {}
            if one.gpu_forecast is None
            else {"gpu_forecast": gpu_forecast_document(one.gpu_forecast)}
        ),
        "refusal": None
        if one.refusal is None
        else {"message": one.refusal.message, "hint": one.refusal.hint},
    }


def _plan_document(plan: Plan) -> dict[str, Any]:
    return {
        "mode": plan.mode,
        "io": plan.io,
        "ctx_size": plan.ctx_size,
        "most_ctx_size": plan.most_ctx,
        "usable_bytes": plan.usable,
        "reserve_bytes": plan.reserve,
        "total_bytes": plan.total,
        "paged_bytes": plan.paged_bytes,
        "floor_bytes": plan.floor,
        "expert_budget_bytes": plan.expert_budget,
        "resident_share": plan.resident_share,
        "readers": plan.readers,
        "bytes": plan.components(),
    }


def _forecast_document(forecast: Forecast) -> dict[str, Any]:
    return {
        "decode_tok_s": asdict(forecast.decode),
        "prefill_tok_s": asdict(forecast.prefill),
        "hit_rate": asdict(forecast.hit_rate),
        "bottleneck": forecast.bottleneck,
        "roofline_tok_s": forecast.roofline,
        "read_bytes": forecast.token_bytes,
        "missed_bytes": forecast.missed_bytes,
        "memory_s": forecast.memory_s,
        "compute_s": forecast.compute_s,
        "disk_s": forecast.disk_s,
        "decode_share": forecast.decode_share,
        "routing": forecast.routing,
        "correction": forecast.correction,
    }


def machine_document(machine: Machine) -> dict[str, Any]:
    """Return a machine as JSON values; no names of host, user or folders."""
    memory, disk, kernels = machine.memory, machine.disk, machine.kernels
    return {
        "cpu": machine.cpu,
        "isa": machine.isa,
        "cores": machine.cores,
        "ram_bytes": memory.total,
        "available_bytes": memory.available,
        "limit_bytes": memory.limit,
        "swap_bytes": memory.swap_total,
        "swap_used_bytes": memory.swap_used,
        "swap_is_compressed": machine.swap_is_compressed,
        "read_bytes_s": machine.read_bytes_s,
        "read_bytes_s_by_threads": {str(n): rate for n, rate in machine.read_by_threads.items()},
        "int8_ops_s": machine.int8_ops_s,
        "kernel_shares": None
        if kernels is None
        else {"decode": kernels.decode, "prefill": kernels.prefill, "layer_s": kernels.layer_s},
        "disk": None
        if disk is None
        else {"random_read_bytes_s": disk.bytes_s, "cpu_s_per_gb": disk.cpu_s_per_gb},
        "disk_free_bytes": machine.disk_free,
        "gpus": list(machine.gpus),
        **({} if machine.gpu is None else {"gpu": gpu_document(machine.gpu)}),
        "measured_on": machine.measured_on,
        "assumed": sorted(machine.assumed),
    }
