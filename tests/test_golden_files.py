"""The golden models are what they claim to be, and the writers of test files write just that."""

import dataclasses
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf_writer import ALIASES, ANTIREZ, MAINLINE, OMITTED_KEYS, GgufOptions, write_gguf
from golden.names import hybrid_name, module_weights
from golden.presets import PRESETS, WIDE, Preset
from golden.torch_random import TorchRandom
from golden_files import (
    GOLDEN,
    GoldenModel,
    Naming,
    load_golden,
    random_model,
    write_model,
    write_stored,
)
from reference_blocks import f8, fp4
from safetensors import safe_open

from localv4.kernels.blocks import FORMATS, Q8_0

# Every row is a whole number of superblocks of 256.
KQUANT = Preset(
    "kquant",
    {
        **WIDE,
        "vocab_size": 300,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 3,
        "q_lora_rank": 256,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "num_hash_layers": 1,
        "compress_ratios": [0, 4, 128],
    },
    length=0,
    seed=1,
)
MATRIX_ROLES = (
    *("embedding", "head", "attention", "compressor", "indexer_q", "indexer_weights"),
    *("router", "gate_up", "down", "shared", "hc"),
)


def test_the_random_numbers_are_those_of_torch() -> None:
    # As drawn by torch.Generator().manual_seed(9).
    random = TorchRandom(9)
    normal = random.normal(20)
    expected = [-1.067394733428955, -1.574683666229248, 0.9683225750923157]
    assert normal[[0, 3, 19]].tolist() == expected
    assert random.normal(2).tolist() == [1.2812227010726929, -0.22957000136375427]
    assert random.uniform(2).tolist() == [0.938154399394989, 0.16506260633468628]
    assert random.permutations(1, 5)[0].tolist() == [2, 4, 3, 1, 0]
    assert random.integers(100, 3).tolist() == [57, 76, 92]


@pytest.mark.parametrize("name", PRESETS)
def test_a_golden_model_is_complete(name: str) -> None:
    model = load_golden(name)
    settings = model.preset.settings
    assert model.logits.shape == (model.preset.length, settings["vocab_size"])
    assert model.logits.dtype == np.float32
    assert len(model.input_ids) == model.preset.length
    assert model.config("transformers")["layer_types"] == model.preset.layer_types
    chosen = {key for key in model.oracle if key.endswith("_topk")}
    kinds = enumerate(model.preset.layer_types)
    assert chosen == {f"layer{i}_topk" for i, kind in kinds if kind.startswith("compressed")}
    report = json.loads((GOLDEN / name / "report.json").read_text(encoding="utf-8"))
    # Ten times the rounding error of float32 that transformers shows against itself.
    assert report["smallest_router_margin"] > 3e-5
    assert report["smallest_index_margin"] is None or report["smallest_index_margin"] > 3e-5
    assert max(report["prefill_vs_decode"], report["prefill_vs_chunks"]) < 2e-5


def test_the_head_of_the_oracle_follows_from_its_weights() -> None:
    model = load_golden("tiny300")
    hidden = model.oracle["hc_head"].astype(np.float64)
    hidden /= np.sqrt((hidden**2).mean(axis=-1, keepdims=True) + 1e-6)
    logits = (hidden * model.weights["norm.weight"]) @ model.weights["head.weight"].T
    assert np.abs(logits - model.logits[::16]).max() < 1e-5


@pytest.mark.parametrize("naming", ["official", "hybrid", "modules"])
@pytest.mark.parametrize("shards", [1, 2])
def test_float32_folders(tmp_path: Path, naming: Naming, shards: int) -> None:
    model = load_golden("odd")
    folder = write_model(model, tmp_path / "m", naming=naming, config="official", shards=shards)
    expected = dict(model.weights)
    if naming == "hybrid":
        expected = {hybrid_name(name): values for name, values in expected.items()}
    elif naming == "modules":
        expected = module_weights(expected)
    read = read_folder(folder)
    assert read.keys() == expected.keys()
    assert all(np.array_equal(read[name], expected[name]) for name in expected)
    assert json.loads((folder / "config.json").read_text())["compress_ratios"][:2] == [4, 0]


def test_an_index_names_the_file_of_each_tensor(tmp_path: Path) -> None:
    folder = write_model(load_golden("odd"), tmp_path, shards=3)
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert len(set(index["weight_map"].values())) == 3
    for name, file in index["weight_map"].items():
        with safe_open(folder / file, "numpy") as opened:
            assert name in opened.keys()  # noqa: SIM118


@pytest.mark.parametrize("name", ["wide", "edges"])
def test_official_storage_stands_for_the_weights(name: str, tmp_path: Path) -> None:
    model = load_golden(name)
    for tensor, stored in model.stored.items():
        raw = np.frombuffer(stored.data, np.uint8)
        if stored.dtype == "F8_E4M3":
            decoded = f8(raw.reshape(stored.shape), scale_of(model, tensor))
        elif stored.dtype == "I8":
            decoded = fp4(raw.reshape(stored.shape), scale_of(model, tensor))
        else:
            continue
        assert np.array_equal(decoded, model.weights[tensor]), tensor
    folder = write_stored(model, tmp_path)
    assert (folder / "model-00002-of-00002.safetensors").exists()
    types = {stored.dtype for stored in model.stored.values()}
    assert types == {"F8_E4M3", "F8_E8M0", "I8", "BF16", "F32", "I64"}


