"""Tensor names: official, the two of transformers, and GGUF."""

import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from golden.weights import Array

# Within a layer, official -> module of the transformers model.
MODULE_NAMES = {
    "attn.attn_sink": "self_attn.sinks",
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv.weight": "self_attn.kv_proj.weight",
    "attn.kv_norm.weight": "self_attn.kv_norm.weight",
    "attn.wo_a.weight": "self_attn.o_a_proj.weight",
    "attn.wo_b.weight": "self_attn.o_b_proj.weight",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.compressor.wkv.weight": "self_attn.compressor.kv_proj.weight",
    "attn.compressor.wgate.weight": "self_attn.compressor.gate_proj.weight",
    "attn.compressor.norm.weight": "self_attn.compressor.kv_norm.weight",
    "attn.indexer.compressor.ape": "self_attn.compressor.indexer.position_bias",
    "attn.indexer.compressor.wkv.weight": "self_attn.compressor.indexer.kv_proj.weight",
    "attn.indexer.compressor.wgate.weight": "self_attn.compressor.indexer.gate_proj.weight",
    "attn.indexer.compressor.norm.weight": "self_attn.compressor.indexer.kv_norm.weight",
    "attn.indexer.wq_b.weight": "self_attn.compressor.indexer.q_b_proj.weight",
    "attn.indexer.weights_proj.weight": "self_attn.compressor.indexer.scorer.weights_proj.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
    **{
        f"hc_{site}_{part}": f"{site}_hc.{part}"
        for site in ("attn", "ffn")
        for part in ("fn", "base", "scale")
    },
}

# Within a layer, official -> GGUF; experts are fused under the last three.
GGUF_NAMES = {
    "attn.attn_sink": "attn_sinks.weight",
    "attn.wq_a.weight": "attn_q_a.weight",
    "attn.q_norm.weight": "attn_q_a_norm.weight",
    "attn.wq_b.weight": "attn_q_b.weight",
    "attn.wkv.weight": "attn_kv.weight",
    "attn.kv_norm.weight": "attn_kv_a_norm.weight",
    "attn.wo_a.weight": "attn_output_a.weight",
    "attn.wo_b.weight": "attn_output_b.weight",
    "attn.compressor.ape": "attn_compressor_ape.weight",
    "attn.compressor.wkv.weight": "attn_compressor_kv.weight",
    "attn.compressor.wgate.weight": "attn_compressor_gate.weight",
    "attn.compressor.norm.weight": "attn_compressor_norm.weight",
    "attn.indexer.compressor.ape": "indexer_compressor_ape.weight",
    "attn.indexer.compressor.wkv.weight": "indexer_compressor_kv.weight",
    "attn.indexer.compressor.wgate.weight": "indexer_compressor_gate.weight",
    "attn.indexer.compressor.norm.weight": "indexer_compressor_norm.weight",
    "attn.indexer.wq_b.weight": "indexer.attn_q_b.weight",
    "attn.indexer.weights_proj.weight": "indexer.proj.weight",
    "attn_norm.weight": "attn_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "ffn.gate.weight": "ffn_gate_inp.weight",
    "ffn.gate.bias": "exp_probs_b.bias",
    "ffn.gate.tid2eid": "ffn_gate_tid2eid.weight",
    "ffn.shared_experts.w1.weight": "ffn_gate_shexp.weight",
    "ffn.shared_experts.w2.weight": "ffn_down_shexp.weight",
    "ffn.shared_experts.w3.weight": "ffn_up_shexp.weight",
    **{
        f"hc_{site}_{part}": f"hc_{site}_{part}.weight"
        for site in ("attn", "ffn")
        for part in ("fn", "base", "scale")
    },
    "ffn.experts.w1.weight": "ffn_gate_exps.weight",
    "ffn.experts.w2.weight": "ffn_down_exps.weight",
    "ffn.experts.w3.weight": "ffn_up_exps.weight",
}

ROOT_MODULE_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    **{f"hc_head_{part}": f"model.hc_head.hc_{part}" for part in ("fn", "base", "scale")},
}
ROOT_GGUF_NAMES = {
    "embed.weight": "token_embd.weight",
    "head.weight": "output.weight",
    "norm.weight": "output_norm.weight",
    **{f"hc_head_{part}": f"output_hc_{part}.weight" for part in ("fn", "base", "scale")},
}


def layer_and_rest(name: str) -> tuple[int, str]:
    """Split `layers.3.attn.wkv.weight` into 3 and `attn.wkv.weight`."""
    _, layer, rest = name.split(".", 2)
    return int(layer), rest


def hybrid_name(name: str) -> str:
    """Return what `save_pretrained` of transformers makes of an official name."""
    if name == "head.weight":
        return name
    if name in ROOT_MODULE_NAMES:
        return ROOT_MODULE_NAMES[name]
    return "model." + name.replace("attn.kv_norm", "attn.norm")


def module_weights(weights: Mapping[str, Array]) -> dict[str, Array]:
    """Return the state dict of the transformers model, experts of a layer fused."""
    renamed: dict[str, Array] = {}
    for name, values in weights.items():
        if name in ROOT_MODULE_NAMES:
            renamed[ROOT_MODULE_NAMES[name]] = values
        elif ".experts." not in name:
            layer, rest = layer_and_rest(name)
            renamed[f"model.layers.{layer}.{MODULE_NAMES[rest]}"] = values
    for layer, (gate, down, up) in stacked_experts(weights).items():
        experts = f"model.layers.{layer}.mlp.experts."
        renamed[experts + "gate_up_proj"] = np.concatenate([gate, up], axis=1)
        renamed[experts + "down_proj"] = down
    return renamed


def stacked_experts(weights: Mapping[str, Array]) -> dict[int, tuple[Array, Array, Array]]:
    """Return w1, w2 and w3 of all experts of each layer, (E, out, in) each."""
    counts: dict[int, int] = {}
    for name in weights:
        if match := re.fullmatch(r"layers\.(\d+)\.ffn\.experts\.(\d+)\.w1\.weight", name):
            layer = int(match[1])
            counts[layer] = max(counts.get(layer, 0), int(match[2]) + 1)
    return {layer: _stack_layer(weights, layer, count) for layer, count in counts.items()}


def _stack_layer(
    weights: Mapping[str, Array], layer: int, count: int
) -> tuple[Array, Array, Array]:
    def stack(part: str) -> NDArray[np.float32]:
        names = (f"layers.{layer}.ffn.experts.{expert}.{part}.weight" for expert in range(count))
        return np.stack([weights[name].astype(np.float32, copy=False) for name in names])

    return stack("w1"), stack("w2"), stack("w3")
