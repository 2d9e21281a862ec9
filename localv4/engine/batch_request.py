"""From a row of a batch file to a prompt in tokens and the options of its answer."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from localv4.engine.batch_input import Kind, Row, RowError
from localv4.engine.batch_rows import Job
from localv4.engine.growing_answer import ReplyOptions
from localv4.engine.sampler import Sampling
from localv4.errors import LocalV4Error
from localv4.text.effort import Release, choose_effort
from localv4.text.prompt import parse_messages, render
from localv4.text.tokenizer import Tokenizer

MOST_STOPS = 16
MOST_TOKENS = 2**31 - 1
MOST_TEMPERATURE = 100.0
SEEDS = 2**63


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """What holds for every row that does not say otherwise.

    `model` is the name that answers carry, `names` are all that rows may ask for, in lower case.
    `raw` continues the text of short rows instead of answering it. Rows without a seed of their own
    have one that follows from `seed` and their custom_id.
    """

    model: str
    names: frozenset[str]
    sampling: Sampling
    release: Release
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    thinking: bool = False
    effort: str | None = None
    system: str | None = None
    raw: bool = False
    seed: int = 0

    def identity(self, weights: str, numerics: str, ctx_size: int | None) -> str:
        """Return hexadecimal digits that are equal only where equal rows are asked the same way.

        `weights` is the fingerprint of the model.
        """
        facts = {name: value for name, value in asdict(self).items() if name != "names"}
        facts |= {"weights": weights, "numerics": numerics, "ctx_size": ctx_size}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Request:
    """A row that can be answered, and the work that this takes."""

    custom_id: str
    digest: bytes
    kind: Kind
    job: Job


class _Lenient(BaseModel):
    """An object of a request; clients send more fields than matter here."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class _Thinking(_Lenient):
    type: Literal["enabled", "disabled"]


class _Format(_Lenient):
    type: str


_Tokens = Annotated[int, Field(ge=1, le=MOST_TOKENS)]
_Share = Annotated[float, Field(ge=0, le=1)]


