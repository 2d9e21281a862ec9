"""Which models are found on a machine, and what a reference means."""

import json
import os
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localv4 import paths
from localv4.errors import BadFileError, LocalV4Error, NotFoundError, UsageError
from localv4.library import installed
from localv4.library.hub_cache import cache_folder
from localv4.library.installed import (
    embedded_model_path,
    list_incomplete,
    list_installed,
    resolve,
)
from localv4.library.model_files import INDEX_NAME, find_weight_sets, gguf_set_of, quant_label

FLASH_COMMIT = "60d8d70770c6776ff598c94bb586a859a38244f1"
OTHER_COMMIT = "0123456789" * 4
ANY_CHARACTER = st.characters(exclude_categories=())  # lone surrogates too


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Give every test an empty home, configuration and Hugging Face cache."""
    monkeypatch.setenv("LOCALV4_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LOCALV4_MODEL", raising=False)
    monkeypatch.setattr(paths, "config_dir", lambda: tmp_path / "config")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def make_model(folder: Path, shards: int = 2, absent: tuple[int, ...] = ()) -> Path:
    """Write a folder that looks like a sharded model: 10 bytes a shard."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "deepseek_v4"}')
    names = [f"model-{part:05d}-of-{shards:05d}.safetensors" for part in range(1, shards + 1)]
    index = {"weight_map": {f"tensor{number}": name for number, name in enumerate(names)}}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    for part, name in enumerate(names, start=1):
        if part not in absent:
            (folder / name).write_bytes(bytes(10))
    return folder


