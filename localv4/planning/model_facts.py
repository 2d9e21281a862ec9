"""What a model costs: bytes in memory, bytes that a token reads, multiplications, bytes on disk."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from localv4.kernels.row_operations import COMPACT, RowFormat
from localv4.model.config import LayerKind, ModelConfig
from localv4.model.fast import CHUNK_TOKENS
from localv4.model.rings import ring_shapes
from localv4.model.rungs import most_rungs, snapshot_bytes
from localv4.model.state import SLACK_TOKENS
from localv4.model.traffic import VALUE_BYTES, state_bytes
from localv4.planning.network import multiply_adds, network_weights
from localv4.planning.recipes import Recipe

ROUTED, EMBEDDING, HEAD = "routed experts", "embedding row", "head"
"""Components that are no part of the dense weights."""

SHARED = "shared experts"

DEFAULT_ROWS = COMPACT
"""The format of compressed rows when nobody chooses one; docs/long_context.md tells why."""


@dataclass(frozen=True, slots=True)
class Part:
    """Weights of a component in one format.

    `resident` is what they take in memory, `read` what one token reads of them, in bytes.
    """

    component: str
    format: str
    resident: int
    read: int


@dataclass(frozen=True, slots=True)
class LayerReads:
    """Bytes of a mean layer that a token reads: before the choice, shared expert, one expert."""

    before: float
    shared: float
    expert: float


@dataclass(frozen=True, slots=True)
class RowLimits:
    """Bytes of compressed rows in memory at most: of all, and of those that an indexer chooses."""

    rows: int | None = None
    chosen: int | None = None

    def within(self, always: int, chosen: int) -> int:
        """Return what is in memory of so many bytes of rows that are always read and of others."""
        kept = always + (chosen if self.chosen is None else min(chosen, self.chosen))
        return kept if self.rows is None else min(kept, self.rows)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """One model in one form.

    `parts` are all weights but the routed experts and the embedding. `expert_bytes` has the mean
    record of an expert for each layer, `expert_format` is one name, or two for gate and down
    ("IQ2+Q2"). `is_packed`: a file holds the records as kernels read them, so they can be used
    where they are mapped. `file_bytes` are those of the weight files, `download_bytes` those to
    fetch, None where nothing has to be.
    `is_exact` tells sizes that were read from headers, or follow from published weights, from
    those that were derived from the size of a file. `rows` is the format of compressed rows in
    decoder states, `limits` bounds them.
    """

    name: str
    quant: str
    config: ModelConfig = field(repr=False)
    parts: tuple[Part, ...] = field(repr=False)
    expert_bytes: tuple[int, ...] = field(repr=False)
    expert_format: str
    file_bytes: int
    download_bytes: int | None = None
    is_packed: bool = True
    is_exact: bool = True
    rows: RowFormat = field(default=DEFAULT_ROWS, repr=False)
    limits: RowLimits = field(default=RowLimits(), repr=False)

    @property
    def dense_bytes(self) -> int:
        """Memory for all weights that every token needs, but for the head."""
        return sum(part.resident for part in self.parts if part.component != HEAD)

    @property
    def head_bytes(self) -> int:
        """Memory for the output matrix."""
        return sum(part.resident for part in self.parts if part.component == HEAD)

    @property
    def all_expert_bytes(self) -> int:
        """Bytes of all routed experts."""
        return sum(self.expert_bytes) * self.config.n_experts

    @property
    def largest_expert_bytes(self) -> int:
        """Bytes of the largest mean record."""
        return max(self.expert_bytes)

    @property
    def cycle_bytes(self) -> int:
        """Bytes of the experts that one token needs."""
        return sum(self.expert_bytes) * self.config.experts_per_token

    @property
    def weight_bytes_per_token(self) -> int:
        """Bytes of weights that one decoded token reads."""
        return sum(part.read for part in self.parts) + self.cycle_bytes

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one token, without the head."""
        return multiply_adds(self.config)

    def layer_reads(self, position: int) -> LayerReads:
        """Return what a mean layer of the token at a position reads."""
        layers = self.config.n_layers
        shared = sum(part.read for part in self.parts if part.component == SHARED)
        dense = self.weight_bytes_per_token - self.head_bytes - self.cycle_bytes - shared
        before = dense + self.state_read_bytes(position)
        one = self.cycle_bytes / self.config.experts_per_token
        return LayerReads(before / layers, shared / layers, one / layers)

    def read_by_format(self) -> Mapping[str, int]:
        """Return the bytes that a token reads by format, its experts included."""
        found: Counter[str] = Counter({self.expert_format: self.cycle_bytes})
        for part in self.parts:
            found[part.format] += part.read
        return found

    def state_read_bytes(self, position: int) -> int:
        """Return the bytes of decoder state that the token at a position reads."""
        return state_bytes(self.config, [position], self.rows)

    def state_bytes(self, ctx_size: int) -> int:
        """Return the memory of one sequence of `ctx_size` tokens."""
        return held_state_bytes(self.config, ctx_size, self.rows, limits=self.limits)

    def snapshots_bytes(self, ctx_size: int) -> int:
        """Return the memory of the snapshots by which a sequence of `ctx_size` tokens goes back."""
        return most_rungs(ctx_size, CHUNK_TOKENS) * snapshot_bytes(self.config)

    @property
    def state_bytes_per_token(self) -> float:
        """What a further token of context takes."""
        return sum(_entry_bytes(self.config, self.rows))


