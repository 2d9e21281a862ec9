"""Synthetic models: sane numbers at any dimensions, the same ones for any number of threads."""

import hashlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numba
import numpy as np
import pytest
from model_folders import damaged_files
from networks import logits
from packed_values import as_stored, packed_values

from localv4.kernels.packed import FORMATS, group_bytes
from localv4.kernels.packed_kquants import KQUANTS
from localv4.kernels.packing_floats import B16, F32R
from localv4.kernels.team import Team
from localv4.model.config import LayerKind
from localv4.model.fast import FastTransformer
from localv4.model.matrix import Numerics
from localv4.model.packed_source import load_packed_weights, packed_config
from localv4.model.packing import PackedExpert, PackedMatrix
from localv4.model.transformer import Transformer
from localv4.model.weights import Expert
from localv4.storage.packed_folder import open_packed_folder

sys.path.append(str(Path(__file__).parents[1] / "tools"))

import make_synthetic_model
import synthetic_network
import synthetic_packed
from synthetic_network import NETWORKS, Network, sliced
from synthetic_tokenizer import special_tokens
from synthetic_values import (
    PACKED_BLOCKS,
    PLAIN_BLOCKS,
    POOL_EXPERTS,
    Noise,
    block_parts,
    expert_table,
    packed_bytes,
)

SMALL = Network(
    hidden=256,
    heads=4,
    q_rank=128,
    groups=2,
    experts=8,
    inner=128,
    index_top_k=16,
    routed_scaling=1.5,
    ratios=(0, 4, 128, 4),
    hashed=1,
    vocab=512,
    head_dim=128,
    rope_dim=64,
    o_rank=128,
    used=2,
    index_heads=4,
    index_dim=128,
)
MIXES = [
    {},
    {"experts": "Q4", "attention": "Q8", "indexer": "Q4", "shared": "MX4", "head": "Q8"},
    {"experts": "Q8", "compressor": "F32R", "router": "F32", "embedding": "F32", "head": "BF16"},
]


@pytest.fixture(scope="module")
def noise() -> Noise:
    return Noise(3)


def write(folder: Path, changes: dict[str, str], jobs: int = 2, network: Network = SMALL) -> Path:
    types = synthetic_packed.DEFAULT_TYPES | changes
    synthetic_packed.write_packed(network, types, folder, 1, jobs, lambda name, nbytes: None)
    return folder


def open_unpacked(folder: Path) -> Transformer:
    """The network with float32 copies of its packed matrices."""
    packed = open_packed_folder(folder)
    config = packed_config(packed)
    weights = as_stored(load_packed_weights(packed, config))
    return Transformer(config, weights, Numerics(Team(2), weights.widest))


@pytest.mark.parametrize("changes", MIXES)
def test_logits_are_sane_and_experts_differ(changes: dict[str, str], tmp_path: Path) -> None:
    network = open_unpacked(write(tmp_path, changes))
    kinds = network.config.layer_kinds
    assert kinds == (LayerKind.SLIDING, LayerKind.CSA, LayerKind.HCA, LayerKind.CSA)
    assert network.config.hashed == (True, False, False, False)
    rows = logits(network, np.random.default_rng(0).integers(0, 512, 150).tolist())
    assert np.isfinite(rows).all() and 0.5 < rows.std() < 2
    assert len(set(rows.argmax(axis=1))) > 50


@pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="packed kernels need the compiler")
@pytest.mark.parametrize(
    "changes",
    [
        {"experts": "IQ2+Q2", "attention": "Q6", "head": "Q8"},
        {"experts": "Q4K+Q6", "attention": "Q4K", "shared": "Q3", "indexer": "Q2"},
    ],
)
def test_small_formats_are_sane_in_fast_arithmetic(changes: dict[str, str], tmp_path: Path) -> None:
    network = replace(SMALL, inner=256, q_rank=256, o_rank=256)
    packed = open_packed_folder(write(tmp_path, changes, network=network))
    config = packed_config(packed)
    weights = load_packed_weights(packed, config)
    ids = np.random.default_rng(0).integers(0, 512, 60).tolist()
    rows = logits(FastTransformer(config, weights, Team(2)), ids)
    assert np.isfinite(rows).all() and 0.5 < rows.std() < 2
    assert len(set(rows.argmax(axis=1))) > 20


def test_packed_matrices_have_the_spread_of_their_role(tmp_path: Path) -> None:
    packed = open_packed_folder(write(tmp_path, {"attention": "Q8"}))
    weights = load_packed_weights(packed, packed_config(packed))
    layer = weights.layers[1]
    for leaf in (layer.attention.wq_b, layer.shared.w2, *_parts(layer.experts[3])):
        assert isinstance(leaf, PackedMatrix)
        assert 0.6 < packed_values(leaf).std() * np.sqrt(leaf.cols) < 1.6


