"""Which weights lie in a folder, and what is missing."""

from pathlib import Path

import pytest
from model_folders import make_gguf, make_model, make_packed

from localv4.library.model_files import (
    INDEX_NAME,
    find_weight_sets,
    gguf_set_of,
    model_type,
    quant_label,
)


def problem_of(folder: Path) -> str | None:
    [weights] = find_weight_sets(folder)
    return weights.problem


def test_a_sharded_model_is_complete_when_all_files_of_the_index_are_there(tmp_path: Path) -> None:
    folder = make_model(tmp_path, shards=3)
    assert problem_of(folder) is None
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert problem_of(folder) == "1 of 3 weight files are missing"


def test_numbered_shards_without_an_index(tmp_path: Path) -> None:
    folder = make_model(tmp_path, shards=3)
    (folder / INDEX_NAME).unlink()
    assert problem_of(folder) is None
    (folder / "model-00003-of-00003.safetensors").unlink()
    assert problem_of(folder) == "1 of 3 weight files are missing"


def test_one_file_without_an_index(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(10))
    assert problem_of(tmp_path) == "config.json is missing"
    (tmp_path / "config.json").write_text("{}")
    assert problem_of(tmp_path) is None


def test_a_count_in_a_name_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-00001-of-99999.safetensors").write_bytes(bytes(10))
    assert str(problem_of(tmp_path)).endswith("weight files are missing")
    make_gguf(tmp_path / "inner" / "x-00001-of-99999.gguf")
    assert find_weight_sets(tmp_path / "inner")[0].problem == "99998 of 99999 parts are missing"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "../../secret.safetensors"}}',
        '{"weight_map": {"a": "/secret.safetensors"}}',
        "[" * 100_000,
    ],
)
def test_a_damaged_index_is_reported_not_raised(tmp_path: Path, text: str) -> None:
    folder = make_model(tmp_path)
    (folder / INDEX_NAME).write_text(text)
    assert problem_of(folder) == f"{INDEX_NAME} is damaged"


@pytest.mark.parametrize("config", ["config.json", "metadata.gguf"])
def test_a_packed_folder_is_one_set(tmp_path: Path, config: str) -> None:
    folder = make_packed(tmp_path, config)
    [weights] = find_weight_sets(folder)
    assert (weights.format, weights.path, weights.label) == ("packed", folder, "")
    assert (weights.nbytes, weights.problem) == (20, None)
    (folder / config).unlink()
    assert problem_of(folder) == "1 of 3 files are missing"


def test_packed_folders_beside_others(tmp_path: Path) -> None:
    make_packed(tmp_path / "small", "metadata.gguf")
    make_model(tmp_path / "published")
    found = {weights.label: weights for weights in find_weight_sets(tmp_path)}
    assert {label: weights.format for label, weights in found.items()} == {
        "small": "packed",
        "published": "safetensors",
    }
    assert found["small"].path == tmp_path / "small"


def test_a_manifest_of_something_else_changes_nothing(tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    (folder / "manifest.json").write_text('{"name": "a web page"}')
    [weights] = find_weight_sets(folder)
    assert (weights.format, weights.problem) == ("safetensors", None)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('"version": 1', '"version": 9', "made by a newer version"),
        ('"source"', '"sauce"', "the key 'sauce' is not known"),
        ('"bytes": 10', '"bytes": -1', "bytes is not a number"),
        ("localv4-packed", "another", "is not the manifest of a packed model"),
        ('"layer-00000', '"../layer-00000', "is not a plain name"),
    ],
)
def test_a_damaged_manifest_is_reported_not_raised(
    tmp_path: Path, old: str, new: str, problem: str
) -> None:
    manifest = make_packed(tmp_path) / "manifest.json"
    manifest.write_text(manifest.read_text().replace(old, new, 1))
    found = problem_of(tmp_path)
    assert found is not None and problem in found


def test_a_folder_that_is_being_packed_is_not_ready(tmp_path: Path) -> None:
    for folder in (tmp_path / "home", tmp_path / "home" / "inner"):
        make_packed(folder)
        (folder / "manifest.json").unlink()
        (folder / ".packing.json").write_text("{}")
    sets = find_weight_sets(tmp_path / "home")
    assert [weights.label for weights in sets] == ["", "inner"]
    assert {weights.problem for weights in sets} == {"it is being packed, or that was stopped"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"model_type": "deepseek_v4"}', "deepseek_v4"),
        ('{"model_type": 4}', None),
        ("[]", None),
        ("{", None),
        ("[" * 100_000, None),
        (" " * 2_000_000 + "{}", None),
    ],
)
def test_model_type(tmp_path: Path, text: str, expected: str | None) -> None:
    assert model_type(tmp_path) is None
    (tmp_path / "config.json").write_text(text)
    assert model_type(tmp_path) == expected


@pytest.mark.parametrize(
    ("stem", "label"),
    [
        ("DeepSeek-V4-Flash-UD-Q4_K_XL", "UD-Q4_K_XL"),
        ("DeepSeek-V4-Flash-0731-MXFP4", "MXFP4"),
        ("x-IQ2_XXS", "IQ2_XXS"),
        ("x-Q4_K_M", "Q4_K_M"),
        ("x-Q8_0", "Q8_0"),
        ("x-BF16", "BF16"),
        ("plain", "plain"),
    ],
)
def test_quant_label(stem: str, label: str) -> None:
    assert quant_label(stem) == label


def test_a_split_set_is_found_from_any_part(tmp_path: Path) -> None:
    first = make_gguf(tmp_path / "x-Q4_0.gguf", parts=3)
    make_gguf(tmp_path / "x-Q8_0.gguf", parts=2)
    make_gguf(tmp_path / "x-Q4_0.gguf")
    for part in (1, 2, 3):
        found = gguf_set_of(tmp_path / f"x-Q4_0-0000{part}-of-00003.gguf")
        assert (found.path, found.nbytes, found.problem) == (first, 30, None)
    assert gguf_set_of(tmp_path / "x-Q4_0.gguf").nbytes == 10
