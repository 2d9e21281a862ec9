"""The tokenizer rebuilt from GGUF metadata: the same ids, and no crash on bad metadata."""

import json
from pathlib import Path
from typing import Any

import pytest

import localv4
from localv4.errors import BadFileError
from localv4.text import byte_alphabet
from localv4.text.pieces import Piece, Prompt, plain_prompt
from localv4.text.pre_split import PRE_SPLITS
from localv4.text.prompt import Message, render
from localv4.text.tokenizer import Tokenizer
from localv4.text.tokenizer_gguf import TokenType

TINY = Path(localv4.__file__).parent / "embedded" / "tiny-v4" / "tokenizer.json"
DOCUMENT: dict[str, Any] = json.loads(TINY.read_text("utf-8"))
ADDED = {token["content"]: token["id"] for token in DOCUMENT["added_tokens"]}
TOKENIZER = Tokenizer.from_file(TINY)

CORPUS = (
    "The capital of France is Paris.",
    "  leading blanks, trailing blanks   \n\n\n\tnext\r\nline\r",
    "1234567890 3.14159 0xFF ١٢٣ ४५६ Ⅷ ½ x² 1e-9",
    "小柴胡冲剂和布洛芬能一起吃吗？カタカナとひらがな",
    "Привет, мир! naïve 👩‍👩‍👧‍👦 \u0000\u0080\u2028",
    "｜｜ ▁▁ < | > <| |> <｜ ｜>",
)


def gguf_metadata(pre: str = "localv4-tiny") -> dict[str, Any]:
    """What a converter writes for the embedded tokenizer."""
    texts = {i: text for text, i in {**DOCUMENT["model"]["vocab"], **ADDED}.items()}
    special = {token["id"]: token["special"] for token in DOCUMENT["added_tokens"]}
    kinds = {
        i: TokenType.NORMAL
        if i not in special
        else (TokenType.CONTROL if special[i] else TokenType.USER_DEFINED)
        for i in texts
    }
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [texts[i] for i in range(len(texts))],
        "tokenizer.ggml.token_type": [int(kinds[i]) for i in range(len(texts))],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in DOCUMENT["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


def test_gguf_gives_the_same_tokenizer() -> None:
    rebuilt = Tokenizer.from_gguf(gguf_metadata(), Path("x.gguf"))
    for text in (*CORPUS, *ADDED):
        assert rebuilt.encode(text) == TOKENIZER.encode(text)
        prompt = Prompt((Piece(text, trusted=True),))
        assert rebuilt.encode_prompt(prompt) == TOKENIZER.encode_prompt(prompt)
    assert all(rebuilt.token_bytes(i) == TOKENIZER.token_bytes(i) for i in range(8192))
    assert (rebuilt.vocab_size, rebuilt.bos_id, rebuilt.eos_id) == (8192, 0, 1)


@pytest.mark.parametrize("pre", ["joyai-llm", "deepseek-v3"])
def test_gguf_names_of_the_official_split(pre: str) -> None:
    rebuilt = Tokenizer.from_gguf(gguf_metadata(pre), Path("x.gguf"))
    assert rebuilt.encode("2026") == TOKENIZER.encode("2026")  # the tiny table merges no digits
    assert PRE_SPLITS[pre][0] == r"\p{N}{1,3}"


def test_split_of_three_digits() -> None:
    metadata = gguf_metadata("joyai-llm")
    digits = [str(number) for number in range(10, 100)]
    metadata["tokenizer.ggml.tokens"] += digits
    metadata["tokenizer.ggml.token_type"] += [1] * len(digits)
    metadata["tokenizer.ggml.merges"] += [f"{d[0]} {d[1]}" for d in digits]
    grouped = Tokenizer.from_gguf(metadata, Path("x.gguf"))
    singly = Tokenizer.from_gguf({**metadata, "tokenizer.ggml.pre": "localv4-tiny"}, Path("x.gguf"))
    texts = [grouped.token_bytes(i).decode() for i in grouped.encode("12345")]
    assert texts == ["12", "3", "45"]
    assert len(singly.encode("12345")) == 5


def test_unused_gguf_tokens_stand_for_nothing() -> None:
    metadata = gguf_metadata()
    metadata["tokenizer.ggml.tokens"] += ["[PAD0]", "[PAD0]"]
    metadata["tokenizer.ggml.token_type"] += [5, 5]
    padded = Tokenizer.from_gguf(metadata, Path("x.gguf"))
    assert padded.vocab_size == 8194
    assert padded.token_bytes(8193) == b""
    assert padded.special_id("[PAD0]") is None


def test_gguf_without_ids_finds_them_by_name() -> None:
    metadata = gguf_metadata()
    del metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]
    rebuilt = Tokenizer.from_gguf(metadata, Path("x.gguf"))
    assert (rebuilt.bos_id, rebuilt.eos_id) == (0, 1)


