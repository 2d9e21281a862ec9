"""The routed experts of all layers as packed records: their forms, and the store that has them."""

from collections.abc import Callable, Sequence

import numpy as np

from localv4.errors import LocalV4Error
from localv4.model.packing import ExpertForm, PackedExpert, expert_form
from localv4.model.weights import Expert
from localv4.paging.store import ExpertStore, MappedStore

MakeStore = Callable[["Experts"], ExpertStore]
"""Makes the store for the records of some experts."""


class UnpackableError(LocalV4Error):
    """An expert has no packed record after all: it holds a NaN, which no product would show."""


class Experts:
    """The experts of all layers.

    `forms` has the forms of each layer's records, none where the experts of a layer have to be
    multiplied as they are stored; `form_numbers` (layers, experts) i64 says which of them an expert
    has; `nbytes` (layers, experts) i64 are the sizes of records.
    """

    def __init__(self, layers: Sequence[tuple[Expert, ...]]) -> None:
        self.layers = layers
        self.forms: list[tuple[ExpertForm, ...]] = []
        self.form_numbers = np.zeros((len(layers), len(layers[0])), np.int64)
        self.nbytes = np.zeros_like(self.form_numbers)
        for index, experts in enumerate(layers):
            self.forms.append(self._forms_of(index, experts))

    def _forms_of(self, index: int, experts: tuple[Expert, ...]) -> tuple[ExpertForm, ...]:
        forms: dict[ExpertForm, int] = {}
        for number, expert in enumerate(experts):
            form = expert_form(expert)
            if form is None:
                return ()
            self.form_numbers[index, number] = forms.setdefault(form, len(forms))
            self.nbytes[index, number] = form.nbytes
        return tuple(forms)

    def form(self, layer: int, number: int) -> ExpertForm:
        """Return the form of an expert's record."""
        return self.forms[layer][int(self.form_numbers[layer, number])]

    def drop_forms(self, layer: int) -> None:
        """Multiply the experts of a layer as they are stored from now on."""
        self.forms[layer] = ()

    @property
    def are_mapped(self) -> bool:
        """Whether all records are there already, in mapped files."""
        return all(isinstance(e, PackedExpert) for experts in self.layers for e in experts)

    def mapped_store(self, *, populates: bool) -> MappedStore:
        """Return the store of records that are all in mapped files.

        With `populates` these are brought into memory before they are needed.
        """
        addresses = np.zeros_like(self.nbytes)
        for index, experts in enumerate(self.layers):
            for number, expert in enumerate(experts):
                if isinstance(expert, PackedExpert):
                    addresses[index, number] = expert.record.ctypes.data
        ends = zip(addresses.ravel().tolist(), self.nbytes.ravel().tolist(), strict=True)
        return MappedStore(addresses, sorted(ends) if populates else ())
