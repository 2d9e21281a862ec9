"""llama.cpp in its own process: the protocol, and that its faults stay its own."""

import ast
import importlib.util
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_peer import decoded, use_fake_llama
from gguf_writer import GgufOptions, write_gguf
from golden.presets import Preset
from golden_files import random_model
from networks import logits as network_logits
from networks import open_network
from test_sources import SUPERBLOCKS

from localv4.engine import peer as peer_module
from localv4.engine.peer import Peer, PeerError, PeerSettings, worker_command
from localv4.errors import Cancelled, NotFoundError

FILE = Path("model.gguf")

# llama.cpp wants index heads of at least 64 values
LOADABLE = Preset("peer", {**SUPERBLOCKS.dims, "index_head_dim": 64}, length=0, seed=1)


@pytest.fixture
def peer() -> Iterator[Peer]:
    """A peer on this interpreter, ended after the test."""
    made = Peer(worker_command(None), PeerSettings())
    yield made
    made.close()


def test_hello(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_llama(monkeypatch)
    facts = peer.hello()
    assert (facts.package, facts.ggml, facts.system) == ("0.0.1", None, "CPU : FAKE = 1 | REAL = 0")
    assert facts.python == sys.version.split()[0]
    assert peer.pid is not None


def test_a_prompt(peer: Peer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_fake_llama(monkeypatch, log=tmp_path / "log")
    peer.load(FILE, threads=2)
    tokens = [index % 300 for index in range(2500)]
    context = peer.open("pp", 100, tokens)
    assert (context.n_ctx, context.n_batch, context.n_ubatch) == (2500, 2048, 512)
    assert context.flash_attention == "auto (enabled)"
    peer.prepare()
    assert decoded(tmp_path / "log") == [(0, 100, [])]
    first = peer.run(logits=True)
    # a batch is full, and only the last token has logits
    assert decoded(tmp_path / "log")[1:] == [(100, 2048, []), (2148, 352, [351])]
    assert 0 < first.seconds < 60
    assert first.logits is not None and first.logits.shape == (300,)
    peer.prepare()
    assert len(decoded(tmp_path / "log")) == 3  # the state of the depth was kept
    again = peer.run(logits=True).logits
    assert again is not None and np.array_equal(again, first.logits)


def test_generating(peer: Peer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_fake_llama(monkeypatch, log=tmp_path / "log")
    peer.load(FILE, threads=2)
    peer.open("tg", 2, [5, 6, 7, 8, 9])
    peer.prepare()
    assert peer.run().logits is None
    assert decoded(tmp_path / "log") == [(0, 2, []), (2, 1, [0]), (3, 1, [0]), (4, 1, [0])]
    peer.open("tg", 0, [5, 6])
    peer.prepare()
    peer.run()
    assert decoded(tmp_path / "log")[4:] == [(0, 1, [0]), (1, 1, [0])]


def test_a_state_that_is_not_kept_is_read_again(
    peer: Peer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_fake_llama(monkeypatch, "no state", tmp_path / "log")
    peer.load(FILE, threads=2)
    peer.open("pp", 3, [1, 2, 3, 4])
    for _ in range(2):
        peer.prepare()
        peer.run()
    assert decoded(tmp_path / "log") == [(0, 3, []), (3, 1, [0])] * 2


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_llama(monkeypatch)
    peer = Peer(worker_command(None), PeerSettings(ubatch=4096, flash_attention="off"))
    peer.load(FILE, threads=2)
    context = peer.open("pp", 0, list(range(100)) * 60)
    assert (context.n_batch, context.n_ubatch) == (4096, 4096)
    assert context.flash_attention == "off"
    peer.close()


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("bad file", r"llama.cpp: it cannot load the model: no such tensor"),
        ("no context", r"llama.cpp: it cannot make a context"),
        ("refuse", r"llama.cpp: llama_decode returned 1"),
        ("crash", r"llama.cpp crashed \(.*\): ggml.c:1: GGML_ASSERT\(fine\) failed$"),
    ],
)
def test_faults(trouble: str, said: str, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_llama(monkeypatch, trouble)
    with pytest.raises(PeerError, match=said):
        _run_once(peer)
    if trouble == "crash":
        assert peer.pid is None
    use_fake_llama(monkeypatch)
    peer.close()
    _run_once(peer)  # a new process


def _run_once(peer: Peer) -> None:
    peer.load(FILE, threads=1)
    peer.open("pp", 0, [1, 2])
    peer.prepare()
    peer.run()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals that end a process")
def test_a_crash_is_named_by_its_signal(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_llama(monkeypatch, "crash")
    with pytest.raises(PeerError, match="SIGABRT"):
        _run_once(peer)


def test_it_can_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_llama(monkeypatch, "hang")
    stop = threading.Event()
    peer = Peer(worker_command(None), PeerSettings(), stop)
    peer.load(FILE, threads=1)
    peer.open("pp", 0, [1, 2])
    peer.prepare()
    threading.Timer(0.2, stop.set).start()
    start = time.monotonic()
    with pytest.raises(Cancelled):
        peer.run()
    assert time.monotonic() - start < 10
    assert peer.pid is None


def test_the_worker_ends_with_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_llama(monkeypatch, "hang")
    peer = Peer(worker_command(None), PeerSettings())
    peer.load(FILE, threads=1)
    peer.open("pp", 0, [1, 2])
    peer.prepare()
    process = peer._process
    assert process is not None and process.stdin is not None
    process.stdin.write('{"do": "run", "logits": false}\n')
    process.stdin.close()  # as the system does when we die, in the middle of a test
    assert process.wait(20) == 0
    peer.close()


def test_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    peer = Peer([sys.executable, "-S", str(peer_module.WORKER)], PeerSettings())
    with pytest.raises(NotFoundError, match="has no llama-cpp-python") as caught:
        peer.hello()
    assert caught.value.hint and "localv4[compare]" in caught.value.hint
    assert peer.pid is None


def test_no_interpreter(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"cannot start .*python9"):
        Peer(worker_command(tmp_path / "python9"), PeerSettings()).hello()


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("print('hello')", "llama.cpp: its process answered 'hello"),
        ("print('[1]')", "answered '\\[1\\]"),
        ("pass", "llama.cpp crashed \\(exit code 0\\)$"),
        ("import sys; sys.exit('no\\nreason')", "llama.cpp crashed \\(exit code 1\\): reason$"),
    ],
)
def test_a_process_that_is_no_worker(program: str, said: str) -> None:
    with pytest.raises(PeerError, match=said):
        Peer([sys.executable, "-c", program], PeerSettings()).hello()


def test_the_worker_needs_nothing_but_its_package() -> None:
    tree = ast.parse(peer_module.WORKER.read_text("utf-8"))
    names = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
        )
    }
    assert names and names <= set(sys.stdlib_module_names)


needs_llama = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None and "PEER_PYTHON" not in os.environ,
    reason="needs llama-cpp-python; PEER_PYTHON names the interpreter of another environment",
)


@needs_llama
def test_the_real_one_computes_what_we_do(tmp_path: Path) -> None:
    path, _ = write_gguf(random_model(LOADABLE), tmp_path / "m.gguf", GgufOptions())
    python = os.environ.get("PEER_PYTHON")
    peer = Peer(worker_command(Path(python) if python else None), PeerSettings())
    try:
        peer.load(path, threads=1)
        tokens = [(7 * index) % 300 for index in range(150)]
        expected = network_logits(open_network(path), tokens)[-1]
        for kind, depth in (("pp", 0), ("pp", 100), ("tg", 140)):
            peer.open(kind, depth, tokens)  # type: ignore[arg-type]
            for _ in range(2):  # the second time from the kept state
                peer.prepare()
                found = peer.run(logits=True).logits
                assert found is not None
                assert np.corrcoef(found, expected)[0, 1] > 0.999
    finally:
        peer.close()
