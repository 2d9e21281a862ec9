"""GGUF files that we write: read by the gguf package, by us, and by llama.cpp where it is there."""

import importlib.util
from pathlib import Path

import numba
import numpy as np
import pytest
from conversions import converted, official_model
from gguf import GGUFReader, quants
from gguf_writer import GgufOptions, write_gguf
from golden_files import random_model
from numpy.typing import NDArray
from test_packer import MIXES, WHOLE, open_source

from localv4.engine.engine import Engine
from localv4.engine.setup import Setup
from localv4.errors import BadFileError, UsageError
from localv4.kernels import blocks
from localv4.library.installed import embedded_model_path
from localv4.model.matrix import Matrix, decode
from localv4.storage import open_checkpoint
from localv4.storage.gguf import open_gguf
from quant.ggml_rows import kept_rows, mxfp4_rows
from quant.gguf_names import gguf_name
from quant.proof import prove
from quant.recipe import Recipe, Rule
from quant.tensor_class import TensorClass

pytestmark = pytest.mark.skipif(
    bool(numba.config.DISABLE_JIT), reason="kernels that take addresses need the compiler"
)

LLAMA_DISTANCE = 0.03
LLAMA_SAME_TOKEN = 0.9
"""llama.cpp rounds activations to int8 and keys to float16; near ties then fall otherwise."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return official_model(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def lossless(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(source, tmp_path_factory.mktemp("gguf") / "m.gguf", "lossless")


def logits(path: Path, ids: list[int]) -> NDArray[np.float32]:
    engine = Engine.load(path, Setup(threads=2, numerics="exact"))
    return np.concatenate([part.copy() for part in engine.logits(ids)])


def test_the_gguf_package_reads_every_tensor(source: Path, lossless: Path) -> None:
    stored = open_source(source)[1]
    tensors = {tensor.name: tensor for tensor in GGUFReader(lossless).tensors}
    for number, expert in enumerate(stored.layers[1].experts):
        tensor = tensors["blk.1.ffn_down_exps.weight"]
        assert tensor.tensor_type.name == "MXFP4"
        values = quants.dequantize(tensor.data[number], tensor.tensor_type)
        assert np.array_equal(values, decode(expert.w2))
    for name, matrix in (
        ("blk.0.attn_q_a.weight", stored.layers[0].attention.wq_a),
        ("output.weight", stored.head),
        ("blk.1.ffn_gate_shexp.weight", stored.layers[1].shared.w1),
    ):
        tensor = tensors[name]
        values = quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(values.reshape(matrix.rows, matrix.cols), decode(matrix)), name


def test_every_value_is_kept_and_the_logits_have_the_same_bits(
    source: Path, lossless: Path
) -> None:
    proof = prove(lossless, source)
    assert proof.wrong_values == 0 and not proof.of("rounded")
    ids = np.random.default_rng(0).integers(0, 250, 60).tolist()
    assert np.array_equal(logits(lossless, ids), logits(source, ids))


def test_the_configuration_survives(source: Path, lossless: Path) -> None:
    expected, actual = open_source(source)[0], open_source(lossless)[0]
    # numbers are float32 in GGUF
    for name in expected.__dataclass_fields__:
        one, other = getattr(expected, name), getattr(actual, name)
        if isinstance(one, float):
            assert other == np.float32(one), name
        elif name == "yarn" and one is not None:
            assert other.factor == one.factor and other.original == one.original
        else:
            assert other == one or np.allclose(other, one), name


def test_the_tokenizer_survives(lossless: Path) -> None:
    metadata = open_gguf(lossless).metadata
    assert metadata["tokenizer.ggml.pre"] == "joyai-llm"
    assert metadata["tokenizer.ggml.merges"] == ['! "']
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    assert tokens[:3] == ["<bos>", "<eos>", '!"']
    assert list(metadata["tokenizer.ggml.token_type"][:3]) == [3, 3, 1]  # type: ignore[index]
    assert metadata["general.architecture"] == "deepseek4"


def test_parts_have_at_most_the_size_that_was_asked_for(source: Path, tmp_path: Path) -> None:
    limit = 150_000
    whole = converted(source, tmp_path / "whole.gguf", "q2")
    converted(source, tmp_path / "parts.gguf", "q2", split_bytes=limit)
    parts = sorted(tmp_path.glob("parts-*.gguf"))
    assert len(parts) > 3
    assert parts[0].name == f"parts-00001-of-{len(parts):05d}.gguf"
    with open_checkpoint(parts[0]) as divided, open_checkpoint(whole) as one:
        assert divided.tensors.keys() == one.tensors.keys()
        for name, tensor in one.tensors.items():
            assert np.array_equal(divided.bytes(name), one.bytes(name))
            assert tensor.dtype == divided.tensors[name].dtype
        for number, part in enumerate(parts):
            own = [t.nbytes for t in divided.tensors.values() if t.file == number]
            assert len(own) == 1 or sum(own) <= limit
            assert GGUFReader(part).get_field("split.no") is not None


@pytest.mark.parametrize("mix", MIXES)
def test_from_gguf_to_gguf(mix: str, tmp_path: Path) -> None:
    first, _ = write_gguf(random_model(WHOLE), tmp_path / "m.gguf", GgufOptions(MIXES[mix]))
    second = converted(first, tmp_path / "again.gguf", "lossless")
    assert prove(second, first).wrong_values == 0
    with open_checkpoint(first) as before, open_checkpoint(second) as after:
        assert before.tensors.keys() == after.tensors.keys()
        for name, tensor in before.tensors.items():
            assert after.tensors[name].shape == tensor.shape
            if after.tensors[name].dtype == tensor.dtype:  # small tensors become float32
                assert np.array_equal(after.bytes(name), before.bytes(name)), name
        assert {k: str(v) for k, v in before.metadata.items()} == {
            k: str(v) for k, v in after.metadata.items()
        }


@pytest.mark.parametrize(
    "name", ["Q8_0", "Q6_K", "Q4_K", "Q4_0", "Q3_K", "Q2_K", "IQ4_XS", "BF16", "F32"]
)
def test_types_that_are_rounded_to(name: str, source: Path, tmp_path: Path) -> None:
    rule = Rule(tensors=[TensorClass.ATTENTION_O], formats=["Q2"], gguf=[name])
    recipe = Recipe(name="test", summary="", rules=[rule])
    path = converted(source, tmp_path / "m.gguf", recipe)
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    stored = open_source(source)[1].layers[0].attention.wo_b
    tensor = tensors["blk.0.attn_output_b.weight"]
    if name not in ("F32", "BF16"):
        assert tensor.tensor_type.name in (name, "Q4_0", "Q8_0", "BF16")
    values = quants.dequantize(tensor.data, tensor.tensor_type).reshape(stored.rows, stored.cols)
    expected = decode(stored)
    error = np.linalg.norm(values - expected) / np.linalg.norm(expected)
    assert error <= {"Q2_K": 0.4, "Q3_K": 0.2}.get(name, 0.1)


def test_refusals(source: Path, tmp_path: Path) -> None:
    converted(source, tmp_path / "m.gguf", "lossless")
    with pytest.raises(UsageError, match="is there"):
        converted(source, tmp_path / "m.gguf", "lossless")
    with pytest.raises(UsageError, match="name of a part"):
        converted(source, tmp_path / "m-00001-of-00002.gguf", "lossless")
    (source / "tokenizer.json").rename(source / "away")
    try:
        (source / "tokenizer.json").write_text('{"model": {"vocab": {"a": 99999}, "merges": []}}')
        with pytest.raises(BadFileError, match="no byte-level BPE tokenizer"):
            converted(source, tmp_path / "n.gguf", "lossless")
    finally:
        (source / "away").replace(source / "tokenizer.json")


def test_fp8_beyond_bf16() -> None:
    codes = np.ones((128, 128), np.uint8)  # 2^-9 each
    tiny = Matrix(blocks.F8, 128, 128, codes, np.ones((1, 1), np.uint8))
    with pytest.raises(BadFileError, match="values that BF16 does not hold"):
        kept_rows(tiny, "layers.0.attn.wq_a.weight", Path("here"))
    small = Matrix(blocks.F8, 128, 128, codes, np.full((1, 1), 100, np.uint8))
    assert kept_rows(small, "x", Path("here")).shape == (128, 256)


def test_fp4_codes_are_only_moved() -> None:
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (16, 64), dtype=np.uint8)
    scale = rng.integers(100, 140, (16, 4), dtype=np.uint8)
    rows = mxfp4_rows(Matrix(blocks.FP4, 16, 128, data, scale)).reshape(16, 4, 17)
    codes = np.stack([data & 15, data >> 4], -1).reshape(16, 4, 32)
    assert np.array_equal(rows[:, :, 0], scale)
    assert np.array_equal(rows[:, :, 1:] & 15, codes[:, :, :16])
    assert np.array_equal(rows[:, :, 1:] >> 4, codes[:, :, 16:])


def test_names_are_those_of_mainline() -> None:
    assert (
        gguf_name("layers.7.attn.indexer.compressor.ape") == "blk.7.indexer_compressor_ape.weight"
    )
    assert gguf_name("layers.7.ffn.gate.bias") == "blk.7.exp_probs_b.bias"
    assert gguf_name("hc_head_fn") == "output_hc_fn.weight"
    with pytest.raises(KeyError):
        gguf_name("mtp.0.e_proj.weight")


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="needs llama-cpp-python")
@pytest.mark.parametrize("recipe", ["lossless", "q4"])
def test_llama_cpp_agrees(recipe: str, tmp_path: Path) -> None:
    from llama_cpp import Llama

    path = converted(embedded_model_path(), tmp_path / "m.gguf", recipe)
    text = (embedded_model_path() / "README.md").read_text("utf-8")
    ids = Engine.load(path, Setup(threads=1)).tokenizer.encode(text)[:300]
    model = Llama(str(path), n_ctx=512, n_batch=512, logits_all=True, verbose=False)
    model.eval(ids)
    ours, theirs = logits(path, ids), np.array(model.scores[: len(ids)])
    distance = np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(ours, axis=1)
    assert np.median(distance) < LLAMA_DISTANCE
    assert (ours.argmax(1) == theirs.argmax(1)).mean() > LLAMA_SAME_TOKEN
