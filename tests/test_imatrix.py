"""Importance matrices: what is collected, the file it goes into, and files of llama.cpp."""

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import gguf
import numpy as np
import pytest
from golden_files import load_golden, write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import open_network
from numpy.typing import NDArray
from terminal import needs_jit, run_here

from localv4.engine.engine import Engine
from localv4.engine.imatrix import collect
from localv4.engine.scoring import final_vectors
from localv4.engine.setup import Setup
from localv4.engine.windows import Windows, cut
from localv4.errors import BadFileError, LocalV4Error, NotFoundError, UsageError
from localv4.library.installed import embedded_model_path
from localv4.model.matrix import Floats, Matrix, Numerics
from localv4.model.names import official_names
from localv4.model.transformer import Transformer
from localv4.storage import open_checkpoint
from localv4.storage.imatrix_file import (
    ImatrixFile,
    TensorStatistics,
    read_imatrix,
    write_imatrix,
)
from localv4.storage.imatrix_names import EXPERTS, LAYER, ROOT, place_of

TEXT = Path(__file__).parent / "golden" / "heldout.txt"


@pytest.fixture(scope="module")
def engine() -> Engine:
    """The built-in model."""
    return Engine.load(embedded_model_path(), Setup(threads=2, numerics="exact"))


@pytest.fixture(scope="module")
def windows(engine: Engine) -> Windows:
    """Two windows, longer than a chunk of the exact network."""
    ids = engine.tokenizer.encode(TEXT.read_text(encoding="utf-8"))
    return cut(ids, 151, bos=0, most=2)


@pytest.fixture(scope="module")
def collected(engine: Engine, windows: Windows) -> ImatrixFile:
    """The importance matrix of these windows."""
    return collect(engine, windows, "heldout.txt")[0]


def example() -> ImatrixFile:
    """A small importance matrix: dense, block-diagonal, fused."""
    chance = np.random.default_rng(5)
    return ImatrixFile(
        {
            "blk.0.attn_q_a.weight": TensorStatistics(_sums(chance, 1, 6), _floats(3)),
            "blk.0.attn_output_a.weight": TensorStatistics(_sums(chance, 2, 5), _floats(3, 3)),
            "blk.0.ffn_gate_exps.weight": TensorStatistics(_sums(chance, 3, 4), _floats(2, 0, 4)),
        },
        ("a.txt", "bücher.txt"),
        7,
        512,
    )


def _sums(chance: np.random.Generator, rows: int, cols: int) -> Floats:
    return chance.random((rows, cols), np.float32)


def _floats(*values: float) -> Floats:
    return np.array(values, np.float32)


@needs_jit
def test_sums_are_those_of_all_inputs(
    engine: Engine, windows: Windows, collected: ImatrixFile
) -> None:
    seen: dict[int, list[NDArray[np.float64]]] = {}
    network = engine.network
    assert isinstance(network, Transformer)
    own = Numerics.linear

    def linear(self: Numerics, x: Floats, weight: Matrix, groups: int = 1) -> Floats:
        wide = x.astype(np.float64).reshape(len(x), groups, -1)
        seen.setdefault(id(weight), []).append(wide)
        return own(self, x, weight, groups)

    with mock.patch.object(Numerics, "linear", linear):
        for index in range(len(windows)):
            for _, vectors in final_vectors(engine, network, windows.inputs(index)):
                network.logits(vectors)
    layer = network.weights.layers[4]
    assert layer.attention.indexer is not None
    for matrix, name in (
        (layer.attention.wq_a, "layers.4.attn.wq_a.weight"),
        (layer.attention.wo_a, "layers.4.attn.wo_a.weight"),
        (layer.attention.indexer.wq_b, "layers.4.attn.indexer.wq_b.weight"),
        (layer.experts[3].w2, "layers.4.ffn.experts.3.w2.weight"),
        (layer.ffn_hc.fn, "layers.4.hc_ffn_fn"),
        (network.weights.head, "head.weight"),
    ):
        inputs = np.concatenate(seen[id(matrix)])
        expected = np.square(inputs).mean(0)
        found = collected.weights_for(name)
        assert found is not None
        np.testing.assert_allclose(np.atleast_2d(found), expected, rtol=1e-6)


