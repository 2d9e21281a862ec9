"""Layers whose experts have different precision: each with its own kernels, one sum for all."""

import os
from dataclasses import replace

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf.quants import quantize
from networks import logits, wide_network
from numpy.typing import NDArray

if os.environ.get("NUMBA_DISABLE_JIT") == "1":
    pytest.skip("packed kernels need the compiler", allow_module_level=True)

from localv4.kernels import blocks
from localv4.kernels.team import Team
from localv4.model.expert_source import open_store
from localv4.model.experts import Experts
from localv4.model.fast import FastTransformer
from localv4.model.matrix import Matrix, Numerics, decode
from localv4.model.packing import pack_dense
from localv4.model.state import State
from localv4.model.transformer import Transformer
from localv4.model.weights import Expert, Weights
from localv4.paging.options import PagingOptions
from localv4.paging.paged_store import PagedStore
from localv4.paging.store import ExpertStore

IDS = np.random.default_rng(0).integers(0, 300, 120).tolist()
NO_SCALE = np.zeros((1, 1), np.uint8)


def in_q8(weight: Matrix) -> Matrix:
    data = quantize(decode(weight), Type.Q8_0)
    return Matrix(blocks.Q8_0, weight.rows, weight.cols, data, NO_SCALE)


def in_q4(weight: Matrix) -> Matrix:
    data = quantize(decode(weight), Type.Q4_0)
    return Matrix(blocks.Q4_0, weight.rows, weight.cols, data, NO_SCALE)


def mixed(weights: Weights) -> Weights:
    """Every third expert in Q8_0, every third one with down in Q4_0, the others as they are."""

    def change(number: int, expert: Expert) -> Expert:
        if number % 3 == 1:
            return Expert(in_q8(expert.w1), in_q8(expert.w2), in_q8(expert.w3))
        return replace(expert, w2=in_q4(expert.w2)) if number % 3 == 2 else expert

    layers = [
        replace(layer, experts=tuple(change(n, e) for n, e in enumerate(layer.experts)))
        for layer in weights.layers
    ]
    return replace(weights, layers=tuple(layers))


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    network = wide_network(tmp_path_factory.mktemp("wide"))
    weights = mixed(network.weights)
    return Transformer(network.config, weights, Numerics(Team(2), weights.widest))


def make_fast(exact: Transformer, share: float = 2.0, members: int = 2) -> FastTransformer:
    weights = pack_dense(exact.weights, 2)
    experts = Experts([layer.experts for layer in weights.layers])
    assert all(len(forms) == 3 for forms in experts.forms)
    options = PagingOptions(int(share * experts.nbytes.sum()), "map", 2)

    def make_store(experts: Experts) -> ExpertStore:
        return open_store(experts, options)

    return FastTransformer(exact.config, weights, Team(members), make_store)


@pytest.fixture(scope="module")
def together(exact: Transformer) -> NDArray[np.float32]:
    return logits(make_fast(exact), IDS)


def test_they_are_close_to_exact(exact: Transformer, together: NDArray[np.float32]) -> None:
    expected = logits(exact, IDS)
    error = np.linalg.norm(together - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert 1e-4 < np.median(error) < 0.03


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("share", [0.4, 2.0])
@pytest.mark.parametrize("chunks", [[1], [7, 40]])
def test_chunks_threads_and_paging_change_no_bit(
    exact: Transformer,
    together: NDArray[np.float32],
    chunks: list[int],
    share: float,
    members: int,
) -> None:
    network = make_fast(exact, share, members)
    assert np.array_equal(logits(network, IDS, chunks), together)
    assert isinstance(network.store, PagedStore)
    assert (network.store.counts.evictions > 0) == (share < 1)


def test_rows_have_the_bits_of_lone_ones(exact: Transformer, together: NDArray[np.float32]) -> None:
    network = make_fast(exact)
    states = [State(exact.config, network.slack) for _ in range(5)]
    for number, state in enumerate(states):
        network.forward(np.array(IDS[: 30 + number]), state)
    ids = np.array([IDS[30 + number] for number in range(5)])
    rows = network.logits(network.decode_rows(ids, states))
    for number in range(5):
        assert np.array_equal(rows[number], together[30 + number])
