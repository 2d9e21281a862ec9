"""Packed weights and rounded activations: close to exact, the same in any company, never lost."""

import itertools
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf_writer import MAINLINE, ROLES, GgufOptions, write_gguf
from golden.presets import Preset
from golden_files import load_golden, random_model, write_model, write_stored
from networks import logits, open_network, wide_network
from numpy.typing import NDArray
from test_sources import SUPERBLOCKS

if os.environ.get("NUMBA_DISABLE_JIT") == "1":
    pytest.skip("packed kernels need the compiler", allow_module_level=True)

from localv4.engine.engine import Engine
from localv4.engine.setup import Setup
from localv4.kernels import gemm, gemm_floats
from localv4.kernels.packed import MX4
from localv4.kernels.packing_floats import B16
from localv4.kernels.team import Team
from localv4.model.expert_source import open_store
from localv4.model.experts import Experts
from localv4.model.fast import FastTransformer, can_run
from localv4.model.packing import PackedExpert, PackedMatrix, expert_form, pack_dense
from localv4.model.program import Scratch
from localv4.model.transformer import Transformer
from localv4.paging.options import PagingOptions
from localv4.paging.paged_store import PagedStore
from localv4.paging.store import ExpertStore

# every matrix, the head included, has whole groups of sixteen rows
WHOLE_GROUPS = Preset("groups", {**SUPERBLOCKS.dims, "vocab_size": 304}, length=0, seed=1)
IDS = np.random.default_rng(0).integers(0, 300, 150).tolist()
PLENTY = 1 << 30


def make_fast(network: Transformer, threads: int = 2, budget: int = PLENTY) -> FastTransformer:
    """The same network with packed weights."""
    weights, options = pack_dense(network.weights, threads), PagingOptions(budget, "map", readers=2)

    def make_store(experts: Experts) -> ExpertStore:
        return open_store(experts, options)

    return FastTransformer(network.config, weights, Team(threads), make_store)


