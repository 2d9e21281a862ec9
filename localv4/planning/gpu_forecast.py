"""Predicted speed of a model with a GPU: who computes what meanwhile, and what bounds it.

A layer of a token on the GPU:

    layer = attention and router (GPU) + max(experts that it holds, others (host))

An expert that is on the GPU is read there; one that is not is computed by the host from its memory,
or from the disk. Layers that the GPU has no room for are the host's alone. In a prompt experts
that are not on the GPU are uploaded while it multiplies. `docs/planning.md` has the terms.
"""

from dataclasses import dataclass
from math import ceil
from typing import Literal

from localv4.planning.forecast import (
    GROUPED_READS,
    LAYER_S,
    PREFILL_SHARE,
    PROMPT_TOKENS,
    chance,
    decode_shares,
)
from localv4.planning.gpu_plan import GpuPlan
from localv4.planning.hit_rate import Bounds, Routing, TypicalText
from localv4.planning.machine import GpuFacts, Machine
from localv4.planning.model_facts import LayerReads, ModelFacts
from localv4.planning.plan import Plan

GpuBottleneck = Literal["GPU", "host", "PCIe", "disk"]

GPU_SHARE = Bounds(0.50, 0.65, 0.80)
"""Of what a GPU copies, that kernels of one token read, between the launches."""

GPU_LAYER_S = 70e-6
"""What a layer takes whatever its size: about twenty recorded launches that wait for each other."""

EXCHANGE_S = 40e-6
"""What it takes to ask a GPU what it has chosen, and to send it what the host has computed."""

PRODUCT_SHARE = Bounds(0.40, 0.55, 0.75)
"""Of the products that were measured alone, in whole prompts: attention, and experts with few
tokens, multiply more slowly."""


@dataclass(frozen=True, slots=True)
class TierShares:
    """The parts of the chosen experts that lie in each tier."""

    gpu: float
    memory: float
    disk: float


@dataclass(frozen=True, slots=True)
class TierBytes:
    """Bytes that a token reads: of the GPU's memory, of the host's, and of the disk before that."""

    gpu: float
    memory: float
    disk: float

    def bound(self, copy_bytes_s: float, read_bytes_s: float) -> float:
        """Return the tokens per second if both memories gave all that they can, at a time."""
        return 1 / max(self.gpu / copy_bytes_s, self.memory / read_bytes_s)


@dataclass(frozen=True, slots=True)
class GpuForecast:
    """Tokens per second of decoding and of reading a prompt, and where the time goes.

    `tiers` are the likely parts of the experts that tokens choose; seconds and bytes are those of
    one likely token, `uploaded_bytes` those of a prompt. `roofline` is the rate at which the
    memories of both devices would bound decoding, working at the same time without any loss.
    """

    decode: Bounds
    prefill: Bounds
    tiers: TierShares
    bottleneck: GpuBottleneck
    prompt_bottleneck: GpuBottleneck
    roofline: float
    token_bytes: TierBytes
    gpu_s: float
    host_s: float
    disk_s: float
    uploaded_bytes: float
    routing: str
    correction: float = 1.0


@dataclass(frozen=True, slots=True)
class _Rates:
    """Bytes per second of the GPU, the host and its disk; seconds of each layer of the host."""

    gpu: float
    host: float
    disk: float
    host_layer_s: float


@dataclass(frozen=True, slots=True)
class _Times:
    """Seconds of a token: all, and those that each part is at work."""

    total: float
    gpu: float
    host: float
    disk: float


