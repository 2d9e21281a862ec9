"""Which device computes a network: the processor, or a GPU with its help."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from localv4.cuda.options import GpuOptions, has_library
from localv4.errors import DoesNotFitError, LocalV4Error
from localv4.kernels.row_operations import RowFormat
from localv4.kernels.team import Team
from localv4.model.config import ModelConfig
from localv4.model.expert_source import open_store
from localv4.model.fast import FastTransformer
from localv4.model.weights import Weights
from localv4.paging.options import PagingOptions
from localv4.planning.model_facts import ModelFacts
from localv4.storage import Checkpoint

OnCompile = Callable[[int, int], None]
"""Told how many files of a GPU's kernels are compiled, and of how many."""

if TYPE_CHECKING:
    from localv4.cuda.gpu import Gpu
    from localv4.planning.gpu_plan import GpuPlan


@dataclass(frozen=True, slots=True)
class Device:
    """What is to compute a network: a GPU with the plan of its memory, or the processor alone.

    `is_required`: nothing else will do than the GPU. `note` says why none is used.
    """

    gpu: "Gpu | None" = None
    plan: "GpuPlan | None" = None
    is_required: bool = False
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Computing:
    """A network on its device; `gpu` is the plan of a GPU's memory, `note` why none is used."""

    network: FastTransformer
    gpu: "GpuPlan | None" = None
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a network is made of: `weights` packed, records of experts paged, and its device.

    So many `threads` of the host compute; `pin` keeps each on a processor.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    weights: Weights
    threads: int
    pin: bool
    paging: PagingOptions
    rows: RowFormat
    device: Device


def find_device(options: GpuOptions, facts: ModelFacts, ctx_size: int) -> Device:
    """Return the device that options name, and what of it a model of `ctx_size` tokens takes.

    Nothing is loaded or compiled yet. Raises DoesNotFitError when a GPU was asked for that cannot
    be used.
    """
    if options.name == "cpu" or (options.name == "auto" and not has_library()):
        return Device()
    from localv4.cuda.offload import find_gpu
    from localv4.planning.gpu_plan import plan_gpu

    with _refusals(options.name != "auto") as refusal:
        gpu = find_gpu(options)
        if gpu is None:
            return Device()
        plan = plan_gpu(
            *(facts, gpu.name, gpu.free_bytes()),
            memory=options.memory,
            ctx=ctx_size,
            states=options.state_bytes,
        )
        return Device(gpu, plan, is_required=options.name != "auto")
    return Device(note=refusal.note)


def make_network(wanted: Wanted, on_compile: OnCompile | None = None) -> Computing:
    """Make a network on its device; `on_compile` is told when its kernels are compiled.

    Raises DoesNotFitError when that has to be a GPU, and it cannot be used after all.
    """
    device = wanted.device
    note = device.note
    if device.gpu is not None and device.plan is not None:
        with _refusals(device.is_required) as refusal:
            return _on_gpu(wanted, device.gpu, device.plan, on_compile)
        note = refusal.note
    network = FastTransformer(
        wanted.config,
        wanted.weights,
        Team(wanted.threads, wanted.pin),
        partial(open_store, options=wanted.paging, checkpoint=wanted.checkpoint),
        looks_ahead=wanted.paging.prefetch,
        rows=wanted.rows,
    )
    return Computing(network, note=note)


@dataclass(slots=True)
class _Refusal:
    """Why a GPU is not used, once that is known."""

    note: str | None = None


@contextmanager
def _refusals(are_errors: bool) -> Iterator[_Refusal]:
    """Make errors of a GPU the end of everything, or a note; what comes after goes on then."""
    refusal = _Refusal()
    try:
        yield refusal
    except LocalV4Error as error:
        if are_errors:
            raise DoesNotFitError(error.message, hint=error.hint) from error
        refusal.note = f"the GPU is not used: {error.message}"


def _on_gpu(wanted: Wanted, gpu: "Gpu", plan: "GpuPlan", on_compile: OnCompile | None) -> Computing:
    """Return the network on a GPU."""
    from localv4.cuda.offload import offload
    from localv4.cuda.vram_store import COPY_THREADS, copiers_of

    copiers = 0 if plan.fits else copiers_of(wanted.threads)
    network = offload(
        gpu,
        wanted.config,
        wanted.weights,
        Team(wanted.threads - copiers, wanted.pin),
        partial(open_store, options=wanted.paging, checkpoint=wanted.checkpoint),
        wanted.rows,
        layers=plan.layers,
        capacity=plan.experts,
        policy=wanted.paging.policy,
        copiers=COPY_THREADS if plan.fits else max(1, copiers),
        falls_back=not wanted.device.is_required,
        on_compile=on_compile,
    )
    return Computing(network, plan)
