"""Rows that decode together say what they say alone, whoever comes, goes, waits or shares."""

import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from terminal import needs_jit

from localv4.engine import batching
from localv4.engine.batch_prefixes import LEAST_SHARED, MOST_TRUNKS, Prefixes
from localv4.engine.batch_rows import Job
from localv4.engine.batching import Batcher, Outcome
from localv4.engine.engine import Engine
from localv4.engine.growing_answer import ReplyOptions
from localv4.engine.ladder import Ladder
from localv4.engine.sampler import Sampling
from localv4.engine.session import remedy
from localv4.engine.setup import Setup
from localv4.errors import Cancelled, DoesNotFitError, NumericsError
from localv4.kernels.row_operations import COMPACT, F32
from localv4.library.installed import embedded_model_path
from localv4.model.rungs import STEP_TOKENS
from localv4.model.snapshot import Snapshot
from localv4.planning.model_facts import held_state_bytes
from localv4.text.prompt import parse_messages, render

pytestmark = needs_jit

QUESTIONS = (
    "What is the capital of France?",
    "What is 148 + 276?",
    "My name is Anna. What is my name?",
    "Once upon a time",
    "Hi",
    "What is the capital of Spain?",
)
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """The built-in model."""
    loaded = Engine.load(embedded_model_path(), Setup(ctx_size=600, threads=2))
    yield loaded


def job(engine: Engine, text: str, max_tokens: int = 24, sampling: Sampling = GREEDY) -> Job:
    """A question to the model."""
    prompt = render(parse_messages([{"role": "user", "content": text}]), thinking=False)
    ids = np.array(engine.tokenizer.encode_prompt(prompt), np.int64)
    return Job(ids, ReplyOptions(max_tokens=max_tokens, sampling=sampling))


def alone(engine: Engine, asked: Job) -> list[int]:
    """The tokens of a reply that nothing else is computed beside."""
    reply = engine.reply(engine.new_session(), asked.prompt_ids.tolist(), asked.options)
    for _ in reply:
        pass
    return reply.token_ids


def drain(batcher: Batcher, jobs: list[Job]) -> dict[Job, Outcome]:
    """Submit jobs and work until all have ended."""
    for asked in jobs:
        batcher.submit(asked)
    outcomes = []
    while not batcher.is_idle:
        outcomes += batcher.step()
    assert len(outcomes) == len(jobs)
    return {outcome.job: outcome for outcome in outcomes}


def tokens(outcome: Outcome) -> list[int]:
    """The tokens of an answer that there must be."""
    assert outcome.answer is not None and outcome.error is None
    return list(outcome.answer.token_ids)


@pytest.mark.parametrize("most_rows", [1, 2, 5, 64])
def test_rows_equal_lone_replies(engine: Engine, most_rows: int) -> None:
    jobs = [job(engine, text, max_tokens=3 + 7 * i) for i, text in enumerate(QUESTIONS)]
    batcher = Batcher(engine, most_rows)
    ended = drain(batcher, jobs)
    for asked in jobs:
        assert tokens(ended[asked]) == alone(engine, asked)
    assert (batcher.stats.rows_per_step > 1.0) is (most_rows > 1)
    assert batcher.stats.decoded_tokens == sum(len(tokens(o)) for o in ended.values())


