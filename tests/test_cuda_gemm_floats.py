"""CUDA twins of products of many tokens with float weights: 1e-5 of the CPU's."""

import numpy as np
import pytest
from cuda_twins import needs_compiler, run_twin
from float_weights import FloatWeights
from reference_packed import Floats, address, distance, floats, unpack_f8

from localv4.kernels.float_operations import OPERATIONS

pytestmark = needs_compiler

F32 = np.float32
TOLERANCE = 1e-5
GAP = 16


class Weights(FloatWeights):
    """A matrix that the twin multiplies with."""

    def products(self, x: Floats) -> Floats:
        """The twin's product with rows of activations."""
        out = floats(len(x), self.rows + GAP, fill=7)
        words = (*self.words, address(x), address(self.scale))
        sizes = (x.shape[1], len(x), address(out), 4 * (self.rows + GAP), 0)
        run_twin(OPERATIONS[self.name].gemm, (*words, *sizes))
        assert (out[:, self.rows :] == 7).all()
        return out[:, : self.rows]


def activations(tokens: int, cols: int) -> Floats:
    """Rows with NaN behind each."""
    x = floats(tokens, cols + GAP)
    x[:, :cols] = np.random.default_rng(tokens).standard_normal((tokens, cols))
    return x


SHAPES = [
    ("B16", 16, 16),
    ("B16", 80, 272),
    ("F32R", 16, 48),
    ("F32R", 144, 256),
    ("F8", 16, 128),
    ("F8", 272, 384),
]
matrices = pytest.mark.parametrize(("name", "rows", "cols"), SHAPES)


@matrices
@pytest.mark.parametrize("tokens", [3, 16, 27])
def test_products(name: str, rows: int, cols: int, tokens: int) -> None:
    weights, x = Weights(name, rows, cols), activations(tokens, cols)
    product = weights.products(x)
    assert distance(product, x[:, :cols].astype(float) @ weights.values.T) < TOLERANCE


@matrices
def test_large_tiles(name: str, rows: int, cols: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localv4.cuda.twins.gemm.MANY_BLOCKS", 1)
    weights, x = Weights(name, rows, cols), activations(121, cols)
    product = weights.products(x)
    assert distance(product, x[:, :cols].astype(float) @ weights.values.T) < TOLERANCE


@pytest.mark.parametrize(("name", "cols"), [("B16", 144), ("F32R", 144), ("F8", 256)])
def test_each_weight_meets_its_activation(name: str, cols: int) -> None:
    weights, x = Weights(name, 48, cols), activations(cols, cols)
    x[:, :cols] = np.eye(cols)
    rtol = 2.0**-17 if name == "F32R" else 0
    np.testing.assert_allclose(weights.products(x), weights.values.T, rtol=rtol)


def test_f8_knows_every_code() -> None:
    weights, x = Weights("F8", 16, 256), activations(256, 256)
    codes = weights.packed.reshape(256, 16)
    codes[:] = np.arange(256)[:, None]
    codes[codes & 0x7F == 0x7F] = 0
    weights.scale[:] = 1
    x[:, :256] = np.eye(256)
    expected = unpack_f8(weights.packed, weights.scale, 16, 256).T
    assert np.array_equal(weights.products(x), expected)


@pytest.mark.parametrize("name", ["B16", "F32R", "F8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_no_error_in_the_activations_is_lost(name: str, bad: float) -> None:
    weights, x = Weights(name, 16, 128), activations(5, 128)
    x[1, 77] = bad
    product = weights.products(x)
    assert not np.isfinite(product[1]).any() and np.isfinite(product[[0, 2, 3, 4]]).all()