@needs_jit
def test_every_token_is_in_each_layer_once_for_each_expert_it_uses(
    engine: Engine, windows: Windows, collected: ImatrixFile
) -> None:
    tokens, config = 2 * 150, engine.config
    assert (collected.chunk_count, collected.chunk_size) == (2, 151)
    for layer in range(config.n_layers):
        counts = collected.expert_counts(layer)
        assert counts is not None
        assert counts.sum() == tokens * config.experts_per_token
        routed = collected.tensors[f"blk.{layer}.ffn_gate_exps.weight"]
        shared = collected.tensors[f"blk.{layer}.ffn_gate_shexp.weight"]
        assert shared.counts.tolist() == [tokens]
        np.testing.assert_allclose(
            routed.sums.sum(0), config.experts_per_token * shared.sums[0], rtol=1e-5
        )
        up = collected.tensors[f"blk.{layer}.ffn_up_exps.weight"]
        assert np.array_equal(up.sums, routed.sums)
    # hash layers: the table says which experts the tokens have
    table = engine.network.weights.layers[0].router.table
    assert table is not None
    ids = [token for index in (0, 1) for token in windows.inputs(index)]
    expected = np.bincount(table[ids].ravel(), minlength=config.n_experts)
    counts = collected.expert_counts(0)
    assert counts is not None and np.array_equal(counts, expected)


@needs_jit
def test_inputs_that_were_rounded_are_refused(windows: Windows) -> None:
    fast = Engine.load(embedded_model_path(), Setup(threads=2, numerics="fast"))
    with pytest.raises(UsageError, match="exact"):
        collect(fast, windows, "x")


def test_every_matrix_of_a_network_has_a_place(tmp_path: Path) -> None:
    weights = open_network(write_model(load_golden("tiny300"), tmp_path)).weights
    from localv4.engine.imatrix import _matrices

    places = [place for place, _ in _matrices(weights)]
    assert len(set(places)) == len(places)


def test_names_are_those_that_gguf_files_have() -> None:
    # the inverse of what model.names understands, for every name in the tables
    official = [f"layers.7.{leaf}" for leaf in LAYER]
    official += [f"layers.7.ffn.experts.2.{part}.weight" for part in EXPERTS]
    for name in [*ROOT, *official]:
        place = place_of(name)
        assert place is not None
        rows = 5 if place.expert is not None else 1
        assert name in set(_official_of(place.name, rows)), name
    assert place_of("layers.7.attn_norm.weight") is None
    assert place_of("embed.weight") is None


def _official_of(name: str, experts: int) -> Iterator[str]:
    """Yield what `model.names` calls a tensor of a GGUF file."""
    shape = (experts, 2, 2) if experts > 1 else (2, 2)
    tensor = mock.Mock(shape=shape)
    tensor.name = name
    yield from official_names(mock.Mock(kind="gguf", tensors={name: tensor}))


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path, written = tmp_path / "i.gguf", example()
    write_imatrix(path, written)
    found = read_imatrix(path)
    assert (found.datasets, found.chunk_count, found.chunk_size) == (written.datasets, 7, 512)
    assert list(found.tensors) == sorted(written.tensors)
    for name, statistics in written.tensors.items():
        assert np.array_equal(found.tensors[name].sums, statistics.sums)
        assert np.array_equal(found.tensors[name].counts, statistics.counts)
    assert [entry.name for entry in tmp_path.iterdir()] == ["i.gguf"]


def test_the_gguf_package_reads_what_llama_cpp_would_write(tmp_path: Path) -> None:
    path, written = tmp_path / "i.gguf", example()
    write_imatrix(path, written)
    reader = gguf.GGUFReader(path)
    assert [tensor.name for tensor in reader.tensors][:2] == [
        "blk.0.attn_output_a.weight.in_sum2",
        "blk.0.attn_output_a.weight.counts",
    ]
    fused = {tensor.name: tensor for tensor in reader.tensors}["blk.0.ffn_gate_exps.weight.in_sum2"]
    assert fused.shape.tolist() == [4, 3]
    assert np.array_equal(fused.data, written.tensors["blk.0.ffn_gate_exps.weight"].sums)
    counts = {tensor.name: tensor for tensor in reader.tensors}["blk.0.ffn_gate_exps.weight.counts"]
    assert counts.shape.tolist() == [1, 3]
    assert counts.data.ravel().tolist() == [2, 0, 4]
    assert reader.get_field("general.type").contents() == "imatrix"
    assert reader.get_field("imatrix.datasets").contents() == ["a.txt", "bücher.txt"]
    assert reader.get_field("imatrix.chunk_count").contents() == 7
    assert reader.get_field("imatrix.chunk_size").contents() == 512


