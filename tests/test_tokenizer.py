"""Tokenizer: the same ids as the official library, no forged tokens, no crash on bad files."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import localv4
from localv4.errors import UsageError
from localv4.text.pieces import Piece, Prompt, plain_prompt
from localv4.text.special_tokens import ASSISTANT, BOS, DSML, END_THINK, EOS, THINK, USER
from localv4.text.tokenizer import StreamDecoder, Tokenizer
from localv4.text.unicode import well_formed

TINY = Path(localv4.__file__).parent / "embedded" / "tiny-v4" / "tokenizer.json"
DOCUMENT: dict[str, Any] = json.loads(TINY.read_text("utf-8"))
ADDED = {token["content"]: token["id"] for token in DOCUMENT["added_tokens"]}
TOKENIZER = Tokenizer.from_file(TINY)
OFFICIAL = tokenizers.Tokenizer.from_file(str(TINY))

CORPUS = (
    "The capital of France is Paris.",
    "  leading blanks, trailing blanks   \n\n\n\tnext\r\nline\r",
    "1234567890 3.14159 0xFF ١٢٣ ४५६ Ⅷ ½ x² 1e-9",
    "def add(a, b):\n    return a + b  # sum\n",
    "小柴胡冲剂和布洛芬能一起吃吗？2026-02-21,星期六",
    "カタカナとひらがな、漢字混じり文。ー゙゚",
    "Привет, мир! Ελληνικά עברית العربية हिन्दी ไทย 한국어",
    "naïve café coöperate e\u0301 a\u0308\u0301 Ａ１",
    "😀👩‍👩‍👧‍👦🇫🇷🏳️‍🌈 emoji",
    "!!!???...---___===***+++ <<>> [[]] {{}} $$ %% ^^ && || ~~ `` '' \"\"",
    "don't I'll we've CAN'T it's",
    "\u0000\u0001\u001b[31m\u007f\u0080\u00a0\u200b\u2028\u2029\ufeff\ufffd\ufffe",
    "a" * 500 + " " * 500 + "\n" * 100,
    "".join(map(chr, range(0x20, 0x250))),
    '{"name": "search", "parameters": {"type": "object"}}',
    "｜｜ ▁▁ < | > <| |> <｜ ｜>",
)

# Text rich in what the splitter and the special tokens are made of
fragments = st.sampled_from(
    [*ADDED, *CORPUS[:3], "<｜", "｜>", "<think", "think>", "</", "DSML", " ", "\n", "1", "é", "中"]
)
tricky_text = st.lists(st.one_of(fragments, st.text(max_size=5)), max_size=12).map("".join)


def has_added(text: str) -> bool:
    return any(name in text for name in ADDED)


# ------------------------------------------------------------------ same ids as the library


@pytest.mark.parametrize("text", CORPUS)
def test_corpus_gives_the_official_ids(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert ids == OFFICIAL.encode(text).ids
    assert TOKENIZER.decode(ids) == text


@given(st.text(max_size=200))
@settings(deadline=None, max_examples=300)
def test_any_text_gives_the_official_ids(text: str) -> None:
    if not has_added(text):
        assert TOKENIZER.encode(text) == OFFICIAL.encode(text).ids


@given(tricky_text)
@settings(deadline=None)
def test_trusted_text_gives_the_official_ids(text: str) -> None:
    prompt = Prompt((Piece(text, trusted=True),))
    assert TOKENIZER.encode_prompt(prompt) == OFFICIAL.encode(text).ids


@given(st.lists(st.tuples(tricky_text, st.booleans()), max_size=6))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_borders_of_pieces_do_not_show_in_the_ids(parts: list[tuple[str, bool]]) -> None:
    pieces = tuple(Piece(text, trusted) for text, trusted in parts)
    prompt = Prompt(pieces)
    spelled = any(has_added(piece.text) for piece in pieces if not piece.trusted)
    crossing = sum(prompt.text.count(name) for name in ADDED) != sum(
        piece.text.count(name) for piece in pieces for name in ADDED
    )
    if not spelled and not crossing:
        assert TOKENIZER.encode_prompt(prompt) == OFFICIAL.encode(prompt.text).ids
    assert TOKENIZER.decode(TOKENIZER.encode_prompt(prompt)) == prompt.text


def test_border_inside_a_word_is_joined() -> None:
    pieces = (Piece("hel", trusted=True), Piece("lo wor", trusted=False), Piece("ld", True))
    assert TOKENIZER.encode_prompt(Prompt(pieces)) == TOKENIZER.encode("hello world")
    followed = Prompt((*pieces, Piece(f"{EOS}!", trusted=True)))
    assert TOKENIZER.encode_prompt(followed) == [
        *TOKENIZER.encode("hello world"),
        1,
        *TOKENIZER.encode("!"),
    ]
    assert len(TOKENIZER.encode("hello world")) < len(
        TOKENIZER.encode("hel") + TOKENIZER.encode("lo wor") + TOKENIZER.encode("ld")
    )


@pytest.mark.parametrize(
    ("text", "ids"),
    [  # eval/generations.json of the model
        (
            f"{BOS}{USER}What is the capital of France?{ASSISTANT}{END_THINK}",
            [0, 8179, 1202, 315, 265, 848, 295, 4502, 33, 8180, 8191],
        ),
        (
            f"{BOS}{USER}What is 148 + 276?{ASSISTANT}{THINK}",
            [0, 8179, 1202, 315, 223, 19, 22, 26, 653, 223, 20, 25, 24, 33, 8180, 8190],
        ),
        (f"{BOS}Once upon a time there was a little", [0, 2016, 583, 261, 490, 458, 304, 261, 486]),
    ],
)
def test_reference_prompts(text: str, ids: list[int]) -> None:
    assert TOKENIZER.encode_prompt(Prompt((Piece(text, trusted=True),))) == ids


# ------------------------------------------------------------------ forged tokens


@pytest.mark.parametrize("name", ADDED)
def test_spelled_token_stays_text(name: str) -> None:
    text = f"before {name} after{name}"
    ids = TOKENIZER.encode(text)
    assert not set(ids) & set(ADDED.values())
    assert TOKENIZER.decode(ids) == text
    assert ADDED[name] in OFFICIAL.encode(text).ids  # the official library would be fooled


@given(tricky_text)
@settings(deadline=None)
def test_no_text_becomes_an_added_token(text: str) -> None:
    assert not set(TOKENIZER.encode(text)) & set(ADDED.values())
    prompt = Prompt((Piece(text, trusted=False), Piece(USER, trusted=True), Piece(text, False)))
    ids = TOKENIZER.encode_prompt(prompt)
    assert [i for i in ids if i in ADDED.values()] == [ADDED[USER]]


def test_untrusted_text_cannot_complete_a_trusted_token() -> None:
    prompt = Prompt((Piece("<", trusted=True), Piece("think>", trusted=False)))
    assert TOKENIZER.encode_prompt(prompt) == TOKENIZER.encode("<think>")


def test_plain_prompt_is_bos_and_text() -> None:
    ids = TOKENIZER.encode_prompt(plain_prompt(f"Hi{EOS}"))
    assert ids == [0, *TOKENIZER.encode(f"Hi{EOS}")]


def test_lone_surrogates_become_replacement_characters() -> None:
    assert TOKENIZER.encode("a\ud800b") == TOKENIZER.encode("a\ufffdb")
    assert well_formed("\ud83d\ude00 \ude00") == "😀 \ufffd"


def test_text_that_the_matcher_gives_up_on_is_an_error() -> None:
    with pytest.raises(UsageError, match="11000001 characters"):
        TOKENIZER.encode(" " * 11_000_000 + "x")


# ------------------------------------------------------------------ names and decoding


def test_ids_and_names() -> None:
    assert (TOKENIZER.vocab_size, TOKENIZER.bos_id, TOKENIZER.eos_id) == (8192, 0, 1)
    assert TOKENIZER.special_id(THINK) == 8190
    assert TOKENIZER.special_id("think") is None
    assert TOKENIZER.special_text(8190) == THINK
    assert TOKENIZER.special_text(500) is None


def test_token_bytes() -> None:
    assert TOKENIZER.token_bytes(8189) == DSML.encode()
    assert b"".join(map(TOKENIZER.token_bytes, TOKENIZER.encode("é 中😀"))) == "é 中😀".encode()
    every_byte = {TOKENIZER.token_bytes(i) for i in range(8192)}
    assert all(bytes([byte]) in every_byte for byte in range(256))
    assert TOKENIZER.token_bytes(8192) == TOKENIZER.token_bytes(-1) == b""


ids_strategy = st.lists(
    st.one_of(st.integers(0, 8191), st.integers(3, 258), st.sampled_from(list(ADDED.values()))),
    max_size=40,
)


@given(ids_strategy)
@settings(deadline=None)
def test_stream_decoder_equals_whole_decode(ids: list[int]) -> None:
    stream = StreamDecoder(TOKENIZER)
    parts = [stream.feed(token_id) for token_id in ids]
    assert "".join(parts) + stream.finish() == TOKENIZER.decode(ids)


def test_stream_decoder_holds_incomplete_characters() -> None:
    stream = StreamDecoder(TOKENIZER)
    byte = {TOKENIZER.token_bytes(i): i for i in range(3, 259)}
    ids = [byte[bytes([b])] for b in "😀".encode()]
    assert [stream.feed(i) for i in ids] == ["", "", "", "😀"]
    assert stream.feed(ids[0]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""
