"""Prompts in little memory: the experts of a layer pass through a few slots, wave by wave."""

import time
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from localv4.model.fast_moe import FastMoe
from localv4.paging.arena import GRANULE_BYTES, Arena
from localv4.paging.paged_store import PagedStore
from localv4.paging.policy import make_policy
from localv4.paging.readers import Readers
from localv4.paging.uses import Uses

EXPERTS, SLOTS, TOKENS = 64, 20, 50


@pytest.mark.parametrize("disk_is_faster", [True, False])
def test_a_layer_larger_than_memory_passes_through(disk_is_faster: bool) -> None:
    uses = Uses(1, EXPERTS)
    uses.clock += 1
    readers = Readers(lambda key, address: GRANULE_BYTES, 4)
    sizes = np.full((1, EXPERTS), GRANULE_BYTES, np.int64)
    arena = Arena(SLOTS * GRANULE_BYTES)
    store = PagedStore(sizes, arena, readers, make_policy("decay", uses), uses)
    moe: Any = FastMoe.__new__(FastMoe)
    moe.index, moe.store, moe.config = 0, store, SimpleNamespace(n_experts=EXPERTS)
    moe.experts = SimpleNamespace(
        forms=[("form",)], form_numbers=np.zeros((1, EXPERTS), np.int64), form=lambda *key: "form"
    )
    chosen = np.arange(TOKENS * 6).reshape(TOKENS, 6) % EXPERTS
    chunk = SimpleNamespace(chosen=chosen, shares=np.ones((TOKENS, 6), np.float32))
    buffers = SimpleNamespace(
        slots=TOKENS * 6,
        records=np.zeros(EXPERTS, np.int64),
        starts=np.zeros(EXPERTS + 1, np.int64),
        tokens=np.zeros(TOKENS * 6, np.int64),
        shares=np.zeros(TOKENS * 6, np.float32),
    )
    uses.record_tokens(0, chosen)
    seen = 0
    for wave in cast(FastMoe, moe).waves(chunk, buffers, TOKENS):  # type: ignore[arg-type]
        assert (wave.records > 0).all() and len(set(wave.records.tolist())) == len(wave.records)
        seen += len(wave.records)
        while disk_is_faster and not readers.is_idle:
            time.sleep(0.001)
    assert seen == EXPERTS
    assert store.count_claimed(0, range(EXPERTS)) == 0
    store.close()
