"""Bytes on disk: model files of any supported format as validated, memory-mapped tensors.

This package knows no model: names and meanings of tensors belong to `localv4.model`.
"""

from localv4.storage.checkpoint import Checkpoint, MetaValue, StoredTensor
from localv4.storage.detection import open_checkpoint
from localv4.storage.dtypes import DType
from localv4.storage.packed_folder import PackedFolder

__all__ = ["Checkpoint", "DType", "MetaValue", "PackedFolder", "StoredTensor", "open_checkpoint"]
