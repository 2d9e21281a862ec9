"""How many rows a batch runs at a time, and the memory that is kept for them.

Every row has a decoder state. Its memory is taken from what the plan would give to experts, within
limits: more rows share each reading of the dense weights, but experts that are paged out are read
from the disk by all of them.
"""

from dataclasses import dataclass, replace
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
from localv4.planning.model_facts import held_state_bytes
from localv4.storage import open_checkpoint

ROWS_PER_THREAD, LEAST_ROWS = 4, 16
"""Fewer rows leave threads waiting for memory; more only make each answer take longer."""

STATE_SHARE = 0.25
"""The most of the usable memory that goes to rows unasked, where experts want it too."""


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """`rows` at a time, whose states get `room` bytes; `memory` keeps that much from experts.

    A row is expected to take `row_bytes`.
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
    config = facts.config
    threads = threads or default_threads()
    wanted = parallel or max(LEAST_ROWS, ROWS_PER_THREAD * threads)
    wanted = max(1, min(wanted, rows, FastTransformer.most_rows))
    tokens = min(ctx_size or config.max_positions, 2 * EXPECTED_TOKENS)
    if exact:
        row_bytes = held_state_bytes(config, tokens, F32, SLACK_TOKENS)
        room = int(STATE_SHARE * read_memory().available)
        return BatchPlan(_rows(wanted, room, row_bytes, parallel), room, options, row_bytes)
    facts = with_rows(facts, options)
    row_bytes = held_state_bytes(config, tokens, facts.rows, SLACK_TOKENS)
    plan = plan_memory(facts, options, ctx_size, threads)
    own = plan.fixed["decoder state"]
    beyond = plan.usable - plan.total  # what neither the model nor one row takes
    most = plan.usable - sum(plan.fixed.values()) - plan.floor
    unasked = max(beyond, int(STATE_SHARE * plan.usable) - own)
    extra = max(0, min(wanted * row_bytes - own, most, most if parallel else unasked))
    room = own + extra
    if options.ram is not None:
        kept = replace(options, ram=options.ram - extra)
    else:
        kept = replace(options, reserve=plan.reserve + extra)
    return BatchPlan(_rows(wanted, room, row_bytes, parallel), room, kept, row_bytes)


def _rows(wanted: int, room: int, row_bytes: int, parallel: int | None) -> int:
    """Return how many rows to run: those asked for (each waits for memory), or those that fit."""
    return wanted if parallel else max(1, min(wanted, room // row_bytes))
