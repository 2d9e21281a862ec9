"""What one token costs: the bytes that decoding it reads, and its multiplications, by component.

Counted from the weights themselves: bytes as they are stored for what is multiplied as it is
stored, packed bytes for what was packed. Everything is counted once, however often a cache
serves it again.
"""

from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass

from localv4.kernels import row_operations
from localv4.kernels.row_operations import RowFormat
from localv4.model.config import LayerKind, ModelConfig
from localv4.model.matrix import F32, Floats, Matrix
from localv4.model.packing import PackedExpert, PackedMatrix, expert_form
from localv4.model.weights import Expert, Layer, Router, Weights

VALUE_BYTES = F32().itemsize  # of a value in the decoder state
COMPONENTS = (
    "routed experts",
    "shared experts",
    "attention",
    "compressor and indexer",
    "router",
    "hyper-connections",
    "norms",
    "head",
    "embedding row",
)


def weight_bytes(weights: Weights, config: ModelConfig, *, packs_experts: bool) -> dict[str, int]:
    """Return the weight bytes that one decoded token reads, by component.

    `packs_experts`: experts that have a packed form are read in it, as `fast` does. Which experts
    a token takes is chance, so each layer counts with the mean of its experts.
    """
    found = dict.fromkeys(COMPONENTS, 0)
    for layer in weights.layers:
        _add_layer(found, layer)
        experts = [_expert_bytes(expert, packs_experts) for expert in layer.experts]
        found["routed experts"] += sum(experts) * config.experts_per_token // len(experts)
    found["hyper-connections"] += _bytes(weights.head_hc)
    found["norms"] += _bytes(weights.norm)
    found["head"] += _bytes(weights.head)
    found["embedding row"] += weights.embed.nbytes // weights.embed.rows
    return found


def _add_layer(found: dict[str, int], layer: Layer) -> None:
    """Count everything of a layer but its routed experts."""
    attention = layer.attention
    inside = [part for part in (attention.compressor, attention.indexer) if part is not None]
    compressors = [attention.compressor]
    if attention.indexer is not None:
        compressors.append(attention.indexer.compressor)
    # of the values that are added by position, a token needs one row
    unread = sum(c.ape[1:].nbytes for c in compressors if c is not None)
    compressing = sum(_bytes(part) for part in inside)
    found["compressor and indexer"] += compressing - unread
    found["attention"] += _bytes(attention) - compressing
    found["shared experts"] += _bytes(layer.shared)
    found["router"] += _router_bytes(layer.router)
    found["hyper-connections"] += _bytes(layer.attn_hc) + _bytes(layer.ffn_hc)
    found["norms"] += _bytes(layer.attn_norm) + _bytes(layer.ffn_norm)


def _router_bytes(router: Router) -> int:
    row = router.table[0].nbytes if router.table is not None else 0
    return _bytes(router.weight) + _bytes(router.bias) + row


def _expert_bytes(expert: Expert, packs: bool) -> int:
    form = expert_form(expert) if packs else None
    if form is None:
        return _bytes(expert)
    return form.nbytes


def _bytes(node: object) -> int:
    """Return the bytes of all weights in a part of the tree, in the form that is multiplied."""
    if isinstance(node, PackedExpert):
        return node.record.nbytes
    return sum(_leaf_bytes(leaf) for leaf in _leaves(node))


def _leaf_bytes(leaf: Matrix | Floats) -> int:
    if isinstance(leaf, PackedMatrix):
        return leaf.packed.nbytes + (leaf.scales.nbytes if leaf.scales is not None else 0)
    return leaf.nbytes


def _leaves(node: object) -> Iterator[Matrix | Floats]:
    """Yield the matrices and float arrays of a tree of dataclasses."""
    if node is None or isinstance(node, int):
        return
    if isinstance(node, Matrix):
        yield node
    elif isinstance(node, Expert):
        yield from (node.w1, node.w2, node.w3)
    elif is_dataclass(node):
        for field in fields(node):
            yield from _leaves(getattr(node, field.name))
    elif isinstance(node, tuple):
        for part in node:
            yield from _leaves(part)
    else:
        yield node  # type: ignore[misc]


def state_bytes(
    config: ModelConfig, positions: Iterable[int], stored: RowFormat = row_operations.F32
) -> int:
    """Return the bytes of decoder state that a token at one of `positions` reads, their mean.

    `positions` are counted from 0 and not empty: a token at position p has p tokens before it.
    """
    layers = list(zip(config.layer_kinds, config.ratios, strict=True))
    sizes = [
        sum(_layer_state_bytes(config, kind, ratio, position, stored) for kind, ratio in layers)
        for position in positions
    ]
    return sum(sizes) // len(sizes)


def _layer_state_bytes(
    config: ModelConfig, kind: LayerKind, ratio: int, position: int, stored: RowFormat
) -> int:
    seen = position + 1
    rows, width = min(config.window, seen), config.head_dim
    if kind is LayerKind.SLIDING:
        return VALUE_BYTES * rows * width
    entries, key = seen // ratio, stored.keys.nbytes(width, config.rope_dim)
    # keys and gates of `reach` windows are pooled once in `ratio` tokens: their mean
    reach = 2 if kind is LayerKind.CSA else 1
    pooled = 2 * reach * width
    if kind is LayerKind.HCA:
        return VALUE_BYTES * (rows * width + pooled) + entries * key
    pooled += 2 * reach * config.index_head_dim
    chosen = min(config.index_top_k, entries)
    scored = entries if entries > config.index_top_k else 0  # fewer are all taken unseen
    index = stored.index.nbytes(config.index_head_dim, config.rope_dim)
    return VALUE_BYTES * (rows * width + pooled) + chosen * key + scored * index


def multiplications(weights: Weights, config: ModelConfig) -> int:
    """Return the multiply-adds of one token with weight matrices, embedding and head left out.

    Attention scores are not counted: they are no products with weights.
    """
    total = _multiplications(weights.head_hc)
    for layer in weights.layers:
        used = config.experts_per_token * _multiplications(layer.experts[0])
        parts = (layer.attn_hc, layer.attention, layer.ffn_hc, layer.router.weight, layer.shared)
        total += used + sum(_multiplications(part) for part in parts)
    return total


def _multiplications(node: object) -> int:
    return sum(leaf.rows * leaf.cols for leaf in _leaves(node) if isinstance(leaf, Matrix))


def head_multiplications(weights: Weights) -> int:
    """Return the multiply-adds of the head, which a prompt needs for its last token only."""
    return _multiplications(weights.head)


def parameters(weights: Weights) -> int:
    """Return the number of weights in the network; the balancing biases of routers do not count."""
    biases = (layer.router.bias for layer in weights.layers)
    balancing = sum(bias.size for bias in biases if bias is not None)
    tables = sum(x.router.table.size for x in weights.layers if x.router.table is not None)
    total = sum(
        leaf.rows * leaf.cols if isinstance(leaf, Matrix) else leaf.size
        for leaf in _leaves(weights)
    )
    return total - balancing - tables
