"""Snapshots and forks: whatever way a timeline went, it goes on as one that never left the path."""

import math
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from golden_files import load_golden, write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import CONTEXT, logits, open_network, wide_network
from numpy.typing import NDArray

from localv4.engine.engine import Engine
from localv4.engine.ladder import Ladder
from localv4.engine.session import Network, Session, common_prefix
from localv4.engine.setup import NumericsName, Setup
from localv4.errors import Cancelled, LocalV4Error
from localv4.kernels.row_operations import COMPACT
from localv4.library.installed import embedded_model_path, resolve
from localv4.model.config_json import read_config
from localv4.model.rungs import KEPT_PROMPTS, STEP_TOKENS, most_rungs, snapshot_bytes
from localv4.model.snapshot import Snapshot, restore, take_snapshot
from localv4.model.state import State

TOKENS = 560
IDS: list[int] = np.random.default_rng(3).integers(0, 90, TOKENS).tolist()
OTHER: list[int] = np.random.default_rng(4).integers(0, 90, TOKENS).tolist()
CUTS = (1, 3, 127, 128, 129, 255, 256, 257, 500)


def exact(name: str) -> Callable[[Path], Network]:
    return lambda folder: open_network(
        write_model(load_golden(name), folder, config="transformers")
    )


def fast(folder: Path) -> Network:
    from test_fast import make_fast  # which skips itself where there is no compiler

    return make_fast(wide_network(folder))


KINDS: dict[str, Callable[[Path], Network]] = {
    "exact": exact("tiny300"),  # the released rates: 4 and 128, a window of 128
    "odd rates": exact("rates"),  # 6 and 20 divide no multiple of 128, a window of 33
}
if os.environ.get("NUMBA_DISABLE_JIT", "0") == "0":
    KINDS["fast"] = fast


