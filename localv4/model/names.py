"""One vocabulary for tensor names: every dialect is translated to the official checkpoint's names.

Known dialects: the official release, the hybrid that transformers' `save_pretrained` writes, the
plain transformers module names with fused experts, and GGUF with the aliases of early forks.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from localv4.errors import BadFileError
from localv4.storage import Checkpoint, StoredTensor


@dataclass(frozen=True, slots=True)
class Slice:
    """Consecutive rows of a stored tensor, seen as a matrix of its last dimension."""

    tensor: StoredTensor
    shape: tuple[int, ...]
    first_row: int = 0


_ROOT = {
    "embed_tokens.weight": "embed.weight",
    "lm_head.weight": "head.weight",
    "hc_head.hc_fn": "hc_head_fn",
    "hc_head.hc_base": "hc_head_base",
    "hc_head.hc_scale": "hc_head_scale",
    # GGUF, stems without the .weight suffix
    "token_embd": "embed.weight",
    "output": "head.weight",
    "output_norm": "norm.weight",
    "output_hc_fn": "hc_head_fn",
    "output_hc_base": "hc_head_base",
    "output_hc_scale": "hc_head_scale",
}

_TRANSFORMERS_LAYER = {
    "attn.norm.weight": "attn.kv_norm.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "attn_hc.fn": "hc_attn_fn",
    "attn_hc.base": "hc_attn_base",
    "attn_hc.scale": "hc_attn_scale",
    "ffn_hc.fn": "hc_ffn_fn",
    "ffn_hc.base": "hc_ffn_base",
    "ffn_hc.scale": "hc_ffn_scale",
    "self_attn.q_a_proj.weight": "attn.wq_a.weight",
    "self_attn.q_a_norm.weight": "attn.q_norm.weight",
    "self_attn.q_b_proj.weight": "attn.wq_b.weight",
    "self_attn.kv_proj.weight": "attn.wkv.weight",
    "self_attn.kv_norm.weight": "attn.kv_norm.weight",
    "self_attn.sinks": "attn.attn_sink",
    "self_attn.o_a_proj.weight": "attn.wo_a.weight",
    "self_attn.o_b_proj.weight": "attn.wo_b.weight",
    "self_attn.compressor.kv_proj.weight": "attn.compressor.wkv.weight",
    "self_attn.compressor.gate_proj.weight": "attn.compressor.wgate.weight",
    "self_attn.compressor.kv_norm.weight": "attn.compressor.norm.weight",
    "self_attn.compressor.position_bias": "attn.compressor.ape",
    "self_attn.compressor.indexer.q_b_proj.weight": "attn.indexer.wq_b.weight",
    "self_attn.compressor.indexer.scorer.weights_proj.weight": "attn.indexer.weights_proj.weight",
    "self_attn.compressor.indexer.kv_proj.weight": "attn.indexer.compressor.wkv.weight",
    "self_attn.compressor.indexer.gate_proj.weight": "attn.indexer.compressor.wgate.weight",
    "self_attn.compressor.indexer.kv_norm.weight": "attn.indexer.compressor.norm.weight",
    "self_attn.compressor.indexer.position_bias": "attn.indexer.compressor.ape",
    "mlp.gate.weight": "ffn.gate.weight",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.gate.tid2eid": "ffn.gate.tid2eid",
    "mlp.shared_experts.gate_proj.weight": "ffn.shared_experts.w1.weight",
    "mlp.shared_experts.down_proj.weight": "ffn.shared_experts.w2.weight",
    "mlp.shared_experts.up_proj.weight": "ffn.shared_experts.w3.weight",
}

_GGUF_LAYER = {
    "attn_norm": "attn_norm.weight",
    "ffn_norm": "ffn_norm.weight",
    "hc_attn_fn": "hc_attn_fn",
    "hc_attn_base": "hc_attn_base",
    "hc_attn_scale": "hc_attn_scale",
    "hc_ffn_fn": "hc_ffn_fn",
    "hc_ffn_base": "hc_ffn_base",
    "hc_ffn_scale": "hc_ffn_scale",
    "attn_sinks": "attn.attn_sink",
    "attn_q_a": "attn.wq_a.weight",
    "attn_q_a_norm": "attn.q_norm.weight",
    "attn_q_b": "attn.wq_b.weight",
    "attn_kv": "attn.wkv.weight",
    "attn_kv_latent": "attn.wkv.weight",
    "attn_kv_a_norm": "attn.kv_norm.weight",
    "attn_output_a": "attn.wo_a.weight",
    "attn_output_b": "attn.wo_b.weight",
    "indexer.attn_q_b": "attn.indexer.wq_b.weight",
    "indexer.proj": "attn.indexer.weights_proj.weight",
    "ffn_gate_inp": "ffn.gate.weight",
    "ffn_gate_tid2eid": "ffn.gate.tid2eid",
    "exp_probs_b": "ffn.gate.bias",
    "ffn_gate_shexp": "ffn.shared_experts.w1.weight",
    "ffn_down_shexp": "ffn.shared_experts.w2.weight",
    "ffn_up_shexp": "ffn.shared_experts.w3.weight",
}
_GGUF_LAYER |= {
    f"{stem}_{leaf}": f"{official}.{name}"
    for stem, official in (
        ("attn_compressor", "attn.compressor"),
        ("attn_compress", "attn.compressor"),
        ("indexer_compressor", "attn.indexer.compressor"),
        ("indexer.compress", "attn.indexer.compressor"),
    )
    for leaf, name in (
        ("kv", "wkv.weight"),
        ("gate", "wgate.weight"),
        ("norm", "norm.weight"),
        ("ape", "ape"),
    )
}

# fused experts: name -> which parts its rows hold, in order
_FUSED_EXPERTS = {
    "mlp.experts.gate_up_proj": ("w1", "w3"),
    "mlp.experts.down_proj": ("w2",),
    "ffn_gate_exps": ("w1",),
    "ffn_down_exps": ("w2",),
    "ffn_up_exps": ("w3",),
}

_SAFETENSORS_LAYER_NAME = re.compile(r"layers\.(\d{1,4})\.(.+)")
_GGUF_LAYER_NAME = re.compile(r"blk\.(\d{1,4})\.(.+)")


def official_names(checkpoint: Checkpoint) -> dict[str, Slice]:
    """Map official names to where their values lie; tensors of drafting modules are left out.

    Raises BadFileError when two stored tensors claim the same name.
    """
    translate = _from_gguf if checkpoint.kind == "gguf" else _from_safetensors
    table: dict[str, Slice] = {}
    for tensor in checkpoint.tensors.values():
        for name, part in translate(tensor, checkpoint):
            if name in table:
                raise BadFileError(
                    checkpoint.files[tensor.file],
                    f"tensors {table[name].tensor.name!r} and {tensor.name!r} both mean {name}",
                )
            table[name] = part
    return table


def _from_safetensors(tensor: StoredTensor, checkpoint: Checkpoint) -> Iterator[tuple[str, Slice]]:
    name = tensor.name.removeprefix("model.")
    if name.startswith("mtp."):
        return
    match = _SAFETENSORS_LAYER_NAME.fullmatch(name)
    if match is None:
        yield _ROOT.get(name, name), Slice(tensor, tensor.shape)
        return
    prefix, leaf = f"layers.{int(match[1])}.", match[2]
    if leaf in _FUSED_EXPERTS:
        yield from _experts(tensor, prefix, _FUSED_EXPERTS[leaf], checkpoint)
    else:
        yield prefix + _TRANSFORMERS_LAYER.get(leaf, leaf), Slice(tensor, tensor.shape)


def _from_gguf(tensor: StoredTensor, checkpoint: Checkpoint) -> Iterator[tuple[str, Slice]]:
    stem = tensor.name.removesuffix(".weight").removesuffix(".bias")
    match = _GGUF_LAYER_NAME.fullmatch(stem)
    if match is None:
        yield _ROOT.get(stem, tensor.name), Slice(tensor, tensor.shape)
        return
    prefix, leaf = f"layers.{int(match[1])}.", match[2]
    if leaf in _FUSED_EXPERTS:
        yield from _experts(tensor, prefix, _FUSED_EXPERTS[leaf], checkpoint)
    elif leaf in _GGUF_LAYER:
        yield prefix + _GGUF_LAYER[leaf], Slice(tensor, tensor.shape)


def _experts(
    tensor: StoredTensor, prefix: str, parts: tuple[str, ...], checkpoint: Checkpoint
) -> Iterator[tuple[str, Slice]]:
    if len(tensor.shape) != 3 or tensor.shape[1] % len(parts):
        raise BadFileError(
            checkpoint.files[tensor.file],
            f"tensor {tensor.name!r} has shape {tensor.shape}, expected experts x rows x columns",
        )
    experts, rows, cols = tensor.shape
    per_part = rows // len(parts)
    for expert in range(experts):
        for i, part in enumerate(parts):
            name = f"{prefix}ffn.experts.{expert}.{part}.weight"
            first = expert * rows + i * per_part
            yield name, Slice(tensor, (per_part, cols), first)
