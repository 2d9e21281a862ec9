"""Configurations: the released models, both key styles, GGUF metadata, and everything wrong."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_writer import OMITTED_KEYS, GgufOptions, write_gguf
from golden.presets import PRESETS
from golden_files import load_golden, write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import open_network

from localv4.errors import BadFileError, LocalV4Error, NotFoundError
from localv4.model.config import LayerKind, ModelConfig, Yarn
from localv4.model.config_gguf import config_from_gguf
from localv4.model.config_json import config_from_json, read_config
from localv4.model.names import official_names
from localv4.model.rotary import compress_rotary, main_rotary
from localv4.model.weights import load_weights
from localv4.storage import open_checkpoint

PATH = Path("config.json")
FLASH: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "vocab_size": 129280,
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "sliding_window": 128,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "max_position_embeddings": 1048576,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "n_routed_experts": 256,
    "num_experts_per_tok": 6,
    "n_shared_experts": 1,
    "moe_intermediate_size": 2048,
    "num_hash_layers": 3,
    "scoring_func": "sqrtsoftplus",
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
PRO = FLASH | {
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "o_groups": 16,
    "compress_ratios": [128, 128, *[4, 128] * 29, 4, 0],
    "index_topk": 1024,
    "n_routed_experts": 384,
    "moe_intermediate_size": 3072,
    "routed_scaling_factor": 2.5,
}


def census(config: ModelConfig) -> list[int]:
    """Number of sliding, CSA and HCA layers."""
    kinds = (LayerKind.SLIDING, LayerKind.CSA, LayerKind.HCA)
    return [config.layer_kinds.count(kind) for kind in kinds]


def test_flash_and_pro() -> None:
    flash, pro = config_from_json(FLASH, PATH), config_from_json(PRO, PATH)
    assert (flash.n_layers, census(flash)) == (43, [2, 21, 20])
    assert (pro.n_layers, census(pro)) == (61, [0, 30, 31])
    assert flash.hashed == (True,) * 3 + (False,) * 40
    assert flash.yarn == Yarn(16, 65536, 32, 1)


def test_the_frequencies_of_flash() -> None:
    table = compress_rotary(config_from_json(FLASH, PATH)).frequencies
    expected = {0: 1, 1: 0.687656, 4: 0.223607, 16: 0.002265625, 24: 1.953125e-05, 31: 5.68053e-07}
    for pair, value in expected.items():
        assert table[pair] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("name", [name for name, p in PRESETS.items() if p.rates == (4, 128)])
def test_both_key_styles_mean_the_same(name: str) -> None:
    golden = load_golden(name)
    old = config_from_json(golden.config("official"), PATH)
    new = config_from_json(golden.config("transformers"), PATH)
    assert old == new


@pytest.mark.parametrize("omitted", [(), OMITTED_KEYS])
def test_gguf_metadata_means_the_same(omitted: tuple[str, ...], tmp_path: Path) -> None:
    golden = load_golden("tiny300")
    path, _ = write_gguf(golden, tmp_path / "m.gguf", GgufOptions(omitted_keys=omitted))
    expected = config_from_json(golden.config("official"), PATH)
    actual = open_network(path).config
    for field in ModelConfig.__dataclass_fields__:
        assert getattr(actual, field) == pytest.approx(getattr(expected, field)), field


def yarn(**changes: float) -> dict[str, Any]:
    """A change of the interpolation."""
    return {"rope_scaling": FLASH["rope_scaling"] | changes}


def rotary_part(factor: float) -> dict[str, Any]:
    """A change to the newer way to give the rotated channels."""
    return {"qk_rope_head_dim": None, "partial_rotary_factor": factor}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"model_type": "deepseek_v41"}, "deepseek_v41"),
        ({"scoring_func": "softmax"}, "scoring_func 'softmax'"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": 1 << 40}, "hidden_size is"),
        ({"num_hidden_layers": 10**9}, "layer kinds for"),
        ({"compress_ratios": [0] * 5000}, "not a list of at most"),
        ({"compress_ratios": [0, 0, 8]}, "compress_ratios holds 8"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling type 'linear'"),
        ({"rope_scaling": 3}, "rope_scaling is not an object"),
        ({"o_groups": 7}, "o_groups 7 does not divide"),
        ({"qk_rope_head_dim": 63}, "is odd"),
        ({"qk_rope_head_dim": 600}, "rope dimension is 600"),
        ({"num_experts_per_tok": 300}, "experts per token is 300"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"eos_token_id": 129280}, "eos_token_id is 129280"),
        ({"rope_theta": 10**400}, "rope_theta is too large"),
        ({"compress_rope_theta": 1}, "compress_rope_theta is 1.0"),
        ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor is nan"),
        ({"routed_scaling_factor": 1e308}, "routed_scaling_factor is 1e"),
        ({"swiglu_limit": float("inf")}, "swiglu_limit is inf"),
        (yarn(factor=0), "YaRN factor is 0"),
        (yarn(factor=float("nan")), "YaRN factor is nan"),
        (yarn(original_max_position_embeddings=0), "YaRN original context is 0"),
        (yarn(beta_fast=0), "YaRN beta_fast is 0"),
        (yarn(beta_slow=float("inf")), "YaRN beta_slow is inf"),
        (rotary_part(float("inf")), "partial_rotary_factor is inf"),
        (rotary_part(1e308), "partial_rotary_factor is 1e"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadFileError, match=message):
        config_from_json(FLASH | change, PATH)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"', "[" * 100000, "\xff"])
def test_files_that_are_no_json_object(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(BadFileError):
        read_config(path)


def test_a_missing_or_huge_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"config\.json"):
        read_config(tmp_path / "config.json")
    path = tmp_path / "config.json"
    path.write_bytes(b" " * (5 << 20))
    with pytest.raises(BadFileError, match="larger than"):
        read_config(path)


STRANGE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(0, 600),
    st.floats(),
    st.just(10**400),
    st.text(max_size=5),
    st.lists(st.integers(-3, 200), max_size=12),
    st.lists(st.text(max_size=4), max_size=9),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid small model."""
    return write_model(load_golden("tiny300"), tmp_path_factory.mktemp("tiny"), shards=1)


