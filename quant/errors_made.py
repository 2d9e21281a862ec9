"""How far the rounded weights lie from those of the source, counted while they are written."""

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from quant.tensor_class import TensorClass


@dataclass(frozen=True, slots=True)
class Share:
    """Squares summed over weights, each times the importance of its column (1 without any)."""

    error: float = 0.0
    signal: float = 0.0

    @property
    def relative(self) -> float:
        """Root of the mean square of the error, as a share of that of the weights."""
        return math.sqrt(self.error / self.signal) if self.signal > 0 else 0.0

    def __add__(self, other: "Share") -> "Share":
        return Share(self.error + other.error, self.signal + other.signal)


@dataclass(slots=True)
class ErrorTotals:
    """Sums by class of tensors, file by file; may be added to from any thread.

    The sums of a file are exact before they are rounded once, so that they do not depend on the
    order in which threads add to them.
    """

    finished: dict[TensorClass, Share] = field(default_factory=dict)
    _open: dict[TensorClass, list[Share]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: TensorClass, error: float, signal: float) -> None:
        """Count the squares of a strip of the file that is being written."""
        with self._lock:
            self._open.setdefault(kind, []).append(Share(error, signal))

    def close_file(self) -> Mapping[TensorClass, Share]:
        """Return the sums of the file that is finished now."""
        with self._lock:
            sums = {
                kind: Share(math.fsum(s.error for s in parts), math.fsum(s.signal for s in parts))
                for kind, parts in sorted(self._open.items())
            }
            self._open.clear()
        self.add_file(sums)
        return sums

    def add_file(self, sums: Mapping[TensorClass, Share]) -> None:
        """Count a file that was finished before."""
        for kind, share in sums.items():
            self.finished[kind] = self.finished.get(kind, Share()) + share

    def relative(self) -> float:
        """Return the relative error of everything that has been rounded so far."""
        with self._lock:
            parts = [share for shares in self._open.values() for share in shares]
        return sum((*self.finished.values(), *parts), Share()).relative
