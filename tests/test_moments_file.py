"""Second moments: what is collected, the file they go into, and conversions that use them."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from conversions import official_model
from terminal import needs_jit, run_here

from localv4.engine.engine import Engine
from localv4.engine.imatrix import collect, named_matrices
from localv4.engine.second_moments import MomentCollector
from localv4.engine.setup import Setup
from localv4.engine.windows import cut
from localv4.errors import BadFileError, LocalV4Error, NotFoundError
from localv4.kernels.team import Team
from localv4.library.installed import embedded_model_path
from localv4.model.weights import Weights
from localv4.storage import open_checkpoint
from localv4.storage.moments_file import (
    Moments,
    MomentsFile,
    input_of,
    layer_input_of,
    open_moments,
    write_moments,
)
from quant.moments import SecondMoments
from quant.packer import Packer
from quant.recipe import Recipe, Rule
from quant.source import open_source
from quant.task import Task
from quant.tensor_class import TensorClass

TEXT = Path(__file__).parent / "golden" / "heldout.txt"


def moments(cols: int, tokens: int, blocks: int = 1, seed: int = 3) -> Moments:
    """Sums over random vectors whose columns are correlated."""
    chance = np.random.default_rng(seed)
    mixing = chance.standard_normal((cols, cols))
    x = chance.standard_normal((tokens, cols)) @ mixing
    return Moments(np.stack([(x.T @ x).astype(np.float32)] * blocks), tokens)


@needs_jit
@pytest.mark.parametrize("limit", [128 << 20, 1 << 20])
def test_diagonals_are_those_of_the_importance_matrix(limit: int) -> None:
    engine = Engine.load(embedded_model_path(), Setup(threads=2, numerics="exact"))
    ids = engine.tokenizer.encode(TEXT.read_text(encoding="utf-8"))

    def make(team: Team, weights: Weights) -> MomentCollector:
        return MomentCollector(team, weights, engine.config.o_groups, limit)

    imatrix, seen = collect(engine, cut(ids, 301, bos=0, most=1), "x", make=make)
    assert isinstance(seen, MomentCollector)
    found = seen.moments()
    used, checked = set(), 0
    for official, matrix in named_matrices(engine.network.weights):
        name = input_of(official)
        if name is None or name not in found:
            continue
        used.add(name)
        own = found[name]
        assert own.products.shape[1] == matrix.cols
        squares = np.diagonal(own.products, axis1=1, axis2=2) / own.tokens
        expected = imatrix.weights_for(official, matrix.cols)
        assert expected is not None
        # matrices that share an input have the same mean squares, each by its own sum
        np.testing.assert_allclose(squares, np.atleast_2d(expected), rtol=2e-4)
        checked += 1
    assert used == found.keys() and checked > 60
    experts = [name for name in found if ".experts." in name]
    assert all(found[name].tokens >= found[name].products.shape[1] for name in experts)
    if limit == 1 << 20:
        assert "ffn.experts.input" in seen.skipped and "layers.0.attn.input" in found
        assert seen.skipped["ffn.experts.input"].layers == engine.config.n_layers
        assert not any(name.endswith(".input") for name in experts)
    else:
        assert not seen.skipped and "layers.0.attn.heads" in found


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path, one, two = tmp_path / "m.safetensors", moments(4, 9), moments(3, 5, blocks=2)
    write_moments(path, {"head": one, "layers.0.attn.heads": two}, "bücher.txt")
    with open_moments(path) as found:
        assert found.inputs == {"head": (1, 4), "layers.0.attn.heads": (2, 3)}
        assert (found.tokens("head"), found.tokens("layers.0.attn.heads")) == (9, 5)
        assert np.array_equal(found.products("head"), one.products[0])
        assert np.array_equal(found.products("layers.0.attn.heads", 1), two.products[1])
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]


def test_names() -> None:
    assert input_of("layers.3.ffn.experts.7.w3.weight") == "layers.3.ffn.experts.7.input"
    assert input_of("layers.3.ffn.experts.7.w2.weight") == "layers.3.ffn.experts.7.down"
    assert layer_input_of("layers.3.ffn.experts.7.w1.weight") == "layers.3.ffn.input"
    assert layer_input_of("layers.3.ffn.experts.7.w2.weight") is None
    assert input_of("layers.3.hc_ffn_fn") is None and input_of("embed.weight") is None


def rewritten(path: Path, entries: dict[str, tuple[str, list[int], bytes]]) -> None:
    """Write a safetensors file."""
    header, data = {}, b""
    for name, (dtype, shape, raw) in entries.items():
        header[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


FLOATS = np.eye(2, dtype="<f4").tobytes()
ONE = struct.pack("<q", 1)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"a": ("F32", [2, 2], FLOATS)}, "no second moments"),
        ({"a.moments": ("F32", [1, 2, 2], FLOATS)}, "no second moments"),
        (
            {"a.moments": ("F32", [2, 2], FLOATS), "a.tokens": ("I64", [1], ONE)},
            "not F32 .blocks, cols, cols",
        ),
        (
            {"a.moments": ("F32", [1, 2, 2], FLOATS), "a.tokens": ("I32", [1], ONE[:4])},
            "a.tokens is not one I64",
        ),
        (
            {"a.moments": ("F32", [1, 2, 2], FLOATS), "a.tokens": ("I64", [1], bytes(8))},
            "no number of tokens",
        ),
    ],
)
def test_damaged_files(
    entries: dict[str, tuple[str, list[int], bytes]], said: str, tmp_path: Path
) -> None:
    rewritten(tmp_path / "m.safetensors", entries)
    with pytest.raises(BadFileError, match=said):
        open_moments(tmp_path / "m.safetensors")


def test_values_that_are_no_moments(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with pytest.raises(NotFoundError):
        open_moments(path)
    bad = moments(4, 9)
    bad.products[0, 1, 1] = np.nan
    write_moments(path, {"head": bad}, "x")
    with open_moments(path) as found, pytest.raises(LocalV4Error, match="no second moments"):
        found.products("head")


# --- conversions


FED = Recipe(
    name="fed",
    summary="",
    rules=[
        Rule(
            tensors=[TensorClass.HEAD, TensorClass.ATTENTION_Q],
            formats=["Q3", "Q4"],
            method="feedback",
        )
    ],
)


def packed(source: Path, target: Path, opened: MomentsFile | None, threads: int = 2) -> Path:
    """Convert by `FED`."""
    with open_checkpoint(source) as checkpoint:
        known = None if opened is None else SecondMoments(opened)
        Packer(Task(open_source(checkpoint), FED, threads, None, "", known)).run(target)
    return target


@needs_jit
def test_feedback_where_moments_are_known_and_search_elsewhere(tmp_path: Path) -> None:
    source, path = official_model(tmp_path / "source"), tmp_path / "m.safetensors"
    with open_checkpoint(source) as checkpoint:
        cols = open_source(checkpoint).config.hidden_size
    write_moments(path, {"head": moments(cols, 4 * cols)}, "x")
    plain = packed(source, tmp_path / "plain", None)
    with open_moments(path) as opened:
        fed = packed(source, tmp_path / "fed", opened)
        again = packed(source, tmp_path / "again", opened, threads=1)
        with open_checkpoint(source) as checkpoint:
            task = Task(open_source(checkpoint), FED, 1, None, "", SecondMoments(opened))
            notes = {d.kind: d.note for d in Packer(task).plan().decisions}
    root = "embedding-and-head.safetensors"
    assert (fed / root).read_bytes() != (plain / root).read_bytes()
    for file in fed.glob("*.safetensors"):
        assert file.read_bytes() == (again / file.name).read_bytes()
        if file.name != root:
            assert file.read_bytes() == (plain / file.name).read_bytes()
    assert notes[TensorClass.HEAD] == ""
    assert "no second moments are known" in notes[TensorClass.ATTENTION_Q]


def test_one_expert_without_moments_has_those_of_its_layer(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    inputs = {
        "layers.0.ffn.input": moments(32, 90),
        "layers.0.ffn.experts.1.input": moments(32, 70, seed=4),
        "layers.0.attn.heads": moments(32, 90, blocks=2),
    }
    write_moments(path, inputs, "x")
    with open_moments(path) as opened:
        known = SecondMoments(opened)
        prefix = "layers.0.ffn.experts"
        own = known.of(f"{prefix}.1.w3.weight", 64, 32, 0)
        layer = known.of(f"{prefix}.2.w1.weight", 64, 32, 0)
        assert own is not None and layer is not None
        expected = np.diagonal(inputs["layers.0.ffn.experts.1.input"].products[0]) / 70
        np.testing.assert_allclose(own.squares, expected, rtol=1e-6)
        assert known.of(f"{prefix}.2.w3.weight", 64, 32, 0) is layer
        assert not known.knows(f"{prefix}.2.w2.weight", 64, 32)
        assert not known.knows(f"{prefix}.2.w1.weight", 64, 64)
        assert known.groups("layers.0.attn.wo_a.weight", 256, 32) == 2
        assert not known.knows("layers.0.attn.wo_a.weight", 64, 32)


@needs_jit
def test_the_command(tmp_path: Path) -> None:
    out, second = tmp_path / "i.gguf", tmp_path / "m.safetensors"
    arguments = ("eval", "imatrix", "-f", str(TEXT), "-c", "64", "-w", "1", "-o", str(out))
    done = run_here(*arguments, "--second-moments", str(second), home=tmp_path)
    assert done.code == 0, done.stderr
    assert "inputs" in done.stderr and second.is_file()
    done = run_here(*arguments, "--second-moments", str(tmp_path / "m.gguf"), home=tmp_path)
    assert done.code == 2 and "ending in .safetensors" in done.stderr
