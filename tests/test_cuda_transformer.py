"""A network whose programs run on a GPU, which the host plays here: the same as the host's own."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from cuda_twins import needs_compiler
from golden_files import random_model, write_model
from host_gpu import HostGpu
from networks import logits, open_network
from numpy.typing import NDArray
from test_fast import WHOLE_GROUPS, make_fast

from localv4.cuda.offload import offload
from localv4.cuda.transformer import GpuTransformer
from localv4.kernels import row_operations
from localv4.kernels.row_operations import RowFormat
from localv4.kernels.team import Team
from localv4.model.expert_source import open_store
from localv4.model.packing import pack_dense
from localv4.model.transformer import Transformer
from localv4.paging.options import PagingOptions

pytestmark = needs_compiler

IDS = np.random.default_rng(0).integers(0, 300, 40).tolist()
PLENTY = 1 << 28


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    """A network in official storage."""
    folder: Path = tmp_path_factory.mktemp("model")
    write_model(folder, *random_model(WHOLE_GROUPS))
    return open_network(folder)


def on_gpu(
    network: Transformer,
    *,
    layers: int | None = None,
    capacity: int = PLENTY,
    rows: RowFormat = row_operations.F32,
) -> GpuTransformer:
    """The same network with its first layers on a GPU that has room for some experts."""
    weights = pack_dense(network.weights, 2)
    return offload(
        HostGpu(),
        network.config,
        weights,
        Team(2),
        lambda experts: open_store(experts, PagingOptions(PLENTY, "map", readers=2)),
        rows,
        layers=network.config.n_layers if layers is None else layers,
        capacity=capacity,
    )


def assert_close(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    """Same choices, and values within the rounding of float32 sums in another order."""
    assert (actual.argmax(1) == expected.argmax(1)).all()
    distance = np.linalg.norm(actual - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert distance.max() < 1e-4, distance


@pytest.mark.parametrize("chunks", [(1,), (7, 1), (40,)])
def test_same_logits(exact: Transformer, chunks: Sequence[int]) -> None:
    expected = logits(make_fast(exact), IDS, chunks)
    assert_close(logits(on_gpu(exact), IDS, chunks), expected)
