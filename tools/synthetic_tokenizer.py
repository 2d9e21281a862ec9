"""A byte-level tokenizer for models that have never seen text: one token for each byte."""

from typing import Any

from localv4.text.pre_split import PRE_SPLITS
from localv4.text.special_tokens import BOS, EOS, PROMPT_TOKENS


def byte_letters() -> list[str]:
    """Return the printable letter that stands for each byte in byte-level tokenizers."""
    kept = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in kept else next(spare)) for byte in range(256)]


def special_tokens() -> list[str]:
    """Return every control token of the prompt format, BOS and EOS first."""
    return [BOS, EOS, *(token for token in PROMPT_TOKENS if token not in (BOS, EOS))]


def tokenizer_json() -> dict[str, Any]:
    """Return the document `tokenizer.json`."""
    special = special_tokens()
    vocab = {token: number for number, token in enumerate([*special, *byte_letters()])}
    space = byte_letters()[32]
    vocab[space + "t"] = len(vocab)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    splits = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in PRE_SPLITS["deepseek-v3"]
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": vocab[token], "content": token, **flags, "special": True} for token in special
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": [[space, "t"]]},
    }
