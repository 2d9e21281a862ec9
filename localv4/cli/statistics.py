"""What `--stats` and `/stats` tell of an answer: speed, memory, paging, and the forecast."""

from typing import TYPE_CHECKING

from localv4.cli.generation import gpu_lines, paging_lines, stats_line

if TYPE_CHECKING:
    from localv4.cli.loading import Loaded
    from localv4.engine.expectation import Comparison
    from localv4.engine.reply import Reply


def statistics_lines(loaded: "Loaded", reply: "Reply") -> list[str]:
    """Return all lines about a finished reply; what was achieved is kept for later forecasts."""
    return [
        stats_line(reply),
        *gpu_lines(reply),
        *paging_lines(reply),
        *_forecast_lines(loaded, reply),
    ]


def forecast_line(comparison: "Comparison") -> str:
    """Return what was predicted, and what came."""
    return (
        f"predicted {comparison.predicted:.1f} tok/s ({comparison.low:.1f} to "
        f"{comparison.high:.1f}), achieved {comparison.achieved:.1f}: {comparison.error:+.0%}"
    )


def _forecast_lines(loaded: "Loaded", reply: "Reply") -> list[str]:
    from localv4.engine.expectation import LEAST_TOKENS, compare, expect

    engine, stats = loaded.engine, reply.stats
    if stats.gpu is not None and stats.gpu.warning is not None:
        return []  # the CPU went on alone: neither of two forecasts holds
    if engine.facts is None or engine.plan is None or stats.generated_tokens < LEAST_TOKENS:
        return []
    name, gpu = loaded.model.name, engine.gpu_plan
    forecast = expect(name, engine.facts, engine.plan, loaded.model.path, stats.prompt_tokens, gpu)
    if forecast is None:
        return ["no forecast: localv4 doctor measures this machine"]
    comparison = compare(name, engine.plan, forecast, stats, gpu)
    return [forecast_line(comparison)] if comparison is not None else []
