"""Read a ModelConfig from `config.json`: official keys or the ones transformers writes."""

import json
from collections.abc import Mapping
from pathlib import Path

from localv4.errors import BadFileError
from localv4.model.config import Fields, LayerKind, ModelConfig, Yarn
from localv4.small_file import read_small_file

MAX_CONFIG_BYTES = 4 << 20

_OFFICIAL_RATIOS = {0: LayerKind.SLIDING, 4: LayerKind.CSA, 128: LayerKind.HCA}


def read_config(path: Path) -> ModelConfig:
    """Read and validate a `config.json`; raise BadFileError naming the key that is wrong."""
    return config_from_json(read_json(path), path)


def read_json(path: Path) -> Mapping[str, object]:
    """Read a small JSON object from a file; raise NotFoundError or BadFileError."""
    data = read_small_file(path, MAX_CONFIG_BYTES)
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadFileError(path, f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise BadFileError(path, "not a JSON object")
    return values


def config_from_json(values: Mapping[str, object], path: Path) -> ModelConfig:
    """Build a ModelConfig from decoded JSON; `path` is for messages."""
    fields = Fields(values, path)
    model_type = values.get("model_type", "deepseek_v4")
    if model_type != "deepseek_v4":
        raise BadFileError(path, f"model_type is {model_type!r}, only deepseek_v4 can run here")
    scoring = values.get("scoring_func", "sqrtsoftplus")
    if scoring != "sqrtsoftplus":
        raise BadFileError(path, f"scoring_func {scoring!r} is not supported, only sqrtsoftplus")
    layers = fields.integer("num_hidden_layers")
    kinds, ratios = _layer_kinds(fields, layers)
    limit = fields.number("swiglu_limit")
    head_dim = fields.integer("head_dim")
    main_theta, compress_theta, yarn = _rope(fields)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        n_heads=fields.integer("num_attention_heads"),
        head_dim=head_dim,
        rope_dim=_rope_dim(fields, head_dim),
        q_lora_rank=fields.integer("q_lora_rank"),
        o_groups=fields.integer("o_groups"),
        o_lora_rank=fields.integer("o_lora_rank"),
        window=fields.integer("sliding_window"),
        layer_kinds=kinds,
        ratios=ratios,
        hashed=_hashed(fields, layers),
        rope_theta=main_theta,
        compress_rope_theta=compress_theta,
        yarn=yarn,
        index_heads=fields.integer("index_n_heads"),
        index_head_dim=fields.integer("index_head_dim"),
        index_top_k=fields.integer("index_topk"),
        n_experts=fields.integer("n_routed_experts", "num_local_experts"),
        experts_per_token=fields.integer("num_experts_per_tok"),
        expert_width=fields.integer("moe_intermediate_size", "intermediate_size"),
        shared_experts=fields.integer("n_shared_experts", default=1),
        routed_scaling=fields.number("routed_scaling_factor"),
        swiglu_limits=(limit,) * layers,
        shared_swiglu_limits=(limit,) * layers,
        hc_mult=fields.integer("hc_mult"),
        hc_iterations=fields.integer("hc_sinkhorn_iters"),
        hc_eps=fields.number("hc_eps"),
        rms_eps=fields.number("rms_norm_eps"),
        max_positions=fields.integer("max_position_embeddings"),
        bos_id=fields.integer("bos_token_id", default=0),
        eos_id=fields.integer("eos_token_id", default=1),
    ).validate(path)


def _layer_kinds(fields: Fields, layers: int) -> tuple[tuple[LayerKind, ...], tuple[int, ...]]:
    if fields.has("layer_types"):
        rates = fields.table("compress_rates")
        kinds = []
        for name in fields.strings("layer_types")[:layers]:
            try:
                kinds.append(LayerKind(name))
            except ValueError:
                raise BadFileError(fields.path, f"unknown layer type {name!r}") from None
        ratios = [0 if k is LayerKind.SLIDING else rates.integer(k.value) for k in kinds]
    else:
        ratios = fields.integers("compress_ratios")[:layers]
        unknown = [r for r in ratios if r not in _OFFICIAL_RATIOS]
        if unknown:
            raise BadFileError(
                fields.path, f"compress_ratios holds {unknown[0]}, expected 0, 4 or 128"
            )
        kinds = [_OFFICIAL_RATIOS[r] for r in ratios]
    if len(kinds) != layers:
        raise BadFileError(fields.path, f"layer kinds for {len(kinds)} of {layers} layers")
    return tuple(kinds), tuple(ratios)


def _hashed(fields: Fields, layers: int) -> tuple[bool, ...]:
    if fields.has("mlp_layer_types"):
        names = fields.strings("mlp_layer_types")[:layers]
        if len(names) != layers or any(n not in ("hash_moe", "moe") for n in names):
            raise BadFileError(fields.path, "mlp_layer_types must name hash_moe or moe per layer")
        return tuple(name == "hash_moe" for name in names)
    count = fields.integer("num_hash_layers")
    return tuple(layer < count for layer in range(layers))


def _rope_dim(fields: Fields, head_dim: int) -> int:
    if fields.has("qk_rope_head_dim"):
        return fields.integer("qk_rope_head_dim")
    factor = fields.number("partial_rotary_factor")
    if not 0 < factor <= 1:
        raise BadFileError(fields.path, f"partial_rotary_factor is {factor}, expected 0 to 1")
    return int(head_dim * factor)


def _rope(fields: Fields) -> tuple[float, float, Yarn | None]:
    """Return the two bases and the interpolation of the compressed layers."""
    if fields.has("rope_parameters"):
        parameters = fields.table("rope_parameters")
        main, compress = parameters.table("main"), parameters.table("compress")
        yarn = _yarn(compress) if compress.values.get("rope_type", "default") == "yarn" else None
        return main.number("rope_theta"), compress.number("rope_theta"), yarn
    yarn = None
    if fields.has("rope_scaling"):
        scaling = fields.table("rope_scaling")
        kind = scaling.values.get("type", scaling.values.get("rope_type"))
        if kind != "yarn":
            raise BadFileError(fields.path, f"rope_scaling type {kind!r}, expected 'yarn'")
        yarn = _yarn(scaling)
    return fields.number("rope_theta"), fields.number("compress_rope_theta"), yarn


def _yarn(fields: Fields) -> Yarn:
    return Yarn(
        factor=fields.number("factor"),
        original=fields.integer("original_max_position_embeddings"),
        beta_fast=fields.number("beta_fast", default=32.0),
        beta_slow=fields.number("beta_slow", default=1.0),
    )
