"""Which device computes a network: the processor, or a GPU with its help."""

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

if TYPE_CHECKING:
    from localv4.planning.gpu_plan import GpuPlan


@dataclass(frozen=True, slots=True)
class Computing:
    """A network on its device; `gpu` is the plan of a GPU's memory, `note` why none is used."""

    network: FastTransformer
    gpu: "GpuPlan | None" = None
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a network is made of: `weights` packed, `ctx_size` tokens of a sequence, records paged.

    `facts` are those of its plan; `options` name the device.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    weights: Weights
    team: Team
    paging: PagingOptions
    rows: RowFormat
    facts: ModelFacts
    ctx_size: int
    options: GpuOptions


def make_network(wanted: Wanted) -> Computing:
    """Make a network on the device that its options name.

    Raises DoesNotFitError when a GPU was asked for that cannot be used.
    """
    note, options = None, wanted.options
    if options.name != "cpu" and (has_library() or options.name != "auto"):
        try:
            found = _on_gpu(wanted)
            if found is not None:
                return found
        except LocalV4Error as error:
            if options.name != "auto":
                raise DoesNotFitError(error.message, hint=error.hint) from error
            note = f"the GPU is not used: {error.message}"
    network = FastTransformer(
        wanted.config,
        wanted.weights,
        wanted.team,
        partial(open_store, options=wanted.paging, checkpoint=wanted.checkpoint),
        looks_ahead=wanted.paging.prefetch,
        rows=wanted.rows,
    )
    return Computing(network, note=note)


def _on_gpu(wanted: Wanted) -> Computing | None:
    """Return the network on a GPU; None if there is none and nobody insists on one."""
    from localv4.cuda.offload import find_gpu, offload
    from localv4.planning.gpu_plan import plan_gpu

    paging, options = wanted.paging, wanted.options
    gpu = find_gpu(options)
    if gpu is None:
        return None
    plan = plan_gpu(
        *(wanted.facts, gpu.name, gpu.free_bytes()),
        memory=options.memory,
        ctx=wanted.ctx_size,
        states=options.state_bytes,
    )
    network = offload(
        gpu,
        wanted.config,
        wanted.weights,
        wanted.team,
        partial(open_store, options=paging, checkpoint=wanted.checkpoint),
        wanted.rows,
        layers=plan.layers,
        capacity=plan.experts,
        policy=paging.policy,
        falls_back=options.name == "auto",
    )
    return Computing(network, plan)
