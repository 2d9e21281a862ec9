"""The network equals transformers' float32 forward, however the tokens are cut into chunks."""

from pathlib import Path

import numpy as np
import pytest
from golden.presets import PRESETS
from golden_files import ConfigStyle, GoldenModel, Naming, load_golden, write_model, write_stored
from networks import logits, open_network
from numpy.typing import NDArray

from localv4.model.compressor import IndexerBlock
from localv4.model.transformer import Transformer

TOLERANCE = 1e-4
SCHEDULES = {
    "prefill": [1 << 30],
    "decode": [1],
    "odd chunks": [1, 3, 4, 5, 120, 127, 128, 129, 1, 1, 40],
    "chunks of 7": [7],
}


@pytest.fixture(scope="module", params=list(PRESETS))
def golden(request: pytest.FixtureRequest) -> GoldenModel:
    """One of the golden models."""
    return load_golden(request.param)


@pytest.fixture(scope="module")
def network(golden: GoldenModel, tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    """The golden model opened from a folder that transformers would have written."""
    folder = tmp_path_factory.mktemp(golden.name)
    return open_network(write_model(golden, folder, naming="modules", config="transformers"))


def assert_agrees(actual: NDArray[np.float32], golden: GoldenModel) -> None:
    """Logits within the tolerance, every argmax equal."""
    assert np.abs(actual - golden.logits).max() <= TOLERANCE
    assert np.array_equal(actual.argmax(1), golden.logits.argmax(1))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_logits(golden: GoldenModel, network: Transformer, schedule: str) -> None:
    assert_agrees(logits(network, golden.input_ids, SCHEDULES[schedule]), golden)


def test_chunks_change_no_bit(golden: GoldenModel, network: Transformer) -> None:
    results = [logits(network, golden.input_ids, sizes) for sizes in SCHEDULES.values()]
    for other in results[1:]:
        assert np.array_equal(results[0], other)


def test_the_indexer_chooses_the_same_sets(
    golden: GoldenModel, network: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = {id(b.attention.indexer): layer for layer, b in enumerate(network.blocks)}
    chosen: dict[int, list[set[int]]] = {}
    choose = IndexerBlock.choose

    def recording(block: IndexerBlock, *inputs: NDArray[np.float32]) -> tuple[object, object]:
        rows, counts = choose(block, *inputs)  # type: ignore[arg-type]
        sets = [set(row[:count].tolist()) for row, count in zip(rows, counts, strict=True)]
        chosen.setdefault(blocks[id(block)], []).extend(sets)
        return rows, counts

    monkeypatch.setattr(IndexerBlock, "choose", recording)
    logits(network, golden.input_ids)
    assert chosen
    for layer, sets in chosen.items():
        expected = golden.oracle[f"layer{layer}_topk"]
        assert sets == [set(row[row >= 0].tolist()) for row in expected]


NAMINGS: list[tuple[Naming, ConfigStyle]] = [
    ("official", "official"),
    ("official", "transformers"),
    ("hybrid", "transformers"),
    ("hybrid", "official"),
    ("modules", "official"),
]


@pytest.mark.parametrize(("naming", "style"), NAMINGS)
@pytest.mark.parametrize("name", ["tiny300", "odd", "wide"])
def test_every_naming_and_config_style(
    name: str, naming: Naming, style: ConfigStyle, tmp_path: Path
) -> None:
    golden = load_golden(name)
    network = open_network(write_model(golden, tmp_path, naming=naming, config=style))
    assert_agrees(logits(network, golden.input_ids), golden)


@pytest.mark.parametrize("name", ["wide", "edges"])
@pytest.mark.parametrize("shards", [1, 3])
def test_official_storage(name: str, shards: int, tmp_path: Path) -> None:
    golden = load_golden(name)
    network = open_network(write_stored(golden, tmp_path, shards=shards))
    assert_agrees(logits(network, golden.input_ids), golden)
