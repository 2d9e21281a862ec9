"""Tests of what models cost: from configurations and headers, compared with real weights."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from localv4.kernels.packed import MX4, expert_bytes
from localv4.library.installed import embedded_model_path
from localv4.library.registry import load_registry
from localv4.model import traffic
from localv4.model.config import ModelConfig
from localv4.model.config_json import read_config
from localv4.model.loading import read_model_config, read_names, read_weights
from localv4.model.matrix import Floats
from localv4.model.packing import PackedMatrix, expert_form, pack_dense, packed_bytes_of
from localv4.model.weights import Expert
from localv4.planning import network
from localv4.planning.header_facts import facts_of_checkpoint
from localv4.planning.model_facts import ModelFacts, facts_of_recipe
from localv4.planning.recipes import FORMATS_BY_NAME, load_recipes, matrix_bytes
from localv4.storage import Checkpoint, open_checkpoint
from quant.recipe import load_recipe
from quant.tensor_class import TensorClass

TENSOR_CLASSES = {
    "experts_gate_up": [TensorClass.GATE_UP],
    "experts_down": [TensorClass.DOWN],
    "shared_gate_up": [TensorClass.SHARED_GATE_UP],
    "shared_down": [TensorClass.SHARED_DOWN],
    "attention_q": [TensorClass.ATTENTION_Q],
    "attention_o": [TensorClass.ATTENTION_O],
    "attention_kv": [TensorClass.ATTENTION_KV],
    "indexer": [TensorClass.INDEXER],
    "index_weights": [TensorClass.INDEXER],
    "compressor": [TensorClass.COMPRESSOR],
    "router": [TensorClass.ROUTER],
    "head": [TensorClass.HEAD],
}
NETWORKS = Path(network.__file__).parent / "networks"


def config_of(name: str) -> ModelConfig:
    return read_config(NETWORKS / f"{name}.json")


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_weights_of_a_configuration_are_as_many_as_published(name: str) -> None:
    published = load_registry().models[f"deepseek-v4-{name}"]
    assert network.parameters(config_of(name)) == published.params


def test_lossless_flash_has_the_published_sizes() -> None:
    facts = facts_of_recipe("v4-flash", config_of("flash"), load_recipes().by_name["lossless"])
    assert facts.all_expert_bytes == 147_169_738_752
    assert facts.expert_bytes == (expert_bytes(MX4, 4096, 2048),) * 43
    # the published backbone has 156.016 GB; scales of FP8 and norms take more in memory
    assert facts.file_bytes == pytest.approx(156.016e9, rel=2e-5)
    assert facts.head_bytes == 129_280 * 4096 * 2
    assert facts.cycle_bytes == 43 * 6 * 13_369_344


def test_every_recipe_reads_no_more_than_a_more_precise_one() -> None:
    config = config_of("flash")
    facts = [facts_of_recipe("f", config, recipe) for recipe in load_recipes().by_name.values()]
    read = [one.weight_bytes_per_token for one in facts]
    assert read == sorted(read, reverse=True)
    assert load_recipes().default.name == "q4"


def test_sizes_of_formats() -> None:
    assert matrix_bytes("MX4", 16, 128) == 1088
    assert matrix_bytes("F8", 128, 128) == 128 * 128 + 4
    assert matrix_bytes("B16", 3, 32) == 16 * 32 * 2  # the last group is filled up
    assert matrix_bytes("F32", 3, 5) == 60
    assert matrix_bytes("Q3", 64, 256) == 64 * 256 * 3.5 / 8


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(embedded_model_path())


@pytest.fixture(scope="module")
def tiny(checkpoint: Checkpoint) -> ModelFacts:
    return facts_of_checkpoint("tiny-v4", "", checkpoint)


def test_headers_tell_what_packing_takes(checkpoint: Checkpoint, tiny: ModelFacts) -> None:
    table = read_names(checkpoint)
    config = read_model_config(checkpoint, table)
    packed = pack_dense(read_weights(checkpoint, table, config), 1)
    read = traffic.weight_bytes(packed, config, packs_experts=True)
    read["routed experts"] = sum(
        config.experts_per_token * sum(map(_record_bytes, layer.experts)) // config.n_experts
        for layer in packed.layers
    )
    found = {name: 0 for name in read}
    for part in tiny.parts:
        found[part.component] += part.read
    found["routed experts"] = tiny.cycle_bytes
    for name in set(read) - {"embedding row"}:
        assert found[name] == pytest.approx(read[name], rel=0.01), name
    matrices = sum(p.resident for p in tiny.parts if p.format in FORMATS_BY_NAME)
    scales = sum(scales.nbytes for scales in _f8_scales(packed))
    assert matrices == packed_bytes_of(packed) + scales > scales > 0


def _f8_scales(node: object) -> Iterator[Floats]:
    """Yield the scales of all FP8 matrices, which `packed_bytes_of` leaves out."""
    if isinstance(node, PackedMatrix):
        if node.scales is not None:
            yield node.scales
    elif isinstance(node, tuple):
        for item in node:
            yield from _f8_scales(item)
    elif is_dataclass(node):
        for item in fields(node):
            yield from _f8_scales(getattr(node, item.name))


def _record_bytes(expert: Expert) -> int:
    form = expert_form(expert)
    assert form is not None
    return form.nbytes


def test_headers_and_configuration_agree(tiny: ModelFacts) -> None:
    derived = facts_of_recipe("tiny-v4", tiny.config, load_recipes().by_name["lossless"])
    assert derived.expert_bytes == tiny.expert_bytes
    assert derived.expert_format == tiny.expert_format == "MX4"
    assert derived.dense_bytes == tiny.dense_bytes
    assert derived.head_bytes == tiny.head_bytes
    assert derived.weight_bytes_per_token == tiny.weight_bytes_per_token
    assert not tiny.is_packed and derived.is_packed


def test_bytes_by_format_are_all_bytes_that_a_token_reads(tiny: ModelFacts) -> None:
    assert sum(tiny.read_by_format().values()) == tiny.weight_bytes_per_token


def test_multiplications_are_those_of_the_weights(checkpoint: Checkpoint) -> None:
    table = read_names(checkpoint)
    config = read_model_config(checkpoint, table)
    weights = read_weights(checkpoint, table, config)
    assert network.multiply_adds(config) == traffic.multiplications(weights, config)


@pytest.mark.parametrize("name", ["lossless", "q8", "q4", "q3", "q2"])
def test_sizes_of_recipes_are_those_that_quantize_makes(name: str) -> None:
    config = config_of("flash")
    mine, theirs = load_recipes().by_name[name], load_recipe(name)
    for weight in network.network_weights(config):
        kinds = TENSOR_CLASSES.get(weight.role)
        if kinds is None:
            continue
        for kind in kinds:
            rule = theirs.rule_for(kind, weight.layer, config.n_layers)
            found = mine.format_of(weight.role, weight.layer, config.n_layers)
            kept = load_recipes().by_name["lossless"].format_of(weight.role)
            assert found == (rule.formats[0] if rule else kept), (weight, kind)
