"""Packed models on the command line: listed, shown, run."""

import json
from pathlib import Path

import pytest
from conversions import pack_folder
from gguf_writer import MAINLINE, GgufOptions, write_gguf
from golden_files import random_model
from terminal import needs_jit, run_here, run_localv4
from test_sources import SUPERBLOCKS

from localv4.library.installed import embedded_model_path
from localv4.storage import open_checkpoint

pytestmark = needs_jit


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose only model is a packed copy of the embedded one."""
    home = tmp_path_factory.mktemp("home")
    with open_checkpoint(embedded_model_path()) as source:
        pack_folder(source, home / "data" / "models" / "mine")
    return home


def test_list_and_show(home: Path) -> None:
    rows = json.loads(run_here("list", "--json", home=home).stdout)
    listed = {row["name"]: row for row in rows}
    assert (listed["mine"]["format"], listed["mine"]["problem"]) == ("packed", None)
    assert run_here("list", home=home).stdout.splitlines()[1].split()[:2] == ["mine", "packed"]
    published = json.loads(run_here("show", "tiny-v4", "--json", home=home).stdout)
    found = json.loads(run_here("show", "mine", "--json", home=home).stdout)
    assert found["format"] == "packed"
    assert found["bytes"] == listed["mine"]["bytes"] == sum(f["nbytes"] for f in found["files"])
    for same in ("parameters", "config"):
        assert found[same] == published[same]
    assert found["types"]["MX4"]["tensors"] == 8  # the routed experts of each layer
    text = run_here("show", "mine", "--tensors", home=home).stdout
    assert "format  packed" in text
    assert "layers.0.ffn.experts" in text


def test_run(home: Path) -> None:
    question = "What is the capital of France?"
    done = run_localv4("run", "-q", "--greedy", "--numerics", "fast", question, home=home)
    assert (done.returncode, done.stdout.decode()) == (0, "The capital of France is Paris.\n")


def test_exact_is_refused(home: Path) -> None:
    done = run_here("run", "-q", "--numerics", "exact", "x", home=home)
    assert (done.code, done.stdout) == (2, "")
    assert "has no weights for exact" in done.stderr
    assert len(done.stderr.splitlines()) <= 2


def test_one_that_was_made_from_gguf(tmp_path: Path) -> None:
    source, _ = write_gguf(random_model(SUPERBLOCKS), tmp_path / "m.gguf", GgufOptions(MAINLINE))
    folder = tmp_path / "packed"
    with open_checkpoint(source) as opened:
        pack_folder(opened, folder)
    assert not (folder / "config.json").exists()
    both = [
        json.loads(run_here("show", str(path), "--json", home=tmp_path).stdout)
        for path in (source, folder)
    ]
    assert [found["format"] for found in both] == ["gguf", "packed"]
    for same in ("parameters", "config"):
        assert both[0][same] == both[1][same]
    assert run_here("show", str(folder / "metadata.gguf"), home=tmp_path).code == 5
