"""Which models are found on a machine, and what a reference means."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_folders import empty_home, make_gguf, make_model, make_packed, names_of, snapshot

from localv4.errors import BadFileError, LocalV4Error, NotFoundError, UsageError
from localv4.library import installed
from localv4.library.installed import (
    embedded_model_path,
    list_incomplete,
    list_installed,
    resolve,
)
from localv4.library.model_files import find_weight_sets

ANY_CHARACTER = st.characters(exclude_categories=())  # lone surrogates too


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    return empty_home(monkeypatch, tmp_path)


# ---- the embedded model


def test_embedded_model_is_complete() -> None:
    [weights] = find_weight_sets(embedded_model_path())
    assert weights.problem is None
    assert weights.nbytes == 15_804_708 + 9_852_054
    assert (embedded_model_path() / "tokenizer.json").is_file()
    assert (embedded_model_path() / "README.md").is_file()


def test_embedded_model_answers_when_nothing_is_installed() -> None:
    for reference in (None, "", "tiny-v4", "Tiny-V4"):
        model = resolve(reference)
        assert (model.name, model.source) == ("tiny-v4", "embedded")
        assert model.path == embedded_model_path()
    assert names_of(list_installed()) == ["tiny-v4"]


def test_a_broken_user_file_does_not_stop_the_embedded_model(home: Path) -> None:
    (home / "config").mkdir()
    (home / "config" / "models.toml").write_text("schema =")
    assert resolve(None).source == "embedded"
    assert resolve("tiny-v4").source == "embedded"
    assert resolve(str(embedded_model_path())).source == "path"
    with pytest.raises(BadFileError):
        list_installed()


@pytest.mark.parametrize("absent", [(1,), (1, 2)])
def test_a_damaged_installation_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, absent: tuple[int, ...]
) -> None:
    folder = make_model(tmp_path / "package", absent=absent)
    monkeypatch.setattr(installed, "embedded_model_path", lambda: folder)
    with pytest.raises(BadFileError, match="missing") as error:
        resolve(None)
    assert error.value.hint == "pip install --force-reinstall localv4"


# ---- the default


def test_default_is_the_only_installed_model(home: Path) -> None:
    make_model(home / "home" / "models" / "mine")
    assert resolve(None).name == "mine"


def test_default_among_several_must_be_chosen(home: Path) -> None:
    make_model(home / "home" / "models" / "mine")
    make_model(home / "home" / "models" / "yours")
    with pytest.raises(UsageError, match="mine, yours") as error:
        resolve(None)
    assert error.value.exit_code == 2


def test_default_by_environment(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    make_model(home / "home" / "models" / "mine")
    make_model(home / "home" / "models" / "yours")
    monkeypatch.setenv("LOCALV4_MODEL", "yours")
    assert resolve(None).name == "yours"
    monkeypatch.setenv("LOCALV4_MODEL", "nobody")
    with pytest.raises(NotFoundError):
        resolve(None)
    assert resolve("mine").name == "mine"


def test_default_with_only_an_incomplete_model_is_embedded(home: Path) -> None:
    make_model(home / "home" / "models" / "mine", absent=(2,))
    assert resolve(None).source == "embedded"


# ---- the folder of models


def test_home_models(home: Path) -> None:
    models = home / "home" / "models"
    make_model(models / "plain")
    make_model(models / "two" / "q4")
    make_model(models / "two" / "q8", shards=3)
    make_gguf(models / "single-Q4_K_M.gguf")
    make_gguf(models / "split" / "x-MXFP4.gguf", parts=3)
    make_model(models / ".unfinished")
    (models / "empty").mkdir()
    (models / "notes.txt").write_text("x")
    found = {model.name: model for model in list_installed()}
    assert list(found) == ["plain", "single-Q4_K_M", "split", "two:q4", "two:q8", "tiny-v4"]
    assert found["two:q8"].nbytes == 30
    assert found["split"].format == "gguf"
    assert found["split"].path.name == "x-MXFP4-00001-of-00003.gguf"
    for name, model in found.items():
        assert resolve(name) == model
    assert resolve("split:mxfp4") == found["split"]
    assert resolve("TWO:Q4") == found["two:q4"]
    with pytest.raises(UsageError, match="several forms") as ambiguous:
        resolve("two")
    assert ambiguous.value.hint == "choose one: two:q4, two:q8"
    with pytest.raises(NotFoundError, match="two:q2 is not here") as absent:
        resolve("two:q2")
    assert absent.value.hint == "there is two:q4, two:q8"


def test_packed_models_of_the_home(home: Path) -> None:
    models = home / "home" / "models"
    make_packed(models / "v4-flash")
    make_packed(models / "two" / "small", "metadata.gguf")
    make_model(models / "two" / "published")
    make_packed(models / "cut", absent=("layer-00000.safetensors",))
    found = {model.name: model for model in list_installed()}
    assert {name: model.format for name, model in found.items()} == {
        "two:small": "packed",
        "two:published": "safetensors",
        "v4-flash": "packed",
        "tiny-v4": "safetensors",
    }
    assert found["two:small"].path == models / "two" / "small"
    assert resolve("two:small") == found["two:small"]
    assert found["v4-flash"].spec is not None
    [cut] = list_incomplete()
    assert (cut.name, cut.problem) == ("cut", "1 of 3 files are missing")


@pytest.mark.parametrize("config", ["config.json", "metadata.gguf"])
def test_packed_folder_by_path(home: Path, config: str) -> None:
    folder = make_packed(home / "somewhere" / "packed", config)
    model = resolve(str(folder))
    assert (model.name, model.format, model.path) == ("packed", "packed", folder)
    assert (model.source, model.nbytes) == ("path", 20)


@pytest.mark.parametrize("config", ["config.json", "metadata.gguf"])
def test_packed_model_in_the_hub_cache(home: Path, config: str) -> None:
    make_packed(snapshot(home, "someone/small-and-fast"), config)
    model = resolve("hf://someone/small-and-fast")
    assert (model.source, model.format) == ("hub-cache", "packed")
    assert names_of(list_installed()) == ["hf://someone/small-and-fast", "tiny-v4"]


def test_files_of_one_quantization_in_one_folder_keep_apart(home: Path) -> None:
    for name in ("a-Q4_0.gguf", "b-Q4_0.gguf", "c-Q8_0.gguf"):
        make_gguf(home / "home" / "models" / "mix" / name)
    assert names_of(list_installed()) == ["mix:a-Q4_0", "mix:b-Q4_0", "mix:Q8_0", "tiny-v4"]
    assert resolve("mix:b-q4_0").path.name == "b-Q4_0.gguf"


def test_home_model_under_a_known_name(home: Path) -> None:
    make_model(home / "home" / "models" / "v4-flash" / "q4")
    model = resolve("v4-flash:q4")
    assert (model.name, model.base_name, model.quant) == ("v4-flash", "v4-flash", "q4")
    assert model.spec is not None
    assert model.spec.repo == "deepseek-ai/DeepSeek-V4-Flash"
    assert resolve("deepseek-v4-flash") == model


def test_own_form_wins_over_the_download_and_both_stay_reachable(home: Path) -> None:
    make_model(snapshot(home, "deepseek-ai/DeepSeek-V4-Flash"))
    make_model(home / "home" / "models" / "v4-flash" / "q4")
    assert resolve("v4-flash").source == "home"
    assert resolve("deepseek-v4-flash").source == "hub-cache"


def test_published_form_wins_where_no_quantization_is_named(home: Path) -> None:
    make_model(snapshot(home, "deepseek-ai/DeepSeek-V4-Flash"))
    make_model(home / "home" / "models" / "deepseek-v4-flash" / "q4")
    assert resolve("deepseek-v4-flash").source == "hub-cache"
    assert resolve("deepseek-v4-flash:q4").source == "home"


@pytest.mark.parametrize(
    ("absent", "problem"),
    [((2,), "1 of 3 weight files are missing"), ((1, 3), "2 of 3 weight files are missing")],
)
def test_incomplete_models_are_told_apart(
    home: Path, absent: tuple[int, ...], problem: str
) -> None:
    make_model(home / "home" / "models" / "mine", shards=3, absent=absent)
    assert names_of(list_installed()) == ["tiny-v4"]
    assert [(model.name, model.problem) for model in list_incomplete()] == [("mine", problem)]
    with pytest.raises(NotFoundError, match=f"mine is incomplete: {problem}"):
        resolve("mine")


def test_endings_of_names_may_be_in_capitals(home: Path) -> None:
    file = make_gguf(home / "files" / "X-Q4_0.gguf")
    file = file.rename(file.with_suffix(".GGUF"))
    assert resolve(str(file)).path == file and resolve(str(file)).format == "gguf"


def test_a_missing_gguf_part(home: Path) -> None:
    make_gguf(home / "home" / "models" / "m" / "x-Q4_0.gguf", parts=3, absent=(2,))
    assert list_incomplete()[0].problem == "1 of 3 parts are missing"


# ---- paths


def test_paths(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(home / "somewhere" / "model")
    file = make_gguf(home / "files" / "x-Q4_0.gguf", parts=2)
    assert resolve(str(folder)).path == folder
    assert resolve(str(folder)).nbytes == 20
    assert resolve(str(file)).nbytes == 20
    second = file.with_name("x-Q4_0-00002-of-00002.gguf")
    assert resolve(str(second)).path == second
    assert resolve(str(file.parent)).path == file
    monkeypatch.chdir(home / "somewhere")
    assert resolve("./model").path == Path("model")
    assert resolve(".").nbytes == 20  # the folder's only subfolder
    monkeypatch.chdir(file.parent)
    assert resolve(file.name).format == "gguf"


def test_a_folder_here_never_takes_the_place_of_a_name(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(home / "v4-flash")
    make_model(home / "unknown-name")
    monkeypatch.chdir(home)
    with pytest.raises(NotFoundError, match="v4-flash is not installed"):
        resolve("v4-flash")
    with pytest.raises(NotFoundError) as error:
        resolve("unknown-name")
    assert error.value.hint == "to use the folder of that name, write ./unknown-name"


def test_wrong_paths(home: Path) -> None:
    (home / "readme.txt").write_text("x")
    (home / "empty").mkdir()
    make_gguf(home / "two" / "a-Q4_0.gguf")
    make_gguf(home / "two" / "b-Q8_0.gguf")
    with pytest.raises(NotFoundError) as mistyped:
        resolve(str(home / "emty"))
    assert mistyped.value.hint == f"did you mean {home / 'empty'}"
    with pytest.raises(NotFoundError, match="no model in"):
        resolve(str(home / "empty"))
    with pytest.raises(UsageError, match="is no model file"):
        resolve(str(home / "readme.txt"))
    with pytest.raises(UsageError, match=r"several models .*: a-Q4_0.gguf, b-Q8_0.gguf"):
        resolve(str(home / "two"))


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_folder_is_one_clear_error(home: Path) -> None:
    folder = make_model(home / "locked")
    folder.chmod(0)
    try:
        with pytest.raises(LocalV4Error, match="cannot read"):
            resolve(str(folder))
    finally:
        folder.chmod(0o700)


@pytest.mark.parametrize(
    ("mistyped", "meant"),
    [("v4-flsh", "v4-flash"), ("tiny-v5", "tiny-v4"), ("v4_pro", "v4-pro"), ("mne-own", "my-own")],
)
def test_did_you_mean(home: Path, mistyped: str, meant: str) -> None:
    make_model(home / "home" / "models" / "my-own")
    with pytest.raises(NotFoundError, match=f'no model is called "{mistyped}"') as error:
        resolve(mistyped)
    assert error.value.hint == f"did you mean {meant}"


@pytest.mark.parametrize("reference", ["hf://x", "hf://", "hf://a/b/c", "hf://../x", "hf://a/.."])
def test_no_repository(reference: str) -> None:
    with pytest.raises(UsageError, match="is no repository"):
        resolve(reference)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    reference=st.text(ANY_CHARACTER, max_size=40) | st.text(alphabet="hf:/.~\\\0v4-a", max_size=20)
)
def test_any_text_is_a_model_or_a_clear_error(home: Path, reference: str) -> None:
    try:
        model = resolve(reference)
    except LocalV4Error as error:
        assert error.message
    else:
        assert model.problem is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_no_model(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(UsageError, match="neither a file nor a folder"):
        resolve(str(tmp_path / "model.gguf"))