def make_gpu_forecast(
    facts: ModelFacts,
    plan: Plan,
    gpu: GpuPlan,
    machine: Machine,
    *,
    routing: Routing | None = None,
    position: int = 512,
    correction: float = 1.0,
) -> GpuForecast:
    """Predict the speed of a model of which a GPU computes the layers of its plan.

    Raises ValueError for a machine of which the GPU, the memory, or a disk that is needed, was not
    measured.
    """
    card, roof = machine.gpu, machine.read_bytes_s
    if card is None or roof is None or (machine.disk is None and not plan.fits):
        raise ValueError("the machine was not measured")
    config = facts.config
    known = routing or TypicalText(config.experts_per_token / config.n_experts)
    reads = facts.layer_reads(position)
    times = []
    hits = known.hit_rate(gpu.resident_share), known.hit_rate(plan.resident_share)
    shares = decode_shares(facts, machine)
    for which in ("low", "likely", "high"):
        tiers = _tiers(getattr(hits[0], which), getattr(hits[1], which))
        rates = _rates(machine, card, getattr(GPU_SHARE, which), getattr(shares, which), roof)
        times.append(_token(facts, gpu, reads, tiers, rates))
    likely, tiers = times[1], _tiers(hits[0].likely, hits[1].likely)
    prefill, uploaded, prompt_bottleneck = _prompt(facts, plan, gpu, machine, card)
    tiers = _of_all_layers(tiers, gpu)
    nbytes = bytes_by_tier(facts, gpu, position, tiers)
    return GpuForecast(
        decode=Bounds(*(1 / one.total for one in times)).scaled(correction),
        prefill=prefill,
        tiers=tiers,
        bottleneck=_largest({"GPU": likely.gpu, "host": likely.host, "disk": likely.disk}),
        prompt_bottleneck=prompt_bottleneck,
        roofline=nbytes.bound(card.speed.copy_bytes_s, roof),
        token_bytes=nbytes,
        gpu_s=likely.gpu,
        host_s=likely.host,
        disk_s=likely.disk,
        uploaded_bytes=uploaded,
        routing=known.source,
        correction=correction,
    )


def _tiers(on_gpu: float, in_memory: float) -> TierShares:
    """Return the tiers of a layer of the GPU: what it holds comes out of the host's memory."""
    either = max(on_gpu, in_memory)
    return TierShares(on_gpu, either - on_gpu, 1.0 - either)


def _of_all_layers(tiers: TierShares, gpu: GpuPlan) -> TierShares:
    """Return the tiers over all layers, of which the host's have nothing on the GPU."""
    part = gpu.layers / gpu.all_layers
    moved = tiers.gpu * (1 - part)
    return TierShares(tiers.gpu * part, tiers.memory + moved, tiers.disk)


def _rates(
    machine: Machine, card: GpuFacts, gpu_share: float, host_share: float, roof: float
) -> _Rates:
    host = min(host_share * roof, machine.cores * machine.core_read_bytes_s)
    disk = machine.disk.bytes_s * GROUPED_READS if machine.disk is not None else float("inf")
    layer_s = machine.kernels.layer_s if machine.kernels is not None else LAYER_S
    return _Rates(gpu_share * card.speed.copy_bytes_s, host, disk, layer_s)


def _token(
    facts: ModelFacts, gpu: GpuPlan, reads: LayerReads, tiers: TierShares, rates: _Rates
) -> _Times:
    """Return the seconds of a token through all layers and the output matrix."""
    chosen = facts.config.experts_per_token
    on_gpu = _gpu_layer(reads, chosen, tiers, rates, waits=not gpu.fits)
    alone = _host_layer(reads, chosen, tiers, rates)
    own, others = gpu.layers, gpu.all_layers - gpu.layers
    on_host = facts.head_bytes / rates.host if others else 0.0
    head_s = on_host or facts.head_bytes / rates.gpu
    return _Times(
        own * on_gpu.total + others * alone.total + head_s,
        own * on_gpu.gpu + (0.0 if others else head_s),
        own * on_gpu.host + others * alone.host + on_host,
        own * on_gpu.disk + others * alone.disk,
    )


