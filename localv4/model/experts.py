"""Packed routed experts in memory: packed when first chosen, given up in the order of last use."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from localv4.kernels.buffers import aligned_bytes
from localv4.model.matrix import Packed
from localv4.model.packing import ExpertForm, PackedExpert, expert_form, pack_expert
from localv4.model.weights import Expert


class ExpertStore:
    """The routed experts of all layers as packed records, at most `budget_bytes` of them.

    Those of a packed folder stay where they are, in the mapped file.
    `addresses` (layers, experts) i64 tells kernels where a record is, 0 if it is not in memory;
    `ticks` (layers, experts) i64 when it was last used, by the clock `tick`, which whoever uses
    records sets. `forms` has the form of each layer's records: None where an expert has no packed
    form or the experts of a layer differ.
    """

    def __init__(
        self, layers: Sequence[tuple[Expert, ...]], budget_bytes: int, threads: int
    ) -> None:
        self.budget_bytes = budget_bytes
        self.held_bytes = 0
        self.forms = [_common_form(experts) for experts in layers]
        self.addresses = np.zeros((len(layers), len(layers[0])), np.int64)
        self.ticks = np.zeros_like(self.addresses)
        self.tick = np.zeros(1, np.int64)
        self._layers = layers
        self._records: dict[tuple[int, int], Packed] = {}
        self._stay = np.array([_are_packed(experts) for experts in layers])
        for index in np.flatnonzero(self._stay).tolist():
            self.addresses[index] = [_record_address(expert) for expert in layers[index]]
        self._free: dict[int, list[Packed]] = {}
        self._pool = ThreadPoolExecutor(threads, "packing")

    def largest_wave(self, layer: int) -> int:
        """Return how many experts of a layer may be needed at once: what fits the budget."""
        form = self.forms[layer]
        assert form is not None
        if self._stay[layer]:
            return len(self._layers[layer])
        return max(1, self.budget_bytes // form.nbytes)

    def ensure(self, layer: int, numbers: Iterable[int]) -> bool:
        """Bring experts of a layer into memory, by all threads; others may be given up for them.

        Returns False if one of them cannot be packed, since it holds a NaN: the layer has lost its
        packed form then. MemoryError is raised when there is none.
        """
        form = self.forms[layer]
        assert form is not None
        wanted = sorted(set(numbers))
        self.ticks[layer, wanted] = self.tick[0]
        missing = [number for number in wanted if self.addresses[layer, number] == 0]
        self._make_room(len(missing) * form.nbytes, layer, wanted)
        records = [self._take(form.nbytes) for _ in missing]
        experts = [self._layers[layer][number] for number in missing]
        fit = list(self._pool.map(pack_expert, records, experts, [form] * len(missing)))
        if not all(fit):
            self.forms[layer] = None
            return False
        for number, record in zip(missing, records, strict=True):
            self._records[layer, number] = record
            self.addresses[layer, number] = record.ctypes.data
        return True

    def _take(self, nbytes: int) -> Packed:
        """Return memory for a record, used before if possible: it has its pages already."""
        self.held_bytes += nbytes
        free = self._free.get(nbytes)
        return free.pop() if free else aligned_bytes(nbytes)

    def _make_room(self, nbytes: int, layer: int, wanted: list[int]) -> None:
        """Give up the records whose use is longest ago, except the wanted ones of a layer."""
        excess = self.held_bytes + nbytes - self.budget_bytes
        if excess <= 0:
            return
        held = (self.addresses != 0) & ~self._stay[:, None]
        age: NDArray[np.int64] = np.where(held, self.ticks, np.iinfo(np.int64).max)
        age[layer, wanted] = np.iinfo(np.int64).max
        for place in np.argsort(age, axis=None, kind="stable"):
            key = (int(place) // age.shape[1], int(place) % age.shape[1])
            if excess <= 0 or age[key] == np.iinfo(np.int64).max:
                return
            record = self._records.pop(key)
            self.addresses[key] = 0
            self.held_bytes -= record.nbytes
            excess -= record.nbytes
            self._free.setdefault(record.nbytes, []).append(record)


def _are_packed(experts: tuple[Expert, ...]) -> bool:
    """Say whether the experts of a layer have their records already, in a mapped file."""
    return all(isinstance(expert, PackedExpert) for expert in experts)


def _record_address(expert: Expert) -> int:
    assert isinstance(expert, PackedExpert)
    return expert.record.ctypes.data


def _common_form(experts: tuple[Expert, ...]) -> ExpertForm | None:
    """Return the form that all experts of a layer have, None if there is none."""
    forms = {expert_form(expert) for expert in experts}
    return forms.pop() if len(forms) == 1 else None
