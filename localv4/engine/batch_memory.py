"""How many rows a batch runs at a time, and the memory that is kept for them.

Every row has a decoder state. Its memory is taken from what the plan would give to experts, within
limits: more rows share each reading of the dense weights, but experts that are paged out are read
from the disk by all of them.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from localv4.engine.batching import EXPECTED_TOKENS
from localv4.engine.memory import MemoryOptions, plan_memory, with_rows
from localv4.kernels.row_operations import F32
from localv4.kernels.threads import default_threads
from localv4.model.fast import FastTransformer
from localv4.model.state import SLACK_TOKENS
from localv4.planning.gpu_plan import GpuPlan
from localv4.planning.header_facts import facts_of_checkpoint
from localv4.planning.memory import read_memory
from localv4.planning.model_facts import ModelFacts, held_state_bytes
from localv4.planning.plan import Plan
from localv4.storage import open_checkpoint

ROWS_PER_THREAD, LEAST_ROWS = 4, 16
"""Fewer rows leave threads waiting for memory; more only make each answer take longer."""

STATE_SHARE = 0.25
"""The most of the usable memory that goes to rows unasked, where experts want it too."""


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """`rows` at a time, whose states get `room` bytes; `memory` keeps that much from experts.

    A row is expected to take `row_bytes` where nothing bounds its rows, as on a GPU.
    """

    rows: int
    room: int
    memory: MemoryOptions
    row_bytes: int

    def within(self, gpu: GpuPlan | None) -> "BatchPlan":
        """Return the plan with no more states than a GPU has room for, if one has them."""
        if gpu is None:
            return self
        room = gpu.state * gpu.all_layers // gpu.layers  # the host has the states of its layers
        if room >= self.room:
            return self
        return replace(self, rows=max(1, min(self.rows, room // self.row_bytes)), room=room)


def plan_batch(
    path: Path,
    options: MemoryOptions,
    *,
    parallel: int | None,
    rows: int,
    ctx_size: int | None,
    threads: int | None,
    exact: bool,
) -> BatchPlan:
    """Share out memory for the model at `path` and `rows` rows in all, `parallel` at a time.

    Raises DoesNotFitError when not even one row fits.
    """
    with open_checkpoint(path) as checkpoint:
        facts = facts_of_checkpoint(checkpoint.path.name, "", checkpoint)
    facts = replace(facts, rows=F32) if exact else with_rows(facts, options)
    threads = threads or default_threads()
    wanted = parallel or max(LEAST_ROWS, ROWS_PER_THREAD * threads)
    wanted = max(1, min(wanted, rows, FastTransformer.most_rows))
    tokens = min(ctx_size or facts.config.max_positions, 2 * EXPECTED_TOKENS)
    held = partial(_held, facts, tokens)
    if exact:
        room, kept = int(STATE_SHARE * read_memory().available), options
    else:
        plan = plan_memory(facts, options, ctx_size, threads)
        extra = _beyond_one_row(plan, held(wanted), is_asked=parallel is not None)
        room, kept = plan.fixed["decoder state"] + extra, _without(options, plan, extra)
    fitting = next((n for n in range(wanted, 1, -1) if held(n) <= room), 1)
    row_bytes = held_state_bytes(facts.config, tokens, facts.rows, SLACK_TOKENS)
    # those that were asked for join one after the other, as there is room
    return BatchPlan(wanted if parallel else fitting, room, kept, row_bytes)


def _beyond_one_row(plan: Plan, wanted: int, *, is_asked: bool) -> int:
    """Return the bytes for states beside that in the plan, where all of them want `wanted`."""
    own = plan.fixed["decoder state"]
    most = plan.usable - sum(plan.fixed.values()) - plan.floor
    left_over = plan.usable - plan.total  # what neither the model nor one row takes
    unasked = max(left_over, int(STATE_SHARE * plan.usable) - own)
    return max(0, min(wanted - own, most, most if is_asked else unasked))


def _without(options: MemoryOptions, plan: Plan, kept: int) -> MemoryOptions:
    """Return the options that keep so many bytes from the model."""
    if options.ram is not None:
        return replace(options, ram=options.ram - kept)
    return replace(options, reserve=plan.reserve + kept)


def _held(facts: ModelFacts, tokens: int, rows: int) -> int:
    """Return the memory of so many rows of `tokens` each, whose compressed rows share a bound."""
    return held_state_bytes(
        *(facts.config, rows * tokens, facts.rows, SLACK_TOKENS),
        limits=facts.limits,
        sequences=rows,
    )
