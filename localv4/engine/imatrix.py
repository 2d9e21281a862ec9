"""Collect an importance matrix: how large the inputs of each matrix are, column by column."""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from localv4.engine.engine import Engine
from localv4.engine.scoring import final_vectors
from localv4.engine.windows import Windows
from localv4.errors import NumericsError, UsageError
from localv4.kernels.team import Team
from localv4.model.matrix import Floats, Matrix, Numerics
from localv4.model.norm import rms_norm
from localv4.model.transformer import Transformer
from localv4.model.weights import Compressor, Weights
from localv4.storage.imatrix_file import ImatrixFile, TensorStatistics
from localv4.storage.imatrix_names import Place, place_of

OnTokens = Callable[[int, int], None]


class Collector(Numerics):
    """Arithmetic `exact` that adds up the squares of what it multiplies with."""

    def __init__(self, team: Team, weights: Weights) -> None:
        super().__init__(team, weights.widest)
        self._places = {id(matrix): place for place, matrix in _matrices(weights)}
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._counts: dict[str, NDArray[np.int64]] = {}
        self._experts = len(weights.layers[0].experts)

    def linear(self, x: Floats, weight: Matrix, groups: int = 1) -> Floats:
        """Return weight . x for each token, and take note of x (tokens, groups * cols)."""
        self.add(x, weight, groups)
        return super().linear(x, weight, groups)

    def add(self, x: Floats, weight: Matrix, groups: int = 1) -> None:
        """Take note of inputs (tokens, groups * cols) of a matrix. Raises NumericsError."""
        place = self._places[id(weight)]
        squares = np.square(x, dtype=np.float64).sum(0).reshape(groups, weight.cols)
        if not np.isfinite(squares).all():
            raise NumericsError(f"the inputs of {place.name} are not finite")
        rows = groups if place.expert is None else self._experts
        if place.name not in self._sums:
            self._sums[place.name] = np.zeros((rows, weight.cols))
            self._counts[place.name] = np.zeros(rows, np.int64)
        at = slice(None) if place.expert is None else slice(place.expert, place.expert + 1)
        self._sums[place.name][at] += squares
        self._counts[place.name][at] += len(x)

    def statistics(self) -> dict[str, TensorStatistics]:
        """Return what was noted, by GGUF names."""
        return {
            name: TensorStatistics(sums.astype(np.float32), self._counts[name].astype(np.float32))
            for name, sums in self._sums.items()
        }


def collect(
    engine: Engine,
    windows: Windows,
    dataset: str,
    on_tokens: OnTokens | None = None,
    make: Callable[[Team, Weights], Collector] = Collector,
) -> tuple[ImatrixFile, Collector]:
    """Read all windows with a model loaded as "exact"; return the statistics of its matrices.

    The collector that `make` returns sees all inputs. `on_tokens(done, total)` is called after each
    window. Raises UsageError for another arithmetic: its inputs are rounded before they are seen.
    """
    network = engine.network
    if not isinstance(network, Transformer):
        raise UsageError("an importance matrix is collected with --numerics exact")
    collector = make(network.numerics.team, network.weights)
    watched = Transformer(network.config, network.weights, collector)
    for index in range(len(windows)):
        for _, vectors in final_vectors(engine, watched, windows.inputs(index)):
            # the inputs of the head are wanted, its products are not
            normed = rms_norm(vectors, network.weights.norm, network.config.rms_eps)
            collector.add(normed, network.weights.head)
        if on_tokens is not None:
            on_tokens(index + 1, len(windows))
    statistics = collector.statistics()
    return ImatrixFile(statistics, (dataset,), len(windows), windows.size), collector


def _matrices(weights: Weights) -> Iterator[tuple[Place, Matrix]]:
    """Yield every matrix that products read, and where its statistics go."""
    for name, matrix in named_matrices(weights):
        place = place_of(name)
        assert place is not None
        yield place, matrix


def named_matrices(weights: Weights) -> Iterator[tuple[str, Matrix]]:
    """Yield every matrix that products read by its official name."""
    yield "head.weight", weights.head
    yield "hc_head_fn", weights.head_hc.fn
    for index, layer in enumerate(weights.layers):
        prefix, attention = f"layers.{index}.", layer.attention
        yield f"{prefix}hc_attn_fn", layer.attn_hc.fn
        yield f"{prefix}hc_ffn_fn", layer.ffn_hc.fn
        for part in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b"):
            yield f"{prefix}attn.{part}.weight", getattr(attention, part)
        if attention.compressor is not None:
            yield from _compressor(f"{prefix}attn.compressor.", attention.compressor)
        if attention.indexer is not None:
            indexer = f"{prefix}attn.indexer."
            yield f"{indexer}wq_b.weight", attention.indexer.wq_b
            yield f"{indexer}weights_proj.weight", attention.indexer.weights_proj
            yield from _compressor(f"{indexer}compressor.", attention.indexer.compressor)
        yield f"{prefix}ffn.gate.weight", layer.router.weight
        experts = [(f"experts.{number}", expert) for number, expert in enumerate(layer.experts)]
        for kind, expert in [("shared_experts", layer.shared), *experts]:
            for part in ("w1", "w2", "w3"):
                yield f"{prefix}ffn.{kind}.{part}.weight", getattr(expert, part)


def _compressor(prefix: str, compressor: Compressor) -> Iterator[tuple[str, Matrix]]:
    yield f"{prefix}wkv.weight", compressor.wkv
    yield f"{prefix}wgate.weight", compressor.wgate
