"""`deepseek4` GGUF files of the golden models, in any mix of block types.

The `gguf` package writes the container and quantises what it can. It cannot make K- and I-quants:
such a matrix is replaced by random legal blocks of a sane magnitude. In either case the exact
values of what was written are returned, so that a float32 twin of the file can be compared with it.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFWriter, quants
from gguf import GGMLQuantizationType as Type
from golden.names import GGUF_NAMES, ROOT_GGUF_NAMES, layer_and_rest, stacked_experts
from golden.weights import Array
from golden_files import GoldenModel
from numpy.typing import NDArray
from reference_blocks import HALVES, random_blocks

ARCHITECTURE = "deepseek4"

# Which matrices share a block type; what is not here is always F32 (the routing table: I32).
ROLES = {
    "token_embd": "embedding",
    "output": "head",
    "output_hc_fn": "hc",
    "hc_attn_fn": "hc",
    "hc_ffn_fn": "hc",
    **dict.fromkeys(("attn_q_a", "attn_q_b", "attn_kv"), "attention"),
    **dict.fromkeys(("attn_output_a", "attn_output_b"), "attention"),
    **dict.fromkeys(("attn_compressor_kv", "attn_compressor_gate"), "compressor"),
    **dict.fromkeys(("indexer_compressor_kv", "indexer_compressor_gate"), "compressor"),
    **dict.fromkeys(("attn_compressor_ape", "indexer_compressor_ape"), "ape"),
    "indexer.attn_q_b": "indexer_q",
    "indexer.proj": "indexer_weights",
    "ffn_gate_inp": "router",
    **dict.fromkeys(("ffn_gate_exps", "ffn_up_exps"), "gate_up"),
    "ffn_down_exps": "down",
    **dict.fromkeys(("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"), "shared"),
}

# The type mixes that are found in published files.
MAINLINE = {
    **dict.fromkeys(("embedding", "head", "compressor", "indexer_weights", "router"), Type.BF16),
    **dict.fromkeys(("attention", "indexer_q", "shared"), Type.Q8_0),
    **dict.fromkeys(("gate_up", "down"), Type.MXFP4),
}
ANTIREZ = {
    **dict.fromkeys(("embedding", "hc", "compressor", "ape", "router"), Type.F16),
    **dict.fromkeys(("indexer_q", "indexer_weights"), Type.F16),
    **dict.fromkeys(("head", "attention", "shared"), Type.Q8_0),
    **{"gate_up": Type.IQ2_XXS, "down": Type.Q2_K},
}

# Other spellings in files from before the architecture was merged into llama.cpp.
ALIASES = {
    **{f"output_hc_{part}.weight": f"hc_head_{part}" for part in ("fn", "base", "scale")},
    **{
        f"hc_{site}_{part}.weight": f"hc_{site}_{part}"
        for site in ("attn", "ffn")
        for part in ("fn", "base", "scale")
    },
    "attn_sinks.weight": "attn_sinks",
    "ffn_gate_tid2eid.weight": "ffn_gate_tid2eid",
    "attn_kv.weight": "attn_kv_latent.weight",
    **{
        f"attn_compressor_{part}.weight": f"attn_compress_{part}.weight"
        for part in ("kv", "gate", "norm")
    },
    "attn_compressor_ape.weight": "attn_compress_ape",
    **{
        f"indexer_compressor_{part}.weight": f"indexer.compress_{part}.weight"
        for part in ("kv", "gate", "norm")
    },
    "indexer_compressor_ape.weight": "indexer.compress_ape",
}

# Keys that some published files lack, because a reader can find the values elsewhere.
OMITTED_KEYS = (
    "vocab_size",
    "hyper_connection.count",
    "hyper_connection.sinkhorn_iterations",
    "hyper_connection.epsilon",
    "attention.q_lora_rank",
    "attention.output_lora_rank",
    "attention.output_group_count",
    "attention.compress_ratios",
    "hash_layer_count",
)

# Types that the gguf package can read but not make.
DECODED_ONLY = {
    *(Type.IQ4_NL, Type.IQ4_XS, Type.IQ2_XXS),
    *(Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K),
}

# Minimum per scale that makes the mean of random codes zero.
BALANCED_MINIMUM = {"Q4_K": 7.5, "Q5_K": 15.5, "Q2_K": 1.5}


@dataclass(frozen=True, slots=True)
class GgufOptions:
    """How to write a file: block types by role, parts, dialect of names, keys to leave out."""

    types: Mapping[str, Type] = field(default_factory=dict)
    parts: int = 1
    aliases: bool = False
    omitted_keys: Collection[str] = ()


def write_gguf(
    model: GoldenModel, path: Path, options: GgufOptions | None = None
) -> tuple[Path, dict[str, Array]]:
    """Write a model; return the (first) file and the exact float32 values under official names.

    A matrix whose rows are no whole number of blocks is written as F32 instead.
    """
    options = options or GgufOptions()
    tensors = list(gguf_tensors(model.weights))
    per_part = -(-len(tensors) // options.parts) if options.parts > 1 else 0
    writer = GGUFWriter(path, ARCHITECTURE, split_max_tensors=per_part)
    add_metadata(writer, model, options.omitted_keys)
    add_tokenizer(writer, model.preset.dims["vocab_size"])
    exact: dict[str, Array] = {}
    for seed, (name, official, values) in enumerate(tensors):
        rng = np.random.default_rng(seed)
        written = _add_tensor(writer, _spelled(name, options), values, _type(name, options), rng)
        exact.update(_by_official_name(official, written.reshape(values.shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if options.parts > 1:
        path = min(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))
    return path, exact


def gguf_tensors(weights: Mapping[str, Array]) -> Iterator[tuple[str, str, Array]]:
    """Yield GGUF name, official name and values; experts stacked, their official name a pattern."""
    for name, values in weights.items():
        if name in ROOT_GGUF_NAMES:
            yield ROOT_GGUF_NAMES[name], name, values
        elif ".experts." not in name:
            layer, rest = layer_and_rest(name)
            yield f"blk.{layer}.{GGUF_NAMES[rest]}", name, values
    for layer, stacks in stacked_experts(weights).items():
        for part, stack in zip(("w1", "w2", "w3"), stacks, strict=True):
            gguf_name = GGUF_NAMES[f"ffn.experts.{part}.weight"]
            yield f"blk.{layer}.{gguf_name}", f"layers.{layer}.ffn.experts.*.{part}.weight", stack


def _by_official_name(name: str, values: Array) -> dict[str, Array]:
    if "*" not in name:
        return {name: values}
    return {name.replace("*", str(expert)): matrix for expert, matrix in enumerate(values)}


def _leaf(name: str) -> str:
    return name.split(".", 2)[2] if name.startswith("blk.") else name


def _type(name: str, options: GgufOptions) -> Type:
    role = ROLES.get(_leaf(name).removesuffix(".weight"))
    return options.types.get(role, Type.F32) if role else Type.F32


def _spelled(name: str, options: GgufOptions) -> str:
    leaf = _leaf(name)
    if not options.aliases or leaf not in ALIASES:
        return name
    return name.removesuffix(leaf) + ALIASES[leaf]


def _add_tensor(
    writer: GGUFWriter, name: str, values: Array, kind: Type, rng: np.random.Generator
) -> Array:
    """Add a tensor and return the values that a reader must find."""
    if values.dtype == np.int64:
        writer.add_tensor(name, values.astype(np.int32))
        return values
    block, _ = GGML_QUANT_SIZES[kind]
    if kind == Type.F32 or values.shape[-1] % block:
        writer.add_tensor(name, values.astype(np.float32))
        return values
    data = encode(values.astype(np.float32), kind, rng)
    writer.add_tensor(name, data, raw_dtype=kind)
    exact: NDArray[np.float32] = quants.dequantize(data, kind)
    return exact


def encode(
    values: NDArray[np.float32], kind: Type, rng: np.random.Generator
) -> NDArray[np.uint8] | NDArray[np.float16]:
    """Return values quantised, or random blocks of the same spread where that is not possible."""
    if kind in DECODED_ONLY:
        return random_matrix(values, kind, rng)
    data: NDArray[np.uint8] = quants.quantize(values, kind)
    return data


def random_matrix(
    values: NDArray[np.float32], kind: Type, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Return random blocks in the shape of `values`, scaled to about its spread."""
    block, size = GGML_QUANT_SIZES[kind]
    blocks = random_blocks(rng, kind.name, values.size // block, size)
    factors = (1.0, BALANCED_MINIMUM.get(kind.name, 0.0))
    _set_halves(blocks, kind.name, factors)
    unit = float(quants.dequantize(blocks, kind).std())
    spread = float(values.std()) / unit
    _set_halves(blocks, kind.name, tuple(factor * spread for factor in factors))
    return blocks.reshape(*values.shape[:-1], values.shape[-1] // block * size)


def _set_halves(blocks: NDArray[np.uint8], name: str, numbers: tuple[float, ...]) -> None:
    for at, number in zip(HALVES[name], numbers, strict=False):
        blocks[:, at : at + 2] = np.array([number], "<f2").view(np.uint8)


def add_metadata(writer: GGUFWriter, model: GoldenModel, omitted: Collection[str]) -> None:
    """Add the keys of the architecture."""
    writer.add_name(model.name)
    for key, value in metadata(model.preset.settings).items():
        if key in omitted:
            continue
        full = f"{ARCHITECTURE}.{key}"
        if isinstance(value, bool):
            writer.add_bool(full, value)
        elif isinstance(value, int):
            writer.add_uint32(full, value)
        elif isinstance(value, float):
            writer.add_float32(full, value)
        elif isinstance(value, str):
            writer.add_string(full, value)
        else:
            writer.add_array(full, value)


def metadata(c: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys without their prefix, from settings under official names."""
    yarn = c["rope_scaling"]
    clamp = [float(c["swiglu_limit"])] * c["num_hidden_layers"]
    return {
        "block_count": c["num_hidden_layers"],
        "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"],
        "embedding_length_out": c["hidden_size"] * c["hc_mult"],
        "vocab_size": c["vocab_size"],
        "attention.head_count": c["num_attention_heads"],
        "attention.head_count_kv": 1,
        "attention.key_length": c["head_dim"],
        "attention.value_length": c["head_dim"],
        "attention.layer_norm_rms_epsilon": float(c["rms_norm_eps"]),
        "attention.q_lora_rank": c["q_lora_rank"],
        "attention.output_group_count": c["o_groups"],
        "attention.output_lora_rank": c["o_lora_rank"],
        "attention.sliding_window": c["sliding_window"],
        "attention.compress_ratios": [int(ratio) for ratio in c["compress_ratios"]],
        "attention.compress_rope_freq_base": float(c["compress_rope_theta"]),
        "attention.indexer.head_count": c["index_n_heads"],
        "attention.indexer.key_length": c["index_head_dim"],
        "attention.indexer.top_k": c["index_topk"],
        "rope.dimension_count": c["qk_rope_head_dim"],
        "rope.freq_base": float(c["rope_theta"]),
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(yarn["factor"]),
        "rope.scaling.original_context_length": yarn["original_max_position_embeddings"],
        "rope.scaling.yarn_beta_fast": float(yarn["beta_fast"]),
        "rope.scaling.yarn_beta_slow": float(yarn["beta_slow"]),
        "expert_count": c["n_routed_experts"],
        "expert_used_count": c["num_experts_per_tok"],
        "expert_shared_count": 1,
        "expert_feed_forward_length": c["moe_intermediate_size"],
        "expert_weights_scale": float(c["routed_scaling_factor"]),
        "expert_weights_norm": True,
        "expert_gating_func": 4,
        "hash_layer_count": c["num_hash_layers"],
        "swiglu_clamp_exp": clamp,
        "swiglu_clamp_shexp": clamp,
        "hyper_connection.count": c["hc_mult"],
        "hyper_connection.sinkhorn_iterations": c["hc_sinkhorn_iters"],
        "hyper_connection.epsilon": float(c["hc_eps"]),
    }


def add_tokenizer(writer: GGUFWriter, vocab_size: int) -> None:
    """Add a byte-level tokenizer: two special tokens, a merge, bytes as far as they fit."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    letters = [chr(byte if byte in kept else next(spare)) for byte in range(256)]
    tokens = ["<bos>", "<eos>", '!"', *letters][:vocab_size]
    kinds = [3, 3, *([1] * (len(tokens) - 2))]
    unused = vocab_size - len(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("joyai-llm")
    writer.add_token_list(tokens + [f"<unused{number}>" for number in range(unused)])
    writer.add_token_types(kinds + [5] * unused)
    writer.add_token_merges(['! "'])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
