"""Sampling settings: what the model recommends, changed by flags and by /set."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localv4.cli import inputs
from localv4.errors import BadFileError, UsageError
from localv4.small_file import read_small_file

if TYPE_CHECKING:
    from localv4.engine.sampler import Sampling


MAX_TOKENS = 2**31 - 1  # also the bound of --top-k; real limits are far below


@dataclass(frozen=True, slots=True)
class Range:
    """What one setting may be."""

    kind: type[int] | type[float]
    low: float
    high: float
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """How tokens are chosen and when to stop; None means random or no limit."""

    temp: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None

    def with_values(self, values: Mapping[str, Any]) -> "Settings":
        """Return a copy with the values that are not None, each checked against its range."""
        given = {name: value for name, value in values.items() if value is not None}
        checked: dict[str, Any] = {name: _checked(name, value) for name, value in given.items()}
        return replace(self, **checked)

    def with_text(self, name: str, text: str) -> "Settings":
        """Return a copy with one value changed, as `/set NAME VALUE` gives it."""
        key = name.lower().replace("-", "_")
        if key not in RANGES:
            raise UsageError(f"no setting is called {name}", hint="/set shows them all")
        value: int | float | None = None
        if not (RANGES[key].optional and text.lower() in ("none", "off", "random")):
            try:
                value = RANGES[key].kind(text)
            except ValueError as error:
                raise UsageError(f"{name} must be {_describe(key)}, not {text}") from error
            value = _checked(key, value)
        change: dict[str, Any] = {key: value}
        return replace(self, **change)

    def lines(self) -> list[tuple[str, str]]:
        """Return (name, value) of every setting for display."""
        unset = {"seed": "random", "max_tokens": "none"}
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self))
        return [
            (name.replace("_", "-"), unset[name] if value is None else _shown(value))
            for name, value in pairs
        ]

    def sampling(self) -> "Sampling":
        """Return what the engine's sampler takes."""
        from localv4.engine.sampler import Sampling

        return Sampling(
            temperature=self.temp,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repeat_penalty,
            seed=self.seed,
        )


RANGES = {
    "temp": Range(float, 0.0, 100.0),
    "top_p": Range(float, 0.0, 1.0),
    "top_k": Range(int, 0, MAX_TOKENS),
    "min_p": Range(float, 0.0, 1.0),
    "repeat_penalty": Range(float, 0.01, 100.0),
    "seed": Range(int, 0, 2**63 - 1, optional=True),
    "max_tokens": Range(int, 1, MAX_TOKENS, optional=True),
}

# Where a generation_config.json and a GGUF file keep the same settings.
CONFIG_KEYS = {
    "temperature": "temp",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
GGUF_KEYS = {
    "general.sampling.temp": "temp",
    "general.sampling.top_p": "top_p",
    "general.sampling.top_k": "top_k",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repeat_penalty",
}


def recommended(path: Path, metadata: Mapping[str, Any]) -> Settings:
    """Read the settings that come with a model: GGUF metadata or its generation_config.json."""
    try:
        found = {name: metadata[key] for key, name in GGUF_KEYS.items() if key in metadata}
        config = path / "generation_config.json"
        if path.is_dir() and config.exists():
            path = config
            found |= _read_config(config)
        return Settings().with_values(found)
    except UsageError as error:
        raise BadFileError(path, error.message) from error


def _read_config(path: Path) -> dict[str, Any]:
    config = inputs.parse_json(path, read_small_file(path, inputs.MAX_JSON_BYTES))
    if not isinstance(config, dict):
        raise BadFileError(path, "not a JSON object")
    if config.get("do_sample") is False:
        return {"temp": 0.0}
    return {name: config[key] for key, name in CONFIG_KEYS.items() if key in config}


def _checked(name: str, value: Any) -> int | float:
    """Return `value` if it is a number of the right kind and in range. Raises UsageError."""
    rule = RANGES[name]
    kinds = (int,) if rule.kind is int else (int, float)
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not rule.low <= value <= rule.high:
        raise UsageError(f"{name.replace('_', '-')} must be {_describe(name)}, not {value!r}")
    return rule.kind(value)


def _describe(name: str) -> str:
    rule = RANGES[name]
    kind = "whole number" if rule.kind is int else "number"
    return f"a {kind} from {_shown(rule.low)} to {_shown(rule.high)}"


def _shown(value: float) -> str:
    """Return a number as it can be typed: all digits of a whole one."""
    return str(value) if isinstance(value, int) else f"{value:g}"
