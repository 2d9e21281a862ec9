"""Rebuild the vocabulary from the metadata of a GGUF file."""

from collections.abc import Iterable, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

from localv4.errors import BadFileError
from localv4.text.pre_split import PRE_SPLITS
from localv4.text.special_tokens import BOS, EOS
from localv4.text.vocabulary import MAX_MERGES, MAX_TOKENS, Vocabulary, check

PREFIX = "tokenizer.ggml."


class TokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def vocabulary_from_gguf(metadata: Mapping[str, Any], path: Path) -> Vocabulary:
    """Return the vocabulary of a GGUF file; raise BadFileError if it is not one we know."""
    model = metadata.get(PREFIX + "model")
    if model != "gpt2":
        raise BadFileError(path, f"{PREFIX}model is {model!r}, expected 'gpt2' (byte-level BPE)")
    pre = metadata.get(PREFIX + "pre")
    if not isinstance(pre, str) or pre not in PRE_SPLITS:
        raise BadFileError(
            path, f"{PREFIX}pre is {pre!r}, this version knows {', '.join(PRE_SPLITS)}"
        )
    tokens = _strings(metadata, path, "tokens", MAX_TOKENS)
    kinds = _kinds(metadata, path, len(tokens))
    bos_id = _control_id(metadata, path, "bos_token_id", tokens, BOS)
    eos_id = _control_id(metadata, path, "eos_token_id", tokens, EOS)
    kinds[bos_id] = kinds[eos_id] = TokenType.CONTROL
    added_kinds = (TokenType.CONTROL, TokenType.USER_DEFINED)
    added = {t: i for i, t in enumerate(tokens) if kinds[i] in added_kinds}
    plain = {t: i for i, t in enumerate(tokens) if kinds[i] not in (*added_kinds, TokenType.UNUSED)}
    used = sum(kind != TokenType.UNUSED for kind in kinds)
    if len(plain | added) != used:
        raise BadFileError(path, f"{PREFIX}tokens holds the same token twice")
    return check(
        Vocabulary(
            path=path,
            size=len(tokens),
            plain=plain,
            merges=_merges(metadata, path),
            added=added,
            pre=pre,
            bos_id=bos_id,
            eos_id=eos_id,
        )
    )


def _strings(metadata: Mapping[str, Any], path: Path, key: str, limit: int) -> list[str]:
    """Return a list of strings from the metadata."""
    found = metadata.get(PREFIX + key)
    if found is None:
        raise BadFileError(path, f"has no {PREFIX}{key}")
    if not isinstance(found, Iterable) or isinstance(found, str | bytes):
        raise BadFileError(path, f"{PREFIX}{key} is not a list")
    strings = list(found)
    if len(strings) > limit:
        raise BadFileError(path, f"{PREFIX}{key} has {len(strings)} entries, at most {limit}")
    if not all(isinstance(string, str) for string in strings):
        raise BadFileError(path, f"{PREFIX}{key} holds something that is not a string")
    return strings


def _kinds(metadata: Mapping[str, Any], path: Path, count: int) -> list[int]:
    """Return the type of each token."""
    found = metadata.get(PREFIX + "token_type")
    if found is None:
        raise BadFileError(path, f"has no {PREFIX}token_type, so control tokens are not known")
    try:
        kinds = [int(kind) for kind in found]
    except (TypeError, ValueError):
        raise BadFileError(path, f"{PREFIX}token_type is not a list of numbers") from None
    if len(kinds) != count:
        raise BadFileError(path, f"{PREFIX}token_type has {len(kinds)} entries, expected {count}")
    return kinds


def _control_id(
    metadata: Mapping[str, Any], path: Path, key: str, tokens: list[str], name: str
) -> int:
    """Return the id under `key`, or that of the token called `name` where the key is missing."""
    found = metadata.get(PREFIX + key)
    if found is None and name in tokens:
        return tokens.index(name)
    try:
        token_id = int(found)  # type: ignore[arg-type]  # None and others end in the message below
    except (TypeError, ValueError):
        raise BadFileError(path, f"has no {PREFIX}{key} and no {name} token") from None
    if not 0 <= token_id < len(tokens):
        raise BadFileError(path, f"{PREFIX}{key} is {token_id}, beyond {len(tokens)} tokens")
    return token_id


def _merges(metadata: Mapping[str, Any], path: Path) -> list[tuple[str, str]]:
    """Return the merges, which are written as two tokens with a space between."""
    merges = []
    for line in _strings(metadata, path, "merges", MAX_MERGES):
        left, space, right = line.partition(" ")
        if not (left and space and right) or " " in right:
            raise BadFileError(path, f"{PREFIX}merges holds {line[:40]!r}, which is no pair")
        merges.append((left, right))
    return merges
