"""The numbers that define a DeepSeek-V4 network, validated once."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from localv4.errors import BadFileError

# Far above any released model; they bound what a damaged file can make us allocate.
MAX_LAYERS = 512
MAX_DIMENSION = 1 << 20
MAX_CONTEXT = 1 << 24
BASE_BOUNDS = (2, 1e12)  # of a rotation; the logarithm of 1 is no divisor


class LayerKind(Enum):
    """How the attention of a layer reaches beyond its raw window."""

    SLIDING = "sliding_attention"
    CSA = "compressed_sparse_attention"
    HCA = "heavily_compressed_attention"


@dataclass(frozen=True, slots=True)
class Yarn:
    """Frequency interpolation of the compressed layers; `original` is in tokens."""

    factor: float
    original: int
    beta_fast: float
    beta_slow: float


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One DeepSeek-V4 network. Dimensions are in elements, positions in tokens."""

    vocab_size: int
    hidden_size: int
    n_heads: int
    head_dim: int
    rope_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    window: int
    layer_kinds: tuple[LayerKind, ...]
    ratios: tuple[int, ...]  # tokens per compressed entry, 0 for sliding layers
    hashed: tuple[bool, ...]  # layers whose experts are looked up by token id
    rope_theta: float
    compress_rope_theta: float
    yarn: Yarn | None
    index_heads: int
    index_head_dim: int
    index_top_k: int
    n_experts: int
    experts_per_token: int
    expert_width: int
    shared_experts: int
    routed_scaling: float
    swiglu_limits: tuple[float, ...]
    shared_swiglu_limits: tuple[float, ...]
    hc_mult: int
    hc_iterations: int
    hc_eps: float
    rms_eps: float
    max_positions: int
    bos_id: int
    eos_id: int

    @property
    def n_layers(self) -> int:
        """Number of main layers, drafting modules excluded."""
        return len(self.layer_kinds)

    def validate(self, path: Path) -> "ModelConfig":
        """Return self, or raise BadFileError naming `path` and the first number that is wrong."""
        for name, value, low, high in self._bounds():
            if not low <= value <= high:
                raise BadFileError(path, f"{name} is {value}, expected {low} to {high}")
        if self.n_heads % self.o_groups:
            raise BadFileError(
                path, f"o_groups {self.o_groups} does not divide {self.n_heads} attention heads"
            )
        if self.rope_dim % 2:
            raise BadFileError(path, f"rope dimension {self.rope_dim} is odd")
        for layer, (kind, ratio) in enumerate(zip(self.layer_kinds, self.ratios, strict=True)):
            if (kind is LayerKind.SLIDING) != (ratio == 0):
                raise BadFileError(path, f"layer {layer}: {kind.value} with ratio {ratio}")
        return self

    def _bounds(self) -> list[tuple[str, float, float, float]]:
        size = (1, MAX_DIMENSION)
        limits = (*self.swiglu_limits, *self.shared_swiglu_limits)
        return [
            ("vocab_size", self.vocab_size, *size),
            ("hidden_size", self.hidden_size, *size),
            ("number of layers", self.n_layers, 1, MAX_LAYERS),
            ("number of attention heads", self.n_heads, *size),
            ("head_dim", self.head_dim, *size),
            ("rope dimension", self.rope_dim, 2, min(self.head_dim, self.index_head_dim)),
            ("q_lora_rank", self.q_lora_rank, *size),
            ("o_groups", self.o_groups, *size),
            ("o_lora_rank", self.o_lora_rank, *size),
            ("sliding window", self.window, *size),
            ("largest compress ratio", max(self.ratios, default=0), 0, MAX_DIMENSION),
            ("smallest compress ratio", min(self.ratios, default=0), 0, MAX_DIMENSION),
            ("rope_theta", self.rope_theta, *BASE_BOUNDS),
            ("compress_rope_theta", self.compress_rope_theta, *BASE_BOUNDS),
            *self._yarn_bounds(),
            ("index_n_heads", self.index_heads, *size),
            ("index_head_dim", self.index_head_dim, *size),
            ("index_topk", self.index_top_k, *size),
            ("number of experts", self.n_experts, *size),
            ("experts per token", self.experts_per_token, 1, self.n_experts),
            ("moe_intermediate_size", self.expert_width, *size),
            ("number of shared experts", self.shared_experts, 1, 64),
            ("hc_mult", self.hc_mult, 1, 64),
            ("hc_sinkhorn_iters", self.hc_iterations, 1, 1000),
            ("hc_eps", self.hc_eps, 0, 1),
            ("rms_norm_eps", self.rms_eps, 0, 1),
            ("routed_scaling_factor", self.routed_scaling, 1e-6, 1e6),
            *(("swiglu_limit", limit, 1e-6, 1e30) for limit in limits),
            ("max_position_embeddings", self.max_positions, 1, MAX_CONTEXT),
            ("bos_token_id", self.bos_id, 0, self.vocab_size - 1),
            ("eos_token_id", self.eos_id, 0, self.vocab_size - 1),
        ]

    def _yarn_bounds(self) -> list[tuple[str, float, float, float]]:
        yarn = self.yarn
        if yarn is None:
            return []
        return [
            ("YaRN factor", yarn.factor, 1, 1e6),
            ("YaRN original context", yarn.original, 1, MAX_CONTEXT),
            ("YaRN beta_fast", yarn.beta_fast, 1e-6, 1e6),
            ("YaRN beta_slow", yarn.beta_slow, 1e-6, 1e6),
        ]


class Fields:
    """Typed look-ups in a decoded JSON object or GGUF metadata; errors name file and key."""

    def __init__(self, values: Mapping[str, object], path: Path) -> None:
        self.values = values
        self.path = path

    def has(self, key: str) -> bool:
        """Say whether `key` is there with a value."""
        return self.values.get(key) is not None

    def integer(self, *keys: str, default: int | None = None) -> int:
        """Return the first of `keys` that is there as an int."""
        value = self._first(keys, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise BadFileError(self.path, f"{keys[0]} is {value!r}, expected a whole number")
        return value

    def number(self, *keys: str, default: float | None = None) -> float:
        """Return the first of `keys` that is there as a float."""
        value = self._first(keys, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise BadFileError(self.path, f"{keys[0]} is {value!r}, expected a number")
        try:
            return float(value)
        except OverflowError:
            raise BadFileError(self.path, f"{keys[0]} is too large") from None

    def integers(self, key: str) -> list[int]:
        """Return the list of ints at `key`."""
        value = self._first((key,), None)
        if hasattr(value, "tolist"):
            value = value.tolist()
        if not isinstance(value, list) or len(value) > 2 * MAX_LAYERS:
            raise BadFileError(self.path, f"{key} is not a list of at most {2 * MAX_LAYERS} items")
        if any(isinstance(v, bool) or not isinstance(v, int) for v in value):
            raise BadFileError(self.path, f"{key} holds something else than whole numbers")
        return value

    def strings(self, key: str) -> list[str]:
        """Return the list of strings at `key`."""
        value = self._first((key,), None)
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise BadFileError(self.path, f"{key} is not a list of names")
        return value

    def table(self, key: str) -> "Fields":
        """Return the nested object at `key`."""
        value = self._first((key,), None)
        if not isinstance(value, Mapping):
            raise BadFileError(self.path, f"{key} is not an object")
        return Fields(value, self.path)

    def _first(self, keys: tuple[str, ...], default: object) -> object:
        for key in keys:
            if self.has(key):
                return self.values[key]
        if default is None:
            raise BadFileError(self.path, f"{keys[0]} is missing")
        return default
