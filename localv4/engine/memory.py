"""How a model is brought into the memory of this machine: from wishes and a plan to a store."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from localv4.errors import DoesNotFitError, UsageError
from localv4.kernels.row_operations import FORMATS, RowFormat
from localv4.kernels.threads import default_threads
from localv4.model.config import ModelConfig
from localv4.paging.faults import Faults
from localv4.paging.options import IoChoice, PagingOptions, PolicyName
from localv4.paging.row_memory import KEYS_BYTES, RowMemory
from localv4.planning.memory import read_memory
from localv4.planning.model_facts import DEFAULT_ROWS, ModelFacts, RowLimits
from localv4.planning.plan import DEFAULT_CTX, Plan, make_plan
from localv4.storage import Checkpoint, PackedFolder

KvName = Literal["f32", "bf16", "compact"]


@dataclass(frozen=True, slots=True)
class MemoryOptions:
    """What a user may say about memory; everything has a default.

    `ram` bounds what the process takes, `reserve` is left to other programs (bytes); `io` says how
    experts get into memory. `policy`, `readers`, `prefetch` choose how to page; `kv` is the format
    of compressed rows in decoder states, `kv_dir` a folder for those that need not be in memory,
    `kv_ram` the most memory for rows (bytes); `faults` lets a test make reading go wrong.
    """

    ram: int | None = None
    reserve: int | None = None
    io: IoChoice = "auto"
    policy: PolicyName = "decay"
    readers: int | None = None
    prefetch: bool = True
    kv: KvName | None = None
    kv_dir: Path | None = None
    kv_ram: int | None = None
    faults: Faults | None = None


def check_ctx_size(tokens: int, config: ModelConfig) -> None:
    """Raise UsageError or DoesNotFitError for a context that a model cannot have."""
    if tokens < 1:
        raise UsageError(f"--ctx-size is {tokens}, expected at least 1")
    if tokens > config.max_positions:
        raise DoesNotFitError(
            f"--ctx-size is {tokens}, the model allows {config.max_positions} tokens",
            hint=f"use --ctx-size {config.max_positions} or less",
        )


def plan_memory(
    facts: ModelFacts, options: MemoryOptions, ctx_size: int | None, threads: int | None
) -> Plan:
    """Share out memory for a model that costs so much. Raises DoesNotFitError or UsageError."""
    return make_plan(
        facts,
        read_memory(),
        ram=options.ram,
        reserve=options.reserve,
        ctx=min(ctx_size or DEFAULT_CTX, facts.config.max_positions),
        io=options.io,
        threads=threads or default_threads(),
    )


def row_format(options: MemoryOptions) -> RowFormat:
    """Return how compressed rows are stored in the arithmetic `fast`."""
    return DEFAULT_ROWS if options.kv is None else FORMATS[options.kv]


def row_memory(options: MemoryOptions) -> RowMemory:
    """Return where compressed rows are kept. Raises UsageError for a bound without a folder."""
    if options.kv_ram is not None and options.kv_dir is None:
        raise UsageError("--kv-ram needs a folder for the rest", hint="name one with --kv-dir")
    return RowMemory(options.kv_dir, options.kv_ram)


def row_limits(options: MemoryOptions) -> RowLimits:
    """Return the bounds of compressed rows in memory."""
    keys = KEYS_BYTES if options.kv_dir is not None and options.kv_ram is None else None
    return RowLimits(options.kv_ram, keys)


def with_rows(facts: ModelFacts, options: MemoryOptions) -> ModelFacts:
    """Return what a model costs in the arithmetic `fast` with its context stored as asked for."""
    return replace(facts, rows=row_format(options), limits=row_limits(options))


def paging_options(checkpoint: Checkpoint, options: MemoryOptions, plan: Plan) -> PagingOptions:
    """Return how to bring experts into memory according to a plan."""
    readers = options.readers or plan.readers
    return PagingOptions(
        capacity_bytes=plan.expert_budget,
        io=_io(checkpoint, options, plan),
        readers=readers,
        policy=options.policy,
        prefetch=options.prefetch,
        floor_bytes=plan.floor,
        faults=options.faults,
    )


def _io(
    checkpoint: Checkpoint, options: MemoryOptions, plan: Plan
) -> Literal["map", "direct", "buffered"]:
    """Choose: what is packed into memory and fits comes through maps, which the system caches."""
    if options.io != "auto":
        return options.io
    if plan.mode == "map" or (plan.fits and not isinstance(checkpoint, PackedFolder)):
        return "map"
    return "direct"
