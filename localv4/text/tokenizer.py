"""Text to token ids and back. Untrusted text never becomes a control token."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers

from localv4.errors import BadFileError, UsageError
from localv4.text.byte_alphabet import token_to_bytes
from localv4.text.pieces import Prompt
from localv4.text.pre_split import PRE_SPLITS
from localv4.text.special_tokens import BOS, EOS, PROMPT_TOKENS
from localv4.text.tokenizer_gguf import vocabulary_from_gguf
from localv4.text.tokenizer_json import read_tokenizer_json
from localv4.text.unicode import Utf8Decoder, well_formed
from localv4.text.vocabulary import Vocabulary

__all__ = ["StreamDecoder", "Tokenizer"]


class Tokenizer:
    """A byte-level BPE tokenizer in two parts.

    The merge table inside the `tokenizers` library knows no added token at all, so nothing that it
    encodes can turn into one. Added tokens are found by us, in trusted text only.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.path = vocabulary.path
        self.vocab_size = vocabulary.size
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self._added = dict(vocabulary.added)
        self._added_texts = {i: text for text, i in self._added.items()}
        self._texts = {i: text for text, i in vocabulary.plain.items()}
        self._bpe = _build(vocabulary)
        # BOS and EOS are what the file says they are, even where they have other names
        self._trusted: dict[str, int | None] = {
            **dict.fromkeys(PROMPT_TOKENS),
            **self._added,
            BOS: self.bos_id,
            EOS: self.eos_id,
        }
        longest_first = sorted(self._trusted, key=len, reverse=True)
        self._trusted_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    @classmethod
    def from_file(cls, path: Path) -> "Tokenizer":
        """Read a `tokenizer.json`.

        Raises NotFoundError, or BadFileError if it is damaged or of a foreign kind.
        """
        return cls(read_tokenizer_json(path))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], path: Path) -> "Tokenizer":
        """Rebuild the tokenizer from the `tokenizer.ggml.*` values of the GGUF file `path`."""
        return cls(vocabulary_from_gguf(metadata, path))

    def special_id(self, text: str) -> int | None:
        """Return the id of the added token with exactly this text."""
        return self._added.get(text)

    def special_text(self, token_id: int) -> str | None:
        """Return the text of an added token; None for any other id."""
        return self._added_texts.get(token_id)

    def encode(self, text: str) -> list[int]:
        """Encode plain text; the ids never hold an added token, whatever the text holds."""
        clean = well_formed(text)
        try:
            return list(self._bpe.encode(clean).ids)
        except BaseException as error:
            if not _is_library_error(error):
                raise
            # The matcher gives up after ten million steps: a run of that many blanks
            raise UsageError(
                f"cannot split a text of {len(clean)} characters into tokens"
            ) from None

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Encode a rendered prompt.

        All text between two control tokens is encoded as one string, as the official tokenizer
        does: pre-splitting and merges reach across the borders of pieces. Raise BadFileError if
        the prompt needs a control token that the tokenizer does not have.
        """
        ids: list[int] = []
        plain: list[str] = []
        for piece in prompt.pieces:
            segments = self._trusted_pattern.split(piece.text) if piece.trusted else [piece.text]
            for index, segment in enumerate(segments):
                if index % 2 == 0:  # re.split puts what the group matched at the odd places
                    plain.append(segment)
                    continue
                ids += self.encode("".join(plain))
                plain.clear()
                ids.append(self._control_id(segment))
        return ids + self.encode("".join(plain))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, added tokens by name, U+FFFD for bytes that are not UTF-8."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token; empty for an id that no token has."""
        added = self._added_texts.get(token_id)
        if added is not None:
            return added.encode("utf-8", "replace")
        return token_to_bytes(self._texts.get(token_id, ""))

    def _control_id(self, name: str) -> int:
        """Return the id of a control token that our own text holds."""
        token_id = self._trusted[name]
        if token_id is None:
            raise BadFileError(
                self.path,
                f"tokenizer has no {name} token, which this kind of prompt needs",
                hint="the model cannot chat; let it continue plain text with --raw",
            )
        return token_id


class StreamDecoder:
    """Turn token ids into text one at a time, holding back incomplete characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = Utf8Decoder()

    def feed(self, token_id: int) -> str:
        """Return the characters that are complete after this token."""
        return self._utf8.feed(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """Return U+FFFD for a character that was cut, and start afresh."""
        return self._utf8.finish()


def _build(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    """Return the library's tokenizer for plain text."""
    splits = [
        pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        for pattern in PRE_SPLITS[vocabulary.pre]
    ]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    try:
        model = models.BPE(vocab=dict(vocabulary.plain), merges=list(vocabulary.merges))
        bpe = tokenizers.Tokenizer(model)
    except BaseException as error:
        if not _is_library_error(error):
            raise
        detail = " ".join(str(error).split())[:200]
        raise BadFileError(vocabulary.path, f"tokenizer: {detail}") from None
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    return bpe


def _is_library_error(error: BaseException) -> bool:
    """Tell an error or a panic of the Rust library from a request to stop.

    A panic arrives as an exception that is not an `Exception`.
    """
    ordinary = isinstance(error, Exception) and not isinstance(error, MemoryError)
    return ordinary or type(error).__name__ == "PanicException"