def test_short_prompts_are_read_together(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    network, chunks = engine.network, []
    forward = network.forward_many

    def noted(ids: np.ndarray, states: list[object], counts: list[int], wanted: int) -> np.ndarray:
        chunks.append(list(counts))
        return forward(ids, states, counts, wanted)  # type: ignore[arg-type]

    monkeypatch.setattr(network, "forward_many", noted)
    monkeypatch.setattr(network, "chunk_tokens", 40)
    jobs = [job(engine, text, max_tokens=8) for text in QUESTIONS]
    ended = drain(Batcher(engine, len(jobs)), jobs)
    lengths = [len(asked.prompt_ids) - 1 for asked in jobs]
    assert sum(map(sum, chunks)) == sum(lengths)
    assert max(map(len, chunks)) > 1 and max(map(sum, chunks)) == 40 < sum(lengths)
    assert [tokens(ended[asked]) for asked in jobs] == [alone(engine, asked) for asked in jobs]


def test_prompts_that_get_no_memory_wait(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [job(engine, text, max_tokens=8) for text in QUESTIONS]
    forward, refused = engine.network.forward_many, []

    def short_of_memory(
        ids: np.ndarray, states: list[object], counts: list[int], wanted: int
    ) -> np.ndarray:
        if len(states) > 2:
            refused.append(len(states))
            raise MemoryError
        return forward(ids, states, counts, wanted)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.network, "forward_many", short_of_memory)
    batcher = Batcher(engine, len(jobs))
    ended = drain(batcher, jobs)
    assert refused == [6, 5, 4, 3] and batcher.stats.paused == 4
    monkeypatch.undo()
    assert [tokens(ended[asked]) for asked in jobs] == [alone(engine, asked) for asked in jobs]


def test_sampled_rows_do_not_depend_on_their_company(engine: Engine) -> None:
    jobs = [
        job(engine, text, sampling=Sampling(temperature=1.5, seed=i, repetition_penalty=1.3))
        for i, text in enumerate(QUESTIONS * 2)
    ]
    forwards = drain(Batcher(engine, 4), jobs)
    backwards = drain(Batcher(engine, 7), jobs[::-1])
    for asked in jobs:
        expected = alone(engine, asked)
        assert tokens(forwards[asked]) == tokens(backwards[asked]) == expected
    assert len({tuple(tokens(outcome)) for outcome in forwards.values()}) > len(QUESTIONS)


def test_exact_arithmetic() -> None:
    engine = Engine.load(embedded_model_path(), Setup(ctx_size=600, threads=2, numerics="exact"))
    jobs = [job(engine, text, max_tokens=6) for text in QUESTIONS[:3]]
    ended = drain(Batcher(engine, 8), jobs)
    assert [tokens(ended[asked]) for asked in jobs] == [alone(engine, asked) for asked in jobs]


SYSTEM = "You are a helpful assistant. " * 20


def test_a_common_beginning_is_processed_once(engine: Engine) -> None:
    jobs = [job(engine, SYSTEM + text, max_tokens=8) for text in QUESTIONS]
    batcher = Batcher(engine, 4)
    ended = drain(batcher, jobs)
    assert [tokens(ended[asked]) for asked in jobs] == [alone(engine, asked) for asked in jobs]
    processed = batcher.stats.read_tokens + batcher.stats.reused_tokens
    assert processed == sum(len(asked.prompt_ids) - 1 for asked in jobs)
    shared = len(job(engine, SYSTEM).prompt_ids) - 5
    assert batcher.stats.reused_tokens >= (len(jobs) - 1) * shared


def test_two_beginnings_in_turns(engine: Engine) -> None:
    other = "Translate what follows. " * 20
    jobs = [
        job(engine, (SYSTEM if i % 2 else other) + text, max_tokens=4)
        for i, text in enumerate(QUESTIONS * 2)
    ]
    batcher = Batcher(engine, 2)
    ended = drain(batcher, jobs)
    assert [tokens(ended[asked]) for asked in jobs] == [alone(engine, asked) for asked in jobs]
    assert batcher.stats.reused_tokens > batcher.stats.read_tokens


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 180), st.integers(0, 40)),
        min_size=2,
        max_size=8,
    )
)
def test_any_prompts_end_in_the_state_of_a_clean_run(
    engine: Engine, shapes: list[tuple[int, int, int]]
) -> None:
    prompts = [
        np.array([1 + family] * common + [100 + i] * own + [7], np.int64)
        for i, (family, common, own) in enumerate(shapes)
    ]
    prefixes = Prefixes(engine.new_session)
    for index, ids in enumerate(prompts):
        start = prefixes.start(ids, prompts[index + 1 :])
        session = start.session
        assert session.tokens == ids[: session.position].tolist()
        if start.shared:
            assert session.position <= start.shared and start.shared >= LEAST_SHARED
            if session.position < start.shared:
                session.extend(ids[session.position : start.shared].tolist())
            session = session.fork()
        rest = [*ids[session.position :].tolist(), 9]
        clean = engine.new_session()
        assert np.array_equal(session.extend(rest), clean.extend([*ids.tolist(), 9]))
        assert len(prefixes._trunks) <= MOST_TRUNKS


def test_rows_join_and_leave_at_every_token(engine: Engine) -> None:
    batcher = Batcher(engine, 8)
    long, short = job(engine, "Once upon a time", 40), job(engine, "Hi", 2)
    batcher.submit(long)
    batcher.step()
    batcher.submit(short)
    early = [outcome.job for _ in range(4) for outcome in batcher.step()]
    assert early == [short] and not batcher.is_idle


def test_running_rows_go_on_while_prompts_are_read(engine: Engine) -> None:
    batcher = Batcher(engine, 2)
    batcher.submit(job(engine, "Hi", 500, Sampling(temperature=100.0, seed=3)))
    batcher.step()
    for index in range(20):
        batcher.submit(job(engine, f"{index} {SYSTEM}", 1))
    before = batcher.stats.steps
    for _ in range(10):
        batcher.step()
    assert batcher.stats.steps == before + 10


def test_a_prompt_that_fills_the_context_fails_alone(engine: Engine) -> None:
    good, bad = job(engine, "Hi"), job(engine, "word " * 700)
    ended = drain(Batcher(engine, 4), [bad, good])
    assert isinstance(ended[bad].error, DoesNotFitError) and ended[bad].answer is None
    assert tokens(ended[good]) == alone(engine, good)


