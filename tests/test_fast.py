"""Packed weights and rounded activations: close to exact, the same in any company, never lost."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf_writer import MAINLINE, ROLES, GgufOptions, write_gguf
from golden.presets import Preset
from golden_files import load_golden, random_model, write_model, write_stored
from networks import logits, open_network
from numpy.typing import NDArray
from test_sources import SUPERBLOCKS

if os.environ.get("NUMBA_DISABLE_JIT") == "1":
    pytest.skip("packed kernels need the compiler", allow_module_level=True)

from localv4.kernels.packed import MX4
from localv4.model.fast import FastNumerics
from localv4.model.packing import ExpertCache, PackedMatrix, pack_dense, pack_expert
from localv4.model.transformer import Transformer

# every matrix, the head included, has whole groups of sixteen rows
WHOLE_GROUPS = Preset("groups", {**SUPERBLOCKS.dims, "vocab_size": 304}, length=0, seed=1)
IDS = np.random.default_rng(0).integers(0, 300, 150).tolist()
PLENTY = 1 << 30


def make_fast(network: Transformer, threads: int = 2, budget: int = PLENTY) -> Transformer:
    """The same network with packed weights."""
    weights = pack_dense(network.weights, threads)
    numerics = FastNumerics(threads, weights.widest, budget)
    return Transformer(network.config, weights, numerics)


def relative_error(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Median over tokens of the relative L2 distance: flips of the router are outliers."""
    distance = np.linalg.norm(actual - expected, axis=1) / np.linalg.norm(expected, axis=1)
    return float(np.median(distance))


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    """A network in official storage, exact."""
    return open_network(write_stored(load_golden("wide"), tmp_path_factory.mktemp("wide")))


def test_official_storage_is_packed(official: Transformer) -> None:
    layer = make_fast(official).weights.layers[1]
    assert isinstance(layer.attention.wq_b, PackedMatrix)
    assert isinstance(layer.shared.w2, PackedMatrix)
    assert not isinstance(layer.router.weight, PackedMatrix)
    record = pack_expert(layer.experts[0])
    assert record is not None and record.form is MX4


def test_it_is_close_to_exact_and_not_equal(official: Transformer) -> None:
    exact, fast = logits(official, IDS), logits(make_fast(official), IDS)
    assert 1e-4 < relative_error(fast, exact) < 0.03


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0, Type.MXFP4])
def test_ggml_types_are_packed(kind: Type, tmp_path: Path) -> None:
    types = dict.fromkeys(set(ROLES.values()) - {"hc", "router", "ape"}, kind)
    path, _ = write_gguf(random_model(WHOLE_GROUPS), tmp_path / "m.gguf", GgufOptions(types))
    network = open_network(path)
    fast = make_fast(network)
    assert isinstance(fast.weights.head, PackedMatrix)
    assert pack_expert(fast.weights.layers[0].experts[1]) is not None
    assert 1e-4 < relative_error(logits(fast, IDS), logits(network, IDS)) < 0.05


def test_chunks_and_threads_change_no_bit(official: Transformer) -> None:
    whole = logits(make_fast(official), IDS)
    for threads, chunks in ((2, [1]), (2, [3, 50, 7]), (1, [150]), (3, [20])):
        assert np.array_equal(logits(make_fast(official, threads), IDS, chunks), whole)


def test_a_small_cache_changes_no_bit(official: Transformer) -> None:
    assert np.array_equal(
        logits(make_fast(official, budget=1), IDS), logits(make_fast(official), IDS)
    )


def test_the_cache_keeps_to_its_budget(official: Transformer) -> None:
    experts = official.weights.layers[0].experts
    record = pack_expert(experts[0])
    assert record is not None
    cache = ExpertCache(2 * record.data.nbytes)
    first = cache.get_all(0, [0], experts)
    assert first is not None and cache.get_all(0, [0], experts) == first
    cache.get_all(0, [1], experts)
    again = cache.get_all(0, [0], experts)
    assert again is not None and again[0] is first[0]
    cache.get_all(0, [2], experts)
    assert cache.held_bytes == 2 * record.data.nbytes
    again = cache.get_all(0, [0], experts)
    assert again is not None and again[0] is first[0]
    everything = cache.get_all(0, range(len(experts)), experts)
    assert everything is not None and len(everything) == len(experts)
    assert cache.held_bytes <= 2 * record.data.nbytes


@pytest.mark.parametrize("name", ["tiny300", "odd"])
def test_what_cannot_be_packed_stays_exact(name: str, tmp_path: Path) -> None:
    golden = load_golden(name)
    network = open_network(write_model(golden, tmp_path))
    ids = golden.input_ids
    assert np.array_equal(logits(make_fast(network), ids), logits(network, ids))


def test_experts_of_mixed_types_stay_exact(tmp_path: Path) -> None:
    types = MAINLINE | {"down": Type.Q6_K, "attention": Type.F16, "shared": Type.F16}
    types |= {"indexer_q": Type.F16}
    path, _ = write_gguf(random_model(WHOLE_GROUPS), tmp_path / "m.gguf", GgufOptions(types))
    network = open_network(path)
    assert np.array_equal(logits(make_fast(network), IDS), logits(network, IDS))


def test_a_nan_scale_is_not_hidden(official: Transformer, tmp_path: Path) -> None:
    golden = load_golden("wide")
    name = "layers.2.attn.wq_a.scale"
    broken = replace(golden.stored[name], data=b"\xff" * len(golden.stored[name].data))
    stored = {**golden.stored, name: broken}
    network = open_network(write_stored(replace(golden, stored=stored), tmp_path))
    assert np.isnan(logits(make_fast(network), IDS)).any()