class _Body(_Lenient):
    """The fields of a request that this engine knows."""

    model: str | None = None
    messages: list[Any] | None = None
    prompt: str | None = None
    max_tokens: _Tokens | None = None
    max_completion_tokens: _Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=MOST_TEMPERATURE)] | None = None
    top_p: _Share | None = None
    top_k: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None = None
    min_p: _Share | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    seed: Annotated[int, Field(ge=0, lt=SEEDS)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    thinking: _Thinking | None = None
    reasoning_effort: str | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    response_format: _Format | None = None
    n: int | None = None
    stream: bool | None = None
    logprobs: bool | int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None


class RequestMaker:
    """Turns rows into requests to one model."""

    def __init__(self, tokenizer: Tokenizer, settings: BatchSettings) -> None:
        self._tokenizer, self._settings = tokenizer, settings

    def make(self, row: Row) -> Request:
        """Return what a row asks for. Raises RowError when it cannot be answered."""
        if row.problem is not None:
            raise row.problem
        body = _checked(row.body)
        _refuse_unknown(body)
        self._check_model(body.model)
        try:
            ids, thinking = self._prompt(row.kind, body)
            options = ReplyOptions(
                max_tokens=_first(
                    body.max_completion_tokens, body.max_tokens, self._settings.max_tokens
                ),
                sampling=self._sampling(row.custom_id, body),
                thinking=thinking,
                stop=self._stop(body.stop),
            )
        except LocalV4Error as error:
            raise RowError("invalid_request", error.message) from error
        job = Job(np.asarray(ids, np.int64), options)
        return Request(row.custom_id, row.digest, row.kind, job)

    def _check_model(self, name: str | None) -> None:
        """Refuse a row that was meant for another model."""
        if name is not None and name.lower() not in self._settings.names:
            raise RowError(
                "model_not_found", f"the row asks for {name[:80]!r}, not for {self._settings.model}"
            )

    def _prompt(self, kind: Kind, body: _Body) -> tuple[list[int], bool]:
        """Return the tokens of the prompt, and whether the answer begins with reasoning."""
        settings = self._settings
        if kind == "completion" or (settings.raw and body.prompt is not None):
            text = _given(body.prompt, "prompt")
            return [self._tokenizer.bos_id, *self._tokenizer.encode(text)], False
        if body.prompt is not None:
            body.messages = [{"role": "user", "content": body.prompt}]
        messages = parse_messages(self._with_head(_given(body.messages, "messages"), body))
        thinking, effort = self._thinking(body)
        level = choose_effort(effort, settings.release) if effort is not None else None
        prompt = render(messages, thinking=thinking, effort=level, release=settings.release)
        return self._tokenizer.encode_prompt(prompt), prompt.opens_reasoning

    def _with_head(self, messages: list[Any], body: _Body) -> list[Any]:
        """Add the system prompt of all rows, if the row has none, and the tools of the row."""
        tools = body.tools if body.tool_choice != "none" else None
        if not messages:
            raise RowError("invalid_request", "messages: is empty")
        first = messages[0]
        if isinstance(first, dict) and first.get("role") == "system":
            head, rest = first, messages[1:]
        else:
            head, rest = {"role": "system", "content": self._settings.system or ""}, messages
            if self._settings.system is None and not tools:
                return messages
        return [head | {"tools": tools} if tools else head, *rest]

    def _thinking(self, body: _Body) -> tuple[bool, str | None]:
        """Return whether to think, and with which effort."""
        thinking, effort = self._settings.thinking, self._settings.effort
        if body.reasoning_effort is not None:
            thinking = body.reasoning_effort != "none"
            effort = body.reasoning_effort if thinking else None
        if body.thinking is not None:
            thinking = body.thinking.type == "enabled"
        return thinking, effort if thinking else None

    def _sampling(self, custom_id: str, body: _Body) -> Sampling:
        """Return how the row chooses tokens: the same whatever else is answered beside it."""
        own = {
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
            "min_p": body.min_p,
            "repetition_penalty": body.repetition_penalty,
            "seed": _first(body.seed, seed_of(self._settings.seed, custom_id)),
        }
        changes: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
        return replace(self._settings.sampling, **changes)

    def _stop(self, given: str | list[str] | None) -> tuple[str, ...]:
        if given is None:
            return self._settings.stop
        return (given,) if isinstance(given, str) else tuple(given)


def seed_of(seed: int, custom_id: str) -> int:
    """Return the seed of a row that has none of its own."""
    text = f"{seed}\n{custom_id}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") % SEEDS


def _checked(body: dict[str, Any]) -> _Body:
    """Return the body with every field checked. Raises RowError that names the field at fault."""
    try:
        return _Body.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        field = ".".join(map(str, first["loc"][:2]))
        raise RowError("invalid_request", f"{field}: {first['msg']}") from None


def _refuse_unknown(body: _Body) -> None:
    """Refuse what would change the answer and is not supported, rather than ignore it."""
    wanted = {
        "n": body.n not in (None, 1),
        "stream": bool(body.stream),
        "logprobs": body.logprobs not in (None, False),
        "frequency_penalty": bool(body.frequency_penalty),
        "presence_penalty": bool(body.presence_penalty),
        "logit_bias": bool(body.logit_bias),
        "tool_choice": body.tool_choice not in (None, "auto", "none"),
        "response_format": body.response_format is not None and body.response_format.type != "text",
        "messages": body.messages is not None and body.prompt is not None,
    }
    for field, is_wanted in wanted.items():
        if is_wanted:
            detail = "beside prompt" if field == "messages" else "other than the default"
            raise RowError("unsupported", f"{field}: is not supported {detail}")


def _given(value: Any, field: str) -> Any:
    if value is None:
        raise RowError("invalid_request", f"{field}: is missing")
    return value


def _first(*values: int | None) -> int | None:
    """Return the first value that was given."""
    return next((value for value in values if value is not None), None)
