"""What a matrix becomes: the first wish of its recipe that its shape allows, or what it was."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quant.formats import GGML_TARGETS, KEEP, PACKED_TARGETS, Target
from quant.recipe import Method, Rule
from quant.tensor_class import TensorClass

ROWS_ONLY = (TensorClass.EMBEDDING,)
"""Looked up by row: in a packed folder they stay rows, in blocks of a ggml type."""

FLOATS_ONLY = (TensorClass.HYPER_CONNECTIONS,)
"""A few numbers that steer everything; they are never rounded."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The format of a matrix; `target` None keeps its values. `note`: why not the first wish."""

    target: Target | None
    method: Method = "search"
    note: str = ""

    def note_on(self, format_name: str) -> str:
        """Return the note on a matrix in a format: a wish that came true by itself needs none."""
        return "" if self.note == _as_small_as(format_name) else self.note


KEPT = Choice(None)


def choose_packed(
    rule: Rule | None, kind: TensorClass, rows: int, cols: int, kept_bits: float
) -> Choice:
    """Return what a matrix becomes in a packed folder.

    `kept_bits` is what a value takes in a form that keeps it.
    """
    if rule is None or kind in FLOATS_ONLY:
        return KEPT
    if kind in ROWS_ONLY:
        wishes = [_kin(name, GGML_TARGETS) for name in rule.formats]
        return _choose(rule, wishes, GGML_TARGETS, rows, cols, kept_bits)
    return _choose(rule, rule.formats, PACKED_TARGETS, rows, cols, kept_bits)


def choose_ggml(
    rule: Rule | None, kind: TensorClass, rows: int, cols: int, kept_bits: float
) -> Choice:
    """Return what a matrix becomes in a GGUF file."""
    if rule is None or kind in FLOATS_ONLY:
        return KEPT
    wishes = rule.gguf or [_kin(name, GGML_TARGETS) for name in rule.formats]
    return _choose(rule, wishes, GGML_TARGETS, rows, cols, kept_bits)


def _kin(name: str, targets: Mapping[str, Target]) -> str:
    if name == KEEP or name in targets:
        return name
    return PACKED_TARGETS[name].kin


def _choose(
    rule: Rule,
    wishes: Sequence[str],
    targets: Mapping[str, Target],
    rows: int,
    cols: int,
    kept_bits: float,
) -> Choice:
    """Return the first wish that fits; then wider formats are tried, the narrowest first.

    A matrix that is as small already is not rounded again: it could only lose.
    """
    last = wishes[-1]
    wider = (
        [] if last == KEEP else [t.name for t in targets.values() if t.bits > targets[last].bits]
    )
    for name in (*wishes, *wider):
        if name == KEEP:
            return KEPT
        target = targets[name]
        if kept_bits <= target.bits:
            return Choice(None, note=_note(wishes[0], name, rows, cols, True))
        if target.fits(rows, cols):
            return Choice(target, rule.method, _note(wishes[0], name, rows, cols, False))
    return Choice(None, note=f"{rows} x {cols} fits no format")


def _note(wish: str, name: str, rows: int, cols: int, kept: bool) -> str:
    if name != wish:
        return f"{rows} x {cols} does not fit {wish}"
    return _as_small_as(name) if kept else ""


def _as_small_as(name: str) -> str:
    return f"as small as {name} already"
