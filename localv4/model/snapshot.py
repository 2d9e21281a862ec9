"""What it takes to go back to a position for good: the constant-size part of a decoder state.

The compressed entries of a prefix stay where they are, since they are append-only. Beside them the
next token needs the last rows of the window and the projections of unfinished compressed entries:
the rows that `Ring.first_needed` tells. At multiples of all compression rates the latter are few:
of a heavily compressed layer none, of the others those that the next entry reaches back to.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from localv4.errors import LocalV4Error
from localv4.model.matrix import Floats
from localv4.model.rings import Ring
from localv4.model.state import LayerState, State


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """The rows of all rings that a sequence of `position` tokens goes on from; never written to."""

    position: int
    rows: tuple[Floats, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the rows take."""
        return sum(rows.nbytes for rows in self.rows)


class Passing:
    """Takes snapshots at positions that a chunk of tokens passes, layer by layer."""

    def __init__(self, positions: Iterable[int]) -> None:
        self._rows: dict[int, list[Floats]] = {position: [] for position in positions}

    def note(self, layer: LayerState, first: int, end: int) -> None:
        """Copy what the tokens at first ... end - 1 have left, while the rings still hold it."""
        for position, rows in self._rows.items():
            if first < position <= end:
                rows += [ring.read(ring.first_needed(position), position) for ring in layer.rings]

    def taken(self, state: State) -> Iterator[Snapshot]:
        """Yield the snapshots that are whole: none if the host did not see the tokens pass."""
        rings = len(rings_of(state))
        for position, rows in self._rows.items():
            if len(rows) == rings:
                yield Snapshot(position, tuple(rows))


def take_snapshot(state: State, position: int) -> Snapshot:
    """Copy what `position` needs; raise LocalV4Error when the rings do not hold it any more."""
    if not state.can_roll_back(position):
        raise LocalV4Error(f"the rows before token {position} are gone, cannot keep them")
    state.read_back()
    rows = (ring.read(ring.first_needed(position), position) for ring in rings_of(state))
    return Snapshot(position, tuple(rows))


def restore(state: State, snapshot: Snapshot) -> None:
    """Go to a snapshot's position. The entries before it must be those it was taken with."""
    state.replace_rings(snapshot.position, snapshot.rows)


def fork(state: State) -> State:
    """Return another sequence that begins with the same tokens.

    Entries are shared until one of the two writes where the other has some of its own; then it
    copies them. Of the rings only the rows that are needed are copied, so the fork cannot be rolled
    back without another snapshot.
    """
    twin = State(state.config, state.slack, state.rows, state.memory)
    twin.share_entries(state)
    restore(twin, take_snapshot(state, state.position))
    return twin


def rings_of(state: State) -> list[Ring]:
    """Return the rings of all layers, in the order of `Snapshot.rows`."""
    return [ring for layer in state.layers for ring in layer.rings]