@pytest.fixture(scope="module", params=KINDS)
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Network:
    return KINDS[request.param](tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def clean(network: Network) -> NDArray[np.float32]:
    """Logits after every token of an undisturbed run."""
    return logits(network, IDS)  # type: ignore[arg-type]


def run(network: Network, *parts: list[int]) -> Session:
    session = Session(network, CONTEXT)
    for part in parts:
        session.extend(part)
    return session


@pytest.mark.parametrize("cut", CUTS)
def test_a_snapshot_restores_every_bit(
    cut: int, network: Network, clean: NDArray[np.float32]
) -> None:
    session = run(network, IDS[:cut])
    snapshot = take_snapshot(session.state, cut)
    session.extend(OTHER[: TOKENS - cut])
    # the entries before the cut are still there; those after it are another sequence's
    restore(session.state, snapshot)
    assert session.position == cut
    assert np.array_equal(session.all_logits(IDS[cut:]), clean[cut:])


@pytest.mark.parametrize("cut", [127, 256, 400])
def test_a_snapshot_can_be_taken_later(
    cut: int, network: Network, clean: NDArray[np.float32]
) -> None:
    session = run(network, IDS[: cut + 100], [7] * 100)
    snapshot = take_snapshot(session.state, cut)
    session.extend(OTHER[:300])
    restore(session.state, snapshot)
    assert np.array_equal(session.all_logits(IDS[cut:]), clean[cut:])


def test_a_snapshot_of_what_is_gone_is_refused(network: Network) -> None:
    session = run(network, IDS[:550])
    with pytest.raises(LocalV4Error, match="are gone"):
        take_snapshot(session.state, 550 - network.slack - 1)
    restore(session.state, take_snapshot(session.state, 500))
    with pytest.raises(LocalV4Error, match="are gone"):
        take_snapshot(session.state, 499)


@settings(max_examples=8, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from("ox<"), st.integers(1, TOKENS)), min_size=1, max_size=8
    )
)
def test_any_walk_ends_as_a_clean_run(
    network: Network, clean: NDArray[np.float32], steps: list[tuple[str, int]]
) -> None:
    """Go on along the path, or off it and back, or go back."""
    session = Session(network, CONTEXT)
    for kind, amount in steps:
        if kind == "<":
            session.rollback(max(0, session.position - amount))
        elif kind == "x":
            position = session.position
            session.extend(OTHER[: amount // 3 + 1])
            session.rollback(position)
        elif part := IDS[session.position : session.position + amount]:
            session.extend(part)
        assert session.tokens == IDS[: session.position]
    session.reuse(IDS)
    assert np.array_equal(session.all_logits(IDS[session.position :])[-1], clean[-1])


def test_a_rewind_starts_at_the_nearest_rung(network: Network, clean: NDArray[np.float32]) -> None:
    session = run(network, *(IDS[first : first + 50] for first in range(0, TOKENS, 50)))
    session.extend(OTHER[:300])
    edited = [*IDS[:540], 1, 2, 3]
    assert session.reuse(edited) == 512
    assert session.reuse(IDS[:500]) == 384
    assert np.array_equal(session.all_logits(IDS[384:]), clean[384:])
    assert session.reuse(IDS[:100]) == 0


def test_a_prompt_leaves_rungs_where_its_chunk_passes(
    network: Network, clean: NDArray[np.float32]
) -> None:
    session = run(network, IDS)
    assert session.ladder.positions == [128, 256, 384, 512]
    assert session.reuse([*IDS[:200], 1, 2]) == 128
    assert np.array_equal(session.all_logits(IDS[128:]), clean[128:])


def test_rungs_of_another_path_are_forgotten(network: Network, clean: NDArray[np.float32]) -> None:
    session = run(network, IDS[:260], OTHER[:200])
    session.rollback(256)
    session.extend(OTHER[200:560])
    session.rollback(256)
    assert max(session.ladder.positions) <= 256
    assert np.array_equal(session.all_logits(IDS[256:]), clean[256:])


class Later(threading.Event):
    """Is set once it has been looked at so often."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def is_set(self) -> bool:
        self.looks -= 1
        return self.looks < 0


@pytest.mark.parametrize("back", [0, 1, 128, 200, 256])
def test_a_cancelled_chunk_leaves_the_whole_way_back(
    back: int, network: Network, clean: NDArray[np.float32]
) -> None:
    session, place = run(network, IDS[:300]), 300 - back
    with pytest.raises(Cancelled):
        session.extend(OTHER, cancelled=Later(20))
    assert session.position == 300
    session.ladder.cut(0)
    session.rollback(place)
    # what has written beyond its reach in the rings cannot go back so far
    assert session.position == (place if network.name == "fast" or back < 129 else 0)
    rest = IDS[session.position :]
    assert np.array_equal(session.all_logits(rest), clean[-len(rest) :])


@pytest.mark.parametrize("cut", [1, 128, 300])
def test_forks_do_not_disturb_each_other(
    cut: int, network: Network, clean: NDArray[np.float32]
) -> None:
    session = run(network, IDS[:cut])
    forks = [session.fork() for _ in range(3)]
    expected = run(network, IDS[:cut], OTHER[:200]).all_logits(OTHER[200:300])
    for first in range(0, 200, 50):  # in turns: nobody may write over what another has
        forks[0].extend(IDS[cut + first : cut + first + 50])
        forks[1].extend(OTHER[first : first + 50])
        session.extend([5] * 50)
    session.rollback(cut)
    assert np.array_equal(forks[1].all_logits(OTHER[200:300]), expected)
    assert np.array_equal(forks[0].all_logits(IDS[cut + 200 :]), clean[cut + 200 :])
    assert np.array_equal(forks[2].all_logits(IDS[cut:]), clean[cut:])
    rest = IDS[session.position :]
    assert np.array_equal(session.all_logits(rest), clean[-len(rest) :])


def test_forks_share_entries_until_they_differ(network: Network) -> None:
    session = run(network, IDS[:200], IDS[200:400])  # made room for 512
    fork = session.fork()
    cells = session.state.addresses[:, [3, 6]]  # entries of compressor and indexer
    assert np.array_equal(fork.state.addresses[:, [3, 6]], cells)
    fork.extend(IDS[400:430])  # the first one to go on may write behind the common entries
    assert np.array_equal(fork.state.addresses[:, [3, 6]], cells)
    session.extend(OTHER[:30])
    compressed = cells != 0
    assert (session.state.addresses[:, [3, 6]] != cells)[compressed].all()


def test_a_sole_survivor_copies_nothing(network: Network) -> None:
    session = run(network, IDS[:400])
    del session.fork().tokens[:]
    before = session.state.addresses.copy()
    session.rollback(300)
    session.extend(OTHER[:100])
    assert np.array_equal(session.state.addresses, before)


def test_forks_rewind_by_the_rungs_they_inherited(
    network: Network, clean: NDArray[np.float32]
) -> None:
    fork = run(network, *(IDS[first : first + 50] for first in range(0, 550, 50))).fork()
    fork.extend(OTHER[:300])
    assert fork.reuse(IDS[:540]) == 512
    assert np.array_equal(fork.all_logits(IDS[512:]), clean[512:])


@pytest.mark.skipif(os.environ.get("NUMBA_DISABLE_JIT", "0") != "0", reason="too slow")
@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_the_built_in_model_goes_back_anywhere(numerics: NumericsName) -> None:
    network = Engine.load(resolve("tiny-v4").path, Setup(threads=2, numerics=numerics)).network
    cuts = [*CUTS, *np.random.default_rng(5).integers(1, 298, 5).tolist()]
    clean = Session(network, CONTEXT).all_logits(IDS[:300])
    session, snapshots = Session(network, CONTEXT), []
    for cut in sorted(cut for cut in set(cuts) if cut < 298):
        session.extend(IDS[session.position : cut])
        snapshots.append(take_snapshot(session.state, cut))
    session.extend(IDS[session.position : 300])
    for snapshot in snapshots:
        restore(session.state, snapshot)
        again = session.all_logits(IDS[snapshot.position : snapshot.position + 2])
        assert np.array_equal(again, clean[snapshot.position : snapshot.position + 2])


# the rule itself


LONG = 100_000
CHUNK, PASS = 3840, 240


class NoNetwork:
    """Moves a decoder state on as the fast network does, and computes nothing."""

    slack, chunk_tokens, threads, cancelled = 256, CHUNK, 1, None

    def __init__(self) -> None:
        self.config = read_config(embedded_model_path() / "config.json")
        self.processed = 0

    def new_state(self) -> State:
        return State(self.config, self.slack, COMPACT)

    def forward(
        self, ids: NDArray[np.int64], state: State, wanted: int | None = None
    ) -> NDArray[np.float32]:
        state.begin(len(ids))
        for layer in state.layers if state.passer is not None and len(ids) > 1 else ():
            for first in range(0, len(ids), PASS):
                start = state.position + first
                state.passer.note(layer, start, start + min(PASS, len(ids) - first))  # type: ignore[union-attr]
        state.advance(len(ids))
        self.processed += len(ids)
        return np.zeros((1, 1), np.float32)

    def logits(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        return vectors


def long_conversation(network: NoNetwork, document: int) -> tuple[Session, list[int]]:
    """A document, then questions of 300 tokens with answers of 60, LONG tokens in all."""
    ids = np.random.default_rng(0).integers(2, 500, LONG).tolist()
    session = Session(network, 2 * LONG)  # type: ignore[arg-type]
    session.extend(ids[:document])
    for start in range(document, LONG, 360):
        session.extend(ids[start : start + 300])
        for token in ids[start + 300 : start + 360]:
            session.extend([token])
    return session, ids


@pytest.mark.parametrize("document", [20_000, LONG])
def test_an_edit_of_a_long_conversation_computes_little_anew(document: int) -> None:
    network = NoNetwork()
    whole, ids = long_conversation(network, document)
    assert whole.position == LONG
    for back in (1, 50, 100, 127, 128, 129, 400, 1_000, 3_000, 5_000, 20_000, 60_000, 99_000):
        edited = ids.copy()
        edited[LONG - back] ^= 1
        session = whole.fork()
        again = LONG - back - session.reuse(edited)
        assert 0 <= again < max(STEP_TOKENS, back / 2)
    # one word at the end, and what was said after it, gives way to three others
    edited, before = [*ids[: LONG - 20], 7, 8, 9], network.processed
    session = whole.fork()
    session.extend(edited[session.reuse(edited) :])
    assert session.tokens == edited and network.processed - before <= STEP_TOKENS + 3


@pytest.mark.parametrize("turn", [60, 400, 1_000, 3_000, 20_000, LONG])
def test_a_conversation_has_no_more_rungs_than_are_planned(
    turn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Questions of one length with answers of 60 tokens; counted before others are taken down."""
    counts: list[int] = []
    thin_out = Ladder.thin_out

    def note(ladder: Ladder, tip: int) -> None:
        counts.append(len(ladder.positions))
        thin_out(ladder, tip)

    monkeypatch.setattr(Ladder, "thin_out", note)
    network = NoNetwork()
    session = Session(network, LONG)  # type: ignore[arg-type]
    while session.position < LONG:
        session.extend([7] * min(turn, LONG - session.position))
        for _ in range(min(60, LONG - session.position)):
            session.extend([7])
    planned = most_rungs(LONG, CHUNK)
    assert len(session.ladder.positions) <= planned - 8
    assert 0.5 * planned < max(counts) <= planned
    assert session.ladder.nbytes <= planned * snapshot_bytes(network.config)


def test_few_tokens_have_few_rungs() -> None:
    assert [most_rungs(tokens, CHUNK) for tokens in (1, 127, 128, 1_000)] == [0, 0, 1, 7]


def test_what_a_rung_takes_follows_from_the_configuration(network: Network) -> None:
    session = run(network, IDS[:550])
    session.rollback(513)
    found = [rung.nbytes for rung in (session.ladder.below(end) for end in (128, 256, 512)) if rung]
    assert len(found) == 3 and max(found) <= snapshot_bytes(network.config)
    if all(STEP_TOKENS % ratio == 0 for ratio in network.config.ratios if ratio):
        assert set(found) == {snapshot_bytes(network.config)}


def rung(position: int) -> Snapshot:
    return Snapshot(position, (np.zeros((1, 2), np.float32),))


def ladder_to(tip: int) -> Ladder:
    """A ladder as a timeline builds it that grows step by step."""
    ladder = Ladder()
    for position in range(0, tip + 1, STEP_TOKENS):
        ladder.add(rung(position))
        ladder.thin_out(position)
    return ladder


@pytest.mark.parametrize(("tip", "most"), [(128, 2), (640, 6), (5_000, 14), (1 << 20, 27)])
def test_rungs_are_few_and_near_enough(tip: int, most: int) -> None:
    ladder = ladder_to(tip)
    assert len(ladder.positions) <= most
    for back in (1, 2, 100, 127, 128, 129, 500, 511, 512, 1000, 4096, 10_000, 100_000, tip):
        if back <= tip:
            nearest = ladder.below(tip - back)
            assert nearest is not None
            assert tip - back - nearest.position < max(STEP_TOKENS, back / 2)


@given(
    chunks=st.lists(st.integers(1, 1920), min_size=1, max_size=60), backs=st.lists(st.integers(0))
)
def test_nothing_is_taken_down_that_would_be_missed(chunks: list[int], backs: list[int]) -> None:
    """Rungs can be had within 256 tokens before the end of a chunk."""
    ladder, tip, possible = Ladder(), 0, set[int]()
    for chunk in chunks:
        passed = range(max(tip + 1, tip + chunk - 256), tip + chunk + 1)
        tip += chunk
        for position in (place for place in passed if place % STEP_TOKENS == 0):
            possible.add(position)
            ladder.add(rung(position))
        ladder.thin_out(tip)
    assert set(ladder.positions) <= possible
    assert len(ladder.positions) <= 6 + 3.5 * math.log2(max(tip, 256) / 256)
    for back in (back % (tip + 1) for back in backs):
        nearest, place = ladder.below(tip - back), tip - back
        start = 0 if nearest is None else nearest.position
        best = max((position for position in possible if position <= place), default=0)
        assert start == best or place - start < max(STEP_TOKENS, back / 2)


def test_rungs_at_the_ends_of_prompts_stay() -> None:
    ladder = ladder_to(128 * 33)
    ladder.note_prompt(128 * 33 + 5)
    for position in range(128 * 34, 128 * 200, 128):
        ladder.add(rung(position))
        ladder.thin_out(position)
    assert 128 * 33 in ladder.positions
    assert [mark.position for mark in ladder.landmarks] == [128 * 33, 128 * 199]
    for number in range(KEPT_PROMPTS):
        ladder.note_prompt(128 * (190 + number))
    ladder.thin_out(128 * 199)
    assert 128 * 33 not in ladder.positions


def test_a_rung_replaces_one_at_its_place() -> None:
    ladder = ladder_to(512)
    again = rung(256)
    ladder.add(again)
    assert ladder.positions == [0, 128, 256, 384, 512]
    assert ladder.below(300) is again
    ladder.cut(255)
    assert ladder.positions == [0, 128] and ladder.below(127) is not None


def test_common_prefix() -> None:
    assert common_prefix([], [1]) == common_prefix([1], []) == common_prefix([2], [1]) == 0
    assert common_prefix([1, 2, 3], [1, 2]) == 2
    assert common_prefix([1, 2, 3], [1, 5, 3]) == 1