def test_experts_lie_in_records_on_pages(tmp_path: Path) -> None:
    packed = open_packed_folder(write(tmp_path, {"shared": "MX4", "experts": "Q4"}))
    layer = load_packed_weights(packed, packed_config(packed)).layers[3]
    for expert, name in ((layer.shared, "MX4"), *((expert, "Q4") for expert in layer.experts)):
        assert isinstance(expert, PackedExpert)
        assert expert.record.ctypes.data % 4096 == 0 and expert.record.nbytes == expert.form.nbytes
        assert (expert.form.gate_up.name, expert.form.down.name) == (name, name)
        assert (expert.form.inner, expert.form.hidden) == (expert.w1.rows, expert.w1.cols)


def _parts(expert: Expert) -> tuple[object, ...]:
    return expert.w1, expert.w2, expert.w3


def test_threads_change_no_byte(tmp_path: Path) -> None:
    write(tmp_path / "one", {}, jobs=1)
    write(tmp_path / "three", {}, jobs=3)
    for file in sorted((tmp_path / "one").iterdir()):
        other = tmp_path / "three" / file.name
        assert _digest(file) == _digest(other), file.name
    assert damaged_files(tmp_path / "one") == []


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_experts_of_a_layer_come_from_a_pool(tmp_path: Path) -> None:
    packed = open_packed_folder(write(tmp_path, {}))
    name = "layers.2.ffn.experts"
    entry = packed.manifest.matrices[name]
    records = packed.bytes(name).reshape(entry.records, entry.record_bytes)
    assert 2 < len({record.tobytes() for record in records}) <= POOL_EXPERTS


@pytest.mark.parametrize("name", PACKED_BLOCKS)
def test_blocks_have_the_sizes_of_their_format(name: str) -> None:
    fmt = {known.name: known for known in (*FORMATS, *KQUANTS, B16, F32R)}[name]
    kind = PACKED_BLOCKS[name]
    assert (kind.values, kind.nbytes) == (16 * fmt.columns, fmt.superblock_bytes)
    assert packed_bytes(name, 64, 256) == 4 * group_bytes(fmt, 256)
    with pytest.raises(ValueError, match="has no packed form"):
        packed_bytes(name, 64, fmt.columns_unit // 2)


@pytest.mark.parametrize("std", [0.004, 0.015, 0.1, 1.0])
def test_plain_numbers_have_the_spread_that_was_asked_for(noise: Noise, std: float) -> None:
    rng = np.random.default_rng(0)
    for name in ("BF16", "F32"):
        raw = np.concatenate(list(block_parts(PLAIN_BLOCKS[name], noise, rng, 1 << 16, std)))
        if name == "BF16":
            raw = np.stack([np.zeros_like(raw.view("<u2")), raw.view("<u2")], axis=1)
        values = np.ascontiguousarray(raw).reshape(-1).view("<f4")
        assert values.size == 1 << 16
        assert 0.7 < values.std() / std < 1.5 and abs(values.mean()) < 0.05 * std


def test_a_table_names_different_experts() -> None:
    for experts in (256, 384, 8):
        table = expert_table(1000, 2 if experts == 8 else 6, experts, np.random.default_rng(0))
        assert table.min() >= 0 and table.max() < experts
        assert all(len(set(row)) == len(row) for row in table.tolist())


def test_slices_hold_every_kind_of_layer_early() -> None:
    assert sliced(NETWORKS["flash"], 3) == ((0, 4, 128), 1)
    assert sliced(NETWORKS["pro"], 2) == ((128, 4), 1)
    assert sliced(NETWORKS["flash"], 6) == ((0, 0, 4, 128, 4, 128), 3)
    assert sliced(NETWORKS["pro"], 61) == (NETWORKS["pro"].ratios, 3)


@pytest.mark.parametrize(("name", "parameters"), [("flash", 284_332), ("pro", 1_572_997)])
def test_a_whole_network_has_the_parameters_of_the_release(name: str, parameters: int) -> None:
    network = NETWORKS[name]
    total = sum(math.prod(t.shape) for t in synthetic_network.root_tensors(network))
    for layer in range(len(network.ratios)):
        tensors = synthetic_network.layer_tensors(network, layer)
        total += sum(math.prod(t.shape) for t in tensors if t.role not in ("table", "bias"))
        total += network.experts * 3 * network.inner * network.hidden
    assert total // 1_000_000 == parameters


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "flash", replace(SMALL, vocab=1024))
    arguments = ["", str(tmp_path), "--layers", "2", "--types", "experts=Q4", "--vocab", "600"]
    monkeypatch.setattr(sys, "argv", arguments)
    make_synthetic_model.main()
    packed = open_packed_folder(tmp_path)
    assert packed_config(packed).ratios == (0, 4)
    assert packed.manifest.matrices["layers.1.ffn.experts"].format == "Q4"
    assert packed.tensors["embed.weight"].shape == (600, 256)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    assert len(tokenizer["model"]["vocab"]) == len(special_tokens()) + 257


@pytest.mark.parametrize("types", ["experts", "nobody=Q4"])
def test_unknown_roles_are_refused(types: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["", "nowhere", "--types", types])
    with pytest.raises(SystemExit, match="the roles are"):
        make_synthetic_model.main()
