"""What is given up, in which order, and how a change of topic is noticed."""

import numpy as np
import pytest
from numpy.typing import NDArray

from localv4.errors import UsageError
from localv4.paging.policy import NAMES, DecayedFrequency, make_policy
from localv4.paging.topics import MOST_TOPICS, TopicMemory
from localv4.paging.uses import GUARD_TOKENS, Uses

LAYERS, EXPERTS = 5, 12


def used(seed: int, tokens: int = 40) -> Uses:
    """Uses of random experts, some likelier than others."""
    rng = np.random.default_rng(seed)
    uses = Uses(LAYERS, EXPERTS)
    for _ in range(tokens):
        uses.clock += 1
        for layer in range(LAYERS):
            uses.record(layer, np.unique((rng.random(3) ** 2 * EXPERTS).astype(int)))
    return uses


def worths(name: str, uses: Uses) -> NDArray[np.float64]:
    """What a policy keeps, by its definition."""
    if name == "lru":
        return (uses.last * LAYERS + np.arange(LAYERS)[:, None]).astype(float)
    return uses.scores().astype(float)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(5))
def test_victims_are_the_coldest_that_free_enough(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    uses = used(seed)
    policy = make_policy(name, uses)
    resident = rng.random((LAYERS, EXPERTS)) < 0.7
    keep = rng.random((LAYERS, EXPERTS)) < 0.1
    nbytes = rng.choice([120, 156, 204], LAYERS)
    need = int(rng.integers(1, 3000))
    worth = worths(name, uses)
    keys = sorted(
        zip(*np.nonzero(resident & ~keep), strict=True),
        key=lambda key: (uses.last[key] > uses.clock[0] - GUARD_TOKENS, worth[key], key),
    )
    expected, freed = [], 0
    while freed < need and keys:
        expected.append(keys.pop(0))
        freed += nbytes[expected[-1][0]]
    assert policy.victims(uses, resident, nbytes, need, keep) == expected
    by_expert = np.repeat(nbytes[:, None], EXPERTS, 1)
    assert policy.victims(uses, resident, by_expert, need, keep) == expected


def test_sizes_of_what_is_not_resident_do_not_matter() -> None:
    uses, resident = used(0), np.zeros((LAYERS, EXPERTS), bool)
    resident[2] = True
    nbytes = np.zeros((LAYERS, EXPERTS), np.int64)
    nbytes[2] = 10
    assert len(make_policy("lru", uses).victims(uses, resident, nbytes, 25)) == 3


def test_nothing_is_given_up_for_nothing_and_all_if_it_is_not_enough() -> None:
    uses, resident = used(1), np.ones((LAYERS, EXPERTS), bool)
    policy = make_policy("decay", uses)
    nbytes = np.full(LAYERS, 7)
    assert policy.victims(uses, resident, nbytes, 0) == []
    keep = np.zeros_like(resident)
    keep[3] = True
    victims = policy.victims(uses, resident, nbytes, 10**9, keep)
    assert len(victims) == (LAYERS - 1) * EXPERTS
    assert all(layer != 3 for layer, _ in victims)


def test_a_policy_sets_the_half_life_it_wants() -> None:
    uses = used(0)
    make_policy("lfu", uses)
    assert uses.half_life == float("inf")
    make_policy("decay", uses)
    assert uses.half_life < 1000
    with pytest.raises(UsageError, match="no cache policy 'arc'"):
        make_policy("arc", uses)


class Text:
    """Tokens of topics: each has 40 of 200 experts of its own in each of four layers."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.experts = [self.rng.permuted(np.tile(np.arange(200), (4, 1)), axis=1) for _ in "abc"]
        self.uses = Uses(4, 200)
        self.policy = DecayedFrequency()

    def read(self, topic: int, tokens: int) -> None:
        for _ in range(tokens):
            self.uses.clock += 1
            for layer in range(4):
                numbers = self.experts[topic][layer, self.rng.permutation(40)[:6]]
                self.uses.record(layer, numbers)
            self.policy.observe(self.uses)

    def share(self, topic: int) -> float:
        """How much of the scores belongs to the experts of a topic."""
        scores = self.uses.scores()
        mine = np.take_along_axis(scores, self.experts[topic][:, :40], axis=1)
        return float(mine.sum() / scores.sum())


@pytest.mark.parametrize("seed", range(3))
def test_a_topic_that_goes_on_is_no_change(seed: int) -> None:
    text = Text(seed)
    text.read(0, 600)
    assert text.policy.memory.changes == 0


@pytest.mark.parametrize("seed", range(3))
def test_a_change_of_topic_outweighs_old_counts_and_a_return_brings_them_back(seed: int) -> None:
    text = Text(seed)
    text.read(0, 200)
    text.read(1, 12)
    memory = text.policy.memory
    assert (memory.changes, memory.recalls) == (1, 0)
    assert text.share(1) > 0.5  # with decay alone it would be a quarter
    text.read(1, 190)
    text.read(0, 12)
    assert (memory.changes, memory.recalls) == (2, 1)
    known = np.take_along_axis(text.uses.scores(), text.experts[0][:, :40], axis=1)
    assert (known > 5).mean() > 0.95  # twelve tokens alone use each expert twice at most


def test_a_recalled_topic_survives_a_short_visit() -> None:
    text = Text(5)
    for topic, tokens in ((0, 200), (1, 200), (0, 20), (1, 100)):
        text.read(topic, tokens)
    text.read(0, 12)
    assert text.policy.memory.recalls == 3


def test_the_memory_of_topics_is_bounded() -> None:
    memory = TopicMemory()
    uses = Uses(2, 8)
    rng = np.random.default_rng(0)
    for _ in range(MOST_TOPICS + 3):
        for _ in range(40):
            uses.clock += 1
            uses.record(0, rng.permutation(8)[:2])
            memory.observe(uses)
        memory.remember(uses)
    assert len(memory.topics) == MOST_TOPICS
