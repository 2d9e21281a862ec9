"""How memory is shared out before a model is loaded: what stays in it, and what is paged.

    usable  = --ram, and never more than available - reserve
    experts = usable - dense - head - decoder state - snapshots - workspace - program
    all of them fit: mode map (or arena, where files hold another form); else arena, which pages

docs/planning.md explains the components.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

from localv4.errors import DoesNotFitError, UsageError
from localv4.kernels.gemm import BATCH_TOKENS
from localv4.model.config import ModelConfig
from localv4.model.fast import CHUNK_TOKENS
from localv4.model.fast_head import HEAD_TOKENS
from localv4.model.fast_moe import HiddenLayers, WaveBuffers
from localv4.model.program import Rows, Scratch
from localv4.model.workspace import AttentionBuffers, ChunkBuffers, Seen, buffer_bytes
from localv4.planning.memory import Memory
from localv4.planning.model_facts import ModelFacts
from localv4.planning.network import network_weights

GIB = 1 << 30
MIB = 1 << 20

Mode = Literal["map", "arena"]
Io = Literal["auto", "map", "direct", "buffered"]

DEFAULT_CTX = 32_768
"""Tokens of context that memory is planned for when nobody asked for another number."""

LEAST_RESERVE, RESERVE_SHARE, MOST_RESERVE_SHARE = 4 * GIB, 0.08, 0.25
"""Left to other programs beyond what they have: 8 % of all memory, 4 GiB or more, but no more than
a quarter of what there is and of what is available."""

PROGRAM_BYTES = 512 * MIB
"""Python, its libraries and compiled kernels, of which 200 MiB were measured, the terminal, the
tokenizer of 129,280 tokens, and what allocators keep."""

FLOOR_CYCLES = 1.5
"""The fewest experts to page with, in tokens' worth: with less than one every read is a miss."""

READERS = 8
"""Threads that read experts: they sleep most of the time."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The memory of a model in bytes, by component, and the context that it was planned for.

    `expert_budget` is all that routed experts may take, reads in flight included; `floor` the least
    that they can be paged with. `most_ctx` is the longest context that would leave the same mode.
    `usable` is what the process may take altogether, `reserve` what is left to others.
    """

    mode: Mode
    io: Io
    ctx_size: int
    most_ctx: int
    usable: int
    reserve: int
    expert_budget: int
    all_experts: int
    floor: int
    readers: int
    fixed: Mapping[str, int] = field(repr=False)

    @property
    def fits(self) -> bool:
        """Whether every expert can stay in memory."""
        return self.expert_budget >= self.all_experts

    @property
    def expert_bytes(self) -> int:
        """What routed experts will take."""
        return min(self.expert_budget, self.all_experts)

    @property
    def paged_bytes(self) -> int:
        """What is left of the experts on disk."""
        return self.all_experts - self.expert_bytes

    @property
    def resident_share(self) -> float:
        """The part of the experts that memory holds."""
        return self.expert_bytes / self.all_experts

    @property
    def total(self) -> int:
        """All memory that the process will take."""
        return sum(self.fixed.values()) + self.expert_bytes

    def components(self) -> dict[str, int]:
        """Return the memory by component, experts included."""
        return {**self.fixed, "experts": self.expert_bytes}


def make_plan(
    facts: ModelFacts,
    memory: Memory,
    *,
    ram: int | None = None,
    reserve: int | None = None,
    ctx: int = DEFAULT_CTX,
    io: Io = "auto",
    threads: int = 8,
) -> Plan:
    """Share out memory for a model with `ctx` tokens of context; measures nothing.

    `ram` bounds what the process takes, `reserve` is left to others (bytes). Raises UsageError for
    numbers that make no sense, DoesNotFitError when the floor does not fit.
    """
    ctx = min(ctx, facts.config.max_positions)
    _check(ram, reserve, ctx)
    if reserve is None:
        reserve = default_reserve(memory) if ram is None else 0
    usable = max(0, memory.available - reserve)
    if ram is not None:
        usable = min(ram, usable)
    fixed = fixed_memory(facts, ctx, threads)
    budget = usable - sum(fixed.values())
    floor, everything = floor_bytes(facts), facts.all_expert_bytes
    if budget < floor and io != "map":
        raise _too_large(facts, memory, usable, fixed, floor, threads)
    fits = budget >= everything
    is_mapped = io == "map" or (io == "auto" and fits and facts.is_packed)
    least = everything if fits else floor
    return Plan(
        mode="map" if is_mapped else "arena",
        io=io,
        ctx_size=ctx,
        most_ctx=_most_ctx(facts, usable - least, threads),
        usable=usable,
        reserve=reserve,
        expert_budget=max(0, budget),
        all_experts=everything,
        floor=floor,
        readers=READERS,
        fixed=fixed,
    )


