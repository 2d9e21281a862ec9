"""The quality card of a model: figures of one measurement, kept in a file beside the weights.

A card may come from a stranger with the model: every field is checked when it is read.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from localv4.errors import BadFileError, NotFoundError
from localv4.small_file import read_small_file

FOLDER = "quality-card"
"""The folder of a card inside a model's folder; manifests do not list it."""
FILE = "card.json"
MAX_CARD_BYTES = 1 << 20
MAX_MANIFEST_BYTES = 16 << 20

Count = Annotated[int, Field(ge=0, le=1 << 53)]
Name = Annotated[str, Field(max_length=200)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Part(BaseModel):
    """A part of a card: immutable, of the right types, and nothing else in it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Figure(Part):
    """A figure and its standard error; None where too little was measured for one."""

    value: Number | None
    standard_error: Number | None


class CurvePoint(Part):
    """Perplexity of predictions with so many tokens before them, from least to most."""

    tokens_before: Annotated[list[Count], Field(min_length=2, max_length=2)]
    tokens: Count
    perplexity: Figure


class RoundingFloor(Part):
    """By how much rounding noise changes the perplexity of the first windows."""

    windows: Count
    relative_change: Figure | None


class ContextResult(Part):
    """Perplexity in windows of one size."""

    context: Count
    windows: Count
    tokens: Count
    perplexity: Figure
    standard_error_between_windows: Number | None
    rounding_floor: RoundingFloor
    curve: Annotated[list[CurvePoint], Field(max_length=64)]


class DivergenceResult(Part):
    """Figures of a divergence, in nats and in shares from 0 to 1."""

    tokens: Count
    mean: Figure
    percentiles: Annotated[dict[Name, Number], Field(max_length=32)]
    maximum: Number
    same_top: Figure
    rms_delta_p: Figure
    mean_delta_p: Figure
    perplexity: Figure
    base_perplexity: Figure
    perplexity_ratio: Figure


class BaseResult(Part):
    """The divergence from a base model, and the same for rounding noise alone."""

    name: Name
    numerics: Name
    bytes_per_token: Count
    context: Count
    windows: Count
    divergence: DivergenceResult
    floor_windows: Count
    rounding: DivergenceResult | None


class TextFacts(Part):
    """The text that was read."""

    name: Name
    sha256: Digest
    tokens: Count


class Card(Part):
    """Everything that was measured of a model in one run; `manifest` is its SHA-256, if any."""

    schema_version: Annotated[Literal[1], Field(alias="schema")]
    tool: Name
    model: Name
    numerics: Name
    bytes: Count
    bytes_per_token: Count
    manifest: Digest | None
    text: TextFacts
    bos: bool
    perplexity: Annotated[list[ContextResult], Field(min_length=1, max_length=64)]
    base: BaseResult | None

    def is_comparable(self, other: "Card") -> bool:
        """Say whether two cards are of the same text, read in windows of the same sizes."""
        sizes = [(one.context, one.windows) for one in self.perplexity]
        theirs = [(one.context, one.windows) for one in other.perplexity]
        return (self.text.sha256, self.bos, sizes) == (other.text.sha256, other.bos, theirs)

    def has_base_of(self, other: "Card") -> bool:
        """Say whether the divergences of two comparable cards are from the same base."""
        if self.base is None or other.base is None:
            return False
        mine, theirs = self.base, other.base
        return (mine.name, mine.numerics, mine.context, mine.windows) == (
            *(theirs.name, theirs.numerics),
            *(theirs.context, theirs.windows),
        )


def card_folder(model: Path) -> Path:
    """Return where the card of a model is: in its folder, or beside its GGUF file."""
    return model / FOLDER if model.is_dir() else model.with_name(f"{model.stem}.{FOLDER}")


def read_card(folder: Path) -> Card:
    """Read the card in a folder. Raises NotFoundError where there is none, BadFileError."""
    path = folder / FILE
    data = read_small_file(path, MAX_CARD_BYTES)
    try:
        return Card.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "card"
        raise BadFileError(path, f"{place}: {first['msg']}") from error


def manifest_digest(model: Path) -> str | None:
    """Return the SHA-256 of a packed folder's manifest; None for a model without one."""
    try:
        data = read_small_file(model / "manifest.json", MAX_MANIFEST_BYTES)
    except NotFoundError:
        return None
    return hashlib.sha256(data).hexdigest()


def comparable_cards(card: Card, own: Path, folders: Iterable[Path]) -> Iterator[Card]:
    """Yield the cards in some folders, without `own`, that can be compared with a card.

    Folders without a card are passed over, damaged cards of others as well.
    """
    for folder in dict.fromkeys(folders):
        if folder.resolve() == own.resolve():
            continue
        try:
            other = read_card(folder)
        except (NotFoundError, BadFileError):
            continue
        if card.is_comparable(other):
            yield other


def neighbours(own: Path) -> list[Path]:
    """Return where the cards of models beside a model may be, given where its own is."""
    inside = own.name == FOLDER
    place = own.parents[1] if inside else own.parent
    found = [*place.glob(f"*/{FOLDER}"), *place.glob(f"*.{FOLDER}")]
    return sorted(path for path in found if path.is_dir())
