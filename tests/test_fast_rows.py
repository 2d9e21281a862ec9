"""Sequences that are decoded together have the bits that each has alone."""

import os
from pathlib import Path

import numpy as np
import pytest
from networks import open_network, wide_network
from numpy.typing import NDArray

if os.environ.get("NUMBA_DISABLE_JIT") == "1":
    pytest.skip("packed kernels need the compiler", allow_module_level=True)

from localv4.engine.session import Network
from localv4.kernels.team import Team
from localv4.model.expert_source import open_store
from localv4.model.experts import Experts
from localv4.model.fast import FastTransformer
from localv4.model.packing import pack_dense
from localv4.model.state import State
from localv4.model.transformer import Transformer
from localv4.paging.options import PagingOptions
from localv4.paging.paged_store import PagedStore
from localv4.paging.store import ExpertStore

LENGTHS = (1, 3, 40, 127, 128, 130, 200, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20)
STEPS = 9
RNG = np.random.default_rng(5)
PROMPTS = [RNG.integers(0, 300, length) for length in LENGTHS]
ANSWERS = [RNG.integers(0, 300, STEPS) for _ in LENGTHS]


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return wide_network(tmp_path_factory.mktemp("wide"))


def make_fast(exact: Transformer, members: int = 2, share: float = 2.0) -> FastTransformer:
    weights = pack_dense(exact.weights, 2)
    nbytes = Experts([layer.experts for layer in weights.layers]).nbytes.sum()

    def make_store(experts: Experts) -> ExpertStore:
        return open_store(experts, PagingOptions(int(share * nbytes), "map", 2))

    return FastTransformer(exact.config, weights, Team(members), make_store)


def prefilled(network: Network, number: int) -> State:
    state = State(network.config, network.slack)
    network.forward(PROMPTS[number], state)
    return state


def alone(network: Network, number: int) -> NDArray[np.float32]:
    """The final vectors of the tokens of an answer, one by one."""
    state = prefilled(network, number)
    return np.concatenate(
        [network.forward(ANSWERS[number][i : i + 1], state) for i in range(STEPS)]
    )


@pytest.fixture(scope="module")
def expected(exact: Transformer) -> list[NDArray[np.float32]]:
    network = make_fast(exact)
    return [alone(network, number) for number in range(len(LENGTHS))]


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("rows", [1, 2, 5, 9, 17])
def test_rows_have_the_bits_of_lone_ones(
    exact: Transformer, expected: list[NDArray[np.float32]], rows: int, members: int
) -> None:
    network = make_fast(exact, members)
    states = [prefilled(network, number) for number in range(rows)]
    for step in range(STEPS):
        ids = np.array([ANSWERS[number][step] for number in range(rows)])
        vectors = network.decode_rows(ids, states)
        for number in range(rows):
            assert np.array_equal(vectors[number], expected[number][step]), (number, step)
    assert [state.position for state in states] == [n + STEPS for n in LENGTHS[:rows]]


@pytest.mark.parametrize("share", [0.3, 2.0])
def test_rows_join_and_leave(
    exact: Transformer, expected: list[NDArray[np.float32]], share: float
) -> None:
    network = make_fast(exact, share=share)
    states = {number: prefilled(network, number) for number in range(6)}
    done = dict.fromkeys(states, 0)
    for turn in range(30):
        active = [n for n in states if done[n] < STEPS and (turn + n) % 3 != 0]
        if not active:
            continue
        ids = np.array([ANSWERS[n][done[n]] for n in active])
        vectors = network.decode_rows(ids, [states[n] for n in active])
        for vector, n in zip(vectors, active, strict=True):
            assert np.array_equal(vector, expected[n][done[n]])
            done[n] += 1
    assert set(done.values()) == {STEPS}
    if share < 1 and isinstance(network.store, PagedStore):
        assert network.store.counts.evictions > 0


@pytest.mark.parametrize("share", [0.3, 2.0])
def test_routes_of_rows_are_those_of_lone_ones(exact: Transformer, share: float) -> None:
    network, noted = make_fast(exact, share=share), list[tuple[NDArray[np.integer], bool]]()
    states = [prefilled(network, number) for number in range(3)]
    lone = [prefilled(network, number) for number in range(3)]
    network.on_routes = lambda chosen, is_prompt: noted.append((chosen.copy(), is_prompt))
    tokens = np.array([ANSWERS[number][0] for number in range(3)])
    network.decode_rows(tokens, states)
    for token, state in zip(tokens, lone, strict=True):
        network.forward(np.array([token]), state)
    (together, is_prompt), *alone_ones = noted
    assert not is_prompt
    assert together.shape == (3, network.config.n_layers, network.config.experts_per_token)
    expected = np.concatenate([chosen for chosen, _ in alone_ones])
    np.testing.assert_array_equal(np.sort(together), np.sort(expected))


def test_exact_rows(exact: Transformer) -> None:
    states = [prefilled(exact, number) for number in range(3)]
    vectors = exact.decode_rows(np.array([ANSWERS[n][0] for n in range(3)]), states)
    for number in range(3):
        assert np.array_equal(vectors[number], alone(exact, number)[0])


def test_experts_that_are_not_packed(tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType as Type
    from gguf_writer import MAINLINE, GgufOptions, write_gguf
    from golden_files import random_model
    from test_fast import WHOLE_GROUPS

    types = MAINLINE | {"down": Type.IQ4_NL}
    path, _ = write_gguf(random_model(WHOLE_GROUPS), tmp_path / "m.gguf", GgufOptions(types))
    network = make_fast(open_network(path))
    states = [prefilled(network, number) for number in range(3)]
    ids = np.array([ANSWERS[number][0] for number in range(3)])
    vectors = network.decode_rows(ids, states)
    for number in range(3):
        assert np.array_equal(vectors[number], alone(network, number)[0])


PIECES = (
    (128, 1, 30, 3, 1),
    (300, 2, 1, 239, 250),
    (240, 240, 7, 1, 1),
)


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("counts", PIECES)
def test_prompts_in_one_chunk_have_the_bits_of_lone_ones(
    exact: Transformer, counts: tuple[int, ...], members: int
) -> None:
    network = make_fast(exact, members)
    prompts = [np.random.default_rng(n).integers(0, 300, n + 9) for n in range(len(counts))]
    rests = [np.random.default_rng(n).integers(0, 300, count) for n, count in enumerate(counts)]
    states = [State(network.config, network.slack) for _ in counts]
    for prompt, state in zip(prompts, states, strict=True):
        network.forward(prompt, state)
    vectors = network.forward_many(np.concatenate(rests), states, counts)
    split = np.split(vectors, np.cumsum(counts)[:-1])
    token = np.array([5])
    for prompt, rest, state, own in zip(prompts, rests, states, split, strict=True):
        lone = State(network.config, network.slack)
        network.forward(prompt, lone)
        assert np.array_equal(own, network.forward(rest, lone))
        assert state.position == lone.position
        assert np.array_equal(network.forward(token, state), network.forward(token, lone))
