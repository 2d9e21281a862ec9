"""Small models in official storage, whole enough to be converted to any format."""

import json
import shutil
from pathlib import Path

import numpy as np
from golden_files import load_golden, write_stored

from localv4.model.matrix import Matrix
from localv4.storage import Checkpoint, open_checkpoint
from localv4.storage.moments_file import Moments, input_of, write_moments
from quant.gguf_conversion import GgufConversion
from quant.importance import Statistics
from quant.packer import Packer
from quant.recipe import Recipe, load_recipe
from quant.source import open_source
from quant.task import OnProgress, Task


def official_model(folder: Path, name: str = "wide") -> Path:
    """Write a golden model with a tokenizer of bytes."""
    golden = load_golden(name)
    write_stored(golden, folder)
    add_tokenizer(folder, golden.preset.dims["vocab_size"])
    return folder


def add_tokenizer(folder: Path, size: int) -> None:
    """Write a tokenizer of two special tokens, a merge and bytes, as far as they fit."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    letters = [chr(byte if byte in kept else next(spare)) for byte in range(256)]
    vocabulary = ["<bos>", "<eos>", '!"', *letters][:size]
    added = [{"id": n, "content": vocabulary[n], "special": True} for n in (0, 1)]
    model = {
        "type": "BPE",
        "vocab": {text: number for number, text in enumerate(vocabulary) if number > 1},
        "merges": [["!", '"']],
    }
    document = {"added_tokens": added, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(document), "utf-8")


def converted(
    source: Path,
    target: Path,
    recipe: str | Recipe = "q4",
    *,
    statistics: Statistics | None = None,
    threads: int = 2,
    on_progress: OnProgress | None = None,
    split_bytes: int = 0,
) -> Path:
    """Convert to a packed folder, or to a GGUF file where the target ends in .gguf."""
    chosen = load_recipe(recipe) if isinstance(recipe, str) else recipe
    with open_checkpoint(source) as opened:
        task = Task(open_source(opened), chosen, threads, statistics)
        if target.suffix == ".gguf":
            GgufConversion(task, split_bytes, "m").run(target, on_progress)
        else:
            Packer(task).run(target, on_progress)
    return target


def copied(source: Path, target: Path) -> Path:
    """Return a copy of a model that a test may change."""
    shutil.copytree(source, target)
    return target


def drawn_moments(source: Path, path: Path) -> Path:
    """Write second moments of random activations for everything that a matrix reads."""
    chance, inputs = np.random.default_rng(5), {}
    with open_checkpoint(source) as opened:
        model = open_source(opened)
        for number in range(model.shards):
            with model.shard(number) as shard:
                matrices = {n: leaf for n, leaf in shard.leaves.items() if isinstance(leaf, Matrix)}
                for prefix, experts in shard.experts.items():
                    for place, expert in enumerate(experts):
                        own = prefix if prefix.endswith("shared_experts") else f"{prefix}.{place}"
                        matrices[f"{own}.w1.weight"] = expert.w1
                        matrices[f"{own}.w2.weight"] = expert.w2
            for name, matrix in matrices.items():
                read = input_of(name)
                if read is not None and read not in inputs:
                    x = chance.standard_normal((2 * matrix.cols, matrix.cols)).astype(np.float32)
                    inputs[read] = Moments((x.T @ x)[None], len(x))
    write_moments(path, inputs, "chance")
    return path


def pack_folder(source: Checkpoint, target: Path, on_progress: OnProgress | None = None) -> None:
    """Write `source` as the packed folder `target`, value for value."""
    task = Task(open_source(source), load_recipe("lossless"), threads=2)
    Packer(task).run(target, on_progress)