def relative_error(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Median over tokens of the relative L2 distance: flips of the router are outliers."""
    distance = np.linalg.norm(actual - expected, axis=1) / np.linalg.norm(expected, axis=1)
    return float(np.median(distance))


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    """A network in official storage, exact."""
    return wide_network(tmp_path_factory.mktemp("wide"))


def test_official_storage_is_packed(official: Transformer) -> None:
    layer = make_fast(official).weights.layers[1]
    assert isinstance(layer.attention.wq_b, PackedMatrix)
    assert isinstance(layer.shared.w2, PackedMatrix)
    assert isinstance(layer.router.weight, PackedMatrix) and layer.router.weight.form is B16
    form = expert_form(layer.experts[0])
    assert form is not None and form.gate_up is form.down is MX4


def test_it_is_close_to_exact_and_not_equal(official: Transformer) -> None:
    exact, fast = logits(official, IDS), logits(make_fast(official), IDS)
    assert 1e-4 < relative_error(fast, exact) < 0.03


GGML_TYPES = (
    *(Type.Q8_0, Type.Q4_0, Type.MXFP4, Type.Q4_K),
    *(Type.Q6_K, Type.Q3_K, Type.Q2_K, Type.IQ2_XXS),
)


@pytest.mark.parametrize("kind", GGML_TYPES, ids=lambda kind: kind.name)
def test_ggml_types_are_packed(kind: Type, tmp_path: Path) -> None:
    types = dict.fromkeys(set(ROLES.values()) - {"hc", "router", "ape"}, kind)
    path, _ = write_gguf(random_model(WHOLE_GROUPS), tmp_path / "m.gguf", GgufOptions(types))
    network = open_network(path)
    fast = make_fast(network)
    assert isinstance(fast.weights.head, PackedMatrix)
    assert isinstance(fast.weights.layers[0].shared, PackedExpert)
    assert expert_form(fast.weights.layers[0].experts[1]) is not None
    together = logits(fast, IDS)
    assert 1e-4 < relative_error(together, logits(network, IDS)) < 0.05
    assert np.array_equal(logits(fast, IDS[:40], [1]), together[:40])


def test_chunks_and_threads_change_no_bit(official: Transformer) -> None:
    whole = logits(make_fast(official), IDS)
    for threads, chunks in ((2, [1]), (2, [3, 50, 7]), (1, [150]), (3, [20])):
        assert np.array_equal(logits(make_fast(official, threads), IDS, chunks), whole)


@pytest.mark.parametrize("kind", ["exact", "fast"])
def test_only_the_wanted_vectors_come_back(official: Transformer, kind: str) -> None:
    network = official if kind == "exact" else make_fast(official)
    ids = np.arange(5, 17)
    whole = network.forward(ids, network.new_state())
    for wanted in (1, 3, 40):
        last = network.forward(ids, network.new_state(), wanted)
        np.testing.assert_array_equal(last, whole[-wanted:])


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_small_cache_changes_no_bit(official: Transformer, share: float) -> None:
    nbytes = int(Experts([layer.experts for layer in official.weights.layers]).nbytes.sum())
    small = make_fast(official, budget=int(share * nbytes))
    whole = logits(make_fast(official), IDS)
    assert np.array_equal(logits(small, IDS), whole)
    assert np.array_equal(logits(small, IDS, [1]), whole)
    assert isinstance(small.store, PagedStore)
    assert small.store.counts.evictions > 0 and small.store.counts.misses.sum() > 0
    assert small.store.arena.used <= small.store.arena.capacity < nbytes


@pytest.mark.parametrize("name", ["tiny300", "odd"])
def test_other_dimensions_are_left_to_exact(name: str, tmp_path: Path) -> None:
    folder = write_model(load_golden(name), tmp_path)
    assert not can_run(open_network(folder).config)
    assert Engine.load(folder, Setup(threads=1, numerics="fast")).network.name == "exact"


def test_experts_without_a_packed_form_are_multiplied_as_they_are_stored(tmp_path: Path) -> None:
    types = MAINLINE | {"down": Type.IQ4_NL, "attention": Type.IQ4_XS, "shared": Type.Q5_K}
    path, _ = write_gguf(random_model(WHOLE_GROUPS), tmp_path / "m.gguf", GgufOptions(types))
    network = open_network(path)
    fast = make_fast(network)
    together = logits(fast, IDS)
    assert relative_error(together, logits(network, IDS)) < 0.03
    assert np.array_equal(logits(fast, IDS, [1]), together)


def test_a_nan_scale_is_not_hidden(official: Transformer, tmp_path: Path) -> None:
    golden = load_golden("wide")
    name = "layers.2.attn.wq_a.scale"
    broken = replace(golden.stored[name], data=b"\xff" * len(golden.stored[name].data))
    stored = {**golden.stored, name: broken}
    network = open_network(write_stored(replace(golden, stored=stored), tmp_path))
    assert np.isnan(logits(make_fast(network), IDS)).any()


def test_products_that_run_at_the_same_time_have_scratch_memory_of_their_own() -> None:
    scratch = Scratch.of(3, 64)
    ends = sorted(
        (part.ctypes.data, part.ctypes.data + part.nbytes)
        for part in (scratch.panels, scratch.float_panels, scratch.rows)
    )
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))
    assert scratch.panels.nbytes == 3 * gemm.SCRATCH_BYTES
    assert scratch.float_panels.nbytes == 3 * gemm_floats.SCRATCH_BYTES


def test_integers_and_floats_side_by_side_have_the_same_bits_each_time(tmp_path: Path) -> None:
    types = dict.fromkeys(set(ROLES.values()) - {"hc", "router", "ape", "compressor"}, Type.Q8_0)
    path, _ = write_gguf(random_model(WHOLE_GROUPS), tmp_path / "m.gguf", GgufOptions(types))
    network = open_network(path)
    expected = logits(make_fast(network, threads=1), IDS)
    fast = make_fast(network, threads=4)
    for _ in range(10):
        assert np.array_equal(logits(fast, IDS), expected)
