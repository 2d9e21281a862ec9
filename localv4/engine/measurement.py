"""What a benchmark finds: timed samples, and the figures that follow from them."""

import statistics
from dataclasses import dataclass
from typing import Literal

from localv4.engine.gpu_measurement import GpuResult
from localv4.engine.peer import PeerContext
from localv4.planning.roofs import Roof

QUIET_CORES = 0.08
"""A sample is clean if others took less of the machine than this part of one core."""

OPERATIONS = 2
"""Of a multiply-add: the integer peak counts both."""

CaseKind = Literal["pp", "tg"]


@dataclass(frozen=True, slots=True)
class Case:
    """Read (`pp`) or generate (`tg`) `tokens` tokens after `depth` others."""

    kind: CaseKind
    tokens: int
    depth: int

    @property
    def name(self) -> str:
        """The name in llama-bench's vocabulary: `tg128 @ d4096`."""
        return f"{self.base_name} @ d{self.depth}" if self.depth else self.base_name

    @property
    def base_name(self) -> str:
        """The name without the depth."""
        return f"{self.kind}{self.tokens}"


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
class Series:
    """The repeats of one test on one engine; there is at least one."""

    tokens: int
    samples: tuple[Sample, ...]

    @property
    def rates(self) -> tuple[float, ...]:
        """Tokens per second of each sample."""
        return tuple(self._rate(sample) for sample in self.samples)

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
        """Median tokens per second: what shares and ratios are computed from."""
        return statistics.median(self.rates)

    @property
    def clean(self) -> int:
        """Number of samples during which the machine was ours."""
        return sum(sample.is_clean for sample in self.samples)

    @property
    def clean_median(self) -> float | None:
        """Median of the clean samples, None if there are none."""
        rates = [self._rate(sample) for sample in self.samples if sample.is_clean]
        return statistics.median(rates) if rates else None

    def _rate(self, sample: Sample) -> float:
        return self.tokens / max(sample.seconds, 1e-9)


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of this process after a test, in bytes, without the buffer of the roof probe.

    `peak` is the most that it has held so far; `parts` say what it holds now, by component:
    pages of the model's files that are mapped, packed copies of weights, decoder state, workspace
    of the kernels, and the rest: Python, libraries, compiled code.
    """

    peak: int
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All that the process holds now."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class PeerResult:
    """The same test on llama.cpp: either a `problem` or a series.

    `agreement` is the correlation of both engines' logits after the last token, NaN if some are no
    numbers; `peak_bytes` the most memory that its process has held, None where it does not know.
    """

    series: Series | None
    problem: str | None
    context: PeerContext | None = None
    agreement: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """A test with all its samples, and the roofs measured before, between and after them.

    `gpu` is the part of a GPU in it, if one helps.

    `token_bytes` are the weights and the state that one decoded token reads at this depth, the
    mean over the test; `token_macs` the multiply-adds of one token, the mean over the prompt.
    """

    case: Case
    own: Series
    roofs: tuple[Roof, ...]
    token_bytes: int
    state_bytes: int
    token_macs: int
    memory: Memory
    gpu: GpuResult | None = None
    peer: PeerResult | None = None

    @property
    def read_roof(self) -> float:
        """Bytes per second of the read roof: the highest that was measured."""
        return max(roof.read_bytes_s for roof in self.roofs)

    @property
    def read_bytes_s(self) -> float | None:
        """Bytes per second that generating reads; a prompt reads weights for many tokens."""
        return self.own.median * self.token_bytes if self.case.kind == "tg" else None

    @property
    def read_share(self) -> float | None:
        """Part of the read roof that generating reaches; a GPU has a roof of its own."""
        if self.read_bytes_s is None or self.gpu is not None:
            return None
        return self.read_bytes_s / self.read_roof

    @property
    def roof_rate(self) -> float | None:
        """Tokens per second that generating would reach at the read roof."""
        return self.read_roof / self.token_bytes if self.case.kind == "tg" else None

    @property
    def int8_share(self) -> float | None:
        """Part of the integer peak that reading a prompt reaches, of the highest measured."""
        if self.case.kind == "tg" or self.gpu is not None:
            return None
        operations_s = self.own.median * self.token_macs * OPERATIONS
        return operations_s / max(roof.int8_ops_s for roof in self.roofs)

    @property
    def bound_share(self) -> float | None:
        """Part of what both memories allow that generating with a GPU reaches."""
        bound = self.gpu.bound(self.read_roof) if self.gpu is not None else None
        return None if bound is None else self.own.median / bound

    @property
    def ratio(self) -> float | None:
        """How many times as fast as llama.cpp: the ratio of the medians."""
        theirs = self.peer.series if self.peer is not None else None
        return None if theirs is None else self.own.median / theirs.median

    @property
    def clean_ratio(self) -> float | None:
        """The same ratio from clean samples; None if one side has none."""
        theirs = self.peer.series if self.peer is not None else None
        clean = (self.own.clean_median, theirs.clean_median if theirs is not None else None)
        return None if clean[0] is None or clean[1] is None else clean[0] / clean[1]
