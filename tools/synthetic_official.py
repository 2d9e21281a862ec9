"""Write a synthetic model in the storage of the official release: FP4 experts, FP8, BF16."""

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from synthetic_network import Network, Tensor, config_json, layer_tensors, root_tensors
from synthetic_tokenizer import tokenizer_json
from synthetic_values import (
    PLAIN_BLOCKS,
    POOL_EXPERTS,
    STD_E2M1,
    Bytes,
    Noise,
    block_parts,
    expert_table,
    exponent_code,
    f8_scale,
    small_values,
    spread_of,
)

from quant.packed_writer import ShardTensor, stored_array, write_file, write_shard

F8_SPAN = 128
FP4_BLOCK = 32
INDEX_NAME = "model.safetensors.index.json"

STORED_TYPES = {
    **dict.fromkeys(("embedding", "head", "compressor", "router", "norm"), "BF16"),
    **dict.fromkeys(("attention", "indexer", "shared"), "F8_E4M3"),
    **dict.fromkeys(("mixing", "mixing_base", "mixing_scale"), "F32"),
    **dict.fromkeys(("sinks", "positions", "bias"), "F32"),
    "table": "I64",
}
"""By role; routed experts are FP4."""

_PARTS = ("w1", "w2", "w3")


@dataclass(frozen=True, slots=True)
class Fp4Expert:
    """Codes and scales of the three matrices of an expert, as w1, w2, w3."""

    codes: tuple[Bytes, ...]
    scales: tuple[Bytes, ...]


def write_official(
    network: Network,
    folder: Path,
    seed: int,
    jobs: int,
    on_progress: Callable[[str, int], None],
) -> None:
    """Write the folder with `jobs` threads; `on_progress(file, its bytes)` after every file."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = Noise(seed)
    pool = [_expert(network, noise, number) for number in range(POOL_EXPERTS)]
    shards = [[*_layer(network, layer, noise, pool)] for layer in range(len(network.ratios))]
    shards.append(
        [part for tensor in root_tensors(network) for part in _stored(tensor, network, noise)]
    )
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]

    def write(place: tuple[str, list[ShardTensor]]) -> None:
        written = write_shard(folder / place[0], place[1])
        on_progress(place[0], written.bytes)

    with ThreadPoolExecutor(jobs) as threads:
        list(threads.map(write, zip(names, shards, strict=True)))
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    weight_map = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
    documents: dict[str, Any] = {
        "config.json": config_json(network),
        "tokenizer.json": tokenizer_json(),
        INDEX_NAME: {"metadata": {"total_size": total}, "weight_map": weight_map},
    }
    for name, document in documents.items():
        text = json.dumps(document, indent=1, ensure_ascii=False).encode()
        write_file(folder / name, [text])


def _layer(
    network: Network, layer: int, noise: Noise, pool: list[Fp4Expert]
) -> Iterator[ShardTensor]:
    for tensor in layer_tensors(network, layer):
        yield from _stored(tensor, network, noise)
    prefix = f"layers.{layer}.ffn.experts."
    order = noise.generator(prefix).integers(0, len(pool), network.experts)
    for number, picked in enumerate(order):
        expert = pool[picked]
        for part, codes, scales in zip(_PARTS, expert.codes, expert.scales, strict=True):
            yield stored_array(f"{prefix}{number}.{part}.weight", "I8", codes)
            yield stored_array(f"{prefix}{number}.{part}.scale", "F8_E8M0", scales)


def _expert(network: Network, noise: Noise, number: int) -> Fp4Expert:
    rng = noise.generator(f"expert {number}")
    shapes = [(network.inner, network.hidden), (network.hidden, network.inner)]
    codes, scales = [], []
    for rows, cols in (shapes[0], shapes[1], shapes[0]):
        codes.append(noise.take(rng, rows * cols // 2).reshape(rows, cols // 2))
        low = exponent_code(spread_of("experts", cols) / STD_E2M1)
        lift = noise.take(rng, rows * cols // FP4_BLOCK) & 1
        scales.append((low + lift).astype(np.uint8).reshape(rows, cols // FP4_BLOCK))
    return Fp4Expert(tuple(codes), tuple(scales))


def _stored(tensor: Tensor, network: Network, noise: Noise) -> Iterator[ShardTensor]:
    """Yield a tensor, and its scales where it has some."""
    name, shape, role = tensor.name, tensor.shape, tensor.role
    kind = STORED_TYPES[role]
    if role == "table":
        rng = noise.generator(name)
        table = expert_table(network.vocab, network.used, network.experts, rng)
        yield stored_array(name, kind, table)
    elif len(shape) == 2 and role not in ("mixing", "positions"):
        yield ShardTensor(name, kind, shape, _matrix(tensor, kind, noise))
        if kind == "F8_E4M3":
            blocks = tuple(-(-size // F8_SPAN) for size in shape)
            code = exponent_code(f8_scale(spread_of(role, shape[-1])))
            scale = np.full(blocks, code, np.uint8)
            yield stored_array(name.removesuffix(".weight") + ".scale", "F8_E8M0", scale)
    else:
        values = small_values(role, shape, noise.generator(name), network.skew)
        yield stored_array(name, kind, _upper_halves(values) if kind == "BF16" else values)


def _upper_halves(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return float32 numbers cut off to bfloat16."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _matrix(tensor: Tensor, kind: str, noise: Noise) -> Callable[[], Iterable[Bytes]]:
    rows, cols = tensor.shape

    def parts() -> Iterator[Bytes]:
        rng, std = noise.generator(tensor.name), spread_of(tensor.role, cols)
        return block_parts(PLAIN_BLOCKS[kind], noise, rng, rows * cols, std)

    return parts
