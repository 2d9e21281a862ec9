"""Tests of what runs kernels to measure them."""

import numpy as np
import pytest
from terminal import needs_jit

from localv4.engine.memory import MemoryOptions, row_format
from localv4.errors import DoesNotFitError
from localv4.kernels.compiler import compile_kernels
from localv4.kernels.team import Team
from localv4.library.installed import embedded_model_path
from localv4.model.config import LayerKind, ModelConfig
from localv4.model.config_json import read_config
from localv4.model.fast import FastTransformer
from localv4.model.packing import families
from localv4.model.state import State
from localv4.planning import kernel_probe
from localv4.planning.filled_weights import filled_weights
from localv4.planning.kernel_probe import measure_kernels
from localv4.planning.memory import Memory
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
    formats = []

    class Watched(FastTransformer):
        """Tells which rows it has."""

        def new_state(self) -> State:
            formats.append(self.rows)
            return super().new_state()

    monkeypatch.setattr(kernel_probe, "FastTransformer", Watched)
    found = measure_kernels(tiny(), LOSSLESS, 1)
    assert set(formats) == {row_format(MemoryOptions())}
    assert 0 < found.decode < 2 and 0 < found.prefill < 2
    assert 0 <= found.layer_s < 0.1


def test_kernels_are_not_measured_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_probe, "read_memory", lambda: Memory(GIB, GIB))
    with pytest.raises(DoesNotFitError, match="measuring kernels takes"):
        measure_kernels(flash_network(), LOSSLESS, 1)
