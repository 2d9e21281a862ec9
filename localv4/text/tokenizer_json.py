"""Read `tokenizer.json`, the format of the `tokenizers` library."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from localv4.errors import BadFileError
from localv4.small_file import read_small_file
from localv4.text.pre_split import pre_name
from localv4.text.special_tokens import BOS, EOS
from localv4.text.vocabulary import Vocabulary, check

MAX_FILE_BYTES = 32 << 20  # the official file has about 8 MB
MAX_NODES = 1 << 20  # lists and objects; a small file of brackets would fill the memory otherwise

_Id = Annotated[int, Field(ge=0, lt=1 << 24)]
_Off = Literal[None, ""]


class _Lenient(BaseModel):
    """A JSON object whose other fields do not matter."""

    model_config = ConfigDict(strict=True, extra="ignore")


class _AddedToken(_Lenient):
    id: _Id
    content: str
    single_word: Literal[False] = False
    lstrip: Literal[False] = False
    rstrip: Literal[False] = False


class _Pattern(_Lenient):
    Regex: str


class _Split(_Lenient):
    type: Literal["Split"]
    pattern: _Pattern
    behavior: Literal["Isolated"]
    invert: Literal[False] = False


class _ByteLevel(_Lenient):
    type: Literal["ByteLevel"]
    add_prefix_space: Literal[False]
    use_regex: Literal[False]


class _PreTokenizers(_Lenient):
    type: Literal["Sequence"]
    pretokenizers: Annotated[
        list[Annotated[_Split | _ByteLevel, Field(discriminator="type")]], Field(min_length=1)
    ]


class _NoNormalizers(_Lenient):
    type: Literal["Sequence"]
    normalizers: Annotated[list[Any], Field(max_length=0)]


class _Bpe(_Lenient):
    """The merge table. Everything that would change the ids from plain BPE must be off."""

    type: Literal["BPE"]
    vocab: dict[str, _Id]
    merges: list[tuple[str, str]] | list[str]
    dropout: Literal[None] = None
    unk_token: Literal[None] = None
    continuing_subword_prefix: _Off = None
    end_of_word_suffix: _Off = None
    byte_fallback: Literal[False] = False
    ignore_merges: Literal[False] = False


class _TokenizerFile(_Lenient):
    added_tokens: list[_AddedToken]
    normalizer: _NoNormalizers | None = None
    pre_tokenizer: _PreTokenizers
    model: _Bpe


def read_tokenizer_json(path: Path) -> Vocabulary:
    """Return the vocabulary of a `tokenizer.json`.

    Raises NotFoundError, or BadFileError if it is not one we know.
    """
    document = _parse(path, _read(path))
    return check(_vocabulary(path, document))


def _read(path: Path) -> bytes:
    """Return the bytes of a file of acceptable size."""
    content = read_small_file(path, MAX_FILE_BYTES)
    if content.count(b"[") + content.count(b"{") > MAX_NODES:
        raise BadFileError(path, f"tokenizer has more than {MAX_NODES} lists and objects")
    return content


def _parse(path: Path, content: bytes) -> _TokenizerFile:
    """Return the checked document."""
    try:
        return _TokenizerFile.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part)[:40] for part in first["loc"][:6])
        raise BadFileError(path, f"tokenizer {where}: {first['msg']}".replace(" :", ":")) from None


def _vocabulary(path: Path, document: _TokenizerFile) -> Vocabulary:
    """Return the vocabulary that the document describes."""
    added = _added(path, document)
    for name in (BOS, EOS):
        if name not in added:
            raise BadFileError(path, f"tokenizer has no {name} token")
    added_ids = set(added.values())
    plain = {text: i for text, i in document.model.vocab.items() if i not in added_ids}
    return Vocabulary(
        path=path,
        size=len(plain) + len(added),
        plain=plain,
        merges=_merges(path, document.model.merges),
        added=added,
        pre=_pre(path, document.pre_tokenizer),
        bos_id=added[BOS],
        eos_id=added[EOS],
    )


def _added(path: Path, document: _TokenizerFile) -> dict[str, int]:
    """Return the added tokens.

    The official library counts ids on from the end of the BPE table, whatever the file says, so a
    file that says something else has no defined meaning.
    """
    vocab = document.model.vocab
    if set(vocab.values()) != set(range(len(vocab))):
        raise BadFileError(path, f"tokenizer ids are not 0 to {len(vocab) - 1}, each once")
    added: dict[str, int] = {}
    following = len(vocab)
    for token in document.added_tokens:
        expected = vocab.get(token.content, following)
        if token.content in added or token.id != expected:
            raise BadFileError(
                path, f"tokenizer gives {token.content!r} the id {token.id}, out of order"
            )
        following += expected == following
        added[token.content] = token.id
    return added


def _merges(path: Path, merges: list[tuple[str, str]] | list[str]) -> list[tuple[str, str]]:
    """Return the merges as pairs; older files write them as one string with a space."""
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else m for m in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise BadFileError(path, "tokenizer has a merge that is not two tokens")
    return [(pair[0], pair[1]) for pair in pairs]


def _pre(path: Path, pre_tokenizer: _PreTokenizers) -> str:
    """Return the name of the split chain."""
    *splits, last = pre_tokenizer.pretokenizers
    patterns = [split.pattern.Regex for split in splits if isinstance(split, _Split)]
    name = pre_name(patterns) if isinstance(last, _ByteLevel) else None
    if name is None or len(patterns) != len(splits):
        raise BadFileError(path, "tokenizer splits text in a way that this version does not know")
    return name
