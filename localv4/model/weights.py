"""The weights of a network by their role, checked against the configuration."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localv4.errors import BadFileError
from localv4.kernels import blocks
from localv4.model.config import LayerKind, ModelConfig
from localv4.model.matrix import Floats, Matrix, decode
from localv4.model.names import Slice
from localv4.storage import Checkpoint

_NO_SCALE = np.zeros((1, 1), np.uint8)
_NO_SCALE.setflags(write=False)

_FORMATS = {
    "F32": blocks.F32,
    "F16": blocks.F16,
    "BF16": blocks.BF16,
    "F8_E4M3": blocks.F8,
    "I8": blocks.FP4,
    "Q8_0": blocks.Q8_0,
    "Q4_0": blocks.Q4_0,
    "IQ4_NL": blocks.IQ4_NL,
    "MXFP4": blocks.MXFP4,
    "Q4_K": blocks.Q4_K,
    "Q5_K": blocks.Q5_K,
    "Q6_K": blocks.Q6_K,
    "Q2_K": blocks.Q2_K,
    "Q3_K": blocks.Q3_K,
    "IQ4_XS": blocks.IQ4_XS,
    "IQ2_XXS": blocks.IQ2_XXS,
}


@dataclass(frozen=True, slots=True)
class HyperConnection:
    """One mixing site: fn (mixes, n * hidden), base (mixes,), scale (3,) or (1,) at the head."""

    fn: Matrix
    base: Floats
    scale: Floats


@dataclass(frozen=True, slots=True)
class Compressor:
    """Pools `ratio` tokens into a row; ape (ratio, width) is added to the gate by position."""

    wkv: Matrix
    wgate: Matrix
    norm: Floats
    ape: Floats
    ratio: int


@dataclass(frozen=True, slots=True)
class Indexer:
    """Scores compressed entries of a CSA layer with its own, narrower rows."""

    wq_b: Matrix
    weights_proj: Matrix
    compressor: Compressor


@dataclass(frozen=True, slots=True)
class Attention:
    """Low-rank queries, one shared key row, grouped low-rank output."""

    wq_a: Matrix
    q_norm: Floats
    wq_b: Matrix
    wkv: Matrix
    kv_norm: Floats
    sinks: Floats
    wo_a: Matrix
    wo_b: Matrix
    compressor: Compressor | None
    indexer: Indexer | None


@dataclass(frozen=True, slots=True)
class Expert:
    """A SwiGLU network: w2 . (silu(w1 . x) * (w3 . x))."""

    w1: Matrix
    w2: Matrix
    w3: Matrix


@dataclass(frozen=True, slots=True)
class Router:
    """Chooses experts by learned affinity plus bias, or (hash layers) by a table of token ids."""

    weight: Matrix
    bias: Floats | None
    table: NDArray[np.int64] | None


@dataclass(frozen=True, slots=True)
class Layer:
    """One block: attention and mixture of experts, each behind its hyper-connection."""

    attn_hc: HyperConnection
    attn_norm: Floats
    attention: Attention
    ffn_hc: HyperConnection
    ffn_norm: Floats
    router: Router
    shared: Expert
    experts: tuple[Expert, ...]


@dataclass(frozen=True, slots=True)
class Weights:
    """Everything that the forward pass reads."""

    embed: Matrix
    layers: tuple[Layer, ...]
    head_hc: HyperConnection
    norm: Floats
    head: Matrix

    @property
    def widest(self) -> int:
        """The longest row of any matrix, for scratch space."""
        first = self.layers[0]
        matrices = [first.attn_hc.fn, first.attention.wq_b, first.attention.wo_a]
        matrices += [first.attention.wo_b, first.shared.w1, first.shared.w2]
        return max(m.cols for m in matrices)


class WeightReader:
    """Takes tensors out of a checkpoint by official name; every shape is checked."""

    def __init__(self, checkpoint: Checkpoint, table: dict[str, Slice]) -> None:
        self.checkpoint = checkpoint
        self.table = table

    def has(self, name: str) -> bool:
        """Say whether the checkpoint holds a tensor of this official name."""
        return name in self.table

    def matrix(self, name: str, rows: int, cols: int) -> Matrix:
        """Return a packed matrix; raise BadFileError when missing or of another shape or type."""
        part = self._part(name)
        dtype = part.tensor.dtype
        if dtype.name not in _FORMATS:
            raise self._bad(part, f"has type {dtype.name}, which cannot hold weights")
        stored_cols = cols // 2 if dtype.name == "I8" else cols
        if part.shape != (rows, stored_cols) or (dtype.name == "I8" and cols % 2):
            raise self._bad(part, f"has shape {part.shape}, expected {(rows, stored_cols)}")
        row_bytes = stored_cols // dtype.block * dtype.block_bytes
        data = self.checkpoint.bytes(part.tensor.name)
        data = data[part.first_row * row_bytes :][: rows * row_bytes].reshape(rows, row_bytes)
        scale = _NO_SCALE
        if dtype.name == "F8_E4M3":
            scale = self._scale(name, part, (-(-rows // 128), -(-cols // 128)))
        elif dtype.name == "I8":
            scale = self._scale(name, part, (rows, -(-cols // 32)))
        return Matrix(_FORMATS[dtype.name], rows, cols, data, scale)

    def floats(self, name: str, *shape: int) -> Floats:
        """Return a small tensor of any float type, decoded; every value must be finite."""
        part = self._part(name)
        flat_shape = (1, *shape)[-2:]
        if part.shape != shape:
            raise self._bad(part, f"has shape {part.shape}, expected {shape}")
        if part.tensor.dtype.name not in _FORMATS or part.tensor.dtype.name in ("F8_E4M3", "I8"):
            raise self._bad(part, f"has type {part.tensor.dtype.name}, expected floats")
        dtype = part.tensor.dtype
        row_bytes = flat_shape[1] // dtype.block * dtype.block_bytes
        data = self.checkpoint.bytes(part.tensor.name).reshape(flat_shape[0], row_bytes)
        stored = Matrix(_FORMATS[dtype.name], flat_shape[0], flat_shape[1], data, _NO_SCALE)
        values = decode(stored).reshape(shape)
        if not np.isfinite(values).all():
            raise self._bad(part, "holds a NaN or an infinity")
        return values

    def expert_table(
        self, name: str, vocab: int, per_token: int, experts: int
    ) -> NDArray[np.int64]:
        """Return the experts of each token id (vocab, per_token), every one in [0, experts)."""
        part = self._part(name)
        types: dict[str, type[np.signedinteger[Any]]] = {"I64": np.int64, "I32": np.int32}
        if part.tensor.dtype.name not in types or part.shape != (vocab, per_token):
            raise self._bad(
                part,
                f"is {part.tensor.dtype.name} {part.shape}, expected integers {(vocab, per_token)}",
            )
        stored = self.checkpoint.bytes(part.tensor.name).tobytes()
        flat = np.frombuffer(stored, types[part.tensor.dtype.name])
        table: NDArray[np.int64] = flat.reshape(vocab, per_token).astype(np.int64)
        if table.min() < 0 or table.max() >= experts:
            raise self._bad(part, f"names an expert outside 0 to {experts - 1}")
        return table

    def _part(self, name: str) -> Slice:
        if name not in self.table:
            raise BadFileError(self.checkpoint.path, f"tensor {name} is missing")
        return self.table[name]

    def _scale(self, name: str, weight: Slice, shape: tuple[int, int]) -> NDArray[np.uint8]:
        scale_name = name.removesuffix(".weight") + ".scale"
        if scale_name not in self.table:
            raise self._bad(weight, f"has no scale tensor {scale_name}")
        part = self.table[scale_name]
        if part.tensor.dtype.name != "F8_E8M0" or part.shape != shape:
            raise self._bad(
                part, f"is {part.tensor.dtype.name} {part.shape}, expected F8_E8M0 {shape}"
            )
        return self.checkpoint.bytes(part.tensor.name).reshape(shape)

    def _bad(self, part: Slice, what: str) -> BadFileError:
        file = self.checkpoint.files[part.tensor.file]
        return BadFileError(file, f"tensor {part.tensor.name!r} {what}")


def load_weights(
    checkpoint: Checkpoint,
    table: dict[str, Slice],
    config: ModelConfig,
    on_progress: Callable[[int, int], None] | None = None,
) -> Weights:
    """Find every tensor that `config` calls for; `on_progress(layers done, layers)`.

    Raises BadFileError naming the tensor that is missing or has the wrong shape or type.
    """
    read = WeightReader(checkpoint, table)
    layers = []
    for index in range(config.n_layers):
        layers.append(read_layer(read, config, index))
        if on_progress is not None:
            on_progress(index + 1, config.n_layers)
    hidden, width = config.hidden_size, config.hc_mult * config.hidden_size
    return Weights(
        embed=read.matrix("embed.weight", config.vocab_size, hidden),
        layers=tuple(layers),
        head_hc=read_hyper_connection(read, "hc_head", config.hc_mult, width, 1),
        norm=read.floats("norm.weight", hidden),
        head=read.matrix("head.weight", config.vocab_size, hidden),
    )


def read_hyper_connection(
    read: WeightReader, name: str, mixes: int, width: int, scales: int
) -> HyperConnection:
    """Take a mixing site: fn (mixes, width), base (mixes,), scale (scales,)."""
    return HyperConnection(
        fn=read.matrix(f"{name}_fn", mixes, width),
        base=read.floats(f"{name}_base", mixes),
        scale=read.floats(f"{name}_scale", scales),
    )


def read_layer(read: WeightReader, config: ModelConfig, index: int) -> Layer:
    """Take layer `index`; raise BadFileError naming the tensor that is missing or wrong."""
    prefix = f"layers.{index}."
    hidden, streams = config.hidden_size, config.hc_mult
    mixes, width = (2 + streams) * streams, streams * hidden
    shared_width = config.expert_width * config.shared_experts
    experts = (
        _expert(read, f"{prefix}ffn.experts.{e}.", hidden, config.expert_width)
        for e in range(config.n_experts)
    )
    return Layer(
        attn_hc=read_hyper_connection(read, prefix + "hc_attn", mixes, width, 3),
        attn_norm=read.floats(prefix + "attn_norm.weight", hidden),
        attention=_attention(read, config, index),
        ffn_hc=read_hyper_connection(read, prefix + "hc_ffn", mixes, width, 3),
        ffn_norm=read.floats(prefix + "ffn_norm.weight", hidden),
        router=_router(read, config, index),
        shared=_expert(read, prefix + "ffn.shared_experts.", hidden, shared_width),
        experts=tuple(experts),
    )


def _attention(read: WeightReader, config: ModelConfig, index: int) -> Attention:
    prefix = f"layers.{index}.attn."
    hidden, head_dim, rank = config.hidden_size, config.head_dim, config.q_lora_rank
    heads_width, out_width = config.n_heads * head_dim, config.o_groups * config.o_lora_rank
    kind, ratio = config.layer_kinds[index], config.ratios[index]
    compressor, indexer = None, None
    if kind is not LayerKind.SLIDING:
        overlap = 2 if kind is LayerKind.CSA else 1
        compressor = _compressor(read, prefix + "compressor.", ratio, overlap, hidden, head_dim)
    if kind is LayerKind.CSA:
        index_width = config.index_heads * config.index_head_dim
        indexer = Indexer(
            wq_b=read.matrix(prefix + "indexer.wq_b.weight", index_width, rank),
            weights_proj=read.matrix(
                prefix + "indexer.weights_proj.weight", config.index_heads, hidden
            ),
            compressor=_compressor(
                read, prefix + "indexer.compressor.", ratio, 2, hidden, config.index_head_dim
            ),
        )
    return Attention(
        wq_a=read.matrix(prefix + "wq_a.weight", rank, hidden),
        q_norm=read.floats(prefix + "q_norm.weight", rank),
        wq_b=read.matrix(prefix + "wq_b.weight", heads_width, rank),
        wkv=read.matrix(prefix + "wkv.weight", head_dim, hidden),
        kv_norm=read.floats(prefix + "kv_norm.weight", head_dim),
        sinks=read.floats(prefix + "attn_sink", config.n_heads),
        wo_a=read.matrix(prefix + "wo_a.weight", out_width, heads_width // config.o_groups),
        wo_b=read.matrix(prefix + "wo_b.weight", hidden, out_width),
        compressor=compressor,
        indexer=indexer,
    )


def _compressor(
    read: WeightReader, prefix: str, ratio: int, overlap: int, hidden: int, head_dim: int
) -> Compressor:
    width = overlap * head_dim
    return Compressor(
        wkv=read.matrix(prefix + "wkv.weight", width, hidden),
        wgate=read.matrix(prefix + "wgate.weight", width, hidden),
        norm=read.floats(prefix + "norm.weight", head_dim),
        ape=read.floats(prefix + "ape", ratio, width),
        ratio=ratio,
    )


def _router(read: WeightReader, config: ModelConfig, index: int) -> Router:
    prefix = f"layers.{index}.ffn.gate."
    bias, table = None, None
    if config.hashed[index]:
        table = read.expert_table(
            prefix + "tid2eid", config.vocab_size, config.experts_per_token, config.n_experts
        )
    else:
        bias = read.floats(prefix + "bias", config.n_experts)
    weight = read.matrix(prefix + "weight", config.n_experts, config.hidden_size)
    return Router(weight, bias, table)


def _expert(read: WeightReader, prefix: str, hidden: int, width: int) -> Expert:
    return Expert(
        w1=read.matrix(prefix + "w1.weight", width, hidden),
        w2=read.matrix(prefix + "w2.weight", hidden, width),
        w3=read.matrix(prefix + "w3.weight", width, hidden),
    )
