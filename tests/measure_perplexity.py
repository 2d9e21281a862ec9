"""Measure a model's perplexity on held-out texts, and how far `fast` differs from `exact` there.

    python tests/measure_perplexity.py MODEL EVAL_FOLDER [REFERENCE.json]
    python tests/measure_perplexity.py MODEL EVAL_FOLDER --numerics fast \\
        [--tokenizer FOLDER] [--windows 1024]

EVAL_FOLDER holds heldout.txt, heldout_chat.txt and heldout_stories.txt. `exact` is compared with a
reference (default: EVAL_FOLDER/reference.json), which states the protocol that this follows; `fast`
with `exact`, also in answers to the prompts of the recorded generations. Takes minutes.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localv4.engine.engine import Engine
from localv4.engine.growing_answer import ReplyOptions
from localv4.engine.sampler import Sampling
from localv4.engine.setup import NumericsName, Setup
from localv4.text.pieces import Piece, Prompt
from localv4.text.tokenizer import Tokenizer

STORY_TOKENS = 511  # the references cut longer stories
WINDOWS = (256, 1024, 2048)
GENERATIONS = Path(__file__).parent / "golden" / "references.json"


@dataclass(frozen=True, slots=True)
class Scores:
    """What engines make of the same targets: losses and likeliest tokens (engines, targets)."""

    losses: NDArray[np.float64]
    likeliest: NDArray[np.int64]
    targets: NDArray[np.int64]

    @property
    def perplexities(self) -> NDArray[np.float64]:
        """One for each engine."""
        perplexities: NDArray[np.float64] = np.exp(self.losses.mean(1))
        return perplexities

    @property
    def hits(self) -> NDArray[np.float64]:
        """Share of targets that are the likeliest token, for each engine."""
        share: NDArray[np.float64] = (self.likeliest == self.targets).mean(1)
        return share

    @property
    def difference(self) -> str:
        """How much higher the perplexity of the last engine is than that of the first, in percent.

        With the standard error that follows from the spread of the tokens' differences.
        """
        first, last = self.perplexities[[0, -1]]
        error = (self.losses[-1] - self.losses[0]).std() / np.sqrt(len(self.targets))
        return f"{100 * (last / first - 1):+.3f} % ± {100 * error:.3f}"

    @property
    def agreement(self) -> float:
        """Share of targets where the first and the last engine have the same likeliest token."""
        return float((self.likeliest[0] == self.likeliest[-1]).mean())


@dataclass(frozen=True, slots=True)
class Part:
    """A sequence of tokens; `counted` (len(ids) - 1,) says which of its targets count."""

    ids: list[int]
    counted: NDArray[np.bool_]

    @classmethod
    def whole(cls, ids: list[int]) -> "Part":
        """Every token but the first counts."""
        return cls(ids, np.ones(len(ids) - 1, np.bool_))


def part_scores(engines: Sequence[Engine], part: Part) -> Scores:
    """Return the scores of all engines for a sequence."""
    targets = np.asarray(part.ids[1:], np.int64)
    losses: list[list[NDArray[np.float64]]] = [[] for _ in engines]
    likeliest: list[list[NDArray[np.int64]]] = [[] for _ in engines]
    for number, engine in enumerate(engines):
        done = 0
        for logits in engine.logits(part.ids):
            some = targets[done : done + len(logits)]
            wide = logits[: len(some)].astype(np.float64)
            top = wide.max(1)
            norm = top + np.log(np.exp(wide - top[:, None]).sum(1))
            losses[number].append(norm - wide[np.arange(len(some)), some])
            likeliest[number].append(wide.argmax(1))
            done += len(logits)
    return Scores(
        np.stack([np.concatenate(own)[part.counted] for own in losses]),
        np.stack([np.concatenate(own)[part.counted] for own in likeliest]),
        targets[part.counted],
    )


def scores(engines: Sequence[Engine], parts: Sequence[Part]) -> Scores:
    """Return the scores of all engines for all targets that count in a text."""
    found = [part_scores(engines, part) for part in parts]
    return Scores(
        np.concatenate([one.losses for one in found], 1),
        np.concatenate([one.likeliest for one in found], 1),
        np.concatenate([one.targets for one in found]),
    )


def token_losses(engine: Engine, ids: Sequence[int]) -> NDArray[np.float64]:
    """Return -log p of every token but the first, float64 (len(ids) - 1,)."""
    losses: NDArray[np.float64] = part_scores([engine], Part.whole(list(ids))).losses[0]
    return losses


def book(tokenizer: Tokenizer, folder: Path, size: int) -> list[Part]:
    """Return windows of size - 1 tokens, each behind a BOS; the rest of the text is dropped."""
    ids = tokenizer.encode((folder / "heldout.txt").read_text(encoding="utf-8"))
    starts = range(0, len(ids) - size + 2, size - 1)
    return [Part.whole([tokenizer.bos_id, *ids[at : at + size - 1]]) for at in starts]


def stories(tokenizer: Tokenizer, folder: Path) -> list[Part]:
    """Return the stories, one per paragraph block, each behind a BOS."""
    text = (folder / "heldout_stories.txt").read_text(encoding="utf-8")
    tokens = [tokenizer.encode(story.strip()) for story in text.split("\n\n")]
    return [Part.whole([tokenizer.bos_id, *ids[:STORY_TOKENS]]) for ids in tokens if ids]


def chat(tokenizer: Tokenizer, folder: Path) -> list[Part]:
    """Return dialogues, one per line, of which the assistant's tokens count, end mark included."""
    assistant = tokenizer.special_id("<｜Assistant｜>")
    lines = (folder / "heldout_chat.txt").read_text(encoding="utf-8").splitlines()
    parts = []
    for line in filter(None, lines):
        text = line.replace("\\n", "\n")
        ids = tokenizer.encode_prompt(Prompt((Piece(text, trusted=True),)))
        counted, speaking = np.zeros(len(ids) - 1, np.bool_), False
        for at in range(len(ids) - 1):
            # the mark after <｜Assistant｜> is given, everything after it up to EOS is predicted
            if at > 0 and ids[at - 1] == assistant:
                speaking = True
            counted[at] = speaking
            speaking = speaking and ids[at + 1] != tokenizer.eos_id
        parts.append(Part(ids, counted))
    return parts


