"""Networks with compressed rows in every format: the same bits in any company, close to float32."""

import os
from pathlib import Path

import numpy as np
import pytest
from golden_files import load_golden, write_model
from networks import logits, wide_network
from numpy.typing import NDArray

if os.environ.get("NUMBA_DISABLE_JIT") == "1":
    pytest.skip("packed kernels need the compiler", allow_module_level=True)

from localv4.engine.engine import Engine
from localv4.engine.fingerprint import arithmetic_fingerprint
from localv4.engine.memory import MemoryOptions
from localv4.engine.session import Session
from localv4.engine.setup import Setup
from localv4.errors import UsageError
from localv4.kernels import row_operations
from localv4.kernels.row_operations import BF16, COMPACT, F32, RowFormat
from localv4.kernels.team import Team
from localv4.library.installed import embedded_model_path
from localv4.model.config_json import read_config
from localv4.model.fast import FastTransformer
from localv4.model.packing import pack_dense
from localv4.model.snapshot import fork
from localv4.model.state import State
from localv4.model.transformer import Transformer
from localv4.planning.model_facts import held_state_bytes

IDS = np.random.default_rng(7).integers(0, 300, 400).tolist()
CONTEXT = 1000
formats = pytest.mark.parametrize(
    "rows", row_operations.FORMATS.values(), ids=row_operations.FORMATS.keys()
)
narrow = pytest.mark.parametrize("rows", [BF16, COMPACT], ids=lambda rows: rows.name)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return wide_network(tmp_path_factory.mktemp("wide"))


def make_fast(exact: Transformer, rows: RowFormat, threads: int = 2) -> FastTransformer:
    weights = pack_dense(exact.weights, threads)
    return FastTransformer(exact.config, weights, Team(threads), rows=rows)


@pytest.fixture(scope="module")
def wide(exact: Transformer) -> NDArray[np.float32]:
    """Logits with rows of float32."""
    return logits(make_fast(exact, F32), IDS)


def distance(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Median over tokens of the relative L2 distance: flips of the router are outliers."""
    error = np.linalg.norm(actual - expected, axis=1) / np.linalg.norm(expected, axis=1)
    return float(np.median(error))


@narrow
def test_chunks_and_threads_change_no_bit(exact: Transformer, rows: RowFormat) -> None:
    whole = logits(make_fast(exact, rows), IDS)
    for threads, chunks in ((3, [131]), (2, [3, 50, 7]), (1, [399, 1])):
        assert np.array_equal(logits(make_fast(exact, rows, threads), IDS, chunks), whole)
    assert np.array_equal(logits(make_fast(exact, rows), IDS[:200], [1]), whole[:200])


def test_fewer_bytes_are_further_from_float32(exact: Transformer, wide: np.ndarray) -> None:
    errors = [distance(logits(make_fast(exact, rows), IDS), wide) for rows in (BF16, COMPACT)]
    assert 0 < errors[0] < errors[1] < 0.05


@formats
def test_several_sequences_together(exact: Transformer, rows: RowFormat) -> None:
    network = make_fast(exact, rows)
    states = []
    for length in (5, 130, 300):
        state = network.new_state()
        network.forward(np.array(IDS[:length]), state)
        states.append(state)
    alone = [network.forward(np.array([9]), fork(state)) for state in states]
    together = network.decode_rows(np.array([9, 9, 9]), states)
    assert np.array_equal(together, np.concatenate(alone))


@narrow
def test_going_back_and_branches(exact: Transformer, rows: RowFormat) -> None:
    network = make_fast(exact, rows)
    clean = logits(network, IDS)
    session = Session(network, CONTEXT)
    session.extend(IDS[:300])
    branch = session.fork()
    branch.extend([7] * 70)
    session.extend([8] * 30)
    session.rollback(session.ladder.below(200).position)  # type: ignore[union-attr]
    rest = IDS[session.position :]
    assert np.array_equal(session.all_logits(rest), clean[-len(rest) :])
    branch.rollback(300)
    assert np.array_equal(branch.all_logits(IDS[300:]), clean[300:])


def test_a_state_of_another_format_is_refused(exact: Transformer) -> None:
    network = make_fast(exact, COMPACT)
    state = State(network.config, network.slack)
    with pytest.raises(ValueError, match="f32 rows"):
        network.forward(np.array([1]), state)
    with pytest.raises(ValueError, match="no float32"):
        exact.forward(np.array(IDS[:128]), network.new_state())


@formats
def test_the_state_has_the_bytes_that_were_planned(rows: RowFormat) -> None:
    config = read_config(embedded_model_path() / "config.json")
    few, many = 1 << 16, 1 << 20
    sizes = []
    for tokens in (few, many):
        state = State(config, 256, rows)
        state.begin(tokens)
        sizes.append(state.nbytes)
    planned = held_state_bytes(config, many, rows) - held_state_bytes(config, few, rows)
    assert sizes[1] - sizes[0] == planned


def test_exact_keeps_float32(tmp_path: Path) -> None:
    folder = write_model(load_golden("tiny300"), tmp_path)
    with pytest.raises(UsageError, match="--kv compact"):
        Engine.load(folder, Setup(threads=1, numerics="exact", memory=MemoryOptions(kv="compact")))
    engine = Engine.load(folder, Setup(threads=1, numerics="exact", memory=MemoryOptions(kv="f32")))
    assert engine.network.rows is F32


def test_the_option_chooses_the_format_and_saved_sessions_know_it() -> None:
    marks = set()
    for name in row_operations.FORMATS:
        engine = Engine.load(
            embedded_model_path(),
            Setup(threads=1, memory=MemoryOptions(kv=name)),  # type: ignore[arg-type]
        )
        assert engine.network.rows.name == name
        assert engine.new_session().state.rows.name == name
        marks.add(arithmetic_fingerprint(engine.checkpoint, engine.network))
    assert len(marks) == 3
