"""The built-in model answers as transformers does, and its quality is what its card says."""

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from measure_perplexity import token_losses

from localv4.engine.engine import Engine
from localv4.engine.growing_answer import ReplyOptions
from localv4.engine.reply import Reply
from localv4.engine.sampler import Sampling
from localv4.engine.setup import Setup
from localv4.errors import BadFileError, DoesNotFitError, NumericsError, UsageError
from localv4.library.installed import embedded_model_path
from localv4.text.messages import parse_messages
from localv4.text.prompt import render

GOLDEN = Path(__file__).parent / "golden"
REFERENCES = {
    entry["name"]: entry
    for entry in json.loads((GOLDEN / "references.json").read_text(encoding="utf-8"))
}
GREEDY = ReplyOptions(sampling=Sampling(temperature=0))


@pytest.fixture(scope="module")
def engine() -> Engine:
    """The built-in model."""
    return Engine.load(embedded_model_path(), Setup(numerics="exact"))


def answer(engine: Engine, ids: list[int], options: ReplyOptions = GREEDY) -> Reply:
    """Answer a prompt on a new timeline and exhaust the reply."""
    reply = engine.reply(engine.new_session(), ids, options)
    text = "".join(delta.text for delta in reply if delta.kind == "content")
    assert text == reply.completion.content
    return reply


@pytest.mark.parametrize("name", REFERENCES)
def test_greedy_references(engine: Engine, name: str) -> None:
    entry: dict[str, Any] = REFERENCES[name]
    options = ReplyOptions(max_tokens=entry["max_new_tokens"], sampling=Sampling(temperature=0))
    tokens = answer(engine, entry["prompt_ids"], options).token_ids
    certain = entry["certain"]
    assert tokens[:certain] == entry["output_ids"][:certain]
    if certain == len(entry["output_ids"]):
        assert tokens == entry["output_ids"]


def test_most_references_are_certain() -> None:
    whole = [e for e in REFERENCES.values() if e["certain"] == len(e["output_ids"])]
    assert len(whole) >= 21


@pytest.mark.parametrize(
    ("messages", "thinking", "name"),
    [
        ([{"role": "user", "content": "What is the capital of France?"}], False, "capital"),
        ([{"role": "user", "content": "What is 148 + 276?"}], True, "add_think"),
        (
            [
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": "What is the capital of Japan?"},
            ],
            False,
            "system",
        ),
    ],
)
def test_the_renderer_makes_the_reference_prompts(
    engine: Engine, messages: list[dict[str, str]], thinking: bool, name: str
) -> None:
    prompt = render(parse_messages(messages), thinking=thinking)
    assert engine.tokenizer.encode_prompt(prompt) == REFERENCES[name]["prompt_ids"]


def test_reasoning_is_split_from_the_answer(engine: Engine) -> None:
    options = ReplyOptions(sampling=Sampling(temperature=0), thinking=True)
    reply = answer(engine, REFERENCES["add_think"]["prompt_ids"], options)
    assert reply.completion.reasoning is not None
    assert reply.completion.reasoning.endswith("410 + 14 = 424.")
    assert reply.completion.content == "148 + 276 = 424"
    assert reply.finish_reason == "stop"


def test_tool_calls_come_out_as_calls(engine: Engine) -> None:
    reply = answer(engine, REFERENCES["tool"]["prompt_ids"])
    assert reply.finish_reason == "tool_calls"
    (call,) = reply.completion.tool_calls
    assert call.name == "search_web"
    assert json.loads(call.arguments) == {"query": "Addis Ababa"}


def test_stop_strings_and_the_token_limit(engine: Engine) -> None:
    ids = REFERENCES["capital"]["prompt_ids"]
    greedy = Sampling(temperature=0)
    stopped = answer(engine, ids, ReplyOptions(sampling=greedy, stop=("France is",)))
    assert (stopped.completion.content, stopped.finish_reason) == ("The capital of ", "stop")
    cut = answer(engine, ids, ReplyOptions(max_tokens=3, sampling=greedy))
    assert (cut.completion.content, cut.finish_reason) == ("The capital of", "length")
    assert cut.stats.generated_tokens == 3


def test_a_seed_makes_a_sample_repeatable(engine: Engine) -> None:
    ids = REFERENCES["fox"]["prompt_ids"]
    hot = [
        answer(engine, ids, ReplyOptions(20, Sampling(temperature=1.5, seed=seed))).token_ids
        for seed in (1, 1, 2, 3)
    ]
    assert hot[0] == hot[1]
    assert len({tuple(tokens) for tokens in hot}) == 3


def test_a_continued_dialogue_reuses_its_prefix(engine: Engine) -> None:
    ids = REFERENCES["multi"]["prompt_ids"]
    session = engine.new_session()
    first = engine.reply(session, ids[:8], GREEDY)
    assert list(first) and first.stats.reused_tokens == 0
    second = engine.reply(session, ids, GREEDY)
    list(second)
    assert second.stats.reused_tokens >= 8
    assert second.token_ids == REFERENCES["multi"]["output_ids"]


