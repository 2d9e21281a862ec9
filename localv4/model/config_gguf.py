"""Read a ModelConfig from GGUF metadata; keys that are missing follow from the tensors."""

from collections.abc import Mapping
from pathlib import Path

from localv4.errors import BadFileError
from localv4.model.config import MAX_LAYERS, Fields, LayerKind, ModelConfig, Yarn
from localv4.model.names import Slice

_SQRT_SOFTPLUS = 4  # llama.cpp's number for the gating function of the architecture


def config_from_gguf(
    metadata: Mapping[str, object], table: Mapping[str, Slice], path: Path
) -> ModelConfig:
    """Build a ModelConfig from metadata and the tensors by their official names."""
    architecture = metadata.get("general.architecture")
    if architecture != "deepseek4":
        raise BadFileError(path, f"architecture {architecture!r}, only deepseek4 can run here")
    fields = _Keys(metadata, path)
    gating = fields.integer("expert_gating_func", default=_SQRT_SOFTPLUS)
    if gating != _SQRT_SOFTPLUS:
        raise BadFileError(path, f"expert_gating_func {gating} is not supported, only 4")
    layers = fields.integer("block_count") - fields.integer("nextn_predict_layers", default=0)
    if not 1 <= layers <= MAX_LAYERS:
        raise BadFileError(path, f"number of layers is {layers}, expected 1 to {MAX_LAYERS}")
    shapes = _Shapes(table, path)
    heads = fields.integer("attention.head_count")
    head_dim = fields.integer("attention.key_length")
    kinds, ratios = _layer_kinds(fields, table, layers)
    groups = _o_groups(fields, shapes, heads * head_dim)
    limits = _limits(fields, "swiglu_clamp_exp", layers, None)
    return ModelConfig(
        vocab_size=shapes.dimension("embed.weight", 0),
        hidden_size=fields.integer("embedding_length"),
        n_heads=heads,
        head_dim=head_dim,
        rope_dim=fields.integer("rope.dimension_count"),
        q_lora_rank=fields.integer(
            "attention.q_lora_rank", default=shapes.dimension("layers.0.attn.wq_a.weight", 0)
        ),
        o_groups=groups,
        o_lora_rank=fields.integer(
            "attention.output_lora_rank",
            default=shapes.dimension("layers.0.attn.wo_a.weight", 0) // groups,
        ),
        window=fields.integer("attention.sliding_window"),
        layer_kinds=kinds,
        ratios=ratios,
        hashed=tuple(f"layers.{i}.ffn.gate.tid2eid" in table for i in range(layers)),
        rope_theta=fields.number("rope.freq_base", default=10000.0),
        compress_rope_theta=fields.number("attention.compress_rope_freq_base", default=160000.0),
        yarn=_yarn(fields),
        index_heads=fields.integer("attention.indexer.head_count"),
        index_head_dim=fields.integer("attention.indexer.key_length"),
        index_top_k=fields.integer("attention.indexer.top_k"),
        n_experts=fields.integer("expert_count"),
        experts_per_token=fields.integer("expert_used_count"),
        expert_width=_expert_width(fields, shapes),
        shared_experts=fields.integer("expert_shared_count", default=1),
        routed_scaling=fields.number("expert_weights_scale"),
        swiglu_limits=limits,
        shared_swiglu_limits=_limits(fields, "swiglu_clamp_shexp", layers, limits),
        hc_mult=fields.integer("hyper_connection.count", default=4),
        hc_iterations=fields.integer("hyper_connection.sinkhorn_iterations", default=20),
        hc_eps=fields.number("hyper_connection.epsilon", default=1e-6),
        rms_eps=fields.number("attention.layer_norm_rms_epsilon"),
        max_positions=fields.integer("context_length"),
        bos_id=_token_id(metadata, "bos", 0, path),
        eos_id=_token_id(metadata, "eos", 1, path),
    ).validate(path)


class _Keys(Fields):
    """Metadata look-ups under the prefix of the architecture."""

    def __init__(self, metadata: Mapping[str, object], path: Path) -> None:
        prefix = "deepseek4."
        inner = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
        super().__init__(inner, path)


