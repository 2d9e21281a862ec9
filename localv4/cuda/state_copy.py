"""The decoder state of a sequence in the memory of a GPU."""

import weakref
from collections.abc import Iterator

from localv4.cuda.mirrors import Array, Mirrors, span
from localv4.model.state import State


class StateCopy:
    """Twins of the arrays of a state's first layers.

    What is copied when: programs write on the GPU, so its rows are the newer ones until `read_back`
    has fetched them; after `outdate` the host's are. Arrays that forks share have one twin.
    """

    def __init__(self, mirrors: Mirrors, state: State, layers: int) -> None:
        self._mirrors, self._state, self._layers = mirrors, weakref.ref(state), layers
        self._arrays: list[Array] = []
        self._addresses = b""  # of the arrays that have twins
        self._is_ahead = self._is_behind = False
        weakref.finalize(state, _let_go, mirrors, self._arrays)

    def follow(self) -> None:
        """Give all arrays of the state their twins with their content, before a program runs.

        An array that has grown takes over what the twin of the smaller one holds.
        """
        state = self._state()
        addresses = state.addresses.tobytes() if state is not None else b""
        if addresses != self._addresses:
            self._take(list(self._current()))
            self._addresses = addresses
        if self._is_behind:
            self._mirrors.push(*self._written())
        self._is_behind, self._is_ahead = False, True

    def _take(self, arrays: list[Array]) -> None:
        """Give arrays twins instead of those before."""
        mirrors = self._mirrors
        if not self._arrays:
            self._arrays += arrays
            for array in arrays:
                mirrors.hold(array)
        for place, (old, new) in enumerate(zip(self._arrays, arrays, strict=True)):
            if old is not new:
                mirrors.hold(new)
                if self._is_ahead:
                    nbytes = min(span(old)[1], span(new)[1])
                    mirrors.gpu.copy(_address(mirrors, new), _address(mirrors, old), nbytes)
                self._arrays[place] = new
                mirrors.let_go(old)

    def read_back(self) -> None:
        """Bring what the GPU has written into the arrays."""
        if self._is_ahead:
            self._mirrors.pull(*self._written())
            self._is_ahead = False

    def outdate(self) -> None:
        """Note that the arrays have been written to: the GPU is to get them again."""
        self._is_behind, self._is_ahead = True, False

    def _current(self) -> Iterator[Array]:
        """Yield the arrays."""
        state = self._state()
        for layer in state.layers[: self._layers] if state is not None else ():
            for ring in layer.rings:
                yield ring.values
            for rows in layer.entries:
                yield rows.values

    def _written(self) -> Iterator[Array]:
        """Yield the parts of the twins that tokens have written."""
        state, arrays = self._state(), iter(self._arrays)
        if state is None:
            return
        for layer in state.layers[: self._layers]:
            for _ in layer.rings:
                yield next(arrays)
            for _ in layer.entries:
                yield next(arrays)[: state.position // layer.ratio]


def _address(mirrors: Mirrors, array: Array) -> int:
    return mirrors.address(span(array)[0])


def _let_go(mirrors: Mirrors, arrays: list[Array]) -> None:
    for array in arrays:
        mirrors.let_go(array)
