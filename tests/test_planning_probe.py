"""Tests of what runs kernels to measure them, and of what a run is told to expect."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from terminal import needs_jit

from localv4 import paths
from localv4.errors import DoesNotFitError
from localv4.kernels.compiler import compile_kernels
from localv4.kernels.team import Team
from localv4.library.installed import embedded_model_path
from localv4.model.config import LayerKind, ModelConfig
from localv4.model.config_json import read_config
from localv4.model.fast import FastTransformer
from localv4.model.packing import families
from localv4.model.state import State
from localv4.planning import expectation, history, kernel_probe
from localv4.planning.assessment import assess
from localv4.planning.expectation import expect
from localv4.planning.filled_weights import filled_weights
from localv4.planning.kernel_probe import measure_kernels
from localv4.planning.machine import DiskFacts, Machine
from localv4.planning.memory import Memory
from localv4.planning.model_facts import facts_of_recipe
from localv4.planning.plan import GIB
from localv4.planning.recipes import load_recipes
from localv4.planning.subject import flash_network

LOSSLESS = load_recipes().by_name["lossless"]


def tiny() -> ModelConfig:
    return read_config(embedded_model_path() / "config.json")


@needs_jit
def test_filled_weights_are_weights_like_any_others() -> None:
    config = kernel_probe._pair_of_layers(tiny())
    assert config.layer_kinds == (LayerKind.CSA, LayerKind.HCA) and config.ratios == (4, 128)
    weights = filled_weights(config, LOSSLESS)
    compile_kernels(families(weights))
    network = FastTransformer(config, weights, Team(1))
    vectors = network.forward(np.arange(20, dtype=np.int64), State(config, network.slack))
    network.close()
    assert np.isfinite(vectors).all() and np.abs(vectors).max() > 1e-6


@needs_jit
def test_kernels_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_probe, "ROOF_BYTES", 1 << 22)
    monkeypatch.setattr(kernel_probe, "PROMPT_SECONDS", 0.0)
    found = measure_kernels(tiny(), LOSSLESS, 1)
    assert 0 < found.decode < 2 and 0 < found.prefill < 2
    assert 0 <= found.layer_s < 0.1


def test_kernels_are_not_measured_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_probe, "read_memory", lambda: Memory(GIB, GIB))
    with pytest.raises(DoesNotFitError, match="measuring kernels takes"):
        measure_kernels(flash_network(), LOSSLESS, 1)


def test_a_run_is_told_what_to_expect(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(paths, "state_dir", lambda: tmp_path)
    machine = Machine(Memory(64 * GIB, 60 * GIB), 8, read_bytes_s=90e9, disk=DiskFacts(7e9))
    facts = facts_of_recipe("m", flash_network(), load_recipes().default)
    plan = assess(facts, machine).plan
    assert plan is not None
    for unknown in (replace(machine, read_bytes_s=None), replace(machine, disk=None)):
        monkeypatch.setattr(expectation, "known_machine", lambda _place, known=unknown: known)
        assert expect("m", facts, plan, tmp_path) is None
    monkeypatch.setattr(expectation, "known_machine", lambda _place: machine)
    first = expect("m", facts, plan, tmp_path)
    assert first is not None and first.correction == 1.0
    history.record_run("m", plan, first, 0.5 * first.decode.likely, 100)
    second = expect("m", facts, plan, tmp_path)
    assert second is not None and second.decode.likely == pytest.approx(
        0.5**0.5 * first.decode.likely
    )
