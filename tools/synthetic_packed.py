"""Write a synthetic model straight as a packed folder: nothing is packed, random bytes are."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from synthetic_network import Network, Tensor, config_json, layer_tensors, root_tensors
from synthetic_tokenizer import tokenizer_json
from synthetic_values import (
    INTEGER_FORMATS,
    PACKED_BLOCKS,
    PLAIN_BLOCKS,
    POOL_EXPERTS,
    Bytes,
    Noise,
    block_parts,
    expert_table,
    f8_scale,
    packed_bytes,
    packed_count,
    small_values,
    spread_of,
)

from quant.packed_writer import (
    PAGE,
    MatrixEntry,
    ShardTensor,
    WrittenFile,
    packed_bytes_tensor,
    records_tensor,
    rounded_up,
    stored_array,
    write_file,
    write_manifest,
    write_shard,
)

ROOT_SHARD = "embedding-and-head.safetensors"

F8_SPAN = 128  # rows and columns of E4M3 codes with one scale

DEFAULT_TYPES = {
    "embedding": "BF16",
    "head": "B16",
    "attention": "F8",
    "indexer": "F8",
    "shared": "F8",
    "compressor": "B16",
    "router": "B16",
    "experts": "MX4",
}
"""Types by role as in the official release, packed."""


@dataclass(slots=True)
class Shard:
    """The tensors of one file and what the manifest says about them."""

    name: str
    tensors: list[ShardTensor] = field(default_factory=list)
    entries: dict[str, MatrixEntry] = field(default_factory=dict)


def write_packed(
    network: Network,
    types: dict[str, str],
    folder: Path,
    seed: int,
    jobs: int,
    on_progress: Callable[[str, int], None],
) -> None:
    """Write the folder with `jobs` threads; `on_progress(file, its bytes)` after every file."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = Noise(seed)
    pools = _expert_pools(network, types["experts"], noise, jobs)
    shards = [_root_shard(network, types, noise)]
    for layer in range(len(network.ratios)):
        shards.append(_layer_shard(network, types, noise, layer, pools))
    files = dict(_small_files(network, folder))

    def write(shard: Shard) -> tuple[str, WrittenFile]:
        written = write_shard(folder / shard.name, shard.tensors)
        on_progress(shard.name, written.bytes)
        return shard.name, written

    with ThreadPoolExecutor(jobs) as threads:
        files.update(threads.map(write, shards))
    entries = {name: entry for shard in shards for name, entry in shard.entries.items()}
    write_manifest(folder, f"synthetic, seed {seed}", files, entries)


def _small_files(network: Network, folder: Path) -> Iterator[tuple[str, WrittenFile]]:
    for name, document in (
        ("config.json", config_json(network)),
        ("tokenizer.json", tokenizer_json()),
    ):
        text = json.dumps(document, indent=1, ensure_ascii=False).encode()
        yield name, write_file(folder / name, [text])


def _root_shard(network: Network, types: dict[str, str], noise: Noise) -> Shard:
    shard = Shard(ROOT_SHARD)
    for tensor in root_tensors(network):
        _add(shard, tensor, types, network, noise)
    return shard


def _layer_shard(
    network: Network,
    types: dict[str, str],
    noise: Noise,
    layer: int,
    pools: dict[int, list[Bytes]],
) -> Shard:
    shard = Shard(f"layer-{layer:05d}.safetensors")
    for tensor in layer_tensors(network, layer):
        _add(shard, tensor, types, network, noise)
    name = f"layers.{layer}.ffn.experts"
    pool = pools[network.ratios[layer]]
    order = noise.generator(name).integers(0, len(pool), network.experts)
    _add_records(shard, name, types["experts"], network, [pool[number] for number in order])
    if types["shared"] in INTEGER_FORMATS:
        name = f"layers.{layer}.ffn.shared_experts"
        record = _record(network, types["shared"], noise, name)
        _add_records(shard, name, types["shared"], network, [record])
    return shard


def _add_records(
    shard: Shard, name: str, kind: str, network: Network, records: list[Bytes]
) -> None:
    shape = (len(records), records[0].size)
    gate_up, down = _halves(kind)
    shard.tensors.append(records_tensor(name, *shape, lambda: records))
    shard.entries[name] = MatrixEntry(
        "records", gate_up, network.inner, network.hidden, down, *shape
    )


