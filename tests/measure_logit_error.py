"""Measure what rounding the activations to int8 costs, one component at a time.

    python tests/measure_logit_error.py MODEL EVAL_FOLDER [--tokenizer FOLDER] [--tokens 2000]

The exact engine computes the logits of held-out tokens again with int8 inputs, in blocks of 32 as
`localv4.kernels.activations` rounds them, of the matrices of one component; then with those of all
components, of those that `fast` rounds in this model, and at last by `fast` itself. Takes minutes.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path

import numpy as np
from measure_perplexity import Part, book, chat, load, stories
from numpy.typing import NDArray
from operation_runs import block_scales

from localv4.engine.engine import Engine
from localv4.engine.session import Network, Session
from localv4.kernels.activations import SMALLEST
from localv4.kernels.formats import OPERATIONS
from localv4.kernels.isa import ISA
from localv4.kernels.packed import BLOCK, MX4
from localv4.kernels.panels import BATCH_TOKENS
from localv4.kernels.team import Team
from localv4.model.config import ModelConfig
from localv4.model.fast import FastTransformer
from localv4.model.fast_chunk import ChunkPlan
from localv4.model.fast_layer import FastLayer
from localv4.model.fast_moe import WaveBuffers
from localv4.model.matrix import Floats, Matrix, Numerics
from localv4.model.packing import packed_form
from localv4.model.transformer import Transformer
from localv4.model.weights import Compressor, Expert, Weights
from localv4.model.workspace import ChunkBuffers

BOOK_WINDOW = 1024
Choices = NDArray[np.int64]
"""Experts of each layer and token, ascending (layers, tokens, k)."""


def round_activations(x: Floats, *, binary: bool = False) -> Floats:
    """Return x (tokens, n) as int8 holds it, times its scales, powers of two if `binary`."""
    blocks = x.reshape(-1, BLOCK)
    size = np.maximum(np.abs(blocks).max(1, keepdims=True), SMALLEST)
    scales, factors = block_scales(size, binary=binary)
    rounded: Floats = np.rint(blocks * factors) * scales
    return rounded.reshape(x.shape)


class RoundingNumerics(Numerics):
    """Exact arithmetic, but for the inputs of some matrices; keeps the choices of experts.

    `rounded` has the identities of those matrices, `binary` of those whose inputs have scales that
    are powers of two; `choices` are those of each layer and chunk.
    """

    def __init__(self, team: Team, widest: int) -> None:
        super().__init__(team, widest)
        self.rounded: set[int] = set()
        self.binary: set[int] = set()
        self.choices: list[NDArray[np.int64]] = []

    def linear(self, x: Floats, weight: Matrix, groups: int = 1) -> Floats:
        """Multiply, after rounding where it is asked for."""
        if id(weight) in self.rounded:
            x = round_activations(x, binary=id(weight) in self.binary)
        return super().linear(x, weight, groups)

    def mix_experts(
        self,
        x: Floats,
        chosen: NDArray[np.int64],
        weights: Floats,
        experts: tuple[Expert, ...],
        limit: np.float32,
    ) -> Floats:
        """Note the choice, then mix."""
        self.choices.append(chosen.copy())
        return super().mix_experts(x, chosen, weights, experts, limit)


class NotingPlan(ChunkPlan):
    """Prefill in `fast` that keeps the choices of experts."""

    choices: list[NDArray[np.int64]]

    def _mix(
        self,
        layer: FastLayer,
        index: int,
        chunk: ChunkBuffers,
        buffers: WaveBuffers,
        tokens: int,
    ) -> None:
        super()._mix(layer, index, chunk, buffers, tokens)
        self.choices.append(chunk.chosen[:tokens].copy())


@dataclass(frozen=True, slots=True)
class Outcome:
    """Logits (tokens, vocab) of a text and the experts that were chosen."""

    logits: Floats
    choices: Choices


def outcome(
    network: Network, ids: Sequence[int], choices: list[NDArray[np.int64]], config: ModelConfig
) -> Outcome:
    """Run a network over a text; `choices` is where it puts those of each layer and chunk."""
    choices.clear()
    logits = Session(network, len(ids)).all_logits(ids)
    layers = config.n_layers
    chosen = [np.sort(np.concatenate(choices[layer::layers]), axis=1) for layer in range(layers)]
    return Outcome(logits, np.stack(chosen))


def components(weights: Weights) -> dict[str, list[Matrix]]:
    """Return the matrices of each component of a network."""
    attentions = [layer.attention for layer in weights.layers]
    indexers = [one.indexer for one in attentions if one.indexer is not None]
    compressors = [one.compressor for one in attentions if one.compressor is not None]
    routed = [expert for layer in weights.layers for expert in layer.experts]
    shared = [layer.shared for layer in weights.layers]
    sites = [site for layer in weights.layers for site in (layer.attn_hc, layer.ffn_hc)]
    return {
        "routed experts: gate, up": [m for expert in routed for m in (expert.w1, expert.w3)],
        "routed experts: down": [expert.w2 for expert in routed],
        "shared expert: gate, up": [m for expert in shared for m in (expert.w1, expert.w3)],
        "shared expert: down": [expert.w2 for expert in shared],
        "q_a": [one.wq_a for one in attentions],
        "q_b": [one.wq_b for one in attentions],
        "kv": [one.wkv for one in attentions],
        "o_a": [one.wo_a for one in attentions],
        "o_b": [one.wo_b for one in attentions],
        "compressor: wkv, wgate": _of_compressors(compressors),
        "indexer: wq_b": [one.wq_b for one in indexers],
        "indexer: weights_proj": [one.weights_proj for one in indexers],
        "indexer: its compressor": _of_compressors([one.compressor for one in indexers]),
        "router": [layer.router.weight for layer in weights.layers],
        "hyper-connections: fn": [site.fn for site in (*sites, weights.head_hc)],
        "head": [weights.head],
    }


def _of_compressors(compressors: Sequence[Compressor]) -> list[Matrix]:
    return [matrix for one in compressors for matrix in (one.wkv, one.wgate)]


def is_rounded(matrix: Matrix) -> bool:
    """Say whether `fast` rounds the inputs of a matrix."""
    form = packed_form(matrix)
    return form is not None and form.name in OPERATIONS


def binary_inputs(parts: Mapping[str, Sequence[Matrix]]) -> set[int]:
    """Return the identities of matrices whose inputs have scales that are powers of two.

    With AMX those of experts in MX4 are, and of the shared expert, which takes the same inputs.
    """
    gate_up, down = parts["routed experts: gate, up"], parts["routed experts: down"]
    found: set[int] = set()
    if ISA.amx and all(packed_form(matrix) == MX4 for matrix in gate_up):
        found.update(map(id, (*gate_up, *parts["shared expert: gate, up"])))
    if ISA.amx and all(packed_form(matrix) == MX4 for matrix in down):
        found.update(map(id, down))
    return found


@dataclass(slots=True)
class Errors:
    """How far outcomes are from the exact ones, one value for each position.

    `distance` relative L2 of the logits, `divergence` KL from the exact distribution in nats,
    `same` whether the likeliest token is; `changed` one value for each position and routed layer.
    """

    distance: list[NDArray[np.float64]]
    divergence: list[NDArray[np.float64]]
    same: list[NDArray[np.bool_]]
    changed: list[NDArray[np.bool_]]

    @classmethod
    def none(cls) -> "Errors":
        """Return an empty collection."""
        return cls([], [], [], [])

    def add(self, found: Outcome, exact: Outcome, config: ModelConfig) -> None:
        """Take in the outcomes of a text."""
        wide, true = found.logits.astype(np.float64), exact.logits.astype(np.float64)
        self.distance.append(np.linalg.norm(wide - true, axis=1) / np.linalg.norm(true, axis=1))
        log_p, log_q = _log_softmax(true), _log_softmax(wide)
        self.divergence.append((np.exp(log_p) * (log_p - log_q)).sum(1))
        self.same.append(wide.argmax(1) == true.argmax(1))
        routed = [layer for layer, hashed in enumerate(config.hashed) if not hashed]
        self.changed.append((found.choices[routed] != exact.choices[routed]).any(2).ravel())

    def row(self) -> str:
        """Return the columns of the table."""
        distance, divergence, same, changed = (
            np.concatenate(getattr(self, field.name)) for field in fields(self)
        )
        return (
            f"{np.median(distance):.2%} | {np.percentile(distance, 95):.2%} | "
            f"{1000 * divergence.mean():.3f} | {same.mean():.2%} | {changed.mean():.2%}"
        )


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(1, keepdims=True)
    out: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return out


def sample(engine: Engine, folder: Path, tokens: int) -> list[list[int]]:
    """Return texts with about so many tokens: half of them book, the rest stories and dialogues."""
    tokenizer = engine.tokenizer
    found = [*islice(book(tokenizer, folder, BOOK_WINDOW), max(1, tokens // 2 // BOOK_WINDOW))]
    for parts in (stories(tokenizer, folder), chat(tokenizer, folder)):
        found += _first(parts, tokens // 4)
    return [part.ids for part in found]


def _first(parts: Sequence[Part], tokens: int) -> Iterator[Part]:
    """Yield parts until they have so many tokens."""
    for part in parts:
        if tokens <= 0:
            return
        tokens -= len(part.ids)
        yield part


Run = Callable[[Sequence[int]], Outcome]


def exact_runs(engine: Engine) -> tuple[Run, dict[str, Run]]:
    """Return a run without any rounding, and those with it by the name of what is rounded."""
    assert isinstance(engine.network, Transformer)
    config, weights = engine.network.config, engine.network.weights
    numerics = RoundingNumerics(Team(2), weights.widest)
    network = Transformer(config, weights, numerics)
    parts = components(weights)
    numerics.binary = binary_inputs(parts)

    def run_with(matrices: Sequence[Matrix]) -> Run:
        def run(ids: Sequence[int]) -> Outcome:
            numerics.rounded = set(map(id, matrices))
            return outcome(network, ids, numerics.choices, config)

        return run

    everything = [matrix for matrices in parts.values() for matrix in matrices]
    runs = {_title(name, matrices): run_with(matrices) for name, matrices in parts.items()}
    runs["everything"] = run_with(everything)
    runs["what `fast` rounds here"] = run_with([m for m in everything if is_rounded(m)])
    return run_with([]), runs


def _title(name: str, matrices: Sequence[Matrix]) -> str:
    """Return the name of a component, marked if `fast` rounds its inputs in this model."""
    return f"{name} (*)" if all(map(is_rounded, matrices)) else name


def fast_run(engine: Engine) -> Run:
    """Return the run of the fast engine."""
    network = engine.network
    assert isinstance(network, FastTransformer)
    plan = NotingPlan(network._network, BATCH_TOKENS)
    plan.choices, network._many = [], plan

    def run(ids: Sequence[int]) -> Outcome:
        return outcome(network, ids, plan.choices, network.config)

    return run


def measure(
    texts: Sequence[Sequence[int]], exact: Run, runs: Mapping[str, Run], config: ModelConfig
) -> dict[str, Errors]:
    """Return the errors of all runs over all texts."""
    errors = {name: Errors.none() for name in runs}
    for ids in texts:
        true = exact(ids)
        for name, run in runs.items():
            errors[name].add(run(ids), true, config)
    return errors


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path, metavar="EVAL_FOLDER")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer.json")
    parser.add_argument("--tokens", type=int, default=2000)
    given = parser.parse_args()
    engine = load(given.model, given.tokenizer, "exact")
    texts = sample(engine, given.folder, given.tokens)
    exact, runs = exact_runs(engine)
    runs["`fast`"] = fast_run(load(given.model, given.tokenizer, "fast"))
    errors = measure(texts, exact, runs, engine.config)
    print(f"{sum(map(len, texts))} tokens; (*): `fast` rounds the inputs in this model\n")
    print("| int8 inputs of | logits, median | 95 % | KL, mnat | same token | other experts |")
    print("|---|---|---|---|---|---|")
    for name, found in errors.items():
        print(f"| {name} | {found.row()} |")


if __name__ == "__main__":
    main()
