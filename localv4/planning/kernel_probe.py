"""What the kernels make of this machine: layers of true dimensions, run for a second."""

import time
from dataclasses import replace
from statistics import median

import numpy as np

from localv4.errors import DoesNotFitError
from localv4.kernels.compiler import compile_kernels
from localv4.kernels.team import Team
from localv4.model.config import LayerKind, ModelConfig
from localv4.model.fast import FastTransformer
from localv4.model.packing import families
from localv4.model.weights import Weights
from localv4.planning.filled_weights import DISTINCT_EXPERTS, filled_weights
from localv4.planning.machine import KernelShares
from localv4.planning.memory import read_memory
from localv4.planning.model_facts import DEFAULT_ROWS, facts_of_recipe
from localv4.planning.network import multiply_adds
from localv4.planning.recipes import Recipe
from localv4.planning.roofs import RoofProbe

DECODED_TOKENS = 24
PROMPT_TOKENS = 480
PROMPT_SECONDS, MOST_PROMPTS = 2.0, 8
"""Prompts are read until they have taken so long, or so many times."""

VOCABULARY = 512
"""Rows of the embedding: nothing is learnt from more."""

ROOF_BYTES = 512 << 20


def measure_kernels(config: ModelConfig, recipe: Recipe, threads: int) -> KernelShares:
    """Run two layers of a network, one of each compressed kind, in the formats of a recipe.

    Compiles what kernels are missing. Raises DoesNotFitError if there is no memory for the layers
    (1 GB for V4-Flash).
    """
    pair = _pair_of_layers(config)
    need = _bytes_of(pair, recipe) + ROOF_BYTES
    if need > read_memory().available // 2:
        raise DoesNotFitError(
            f"measuring kernels takes {need / 2**30:.1f} GiB of memory", hint="close other programs"
        )
    weights = filled_weights(pair, recipe)
    compile_kernels(families(weights) | {DEFAULT_ROWS.family})
    decode_s, prefill_s = _run(pair, weights, threads)
    del weights
    small = _small(pair)
    small_s, _ = _run(small, filled_weights(small, recipe), threads)
    roof = RoofProbe(threads, ROOF_BYTES).measure()
    layer_s = max(0.0, small_s - _read_bytes(small, recipe) / roof.read_bytes_s) / small.n_layers
    streaming_s = max(decode_s - pair.n_layers * layer_s, decode_s / 2)
    operations = 2 * multiply_adds(pair) * PROMPT_TOKENS
    return KernelShares(
        decode=_read_bytes(pair, recipe) / streaming_s / roof.read_bytes_s,
        prefill=operations / prefill_s / roof.int8_ops_s,
        layer_s=layer_s,
    )


def _bytes_of(config: ModelConfig, recipe: Recipe) -> int:
    """Return the memory of the weights: records that share theirs count once."""
    facts = facts_of_recipe("probe", config, recipe)
    experts = config.n_layers * DISTINCT_EXPERTS * facts.largest_expert_bytes
    return facts.dense_bytes + facts.head_bytes + experts


def _read_bytes(config: ModelConfig, recipe: Recipe) -> int:
    """Return what a token reads; no logits are made, so the head is not."""
    facts = facts_of_recipe("probe", config, recipe)
    return facts.weight_bytes_per_token - facts.head_bytes


def _run(config: ModelConfig, weights: Weights, threads: int) -> tuple[float, float]:
    """Return the seconds of one token and those of a prompt."""
    network = FastTransformer(config, weights, Team(threads), rows=DEFAULT_ROWS)
    try:
        return _decode_s(network), _prefill_s(network)
    finally:
        network.close()


def _decode_s(network: FastTransformer) -> float:
    """Return the median seconds of a token."""
    state = network.new_state()
    token = np.zeros(1, np.int64)
    samples = []
    for _ in range(DECODED_TOKENS):
        start = time.perf_counter()
        network.forward(token, state)
        samples.append(time.perf_counter() - start)
    return median(samples[DECODED_TOKENS // 4 :])


def _prefill_s(network: FastTransformer) -> float:
    """Return the seconds of a prompt, the best of some."""
    tokens = np.arange(PROMPT_TOKENS, dtype=np.int64) % VOCABULARY
    samples: list[float] = []
    while len(samples) < 2 or (sum(samples) < PROMPT_SECONDS and len(samples) < MOST_PROMPTS):
        state = network.new_state()
        start = time.perf_counter()
        network.forward(tokens, state)
        samples.append(time.perf_counter() - start)
    return min(samples)


def _small(config: ModelConfig) -> ModelConfig:
    """Return the same layers so small that nothing but their number takes time."""
    return replace(
        config,
        hidden_size=256,
        n_heads=8,
        head_dim=128,
        q_lora_rank=256,
        o_groups=2,
        o_lora_rank=256,
        expert_width=256,
        n_experts=16,
        index_heads=8,
    )


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
