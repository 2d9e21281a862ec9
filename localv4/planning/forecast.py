"""Predicted speed of a model under a plan: tokens per second as a range, and what bounds them.

Decoding a token:

    memory  = bytes of weights and state that it reads / (read roof * share that kernels reach)
    compute = the same bytes / (cores * what a core reads while it computes)
    disk    = bytes of chosen experts that are not in memory / disk speed
    token   = max(memory, compute) + what of the disk's time is not hidden behind it

While missing experts of a layer are read, its other experts and the shared one are computed. Its
attention decides about the choice; what was guessed before is read meanwhile. `docs/planning.md`
has the terms.
"""

from dataclasses import dataclass
from math import ceil, comb
from typing import Literal

from localv4.planning.hit_rate import Bounds, Routing, TypicalText
from localv4.planning.machine import DiskFacts, Machine
from localv4.planning.model_facts import ModelFacts
from localv4.planning.plan import Plan

Bottleneck = Literal["memory", "compute", "disk"]

DECODE_SHARE = Bounds(0.72, 0.80, 0.92)
"""Of the read roof, in docs/performance.md: 72 % (32 threads) to 94 % (one), 78 % where all of
V4-Flash was in memory."""

PREFILL_SHARE = Bounds(0.33, 0.45, 0.58)
"""Of the int8 peak, for chunks of 1,920 tokens, in docs/performance.md: 35 % (AVX-512 VNNI) to 58 %
(AVX2), with AMX 55 %."""

MEASURED_SPREAD = 0.06
"""How far shares that were measured on this machine may be off."""

FORMAT_SHARES = {
    "MX4": 0.88,
    "Q4": 0.89,
    "Q8": 0.90,
    "B16": 0.95,
    "F32": 0.91,
    "F32R": 0.91,
    "F8": 0.85,
    "Q4K": 0.87,
    "Q6": 0.85,
    "Q3": 0.80,
    "Q2": 0.83,
    "IQ2": 0.70,
}
"""Of the read roof, single kernels by format (docs/performance.md)."""

REFERENCE_SHARE = 0.88
"""Of the formats that DECODE_SHARE was measured with."""

LAYER_S = 50e-6
"""What a layer of a token takes whatever its size, where it was not measured."""

LOOKAHEAD = Bounds(0.0, 0.46, 0.84)
"""Share of a layer's misses that its router foretells: none; as published for V4-Flash, of four
guesses from the layer before; of six from the streams before its attention, with random weights."""

GATE_UP = 2 / 3
"""Of an expert's work: two of its three matrices."""

GROUPED_READS = 0.85
"""Of the disk's speed with many reads under way: each layer asks for a few and waits for the last.
Measured with 1 to 5 of 13 MB: 0.82 to 0.86."""

HALT_S = 300e-6
"""What it takes to halt a token's program, ask for experts and go on, beside reading them."""

PROMPT_TOKENS = 1920
"""Length of the prompt that the speed of reading is told for."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Tokens per second of decoding and of reading a prompt, and where the time goes.

    Seconds and bytes are those of one likely token. `roofline` is the rate at which memory alone
    would bound decoding; `hit_rate` that of experts; `correction` the factor that earlier runs
    have added, 1.0 without any.
    """

    decode: Bounds
    prefill: Bounds
    hit_rate: Bounds
    bottleneck: Bottleneck
    roofline: float
    token_bytes: int
    missed_bytes: float
    memory_s: float
    compute_s: float
    disk_s: float
    decode_share: float
    routing: str
    correction: float = 1.0


@dataclass(frozen=True, slots=True)
class _Layer:
    """Seconds of a mean layer: before the choice of experts, shared expert, all chosen experts."""

    before: float
    shared: float
    experts: float


def make_forecast(
    facts: ModelFacts,
    plan: Plan,
    machine: Machine,
    *,
    routing: Routing | None = None,
    position: int = 512,
    correction: float = 1.0,
) -> Forecast:
    """Predict the speed of a model that is loaded as planned, at a position of the context.

    `machine.read_bytes_s` must be known, and `machine.disk` where the plan pages; ValueError
    otherwise. `routing` is typical text if nothing better is known.
    """
    roof, disk = machine.read_bytes_s, machine.disk
    if roof is None or (disk is None and not plan.fits):
        raise ValueError("the machine was not measured")
    config = facts.config
    if plan.fits:
        hits, source = Bounds(1.0, 1.0, 1.0), "all experts are in memory"
    else:
        known = routing or TypicalText(config.experts_per_token / config.n_experts)
        hits, source = known.hit_rate(plan.resident_share), known.source
    shares = decode_shares(facts, machine)
    layer_s = machine.kernels.layer_s if machine.kernels is not None else LAYER_S
    nbytes = facts.weight_bytes_per_token + facts.state_read_bytes(position)
    core_rate = machine.cores * machine.core_read_bytes_s
    rates = [
        1.0
        / (
            _token_s(facts, position, min(share * roof, core_rate), hit, disk, machine.cores, ahead)
            + config.n_layers * layer_s
        )
        for share, hit, ahead in (
            (shares.low, hits.low, LOOKAHEAD.low),
            (shares.likely, hits.likely, LOOKAHEAD.likely),
            (shares.high, hits.high, LOOKAHEAD.high),
        )
    ]
    missed = (1 - hits.likely) * facts.cycle_bytes
    memory_s, compute_s = nbytes / (roof * shares.likely), nbytes / core_rate
    disk_s = missed / (disk.bytes_s * GROUPED_READS) if disk is not None else 0.0
    return Forecast(
        decode=Bounds(*rates).scaled(correction),
        prefill=_prefill(facts, plan, machine, roof),
        hit_rate=hits,
        bottleneck=_bottleneck(memory_s, compute_s, disk_s, machine),
        roofline=roof / nbytes,
        token_bytes=nbytes,
        missed_bytes=missed,
        memory_s=memory_s,
        compute_s=compute_s,
        disk_s=disk_s,
        decode_share=shares.likely,
        routing=source,
        correction=correction,
    )


