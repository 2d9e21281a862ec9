"""A rendered prompt as trusted and untrusted pieces."""

from dataclasses import dataclass, field

from localv4.text.special_tokens import BOS


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a prompt. Only in trusted text do the names of control tokens become tokens."""

    text: str
    trusted: bool


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered prompt.

    `opens_reasoning` says that the prompt ends inside an open `<think>`, so that a completion
    begins with reasoning.
    """

    pieces: tuple[Piece, ...]
    opens_reasoning: bool = False

    @property
    def text(self) -> str:
        """The whole prompt for display; as a string it no longer tells tokens from plain text."""
        return "".join(piece.text for piece in self.pieces)


def plain_prompt(text: str) -> Prompt:
    """Return a prompt without chat format: BOS and the text to be continued."""
    return Prompt((Piece(BOS, trusted=True), Piece(text, trusted=False)))


@dataclass(slots=True)
class PromptBuilder:
    """Collects pieces in order."""

    pieces: list[Piece] = field(default_factory=list)

    def trusted(self, text: str) -> None:
        """Append text of our own, in which control tokens are recognised."""
        self.pieces.append(Piece(text, trusted=True))

    def untrusted(self, text: str) -> None:
        """Append foreign text, which stays plain whatever it holds."""
        if text:
            self.pieces.append(Piece(text, trusted=False))
