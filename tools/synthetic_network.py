"""The released networks at true dimensions: their configuration, and every tensor of a layer."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

HEAD_STREAMS = 4
MIXES = (2 + HEAD_STREAMS) * HEAD_STREAMS
WHOLE_PATTERN = 5
"""From so many layers on, the first layers of a release hold every kind of layer."""


@dataclass(frozen=True, slots=True)
class Network:
    """Dimensions of one network; `ratios` has an entry for each layer: 0, 4 or 128."""

    hidden: int
    heads: int
    q_rank: int
    groups: int
    experts: int
    inner: int
    index_top_k: int
    routed_scaling: float
    ratios: tuple[int, ...]
    hashed: int
    vocab: int = 129_280
    head_dim: int = 512
    rope_dim: int = 64
    o_rank: int = 1024
    used: int = 6
    index_heads: int = 64
    index_dim: int = 128
    window: int = 128
    skew: float = 0.05


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor by official name; a role decides about type and magnitude."""

    name: str
    shape: tuple[int, ...]
    role: str


NETWORKS = {
    "flash": Network(
        hidden=4096,
        heads=64,
        q_rank=1024,
        groups=8,
        experts=256,
        inner=2048,
        index_top_k=512,
        routed_scaling=1.5,
        ratios=(0, 0, *(4, 128) * 20, 4),
        hashed=3,
    ),
    "pro": Network(
        hidden=7168,
        heads=128,
        q_rank=1536,
        groups=16,
        experts=384,
        inner=3072,
        index_top_k=1024,
        routed_scaling=2.5,
        ratios=(128, 128, *(4, 128) * 29, 4),
        hashed=3,
    ),
}


def sliced(network: Network, layers: int) -> tuple[tuple[int, ...], int]:
    """Return the ratios of the first `layers` layers and how many of them are hashed.

    A slice that is too short to hold every kind takes one layer of each kind in turn, one hashed.
    """
    if layers >= WHOLE_PATTERN:
        return network.ratios[:layers], network.hashed
    return (network.ratios[0], 4, 128, 4)[:layers], 1


def root_tensors(network: Network) -> Iterator[Tensor]:
    """Yield what belongs to no layer."""
    width = HEAD_STREAMS * network.hidden
    yield Tensor("embed.weight", (network.vocab, network.hidden), "embedding")
    yield Tensor("head.weight", (network.vocab, network.hidden), "head")
    yield Tensor("norm.weight", (network.hidden,), "norm")
    yield Tensor("hc_head_fn", (HEAD_STREAMS, width), "mixing")
    yield Tensor("hc_head_base", (HEAD_STREAMS,), "mixing_base")
    yield Tensor("hc_head_scale", (1,), "mixing_scale")


def layer_tensors(network: Network, layer: int) -> Iterator[Tensor]:
    """Yield the tensors of a layer, its routed experts left out."""
    n, prefix = network, f"layers.{layer}."
    for site in ("attn", "ffn"):
        yield Tensor(f"{prefix}{site}_norm.weight", (n.hidden,), "norm")
        width = HEAD_STREAMS * n.hidden
        yield Tensor(f"{prefix}hc_{site}_fn", (MIXES, width), "mixing")
        yield Tensor(f"{prefix}hc_{site}_base", (MIXES,), "mixing_base")
        yield Tensor(f"{prefix}hc_{site}_scale", (3,), "mixing_scale")
    yield from _attention(n, prefix + "attn.", n.ratios[layer])
    gate = prefix + "ffn.gate."
    yield Tensor(gate + "weight", (n.experts, n.hidden), "router")
    if layer < n.hashed:
        yield Tensor(gate + "tid2eid", (n.vocab, n.used), "table")
    else:
        yield Tensor(gate + "bias", (n.experts,), "bias")
    shared = prefix + "ffn.shared_experts."
    yield Tensor(shared + "w1.weight", (n.inner, n.hidden), "shared")
    yield Tensor(shared + "w2.weight", (n.hidden, n.inner), "shared")
    yield Tensor(shared + "w3.weight", (n.inner, n.hidden), "shared")


def _attention(n: Network, prefix: str, ratio: int) -> Iterator[Tensor]:
    width, out = n.heads * n.head_dim, n.groups * n.o_rank
    yield Tensor(prefix + "wq_a.weight", (n.q_rank, n.hidden), "attention")
    yield Tensor(prefix + "q_norm.weight", (n.q_rank,), "norm")
    yield Tensor(prefix + "wq_b.weight", (width, n.q_rank), "attention")
    yield Tensor(prefix + "wkv.weight", (n.head_dim, n.hidden), "attention")
    yield Tensor(prefix + "kv_norm.weight", (n.head_dim,), "norm")
    yield Tensor(prefix + "attn_sink", (n.heads,), "sinks")
    yield Tensor(prefix + "wo_a.weight", (out, width // n.groups), "attention")
    yield Tensor(prefix + "wo_b.weight", (n.hidden, out), "attention")
    if ratio == 0:
        return
    overlap = 2 if ratio == 4 else 1
    yield from _compressor(n, prefix + "compressor.", ratio, overlap * n.head_dim, n.head_dim)
    if ratio == 4:
        index = prefix + "indexer."
        yield Tensor(index + "wq_b.weight", (n.index_heads * n.index_dim, n.q_rank), "indexer")
        yield Tensor(index + "weights_proj.weight", (n.index_heads, n.hidden), "compressor")
        yield from _compressor(n, index + "compressor.", ratio, 2 * n.index_dim, n.index_dim)


def _compressor(n: Network, prefix: str, ratio: int, width: int, head_dim: int) -> Iterator[Tensor]:
    yield Tensor(prefix + "wkv.weight", (width, n.hidden), "compressor")
    yield Tensor(prefix + "wgate.weight", (width, n.hidden), "compressor")
    yield Tensor(prefix + "norm.weight", (head_dim,), "norm")
    yield Tensor(prefix + "ape", (ratio, width), "positions")


def config_json(n: Network) -> dict[str, Any]:
    """Return `config.json` with the keys of the official release."""
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "vocab_size": n.vocab,
        "hidden_size": n.hidden,
        "moe_intermediate_size": n.inner,
        "num_hidden_layers": len(n.ratios),
        "num_attention_heads": n.heads,
        "num_key_value_heads": 1,
        "head_dim": n.head_dim,
        "qk_rope_head_dim": n.rope_dim,
        "q_lora_rank": n.q_rank,
        "o_groups": n.groups,
        "o_lora_rank": n.o_rank,
        "sliding_window": n.window,
        "compress_ratios": [*n.ratios, 0],
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "max_position_embeddings": 1 << 20,
        "index_n_heads": n.index_heads,
        "index_head_dim": n.index_dim,
        "index_topk": n.index_top_k,
        "n_routed_experts": n.experts,
        "num_experts_per_tok": n.used,
        "n_shared_experts": 1,
        "num_hash_layers": n.hashed,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": n.routed_scaling,
        "swiglu_limit": 10.0,
        "hc_mult": HEAD_STREAMS,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "rms_norm_eps": 1e-6,
        "num_nextn_predict_layers": 0,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    }