def decode_shares(facts: ModelFacts, machine: Machine) -> Bounds:
    """Return what kernels reach of the read roof with the formats of a model."""
    read = facts.read_by_format()
    seconds = sum(
        n / FORMAT_SHARES.get(_slowest(name), REFERENCE_SHARE) for name, n in read.items()
    )
    relative = sum(read.values()) / seconds / REFERENCE_SHARE
    if machine.kernels is None:
        return DECODE_SHARE.scaled(relative)
    share = machine.kernels.decode * relative
    return Bounds(share * (1 - MEASURED_SPREAD), share, share * (1 + MEASURED_SPREAD))


def _slowest(name: str) -> str:
    """Return of two formats ("IQ2+Q2") the one that is read more slowly."""
    return min(name.split("+"), key=lambda one: FORMAT_SHARES.get(one, REFERENCE_SHARE))


def _token_s(
    facts: ModelFacts,
    position: int,
    rate: float,
    hit: float,
    disk: DiskFacts | None,
    cores: int,
    ahead: float,
) -> float:
    """Return the seconds of a token; `rate` is what kernels read, `ahead` is foretold in time."""
    reads, config = facts.layer_reads(position), facts.config
    if disk is None or hit >= 1.0:
        return (facts.weight_bytes_per_token + facts.state_read_bytes(position)) / rate
    chosen = config.experts_per_token
    layer = _Layer(reads.before / rate, reads.shared / rate, chosen * reads.expert / rate)
    one_s = reads.expert / (disk.bytes_s * GROUPED_READS)
    mean = _layer_s(layer, chosen, 1 - hit, ahead, one_s, disk.latency_s)
    reading_s = disk.cpu_s_per_gb * (1 - hit) * facts.cycle_bytes / 1e9 / cores
    return config.n_layers * mean + facts.head_bytes / rate + reading_s


def _layer_s(
    layer: _Layer, chosen: int, missed: float, ahead: float, one_s: float, latency_s: float
) -> float:
    """Return the mean seconds of a layer over how many of its chosen experts are missing.

    Each is missing with the same probability, and foretold with another one.
    """
    total = 0.0
    for count in range(chosen + 1):
        for foretold in range(count + 1):
            both = chance(chosen, count, missed) * chance(count, foretold, ahead)
            reads = foretold * one_s, (count - foretold) * one_s
            total += both * _halted_s(layer, chosen, *reads, latency_s)
    return total


def chance(of: int, count: int, each: float) -> float:
    """Return the probability that `count` of some events happen, each with the same one."""
    return comb(of, count) * each**count * (1 - each) ** (of - count)


def _halted_s(layer: _Layer, chosen: int, early_s: float, late_s: float, latency_s: float) -> float:
    """Return the seconds of a layer for which experts are read, if any are.

    Reading those that were foretold takes `early_s`, from the layer's begin, the others `late_s`,
    from the choice. Meanwhile the rest is computed. What remains is the last one to arrive, and
    down of those behind it in the order in which they are added: of one half, on average.
    """
    computed_s = layer.before + layer.shared + layer.experts
    if not early_s and not late_s:
        return computed_s
    read_s = max(early_s, layer.before if late_s else 0.0) + late_s + latency_s
    remains_s = layer.experts / chosen + (1 - GATE_UP) * layer.experts / 2
    halt_s = HALT_S if read_s > layer.before else 0.0
    return halt_s + max(computed_s, read_s + remains_s)


def _prefill(facts: ModelFacts, plan: Plan, machine: Machine, roof: float) -> Bounds:
    """Return the tokens of a prompt per second: chunks of it meet each expert once.

    The high end lets what is read from disk hide behind the multiplications, the others do not.
    """
    shares = PREFILL_SHARE
    if machine.kernels is not None:
        share = machine.kernels.prefill
        shares = Bounds(share * (1 - 2 * MEASURED_SPREAD), share, share * (1 + 2 * MEASURED_SPREAD))
    config, tokens = facts.config, min(PROMPT_TOKENS, plan.ctx_size)
    untouched = (1 - config.experts_per_token / config.n_experts) ** tokens
    touched = (1 - untouched) * facts.all_expert_bytes
    chunks = ceil(tokens / PROMPT_TOKENS)
    memory_s = chunks * (touched + facts.dense_bytes) / roof
    disk_s = 0.0
    if machine.disk is not None and not plan.fits:
        disk_s = chunks * touched * (1 - plan.resident_share) / machine.disk.bytes_s
    low, likely, high = (
        max(2 * facts.multiply_adds * tokens / (machine.peak_int8_ops_s * share), memory_s)
        for share in (shares.low, shares.likely, shares.high)
    )
    return Bounds(tokens / (low + disk_s), tokens / (likely + disk_s), tokens / max(high, disk_s))


def _bottleneck(memory_s: float, compute_s: float, disk_s: float, machine: Machine) -> Bottleneck:
    """Return what takes the most time."""
    if disk_s > max(memory_s, compute_s):
        return "disk"
    if compute_s > memory_s:
        return "compute"
    alone, cores = machine.read_by_threads.get(1, 0.0), machine.cores
    still_grows = alone > 0 and (machine.read_bytes_s or 0.0) > 0.85 * cores * alone
    return "compute" if still_grows and cores > 1 else "memory"