BAD_GGUF = [
    ({"model": "llama"}, "model is 'llama'"),
    ({"model": None}, "model is None"),
    ({"pre": "deepseek-llm"}, "pre is 'deepseek-llm'.*joyai-llm"),
    ({"pre": None}, "pre is None"),
    ({"pre": ["x"]}, "pre is"),
    ({"tokens": None}, "has no tokenizer.ggml.tokens"),
    ({"tokens": "abc"}, "tokens is not a list"),
    ({"tokens": 5}, "tokens is not a list"),
    ({"tokens": [1, 2]}, "not a string"),
    ({"tokens": ["a"]}, "token_type has 8192 entries, expected 1"),
    ({"token_type": None}, "no tokenizer.ggml.token_type"),
    ({"token_type": ["x"] * 8192}, "not a list of numbers"),
    ({"token_type": [3] * 8192}, "lacks 256 of the 256 byte tokens"),
    ({"merges": None}, "no tokenizer.ggml.merges"),
    ({"merges": ["ab"]}, "no pair"),
    ({"merges": ["a b c"]}, "no pair"),
    ({"merges": ["a zzzz"]}, "out of vocabulary"),
    ({"bos_token_id": 8192}, "bos_token_id is 8192, beyond 8192 tokens"),
    ({"bos_token_id": -1}, "bos_token_id is -1"),
    ({"eos_token_id": "x"}, "eos_token_id"),
]


@pytest.mark.parametrize(("change", "message"), BAD_GGUF)
def test_bad_gguf_metadata(change: dict[str, Any], message: str) -> None:
    metadata = gguf_metadata()
    for key, value in change.items():
        metadata["tokenizer.ggml." + key] = value
    with pytest.raises(BadFileError, match=message):
        Tokenizer.from_gguf(metadata, Path("x.gguf"))


def test_gguf_with_one_token_twice() -> None:
    metadata = gguf_metadata()
    metadata["tokenizer.ggml.tokens"][300] = metadata["tokenizer.ggml.tokens"][301]
    with pytest.raises(BadFileError, match="twice"):
        Tokenizer.from_gguf(metadata, Path("x.gguf"))


def toy() -> Tokenizer:
    """Bytes and two control tokens that have other names than DeepSeek's."""
    texts = ["<bos>", "<eos>", *byte_alphabet.CHARACTERS]
    return Tokenizer.from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "deepseek-v3",
            "tokenizer.ggml.tokens": texts,
            "tokenizer.ggml.token_type": [3, 3] + [1] * 256,
            "tokenizer.ggml.merges": [],
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1,
        },
        Path("toy.gguf"),
    )


def test_toy_model_continues_text_but_cannot_chat() -> None:
    tokenizer = toy()
    ids = tokenizer.encode_prompt(plain_prompt("Hi"))
    assert ids[0] == 0
    assert tokenizer.decode(ids[1:]) == "Hi"
    chat = render([Message("user", "Hi")], thinking=False)
    with pytest.raises(BadFileError, match=r"toy\.gguf: tokenizer has no <｜User｜> token"):
        tokenizer.encode_prompt(chat)
