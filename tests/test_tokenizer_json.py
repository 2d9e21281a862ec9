"""Reading `tokenizer.json`: a small valid one, bad ones, and damaged ones."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localv4.errors import BadFileError, NotFoundError
from localv4.text import byte_alphabet, vocabulary
from localv4.text.pre_split import PRE_SPLITS, pre_name
from localv4.text.prompt import Message, render
from localv4.text.special_tokens import ASSISTANT, BOS, DSML, END_THINK, EOS, THINK, USER
from localv4.text.tokenizer import Tokenizer


def small_document() -> dict[str, Any]:
    """A tokenizer of the 256 bytes, BOS, EOS, one merge and the chat tokens."""
    texts = [BOS, EOS, *byte_alphabet.CHARACTERS, "he"]
    names = [BOS, EOS, USER, ASSISTANT, THINK, END_THINK, DSML]
    ids = {name: i for i, name in enumerate([*texts, *names[2:]])}
    pre = {
        "type": "Sequence",
        "pretokenizers": [
            *(
                {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}
                for p in PRE_SPLITS["deepseek-v3"]
            ),
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ],
    }
    return {
        "added_tokens": [{"id": ids[name], "content": name} for name in names],
        "normalizer": {"type": "Sequence", "normalizers": []},
        "pre_tokenizer": pre,
        "model": {
            "type": "BPE",
            "vocab": {text: i for i, text in enumerate(texts)},
            "merges": ["h e"],
        },
    }


def load(tmp_path: Path, document: Any) -> Tokenizer:
    path = tmp_path / "tokenizer.json"
    path.write_text(
        document if isinstance(document, str) else json.dumps(document, ensure_ascii=False), "utf-8"
    )
    return Tokenizer.from_file(path)


def test_small_document_loads(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, small_document())
    assert tokenizer.vocab_size == 264
    assert tokenizer.token_bytes(tokenizer.encode("he")[0]) == b"he"
    chat = render([Message("user", "he")], thinking=True)
    assert len(tokenizer.encode_prompt(chat)) == 5


def test_patterns_with_real_line_ends_are_known() -> None:
    patterns = [p.replace(r"\r\n", "\r\n") for p in PRE_SPLITS["joyai-llm"]]
    assert patterns != list(PRE_SPLITS["joyai-llm"])
    assert pre_name(patterns) == "joyai-llm"
    assert pre_name([]) is None


def changed(**changes: Any) -> dict[str, Any]:
    """The small document with values replaced at dotted places."""
    document = small_document()
    for place, value in changes.items():
        *parents, last = place.split("__")
        target = document
        for parent in parents:
            target = target[parent]
        target[last] = value
    return document


def added(*tokens: tuple[int, str], **flags: bool) -> list[dict[str, Any]]:
    return [{"id": i, "content": text, **flags} for i, text in tokens]


SMALL_VOCAB: dict[str, int] = small_document()["model"]["vocab"]
BAD_DOCUMENTS = [
    ("", "Invalid JSON"),
    ("{", "Invalid JSON"),
    ("[" * 2000, "Invalid JSON"),
    ("null", "tokenizer"),
    ("[]", "tokenizer"),
    ({}, "added_tokens: Field required"),
    (changed(model__type="WordPiece"), "model.type.*'BPE'"),
    (changed(model__vocab=None), "model.vocab"),
    (changed(model__vocab={**SMALL_VOCAB, "x1": -1}), "model.vocab"),
    (changed(model__vocab={**SMALL_VOCAB, "x1": 1.5}), "model.vocab"),
    (changed(model__vocab={**SMALL_VOCAB, "x1": 10**30}), "model.vocab"),
    (changed(model__vocab={**SMALL_VOCAB, "x1": 5000}), "ids are not 0 to 259, each once"),
    (changed(model__vocab={**SMALL_VOCAB, "x1": 0}), "ids are not 0 to 259, each once"),
    (changed(model__merges=["h"]), "merge that is not two"),
    (changed(model__merges=["h e r"]), "merge that is not two"),
    (changed(model__merges=["h zz"]), "out of vocabulary"),
    (changed(model__merges=[["h"]]), "model.merges"),
    (changed(model__dropout=0.1), "model.dropout"),
    (changed(model__byte_fallback=True), "model.byte_fallback"),
    (changed(model__ignore_merges=True), "model.ignore_merges"),
    (changed(model__unk_token="x"), "model.unk_token"),
    (changed(normalizer={"type": "NFC"}), "normalizer"),
    (changed(pre_tokenizer=None), "pre_tokenizer"),
    (changed(pre_tokenizer__pretokenizers=[]), "pre_tokenizer"),
    (changed(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Digits"}]}), "pre_tok"),
    (changed(added_tokens=[]), "no <｜begin▁of▁sentence｜> token"),
    (changed(added_tokens=added((0, BOS))), "no <｜end▁of▁sentence｜> token"),
    (
        changed(added_tokens=added((0, BOS), (1, EOS), (260, USER))),
        "'<｜User｜>' the id 260, out of",
    ),
    (changed(added_tokens=added((0, BOS), (2, EOS))), "the id 2, out of order"),
    (changed(added_tokens=added((0, BOS), (0, BOS), (1, EOS))), "the id 0, out of order"),
    (changed(added_tokens=added((0, BOS), (1, EOS), (259, ""))), "token of 0 characters"),
    (changed(added_tokens=added((0, BOS), (1, EOS), lstrip=True)), "lstrip"),
    # an added token that plain text could reach
    (
        changed(added_tokens=added((0, BOS), (1, EOS), (SMALL_VOCAB["a"], "a"))),
        "lacks 1 of the 256",
    ),
    (changed(added_tokens=added((0, BOS), (1, EOS), (258, "he"))), "out of vocabulary"),
]


@pytest.mark.parametrize(("document", "message"), BAD_DOCUMENTS)
def test_bad_documents(tmp_path: Path, document: Any, message: str) -> None:
    with pytest.raises(BadFileError, match=message) as caught:
        load(tmp_path, document)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_unknown_split_pattern_is_refused(tmp_path: Path) -> None:
    document = small_document()
    document["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(a+)+$"
    with pytest.raises(BadFileError, match="splits text in a way"):
        load(tmp_path, document)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"none\.json"):
        Tokenizer.from_file(tmp_path / "none.json")
    with pytest.raises(BadFileError, match=tmp_path.name):
        Tokenizer.from_file(tmp_path)


def test_large_files_are_refused_quickly(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    started = time.monotonic()
    with path.open("wb") as file:
        file.truncate(200 << 20)
    with pytest.raises(BadFileError, match="larger than"):
        Tokenizer.from_file(path)
    path.write_bytes(b'{"x": [' + b"[]," * 3_000_000)
    with pytest.raises(BadFileError, match="lists and objects"):
        Tokenizer.from_file(path)
    assert time.monotonic() - started < 5


def test_too_many_tokens_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(vocabulary, "MAX_TOKENS", 100)
    with pytest.raises(BadFileError, match="264 tokens"):
        load(tmp_path, small_document())


SMALL_BYTES = json.dumps(small_document(), ensure_ascii=False).encode()
edits = st.lists(
    st.tuples(
        st.integers(0, len(SMALL_BYTES)),
        st.integers(0, 12),
        st.one_of(
            st.binary(max_size=3),
            st.sampled_from(
                [b"0", b"-1", b"9" * 30, b'"', b"{", b"]", b"null", b"\xff", b"\\ud800"]
            ),
        ),
    ),
    min_size=1,
    max_size=3,
)


@given(edits)
@settings(
    max_examples=2000,
    deadline=2000,  # ms; the promise for a damaged file
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_damaged_files_load_or_are_refused(
    tmp_path: Path, edits: list[tuple[int, int, bytes]]
) -> None:
    content = SMALL_BYTES
    for place, removed, inserted in edits:
        content = content[:place] + inserted + content[place + removed :]
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    try:
        tokenizer = Tokenizer.from_file(path)
    except BadFileError as error:
        assert "\n" not in str(error)
        return
    assert tokenizer.decode(tokenizer.encode("he said: 12 é")) == "he said: 12 é"
