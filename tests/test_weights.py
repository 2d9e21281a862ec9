"""Tensors that are missing, misshapen, mistyped or not finite are named, never used."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf_writer import GgufOptions, write_gguf
from golden.storage import Stored
from golden.weights import Array
from golden_files import load_golden, write_model, write_stored
from networks import open_network

from localv4.errors import BadFileError

Change = Callable[[dict[str, Array]], None]


def changed(name: str, values: Array | None) -> Change:
    """Replace one tensor, or drop it."""

    def change(weights: dict[str, Array]) -> None:
        if values is None:
            del weights[name]
        else:
            weights[name] = values

    return change


F32 = np.float32
NAN = np.full(64, np.nan, F32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("embed.weight", None), r"tensor embed\.weight is missing"),
        (changed("layers.3.attn.wkv.weight", None), r"layers\.3\.attn\.wkv\.weight is missing"),
        (changed("layers.6.ffn.experts.7.w2.weight", None), "w2.weight is missing"),
        (changed("layers.4.ffn.gate.bias", None), "gate.bias is missing"),
        (changed("layers.0.attn.wq_a.weight", np.zeros((64, 24), F32)), r"expected \(24, 64\)"),
        (changed("layers.0.attn_norm.weight", np.zeros(63, F32)), r"expected \(64,\)"),
        (changed("layers.0.attn_norm.weight", NAN), "NaN or an infinity"),
        (changed("layers.2.attn.attn_sink", np.full(4, np.inf, F32)), "NaN or an infinity"),
        (changed("layers.0.ffn.gate.tid2eid", np.zeros((320, 3), F32)), "expected integers"),
        (changed("layers.0.ffn.gate.tid2eid", np.full((320, 3), 8)), "outside 0 to 7"),
        (changed("layers.0.ffn.gate.tid2eid", np.full((320, 3), -1)), "outside 0 to 7"),
        (changed("head.weight", np.zeros((320, 64), np.int64)), "cannot hold weights"),
    ],
)
def test_bad_tensors(change: Change, message: str, tmp_path: Path) -> None:
    golden = load_golden("tiny300")
    weights = dict(golden.weights)
    change(weights)
    folder = write_model(replace(golden, weights=weights), tmp_path)
    with pytest.raises(BadFileError, match=message):
        open_network(folder)


def stored_without(name: str) -> Callable[[Mapping[str, Stored]], dict[str, Stored]]:
    """Drop one tensor of the official storage."""
    return lambda stored: {key: value for key, value in stored.items() if key != name}


def stored_with(name: str, **changes: Any) -> Callable[[Mapping[str, Stored]], dict[str, Stored]]:
    """Change one tensor of the official storage."""
    return lambda stored: {**stored, name: replace(stored[name], **changes)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (stored_without("layers.0.attn.wq_a.scale"), "no scale tensor"),
        (stored_without("layers.1.ffn.experts.2.w3.scale"), "no scale tensor"),
        (stored_with("layers.0.attn.wq_a.scale", shape=(2, 1)), "expected F8_E8M0"),
        (stored_with("layers.0.attn.wq_a.weight", dtype="I8"), r"expected \(128, 128\)"),
    ],
)
def test_bad_official_storage(change: Any, message: str, tmp_path: Path) -> None:
    golden = load_golden("wide")
    folder = write_stored(replace(golden, stored=change(golden.stored)), tmp_path)
    with pytest.raises(BadFileError, match=message):
        open_network(folder)


def test_a_type_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path, _ = write_gguf(
        load_golden("wide"), tmp_path / "m.gguf", GgufOptions({"attention": Type.Q5_1})
    )
    with pytest.raises(BadFileError, match=r"attn_q_a\.weight.*Q5_1"):
        open_network(path)
