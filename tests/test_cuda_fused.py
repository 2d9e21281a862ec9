"""Operations in fewer steps: as one, or earlier; with the bits that they leave apart."""

import ctypes

import numpy as np
import pytest
from cuda_twins import launch, needs_compiler, padded_words
from operation_runs import F32
from reference_packed import address

from localv4.cuda.fused import QUANTIZE, RESOLVE, ROUTE, SOFTMAX, VALUES, Group, Operation, fused
from localv4.cuda.program import place_rests
from localv4.cuda.twin import SCRATCH, Twin
from localv4.cuda.twins import TWINS
from localv4.cuda.twins.attention import SOFTMAX_ROUNDED, SPLITS
from localv4.cuda.twins.products import KNOWN_GATE_UPS, PRODUCTS
from localv4.cuda.twins.router import ROUTE_AND_RESOLVE
from localv4.kernels.activations import row_bytes
from localv4.kernels.operation import WORDS, float_bits
from localv4.model.program import Rounded

HEADS, CHANNELS, PARTS = 4, 512, 2
COLS = HEADS * CHANNELS // PARTS
OUTPUT = 1 << 20


def steps(rounded: Rounded, output: int = OUTPUT, cols: int = COLS) -> list[list[Operation]]:
    """A softmax, what says where its output goes, and the rounding of that."""
    softmax = padded_words([1, 2, 3, 4, HEADS, CHANNELS, 7, 8, 9])
    values = padded_words([*[0] * 10, OUTPUT])
    rounds = [
        padded_words([output + 4 * cols * i, 0, 0, 1, cols, *rounded.part(i).addresses])
        for i in range(PARTS)
    ]
    return [[(SOFTMAX, softmax)], [(VALUES[0], values)], [(QUANTIZE, each) for each in rounds]]


def test_a_softmax_rounds_its_output() -> None:
    rounded = Rounded(PARTS, COLS)
    (((twin, words),),) = fused(steps(rounded))
    assert twin is SOFTMAX_ROUNDED
    assert words[:10] == padded_words([1, 2, 3, 4, HEADS, CHANNELS, 7, 8, 9])[:10]
    assert words[10:15] == [OUTPUT, *rounded.addresses, COLS] and len(words) == WORDS