def test_plain_gguf(tmp_path: Path) -> None:
    model = load_golden("tiny300")
    path, exact = write_gguf(model, tmp_path / "m.gguf")
    assert exact.keys() == model.weights.keys()
    assert all(np.array_equal(exact[name], model.weights[name]) for name in exact)
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["blk.0.attn_kv.weight"].shape.tolist() == [64, 32]
    assert tensors["blk.1.ffn_gate_exps.weight"].shape.tolist() == [64, 32, 8]
    assert tensors["blk.0.ffn_gate_tid2eid.weight"].tensor_type == Type.I32
    down = model.weights["layers.1.ffn.experts.5.w2.weight"]
    assert np.array_equal(tensors["blk.1.ffn_down_exps.weight"].data[5], down)
    ratios = reader.fields["deepseek4.attention.compress_ratios"].contents()
    assert ratios == [0, 0, 4, 128, 4, 128, 4, 0]
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == 320


@pytest.mark.parametrize("mix", [MAINLINE, ANTIREZ])
def test_published_mixes(mix: dict[str, Type], tmp_path: Path) -> None:
    path, exact = write_gguf(random_model(KQUANT), tmp_path / "m.gguf", GgufOptions(mix))
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert tensors["blk.2.ffn_up_exps.weight"].tensor_type == mix["gate_up"]
    for part, leaf in (("w1", "gate"), ("w2", "down")):
        tensor = tensors[f"blk.2.ffn_{leaf}_exps.weight"]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(values[3], exact[f"layers.2.ffn.experts.3.{part}.weight"])


@pytest.mark.parametrize("name", ("F16", "BF16", *FORMATS[Q8_0:]))
def test_every_block_type(name: str, tmp_path: Path) -> None:
    model = random_model(KQUANT)
    kinds = dict.fromkeys(MATRIX_ROLES, Type[name])
    path, exact = write_gguf(model, tmp_path / "m.gguf", GgufOptions(kinds))
    written = {tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors}
    assert written == {Type[name], Type.F32, Type.I32}
    for key, values in exact.items():
        assert values.shape == model.weights[key].shape
        # Random blocks keep the spread, so that such a model still computes something sensible.
        assert np.isfinite(values).all()
        assert 0.5 < (values.std() + 1e-9) / (model.weights[key].std() + 1e-9) < 2


def test_rows_that_are_no_whole_blocks_stay_float32(tmp_path: Path) -> None:
    options = GgufOptions({"attention": Type.Q8_0})
    path, _ = write_gguf(load_golden("tiny300"), tmp_path / "m.gguf", options)
    kinds = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.attn_q_a.weight"] == Type.Q8_0
    assert kinds["blk.0.attn_q_b.weight"] == Type.F32


def test_split_files(tmp_path: Path) -> None:
    first, _ = write_gguf(load_golden("odd"), tmp_path / "m.gguf", GgufOptions(parts=3))
    assert first.name == "m-00001-of-00003.gguf"
    parts = sorted(tmp_path.glob("*.gguf"))
    readers = [gguf.GGUFReader(part) for part in parts]
    assert [reader.fields["split.no"].contents() for reader in readers] == [0, 1, 2]
    total = sum(len(reader.tensors) for reader in readers)
    assert readers[0].fields["split.tensors.count"].contents() == total
    assert "deepseek4.block_count" in readers[0].fields


def test_other_names_and_missing_keys(tmp_path: Path) -> None:
    options = GgufOptions(aliases=True, omitted_keys=OMITTED_KEYS)
    path, exact = write_gguf(load_golden("tiny300"), tmp_path / "m.gguf", options)
    reader = gguf.GGUFReader(path)
    names = {tensor.name for tensor in reader.tensors}
    assert {"hc_head_fn", "blk.2.indexer.compress_ape", "blk.0.attn_kv_latent.weight"} <= names
    assert not any(name.split(".", 2)[-1] in ALIASES or name in ALIASES for name in names)
    assert not any(f"deepseek4.{key}" in reader.fields for key in OMITTED_KEYS)
    assert exact.keys() == load_golden("tiny300").weights.keys()


def test_a_float32_twin_of_a_quantised_file(tmp_path: Path) -> None:
    model = load_golden("tiny300")
    _, exact = write_gguf(model, tmp_path / "m.gguf", GgufOptions(MAINLINE))
    twin = dataclasses.replace(model, weights=exact)
    read = read_folder(write_model(twin, tmp_path / "twin"))
    name = "layers.4.ffn.experts.7.w3.weight"
    assert np.array_equal(read[name], exact[name])
    assert not np.array_equal(read[name], model.weights[name])


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of the safetensors files of a folder, read by the reference package."""
    read: dict[str, np.ndarray] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "numpy") as opened:
            read |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return read


def scale_of(model: GoldenModel, tensor: str) -> np.ndarray:
    """Scale codes of an FP8 or FP4 matrix."""
    scale = model.stored[tensor.removesuffix(".weight") + ".scale"]
    return np.frombuffer(scale.data, np.uint8).reshape(scale.shape)
