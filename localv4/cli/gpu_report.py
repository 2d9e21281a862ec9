"""A GPU in plans and forecasts, for people and for programs: rows of text, and JSON values."""

from dataclasses import asdict
from typing import Any

from localv4.cli.generation import format_bytes
from localv4.planning.forecast import PROMPT_TOKENS, Forecast
from localv4.planning.gpu_forecast import GpuForecast
from localv4.planning.gpu_plan import GpuPlan
from localv4.planning.machine import GpuFacts

Rows = list[tuple[str, str]]

BOTTLENECKS = {
    "GPU": "GPU memory bandwidth",
    "host": "the host, which computes what the GPU lacks",
    "PCIe": "PCIe",
    "disk": "the disk",
}

PROMPT_BOTTLENECKS = {
    "GPU": "products on the GPU",
    "host": "layers of the host",
    "PCIe": "experts on their way over PCIe",
    "disk": "the disk",
}

COMPONENT_NAMES = {"head": "output matrix", "decoder state": "context"}


def gpu_text(card: GpuFacts) -> str:
    """Write a GPU: its memory, and what it does in a second."""
    speed = card.speed
    return (
        f"{card.name}: {format_bytes(card.total)}, {format_bytes(card.free)} free; "
        f"copies {speed.copy_bytes_s / 1e9:,.0f} GB/s, PCIe {speed.upload_bytes_s / 1e9:.1f} GB/s, "
        f"products {speed.product_ops_s / 1e12:.0f} Tops/s"
    )


def gpu_speed_rows(found: GpuForecast, alone: Forecast) -> Rows:
    """Return the predicted speed with a GPU: its terms, the tiers of experts, what bounds it."""
    from localv4.cli.plan_report import bounds_text, rate_text

    shares = " | ".join(
        f"{100 * share:.0f} % {where}"
        for share, where in (
            (found.tiers.gpu, "on the GPU"),
            (found.tiers.memory, "in memory"),
            (found.tiers.disk, "on disk"),
        )
    )
    rows = [
        ("decode", f"{bounds_text(found.decode)} tokens/s"),
        ("", f"GPU {_part(found.token_bytes.gpu, found.gpu_s)}"),
        ("", f"host {_part(found.token_bytes.memory, found.host_s)}, at the same time"),
        ("", f"{rate_text(found.roofline)} tokens/s at full bandwidth of both memories"),
        ("prompt", f"{bounds_text(found.prefill)} tokens/s, for {PROMPT_TOKENS:,} tokens"),
        ("without the GPU", f"{bounds_text(alone.decode)} tokens/s"),
        ("chosen experts", f"{shares} ({found.routing})"),
        ("limited by", BOTTLENECKS[found.bottleneck]),
        ("prompts by", PROMPT_BOTTLENECKS[found.prompt_bottleneck]),
    ]
    if found.token_bytes.disk:
        rows.insert(3, ("", f"disk {_part(found.token_bytes.disk, found.disk_s)}"))
    if found.correction != 1.0:
        rows.append(("corrected", f"by {found.correction:.2f}, from earlier runs"))
    return rows


def _part(nbytes: float, seconds: float) -> str:
    return f"{nbytes / 1e9:.2f} GB in {1e3 * seconds:.1f} ms"


def gpu_memory_rows(plan: GpuPlan) -> Rows:
    """Return the memory of a GPU by component."""
    rows = []
    for name, nbytes in plan.components().items():
        text = format_bytes(nbytes)
        if name == "experts" and not plan.fits:
            text += f"  {100 * plan.resident_share:.0f} % of {format_bytes(plan.all_experts)}"
        rows.append((COMPONENT_NAMES.get(name, name), text))
    is_all = plan.layers == plan.all_layers
    layers = "all layers" if is_all else f"{plan.layers} of {plan.all_layers} layers"
    rows.append(("together", f"{format_bytes(plan.total)}  of {format_bytes(plan.budget)} usable"))
    rows.append(("computes", layers))
    return rows


def gpu_document(card: GpuFacts) -> dict[str, Any]:
    """Return a GPU as JSON values."""
    memory = {"total_bytes": card.total, "free_bytes": card.free}
    return {"name": card.name, **memory, **asdict(card.speed)}


def gpu_plan_document(plan: GpuPlan) -> dict[str, Any]:
    """Return the memory of a GPU as JSON values."""
    return {
        "name": plan.name,
        "usable_bytes": plan.budget,
        "total_bytes": plan.total,
        "layers": plan.layers,
        "all_layers": plan.all_layers,
        "resident_share": plan.resident_share,
        "fits": plan.fits,
        "bytes": plan.components(),
    }


def gpu_forecast_document(found: GpuForecast) -> dict[str, Any]:
    """Return a forecast with a GPU as JSON values: seconds, bytes, tokens per second."""
    return {
        "decode_tok_s": asdict(found.decode),
        "prefill_tok_s": asdict(found.prefill),
        "experts_by_tier": asdict(found.tiers),
        "bottleneck": found.bottleneck,
        "prompt_bottleneck": found.prompt_bottleneck,
        "roofline_tok_s": found.roofline,
        "bytes_by_tier": asdict(found.token_bytes),
        "seconds": {"gpu": found.gpu_s, "host": found.host_s, "disk": found.disk_s},
        "uploaded_bytes": found.uploaded_bytes,
        "routing": found.routing,
        "correction": found.correction,
    }