def _gpu_layer(
    reads: LayerReads, chosen: int, tiers: TierShares, rates: _Rates, waits: bool
) -> _Times:
    """Return the mean seconds of a layer on the GPU over how many of its experts it lacks.

    Each is lacking with the same probability; while the host computes those, the GPU does the rest.
    """
    before = reads.before / rates.gpu + GPU_LAYER_S + (EXCHANGE_S if waits else 0.0)
    lacking = tiers.memory + tiers.disk
    from_disk = tiers.disk / lacking if lacking else 0.0
    one_host, one_disk = reads.expert / rates.host, from_disk * reads.expert / rates.disk
    total = gpu_s = host_s = disk_s = 0.0
    for count in range(chosen + 1):
        probability = chance(chosen, count, lacking)
        experts_s = (reads.shared + (chosen - count) * reads.expert) / rates.gpu
        reads_s, computes_s = count * one_disk, count * one_host
        # what is read last is computed last
        joined_s = max(computes_s, reads_s + from_disk * one_host) if count else 0.0
        total += probability * (before + max(experts_s, joined_s))
        gpu_s += probability * (before + experts_s)
        host_s += probability * computes_s
        disk_s += probability * reads_s
    return _Times(total, gpu_s, host_s, disk_s)


def _host_layer(reads: LayerReads, chosen: int, tiers: TierShares, rates: _Rates) -> _Times:
    """Return the seconds of a layer that the host computes; reads overlap with its experts."""
    before = reads.before / rates.host + rates.host_layer_s
    experts_s = (reads.shared + chosen * reads.expert) / rates.host
    disk_s = chosen * tiers.disk * reads.expert / rates.disk
    return _Times(before + max(experts_s, disk_s), 0.0, before + experts_s, disk_s)


def bytes_by_tier(facts: ModelFacts, gpu: GpuPlan, position: int, tiers: TierShares) -> TierBytes:
    """Return what a token reads of each memory; `tiers` are those of the experts of all layers."""
    part, is_whole = gpu.layers / gpu.all_layers, gpu.layers == gpu.all_layers
    experts, head = facts.cycle_bytes, facts.head_bytes
    dense = facts.weight_bytes_per_token - head - experts + facts.state_read_bytes(position)
    return TierBytes(
        part * dense + tiers.gpu * experts + (head if is_whole else 0),
        (1 - part) * dense + (1 - tiers.gpu) * experts + (0 if is_whole else head),
        tiers.disk * experts,
    )


def _prompt(
    facts: ModelFacts, plan: Plan, gpu: GpuPlan, machine: Machine, card: GpuFacts
) -> tuple[Bounds, float, GpuBottleneck]:
    """Return the tokens of a prompt per second, the bytes that are uploaded, and the bottleneck.

    At the low end uploads, reads and products come one after the other, else at the same time; the
    layers of the host come after those of the GPU.
    """
    config, tokens = facts.config, min(PROMPT_TOKENS, plan.ctx_size)
    chunks = ceil(tokens / PROMPT_TOKENS)
    part = gpu.layers / gpu.all_layers
    touched = 1 - (1 - config.experts_per_token / config.n_experts) ** tokens
    uploaded = chunks * touched * gpu.all_experts * (1 - gpu.resident_share)
    upload_s = uploaded / card.speed.upload_bytes_s
    in_memory, either = plan.resident_share, max(plan.resident_share, gpu.resident_share)
    absent = part * (1 - either) + (1 - part) * (1 - in_memory)
    missed = chunks * touched * facts.all_expert_bytes * absent
    disk_s = missed / machine.disk.bytes_s if machine.disk is not None else 0.0
    operations = 2 * facts.multiply_adds * tokens
    products = [
        part * operations / (card.speed.product_ops_s * share)
        for share in (PRODUCT_SHARE.low, PRODUCT_SHARE.likely, PRODUCT_SHARE.high)
    ]
    share = machine.kernels.prefill if machine.kernels is not None else PREFILL_SHARE.likely
    host_s = (1 - part) * operations / (machine.peak_int8_ops_s * share)
    low = products[0] + upload_s + disk_s + host_s
    likely, high = (max(one, upload_s, disk_s) + host_s for one in products[1:])
    bottleneck = _largest({"GPU": products[1], "PCIe": upload_s, "host": host_s, "disk": disk_s})
    return Bounds(tokens / low, tokens / likely, tokens / high), uploaded, bottleneck


def _largest(seconds: dict[GpuBottleneck, float]) -> GpuBottleneck:
    """Return what takes the most time."""
    return max(seconds, key=lambda name: seconds[name])