def test_rows_wait_for_memory_and_pause_for_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [job(engine, text, max_tokens=30, sampling=Sampling(seed=1)) for text in QUESTIONS]
    state = engine.new_session().state_bytes
    narrow = Batcher(engine, 8, room=1)
    ended = drain(narrow, jobs)
    assert narrow.stats.rows_per_step == 1.0
    assert [tokens(ended[asked]) for asked in jobs] == [alone(engine, asked) for asked in jobs]

    monkeypatch.setattr(batching, "MEASURED_STEPS", 2)
    shrinking = Batcher(engine, 8)
    for asked in jobs:
        shrinking.submit(asked)
    outcomes = [outcome for _ in range(7) for outcome in shrinking.step()]
    shrinking._room = 2 * state
    while not shrinking.is_idle:
        outcomes += shrinking.step()
    assert shrinking.stats.paused > 0
    assert {o.job: tokens(o) for o in outcomes} == {a: alone(engine, a) for a in jobs}


def test_rows_join_by_the_bytes_of_their_format(engine: Engine) -> None:
    batcher = Batcher(engine, 4)
    asked = [job(engine, text, 24) for text in QUESTIONS[:3]]
    for each in asked:
        batcher.submit(each)
    batcher.step()
    assert len(batcher._running) == 3
    for row in batcher._running:
        tokens = len(row.ids_before) + row.budget
        assert tokens - 24 <= row.planned_tokens <= tokens
    tokens = sum(len(row.ids_before) + row.budget for row in batcher._running)
    rings = held_state_bytes(engine.config, 0, COMPACT)
    most = held_state_bytes(engine.config, tokens, COMPACT) + 2 * rings
    assert 3 * rings < batcher._held <= most


def test_memory_that_runs_out_costs_no_row(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [job(engine, text, max_tokens=12) for text in QUESTIONS]
    expected = [alone(engine, asked) for asked in jobs]
    network, calls = engine.network, []
    decode = network.decode_rows

    def short_of_memory(ids: np.ndarray, states: list[object]) -> np.ndarray:
        calls.append(len(states))
        if len(states) > 2:
            raise MemoryError
        return decode(ids, states)  # type: ignore[arg-type]

    monkeypatch.setattr(network, "decode_rows", short_of_memory)
    batcher = Batcher(engine, 8)
    ended = drain(batcher, jobs)
    assert [tokens(ended[asked]) for asked in jobs] == expected
    assert max(calls) > 2 and batcher.stats.paused > 0


def test_a_lone_prompt_without_memory_is_told_what_helps(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, wanted: int) -> None:
        raise MemoryError

    monkeypatch.setattr(engine.network, "forward_many", full)
    asked = job(engine, "Hi")
    error = drain(Batcher(engine, 2), [asked])[asked].error
    assert isinstance(error, DoesNotFitError) and "out of memory in a prompt of" in error.message
    assert error.hint is not None and "--ram" in error.hint and "--kv" not in error.hint
    monkeypatch.setattr(type(engine.network), "rows", F32)
    assert "--kv compact" in remedy(engine.network)


def test_bad_logits_end_one_row_only(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [job(engine, text, max_tokens=12) for text in QUESTIONS[:3]]
    expected = [alone(engine, asked) for asked in jobs]
    batcher = Batcher(engine, 8)
    for asked in jobs:
        batcher.submit(asked)
    outcomes = [outcome for _ in range(4) for outcome in batcher.step()]
    sick = batcher._running[0]
    monkeypatch.setattr(sick._answer._sampler, "pick", _raise_numerics_error)
    while not batcher.is_idle:
        outcomes += batcher.step()
    ended = {outcome.job: outcome for outcome in outcomes}
    for asked, wanted in zip(jobs, expected, strict=True):
        if asked is sick.job:
            assert isinstance(ended[asked].error, NumericsError)
        else:
            assert tokens(ended[asked]) == wanted


def _raise_numerics_error(*_: object) -> int:
    raise NumericsError("the model computed NaN instead of logits")


def test_cancelled_between_layers(engine: Engine) -> None:
    cancelled = threading.Event()
    batcher = Batcher(engine, 4, cancelled=cancelled)
    batcher.submit(job(engine, "Once upon a time", 50))
    batcher.submit(job(engine, "Hi", 50, Sampling(seed=1)))
    batcher.step()
    cancelled.set()
    with pytest.raises(Cancelled):
        batcher.step()
    assert engine.network.cancelled is None


@pytest.mark.parametrize("together", [True, False])
def test_no_snapshots_are_taken_of_rows(
    together: bool, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where prompts are read together nor where each is read for itself."""
    monkeypatch.setattr(engine.network, "reads_together", together)
    taken: list[Snapshot] = []
    monkeypatch.setattr(Ladder, "add", lambda _, rung: taken.append(rung))
    asked = job(engine, SYSTEM * 2, 50)
    assert len(asked.prompt_ids) > STEP_TOKENS
    batcher = Batcher(engine, 4)
    batcher.submit(asked)
    batcher.step()
    assert len(batcher._running) == 1 and not taken
    engine.new_session().read(asked.prompt_ids.tolist())
    assert taken


def test_stop_strings(engine: Engine) -> None:
    plain = job(engine, QUESTIONS[0])
    stopped = Job(plain.prompt_ids, replace(plain.options, stop=(" of",)))
    answer = drain(Batcher(engine, 2), [stopped])[stopped].answer
    assert answer is not None
    assert (answer.completion.content, answer.finish_reason) == ("The capital", "stop")
