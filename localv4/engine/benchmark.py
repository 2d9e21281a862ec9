"""Speed of a loaded model: how many tokens per second it reads and generates at some depth.

Every token is taken from one fixed trace, so that two runs route to the same experts.
"""

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from localv4.engine.engine import Engine
from localv4.engine.machine import (
    ROOF_BYTES,
    Roof,
    RoofProbe,
    cpu_times,
    foreign_cores,
)
from localv4.engine.session import Session
from localv4.errors import Cancelled, DoesNotFitError, UsageError
from localv4.model import traffic

TRACE_SEED = 20261122

QUIET_CORES = 0.08
"""A sample is clean if others took less of the machine than this part of one core."""

OPERATIONS = 2
"""Of a multiply-add: the integer peak counts both."""

CaseKind = Literal["pp", "tg"]

OnStep = Callable[[str, int, int], None]
"""Called with (phase, done, total) while a test runs."""


@dataclass(frozen=True, slots=True)
class Case:
    """Read (`pp`) or generate (`tg`) `tokens` tokens after `depth` others."""

    kind: CaseKind
    tokens: int
    depth: int

    @property
    def name(self) -> str:
        """The name in llama-bench's vocabulary: `tg128 @ d4096`."""
        name = f"{self.kind}{self.tokens}"
        return f"{name} @ d{self.depth}" if self.depth else name


@dataclass(frozen=True, slots=True)
class Plan:
    """The tests to run and those that the context has no room for."""

    fitting: tuple[Case, ...]
    skipped: tuple[Case, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed repeat; `foreign_cores` is what others took of the machine meanwhile."""

    seconds: float
    foreign_cores: float

    @property
    def is_clean(self) -> bool:
        """Whether the machine was ours."""
        return self.foreign_cores < QUIET_CORES


@dataclass(frozen=True, slots=True)
class Measurement:
    """A test with all its samples, and the roofs measured before and after it.

    `token_bytes` are the weights and the state that one decoded token reads at this depth, the
    mean over the test; `token_macs` the multiply-adds of one token, the mean over the prompt.
    """

    case: Case
    samples: tuple[Sample, ...]
    roofs: tuple[Roof, Roof]
    token_bytes: int
    state_bytes: int
    token_macs: int

    @property
    def rates(self) -> tuple[float, ...]:
        """Tokens per second of each sample."""
        return tuple(self.case.tokens / max(sample.seconds, 1e-9) for sample in self.samples)

    @property
    def mean(self) -> float:
        """Mean tokens per second."""
        return statistics.fmean(self.rates)

    @property
    def stdev(self) -> float:
        """Standard deviation of the rates, 0 for a single sample."""
        return statistics.stdev(self.rates) if len(self.rates) > 1 else 0.0

    @property
    def median(self) -> float:
        """Median tokens per second: what the shares of the roofs are computed from."""
        return statistics.median(self.rates)

    @property
    def clean(self) -> int:
        """Number of samples during which the machine was ours."""
        return sum(sample.is_clean for sample in self.samples)

    @property
    def read_bytes_s(self) -> float | None:
        """Bytes per second that generating reads; a prompt reads weights for many tokens."""
        return self.median * self.token_bytes if self.case.kind == "tg" else None

    @property
    def read_share(self) -> float | None:
        """Part of the read roof that generating reaches, of the higher one of the two."""
        if self.read_bytes_s is None:
            return None
        return self.read_bytes_s / max(roof.read_bytes_s for roof in self.roofs)

    @property
    def int8_share(self) -> float | None:
        """Part of the integer peak that reading a prompt reaches, of the higher one of the two."""
        if self.case.kind == "tg":
            return None
        operations_s = self.median * self.token_macs * OPERATIONS
        return operations_s / max(roof.int8_ops_s for roof in self.roofs)


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


class Benchmark:
    """Runs tests on an engine, one after the other, on one session.

    The session goes back to the depth of a test before each sample. A short way back is free;
    after a long one the tokens before are processed again, which no sample counts.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        repeats: int,
        pause_s: float = 0.0,
        roof_bytes: int = ROOF_BYTES,
        on_step: OnStep | None = None,
        cancelled: threading.Event | None = None,
    ) -> None:
        self.engine = engine
        self.threads = engine.network.numerics.threads
        self.numerics = engine.network.numerics.name
        weights, config = engine.network.weights, engine.config
        self.weight_bytes = traffic.weight_bytes(
            weights, config, packs_experts=self.numerics == "fast"
        )
        self.parameters = traffic.parameters(weights)
        self._macs = traffic.multiplications(weights, config)
        self._head_macs = traffic.head_multiplications(weights)
        self._repeats = repeats
        self._pause_s = pause_s
        self._on_step = on_step
        self._cancelled = cancelled or threading.Event()
        self._probe = RoofProbe(self.threads, roof_bytes)

    @property
    def model_bytes(self) -> int:
        """Bytes of all tensors in the model's files."""
        return sum(tensor.nbytes for tensor in self.engine.checkpoint.tensors.values())

    def run(self, cases: Sequence[Case]) -> Iterator[Measurement]:
        """Yield the measurement of each test as it is finished. Raises Cancelled when stopped."""
        longest = max(case.depth + case.tokens for case in cases)
        tokens = trace(self.engine.config.vocab_size, longest)
        session = self.engine.new_session()
        for case in cases:
            yield self._measure(session, case, tokens)

    def _measure(self, session: Session, case: Case, tokens: Sequence[int]) -> Measurement:
        self._report(f"{case.name}: warming up", 0)
        self._sample(session, case, tokens)  # pages come in, experts of this trace are packed
        before = self._roof()
        samples = []
        for done in range(self._repeats):
            self._report(case.name, done)
            self._rest()
            samples.append(self._sample(session, case, tokens))
        after = self._roof()
        positions = range(case.depth, case.depth + case.tokens)
        state = traffic.state_bytes(self.engine.config, positions)
        return Measurement(
            case=case,
            samples=tuple(samples),
            roofs=(before, after),
            token_bytes=sum(self.weight_bytes.values()) + state,
            state_bytes=state,
            token_macs=self._macs + self._head_macs // case.tokens,
        )

    def _sample(self, session: Session, case: Case, tokens: Sequence[int]) -> Sample:
        """Run a test once; only its own tokens are timed."""
        self._go_to(session, case, tokens)
        self.engine.checkpoint.check_unchanged()
        timed = tokens[case.depth : case.depth + case.tokens]
        before = cpu_times()
        start = time.perf_counter()
        if case.kind == "pp":
            session.extend(timed, cancelled=self._cancelled)
        else:
            for token in timed:
                session.extend([token], cancelled=self._cancelled)
        seconds = time.perf_counter() - start
        after = cpu_times()
        self.engine.checkpoint.check_unchanged()
        return Sample(seconds, foreign_cores(before, after))

    def _go_to(self, session: Session, case: Case, tokens: Sequence[int]) -> None:
        """Bring the session to the depth of a test."""
        session.rollback(min(case.depth, session.position))
        missing = tokens[session.position : case.depth]
        if missing:
            session.extend(
                missing,
                cancelled=self._cancelled,
                on_progress=lambda done, total: self._report(
                    f"{case.name}: going to depth {case.depth}", done, total
                ),
            )

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
