"""Measure a model's perplexity on held-out texts and compare it with recorded references.

    python tests/measure_perplexity.py MODEL EVAL_FOLDER [REFERENCE.json]

EVAL_FOLDER holds heldout.txt, heldout_chat.txt and heldout_stories.txt; the reference (default:
EVAL_FOLDER/reference.json) states the protocol that this follows. Takes minutes.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from localv4.engine.engine import Engine
from localv4.text.pieces import Piece, Prompt

STORY_TOKENS = 511  # the references cut longer stories


def token_losses(engine: Engine, ids: Sequence[int]) -> np.ndarray:
    """Return -log p of every token but the first, float64 (len(ids) - 1,)."""
    losses = []
    done = 0
    for logits in engine.logits(ids):
        wide = logits.astype(np.float64)
        top = wide.max(1)
        norm = top + np.log(np.exp(wide - top[:, None]).sum(1))
        targets = np.asarray(ids[done + 1 : done + 1 + len(wide)], np.int64)
        losses.append(norm[: len(targets)] - wide[np.arange(len(targets)), targets])
        done += len(wide)
    return np.concatenate(losses)


def windows(engine: Engine, text: str, size: int) -> Iterator[list[int]]:
    """Yield consecutive windows of size - 1 tokens, each behind a BOS; the last part is dropped."""
    ids = engine.tokenizer.encode(text)
    for start in range(0, len(ids) - size + 2, size - 1):
        yield [engine.tokenizer.bos_id, *ids[start : start + size - 1]]


def book_nll(engine: Engine, text: str, size: int) -> float:
    """Return the mean loss over all windows."""
    return float(np.mean([token_losses(engine, ids).mean() for ids in windows(engine, text, size)]))


def stories_ppl(engine: Engine, text: str) -> float:
    """Return the perplexity of stories, one per paragraph block, each behind a BOS."""
    stories = [engine.tokenizer.encode(story.strip()) for story in text.split("\n\n")]
    bos = engine.tokenizer.bos_id
    losses = [token_losses(engine, [bos, *ids[:STORY_TOKENS]]) for ids in stories if ids]
    return float(np.exp(np.concatenate(losses).mean()))


def chat_ppl(engine: Engine, lines: Sequence[str]) -> tuple[float, float]:
    """Return (perplexity, share of top-1 hits) of the assistant's tokens, end mark included."""
    assistant = engine.tokenizer.special_id("<｜Assistant｜>")
    losses, hits = [], []
    for line in lines:
        text = line.replace("\\n", "\n")
        ids = engine.tokenizer.encode_prompt(Prompt((Piece(text, trusted=True),)))
        logits = np.concatenate(list(engine.logits(ids))).astype(np.float64)
        speaking = False
        for at in range(len(ids) - 1):
            # the mark after <｜Assistant｜> is given, everything after it up to EOS is predicted
            if at > 0 and ids[at - 1] == assistant:
                speaking = True
            if speaking:
                row = logits[at]
                losses.append(row.max() + np.log(np.exp(row - row.max()).sum()) - row[ids[at + 1]])
                hits.append(int(row.argmax()) == ids[at + 1])
                speaking = ids[at + 1] != engine.tokenizer.eos_id
    return float(np.exp(np.mean(losses))), float(np.mean(hits))


def main() -> None:
    """Print one line per measurement: ours, reference, difference in percent."""
    engine = Engine.load(Path(sys.argv[1]))
    folder = Path(sys.argv[2])
    reference = json.loads(Path(*sys.argv[3:4] or [folder / "reference.json"]).read_text())
    book = (folder / "heldout.txt").read_text(encoding="utf-8")
    for size, wanted in reference["windows"].items():
        start = time.perf_counter()
        ours = float(np.exp(book_nll(engine, book, int(size))))
        report(f"book, windows of {size}", ours, wanted["ppl"], time.perf_counter() - start)
    stories = (folder / "heldout_stories.txt").read_text(encoding="utf-8")
    report("stories", stories_ppl(engine, stories), reference["stories_ppl"]["ppl"], 0.0)
    lines = (folder / "heldout_chat.txt").read_text(encoding="utf-8").splitlines()
    ppl, top1 = chat_ppl(engine, [line for line in lines if line])
    report("chat, assistant tokens", ppl, reference["chat_assistant"]["ppl"], 0.0)
    report("chat, top-1", top1, reference["chat_assistant"]["top1"], 0.0)


def report(name: str, ours: float, wanted: float, seconds: float) -> None:
    """Print one comparison."""
    off = 100 * (ours / wanted - 1)
    print(f"{name}: {ours:.5f}, reference {wanted:.5f}, {off:+.4f} % ({seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
