"""The values of a packed folder, by the NumPy twins of the packed formats."""

from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from reference_packed import unpack, unpack_f8

from localv4.kernels import blocks
from localv4.model.matrix import Matrix
from localv4.model.packed_source import ONLY_PACKED
from localv4.model.packing import PackedMatrix
from localv4.model.weights import Expert

NO_SCALE = np.zeros((1, 1), np.uint8)


def packed_values(leaf: PackedMatrix) -> NDArray[np.float32]:
    """Every value of a packed matrix (rows, cols)."""
    packed = np.ascontiguousarray(leaf.packed).reshape(-1)
    if leaf.scales is not None:
        return unpack_f8(packed, leaf.scales, leaf.rows, leaf.cols)
    if leaf.form.name in ("B16", "F32R"):
        return _floats(packed, leaf)
    return unpack(leaf.form, packed, leaf.rows, leaf.cols)


def _floats(packed: NDArray[np.uint8], leaf: PackedMatrix) -> NDArray[np.float32]:
    """Rows of floats, sixteen interleaved; what fills the last group up is cut off."""
    if leaf.form.name == "B16":
        bits = packed.view(np.uint16).astype(np.uint32) << 16
    else:
        bits = packed.view(np.uint32)
    groups = bits.view(np.float32).reshape(-1, leaf.cols, 16).transpose(0, 2, 1)
    return np.ascontiguousarray(groups.reshape(-1, leaf.cols)[: leaf.rows])


def as_stored(node: Any) -> Any:
    """A tree of weights with float32 rows in the place of packed matrices."""
    if isinstance(node, PackedMatrix):
        assert node.format == ONLY_PACKED
        data = packed_values(node).view(np.uint8)
        return Matrix(blocks.F32, node.rows, node.cols, data, NO_SCALE)
    if isinstance(node, Expert):
        return Expert(as_stored(node.w1), as_stored(node.w2), as_stored(node.w3))
    if isinstance(node, tuple):
        return tuple(as_stored(part) for part in node)
    if not is_dataclass(node) or isinstance(node, type | Matrix):
        return node
    return replace(node, **{f.name: as_stored(getattr(node, f.name)) for f in fields(node)})
