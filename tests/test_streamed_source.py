"""Conversions of a model on the hub: file by file, never all of it here."""

from pathlib import Path

import numba
import pytest
from conversions import converted, official_model
from loopback_hub import LoopbackHub
from terminal import run_here
from test_packer import contents

from quant.proof import prove

pytestmark = pytest.mark.skipif(
    bool(numba.config.DISABLE_JIT), reason="kernels that take addresses need the compiler"
)

REPO = "org/small-model"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several files."""
    return official_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def hub(source: Path, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    with LoopbackHub() as hub:
        hub.use(monkeypatch)
        hub.add(REPO, {file.name: file for file in source.iterdir()})
        yield hub  # type: ignore[misc]


def test_the_result_is_that_of_a_model_that_is_here(
    hub: LoopbackHub, source: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    arguments = ("quantize", f"hf://{REPO}", "--source-streaming", "--recipe", "q2")
    done = run_here(*arguments, "-o", str(target), home=tmp_path)
    assert done.code == 0, done.stderr
    assert "fetching model-00001" in done.stderr
    expected, found = contents(converted(source, tmp_path / "whole", "q2")), contents(target)
    assert found.keys() == expected.keys()
    shards = {name for name in expected if name.endswith(".safetensors")}
    assert {name: found[name] for name in shards} == {name: expected[name] for name in shards}
    assert found["tokenizer.json"] == expected["tokenizer.json"]
    assert [file.name for file in tmp_path.iterdir() if ".source" in file.name] == []


def test_every_file_is_fetched_once_and_removed(
    hub: LoopbackHub, source: Path, tmp_path: Path
) -> None:
    target = tmp_path / "data" / "models" / "small-model" / "lossless"
    done = run_here(
        *("quantize", f"hf://{REPO}", "--source-streaming", "--recipe", "lossless"), home=tmp_path
    )
    assert done.code == 0, done.stderr
    weights = sorted(file.name for file in source.glob("*.safetensors"))
    assert [
        line.removeprefix("fetching ")
        for line in done.stderr.splitlines()
        if line.startswith("fetching")
    ] == weights
    assert prove(target, source).wrong_values == 0
    size = sum(file.stat().st_size for file in source.iterdir())
    assert hub.bytes_sent < 2.5 * size  # headers of files this small are the whole files


def test_a_dry_run_fetches_no_weights(hub: LoopbackHub, tmp_path: Path) -> None:
    done = run_here("quantize", f"hf://{REPO}", "--source-streaming", "--dry-run", home=tmp_path)
    assert done.code == 0 and "read per token" in done.stdout
    assert "fetching" not in done.stderr
    assert not (tmp_path / "data").exists()


def test_an_unknown_repository(hub: LoopbackHub, tmp_path: Path) -> None:
    done = run_here("quantize", "hf://org/none", "--source-streaming", home=tmp_path)
    assert done.code == 1 and done.stderr.startswith("error: ")


def test_a_download_that_fails_is_taken_up_again(
    hub: LoopbackHub, source: Path, tmp_path: Path
) -> None:
    hub.faults.wrong_bytes = 100
    arguments = ("quantize", f"hf://{REPO}", "--source-streaming", "-o", str(tmp_path / "out"))
    done = run_here(*arguments, home=tmp_path)
    assert done.code != 0 and not (tmp_path / "out" / "manifest.json").exists()
    hub.faults.wrong_bytes = 0
    assert run_here(*arguments, home=tmp_path).code == 0
    assert prove(tmp_path / "out", source).wrong_values == 0
