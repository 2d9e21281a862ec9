"""Models in the Hugging Face cache: found, named, and told apart from half-downloaded ones."""

import sys
from pathlib import Path

import pytest
from model_folders import (
    FLASH_COMMIT,
    OTHER_COMMIT,
    empty_home,
    make_gguf,
    make_model,
    names_of,
    snapshot,
)

from localv4.errors import NotFoundError, UsageError
from localv4.library.hub_cache import cache_folder
from localv4.library.installed import list_incomplete, list_installed, resolve


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    return empty_home(monkeypatch, tmp_path)


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


def test_a_form_that_quantize_makes_says_how(home: Path) -> None:
    with pytest.raises(NotFoundError, match="v4-flash:q4 is not installed") as error:
        resolve("v4-flash:q4")
    wanted = "localv4 pull v4-flash, then: localv4 quantize v4-flash --recipe q4"
    assert error.value.hint == wanted


def test_incomplete_download(home: Path) -> None:
    folder = snapshot(home, "deepseek-ai/DeepSeek-V4-Flash", FLASH_COMMIT)
    make_model(folder, shards=46, absent=tuple(range(13, 47)))
    assert names_of(list_installed()) == ["tiny-v4"]
    assert list_incomplete()[0].name == "deepseek-v4-flash"
    with pytest.raises(NotFoundError, match="34 of 46 weight files are missing") as error:
        resolve("v4-flash")
    assert error.value.hint == "localv4 pull v4-flash"


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
    assert plain.value.hint == "localv4 pull hf://somebody/something"
    with pytest.raises(NotFoundError) as form:
        resolve("unsloth-pro-0813:UD-Q4_K_XL")
    assert form.value.hint == "localv4 pull unsloth-pro-0813:UD-Q4_K_XL"
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