def test_means() -> None:
    found = example()
    dense = found.tensors["blk.0.attn_q_a.weight"].sums[0] / 3
    mine = found.weights_for("layers.0.attn.wq_a.weight")
    assert mine is not None and np.allclose(mine, dense)
    fused = found.tensors["blk.0.ffn_gate_exps.weight"]
    used = found.weights_for("layers.0.ffn.experts.2.w1.weight")
    assert used is not None and np.allclose(used, fused.sums[2] / 4)
    unused = found.weights_for("layers.0.ffn.experts.1.w1.weight")
    assert unused is not None and np.allclose(unused, fused.sums.sum(0) / 6)
    blocks = found.weights_for("layers.0.attn.wo_a.weight")
    assert blocks is not None and blocks.shape == (2, 5)
    counts = found.expert_counts(0)
    assert counts is not None and counts.tolist() == [2, 0, 4]
    assert found.weights_for("layers.0.attn.wkv.weight") is None
    assert found.weights_for("layers.0.ffn.experts.9.w1.weight") is None
    assert found.weights_for("embed.weight") is None
    assert found.expert_counts(1) is None


def test_nothing_was_counted() -> None:
    empty = TensorStatistics(np.zeros((2, 3), np.float32), _floats(0, 0))
    assert empty.mean_squares().tolist() == [[1, 1, 1], [1, 1, 1]]


def write_like_llama_cpp(path: Path, tensors: dict[str, NDArray[np.float32]]) -> None:
    """Write tensors with the `gguf` package."""
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_array("imatrix.datasets", ["w.txt"])
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_block_diagonal_matrix_by_llama_cpp(tmp_path: Path) -> None:
    # one count, the blocks side by side, and a tensor of a newer version
    values = np.arange(1, 13, dtype=np.float32).reshape(1, 12)
    tensors = {
        "blk.2.attn_output_a.weight.in_sum2": values,
        "blk.2.attn_output_a.weight.counts": np.full((1, 1), 4, np.float32),
        "blk.2.attn_output_a.weight.in_sum": -values,
    }
    write_like_llama_cpp(tmp_path / "i.gguf", tensors)
    found = read_imatrix(tmp_path / "i.gguf")
    blocks = found.weights_for("layers.2.attn.wo_a.weight", 4)
    assert blocks is not None and np.array_equal(blocks, values.reshape(3, 4) / 4)
    flat = found.weights_for("layers.2.attn.wo_a.weight")
    assert flat is not None and flat.shape == (12,)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"a.counts": None}, "a.counts"),
        ({"a.in_sum2": None}, "no importance matrix"),
        ({"a.counts": np.ones((2, 1), np.float32)}, "3 sums are not of 2 matrices"),
        ({"a.in_sum2": np.array([[1, np.nan, 1]], np.float32)}, "no sums of squares"),
        ({"a.counts": np.array([[-1]], np.float32)}, "no sums of squares"),
        ({"a.in_sum2": np.ones((1, 3), np.float16)}, "type F16"),
    ],
)
def test_damaged_files(
    changes: dict[str, NDArray[np.float32] | None], said: str, tmp_path: Path
) -> None:
    good: dict[str, NDArray[np.float32] | None] = {
        "a.in_sum2": np.ones((1, 3), np.float32),
        "a.counts": np.ones((1, 1), np.float32),
    }
    tensors = {name: values for name, values in {**good, **changes}.items() if values is not None}
    write_like_llama_cpp(tmp_path / "i.gguf", tensors)
    with pytest.raises(BadFileError, match=said):
        read_imatrix(tmp_path / "i.gguf")


def test_no_file_and_the_older_form(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_imatrix(tmp_path / "i.gguf")
    (tmp_path / "i.dat").write_bytes(b"\x05\0\0\0\x16\0\0\0blk.0.attn_q.weight")
    with pytest.raises(BadFileError, match="not a GGUF file") as caught:
        read_imatrix(tmp_path / "i.dat")
    assert "llama-imatrix" in str(caught.value.hint)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_damage_is_found_or_harmless(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("damage") / "i.gguf"
    write_imatrix(path, example())
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        found = read_imatrix(path)
    except LocalV4Error:
        return
    assert all(np.isfinite(one.mean_squares()).all() for one in found.tensors.values())


@needs_jit
def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "i.gguf"
    arguments = ("eval", "imatrix", "-f", str(TEXT), "-c", "64", "-w", "1", "-o", str(out))
    done = run_here(*arguments, home=tmp_path)
    assert done.code == 0, done.stderr
    assert "138 matrices, 63 tokens" in done.stderr and done.stdout == ""
    with open_checkpoint(out) as opened:
        assert opened.metadata["general.type"] == "imatrix"
    assert read_imatrix(out).datasets == ("heldout.txt",)


@pytest.mark.parametrize("name", ["i.dat", "missing/i.gguf"])
def test_impossible_places(name: str, tmp_path: Path) -> None:
    done = run_here("eval", "imatrix", "-o", str(tmp_path / name), home=tmp_path)
    assert done.code in (1, 2)
    assert name.split("/")[0] in done.stderr
