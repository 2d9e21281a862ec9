"""Write a synthetic model as one GGUF file, as the converter of llama.cpp lays it out."""

import math
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from synthetic_ggml import GGML_BLOCKS, TYPE_NUMBERS
from synthetic_network import HEAD_STREAMS, Network, Tensor, layer_tensors, root_tensors
from synthetic_tokenizer import byte_letters, special_tokens
from synthetic_values import (
    POOL_EXPERTS,
    Bytes,
    Noise,
    block_parts,
    expert_table,
    small_values,
    spread_of,
)

ALIGNMENT = 32

DEFAULT_TYPES = {
    "embedding": "Q8_0",
    "head": "Q8_0",
    "attention": "Q8_0",
    "indexer": "Q8_0",
    "shared": "Q8_0",
    "compressor": "BF16",
    "router": "BF16",
    "gate_up": "MXFP4",
    "down": "MXFP4",
}
"""Types by role, as converted from the official release."""

NAMES = {
    **{"embed.weight": "token_embd", "head.weight": "output", "norm.weight": "output_norm"},
    **{f"hc_head_{part}": f"output_hc_{part}" for part in ("fn", "base", "scale")},
    "attn.wq_a.weight": "attn_q_a",
    "attn.q_norm.weight": "attn_q_a_norm",
    "attn.wq_b.weight": "attn_q_b",
    "attn.wkv.weight": "attn_kv",
    "attn.kv_norm.weight": "attn_kv_a_norm",
    "attn.attn_sink": "attn_sinks",
    "attn.wo_a.weight": "attn_output_a",
    "attn.wo_b.weight": "attn_output_b",
    "attn.compressor.wkv.weight": "attn_compressor_kv",
    "attn.compressor.wgate.weight": "attn_compressor_gate",
    "attn.compressor.norm.weight": "attn_compressor_norm",
    "attn.compressor.ape": "attn_compressor_ape",
    "attn.indexer.wq_b.weight": "indexer.attn_q_b",
    "attn.indexer.weights_proj.weight": "indexer.proj",
    "attn.indexer.compressor.wkv.weight": "indexer_compressor_kv",
    "attn.indexer.compressor.wgate.weight": "indexer_compressor_gate",
    "attn.indexer.compressor.norm.weight": "indexer_compressor_norm",
    "attn.indexer.compressor.ape": "indexer_compressor_ape",
    "ffn.gate.weight": "ffn_gate_inp",
    "ffn.gate.tid2eid": "ffn_gate_tid2eid",
    "ffn.shared_experts.w1.weight": "ffn_gate_shexp",
    "ffn.shared_experts.w2.weight": "ffn_down_shexp",
    "ffn.shared_experts.w3.weight": "ffn_up_shexp",
}
"""The official name of a root or layer tensor -> its name here, `.weight` left out."""