def test_cancelling_keeps_what_was_said(engine: Engine) -> None:
    cancelled, session = threading.Event(), engine.new_session()
    reply = engine.reply(session, REFERENCES["fox"]["prompt_ids"], GREEDY, cancelled=cancelled)
    pieces = []
    for delta in reply:
        pieces.append(delta.text)
        if len(pieces) == 5:
            cancelled.set()
    assert reply.finish_reason == "cancelled"
    assert reply.completion.content == "".join(pieces)
    assert 5 <= len(reply.token_ids) < 20


def test_prompts_that_do_not_fit(engine: Engine) -> None:
    ids = [5] * engine.ctx_size
    with pytest.raises(DoesNotFitError, match="leaves no room"):
        engine.reply(engine.new_session(), ids, GREEDY)
    with pytest.raises(UsageError, match="max-tokens"):
        engine.reply(engine.new_session(), ids[:5], ReplyOptions(max_tokens=0))


def test_a_context_filled_to_the_last_token(engine: Engine) -> None:
    small = Engine(engine.checkpoint, engine.network, 12)
    small.tokenizer = engine.tokenizer
    reply = answer(small, REFERENCES["capital"]["prompt_ids"])
    assert (reply.finish_reason, reply.stats.generated_tokens) == ("length", 1)


@pytest.mark.parametrize("ctx_size", [0, -5])
def test_a_context_must_be_positive(ctx_size: int) -> None:
    with pytest.raises(UsageError, match="--ctx-size"):
        Engine.load(embedded_model_path(), Setup(ctx_size=ctx_size))


def test_a_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(DoesNotFitError, match="4096"):
        Engine.load(embedded_model_path(), Setup(ctx_size=10**9))


@pytest.mark.parametrize("threads", [0, -1, 10**6])
def test_the_number_of_threads_is_checked(threads: int) -> None:
    with pytest.raises(UsageError, match="--threads"):
        Engine.load(embedded_model_path(), Setup(threads=threads))


def copy_of_the_model(folder: Path) -> Path:
    """A copy that a test may damage."""
    for file in embedded_model_path().iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_a_nan_in_the_weights_ends_in_an_error(tmp_path: Path) -> None:
    folder = copy_of_the_model(tmp_path)
    engine = Engine.load(folder)
    tensor = engine.checkpoint.tensors["layers.5.attn.wkv.scale"]
    engine.checkpoint.close()
    with engine.checkpoint.files[tensor.file].open("r+b") as file:
        file.seek(tensor.offset)
        file.write(b"\xff" * tensor.nbytes)
    with pytest.raises(NumericsError):
        answer(Engine.load(folder), REFERENCES["capital"]["prompt_ids"])


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    folder = copy_of_the_model(tmp_path)
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    last = document["added_tokens"][-1]
    document["added_tokens"].append({**last, "id": 8192, "content": "<more>"})
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(BadFileError, match="8193 tokens, the model 8192"):
        _ = Engine.load(folder).tokenizer


def test_a_file_that_shrinks_while_in_use_is_noticed(tmp_path: Path) -> None:
    engine = Engine.load(copy_of_the_model(tmp_path))
    assert engine.tokenizer.eos_id == 1
    file = engine.checkpoint.files[0]
    with file.open("r+b") as shrinking:
        shrinking.truncate(file.stat().st_size - 4096)
    with pytest.raises(BadFileError, match=file.name):
        engine.reply(engine.new_session(), [0, 5], GREEDY)


def test_logits_do_not_depend_on_the_chunk(engine: Engine) -> None:
    ids = REFERENCES["needle_captain_500"]["prompt_ids"][:150]
    whole = np.concatenate(list(engine.logits(ids)))
    for chunk in (1, 13):
        assert np.array_equal(np.concatenate(list(engine.logits(ids, chunk=chunk))), whole)


def test_logits_come_in_parts_of_bounded_size(engine: Engine) -> None:
    parts = [part.shape[0] for part in engine.logits([5] * 600, chunk=10**6)]
    assert parts == [256, 256, 88]


def test_perplexity_of_the_first_held_out_windows(engine: Engine) -> None:
    # the numbers that transformers measured for these windows of the model's held-out book text
    reference = json.loads((GOLDEN / "perplexity.json").read_text(encoding="utf-8"))
    ids = engine.tokenizer.encode((GOLDEN / "heldout.txt").read_text(encoding="utf-8"))
    for size, nll in reference["first_window_nll"].items():
        window = [engine.tokenizer.bos_id, *ids[: int(size) - 1]]
        assert len(window) == int(size)
        ours = float(np.exp(token_losses(engine, window).mean()))
        assert ours == pytest.approx(np.exp(nll), rel=1e-3)