def _halves(kind: str) -> tuple[str, str]:
    """Return the formats of gate and up, and of down: "IQ2+Q2", or one for all."""
    gate_up, _, down = kind.partition("+")
    return gate_up, down or gate_up


def _add(
    shard: Shard, tensor: Tensor, types: dict[str, str], network: Network, noise: Noise
) -> None:
    """Add a tensor of any role to a shard."""
    name, shape, role = tensor.name, tensor.shape, tensor.role
    if role == "table":
        table = expert_table(network.vocab, network.used, network.experts, noise.generator(name))
        shard.tensors.append(stored_array(name, "I64", table))
    elif role not in types:
        values = small_values(role, shape, noise.generator(name), network.skew)
        shard.tensors.append(stored_array(name, "F32", values))
    elif role == "shared" and types[role] in INTEGER_FORMATS:
        return  # a record
    elif types[role] in PACKED_BLOCKS:
        _add_packed(shard, tensor, types[role], noise)
    else:
        shard.tensors.append(_plain_matrix(tensor, types[role], noise))


def _plain_matrix(tensor: Tensor, kind: str, noise: Noise) -> ShardTensor:
    rows, cols = tensor.shape

    def parts() -> Iterator[Bytes]:
        rng, std = noise.generator(tensor.name), spread_of(tensor.role, cols)
        return block_parts(PLAIN_BLOCKS[kind], noise, rng, rows * cols, std)

    return ShardTensor(tensor.name, kind, tensor.shape, parts)


def _add_packed(shard: Shard, tensor: Tensor, kind: str, noise: Noise) -> None:
    rows, cols = tensor.shape
    std = spread_of(tensor.role, cols)

    def parts() -> Iterator[Bytes]:
        rng = noise.generator(tensor.name)
        return block_parts(PACKED_BLOCKS[kind], noise, rng, packed_count(rows, cols), std)

    nbytes = packed_bytes(kind, rows, cols)
    shard.tensors.append(packed_bytes_tensor(tensor.name, nbytes, parts))
    shard.entries[tensor.name] = MatrixEntry("packed", kind, rows, cols)
    if kind == "F8":
        scales = np.full((-(-rows // F8_SPAN), cols // F8_SPAN), f8_scale(std), np.float32)
        scale_name = tensor.name.removesuffix(".weight") + ".scale"
        shard.tensors.append(stored_array(scale_name, "F32", scales))


def _expert_pools(network: Network, kind: str, noise: Noise, jobs: int) -> dict[int, list[Bytes]]:
    """Return different expert records for each kind of layer."""
    if not set(_halves(kind)) <= set(INTEGER_FORMATS):
        raise ValueError(f"experts have no record {kind}, only {', '.join(INTEGER_FORMATS)}")
    keys = [(ratio, n) for ratio in sorted(set(network.ratios)) for n in range(POOL_EXPERTS)]
    pools: dict[int, list[Bytes]] = {ratio: [] for ratio, _ in keys}
    with ThreadPoolExecutor(jobs) as threads:
        names = [f"expert {ratio} {number}" for ratio, number in keys]
        records = threads.map(lambda name: _record(network, kind, noise, name), names)
        for (ratio, _), record in zip(keys, records, strict=True):
            pools[ratio].append(record)
    return pools


def _record(network: Network, kind: str, noise: Noise, name: str) -> Bytes:
    """Return one expert, padded to whole pages: gate and up in turn, then down."""
    hidden, inner = network.hidden, network.inner
    gate_up, down = _halves(kind)
    nbytes = 2 * packed_bytes(gate_up, inner, hidden) + packed_bytes(down, hidden, inner)
    record = np.zeros(rounded_up(nbytes, PAGE), np.uint8)
    rng, filled = noise.generator(name), 0
    parts = ((gate_up, 2 * inner * hidden, hidden), (down, hidden * inner, inner))
    for half, count, cols in parts:
        std = spread_of("experts", cols)
        for part in block_parts(PACKED_BLOCKS[half], noise, rng, count, std):
            record[filled : filled + part.size] = part
            filled += part.size
    return record
