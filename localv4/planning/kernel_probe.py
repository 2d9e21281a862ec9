"""What the kernels make of this machine: layers of true dimensions, run for a second."""

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import numpy as np

from localv4.errors import DoesNotFitError
from localv4.kernels.compiler import compile_kernels
from localv4.kernels.team import Team
from localv4.model.config import LayerKind, ModelConfig
from localv4.model.fast import FastTransformer
from localv4.model.packing import families
from localv4.model.state import State
from localv4.planning.filled_weights import DISTINCT_EXPERTS, filled_weights
from localv4.planning.machine import KernelShares
from localv4.planning.memory import read_memory
from localv4.planning.model_facts import facts_of_recipe
from localv4.planning.network import multiply_adds
from localv4.planning.recipes import Recipe
from localv4.planning.roofs import RoofProbe

DECODED_TOKENS = 24
PROMPT_TOKENS = 480
VOCABULARY = 512
"""Rows of the embedding: nothing is learnt from more."""

ROOF_BYTES = 512 << 20


def measure_kernels(
    config: ModelConfig,
    recipe: Recipe,
    threads: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> KernelShares:
    """Run two layers of a network, one of each compressed kind, in the formats of a recipe.

    Compiles what kernels are missing, which `on_progress(done, total)` is told. Raises
    DoesNotFitError if there is no memory for the layers (1 GB for V4-Flash).
    """
    pair = _pair_of_layers(config)
    facts = facts_of_recipe("probe", pair, recipe)
    record = facts.largest_expert_bytes
    need = facts.dense_bytes + pair.n_layers * DISTINCT_EXPERTS * record + ROOF_BYTES
    if need > read_memory().available // 2:
        raise DoesNotFitError(
            f"measuring kernels takes {need / 2**30:.1f} GiB of memory", hint="close other programs"
        )
    weights = filled_weights(pair, recipe)
    compile_kernels(families(weights), on_progress)
    network = FastTransformer(pair, weights, Team(threads))
    decode_s, prefill_s = _decode_s(network), _prefill_s(network)
    roof = RoofProbe(threads, ROOF_BYTES).measure()
    nbytes = facts.weight_bytes_per_token - facts.head_bytes  # no logits are made
    operations = 2 * multiply_adds(pair) * PROMPT_TOKENS
    return KernelShares(
        decode=nbytes / decode_s / roof.read_bytes_s,
        prefill=operations / prefill_s / roof.int8_ops_s,
    )


def _decode_s(network: FastTransformer) -> float:
    """Return the median seconds of a token."""
    state = State(network.config, network.slack)
    token = np.zeros(1, np.int64)
    samples = []
    for _ in range(DECODED_TOKENS):
        start = time.perf_counter()
        network.forward(token, state)
        samples.append(time.perf_counter() - start)
    return median(samples[DECODED_TOKENS // 4 :])


def _prefill_s(network: FastTransformer) -> float:
    """Return the seconds of a prompt, the better of two."""
    tokens = np.arange(PROMPT_TOKENS, dtype=np.int64) % VOCABULARY
    samples = []
    for _ in range(2):
        state = State(network.config, network.slack)
        start = time.perf_counter()
        network.forward(tokens, state)
        samples.append(time.perf_counter() - start)
    return min(samples)


def _pair_of_layers(config: ModelConfig) -> ModelConfig:
    """Return a network of two layers, both compressed, that route by learned affinity."""
    kinds = LayerKind.CSA, LayerKind.HCA
    found = dict(zip(config.layer_kinds, config.ratios, strict=True))
    return replace(
        config,
        vocab_size=VOCABULARY,
        layer_kinds=kinds,
        ratios=(found.get(kinds[0], 4), found.get(kinds[1], 128)),
        hashed=(False, False),
        swiglu_limits=config.swiglu_limits[:1] * 2,
        shared_swiglu_limits=config.shared_swiglu_limits[:1] * 2,
        bos_id=0,
        eos_id=1,
    )