@pytest.mark.parametrize("change", [{"output": OUTPUT + 4}, {"cols": COLS // 2}])
def test_what_is_not_its_output_is_rounded_later(change: dict[str, int]) -> None:
    apart = steps(Rounded(PARTS, COLS), **change)
    assert fused(apart) == apart


def test_a_rest_is_beside_the_largest_product() -> None:
    rest = Twin("a", ())
    enter, small, large = (
        Twin("a", (), rest=rest),
        Twin("a", (), weights=lambda _: 1),
        Twin("a", (), weights=lambda _: 9),
    )
    groups = [[(enter, [1])], [(small, [2])] * 2, [(large, [3])] * 2, [(large, [4])]]
    placed = place_rests([*groups, *groups[:2], [(enter, [5])]])
    assert [len(group) for group in placed] == [1, 2, 3, 1, 1, 3, 1, 1]
    assert placed[2][-1] == (rest, [1]) and placed[7] == [(rest, [5])]


@needs_compiler
def test_rounding_gives_the_same_bits() -> None:
    outputs, rounded = [], Rounded(PARTS, COLS)
    for twin, more in ((SOFTMAX, []), (SOFTMAX_ROUNDED, [0, *rounded.addresses, COLS])):
        random = np.random.default_rng(1)
        out, turns = np.zeros(HEADS * CHANNELS, F32), random.random((2, 32), F32)
        context, sinks = np.array([SPLITS * 16]), random.random(HEADS, F32)
        scratch = random.random(1 << 20, F32)
        scratch[:8].view(np.int64)[:] = [address(out), address(turns), address(turns[1]), 32]
        words = padded_words([address(context), 128, 0, 0, HEADS, CHANNELS, address(sinks), 0, 0])
        words[10 : 10 + len(more)] = more
        words[SCRATCH] = address(scratch)
        launch(twin.kernels[0], words)
        outputs.append(out)
    np.testing.assert_array_equal(*outputs)
    for number in range(PARTS):
        own, part = Rounded(1, COLS), rounded.part(number)
        x = np.ascontiguousarray(outputs[0][COLS * number : COLS * (number + 1)])
        launch(QUANTIZE.kernels[0], padded_words([address(x), COLS, 0, 1, COLS, *own.addresses]))
        gap = row_bytes(COLS)[0] - COLS
        for mine, theirs, size in zip(part.addresses, own.addresses, row_bytes(COLS), strict=True):
            size -= gap if size == COLS + gap else 0
            assert ctypes.string_at(mine, size) == ctypes.string_at(theirs, size)
    assert TWINS["single_token.quantize"] is QUANTIZE and outputs[0].any()


GATE_UP = PRODUCTS["formats.mx4_gate_up"]
DOWN, MATVEC = PRODUCTS["formats.mx4_down"], PRODUCTS["formats.q8_matvec"]
RECORDS, SHARED_RECORD, CHOSEN, FORMS, COUNT = 7000, 9000, 300, 2, 6


def choice(tokens: int = 1) -> list[Group]:
    """Choosing experts, and looking them up."""
    words = [1, 2, 256, 3, 0, 0, COUNT, 4, CHOSEN, 5, tokens]
    return [
        [(ROUTE, padded_words(words))],
        [(RESOLVE, padded_words([CHOSEN, COUNT, 400, 401, FORMS, RECORDS]))],
    ]


def experts() -> list[Group]:
    """The experts of two forms and the shared one."""
    records = (RECORDS, RECORDS + 8 * COUNT, SHARED_RECORD)
    hidden = (10, 10, 20)
    gate_ups = [
        (GATE_UP, padded_words([record, 1, 8, 256, 1, 2, 3, h, 0]))
        for record, h in zip(records, hidden, strict=True)
    ]
    rounds = [(QUANTIZE, padded_words([h, 0, 0, 1, 128, h + 1, h + 2, h + 3])) for h in (10, 20)]
    downs = [
        (MATVEC, padded_words([1, 8, 128, 21])),
        (DOWN, padded_words([RECORDS, COUNT, 8, 128, 11])),
    ]
    return [gate_ups, rounds, downs]


def test_a_choice_looks_up_its_experts() -> None:
    (((twin, words),),) = fused(choice())
    assert twin is ROUTE_AND_RESOLVE and words[:12] == choice()[0][0][1][:12]
    assert words[12:16] == [400, 401, FORMS, RECORDS] and len(words) == WORDS
    assert fused(choice(tokens=2)) == choice(tokens=2)


def test_the_shared_expert_does_not_wait_for_the_choice() -> None:
    (gate_ups, rounds, downs), groups = experts(), fused([*choice(), *experts()])
    assert [[twin for twin, _ in group] for group in groups] == [
        [ROUTE_AND_RESOLVE, KNOWN_GATE_UPS[GATE_UP]],
        [GATE_UP, GATE_UP, QUANTIZE],
        [QUANTIZE, MATVEC],
        [DOWN],
    ]
    shared = list(gate_ups[2][1])
    shared[10] = 1  # its record is known
    assert groups[0][1][1] == shared
    assert groups[1][2:] == rounds[1:] and groups[2] == [rounds[0], downs[0]]
    assert fused(experts()) == [gate_ups, rounds, downs]


@needs_compiler
@pytest.mark.parametrize("by_table", [False, True])
def test_choosing_and_looking_up_give_the_same_bits(by_table: bool) -> None:
    random, n_experts, k = np.random.default_rng(3), 77, 6
    logits, bias = random.standard_normal((2, n_experts), F32)
    numbers, ids = np.stack([random.permutation(n_experts)[:k] for _ in range(3)]), np.array([2])
    places, forms = random.integers(-1, 3, n_experts) * 64, random.integers(0, FORMS, n_experts)
    results = []
    for apart in (True, False):
        chosen, shares = np.zeros(k, np.int64), np.zeros(k, F32)
        records = np.full((FORMS, k), 5)
        given = [0, address(numbers), address(ids)] if by_table else [address(bias), 0, 0]
        words = [address(logits), n_experts, n_experts, *given, k, float_bits(2.5)]
        route = padded_words([*words, address(chosen), address(shares), 1])
        looked_up = [address(places), address(forms), FORMS, address(records)]
        groups: list[Group] = [
            [(ROUTE, route)],
            [(RESOLVE, padded_words([address(chosen), k, *looked_up]))],
        ]
        for ((twin, own),) in groups if apart else fused(groups):
            launch(twin.kernels[0], own)
        results.append((chosen, shares, records))
    for mine, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert results[1][2].any()
