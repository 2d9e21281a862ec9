"""Names of tensors in GGUF files of the architecture `deepseek4`, as llama.cpp spells them."""

import re
from collections.abc import Mapping

_ROOT: Mapping[str, str] = {
    "embed.weight": "token_embd.weight",
    "head.weight": "output.weight",
    "norm.weight": "output_norm.weight",
    **{f"hc_head_{part}": f"output_hc_{part}.weight" for part in ("fn", "base", "scale")},
}

_COMPRESSOR = {
    "wkv.weight": "kv.weight",
    "wgate.weight": "gate.weight",
    "norm.weight": "norm.weight",
    "ape": "ape.weight",
}

_LAYER: Mapping[str, str] = {
    "attn_norm.weight": "attn_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    **{
        f"hc_{site}_{part}": f"hc_{site}_{part}.weight"
        for site in ("attn", "ffn")
        for part in ("fn", "base", "scale")
    },
    "attn.attn_sink": "attn_sinks.weight",
    "attn.wq_a.weight": "attn_q_a.weight",
    "attn.q_norm.weight": "attn_q_a_norm.weight",
    "attn.wq_b.weight": "attn_q_b.weight",
    "attn.wkv.weight": "attn_kv.weight",
    "attn.kv_norm.weight": "attn_kv_a_norm.weight",
    "attn.wo_a.weight": "attn_output_a.weight",
    "attn.wo_b.weight": "attn_output_b.weight",
    **{f"attn.compressor.{own}": f"attn_compressor_{leaf}" for own, leaf in _COMPRESSOR.items()},
    "attn.indexer.wq_b.weight": "indexer.attn_q_b.weight",
    "attn.indexer.weights_proj.weight": "indexer.proj.weight",
    **{
        f"attn.indexer.compressor.{own}": f"indexer_compressor_{leaf}"
        for own, leaf in _COMPRESSOR.items()
    },
    "ffn.gate.weight": "ffn_gate_inp.weight",
    "ffn.gate.bias": "exp_probs_b.bias",
    "ffn.gate.tid2eid": "ffn_gate_tid2eid.weight",
    "ffn.shared_experts.w1.weight": "ffn_gate_shexp.weight",
    "ffn.shared_experts.w2.weight": "ffn_down_shexp.weight",
    "ffn.shared_experts.w3.weight": "ffn_up_shexp.weight",
    "ffn.experts.w1.weight": "ffn_gate_exps.weight",
    "ffn.experts.w2.weight": "ffn_down_exps.weight",
    "ffn.experts.w3.weight": "ffn_up_exps.weight",
}

_IN_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


def gguf_name(official: str) -> str:
    """Return the name in GGUF; that of all routed experts is `layers.N.ffn.experts.w1.weight`.

    Raises KeyError for a tensor that is none of the network.
    """
    match = _IN_LAYER.fullmatch(official)
    return f"blk.{match[1]}.{_LAYER[match[2]]}" if match else _ROOT[official]