class _Shapes:
    """Dimensions of tensors by official name."""

    def __init__(self, table: Mapping[str, Slice], path: Path) -> None:
        self.table = table
        self.path = path

    def dimension(self, name: str, axis: int) -> int:
        """Return one dimension, or raise BadFileError when the tensor is not there."""
        if name not in self.table or len(self.table[name].shape) <= axis:
            raise BadFileError(self.path, f"no tensor for {name} with {axis + 1} dimensions")
        return self.table[name].shape[axis]


def _layer_kinds(
    fields: Fields, table: Mapping[str, Slice], layers: int
) -> tuple[tuple[LayerKind, ...], tuple[int, ...]]:
    """Take ratios from the metadata, else from the position bias of each compressor."""
    if fields.has("attention.compress_ratios"):
        ratios = fields.integers("attention.compress_ratios")[:layers]
        if len(ratios) != layers:
            raise BadFileError(fields.path, f"compress_ratios for {len(ratios)} of {layers} layers")
    else:
        ape = (table.get(f"layers.{i}.attn.compressor.ape") for i in range(layers))
        ratios = [part.shape[0] if part else 0 for part in ape]
    kinds = []
    for layer, ratio in enumerate(ratios):
        if ratio == 0:
            kinds.append(LayerKind.SLIDING)
        elif f"layers.{layer}.attn.indexer.wq_b.weight" in table:
            kinds.append(LayerKind.CSA)
        else:
            kinds.append(LayerKind.HCA)
    return tuple(kinds), tuple(ratios)


def _o_groups(fields: Fields, shapes: _Shapes, width: int) -> int:
    """A group of heads is as wide as a row of wo_a, so their number follows from its shape."""
    columns = shapes.dimension("layers.0.attn.wo_a.weight", 1)
    if columns < 1 or width % columns:
        raise BadFileError(fields.path, f"attn_output_a has {columns} columns, heads {width}")
    groups = fields.integer("attention.output_group_count", default=width // columns)
    if groups < 1:
        raise BadFileError(fields.path, f"attention.output_group_count is {groups}")
    return groups


def _expert_width(fields: Fields, shapes: _Shapes) -> int:
    """Width of one expert; some converters write one number per layer."""
    key = "expert_feed_forward_length"
    value = fields.values.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if value is None:
        return shapes.dimension("layers.0.ffn.experts.0.w1.weight", 0)
    widths = set(fields.integers(key))
    if len(widths) != 1:
        raise BadFileError(fields.path, f"{key} differs between layers: {sorted(widths)}")
    return widths.pop()


def _limits(
    fields: Fields, key: str, layers: int, default: tuple[float, ...] | None
) -> tuple[float, ...]:
    """Return the clamp of every layer from a number or an array."""
    value = fields.values.get(key)
    if hasattr(value, "tolist"):
        value = value.tolist()
    if value is None and default is not None:
        return default
    if isinstance(value, list):
        numbers = [v for v in value if isinstance(v, (int, float)) and not isinstance(v, bool)]
        if len(numbers) != len(value) or len(numbers) < layers:
            raise BadFileError(fields.path, f"{key} needs a number for each of {layers} layers")
        return tuple(float(v) for v in numbers[:layers])
    return (fields.number(key),) * layers


def _yarn(fields: Fields) -> Yarn | None:
    if fields.values.get("rope.scaling.type", "none") != "yarn":
        return None
    return Yarn(
        factor=fields.number("rope.scaling.factor"),
        original=fields.integer("rope.scaling.original_context_length"),
        beta_fast=fields.number("rope.scaling.yarn_beta_fast", default=32.0),
        beta_slow=fields.number("rope.scaling.yarn_beta_slow", default=1.0),
    )


def _token_id(metadata: Mapping[str, object], role: str, default: int, path: Path) -> int:
    return Fields(metadata, path).integer(f"tokenizer.ggml.{role}_token_id", default=default)
