"""Official names of matrices as an importance matrix has them: GGUF names, experts fused."""

import re
from dataclasses import dataclass

ROOT = {"head.weight": "output.weight", "hc_head_fn": "output_hc_fn.weight"}

LAYER = {
    "hc_attn_fn": "hc_attn_fn",
    "hc_ffn_fn": "hc_ffn_fn",
    "attn.wq_a.weight": "attn_q_a",
    "attn.wq_b.weight": "attn_q_b",
    "attn.wkv.weight": "attn_kv",
    "attn.wo_a.weight": "attn_output_a",
    "attn.wo_b.weight": "attn_output_b",
    "attn.compressor.wkv.weight": "attn_compressor_kv",
    "attn.compressor.wgate.weight": "attn_compressor_gate",
    "attn.indexer.wq_b.weight": "indexer.attn_q_b",
    "attn.indexer.weights_proj.weight": "indexer.proj",
    "attn.indexer.compressor.wkv.weight": "indexer_compressor_kv",
    "attn.indexer.compressor.wgate.weight": "indexer_compressor_gate",
    "ffn.gate.weight": "ffn_gate_inp",
    "ffn.shared_experts.w1.weight": "ffn_gate_shexp",
    "ffn.shared_experts.w2.weight": "ffn_down_shexp",
    "ffn.shared_experts.w3.weight": "ffn_up_shexp",
}

EXPERTS = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}

_LAYER_NAME = re.compile(r"layers\.(\d+)\.(.+)")
_EXPERT_NAME = re.compile(r"ffn\.experts\.(\d+)\.(w[123])\.weight")


@dataclass(frozen=True, slots=True)
class Place:
    """Where the statistics of a matrix are: under which name, and in which row if it is fused."""

    name: str
    expert: int | None = None


def place_of(official: str) -> Place | None:
    """Return where the statistics of a matrix are; None for what no product reads."""
    if official in ROOT:
        return Place(ROOT[official])
    layer = _LAYER_NAME.fullmatch(official)
    if layer is None:
        return None
    expert = _EXPERT_NAME.fullmatch(layer[2])
    if expert is not None:
        return Place(f"blk.{int(layer[1])}.{EXPERTS[expert[2]]}.weight", int(expert[1]))
    stem = LAYER.get(layer[2])
    return None if stem is None else Place(f"blk.{int(layer[1])}.{stem}.weight")
