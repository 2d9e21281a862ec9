"""Speed of a loaded model: how many tokens per second it reads and generates at some depth.

Every token is taken from one fixed trace, so that two runs route to the same experts.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from localv4.engine.contender import Contender, OnStep, OwnEngine, PeerEngine
from localv4.engine.engine import Engine
from localv4.engine.machine import peak_resident_bytes
from localv4.engine.measurement import Case, CaseKind, Measurement, Series
from localv4.engine.peer import Peer
from localv4.errors import Cancelled, DoesNotFitError, UsageError
from localv4.model import traffic
from localv4.planning.roofs import ROOF_BYTES, Roof, RoofProbe

TRACE_SEED = 20261122

# Of the bytes of a model's files: what an engine holds besides its weights, its packing included.
OWN_FACTOR, PEER_FACTOR = 1.1, 1.05
OWN_EXTRA_BYTES = ROOF_BYTES + (1 << 30)
PEER_EXTRA_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Plan:
    """The tests to run and those that the context has no room for."""

    fitting: tuple[Case, ...]
    skipped: tuple[Case, ...]


def plan(
    prompts: Sequence[int], generated: Sequence[int], depths: Sequence[int], ctx_size: int
) -> Plan:
    """Return the tests by depth; 0 tokens mean no test.

    Raises UsageError when nothing is asked for, DoesNotFitError when the context holds no test.
    """
    kinds: tuple[tuple[CaseKind, Sequence[int]], ...] = (("pp", prompts), ("tg", generated))
    cases = [
        Case(kind, tokens, depth)
        for depth in dict.fromkeys(depths)
        for kind, sizes in kinds
        for tokens in dict.fromkeys(sizes)
        if tokens > 0
    ]
    if not cases:
        raise UsageError("nothing to measure", hint="give -p or -n a number above 0")
    fitting = tuple(case for case in cases if case.depth + case.tokens <= ctx_size)
    if not fitting:
        least = min(case.depth + case.tokens for case in cases)
        raise DoesNotFitError(
            f"the smallest test takes {least} tokens, the context holds {ctx_size}",
            hint="use smaller -p, -n or -d",
        )
    return Plan(fitting, tuple(case for case in cases if case not in fitting))


def trace(vocab_size: int, count: int) -> list[int]:
    """Return the first `count` tokens of the trace; the token at a position never changes."""
    random = np.random.Generator(np.random.PCG64(TRACE_SEED)).random(count)
    tokens: list[int] = (random * vocab_size).astype(np.int64).tolist()
    return tokens


def fit_together(model_bytes: int, available: int) -> bool:
    """Say whether two engines fit into memory with a copy of a model each, or one after the other.

    Raises DoesNotFitError when not even one fits.
    """
    own = int(model_bytes * OWN_FACTOR) + OWN_EXTRA_BYTES
    peer = int(model_bytes * PEER_FACTOR) + PEER_EXTRA_BYTES
    if max(own, peer) > available:
        raise DoesNotFitError(
            f"the comparison needs about {max(own, peer) / 2**30:.1f} GiB of memory for one engine "
            f"alone, {available / 2**30:.1f} GiB are free",
            hint="use a smaller model, or close other programs",
        )
    return own + peer <= available


class Benchmark:
    """Runs tests one after the other, on our engine and, if there is a peer, on llama.cpp.

    `reload` gives the engine again after it was forgotten: with it, only one of the two engines is
    in memory at a time, and nobody else may hold ours.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        repeats: int,
        pause_s: float = 0.0,
        roof_bytes: int = ROOF_BYTES,
        peer: Peer | None = None,
        reload: Callable[[], Engine] | None = None,
        on_step: OnStep | None = None,
        cancelled: threading.Event | None = None,
    ) -> None:
        weights, config = engine.network.weights, engine.config
        self.threads: int = engine.network.threads
        self.numerics = engine.network.name
        self.n_layers = config.n_layers
        self.model_bytes = sum(tensor.nbytes for tensor in engine.checkpoint.tensors.values())
        """Bytes of all tensors in the model's files."""
        self.parameters = traffic.parameters(weights)
        self.weight_bytes = traffic.weight_bytes(
            weights, config, packs_experts=self.numerics == "fast"
        )
        self.together = reload is None
        self.roof_bytes = roof_bytes
        self._config, self._rows = config, engine.network.rows
        self._macs = traffic.multiplications(weights, config)
        self._head_macs = traffic.head_multiplications(weights)
        self._repeats = repeats
        self._pause_s = pause_s
        self._on_step = on_step
        self._cancelled = cancelled or threading.Event()
        self._peak_bytes = peak_resident_bytes()
        self._probe = RoofProbe(self.threads, roof_bytes)
        self._own = OwnEngine(engine, reload, self._report, self._cancelled)
        self._peer: PeerEngine | None = None
        if peer is not None:
            self._peer = PeerEngine(peer, engine.checkpoint.files[0], self.threads, self._report)

    def run(self, cases: Sequence[Case]) -> Iterator[Measurement]:
        """Yield the measurement of each test as it is finished. Raises Cancelled when stopped."""
        longest = max(case.depth + case.tokens for case in cases)
        tokens = trace(self._config.vocab_size, longest)
        for number, case in enumerate(cases):
            yield self._measure(case, tokens, self._stints(number))

    def _stints(self, number: int) -> list[list[Contender]]:
        """Return who is in memory together, one after the other, in test `number`.

        Who came last begins the next test: it is still there.
        """
        if self._peer is None:
            return [[self._own]]
        if self.together:
            return [[self._own, self._peer]]
        alone: list[list[Contender]] = [[self._own], [self._peer]]
        return alone if number % 2 == 0 else alone[::-1]

    def _measure(
        self, case: Case, tokens: Sequence[int], stints: Sequence[Sequence[Contender]]
    ) -> Measurement:
        roofs = []
        memory, gpu = None, None
        for stint in stints:
            self._make_room(stint)
            for contender in stint:
                contender.open(case, tokens)
            roofs.append(self._roof())
            watch = self._own.watch_gpu() if self._own in stint else None
            self._take_samples(case, stint)
            if watch is not None:
                gpu = watch.result(case.kind == "tg")
            if self._own in stint:
                memory = self._own.memory(self._peak_bytes, self.roof_bytes)
        roofs.append(self._roof())
        assert memory is not None
        state = traffic.state_bytes(
            self._config, range(case.depth, case.depth + case.tokens), self._rows
        )
        return Measurement(
            case=case,
            own=Series(case.tokens, tuple(self._own.samples)),
            roofs=tuple(roofs),
            token_bytes=sum(self.weight_bytes.values()) + state,
            state_bytes=state,
            token_macs=self._macs + self._head_macs // case.tokens,
            memory=memory,
            gpu=gpu,
            peer=self._peer.result(self._own.logits) if self._peer is not None else None,
        )

    def _make_room(self, stint: Sequence[Contender]) -> None:
        for contender in (self._own, self._peer):
            if contender is not None and contender not in stint:
                contender.unload()

    def _take_samples(self, case: Case, stint: Sequence[Contender]) -> None:
        """Time every repeat of a test; two engines take turns in going first."""
        for done in range(self._repeats):
            self._report(case.name, done)
            for contender in stint if done % 2 == 0 else reversed(stint):
                self._rest()
                contender.sample()

    def _roof(self) -> Roof:
        if self._cancelled.is_set():
            raise Cancelled("stopped")
        return self._probe.measure()

    def _rest(self) -> None:
        """Wait as long as was asked for: some machines slow down when they are busy for long."""
        if self._cancelled.wait(self._pause_s):
            raise Cancelled("stopped")

    def _report(self, phase: str, done: int, total: int | None = None) -> None:
        if self._on_step is not None:
            self._on_step(phase, done, self._repeats if total is None else total)