_EXPERTS = {"ffn_gate_exps": "gate_up", "ffn_up_exps": "gate_up", "ffn_down_exps": "down"}
_CONTROL, _NORMAL, _UNUSED = 3, 1, 5


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor of the file; `parts` yields its bytes."""

    name: str
    shape: tuple[int, ...]
    kind: str
    parts: Callable[[], Iterable[NDArray[Any]]]

    @property
    def nbytes(self) -> int:
        """Size of all parts together."""
        if self.kind == "I32":
            return 4 * math.prod(self.shape)
        block = GGML_BLOCKS[self.kind]
        return math.prod(self.shape) // block.values * block.nbytes


def write_gguf(
    network: Network,
    types: dict[str, str],
    path: Path,
    seed: int,
    jobs: int,
    on_progress: Callable[[str, int], None],
) -> None:
    """Write the file with `jobs` threads; `on_progress(tensor, its bytes)` after every tensor."""
    noise = Noise(seed)
    items = list(_items(network, types, noise, jobs))
    header = _header(network, items)
    start = _aligned(len(header))
    places: list[tuple[Item, int]] = []
    for item in items:
        places.append((item, start))
        start = _aligned(start + item.nbytes)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(start)

    def write(place: tuple[Item, int]) -> None:
        item, offset = place
        with path.open("r+b", buffering=0) as file:
            file.seek(offset)
            for part in item.parts():
                _write_all(file, part.reshape(-1).view(np.uint8).data)
            if file.tell() != offset + item.nbytes:
                raise ValueError(f"{item.name} has not {item.nbytes} bytes")
        on_progress(item.name, item.nbytes)

    with ThreadPoolExecutor(jobs) as threads:
        list(threads.map(write, places))


def _write_all(file: Any, piece: memoryview) -> None:
    while piece:
        piece = piece[file.write(piece) :]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


# --- tensors


def _items(network: Network, types: dict[str, str], noise: Noise, jobs: int) -> Iterator[Item]:
    for tensor in root_tensors(network):
        yield _item(tensor, NAMES[tensor.name] + ".weight", types, network, noise)
    pools = _expert_pools(network, types, noise, jobs)
    for layer in range(len(network.ratios)):
        prefix = f"layers.{layer}."
        for tensor in layer_tensors(network, layer):
            rest = tensor.name.removeprefix(prefix)
            stem = NAMES.get(rest, rest.removesuffix(".weight"))
            leaf = "exp_probs_b.bias" if tensor.role == "bias" else stem + ".weight"
            yield _item(tensor, f"blk.{layer}.{leaf}", types, network, noise)
        for leaf, role in _EXPERTS.items():
            yield _experts(f"blk.{layer}.{leaf}.weight", types[role], leaf, network, pools, noise)


def _item(tensor: Tensor, name: str, types: dict[str, str], network: Network, noise: Noise) -> Item:
    shape, role = tensor.shape, tensor.role
    rng = noise.generator(tensor.name)
    if role == "table":
        table = expert_table(network.vocab, network.used, network.experts, rng)
        return Item(name, shape, "I32", lambda: [table.astype(np.int32)])
    if role not in types:
        return Item(name, shape, "F32", lambda: [small_values(role, shape, rng, network.skew)])
    kind, std = types[role], spread_of(role, shape[-1])
    _check(name, kind, shape)
    count = math.prod(shape)
    return Item(name, shape, kind, lambda: block_parts(GGML_BLOCKS[kind], noise, rng, count, std))


def _check(name: str, kind: str, shape: tuple[int, ...]) -> None:
    if kind not in GGML_BLOCKS or shape[-1] % GGML_BLOCKS[kind].values:
        raise ValueError(f"{name}: rows of {shape[-1]} cannot have the type {kind}")


def _expert_shape(leaf: str, network: Network) -> tuple[int, int]:
    wide = (network.inner, network.hidden)
    return wide[::-1] if leaf == "ffn_down_exps" else wide


def _expert_pools(
    network: Network, types: dict[str, str], noise: Noise, jobs: int
) -> dict[str, list[Bytes]]:
    """Return some different matrices of each of the three kinds."""

    def matrix(key: tuple[str, int]) -> Bytes:
        leaf, number = key
        kind, (rows, cols) = types[_EXPERTS[leaf]], _expert_shape(leaf, network)
        _check(leaf, kind, (rows, cols))
        rng, std = noise.generator(f"{leaf} {number}"), spread_of("experts", cols)
        blocks = block_parts(GGML_BLOCKS[kind], noise, rng, rows * cols, std)
        return np.concatenate(list(blocks))

    keys = [(leaf, number) for leaf in _EXPERTS for number in range(POOL_EXPERTS)]
    with ThreadPoolExecutor(jobs) as threads:
        matrices = list(threads.map(matrix, keys))
    pools: dict[str, list[Bytes]] = {leaf: [] for leaf in _EXPERTS}
    for (leaf, _), found in zip(keys, matrices, strict=True):
        pools[leaf].append(found)
    return pools


def _experts(
    name: str,
    kind: str,
    leaf: str,
    network: Network,
    pools: dict[str, list[Bytes]],
    noise: Noise,
) -> Item:
    pool = pools[leaf]
    order = noise.generator(name).integers(0, len(pool), network.experts)
    shape = (network.experts, *_expert_shape(leaf, network))
    return Item(name, shape, kind, lambda: (pool[number] for number in order))


# --- header


def _header(network: Network, items: list[Item]) -> bytes:
    keys = b"".join(_key(key, value) for key, value in _metadata(network).items())
    infos, offset = [], 0
    for item in items:
        dims = struct.pack(f"<I{len(item.shape)}Q", len(item.shape), *reversed(item.shape))
        infos.append(
            _string(item.name) + dims + struct.pack("<IQ", TYPE_NUMBERS[item.kind], offset)
        )
        offset = _aligned(offset + item.nbytes)
    count = len(_metadata(network))
    return b"GGUF" + struct.pack("<IQQ", 3, len(items), count) + keys + b"".join(infos)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _key(key: str, value: Any) -> bytes:
    return _string(key) + _value(value)


def _value(value: Any, whole: Literal["I", "i"] = "I") -> bytes:
    """Return type number and bytes of a value: bool, u32, f32, string, or a list.

    Numbers in a list are i32, as llama.cpp insists on for the kinds of tokens.
    """
    if isinstance(value, list):
        items = [_value(item, "i") for item in value]
        head = struct.pack("<I", 9) + items[0][:4] + struct.pack("<Q", len(items))
        return head + b"".join(item[4:] for item in items)
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return struct.pack("<I" + whole, {"I": 4, "i": 5}[whole], value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    return struct.pack("<I", 8) + _string(value)


def _metadata(n: Network) -> dict[str, Any]:
    layers = len(n.ratios)
    own = {
        "context_length": 1 << 20,
        "embedding_length": n.hidden,
        "embedding_length_out": n.hidden * HEAD_STREAMS,
        "block_count": layers,
        "vocab_size": n.vocab,
        "feed_forward_length": n.inner,
        "attention.head_count": n.heads,
        "attention.head_count_kv": 1,
        "attention.key_length": n.head_dim,
        "attention.value_length": n.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.q_lora_rank": n.q_rank,
        "attention.sliding_window": n.window,
        "attention.indexer.head_count": n.index_heads,
        "attention.indexer.key_length": n.index_dim,
        "attention.indexer.top_k": n.index_top_k,
        "attention.output_group_count": n.groups,
        "attention.output_lora_rank": n.o_rank,
        "attention.compress_ratios": list(n.ratios),
        "attention.compress_rope_freq_base": 160000.0,
        "hyper_connection.count": HEAD_STREAMS,
        "hyper_connection.sinkhorn_iterations": 20,
        "hyper_connection.epsilon": 1e-6,
        "hash_layer_count": n.hashed,
        "expert_count": n.experts,
        "expert_used_count": n.used,
        "expert_shared_count": 1,
        "expert_feed_forward_length": n.inner,
        "expert_weights_scale": n.routed_scaling,
        "expert_weights_norm": True,
        "expert_gating_func": 4,  # sqrtsoftplus
        "swiglu_clamp_exp": [10.0] * layers,
        "swiglu_clamp_shexp": [10.0] * layers,
        "rope.dimension_count": n.rope_dim,
        "rope.freq_base": 10000.0,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 16.0,
        "rope.scaling.original_context_length": 65536,
        "rope.scaling.yarn_beta_fast": 32.0,
        "rope.scaling.yarn_beta_slow": 1.0,
    }
    return {
        "general.architecture": "deepseek4",
        "general.type": "model",
        "general.name": f"synthetic, {layers} layers",
        **{f"deepseek4.{key}": value for key, value in own.items()},
        **_tokenizer(n.vocab),
    }


def _tokenizer(vocab: int) -> dict[str, Any]:
    special, letters = special_tokens(), byte_letters()
    space = letters[32]
    tokens = [*special, *letters, space + "t"]
    unused = [f"<unused{number}>" for number in range(vocab - len(tokens))]
    kinds = [_CONTROL] * len(special) + [_NORMAL] * (len(tokens) - len(special))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "deepseek-v3",
        "tokenizer.ggml.tokens": tokens + unused,
        "tokenizer.ggml.token_type": kinds + [_UNUSED] * len(unused),
        "tokenizer.ggml.merges": [f"{space} t"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
    }
