"""The roles of weight matrices, by which recipes choose formats."""

import re
from enum import StrEnum


class TensorClass(StrEnum):
    """What a matrix does in the network; small vectors have no class, they stay float32."""

    EMBEDDING = "embedding"
    HEAD = "head"
    ROUTER = "router"
    INDEXER = "indexer"
    COMPRESSOR = "compressor"
    HYPER_CONNECTIONS = "hyper_connections"
    ATTENTION_Q = "attention_q"
    ATTENTION_KV = "attention_kv"
    ATTENTION_O = "attention_o"
    SHARED_GATE_UP = "shared_gate_up"
    SHARED_DOWN = "shared_down"
    GATE_UP = "gate_up"
    DOWN = "down"


_PATTERNS = {
    TensorClass.EMBEDDING: r"embed\.weight",
    TensorClass.HEAD: r"head\.weight",
    TensorClass.ROUTER: r"ffn\.gate\.weight",
    TensorClass.INDEXER: r"attn\.indexer\.(wq_b|weights_proj)\.weight",
    TensorClass.COMPRESSOR: r"attn\.(indexer\.)?compressor\.(wkv|wgate)\.weight",
    TensorClass.HYPER_CONNECTIONS: r"hc_(attn|ffn|head)_fn",
    TensorClass.ATTENTION_Q: r"attn\.wq_[ab]\.weight",
    TensorClass.ATTENTION_KV: r"attn\.wkv\.weight",
    TensorClass.ATTENTION_O: r"attn\.wo_[ab]\.weight",
    TensorClass.SHARED_GATE_UP: r"ffn\.shared_experts\.w[13]\.weight",
    TensorClass.SHARED_DOWN: r"ffn\.shared_experts\.w2\.weight",
    TensorClass.GATE_UP: r"ffn\.experts\.\d+\.w[13]\.weight",
    TensorClass.DOWN: r"ffn\.experts\.\d+\.w2\.weight",
}
_CLASSES = tuple((kind, re.compile(pattern)) for kind, pattern in _PATTERNS.items())
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


def class_of(name: str) -> TensorClass:
    """Return the class of a matrix by its official name; ValueError if it is none of a network."""
    match = _LAYER.fullmatch(name)
    stem = match[2] if match else name
    for kind, pattern in _CLASSES:
        if pattern.fullmatch(stem):
            return kind
    raise ValueError(f"{name} is no matrix of the network")


def layer_of(name: str) -> int | None:
    """Return the number of the layer that a tensor belongs to, None for those of no layer."""
    match = _LAYER.fullmatch(name)
    return int(match[1]) if match else None