@settings(max_examples=2000, deadline=None)
@given(data=st.data())
def test_any_changed_config_loads_or_is_refused(tiny_folder: Path, data: st.DataObject) -> None:
    style = data.draw(st.sampled_from(["official", "transformers"]))
    values = copy.deepcopy(load_golden("tiny300").config(style))
    for _ in range(data.draw(st.integers(1, 3))):
        target: dict[str, Any] = values
        key = data.draw(st.sampled_from(sorted(target)))
        while isinstance(target.get(key), dict) and target[key] and data.draw(st.booleans()):
            target = target[key]
            key = data.draw(st.sampled_from(sorted(target)))
        target[key] = data.draw(STRANGE)
    assert_loads_or_is_refused(tiny_folder, values)


def assert_loads_or_is_refused(folder: Path, values: Mapping[str, Any]) -> None:
    """Nothing but a LocalV4Error with exit code 5 may come out."""
    with open_checkpoint(folder) as checkpoint:
        try:
            config = config_from_json(values, PATH)
            load_weights(checkpoint, official_names(checkpoint), config)
            assert_is_finite(config)
        except LocalV4Error as error:
            assert error.exit_code == 5
            assert "\n" not in error.message


def assert_is_finite(config: ModelConfig) -> None:
    """What is computed from the numbers of a valid configuration overflows nowhere."""
    for rotary in (main_rotary(config), compress_rotary(config)):
        assert np.isfinite(rotary.frequencies).all()
    assert np.isfinite(np.float32(config.routed_scaling))


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as GGUF."""
    path, _ = write_gguf(load_golden("tiny300"), tmp_path_factory.mktemp("tiny") / "m.gguf")
    return path


@settings(max_examples=2000, deadline=None)
@given(data=st.data())
def test_any_changed_metadata_loads_or_is_refused(tiny_gguf: Path, data: st.DataObject) -> None:
    with open_checkpoint(tiny_gguf) as checkpoint:
        metadata = dict(checkpoint.metadata)
        names = sorted(name for name in metadata if "tokenizer" not in name)
        for _ in range(data.draw(st.integers(1, 3))):
            metadata[data.draw(st.sampled_from(names))] = data.draw(STRANGE)
        table = official_names(checkpoint)
        try:
            config = config_from_gguf(metadata, table, tiny_gguf)
            load_weights(checkpoint, table, config)
            assert_is_finite(config)
        except LocalV4Error as error:
            assert error.exit_code == 5
            assert "\n" not in error.message


def test_the_embedded_model_says_what_it_is() -> None:
    folder = Path(__file__).parent.parent / "localv4" / "embedded" / "tiny-v4"
    config = read_config(folder / "config.json")
    assert (config.n_layers, config.hidden_size, config.yarn) == (8, 256, None)
    assert json.loads((folder / "config.json").read_text())["expert_dtype"] == "fp4"
