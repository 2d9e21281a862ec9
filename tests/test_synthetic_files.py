"""Synthetic models as GGUF files and in official storage: as other programs write them."""

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType, quants
from networks import logits, open_network
from safetensors import safe_open
from test_synthetic_model import SMALL

from localv4.model.config import ModelConfig
from localv4.model.loading import read_model_config
from localv4.model.names import official_names
from localv4.storage import open_checkpoint
from localv4.text.tokenizer import Tokenizer
from quant.packed_writer import PAGE

sys.path.append(str(Path(__file__).parents[1] / "tools"))

import make_synthetic_model
import synthetic_gguf
import synthetic_official
from synthetic_ggml import GGML_BLOCKS, TYPE_NUMBERS
from synthetic_network import NETWORKS
from synthetic_values import Noise, block_parts

NETWORK = replace(SMALL, inner=256, q_rank=256, o_rank=256)
IDS = np.random.default_rng(0).integers(0, 512, 150).tolist()
MIXES = [
    {},
    {"gate_up": "IQ2_XXS", "down": "Q2_K", "compressor": "F32"},
    dict.fromkeys(("gate_up", "down", "attention", "shared", "indexer", "head"), "Q4_K"),
    {"gate_up": "Q4_0", "down": "Q6_K", "embedding": "BF16", "head": "Q6_K"},
]


def write_gguf(path: Path, changes: dict[str, str], jobs: int = 2) -> Path:
    types = synthetic_gguf.DEFAULT_TYPES | changes
    synthetic_gguf.write_gguf(NETWORK, types, path, 1, jobs, lambda name, nbytes: None)
    return path


def write_official(folder: Path, jobs: int = 2) -> Path:
    synthetic_official.write_official(NETWORK, folder, 1, jobs, lambda name, nbytes: None)
    return folder


def config_of(path: Path) -> ModelConfig:
    with open_checkpoint(path) as checkpoint:
        return read_model_config(checkpoint, official_names(checkpoint))


def assert_sane(path: Path) -> None:
    rows = logits(open_network(path), IDS)
    assert np.isfinite(rows).all() and 0.5 < rows.std() < 2
    assert len(set(rows.argmax(axis=1))) > 50


@pytest.mark.parametrize("changes", MIXES)
def test_gguf(changes: dict[str, str], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", changes)
    assert_sane(path)


def test_official_storage(tmp_path: Path) -> None:
    assert_sane(write_official(tmp_path))
    with safe_open(tmp_path / "model-00002-of-00005.safetensors", framework="numpy") as file:
        assert file.get_tensor("layers.1.ffn.experts.3.w2.weight").shape == (256, 128)


def test_both_describe_the_same_network(tmp_path: Path) -> None:
    official = config_of(write_official(tmp_path / "official"))
    gguf = config_of(write_gguf(tmp_path / "m.gguf", {}))
    assert official == replace(gguf, hc_eps=official.hc_eps, rms_eps=official.rms_eps)
    assert gguf.hc_eps == pytest.approx(official.hc_eps)
    assert gguf.ratios == NETWORK.ratios and gguf.hashed == (True, False, False, False)


def test_the_gguf_package_reads_the_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"gate_up": "IQ2_XXS", "down": "Q2_K"})
    reader = GGUFReader(path)
    names = {tensor.name for tensor in reader.tensors}
    assert {"token_embd.weight", "blk.3.exp_probs_b.bias", "blk.0.ffn_gate_tid2eid.weight"} <= names
    for tensor in reader.tensors:
        assert tensor.data_offset % synthetic_gguf.ALIGNMENT == 0
        if tensor.name == "blk.2.ffn_down_exps.weight":
            experts = quants.dequantize(tensor.data, tensor.tensor_type)
            assert experts.shape == (8, 256, 256)
            assert 2 < len({expert.tobytes() for expert in experts}) <= 8
    kinds = reader.fields["tokenizer.ggml.token_type"]
    assert kinds.types == [GGUFValueType.ARRAY, GGUFValueType.INT32]  # llama.cpp refuses others
    assert len(kinds.contents()) == NETWORK.vocab


def test_threads_change_no_byte(tmp_path: Path) -> None:
    one = write_gguf(tmp_path / "one.gguf", {}, jobs=1).read_bytes()
    assert write_gguf(tmp_path / "three.gguf", {}, jobs=3).read_bytes() == one
    write_official(tmp_path / "one", jobs=1)
    write_official(tmp_path / "three", jobs=3)
    for file in (tmp_path / "one").iterdir():
        assert (tmp_path / "three" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", GGML_BLOCKS)
def test_blocks_have_the_spread_that_was_asked_for(name: str) -> None:
    kind, ggml = GGML_BLOCKS[name], GGMLQuantizationType[name]
    assert GGML_QUANT_SIZES[ggml] == (kind.values, kind.nbytes)
    assert TYPE_NUMBERS[name] == ggml
    rng = np.random.default_rng(0)
    parts = list(block_parts(kind, Noise(5), rng, 1 << 18, 0.02))
    values = quants.dequantize(np.concatenate(parts).reshape(-1, kind.nbytes), ggml)
    assert values.size == 1 << 18 and np.isfinite(values).all()
    assert 0.7 < values.std() / 0.02 < 1.5 and abs(values.mean()) < 0.2 * values.std()


def tokenizers(folder: Path) -> Iterator[Tokenizer]:
    path = write_gguf(folder / "m.gguf", {})
    with open_checkpoint(path) as checkpoint:
        yield Tokenizer.from_gguf(checkpoint.metadata, path)
    yield Tokenizer.from_file(write_official(folder / "official") / "tokenizer.json")


def test_every_text_has_tokens(tmp_path: Path) -> None:
    text = 'Ein Haus am "See"\n\u4e00 \U0001f600'
    for tokenizer in tokenizers(tmp_path):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and max(ids) < NETWORK.vocab
        assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "flash", NETWORK)
    for arguments, place in (
        ("--format gguf --ratios 128,4 --types down=Q8_0", "m.gguf"),
        ("--format official --layers 2 --hash 2", "official"),
    ):
        target = tmp_path / place
        monkeypatch.setattr(sys, "argv", ["", str(target), *arguments.split()])
        make_synthetic_model.main()
        config = config_of(target)
        assert config.ratios == ((128, 4) if place == "m.gguf" else (0, 4))
        assert sum(config.hashed) == (1 if place == "m.gguf" else 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--format gguf --types down=Q9", "cannot have the type Q9"),
        ("--format gguf --types experts=Q4_0", "the roles are embedding"),
        ("--format official --types head=F32", "the roles are none"),
        ("--ratios 5", "ratios are 0, 4 and 128"),
        ("--vocab 10", "512 tokens or more"),
        ("--types experts=F8", "experts have no record F8"),
    ],
)
def test_what_cannot_be_written_is_named(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NETWORKS, "flash", NETWORK)
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "out"), *arguments.split()])
    with pytest.raises(SystemExit, match=message):
        make_synthetic_model.main()


def test_an_expert_of_flash_fills_whole_pages() -> None:
    flash = NETWORKS["flash"]
    nbytes = math.prod((3, flash.hidden, flash.inner)) * 17 // 32
    assert nbytes == 13_369_344 and nbytes % PAGE == 0
