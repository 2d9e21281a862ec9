"""Random weights of a tiny model, under official names, drawn in the order of torch's modules.

A fresh model of transformers has zeros in sinks, biases, position biases and `tid2eid`; here all
are filled, so that a mistake in any of them shows.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.presets import CSA, SLIDING, Preset
from golden.torch_random import TorchRandom

Array = NDArray[np.float32] | NDArray[np.int64]
Plan = Iterator[tuple[str, tuple[int, ...], str]]


def random_weights(preset: Preset) -> dict[str, Array]:
    """Return float32 tensors (`tid2eid`: int64) in [out, in] order."""
    settings = preset.settings
    random = TorchRandom(preset.seed)
    weights: dict[str, Array] = {}
    for name, shape, role in weight_plan(settings, preset.layer_types):
        if role == "tid2eid":
            chosen = random.permutations(shape[0], settings["n_routed_experts"])
            weights[name] = np.ascontiguousarray(chosen[:, : shape[1]])
        elif role == "experts":
            _split_experts(weights, name, _draw(random, shape, "linear"))
        else:
            weights[name] = _draw(random, shape, role)
    return weights


def input_ids(preset: Preset) -> NDArray[np.int64]:
    """Return the prompt of a fixture: the bos token, then random ones."""
    ids = TorchRandom(preset.seed + 1).integers(preset.dims["vocab_size"], preset.length)
    ids[0] = preset.settings["bos_token_id"]
    return ids


def weight_plan(settings: Mapping[str, Any], layer_types: list[str]) -> Plan:
    """Yield name, shape and role of each tensor: transformers' parameters, then its buffers.

    Role "experts": all experts at once, either w1 above w3 (E, 2I, D) or w2 (E, D, I).
    """
    c = settings
    streams = c["hc_mult"]
    yield "embed.weight", (c["vocab_size"], c["hidden_size"]), "embedding"
    for layer, kind in enumerate(layer_types):
        prefix = f"layers.{layer}."
        yield from _attention_plan(c, prefix + "attn.")
        if kind != SLIDING:
            rate = c["compress_ratios"][layer]
            yield from _compressor_plan(c, prefix + "attn.", rate, has_indexer=kind == CSA)
        yield from _expert_plan(c, prefix + "ffn.")
        yield prefix + "attn_norm.weight", (c["hidden_size"],), "norm"
        yield prefix + "ffn_norm.weight", (c["hidden_size"],), "norm"
        for site in ("attn", "ffn"):
            mixes = (2 + streams) * streams
            yield prefix + f"hc_{site}_fn", (mixes, streams * c["hidden_size"]), "hc_fn"
            yield prefix + f"hc_{site}_base", (mixes,), "half"
            yield prefix + f"hc_{site}_scale", (3,), "hc_scale"
    yield "norm.weight", (c["hidden_size"],), "norm"
    yield "hc_head_fn", (streams, streams * c["hidden_size"]), "hc_fn"
    yield "hc_head_base", (streams,), "half"
    yield "hc_head_scale", (1,), "hc_scale"
    yield "head.weight", (c["vocab_size"], c["hidden_size"]), "linear"
    for layer in range(len(layer_types)):
        gate = f"layers.{layer}.ffn.gate."
        if layer < c["num_hash_layers"]:
            yield gate + "tid2eid", (c["vocab_size"], c["num_experts_per_tok"]), "tid2eid"
        else:
            yield gate + "bias", (c["n_routed_experts"],), "router_bias"


def _attention_plan(c: Mapping[str, Any], prefix: str) -> Plan:
    hidden, head_dim, rank = c["hidden_size"], c["head_dim"], c["q_lora_rank"]
    query, output = c["num_attention_heads"] * head_dim, c["o_groups"] * c["o_lora_rank"]
    yield prefix + "attn_sink", (c["num_attention_heads"],), "sink"
    yield prefix + "wq_a.weight", (rank, hidden), "linear"
    yield prefix + "q_norm.weight", (rank,), "norm"
    yield prefix + "wq_b.weight", (query, rank), "linear"
    yield prefix + "wkv.weight", (head_dim, hidden), "linear"
    yield prefix + "kv_norm.weight", (head_dim,), "norm"
    yield prefix + "wo_a.weight", (output, query // c["o_groups"]), "linear"
    yield prefix + "wo_b.weight", (hidden, output), "linear"


def _compressor_plan(c: Mapping[str, Any], prefix: str, rate: int, *, has_indexer: bool) -> Plan:
    widths = {"compressor.": c["head_dim"] * (2 if has_indexer else 1)}
    if has_indexer:
        widths["indexer.compressor."] = 2 * c["index_head_dim"]
    for part, width in widths.items():
        norm = width // 2 if has_indexer else width
        yield prefix + part + "ape", (rate, width), "half"
        yield prefix + part + "wkv.weight", (width, c["hidden_size"]), "linear"
        yield prefix + part + "wgate.weight", (width, c["hidden_size"]), "linear"
        yield prefix + part + "norm.weight", (norm,), "norm"
    if has_indexer:
        heads, indexer = c["index_n_heads"], prefix + "indexer."
        yield indexer + "wq_b.weight", (heads * c["index_head_dim"], c["q_lora_rank"]), "linear"
        yield indexer + "weights_proj.weight", (heads, c["hidden_size"]), "linear"


def _expert_plan(c: Mapping[str, Any], prefix: str) -> Plan:
    experts, inner, hidden = c["n_routed_experts"], c["moe_intermediate_size"], c["hidden_size"]
    yield prefix + "gate.weight", (experts, hidden), "linear"
    yield prefix + "experts", (experts, 2 * inner, hidden), "experts"
    yield prefix + "experts", (experts, hidden, inner), "experts"
    yield prefix + "shared_experts.w1.weight", (inner, hidden), "linear"
    yield prefix + "shared_experts.w3.weight", (inner, hidden), "linear"
    yield prefix + "shared_experts.w2.weight", (hidden, inner), "linear"


def _draw(random: TorchRandom, shape: tuple[int, ...], role: str) -> NDArray[np.float32]:
    count = int(np.prod(shape))
    if role == "hc_scale":
        return (np.float32(0.5) + random.uniform(count)).reshape(shape)
    spread = {
        "embedding": 1.0,
        "sink": 0.7,
        "half": 0.5,
        "router_bias": 0.2,
        "norm": 0.2,
        "hc_fn": shape[-1] ** -0.5,
        "linear": 1.3 * shape[-1] ** -0.5,
    }[role]
    values = (random.normal(count) * np.float32(spread)).reshape(shape)
    return np.float32(1) + values if role == "norm" else values


def _split_experts(weights: dict[str, Array], prefix: str, fused: NDArray[np.float32]) -> None:
    """Store each expert on its own; a fused tensor that is there already was w1 above w3."""
    is_gate_up = f"{prefix}.0.w1.weight" not in weights
    for expert, matrix in enumerate(fused):
        if is_gate_up:
            gate, up = np.split(matrix, 2)
            weights[f"{prefix}.{expert}.w1.weight"] = gate
            weights[f"{prefix}.{expert}.w3.weight"] = up
        else:
            weights[f"{prefix}.{expert}.w2.weight"] = matrix
