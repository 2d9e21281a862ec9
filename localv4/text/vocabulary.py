"""What a tokenizer file says, checked and independent of the format it came in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from localv4.errors import BadFileError
from localv4.text import byte_alphabet

MAX_TOKENS = 1 << 20  # eight times the vocabulary of DeepSeek-V4
MAX_MERGES = 1 << 20
MAX_TOKEN_CHARS = 1 << 12


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A byte-level BPE vocabulary.

    `plain` and `added` share no id and no text, so text that is encoded with `plain` alone can
    never become an added token. Ids that are in neither are unused; they stand for no text.
    """

    path: Path
    size: int  # one more than the highest id
    plain: Mapping[str, int]  # BPE tokens, written in the byte alphabet
    merges: Sequence[tuple[str, str]]  # in order of rank
    added: Mapping[str, int]  # control and other added tokens by their text
    pre: str  # a key of pre_split.PRE_SPLITS
    bos_id: int
    eos_id: int


def check(vocabulary: Vocabulary) -> Vocabulary:
    """Return the vocabulary if it can encode any text; raise BadFileError otherwise."""
    if vocabulary.size > MAX_TOKENS or len(vocabulary.merges) > MAX_MERGES:
        raise BadFileError(
            vocabulary.path,
            f"tokenizer with {vocabulary.size} tokens and {len(vocabulary.merges)} merges "
            f"is larger than {MAX_TOKENS} and {MAX_MERGES}",
        )
    for text in (*vocabulary.plain, *vocabulary.added):
        if not text or len(text) > MAX_TOKEN_CHARS:
            raise BadFileError(vocabulary.path, f"tokenizer has a token of {len(text)} characters")
    missing = [c for c in byte_alphabet.CHARACTERS if c not in vocabulary.plain]
    if missing:
        raise BadFileError(
            vocabulary.path,
            f"tokenizer lacks {len(missing)} of the 256 byte tokens, for example {missing[0]!r}",
        )
    return vocabulary
