"""The same weights give the same logits from every kind of file."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf_writer import ANTIREZ, MAINLINE, OMITTED_KEYS, ROLES, GgufOptions, write_gguf
from golden.presets import WIDE, Preset
from golden_files import GoldenModel, load_golden, random_model, write_model, write_stored
from networks import logits, open_network

from localv4.errors import BadFileError

TOLERANCE = 1e-4

# All matrices that a file may quantise have rows of whole superblocks of 256 values.
SUPERBLOCKS = Preset(
    "superblocks",
    {
        **WIDE,
        "vocab_size": 300,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 4,
        "q_lora_rank": 256,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "num_hash_layers": 1,
        "compress_ratios": [0, 4, 128, 4],
    },
    length=0,
    seed=1,
)
IDS = np.random.default_rng(0).integers(0, 300, 150).tolist()
EVERYTHING = set(ROLES.values())
TYPES = [
    *(Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.MXFP4, Type.IQ4_NL),
    *(Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.IQ4_XS, Type.IQ2_XXS),
]


def assert_equals_float_twin(model: GoldenModel, folder: Path, options: GgufOptions) -> None:
    """A GGUF file and a float32 safetensors folder with the same values give the same logits."""
    path, exact = write_gguf(model, folder / "model.gguf", options)
    twin = replace(model, weights=model.weights | exact)
    expected = logits(open_network(write_model(twin, folder / "twin")), IDS)
    assert np.isfinite(expected).all() and expected.std() > 0.1
    actual = logits(open_network(path), IDS)
    assert np.abs(actual - expected).max() <= TOLERANCE


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_every_block_type_everywhere(kind: Type, tmp_path: Path) -> None:
    types = dict.fromkeys(EVERYTHING, kind)
    assert_equals_float_twin(random_model(SUPERBLOCKS), tmp_path, GgufOptions(types))


@pytest.mark.parametrize("mix", [MAINLINE, ANTIREZ], ids=["mainline", "antirez"])
def test_published_type_mixes(mix: dict[str, Type], tmp_path: Path) -> None:
    assert_equals_float_twin(random_model(SUPERBLOCKS), tmp_path, GgufOptions(mix))


@pytest.mark.parametrize("parts", [2, 5])
def test_split_files(parts: int, tmp_path: Path) -> None:
    assert_equals_float_twin(
        random_model(SUPERBLOCKS), tmp_path, GgufOptions(MAINLINE, parts=parts)
    )


def test_old_names_and_missing_keys(tmp_path: Path) -> None:
    options = GgufOptions(MAINLINE, aliases=True, omitted_keys=OMITTED_KEYS)
    assert_equals_float_twin(random_model(SUPERBLOCKS), tmp_path, options)


@pytest.mark.parametrize("name", ["tiny300", "nohash", "wide"])
def test_gguf_equals_the_oracle(name: str, tmp_path: Path) -> None:
    golden = load_golden(name)
    path, _ = write_gguf(golden, tmp_path / "model.gguf")
    actual = logits(open_network(path), golden.input_ids)
    assert np.abs(actual - golden.logits).max() <= TOLERANCE


@pytest.mark.parametrize("shift", [1, 2, 3, 5])
def test_weights_at_odd_addresses(shift: int, tmp_path: Path) -> None:
    golden = load_golden("wide")
    expected = logits(open_network(write_stored(golden, tmp_path / "even")), IDS)
    folder = write_stored(golden, tmp_path / "odd", shards=1)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end].rstrip() + b" " * shift
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
    assert np.array_equal(logits(open_network(folder), IDS), expected)


def test_two_names_for_one_tensor_are_refused(tmp_path: Path) -> None:
    golden = load_golden("tiny300")
    weights = dict(golden.weights)
    weights["model.layers.0.attn_norm.weight"] = weights["layers.0.attn_norm.weight"]
    folder = write_model(replace(golden, weights=weights), tmp_path, shards=1)
    with pytest.raises(BadFileError, match="both mean"):
        open_network(folder)
