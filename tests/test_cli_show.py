"""`localv4 show` and `localv4 list`."""

import json
import shutil
from pathlib import Path

import pytest
from terminal import run_here

from localv4.library.installed import embedded_model_path


def show(*arguments: str, home: Path) -> str:
    done = run_here("show", *arguments, home=home)
    assert done.code == 0, done.stderr
    return done.stdout


def test_sections(tmp_path: Path) -> None:
    text = show(home=tmp_path)
    sections = [line for line in text.splitlines() if line and not line.startswith(" ")]
    assert sections == [
        "Model",
        "Architecture",
        "Experts",
        "Attention",
        "Quantization",
        "Files",
        "License",
    ]
    assert "22,385,525" in text  # the number in the model's card
    assert "16, 4 active" in text
    assert "\x1b" not in text


def test_json(tmp_path: Path) -> None:
    found = json.loads(show("tiny-v4", "--json", home=tmp_path))
    files = {path.name: path.stat().st_size for path in embedded_model_path().glob("*.safetensors")}
    assert {file["name"]: file["nbytes"] for file in found["files"]} == files
    assert found["config"]["n_experts"] == 16
    assert found["types"]["F8_E4M3"]["tensors"] > 0
    assert sum(kind["bytes"] for kind in found["types"].values()) < sum(files.values())
    assert "tensors" not in found


def test_tensors(tmp_path: Path) -> None:
    found = json.loads(show("--json", "--tensors", home=tmp_path))
    index = json.loads((embedded_model_path() / "model.safetensors.index.json").read_text())
    assert {tensor["name"] for tensor in found["tensors"]} == set(index["weight_map"])
    assert "layers.0.attn.wq_a.weight" in show("--tensors", home=tmp_path)


def test_known_model_that_is_not_here(tmp_path: Path) -> None:
    text = show("v4-flash", home=tmp_path)
    assert "deepseek-ai/DeepSeek-V4-Flash" in text
    assert "localv4 pull" in text
    found = json.loads(show("v4-flash", "--json", home=tmp_path))
    assert found["installed"] is False
    assert found["repo"] == "deepseek-ai/DeepSeek-V4-Flash"


def test_unknown_model(tmp_path: Path) -> None:
    done = run_here("show", "v5", home=tmp_path)
    assert done.code == 1
    assert done.stderr.startswith("error: no model is called")


def test_two_models(tmp_path: Path) -> None:
    assert run_here("show", "a", "-m", "b", home=tmp_path).code == 2


def test_hostile_names_in_files(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(embedded_model_path(), folder)
    (folder / "README.md").write_bytes(b"---\nlicense: \x1b[31mMIT\xc2\x9b\n---\n")
    text = show(str(folder), "--tensors", home=tmp_path)
    assert "␛[31mMIT\ufffd" in text
    assert "\x1b" not in text
    assert json.loads(show(str(folder), "--json", home=tmp_path))["license"] == "\x1b[31mMIT\x9b"


def test_damaged_file(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(embedded_model_path(), folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    done = run_here("show", str(folder), home=tmp_path)
    assert done.code == 5
    assert len(done.stderr.splitlines()) <= 2


@pytest.mark.parametrize("command", ["list", "ls"])
def test_list(command: str, tmp_path: Path) -> None:
    done = run_here(command, home=tmp_path)
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["NAME", "FORMAT", "SIZE", "WHERE"]
    assert lines[1].split() == ["tiny-v4", "safetensors", "24.5", "MiB", "built", "in"]
    assert len(lines) == 2


def test_list_all(tmp_path: Path) -> None:
    text = run_here("list", "--all", home=tmp_path).stdout
    assert "deepseek-v4-flash " in text
    rows = json.loads(run_here("list", "--all", "--json", home=tmp_path).stdout)
    assert [row["name"] for row in rows if row["installed"]] == ["tiny-v4"]
    assert len(rows) > 5


def test_list_own_and_incomplete(tmp_path: Path) -> None:
    models = tmp_path / "data" / "models"
    shutil.copytree(embedded_model_path(), models / "mine")
    shutil.copytree(embedded_model_path(), models / "cut")
    (models / "cut" / "model-00002-of-00002.safetensors").unlink()
    text = run_here("list", home=tmp_path).stdout
    rows = {line.split()[0]: line for line in text.splitlines()}
    assert str(models / "mine") in rows["mine"]
    assert "incomplete" in rows["cut"]
