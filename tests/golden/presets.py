"""The configurations of the tiny models: dimensions, length and seed of each fixture."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SLIDING = "sliding_attention"
CSA = "compressed_sparse_attention"
HCA = "heavily_compressed_attention"

# What all fixtures have in common unless they say otherwise; official names.
COMMON: dict[str, Any] = {
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "max_position_embeddings": 1048576,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 65536,
    },
    "rms_norm_eps": 1e-6,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "num_nextn_predict_layers": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
}

TINY: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "head_dim": 32,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 24,
    "o_groups": 2,
    "o_lora_rank": 16,
    "n_routed_experts": 8,
    "num_hash_layers": 3,
    # The last entry belongs to the draft layer, which no fixture has.
    "compress_ratios": [0, 0, 4, 128, 4, 128, 4, 0],
    "sliding_window": 128,
    # With few heads many index scores are exactly zero, and ties have no defined order.
    "index_n_heads": 16,
    "index_head_dim": 16,
    "index_topk": 24,
    "swiglu_limit": 1.0,
    "routed_scaling_factor": 1.5,
}

# No layer without compression, no hash layer, a short window, never more entries than top-k.
NOHASH: dict[str, Any] = {
    **TINY,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "o_groups": 4,
    "n_routed_experts": 12,
    "num_hash_layers": 0,
    "compress_ratios": [128, 128, 4, 128, 4, 0],
    "sliding_window": 32,
    "index_topk": 1024,
    "swiglu_limit": 10.0,
    "routed_scaling_factor": 2.5,
}

# Every dimension is a multiple of the official blocks of 128 x 128 (FP8) and 32 (FP4).
WIDE: dict[str, Any] = {
    **TINY,
    "vocab_size": 512,
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 5,
    "head_dim": 128,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 128,
    "o_lora_rank": 128,
    "num_hash_layers": 2,
    "compress_ratios": [0, 4, 128, 4, 128, 0],
    "index_head_dim": 128,
    "routed_scaling_factor": 2.5,
}

# Nothing is a power of two, and every number that has a usual value has another one.
ODD: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 96,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "head_dim": 24,
    "qk_rope_head_dim": 10,
    "q_lora_rank": 20,
    "o_groups": 3,
    "o_lora_rank": 7,
    "n_routed_experts": 5,
    "num_experts_per_tok": 2,
    "num_hash_layers": 1,
    "compress_ratios": [4, 0, 128, 4, 0, 0],
    "sliding_window": 20,
    "index_n_heads": 18,
    "index_head_dim": 14,
    "index_topk": 11,
    "swiglu_limit": 0.8,
    "routed_scaling_factor": 1.7,
    "max_position_embeddings": 3072,
    "rope_theta": 5000,
    "compress_rope_theta": 70000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 6,
        "beta_fast": 24,
        "beta_slow": 2,
        "original_max_position_embeddings": 512,
    },
    "rms_norm_eps": 1e-5,
    "hc_mult": 3,
    "hc_sinkhorn_iters": 7,
    "hc_eps": 1e-5,
}

# Other compression rates than 4 and 128, which only the newer configuration can express.
RATES: dict[str, Any] = {
    **TINY,
    "vocab_size": 150,
    "hidden_size": 80,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "head_dim": 20,
    "qk_rope_head_dim": 4,
    "o_groups": 5,
    "o_lora_rank": 9,
    "n_routed_experts": 7,
    "num_hash_layers": 1,
    "compress_ratios": [20, 6, 20, 6, 0],
    "sliding_window": 33,
    "index_topk": 10,
    "hc_mult": 2,
}

# Official storage with partial blocks of FP8 at the right and lower edges.
EDGES: dict[str, Any] = {
    **TINY,
    "vocab_size": 131,
    "hidden_size": 160,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "head_dim": 36,
    "qk_rope_head_dim": 12,
    "q_lora_rank": 44,
    "o_groups": 5,
    "o_lora_rank": 30,
    "n_routed_experts": 6,
    "num_hash_layers": 1,
    "compress_ratios": [0, 4, 128, 0],
    "sliding_window": 50,
    "index_head_dim": 12,
    "index_topk": 16,
}


@dataclass(frozen=True, slots=True, eq=False)
class Preset:
    """One fixture, equal only to itself; `rates` are the compression rates of CSA and HCA."""

    name: str
    dims: Mapping[str, Any]
    length: int
    seed: int
    official_storage: bool = False
    rates: tuple[int, int] = (4, 128)

    @property
    def settings(self) -> dict[str, Any]:
        """All settings under their official names."""
        return {**COMMON, **self.dims}

    @property
    def layer_types(self) -> list[str]:
        """Kind of attention of each layer."""
        kinds = {0: SLIDING, self.rates[0]: CSA, self.rates[1]: HCA}
        return [kinds[rate] for rate in self.dims["compress_ratios"]][
            : self.dims["num_hidden_layers"]
        ]


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("tiny300", TINY, length=300, seed=9),
        Preset("tiny600", TINY, length=600, seed=6),
        Preset("nohash", NOHASH, length=280, seed=0),
        Preset("wide", WIDE, length=300, seed=3, official_storage=True),
        Preset("odd", ODD, length=300, seed=6),
        Preset("rates", RATES, length=200, seed=9, rates=(6, 20)),
        Preset("edges", EDGES, length=200, seed=5, official_storage=True),
    )
}


def official_config(preset: Preset) -> dict[str, Any]:
    """`config.json` as the official repositories write it (older keys).

    Raises ValueError if the layer kinds do not follow from the compression rates.
    """
    if preset.rates != (4, 128):
        raise ValueError(f"{preset.name}: older configurations know the rates 4 and 128 only")
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "expert_dtype": "fp4",
        "initializer_range": 0.02,
        "topk_method": "noaux_tc",
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
        **preset.settings,
        "num_nextn_predict_layers": 0,
    }
