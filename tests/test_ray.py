"""Batches on a Ray cluster of two nodes, which are processes on this machine."""

import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from terminal import ROOT, environment, needs_jit, run_here

from localv4.engine.batch_input import BatchInput, Place, parse_row, scan
from localv4.engine.batch_request import BatchSettings
from localv4.engine.batch_results import Document
from localv4.engine.batch_run import answer_rows
from localv4.engine.fingerprint import weights_fingerprint
from localv4.engine.node_engine import EngineOrder, NodeEngine, NodeFailure
from localv4.engine.ray_cluster import RayCluster
from localv4.engine.sampler import Sampling
from localv4.engine.setup import Setup
from localv4.errors import Cancelled, UsageError
from localv4.library.installed import EMBEDDED_NAME, embedded_model_path
from localv4.storage import open_checkpoint

try:
    import ray
    from ray.cluster_utils import Cluster
except ImportError:
    ray = None

pytestmark = needs_jit
needs_ray = pytest.mark.skipif(
    ray is None, reason="the library ray is not installed: pip install 'localv4[ray]'"
)

ROWS = 24
STORE_BYTES = 80 * 2**20


def order(**changes: Any) -> EngineOrder:
    """What every engine is told."""
    settings = BatchSettings(
        EMBEDDED_NAME, frozenset([EMBEDDED_NAME]), Sampling(temperature=0.8), "preview"
    )
    weights = weights_fingerprint(open_checkpoint(embedded_model_path()))
    facts: dict[str, Any] = {
        "reference": EMBEDDED_NAME,
        "weights": weights,
        "identity": settings.identity(weights, "fast", 400),
        "settings": settings,
        "parallel": 4,
        "rows": ROWS,
        "setup": Setup(ctx_size=400, threads=1),
    }
    return EngineOrder(**(facts | changes))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> BatchInput:
    """Questions of different lengths, greedy and sampled ones, and a bad row."""
    path = tmp_path_factory.mktemp("rows") / "in.jsonl"
    lines = [
        {"custom_id": f"r{i}", "prompt": f"What is {100 + i} + {i}?", "max_tokens": 40 + i}
        for i in range(ROWS - 1)
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n{bad\n")
    return scan(path)


@pytest.fixture(scope="module")
def local(rows: BatchInput) -> dict[str, Document]:
    """The results of this process alone."""
    source = (parse_row(p.line, data, False, p.digest) for p, data in rows.lines(rows.places))
    return {document["custom_id"]: document for document in answer_rows(order().load(), source)}


def test_an_engine_answers_callers_of_many_threads(
    rows: BatchInput, local: dict[str, Document]
) -> None:
    engine = NodeEngine(order())
    assert engine.load() == 4
    found: dict[str, Document] = {}

    def ask(place: Place, data: bytes) -> None:
        found[place.custom_id] = engine.answer(place.line, data, False, place.digest)

    callers = [threading.Thread(target=ask, args=line) for line in rows.lines(rows.places)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert found == local


def test_an_engine_that_fails_refuses_what_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr("localv4.engine.batch_run.BatchRun.step", fail)
    engine = NodeEngine(order())
    engine.load()
    for _ in range(2):
        with pytest.raises(NodeFailure, match="no more"):
            engine.answer(1, b'{"prompt": "Hi"}', False, b"")


def test_other_weights_are_refused() -> None:
    with pytest.raises(NodeFailure, match="has other weights"):
        NodeEngine(order(weights="0" * 64)).load()


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    given = tmp_path / "in.txt"
    given.write_text("Hi\n")
    done = run_here(
        *("batch", "-m", EMBEDDED_NAME, "-i", str(given), "-o", str(tmp_path / "out.jsonl")),
        *("--ray", "auto"),
        home=tmp_path,
    )
    assert done.code == 2
    assert "hint: pip install 'localv4[ray]'" in done.stderr


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator["Cluster"]:
    """A head that does not work and two nodes that do."""
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    head = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    found = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        found.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
    found.wait_for_nodes()
    yield found
    ray.shutdown()
    found.shutdown()


@needs_ray
def test_a_cluster_says_what_one_machine_says(
    cluster: "Cluster", rows: BatchInput, local: dict[str, Document]
) -> None:
    notes: list[str] = []
    engines = RayCluster(cluster.address, order(), False, notes.append, threading.Event())
    documents = list(engines.answer(rows.lines(rows.places)))
    assert len(documents) == ROWS
    assert {document["custom_id"]: document for document in documents} == local
    assert any(note.endswith("is ready") for note in notes)


def kill_node(cluster: "Cluster", victim: Any) -> None:
    """End a node as a power failure does: workers that outlive it would still answer rows."""
    raylet = victim.all_processes["raylet"][0].process.pid
    for worker in psutil.Process(raylet).children():
        worker.kill()
    cluster.remove_node(victim, allow_graceful=False)


@needs_ray
def test_a_node_that_dies_costs_no_row(
    cluster: "Cluster",
    rows: BatchInput,
    local: dict[str, Document],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("localv4.engine.ray_cluster.ROWS_AHEAD", 0)  # so that rows are left
    notes: list[str] = []
    engines = RayCluster(cluster.address, order(parallel=2), False, notes.append, threading.Event())
    documents = []
    for document in engines.answer(rows.lines(rows.places)):
        documents.append(document)
        both_work = sum(note.endswith("is ready") for note in notes) == 2
        if both_work and len(cluster.worker_nodes) == 2:
            victim = next(iter(cluster.worker_nodes))
            cluster.remove_node(victim, allow_graceful=False)
    assert len(documents) == ROWS
    assert {document["custom_id"]: document for document in documents} == local
    assert len(cluster.worker_nodes) == 1
    assert any(note.startswith("lost ") for note in notes)


@needs_ray
def test_cancelled_while_engines_load(cluster: "Cluster", rows: BatchInput) -> None:
    cancelled = threading.Event()
    cancelled.set()
    engines = RayCluster(cluster.address, order(), False, lambda _: None, cancelled)
    with pytest.raises(Cancelled):
        list(engines.answer(rows.lines(rows.places)))


@needs_ray
@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999"])
def test_no_cluster_at_the_address(address: str, rows: BatchInput) -> None:
    engines = RayCluster(address, order(), False, lambda _: None, threading.Event())
    with pytest.raises(UsageError, match="no Ray cluster at"):
        list(engines.answer(rows.lines(rows.places)))