def make_gguf(file: Path, parts: int = 1, absent: tuple[int, ...] = ()) -> Path:
    """Write an empty GGUF file of 10 bytes or a split of that many parts; return the first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    names = [file.name]
    if parts > 1:
        names = [f"{file.stem}-{part:05d}-of-{parts:05d}.gguf" for part in range(1, parts + 1)]
    for part, name in enumerate(names, start=1):
        if part not in absent:
            (file.parent / name).write_bytes(bytes(10))
    return file.parent / names[0]


def snapshot(home: Path, repo: str, commit: str = OTHER_COMMIT, *, main: bool = True) -> Path:
    """Make the folder of a downloaded revision as huggingface_hub lays it out."""
    entry = home / "hub" / f"models--{repo.replace('/', '--')}"
    folder = entry / "snapshots" / commit
    folder.mkdir(parents=True)
    if main:
        (entry / "refs").mkdir(exist_ok=True)
        (entry / "refs" / "main").write_text(commit)
    return folder


def names_of(models: list[installed.InstalledModel]) -> list[str]:
    return [model.name for model in models]


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


def test_numbered_shards_without_an_index(home: Path) -> None:
    folder = make_model(home / "home" / "models" / "mine", shards=3)
    (folder / INDEX_NAME).unlink()
    assert resolve("mine").problem is None
    (folder / "model-00003-of-00003.safetensors").unlink()
    assert list_incomplete()[0].problem == "1 of 3 weight files are missing"


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
def test_a_damaged_index_is_reported_not_raised(home: Path, text: str) -> None:
    folder = make_model(home / "home" / "models" / "mine")
    (folder / INDEX_NAME).write_text(text)
    assert list_incomplete()[0].problem == f"{INDEX_NAME} is damaged"


def test_a_missing_gguf_part(home: Path) -> None:
    make_gguf(home / "home" / "models" / "m" / "x-Q4_0.gguf", parts=3, absent=(2,))
    assert list_incomplete()[0].problem == "1 of 3 parts are missing"


# ---- the Hugging Face cache


def test_cache_folder_is_that_of_huggingface_hub(home: Path) -> None:
    assert cache_folder() == home / "hub"


def test_official_model_in_the_cache(home: Path) -> None:
    make_model(snapshot(home, "deepseek-ai/DeepSeek-V4-Flash", FLASH_COMMIT))
    [model] = list_installed()[:-1]
    assert (model.name, model.source) == ("deepseek-v4-flash", "hub-cache")
    assert model.spec is not None
    assert model.spec.tensors == 69_187
    for reference in (None, "v4-flash", "V4-Flash", "hf://deepseek-ai/DeepSeek-V4-Flash"):
        assert resolve(reference) == model


def test_incomplete_download(home: Path) -> None:
    folder = snapshot(home, "deepseek-ai/DeepSeek-V4-Flash", FLASH_COMMIT)
    make_model(folder, shards=46, absent=tuple(range(13, 47)))
    assert names_of(list_installed()) == ["tiny-v4"]
    assert list_incomplete()[0].name == "deepseek-v4-flash"
    with pytest.raises(NotFoundError, match="34 of 46 weight files are missing") as error:
        resolve("v4-flash")
    assert error.value.hint == (
        f"hf download deepseek-ai/DeepSeek-V4-Flash --revision {FLASH_COMMIT}"
        ' --include "*.safetensors" --include "*.json"'
    )


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links need a privilege")
def test_a_link_to_a_blob_that_is_gone_counts_as_missing(home: Path) -> None:
    folder = make_model(snapshot(home, "deepseek-ai/DeepSeek-V4-Flash"), absent=(2,))
    (folder / "model-00002-of-00002.safetensors").symlink_to(home / "blobs" / "gone")
    assert list_incomplete()[0].problem == "1 of 2 weight files are missing"


def test_pinned_revision_wins_then_main_then_the_complete_one(home: Path) -> None:
    repo = "deepseek-ai/DeepSeek-V4-Flash"
    main = make_model(snapshot(home, repo))
    assert resolve("v4-flash").path == main
    pinned = make_model(snapshot(home, repo, FLASH_COMMIT, main=False))
    assert resolve("v4-flash").path == pinned
    (pinned / "model-00001-of-00002.safetensors").unlink()
    assert resolve("v4-flash").path == main


def test_metadata_alone_is_no_model(home: Path) -> None:
    folder = snapshot(home, "deepseek-ai/DeepSeek-V4-Flash")
    (folder / "config.json").write_text('{"model_type": "deepseek_v4"}')
    assert list_incomplete() == []
    with pytest.raises(NotFoundError, match="v4-flash is not installed"):
        resolve("v4-flash")


def test_unknown_repositories_count_by_their_architecture(home: Path) -> None:
    make_model(snapshot(home, "somebody/fine-tuned"))
    other = make_model(snapshot(home, "somebody/llama"))
    (other / "config.json").write_text('{"model_type": "llama"}')
    newer = make_model(snapshot(home, "deepseek-ai/DeepSeek-V4.1-Flash"))
    (newer / "config.json").write_text('{"model_type": "deepseek_v41"}')
    make_gguf(snapshot(home, "x/DeepSeek-V4-Flash-GGUF") / "DeepSeek-V4-Flash-Q4_K_M.gguf")
    make_gguf(snapshot(home, "x/DeepSeek-V4.1-Flash-GGUF") / "model.gguf")
    make_gguf(snapshot(home, "x/Qwen-GGUF") / "model.gguf")
    assert names_of(list_installed()) == [
        "hf://somebody/fine-tuned",
        "hf://x/DeepSeek-V4-Flash-GGUF",
        "tiny-v4",
    ]
    assert resolve("hf://somebody/fine-tuned").spec is None
    # Named in full, a repository is taken at its word.
    assert resolve("hf://x/Qwen-GGUF").format == "gguf"


def test_community_repository_with_several_forms(home: Path) -> None:
    folder = snapshot(home, "unsloth/DeepSeek-V4-Flash-0731-GGUF")
    for label in ("UD-Q4_K_XL", "UD-IQ1_S"):
        make_gguf(folder / label / f"DeepSeek-V4-Flash-0731-{label}.gguf", parts=3)
    make_gguf(folder / "dspark-DeepSeek-V4-Flash-0731-Q8_0.gguf")
    make_gguf(folder / "mmproj-F16.gguf")
    assert names_of(list_installed()) == [
        "unsloth-v4-flash-0731:UD-IQ1_S",
        "unsloth-v4-flash-0731:UD-Q4_K_XL",
        "tiny-v4",
    ]
    model = resolve("unsloth-0731:ud-q4_k_xl")
    assert model.path.name == "DeepSeek-V4-Flash-0731-UD-Q4_K_XL-00001-of-00003.gguf"
    assert resolve("hf://unsloth/DeepSeek-V4-Flash-0731-GGUF:UD-Q4_K_XL") == model
    with pytest.raises(UsageError, match="several forms"):
        resolve("unsloth-0731")


def test_one_repository_of_three_models(home: Path) -> None:
    folder = snapshot(home, "antirez/deepseek-v4-gguf")
    stem = "DeepSeek-V4-Flash-IQ2XXS-w2Q2K-AProjQ8-SExpQ8-OutQ8-chat-v2-imatrix"
    make_gguf(folder / f"{stem}-0731.gguf")
    make_gguf(folder / f"{stem}.gguf")
    make_gguf(folder / "DeepSeek-V4-Flash-MTP-Q4K-Q8_0-F32.gguf")
    make_gguf(folder / "Something-New-Q4_K.gguf")
    assert names_of(list_installed()) == [
        "antirez-v4-flash:q2",
        "antirez-v4-flash-0731:q2",
        "hf://antirez/deepseek-v4-gguf:Q4_K",
        "tiny-v4",
    ]
    assert resolve("ds4-flash").path == folder / f"{stem}-0731.gguf"


def test_what_is_not_installed_says_how_to_get_it() -> None:
    with pytest.raises(NotFoundError) as plain:
        resolve("hf://somebody/something")
    assert plain.value.hint == "hf download somebody/something"
    with pytest.raises(NotFoundError) as form:
        resolve("unsloth-pro-0813:UD-Q4_K_XL")
    assert form.value.hint is not None
    assert form.value.hint.endswith(' --include "UD-Q4_K_XL/*.gguf"')
    with pytest.raises(NotFoundError) as unchosen:
        resolve("unsloth-pro-0813")
    assert unchosen.value.hint == (
        "choose one: unsloth-pro-0813:UD-Q4_K_XL, unsloth-pro-0813:UD-Q8_K_XL"
    )


def test_odd_folders_in_the_cache_are_passed_over(home: Path) -> None:
    hub = home / "hub"
    (hub / "models--a--DeepSeek-V4-x").mkdir(parents=True)
    (hub / "models--a--DeepSeek-V4-y" / "snapshots" / "main").mkdir(parents=True)
    (hub / "models--nothing").mkdir()
    (hub / "datasets--a--DeepSeek-V4").mkdir()
    (hub / "models--a--DeepSeek-V4-z").write_text("a file")
    entry = hub / "models--a--DeepSeek-V4-w"
    make_model(entry / "snapshots" / OTHER_COMMIT)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_bytes(b"../../../elsewhere\xff")
    assert names_of(list_installed()) == ["hf://a/DeepSeek-V4-w", "tiny-v4"]


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


# ---- names of files


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


def test_a_split_set_is_found_from_any_part(home: Path) -> None:
    first = make_gguf(home / "x-Q4_0.gguf", parts=3)
    make_gguf(home / "x-Q8_0.gguf", parts=2)
    make_gguf(home / "x-Q4_0.gguf")
    for part in (1, 2, 3):
        found = gguf_set_of(home / f"x-Q4_0-0000{part}-of-00003.gguf")
        assert (found.path, found.nbytes, found.problem) == (first, 30, None)
    assert gguf_set_of(home / "x-Q4_0.gguf").nbytes == 10
