"""Second moments of what matrices read, as a safetensors file.

For each input NAME the file has two tensors: NAME.moments, F32 (blocks, cols, cols), the sum of
x x^T over the tokens, and NAME.tokens, I64 (1,), their number. Matrices that read the same vectors
share an input (`input_of`); only block-diagonal matrices have more than one block.
"""

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from localv4.errors import BadFileError
from localv4.finished_file import finished_file
from localv4.storage.checkpoint import Checkpoint
from localv4.storage.safetensors import open_safetensors

MOMENTS, TOKENS = ".moments", ".tokens"
FORMAT = "localv4-second-moments"

_ALIGNMENT = 64
_LAYER = re.compile(r"(layers\.\d+\.)(.+)")
_EXPERT = re.compile(r"ffn\.experts\.(\d+)\.w([123])\.weight")
_SHARED = {
    **dict.fromkeys(
        (
            *("attn.wq_a.weight", "attn.wkv.weight", "attn.indexer.weights_proj.weight"),
            *("attn.compressor.wkv.weight", "attn.compressor.wgate.weight"),
            *("attn.indexer.compressor.wkv.weight", "attn.indexer.compressor.wgate.weight"),
        ),
        "attn.input",
    ),
    **dict.fromkeys(("attn.wq_b.weight", "attn.indexer.wq_b.weight"), "attn.queries"),
    "attn.wo_a.weight": "attn.heads",
    "attn.wo_b.weight": "attn.output",
    **dict.fromkeys(
        ("ffn.shared_experts.w1.weight", "ffn.shared_experts.w3.weight", "ffn.gate.weight"),
        "ffn.input",
    ),
    "ffn.shared_experts.w2.weight": "ffn.shared_down",
}

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Moments:
    """The sum of x x^T over vectors x (blocks, cols, cols), and how many there were."""

    products: Floats
    tokens: int


def input_of(official: str) -> str | None:
    """Return the input that a matrix reads, by its official name; None where none is kept."""
    if official == "head.weight":
        return "head"
    layer = _LAYER.fullmatch(official)
    if layer is None:
        return None
    expert = _EXPERT.fullmatch(layer[2])
    if expert is not None:
        return f"{layer[1]}ffn.experts.{expert[1]}.{'down' if expert[2] == '2' else 'input'}"
    stem = _SHARED.get(layer[2])
    return None if stem is None else layer[1] + stem


def layer_input_of(official: str) -> str | None:
    """Return what all experts of a layer read together, for a gate or up matrix of one of them."""
    layer = _LAYER.fullmatch(official)
    expert = _EXPERT.fullmatch(layer[2]) if layer else None
    return f"{layer[1]}ffn.input" if layer and expert and expert[2] != "2" else None


class MomentsFile:
    """An open file of second moments; nothing is read before it is asked for.

    Closing it (or leaving its `with` block) gives the file back.
    """

    def __init__(self, opened: Checkpoint, shapes: Mapping[str, tuple[int, int]]) -> None:
        self._opened = opened
        self._shapes = shapes

    @property
    def inputs(self) -> Mapping[str, tuple[int, int]]:
        """Blocks and columns of each input."""
        return self._shapes

    def tokens(self, name: str) -> int:
        """Return over how many tokens an input was summed."""
        return int(np.frombuffer(self._opened.bytes(name + TOKENS).tobytes(), "<i8")[0])

    def products(self, name: str, block: int = 0) -> Floats:
        """Return the sum of x x^T of a block of an input (cols, cols).

        Raises BadFileError where it is no such sum.
        """
        cols = self._shapes[name][1]
        size = 4 * cols * cols
        data = self._opened.bytes(name + MOMENTS)[block * size : (block + 1) * size]
        found = np.frombuffer(data.tobytes(), "<f4").astype(np.float32).reshape(cols, cols)
        if not (np.isfinite(found).all() and found.diagonal().min() >= 0):
            raise BadFileError(self._opened.path, f"{name} has values that are no second moments")
        return found

    def close(self) -> None:
        """Give the file back."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_moments(path: Path) -> MomentsFile:
    """Open a file of second moments.

    Raises NotFoundError, or BadFileError for a damaged file or one that is something else.
    """
    opened = open_safetensors(path)
    try:
        return MomentsFile(opened, dict(_shapes(opened)))
    except BadFileError:
        opened.close()
        raise


def _shapes(opened: Checkpoint) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield blocks and columns of each input; every tensor must belong to one."""
    names = {name.removesuffix(MOMENTS) for name in opened.tensors if name.endswith(MOMENTS)}
    wanted = {name + suffix for name in names for suffix in (MOMENTS, TOKENS)}
    if not names or opened.tensors.keys() != wanted:
        raise BadFileError(opened.path, "holds no second moments")
    for name in sorted(names):
        moments, tokens = opened.tensors[name + MOMENTS], opened.tensors[name + TOKENS]
        shape = moments.shape
        if moments.dtype.name != "F32" or len(shape) != 3 or shape[1] != shape[2] or 0 in shape:
            raise BadFileError(opened.path, f"{name + MOMENTS} is not F32 (blocks, cols, cols)")
        if tokens.dtype.name != "I64" or tokens.shape != (1,):
            raise BadFileError(opened.path, f"{name + TOKENS} is not one I64")
        if np.frombuffer(opened.bytes(name + TOKENS).tobytes(), "<i8")[0] <= 0:
            raise BadFileError(opened.path, f"{name + TOKENS} is no number of tokens")
        yield name, (shape[0], shape[1])


def write_moments(path: Path, inputs: Mapping[str, Moments], dataset: str) -> None:
    """Write second moments; the file appears when all of it is on disk. Raises LocalV4Error."""
    entries: dict[str, object] = {"__metadata__": {"format": FORMAT, "dataset": dataset}}
    end = 0
    for name in sorted(inputs):
        # numbers of tokens lie between the moments, all of whole multiples of eight bytes or four
        for suffix, dtype, shape, size in (
            (MOMENTS, "F32", inputs[name].products.shape, 4),
            (TOKENS, "I64", (1,), 8),
        ):
            begin, end = end, end + size * math.prod(shape)
            entries[name + suffix] = {
                "dtype": dtype,
                "shape": list(shape),
                "data_offsets": [begin, end],
            }
    header = json.dumps(entries, separators=(",", ":")).encode()
    length = -(-(len(header) + 8) // _ALIGNMENT) * _ALIGNMENT - 8
    with finished_file(path, 8 + length + end) as file:
        file.write(struct.pack("<Q", length) + header.ljust(length))
        for name in sorted(inputs):
            file.write(np.ascontiguousarray(inputs[name].products, "<f4").data)
            file.write(struct.pack("<q", inputs[name].tokens))