def texts(
    tokenizer: Tokenizer, folder: Path, sizes: Sequence[int] = WINDOWS
) -> Iterator[tuple[str, list[Part]]]:
    """Yield all texts of the protocol with their names."""
    for size in sizes:
        yield f"book, windows of {size}", book(tokenizer, folder, size)
    yield "stories", stories(tokenizer, folder)
    yield "chat, assistant tokens", chat(tokenizer, folder)


def compare_with_reference(engine: Engine, folder: Path, path: Path) -> None:
    """Print a table: ours, reference, difference in percent."""
    reference = json.loads(path.read_text(encoding="utf-8"))
    print("| text | exact | reference | difference |\n|---|---|---|---|")
    for name, parts in texts(engine.tokenizer, folder):
        found = scores([engine], parts)
        ours, wanted = float(found.perplexities[0]), _recorded(reference, name)["ppl"]
        off = 100 * (ours / wanted - 1)
        print(f"| {name} | {ours:.5f} | {wanted:.5f} | {off:+.4f} % |", flush=True)
        if "chat" in name:
            ours, wanted = float(found.hits[0]), reference["chat_assistant"]["top1"]
            print(f"| chat, top-1 | {ours:.2%} | {wanted:.2%} | {100 * (ours - wanted):+.2f} |")


