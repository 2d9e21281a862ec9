"""models.toml: what it says is right, and a damaged or hostile one ends in one clear line."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localv4 import paths
from localv4.errors import BadFileError
from localv4.library import registry as registry_module
from localv4.library.hub_cache import CachedRepo, is_v4
from localv4.library.registry import Registry, load_registry

MODEL = """
schema = 1
[models.my-model]
aliases = ["mine"]
repo = "me/My-Model"
arch = "deepseek_v4"
format = "safetensors"
release = "preview"
allow = ["*.safetensors"]
"""

WriteUserFile = Callable[[str | bytes], Path]


@pytest.fixture
def write_user_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> WriteUserFile:
    monkeypatch.setattr(paths, "config_dir", lambda: tmp_path)

    def write(text: str | bytes) -> Path:
        file = tmp_path / "models.toml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    return write


@pytest.fixture
def built_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Registry:
    monkeypatch.setattr(paths, "config_dir", lambda: tmp_path / "none")
    return load_registry()


# ---- the built-in file


def test_official_models_are_known(built_in: Registry) -> None:
    for alias, repo in {
        "v4-flash": "deepseek-ai/DeepSeek-V4-Flash",
        "v4-flash-0731": "deepseek-ai/DeepSeek-V4-Flash-0731",
        "v4-flash-dspark": "deepseek-ai/DeepSeek-V4-Flash-DSpark",
        "v4-flash-base": "deepseek-ai/DeepSeek-V4-Flash-Base",
        "v4-pro": "deepseek-ai/DeepSeek-V4-Pro",
        "v4-pro-0813": "deepseek-ai/DeepSeek-V4-Pro-0813",
        "v4-pro-dspark": "deepseek-ai/DeepSeek-V4-Pro-DSpark",
        "V4-PRO-BASE": "deepseek-ai/DeepSeek-V4-Pro-Base",
    }.items():
        name = built_in.find(alias)
        assert name is not None
        assert built_in.models[name].repo == repo


def test_published_sizes(built_in: Registry) -> None:
    sizes = {
        name: (spec.tensors, spec.tensor_bytes, spec.shards)
        for name, spec in built_in.models.items()
        if spec.tensor_bytes
    }
    assert sizes["deepseek-v4-flash"] == (69_187, 159_609_485_896, 46)
    assert sizes["deepseek-v4-pro"] == (145_116, 864_704_792_696, 64)
    assert sizes["deepseek-v4-flash-0731"] == (72_317, 166_878_536_440, 48)
    assert sizes["deepseek-v4-pro-0813"] == (149_782, 892_727_580_904, 66)


def test_facts_agree_with_each_other(built_in: Registry) -> None:
    for name, spec in built_in.models.items():
        assert all(part != "main" for part in (spec.revision or "").split("/")), name
        assert ("0731" in name or "0813" in name) == (spec.release == "0731"), name
        assert spec.chat == (not name.endswith("-base")), name
        if spec.format == "gguf":
            assert spec.base is not None, name
            assert spec.quants, name
            assert built_in.models[spec.base].release == spec.release, name
        else:
            assert not spec.quants, name
        assert is_v4(CachedRepo(spec.repo, (Path("no-config-here"),))), name


def test_quantized_sizes_lie_below_sixteen_bits_a_weight(built_in: Registry) -> None:
    for name, spec in built_in.models.items():
        params = built_in.models[spec.base].params if spec.base else None
        for label, quant in spec.quants.items():
            nbytes = quant.bytes or (quant.approx_gb or 0) * 1e9
            if nbytes:
                assert params is not None
                assert 1.5 < nbytes * 8 / params < 16, (name, label)


def test_prices_are_dated(built_in: Registry) -> None:
    priced = [spec.api_price for spec in built_in.models.values() if spec.api_price]
    assert priced
    for price in priced:
        assert price.input_cache_hit < price.input_cache_miss < price.output
        assert price.until is None or price.until >= price.as_of


# ---- looking up


def test_find_knows_names_and_aliases_in_any_case(built_in: Registry) -> None:
    assert built_in.find("DeepSeek-V4-Flash") == "deepseek-v4-flash"
    assert built_in.find("V4-Flash") == "deepseek-v4-flash"
    assert built_in.find("gpt-2") is None


def test_suggest_finds_the_nearest(built_in: Registry) -> None:
    assert built_in.suggest("v4-flsh") == "v4-flash"
    assert built_in.suggest("my-own-modle", ("my-own-model",)) == "my-own-model"
    assert built_in.suggest("zzzz") is None


def test_of_repo_yields_all_models_of_a_repository(built_in: Registry) -> None:
    names = [name for name, _ in built_in.of_repo("Antirez/DeepSeek-V4-GGUF")]
    assert names == ["antirez-v4-flash-0731", "antirez-v4-flash", "antirez-v4-pro"]


# ---- the user's file


def test_a_user_file_adds_models(write_user_file: WriteUserFile) -> None:
    write_user_file(MODEL)
    registry = load_registry()
    assert registry.find("mine") == "my-model"
    assert registry.find("v4-flash") == "deepseek-v4-flash"


BAD_FILES: dict[str, tuple[str | bytes, str]] = {
    "built-in name": (MODEL.replace("my-model", "deepseek-v4-flash"), "cannot be changed"),
    "built-in alias": (MODEL.replace('"mine"', '"v4-flash"'), "already names deepseek-v4-flash"),
    "alias of itself": (MODEL.replace('"mine"', '"my-model"'), "already names my-model"),
    "alias twice": (MODEL.replace('"mine"', '"mine", "mine"'), "already names my-model"),
    "newer schema": (MODEL.replace("schema = 1", "schema = 2"), "made by a newer version"),
    "older schema": (MODEL.replace("schema = 1", "schema = 0"), "schema"),
    "schema of another type": (MODEL.replace("schema = 1", 'schema = "1"'), "schema"),
    "schema true": (MODEL.replace("schema = 1", "schema = true"), "schema"),
    "no schema": (MODEL.replace("schema = 1", ""), "schema"),
    "no models": ("schema = 1", "models"),
    "empty file": ("", "schema"),
    "unknown key": (MODEL + "colour = 1\n", "models.my-model.colour"),
    "unknown key at the top": ("colour = 1\n" + MODEL, "colour"),
    "repo outside": (MODEL.replace("me/My-Model", "../x"), "models.my-model.repo"),
    "repo with dots": (MODEL.replace("me/My-Model", "me/a..b"), '".."'),
    "repo of one part": (MODEL.replace("me/My-Model", "me"), "repo"),
    "repo of three parts": (MODEL.replace("me/My-Model", "me/a/b"), "repo"),
    "repo with a line end": (MODEL.replace("me/My-Model", "me/x\\n"), "repo"),
    "repo of another type": (MODEL.replace('"me/My-Model"', "7"), "repo"),
    "revision main": (MODEL + 'revision = "main"\n', "revision"),
    "revision too short": (MODEL + f'revision = "{"a" * 39}"\n', "revision"),
    "revision in capitals": (MODEL + f'revision = "{"A" * 40}"\n', "revision"),
    "allow outside": (MODEL.replace("*.safetensors", "../*"), "allow"),
    "allow inner outside": (MODEL.replace("*.safetensors", "a/../../x"), '".."'),
    "allow absolute": (MODEL.replace("*.safetensors", "/etc/*"), "allow"),
    "allow no list": (MODEL.replace('["*.safetensors"]', '"*"'), "allow"),
    "other architecture": (MODEL.replace("deepseek_v4", "llama"), "arch"),
    "negative count": (MODEL + "tensors = -1\n", "tensors"),
    "count too large": (MODEL + "tensors = 99999999999999999999\n", "tensors"),
    "count with a fraction": (MODEL + "tensors = 1.5\n", "tensors"),
    "missing field": (MODEL.replace('repo = "me/My-Model"', ""), "repo"),
    "name with a slash": (MODEL.replace("my-model", '"a/b"'), "models"),
    "base unknown": (MODEL + 'base = "nobody"\n', 'no model "nobody"'),
    "size twice": (
        MODEL + '[models.my-model.quants]\nq = { files = "*", bytes = 1, approx_gb = 1.0 }\n',
        "not both",
    ),
    "price nan": (
        MODEL + "[models.my-model.api_price]\nas_of = 2026-01-01\n"
        "input_cache_hit = nan\ninput_cache_miss = 1\noutput = 1\n",
        "input_cache_hit",
    ),
    "syntax error": (MODEL + "repo = \n", "line 10"),
    "key twice": (MODEL + 'repo = "a/b"\n', "not valid TOML"),
    "not UTF-8": (MODEL.encode() + b"\xff", "not valid TOML"),
    "NUL byte": (MODEL.encode() + b"\0", "not valid TOML"),
    "gzip": (b"\x1f\x8b\x08\0rubbish", "not valid TOML"),
    "long line": (MODEL + "tensors = 1" + "0" * 9000 + "\n", "line 10 is longer than 500"),
    "nested arrays": (MODEL + "x = " + "[\n" * 50_000, "not valid TOML"),
    "nested tables": (MODEL + "x = " + "{a=" * 150, "not valid TOML"),
    "10 MB": (MODEL.encode() + b"#" * 10_000_000, "larger than"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_user_file_is_one_clear_line(case: str, write_user_file: WriteUserFile) -> None:
    text, expected = BAD_FILES[case]
    file = write_user_file(text)
    with pytest.raises(BadFileError) as error:
        load_registry()
    assert error.value.exit_code == 5
    assert error.value.path == file
    assert expected in error.value.detail
    assert "\n" not in error.value.detail
    assert len(error.value.detail) < 400


def test_a_newer_schema_comes_with_a_remedy(write_user_file: WriteUserFile) -> None:
    write_user_file(MODEL.replace("schema = 1", "schema = 2"))
    with pytest.raises(BadFileError) as error:
        load_registry()
    assert error.value.hint == "pip install --upgrade localv4"


def test_a_folder_in_place_of_the_file(write_user_file: WriteUserFile, tmp_path: Path) -> None:
    (tmp_path / "models.toml").mkdir()
    with pytest.raises(BadFileError, match="not a regular file"):
        load_registry()


DEEP_FILES = {
    "one long key": "a." * 60_000 + "b = 1",
    "one long table": "[" + "a." * 60_000 + "b]",
    "many deep keys": "".join(f"k{i}." + "a." * 240 + "b = 1\n" for i in range(250)),
    "many deep tables": "".join("[" + "a." * 240 + f"b{i}]\n" for i in range(250)),
    "many tables": "[[a]]\n" * 20_000,
}


@pytest.mark.parametrize("case", DEEP_FILES)
def test_deep_keys_do_not_hang(case: str, write_user_file: WriteUserFile) -> None:
    write_user_file(MODEL + DEEP_FILES[case])
    start = time.monotonic()
    with pytest.raises(BadFileError):
        load_registry()
    assert time.monotonic() - start < 20  # a parser that does hang needs minutes


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_mutated_files_load_or_fail_clearly(data: st.DataObject, tmp_path: Path) -> None:
    raw = bytearray(registry_module._built_in_path().read_bytes()[:6000])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(raw) - 1))
        if data.draw(st.booleans()):
            raw[place] = data.draw(st.integers(0, 255))
        else:
            del raw[place : place + data.draw(st.integers(1, 40))]
    file = tmp_path / "models.toml"
    file.write_bytes(raw)
    try:
        models = registry_module._read(file)
    except BadFileError as error:
        assert error.detail
    else:
        assert all(".." not in spec.repo for spec in models.values())
