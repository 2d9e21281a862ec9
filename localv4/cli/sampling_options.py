"""Options of what the model does with a prompt: how it picks tokens, whether it thinks."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from localv4.cli.option_groups import flag, option
from localv4.errors import UsageError


class Effort(StrEnum):
    """How long the model may think before it answers."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    MAX = "max"


MaxTokens = Annotated[
    int | None,
    option(
        "-n",
        "--max-tokens",
        panel="Sampling",
        metavar="N",
        help="Stop after N new tokens. Default: when the context is full.",
    ),
]
Temperature = Annotated[
    float | None,
    option(
        "--temp",
        panel="Sampling",
        metavar="X",
        help="Temperature; 0 always takes the likeliest token. Default: the model's own.",
    ),
]
TopP = Annotated[
    float | None,
    option(
        "--top-p",
        panel="Sampling",
        metavar="X",
        help="Keep the likeliest tokens that together have probability X.",
    ),
]
TopK = Annotated[
    int | None,
    option("--top-k", panel="Sampling", metavar="N", help="Keep the N likeliest tokens; 0: all."),
]
MinP = Annotated[
    float | None,
    option(
        "--min-p",
        panel="Sampling",
        metavar="X",
        help="Drop tokens less likely than X times the likeliest.",
    ),
]
RepeatPenalty = Annotated[
    float | None,
    option(
        "--repeat-penalty",
        panel="Sampling",
        metavar="X",
        help="Make recent tokens less likely; 1: off.",
    ),
]
Seed = Annotated[
    int | None,
    option("--seed", panel="Sampling", metavar="N", help="Same seed, same answer."),
]
Greedy = Annotated[bool, flag("--greedy", panel="Sampling", help="The same as --temp 0.")]
Think = Annotated[
    bool | None,
    flag("--think/--no-think", panel="Thinking", help="Think before answering. Default: no."),
]
ThinkEffort = Annotated[
    Effort | None,
    option(
        "--think-effort",
        panel="Thinking",
        metavar="LEVEL",
        help="low, medium, high or max; implies --think.",
    ),
]


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How tokens are picked and how many; None where the model's own setting holds."""

    max_tokens: MaxTokens = None
    temp: Temperature = None
    top_p: TopP = None
    top_k: TopK = None
    min_p: MinP = None
    repeat_penalty: RepeatPenalty = None
    seed: Seed = None
    greedy: Greedy = False

    def values(self) -> dict[str, float | None]:
        """Return the settings by name (`Settings.with_values`).

        Raises UsageError for a value out of range, long before a model is loaded.
        """
        from localv4.cli.settings import Settings

        values = {
            "temp": 0.0 if self.greedy else self.temp,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repeat_penalty": self.repeat_penalty,
            "seed": self.seed,
            "max_tokens": self.max_tokens,
        }
        Settings().with_values(values)
        return values


@dataclass(frozen=True, slots=True)
class ThinkingOptions:
    """Whether the model thinks before it answers, and how hard."""

    think: Think = None
    think_effort: ThinkEffort = None

    def mode(self) -> tuple[bool, str | None]:
        """Return whether to think and with which effort. Raises UsageError for a contradiction."""
        if self.think is False and self.think_effort is not None:
            raise UsageError("--no-think contradicts --think-effort")
        effort = self.think_effort.value if self.think_effort is not None else None
        return bool(self.think) or effort is not None, effort
