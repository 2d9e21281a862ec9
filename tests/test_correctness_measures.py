"""The measurements of accuracy measure what they say: rounding, components, errors, agreement."""

import os
from collections.abc import Iterator
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
from networks import logits, wide_network
from numpy.typing import NDArray

if os.environ.get("NUMBA_DISABLE_JIT") == "1":
    pytest.skip("packed kernels need the compiler", allow_module_level=True)

from measure_logit_error import (
    Errors,
    Outcome,
    RoundingNumerics,
    binary_inputs,
    components,
    is_rounded,
    outcome,
    round_activations,
)
from measure_perplexity import Scores, common
from operation_runs import Rounded, padded, run, stride
from reference_packed import address
from test_fast import make_fast, relative_error

from localv4.kernels.single_token import quantize
from localv4.kernels.team import Team
from localv4.model.matrix import Matrix
from localv4.model.transformer import Transformer

IDS = np.random.default_rng(1).integers(0, 300, 120).tolist()


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    """A network in official storage, exact."""
    return wide_network(tmp_path_factory.mktemp("wide"))


def rounding_twin(network: Transformer) -> tuple[Transformer, RoundingNumerics]:
    """The same network in an arithmetic that can round."""
    numerics = RoundingNumerics(Team(2), network.weights.widest)
    return Transformer(network.config, network.weights, numerics), numerics


def leaves(node: object) -> Iterator[Matrix]:
    """All matrices of a tree of dataclasses."""
    if isinstance(node, Matrix):
        yield node
    elif isinstance(node, tuple):
        for item in node:
            yield from leaves(item)
    elif is_dataclass(node):
        for field in fields(node):
            yield from leaves(getattr(node, field.name))


@pytest.mark.parametrize("binary", [False, True])
def test_rounding_is_that_of_the_kernels(binary: bool) -> None:
    tokens, cols = 5, 96
    x = np.random.default_rng(2).standard_normal((tokens, cols)).astype(np.float32)
    x[1, :32], x[2, 32:64] = 0, 1e-36
    rows, rounded = padded(x), Rounded(tokens, cols)
    run(1, quantize, (address(rows), stride(rows), 0, tokens, cols, *rounded.addresses(0), binary))
    codes = rounded.q[:, :cols].reshape(tokens, -1, 32).astype(np.float32)
    expected = (codes * rounded.d.view(np.float32)[:, :, None]).reshape(tokens, cols)
    assert np.array_equal(round_activations(x, binary=binary), expected)
    assert 0 < np.abs(expected - x).max() < 0.02


def test_components_are_all_products(network: Transformer) -> None:
    weights = network.weights
    parts = [id(matrix) for part in components(weights).values() for matrix in part]
    assert len(parts) == len(set(parts))
    assert set(parts) == {id(matrix) for matrix in leaves(weights)} - {id(weights.embed)}


def test_without_rounding_it_is_exact(network: Transformer) -> None:
    twin, numerics = rounding_twin(network)
    found = outcome(twin, IDS, numerics.choices, network.config)
    assert np.array_equal(found.logits, logits(network, IDS))
    assert found.choices.shape == (network.config.n_layers, len(IDS), 3)
    assert (np.diff(found.choices) > 0).all()


def test_rounding_the_same_inputs_explains_the_error_of_fast(network: Transformer) -> None:
    twin, numerics = rounding_twin(network)
    everything = [matrix for part in components(network.weights).values() for matrix in part]
    numerics.rounded = {id(matrix) for matrix in everything if is_rounded(matrix)}
    numerics.binary = binary_inputs(components(network.weights))
    assert 0 < len(numerics.rounded) < len(everything)
    simulated, fast = logits(twin, IDS), logits(make_fast(network), IDS)
    # not all of it: another order of sums turns a few codes, and each layer multiplies their number
    unexplained = relative_error(fast, simulated)
    assert unexplained < relative_error(fast, logits(network, IDS)) / 2


def test_errors_of_known_logits(network: Transformer) -> None:
    config = network.config
    exact = np.array([[0, 0, 3, 4], [0, 0, 3, 4]], np.float32)
    other = exact.copy()
    other[1, 2] = 8  # distance 5 of 5, another likeliest token
    choices = np.zeros((config.n_layers, 2, 3), np.int64)
    changed = choices.copy()
    changed[-1, 0, 0], changed[0, 0, 0] = 1, 1  # the first layer is hashed
    found = Errors.none()
    found.add(Outcome(other, changed), Outcome(exact, choices), config)
    p = np.exp([0, 0, 3, 4]) / np.exp([0, 0, 3, 4]).sum()
    q = np.exp([0, 0, 8, 4]) / np.exp([0, 0, 8, 4]).sum()
    assert np.allclose(found.distance[0], [0, 1])
    assert np.allclose(found.divergence[0], [0, (p * np.log(p / q)).sum()])
    assert found.same[0].tolist() == [True, False]
    assert found.changed[0].sum() == 1
    assert found.changed[0].size == 2 * (config.n_layers - sum(config.hashed))


@pytest.mark.parametrize(
    ("a", "b", "shared"),
    [([1, 2, 3], [1, 2, 3], 3), ([1, 2, 3], [1, 9, 3], 1), ([1, 2], [1, 2, 3], 2), ([], [1], 0)],
)
def test_common_prefixes(a: list[int], b: list[int], shared: int) -> None:
    assert common(a, b) == common(b, a) == shared


def test_scores_of_two_engines() -> None:
    losses: NDArray[np.float64] = np.log([[2.0, 8.0], [4.0, 4.0]])
    found = Scores(losses, np.array([[5, 6], [5, 7]]), np.array([5, 7]))
    assert np.allclose(found.perplexities, [4, 4])
    assert found.hits.tolist() == [0.5, 1.0]
    assert found.agreement == 0.5
    assert found.difference == "+0.000 % ± 49.013"  # ln 2 / sqrt(2)
