"""A trained model as a GGUF file with other block types, for measurements.

    python tests/requantised.py SOURCE_FOLDER TARGET.gguf

SOURCE_FOLDER holds a safetensors model of plain floats. Routed experts become MXFP4; attention,
shared expert, head and the indexer's queries Q8_0; the rest stays BF16 or float32, as in published
files. The tokenizer in the file is of no use.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf_writer import MAINLINE, GgufOptions, write_gguf
from golden.presets import Preset
from golden.weights import Array
from golden_files import GoldenModel

from localv4.storage import Checkpoint, open_checkpoint

# llama.cpp's mix, and the head as in ds4's
PUBLISHED = {**MAINLINE, "head": Type.Q8_0}
# A stretch of 1 is none: the frequencies stay what they are without YaRN.
NO_YARN = {"factor": 1, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}


def plain_values(checkpoint: Checkpoint, name: str) -> Array:
    """Return a tensor of floats as float32, of integers as int64."""
    tensor = checkpoint.tensors[name]
    data = np.ascontiguousarray(checkpoint.bytes(name))
    values: Array
    if tensor.dtype.name == "BF16":
        values = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = data.view({"F32": np.float32, "I64": np.int64}[tensor.dtype.name])
    return values.reshape(tensor.shape)


def requantise(source: Path, target: Path) -> Path:
    """Write the backbone of a model as a GGUF file; return its path."""
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    preset = Preset(source.name, {**settings, "rope_scaling": NO_YARN}, length=0, seed=0)
    with open_checkpoint(source) as checkpoint:
        names = [name for name in checkpoint.tensors if not name.startswith("mtp.")]
        weights = {name: plain_values(checkpoint, name) for name in names}
        model = GoldenModel(source.name, preset, weights, {}, {})
        path, _ = write_gguf(model, target, GgufOptions(PUBLISHED))
    return path


def main() -> None:
    """Write the file that the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    given = parser.parse_args()
    requantise(given.source, given.target)


if __name__ == "__main__":
    main()
