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


def make_network(
    checkpoint: Checkpoint,
    config: ModelConfig,
    weights: Weights,
    team: Team,
    paging: PagingOptions,
    rows: RowFormat,
    facts: ModelFacts,
    ctx_size: int,
    options: GpuOptions,
) -> Computing:
    """Make the network of packed weights on the device that `options` name.

    Raises DoesNotFitError when a GPU was asked for that cannot be used.
    """
    note = None
    if options.name != "cpu" and (has_library() or options.name != "auto"):
        try:
            found = _on_gpu(
                checkpoint, config, weights, team, paging, rows, facts, ctx_size, options
            )
            if found is not None:
                return found
        except LocalV4Error as error:
            if options.name != "auto":
                raise DoesNotFitError(error.message, hint=error.hint) from error
            note = f"the GPU is not used: {error.message}"
    network = FastTransformer(
        config,
        weights,
        team,
        lambda experts: open_store(experts, paging, checkpoint),
        looks_ahead=paging.prefetch,
        rows=rows,
    )
    return Computing(network, note=note)


def _on_gpu(
    checkpoint: Checkpoint,
    config: ModelConfig,
    weights: Weights,
    team: Team,
    paging: PagingOptions,
    rows: RowFormat,
    facts: ModelFacts,
    ctx_size: int,
    options: GpuOptions,
) -> Computing | None:
    """Return the network on a GPU; None if there is none and nobody insists on one."""
    from localv4.cuda.offload import find_gpu, offload
    from localv4.planning.gpu_plan import plan_gpu

    gpu = find_gpu(options)
    if gpu is None:
        return None
    plan = plan_gpu(
        *(facts, gpu.name, gpu.free_bytes()),
        memory=options.memory,
        ctx=ctx_size,
        states=options.state_bytes,
    )
    network = offload(
        gpu,
        config,
        weights,
        team,
        partial(open_store, options=paging, checkpoint=checkpoint),
        rows,
        layers=plan.layers,
        capacity=plan.experts,
        policy=paging.policy,
        falls_back=options.name == "auto",
    )
    return Computing(network, plan)
