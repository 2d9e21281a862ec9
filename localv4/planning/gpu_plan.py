"""How the memory of a GPU is shared out before a model is loaded.

    experts = budget - dense weights - head - decoder state - workspace

The budget is --gpu-mem, or what is free on the GPU less a reserve. What is left over is a cache of
experts, or has room for all of them. When not even the dense weights fit, as many whole layers go
to the GPU as do, and the host computes the others.
"""

from dataclasses import dataclass

from localv4.errors import DoesNotFitError, UsageError
from localv4.planning.model_facts import ModelFacts
from localv4.planning.plan import gib, workspace_bytes

GIB, MIB = 1 << 30, 1 << 20

RESERVE_BYTES = 512 * MIB
"""Left free on the GPU: what the driver takes for code and graphs, and the screen."""

SCRATCH_BYTES = 640 * MIB
"""What a GPU takes beside that: outputs of experts not yet summed, more tokens at a time."""

LEAST_EXPERTS = 12
"""Records of one layer that are brought to the GPU for a prompt at a time, at least."""


STATE_SHARE = 0.25
"""The most of the memory that goes to the decoder states of many sequences."""


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """Bytes of a GPU's memory by component; `layers` of all are computed there.

    `all_experts` is what the experts of those layers take, `experts` the room for them.
    """

    name: str
    budget: int
    layers: int
    all_layers: int
    dense: int
    head: int
    state: int
    workspace: int
    experts: int
    all_experts: int

    @property
    def fits(self) -> bool:
        """Whether everything can be on the GPU."""
        return self.layers == self.all_layers and self.experts >= self.all_experts

    @property
    def resident_share(self) -> float:
        """The part of the experts of its layers that the GPU holds."""
        return min(1.0, self.experts / self.all_experts) if self.all_experts else 1.0

    @property
    def total(self) -> int:
        """All memory that is taken of the GPU."""
        return sum(self.components().values())

    def components(self) -> dict[str, int]:
        """Return the memory by component."""
        return {
            "dense weights": self.dense,
            "head": self.head,
            "decoder state": self.state,
            "workspace": self.workspace,
            "experts": min(self.experts, self.all_experts),
        }


def plan_gpu(
    facts: ModelFacts,
    name: str,
    free_bytes: int,
    *,
    memory: int | None,
    ctx: int,
    states: int | None = None,
) -> GpuPlan:
    """Share out the memory of a GPU of which `free_bytes` are free; `memory` bounds what is taken.

    `states` are the bytes that all decoder states want, of which they get a part of the memory;
    None: one sequence of `ctx` tokens. Raises UsageError for a bound that makes no sense,
    DoesNotFitError when not one layer fits.
    """
    if memory is not None and memory < 1:
        raise UsageError(f"--gpu-mem is {memory}, expected a number of bytes above 0")
    budget = max(0, free_bytes - RESERVE_BYTES)
    if memory is not None:
        budget = min(budget, memory)
    count = facts.config.n_layers
    workspace = workspace_bytes(facts.config, ctx, 1) + SCRATCH_BYTES
    state, dense, head = facts.state_bytes(ctx), facts.dense_bytes, facts.head_bytes
    if states is not None:
        state = min(states, int(STATE_SHARE * budget))
    floor = LEAST_EXPERTS * facts.largest_expert_bytes
    room = budget - workspace - floor
    if room >= dense + head + state:
        layers = count
    else:
        head, layers = 0, int(max(0, room) * count // max(1, dense + state))
        dense, state = dense * layers // count, state * layers // count
    if layers == 0:
        need = workspace + floor + (facts.dense_bytes + facts.state_bytes(ctx)) // count
        raise DoesNotFitError(
            f"{facts.name} needs at least {gib(need)} of {name}'s memory, {gib(budget)} are usable",
            hint="use --device cpu, or a smaller --ctx-size",
        )
    return GpuPlan(
        name=name,
        budget=budget,
        layers=layers,
        all_layers=count,
        dense=dense,
        head=head,
        state=state,
        workspace=workspace,
        experts=budget - workspace - dense - head - state,
        all_experts=sum(facts.expert_bytes[:layers]) * facts.config.n_experts,
    )