def _recorded(reference: dict[str, dict[str, dict[str, float]]], name: str) -> dict[str, float]:
    """Return what a reference says of a text."""
    if name.startswith("book"):
        return reference["windows"][name.rsplit(" ", 1)[1]]
    found: dict[str, float] = reference["stories_ppl" if name == "stories" else "chat_assistant"]  # type: ignore[assignment]
    return found


def compare_numerics(exact: Engine, fast: Engine, folder: Path, sizes: Sequence[int]) -> None:
    """Print a table: perplexities in both arithmetics, and how often the likeliest token agrees."""
    print("| text | exact | fast | difference | same likeliest token |\n|---|---|---|---|---|")
    agreeing, targets = 0.0, 0
    for name, parts in texts(exact.tokenizer, folder, sizes):
        found = scores([exact, fast], parts)
        first, second = found.perplexities
        numbers = f"{first:.5f} | {second:.5f} | {found.difference}"
        print(f"| {name} | {numbers} | {found.agreement:.2%} |", flush=True)
        agreeing += found.agreement * len(found.targets)
        targets += len(found.targets)
        if "chat" in name:
            first, second = found.hits
            print(f"| chat, top-1 | {first:.2%} | {second:.2%} | {100 * (second - first):+.2f} | |")
    print(f"\nsame likeliest token: {agreeing / targets:.2%} of {targets} positions", flush=True)


def answer(engine: Engine, ids: list[int], most: int) -> list[int]:
    """Return the greedy answer to a prompt, of at most so many tokens."""
    options = ReplyOptions(max_tokens=most, sampling=Sampling(temperature=0))
    reply = engine.reply(engine.new_session(), ids, options)
    for _ in reply:
        pass
    return reply.token_ids


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the common prefix."""
    shared = (x == y for x, y in zip(a, b, strict=False))
    return next((at for at, same in enumerate(shared) if not same), min(len(a), len(b)))


def compare_generations(exact: Engine, fast: Engine, path: Path) -> None:
    """Print how many greedy answers are the same, and for the others where they part."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    identical, as_recorded, shared, total = 0, 0, 0, 0
    for entry in entries:
        ids, most = entry["prompt_ids"], entry["max_new_tokens"]
        first, second = answer(exact, ids, most), answer(fast, ids, most)
        identical += first == second
        as_recorded += second == entry["output_ids"]
        shared += common(first, second)
        total += len(first)
        if first != second:
            parts_at = f"{common(first, second)} of {len(first)} tokens"
            print(f"{entry['name']}: {parts_at} in common", flush=True)
    print(f"same answer in fast as in exact: {identical} of {len(entries)}")
    print(f"same answer in fast as recorded: {as_recorded} of {len(entries)}")
    print(f"tokens before the first difference: {shared} of {total}")


def load(path: Path, tokenizer: Path | None, numerics: NumericsName) -> Engine:
    """Open a model with two threads, if asked for with the tokenizer of another folder."""
    engine = Engine.load(path, Setup(threads=2, numerics=numerics))
    if engine.network.name != numerics:
        raise SystemExit(f"{path} does not run in {numerics}")
    if tokenizer is not None:
        engine.tokenizer = Tokenizer.from_file(tokenizer / "tokenizer.json")
    return engine


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path, metavar="EVAL_FOLDER")
    parser.add_argument("reference", type=Path, nargs="?")
    parser.add_argument("--numerics", choices=("exact", "fast"), default="exact")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer.json")
    parser.add_argument("--generations", type=Path, default=GENERATIONS)
    parser.add_argument("--windows", type=int, nargs="+", default=WINDOWS, help="of the book")
    given = parser.parse_args()
    exact = load(given.model, given.tokenizer, "exact")
    if given.numerics == "exact":
        path = given.reference or given.folder / "reference.json"
        compare_with_reference(exact, given.folder, path)
        return
    fast = load(given.model, given.tokenizer, "fast")
    compare_numerics(exact, fast, given.folder, given.windows)
    compare_generations(exact, fast, given.generations)


if __name__ == "__main__":
    main()
