"""An opened model: validated tensors in memory-mapped files, whatever the file format."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from localv4.errors import BadFileError
from localv4.storage.dtypes import DType
from localv4.storage.mapped_file import MappedFile
from localv4.storage.names import quoted

MetaValue: TypeAlias = (
    str | int | float | bool | list[str] | list[int] | list[float] | list[bool] | NDArray[Any]
)
"""A metadata value; long arrays of numbers are NumPy arrays, everything else is plain Python."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where the bytes of one tensor lie; the range is known to be inside its file."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    """Row-major, outermost dimension first: [out, in]."""
    file: int
    """Index into `Checkpoint.files`."""
    offset: int
    """In bytes from the start of that file."""
    nbytes: int


class Checkpoint:
    """A set of mapped files and the tensors in them.

    Closing it (or leaving its `with` block) gives the files back.
    """

    def __init__(
        self,
        kind: Literal["safetensors", "gguf"],
        path: Path,
        files: Sequence[MappedFile],
        tensors: Mapping[str, StoredTensor],
        metadata: Mapping[str, MetaValue],
    ) -> None:
        """Map `files`, whose `tensors` have been validated against the file sizes."""
        self.kind = kind
        self.path = path
        self.files = tuple(file.path for file in files)
        self.tensors: Mapping[str, StoredTensor] = MappingProxyType(dict(tensors))
        self.metadata: Mapping[str, MetaValue] = MappingProxyType(dict(metadata))
        self._mapped = tuple(files)
        for file in self._mapped:
            file.map()
        self._by_start = sorted(self._mapped, key=lambda file: file.address)
        self._starts = [file.address for file in self._by_start]

    def bytes(self, name: str) -> NDArray[np.uint8]:
        """Return the bytes of a tensor as a read-only 1-D view into the map, without a copy.

        The view need not be aligned to the size of an element. Raises BadFileError when there is
        no such tensor.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise BadFileError(self.path, f"the tensor {quoted(name)} is missing")
        return self._mapped[tensor.file].bytes(tensor.offset, tensor.nbytes)

    def place_of(self, view: NDArray[np.uint8]) -> tuple[Path, int]:
        """Return the file and the offset there of bytes that this checkpoint has handed out."""
        file, offset = self._find(view)
        return file.path, offset

    def check_unchanged(self) -> None:
        """Raise BadFileError when a file was written to or cut since it was opened.

        Call it before long work on the views: a page beyond the end of a cut file cannot be read.
        A file that was replaced by renaming another over it, or deleted, is still whole for us.
        """
        for file in self._mapped:
            file.check_unchanged()

    def drop_pages(self) -> None:
        """Take the pages that were read out of this process; the next look brings them back."""
        for file in self._mapped:
            file.drop_pages()

    def drop_pages_of(self, view: NDArray[np.uint8]) -> None:
        """Do so with the pages of bytes that this checkpoint has handed out."""
        file, offset = self._find(view)
        file.drop_pages(offset, view.nbytes)

    def close(self) -> None:
        """Give the files back; views that are still held stay readable."""
        for file in self._mapped:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _find(self, view: NDArray[np.uint8]) -> tuple[MappedFile, int]:
        address = view.ctypes.data
        index = bisect_right(self._starts, address) - 1
        if index >= 0 and address < self._starts[index] + self._by_start[index].size:
            return self._by_start[index], address - self._starts[index]
        raise ValueError("these bytes are not in a file")