def facts_of_recipe(
    name: str, config: ModelConfig, recipe: Recipe, *, download_bytes: int | None = None
) -> ModelFacts:
    """Return what a network costs as the packed folder of a recipe."""
    resident: Counter[tuple[str, str]] = Counter()
    read: Counter[tuple[str, str]] = Counter()
    experts, total = [0] * config.n_layers, 0
    for weight in network_weights(config):
        nbytes = recipe.bytes_of(weight, config.n_layers)
        total += nbytes
        if weight.component == ROUTED:
            assert weight.layer is not None
            experts[weight.layer] += nbytes
        elif weight.component != EMBEDDING:
            key = (weight.component, recipe.format_of(weight.role, weight.layer, config.n_layers))
            resident[key] += nbytes
            read[key] += nbytes // weight.rows if weight.is_looked_up else nbytes
    gate, down = (recipe.format_of(role) for role in ("experts_gate_up", "experts_down"))
    return ModelFacts(
        name=name,
        quant=recipe.name,
        config=config,
        parts=tuple(Part(*key, nbytes, read[key]) for key, nbytes in resident.items()),
        expert_bytes=tuple(nbytes // config.n_experts for nbytes in experts),
        expert_format=gate if gate == down else f"{gate}+{down}",
        file_bytes=total,
        download_bytes=download_bytes,
    )


def held_state_bytes(
    config: ModelConfig,
    tokens: int,
    rows: RowFormat,
    slack: int = SLACK_TOKENS,
    limits: RowLimits = RowLimits(),
    sequences: int = 1,
) -> int:
    """Return the bytes of a `model.state.State` that holds `tokens`, or of several together.

    `limits` bounds the rows of all `sequences`, which hold `tokens` altogether.
    """
    rings = sum(_ring_bytes(config, layer, slack) for layer in range(config.n_layers))
    always, chosen = _entry_bytes(config, rows)
    return sequences * rings + limits.within(int(always * tokens), int(chosen * tokens))


def _ring_bytes(config: ModelConfig, layer: int, slack: int) -> int:
    shapes = ring_shapes(config, layer)
    return VALUE_BYTES * sum(shape.width * shape.capacity(slack) for shape in shapes)


def _entry_bytes(config: ModelConfig, rows: RowFormat) -> tuple[float, float]:
    """Return the bytes of rows for each token of context: always read, and chosen by an indexer."""
    key = rows.keys.nbytes(config.head_dim, config.rope_dim)
    index = rows.index.nbytes(config.index_head_dim, config.rope_dim)
    always = chosen = 0.0
    for kind, ratio in zip(config.layer_kinds, config.ratios, strict=True):
        if kind is LayerKind.CSA:
            always, chosen = always + index / ratio, chosen + key / ratio
        elif kind is LayerKind.HCA:
            always += key / ratio
    return always, chosen
