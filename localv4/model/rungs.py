"""Where snapshots of a timeline stand, how many they are, and what they take.

The rule: rungs stand at multiples of 128 tokens; every one is put up, and those are taken down that
are not needed for this: between a rung that is d tokens behind the tip of the timeline and the next
one below it there are no more than max(128, d / 2) tokens. So going back d tokens leaves fewer than
max(128, d / 2) to process anew. The distances of every second rung grow by half or more, so that T
tokens have at most 6 + 3.5 log2(T / 256) rungs, and 27 at a million where they can be anywhere.

The rungs next to the ends of the last prompts stay whatever the rule says: a question that is asked
anew or changed is the most common way back, however long its answer was.
"""

import bisect
from collections.abc import Sequence

from localv4.model.config import ModelConfig
from localv4.model.matrix import F32
from localv4.model.rings import ring_shapes
from localv4.model.state import SLACK_TOKENS

STEP_TOKENS = 128
"""Rungs stand at its multiples: there the released models have no unfinished entries."""

KEPT_PROMPTS = 8
"""Ends of prompts whose rungs are kept."""


def allowed_gap(back: int) -> int:
    """Return how far below a rung the next may be, when it is `back` tokens behind the tip.

    It grows as the timeline does, so that what is taken down is not missed later.
    """
    return max(STEP_TOKENS, back // 2)


def last_step(position: int) -> int:
    """Return the last multiple of STEP_TOKENS that is not beyond `position`."""
    return position // STEP_TOKENS * STEP_TOKENS


def wanted_rungs(position: int, tip: int) -> list[int]:
    """Return where a timeline that goes from `position` to `tip` at once wants rungs."""
    steps = range(last_step(position) + STEP_TOKENS, tip + 1, STEP_TOKENS)
    return sorted(needed_rungs(steps, tip))


def needed_rungs(positions: Sequence[int], tip: int) -> set[int]:
    """Return those of some ascending positions that a timeline that ends at `tip` needs."""
    index, needed = len(positions) - 1, set[int]()
    while index >= 0:
        place = positions[index]
        needed.add(place)
        lowest = bisect.bisect_left(positions, place - allowed_gap(tip - place))
        index = min(lowest, index - 1)
    return needed


def most_rungs(tokens: int, chunk: int) -> int:
    """Return how many rungs to expect of a conversation of `tokens`, at most.

    They are those of one prompt, the ends of prompts, and those that one more chunk of `chunk`
    tokens puts up, on its way and at its end, before any are taken down.
    """
    rule, passed = len(wanted_rungs(0, tokens)), len(wanted_rungs(0, min(chunk, tokens)))
    put_up = passed + SLACK_TOKENS // STEP_TOKENS
    return min(rule + KEPT_PROMPTS + put_up, tokens // STEP_TOKENS)


def snapshot_bytes(config: ModelConfig) -> int:
    """Return what a rung takes: the rows that the next token reads, of all rings."""
    shapes = (shape for layer in range(config.n_layers) for shape in ring_shapes(config, layer))
    return F32().itemsize * sum(each.width * each.most_needed(STEP_TOKENS) for each in shapes)
