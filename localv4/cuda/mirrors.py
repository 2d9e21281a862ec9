"""Memory that host and GPU both have: which device address stands for which host address."""

import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from localv4.cuda.gpu import Gpu

Array = NDArray[np.generic]

MARGIN_BYTES = 256
"""Memory behind an array that kernels may write to: the padding of its last row."""


def span(array: Array) -> tuple[int, int]:
    """Return the address of an array and the bytes from its first to the end of its last value."""
    if array.size == 0:
        return int(array.ctypes.data), 0
    reach = sum(stride * (n - 1) for stride, n in zip(array.strides, array.shape, strict=True))
    return int(array.ctypes.data), reach + array.itemsize


class Mirrors:
    """Host arrays with their twins in the memory of a GPU.

    Programs are made of host addresses; `address` tells the device's. Contents move only by `push`
    and `pull`.
    """

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.nbytes = 0
        self._starts: list[int] = []  # ascending
        self._ranges: dict[int, tuple[int, int]] = {}  # of a start: its end, the device address
        self._held: dict[int, object] = {}  # arrays live as long as their twins
        self._holders: dict[int, int] = {}  # how many hold an array, by its start
        self._known: dict[int, int] = {}  # device addresses that were asked for, while names stay
        self._version = 0  # of all names
        self._tables: dict[
            int, tuple[int, bytes]
        ] = {}  # what was pushed last, and under which names

    def add(self, array: Array) -> None:
        """Give an array a twin with the same content, unless it has one."""
        start, nbytes = span(array)
        if nbytes == 0:
            return
        if (found := self._find(start)) is not None:
            assert self._find(start + nbytes - 1) == found + nbytes - 1, "a part was added first"
            return
        device = self.gpu.allocate(nbytes + MARGIN_BYTES)
        self.nbytes += nbytes
        self.name(start, nbytes, device)
        self._held[start] = array
        self.gpu.upload(device, start, nbytes)

    def add_all(self, arrays: Iterable[Array]) -> None:
        """Add arrays of which some are parts of others: their twins are parts of the others'."""
        for array in sorted(arrays, key=lambda each: -span(each)[1]):
            self.add(array)

    def hold(self, array: Array) -> None:
        """Add an array, or count one more holder of its twin."""
        start, nbytes = span(array)
        if nbytes:
            self._holders[start] = self._holders.get(start, 0) + 1
            self.add(array)

    def let_go(self, array: Array) -> None:
        """Drop an array when its last holder lets go of it."""
        start, nbytes = span(array)
        if nbytes:
            self._holders[start] -= 1
            if not self._holders[start]:
                del self._holders[start]
                self.drop(array)

    def name(self, start: int, nbytes: int, device: int) -> None:
        """Let a range of host addresses stand for a range of the device, which others own."""
        if start not in self._ranges:
            bisect.insort(self._starts, start)
        self._change()
        self._ranges[start] = (start + nbytes, device)

    def forget(self, start: int) -> None:
        """Take back `name`."""
        if self._ranges.pop(start, None) is not None:
            self._starts.remove(start)
            self._change()

    def _change(self) -> None:
        """Note that addresses have other names."""
        self._version += 1
        self._known.clear()

    def drop(self, array: Array) -> None:
        """Free the twin of an array."""
        start, nbytes = span(array)
        if start in self._held:
            _, device = self._ranges[start]
            self.forget(start)
            del self._held[start]
            self._tables.pop(start, None)
            self.nbytes -= nbytes
            self.gpu.synchronize()
            self.gpu.free(device)

    def knows(self, host: int) -> bool:
        """Say whether a host address has a twin."""
        return self._find(host) is not None

    def address(self, host: int) -> int:
        """Return the device address for a host address, 0 for 0; raises KeyError without one."""
        if host == 0:
            return 0
        found = self._known.get(host) or self._find(host)
        if found is None:
            raise KeyError(f"nothing on the GPU stands for host address {host:#x}")
        self._known[host] = found
        return found

    def _find(self, host: int) -> int | None:
        index = bisect.bisect_right(self._starts, host) - 1
        if index < 0:
            return None
        start = self._starts[index]
        end, device = self._ranges[start]
        return device + host - start if host < end else None

    def push(self, *arrays: Array) -> None:
        """Copy arrays, or parts of them, to the GPU."""
        for array in arrays:
            start, nbytes = span(array)
            if nbytes:
                self.gpu.upload(self.address(start), start, nbytes)

    def send(self, source: Array, target: Array) -> None:
        """Copy an array of the host to where the GPU has another one, of the same size."""
        (start, nbytes), (place, _) = span(source), span(target)
        self.gpu.upload(self.address(place), start, nbytes)

    def pull(self, *arrays: Array) -> None:
        """Copy arrays, or parts of them, back; all of their span is overwritten."""
        for array in arrays:
            start, nbytes = span(array)
            if nbytes:
                self.gpu.download(start, self.address(start), nbytes)

    def ask(self, pairs: Sequence[tuple[Array, Array]]) -> Callable[[], None]:
        """Have parts of mirrored arrays copied into arrays of the host, without waiting.

        Pairs are (array of the host, mirrored array). The function that is returned waits.
        """
        requests = []
        for own, mirrored in pairs:
            (host, nbytes), (start, _) = span(own), span(mirrored)
            requests.append((host, self.address(start), nbytes))
        return self.gpu.ask(requests)

    def push_table(self, table: NDArray[np.int64]) -> None:
        """Copy a table of addresses, those of mirrored arrays as the device's.

        It stays there as long as neither the table nor any name changes: nothing is copied again.
        """
        start, pushed = int(table.ctypes.data), (self._version, table.tobytes())
        if self._tables.get(start) == pushed:
            return
        self._tables[start] = pushed
        translated = np.array([self._translated(int(word)) for word in table.ravel()], np.int64)
        self.gpu.upload(self.address(start), translated.ctypes.data, table.nbytes)

    def _translated(self, word: int) -> int:
        found = self._find(word) if word > 0 else None
        return word if found is None else found


def arrays_of(owner: object, skipped: Iterable[type] = ()) -> Iterator[Array]:
    """Yield all arrays that an object reaches through attributes, lists, tuples and dicts."""
    seen: set[int] = set()
    types = tuple(skipped)
    waiting: list[object] = [owner]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, types):
            continue
        seen.add(id(value))
        if isinstance(value, np.ndarray):
            yield value
        elif isinstance(value, (list, tuple)):
            waiting.extend(value)
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif type(value).__module__.startswith("localv4."):
            waiting.extend(_attributes(value))


def _attributes(value: object) -> Iterator[object]:
    yield from getattr(value, "__dict__", {}).values()
    for kind in type(value).__mro__:
        for name in getattr(kind, "__slots__", ()):
            if hasattr(value, name):
                yield getattr(value, name)
