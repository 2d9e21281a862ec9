"""Every weight of a network, counted from its configuration alone: no file is needed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from localv4.model.config import LayerKind, ModelConfig

Role = Literal[
    "experts_gate_up",
    "experts_down",
    "shared_gate_up",
    "shared_down",
    "attention_q",
    "attention_o",
    "attention_kv",
    "indexer",
    "index_weights",
    "compressor",
    "router",
    "head",
    "embedding",
    "mixing",
    "floats",
    "table",
]
"""What decides about the precision of a weight; `mixing` are the hyper-connections."""


@dataclass(frozen=True, slots=True)
class Weight:
    """`count` equal matrices of a role in a layer (None: of no layer).

    `component` is one of `model.traffic.COMPONENTS`; `used` of the matrices take part in a token.
    A token reads one row of a matrix that is looked up.
    """

    component: str
    role: Role
    layer: int | None
    rows: int
    cols: int
    count: int = 1
    used: int = 1
    is_looked_up: bool = False

    @property
    def size(self) -> int:
        """Numbers in all of the matrices."""
        return self.rows * self.cols * self.count

    @property
    def multiply_adds(self) -> int:
        """Of one token with these matrices."""
        is_matrix = self.role not in ("floats", "table") and not self.is_looked_up
        return self.rows * self.cols * self.used if is_matrix else 0


def network_weights(config: ModelConfig) -> Iterator[Weight]:
    """Yield everything that the forward pass of a network needs, drafting modules left out."""
    hidden, streams = config.hidden_size, config.hc_mult
    yield Weight("embedding row", "embedding", None, config.vocab_size, hidden, is_looked_up=True)
    for layer in range(config.n_layers):
        yield from _layer(config, layer)
    yield from _mixing(None, streams, streams * hidden, 1)
    yield _floats("norms", None, hidden)
    yield Weight("head", "head", None, config.vocab_size, hidden)


def parameters(config: ModelConfig) -> int:
    """Return the number of weights as publishers count them: all but the tables of experts."""
    return sum(weight.size for weight in network_weights(config) if weight.role != "table")


def multiply_adds(config: ModelConfig) -> int:
    """Return the multiply-adds of one token with weight matrices, the head left out."""
    return sum(w.multiply_adds for w in network_weights(config) if w.role != "head")


def _layer(config: ModelConfig, layer: int) -> Iterator[Weight]:
    hidden, streams = config.hidden_size, config.hc_mult
    mixes = (2 + streams) * streams
    for _ in range(2):
        yield from _mixing(layer, mixes, streams * hidden, 3)
        yield _floats("norms", layer, hidden)
    yield from _attention(config, layer)
    yield from _router(config, layer)
    width, used = config.expert_width, config.experts_per_token
    shared = width * config.shared_experts
    yield Weight("shared experts", "shared_gate_up", layer, shared, hidden, 2, 2)
    yield Weight("shared experts", "shared_down", layer, hidden, shared)
    routed, count = "routed experts", config.n_experts
    yield Weight(routed, "experts_gate_up", layer, width, hidden, 2 * count, 2 * used)
    yield Weight(routed, "experts_down", layer, hidden, width, count, used)


def _mixing(layer: int | None, mixes: int, width: int, scales: int) -> Iterator[Weight]:
    component = "hyper-connections"
    yield Weight(component, "mixing", layer, mixes, width)
    yield _floats(component, layer, mixes)
    yield _floats(component, layer, scales)


def _floats(component: str, layer: int | None, size: int) -> Weight:
    return Weight(component, "floats", layer, 1, size)


def _router(config: ModelConfig, layer: int) -> Iterator[Weight]:
    yield Weight("router", "router", layer, config.n_experts, config.hidden_size)
    if config.hashed[layer]:
        size = config.vocab_size, config.experts_per_token
        yield Weight("router", "table", layer, *size, is_looked_up=True)
    else:
        yield _floats("router", layer, config.n_experts)


def _attention(config: ModelConfig, layer: int) -> Iterator[Weight]:
    name, hidden, rank = "attention", config.hidden_size, config.q_lora_rank
    heads, out = config.n_heads * config.head_dim, config.o_groups * config.o_lora_rank
    yield Weight(name, "attention_q", layer, rank, hidden)
    yield Weight(name, "attention_q", layer, heads, rank)
    yield Weight(name, "attention_kv", layer, config.head_dim, hidden)
    yield Weight(name, "attention_o", layer, out, heads // config.o_groups)
    yield Weight(name, "attention_o", layer, hidden, out)
    for size in (rank, config.head_dim, config.n_heads):
        yield _floats(name, layer, size)
    kind, ratio = config.layer_kinds[layer], config.ratios[layer]
    if kind is LayerKind.SLIDING:
        return
    overlap = 2 if kind is LayerKind.CSA else 1
    yield from _compressor(layer, hidden, ratio, overlap, config.head_dim)
    if kind is LayerKind.CSA:
        name, width = "compressor and indexer", config.index_heads * config.index_head_dim
        yield Weight(name, "indexer", layer, width, rank)
        yield Weight(name, "index_weights", layer, config.index_heads, hidden)
        yield from _compressor(layer, hidden, ratio, 2, config.index_head_dim)


def _compressor(
    layer: int, hidden: int, ratio: int, overlap: int, head_dim: int
) -> Iterator[Weight]:
    name, width = "compressor and indexer", overlap * head_dim
    yield Weight(name, "compressor", layer, width, hidden, 2, 2)
    yield _floats(name, layer, head_dim)
    yield Weight(name, "floats", layer, ratio, width, is_looked_up=True)