def default_reserve(memory: Memory) -> int:
    """Return what to leave to other programs."""
    wanted = max(LEAST_RESERVE, int(memory.most * RESERVE_SHARE))
    most = min(memory.most, memory.available) * MOST_RESERVE_SHARE
    return min(wanted, int(most))


def floor_bytes(facts: ModelFacts) -> int:
    """Return the least memory to page experts with."""
    return min(int(FLOOR_CYCLES * facts.cycle_bytes), facts.all_expert_bytes)


def fixed_memory(facts: ModelFacts, ctx: int, threads: int) -> dict[str, int]:
    """Return what has to be in memory whatever is paged, in bytes by component."""
    return {
        "dense weights": facts.dense_bytes,
        "head": facts.head_bytes,
        "decoder state": facts.state_bytes(ctx),
        "snapshots": facts.snapshots_bytes(ctx),
        "workspace": workspace_bytes(facts.config, ctx, threads),
        "program": PROGRAM_BYTES,
    }


def workspace_bytes(config: ModelConfig, ctx: int, threads: int) -> int:
    """Return the bytes of all buffers for tokens on their way: of a prompt, and of one token.

    The buffers are made, which costs nothing as long as nobody writes to them, and counted.
    """
    seen = Seen.before(ctx, config)
    attention = [AttentionBuffers(config, n, seen, threads) for n in (min(BATCH_TOKENS, ctx), 1)]
    return _chunk_bytes(config, min(CHUNK_TOKENS, ctx), threads) + sum(map(buffer_bytes, attention))


@cache
def _chunk_bytes(config: ModelConfig, tokens: int, threads: int) -> int:
    """Return what does not depend on how much a token sees."""
    chunk = (ChunkBuffers(config, tokens), WaveBuffers(config, tokens))
    token = (ChunkBuffers(config, 1), HiddenLayers(config))
    widest = max(w.cols for w in network_weights(config) if w.role != "embedding")
    scratch = Scratch.of(threads, widest)
    logits = Rows(HEAD_TOKENS, config.vocab_size)
    return sum(map(buffer_bytes, (*chunk, *token))) + scratch.nbytes + logits.nbytes


def _check(ram: int | None, reserve: int | None, ctx: int) -> None:
    if ctx < 1:
        raise UsageError(f"--ctx-size is {ctx}, expected at least 1")
    if ram is not None and ram < 1:
        raise UsageError(f"--ram is {ram}, expected a number of bytes above 0")
    if reserve is not None and reserve < 0:
        raise UsageError(f"--reserve is {reserve}, expected 0 bytes or more")


def _most_ctx(facts: ModelFacts, room: int, threads: int) -> int:
    """Return the longest context whose fixed memory fits into `room`, in steps of 256 tokens."""
    low, high = 0, -(-facts.config.max_positions // 256)
    while low < high:
        middle = (low + high + 1) // 2
        if sum(fixed_memory(facts, 256 * middle, threads).values()) <= room:
            low = middle
        else:
            high = middle - 1
    return min(256 * low, facts.config.max_positions)


def _too_large(
    facts: ModelFacts,
    memory: Memory,
    usable: int,
    fixed: Mapping[str, int],
    floor: int,
    threads: int,
) -> DoesNotFitError:
    """Say what is needed, what there is, and what would help."""
    need = sum(fixed.values()) + floor
    message = (
        f"{facts.name} needs at least {gib(need)} of memory ({gib(floor)} of it to page experts "
        f"with), {gib(usable)} are usable"
    )
    shorter = _most_ctx(facts, usable - floor, threads)
    if shorter > 0:
        return DoesNotFitError(message, hint=f"use --ctx-size {shorter} or less")
    if usable < memory.available and need <= memory.available:
        return DoesNotFitError(message, hint=f"use --ram {-(-need // GIB)}GiB")
    missing = gib(need - usable)
    return DoesNotFitError(message, hint=f"free {missing} of memory, or take a form of fewer bits")


def gib(nbytes: int) -> str:
    """Write a number of bytes in GiB."""
    return f"{nbytes / GIB:.1f} GiB"
