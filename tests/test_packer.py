"""Packing changes the place of numbers, never a number; it survives every stop."""

import shutil
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from conversions import pack_folder
from filelock import FileLock
from gguf import GGMLQuantizationType as Type
from gguf_writer import ANTIREZ, MAINLINE, ROLES, GgufOptions, write_gguf
from golden_files import load_golden, random_model, write_model, write_stored
from model_folders import damaged_files
from networks import logits
from packed_values import as_stored
from test_sources import SUPERBLOCKS

from localv4.engine.engine import Engine
from localv4.engine.setup import Setup
from localv4.errors import BadFileError, DoesNotFitError, LocalV4Error, UsageError
from localv4.kernels.team import Team
from localv4.model.config import ModelConfig
from localv4.model.fast import FastTransformer
from localv4.model.loading import read_model_config
from localv4.model.matrix import Matrix, decode
from localv4.model.names import official_names
from localv4.model.packed_source import load_packed_weights, packed_config
from localv4.model.packing import (
    PackedExpert,
    PackedMatrix,
    expert_form,
    pack_dense,
    pack_expert,
)
from localv4.model.weights import Expert, Weights, load_weights
from localv4.storage import open_checkpoint
from localv4.storage.packed_folder import open_packed_folder
from localv4.text.tokenizer import Tokenizer
from quant.journal import JOURNAL_NAME
from quant.output_file import WrittenFile
from quant.packed_writer import write_shard
from quant.task import Progress
from quant.workplace import LOCK_NAME

pytestmark = pytest.mark.skipif(
    bool(numba.config.DISABLE_JIT), reason="kernels that take addresses need the compiler"
)

# Every matrix has whole groups of sixteen rows, and rows of whole superblocks.
WHOLE = replace(SUPERBLOCKS, name="whole", dims={**SUPERBLOCKS.dims, "vocab_size": 304})


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in official storage."""
    return write_stored(load_golden("wide"), tmp_path_factory.mktemp("official"))


def pack(source: Path, target: Path, **options: Any) -> Path:
    with open_checkpoint(source) as checkpoint:
        pack_folder(checkpoint, target, **options)
    return target


def load(folder: Path) -> Weights:
    packed = open_packed_folder(folder)
    return load_packed_weights(packed, packed_config(packed))


def open_source(path: Path) -> tuple[ModelConfig, Weights]:
    checkpoint = open_checkpoint(path)
    table = official_names(checkpoint)
    config = read_model_config(checkpoint, table)
    return config, load_weights(checkpoint, table, config)


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every matrix, array and number of a tree of weights, by its place."""
    if isinstance(node, PackedExpert):
        yield f"{path}.record", node.record
        yield f"{path}.form", (node.form.gate_up.name, node.form.down.name)
    elif isinstance(node, Matrix | np.ndarray | int):
        yield path, node
    elif isinstance(node, tuple):
        for number, part in enumerate(node):
            yield from leaves(part, f"{path}.{number}")
    elif is_dataclass(node):
        for field in fields(node):
            yield from leaves(getattr(node, field.name), f"{path}.{field.name}")


def packed_in_memory(weights: Weights) -> Weights:
    """The weights packed as the engine packs them, the experts too."""
    layers = []
    for layer in pack_dense(weights, 2).layers:
        experts = tuple(packed_expert(expert) for expert in layer.experts)
        layers.append(replace(layer, experts=experts))
    return replace(pack_dense(weights, 2), layers=tuple(layers))


def packed_expert(expert: Expert) -> Expert:
    form = expert_form(expert)
    if form is None:
        return expert
    record = np.zeros(form.nbytes, np.uint8)
    assert pack_expert(record, expert, form)
    return PackedExpert(expert.w1, expert.w2, expert.w3, form, record)


def assert_packed_as_in_memory(source: Path, folder: Path) -> None:
    """What the folder maps is byte for byte what packing in memory makes."""
    config, weights = open_source(source)
    assert packed_config(open_packed_folder(folder)) == config
    expected = dict(leaves(packed_in_memory(weights)))
    actual = dict(leaves(load(folder)))
    assert actual.keys() == expected.keys() and len(expected) > 50
    for place, leaf in expected.items():
        assert contents_of(actual[place]) == contents_of(leaf), place


def contents_of(leaf: Any) -> tuple[Any, ...]:
    """What a leaf holds, comparable."""
    if isinstance(leaf, PackedMatrix):
        scales = b"" if leaf.scales is None else leaf.scales.tobytes()
        return leaf.form.name, leaf.rows, leaf.cols, leaf.packed.tobytes(), scales
    if isinstance(leaf, Matrix):
        return leaf.format, leaf.rows, leaf.cols, leaf.data.tobytes(), leaf.scale.tobytes()
    if isinstance(leaf, np.ndarray):
        return leaf.dtype, leaf.shape, leaf.tobytes()
    return (leaf,)


def assert_same_values(source: Path, folder: Path) -> None:
    """Every number is what it was, by the twins of the formats."""
    expected = dict(leaves(open_source(source)[1]))
    actual = dict(leaves(as_stored(load(folder))))
    assert actual.keys() == expected.keys() and len(expected) > 100
    for place, leaf in expected.items():
        if isinstance(leaf, Matrix):
            assert np.array_equal(decode(actual[place]), decode(leaf)), place
        else:
            assert np.array_equal(actual[place], leaf), place


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


# --- the same numbers


def test_official_storage(official: Path, tmp_path: Path) -> None:
    folder = pack(official, tmp_path / "packed")
    assert_packed_as_in_memory(official, folder)
    assert_same_values(official, folder)
    assert damaged_files(folder) == []
    layer = load(folder).layers[1]
    assert isinstance(layer.attention.wq_b, PackedMatrix)
    assert all(isinstance(expert, PackedExpert) for expert in layer.experts)
    names = [name for name in contents(folder) if name.startswith(".")]
    assert names == []


MIXES = {
    "mainline": MAINLINE,
    "antirez": ANTIREZ,
    "q4_0": dict.fromkeys(set(ROLES.values()) - {"hc", "ape"}, Type.Q4_0),
    "q8_0 shared": MAINLINE | {"shared": Type.Q4_0, "down": Type.Q8_0},
    "rows": dict.fromkeys(set(ROLES.values()) - {"hc", "ape"}, Type.IQ4_XS),
    "q4_k": dict.fromkeys(set(ROLES.values()) - {"hc", "ape"}, Type.Q4_K),
}
TWINS = ("mainline", "q4_0", "q8_0 shared", "rows")
"""Mixes of which all packed forms have a twin in NumPy that unpacks them."""


@pytest.mark.parametrize("mix", MIXES)
def test_ggml_types(mix: str, tmp_path: Path) -> None:
    options = GgufOptions(MIXES[mix], parts=3 if mix == "antirez" else 1)
    source, _ = write_gguf(random_model(WHOLE), tmp_path / "m.gguf", options)
    folder = pack(source, tmp_path / "packed")
    assert_packed_as_in_memory(source, folder)
    if mix in TWINS:
        assert_same_values(source, folder)
    metadata = open_packed_folder(folder).metadata
    assert "general.architecture" in metadata and "split.count" not in metadata
    tokenizer = Tokenizer.from_gguf(metadata, folder)
    expected = Tokenizer.from_gguf(open_checkpoint(source).metadata, source)
    assert tokenizer.encode('a !" b') == expected.encode('a !" b')


def test_halves_of_an_expert_may_differ(tmp_path: Path) -> None:
    types = MAINLINE | {"down": Type.Q8_0}
    source, _ = write_gguf(random_model(WHOLE), tmp_path / "m.gguf", GgufOptions(types))
    expert = load(pack(source, tmp_path / "packed")).layers[0].experts[1]
    assert isinstance(expert, PackedExpert)
    assert (expert.form.gate_up.name, expert.form.down.name) == ("MX4", "Q8")


@pytest.mark.parametrize("name", ["odd", "tiny300"])
def test_what_has_no_packed_form_stays_as_it_is(name: str, tmp_path: Path) -> None:
    source = write_model(load_golden(name), tmp_path / "source")
    folder = pack(source, tmp_path / "packed")
    assert_packed_as_in_memory(source, folder)
    assert_same_values(source, folder)


def test_small_files_come_along(official: Path, tmp_path: Path) -> None:
    shutil.copytree(official, tmp_path / "source")
    (tmp_path / "source" / "LICENSE").write_text("free")
    (tmp_path / "source" / "model.py").write_text("not asked for")
    folder = pack(tmp_path / "source", tmp_path / "packed")
    assert (folder / "LICENSE").read_text() == "free"
    assert not (folder / "model.py").exists()
    assert "LICENSE" in open_packed_folder(folder).manifest.files


def test_links_that_lead_elsewhere_are_not_followed(official: Path, tmp_path: Path) -> None:
    shutil.copytree(official, tmp_path / "source")
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "source" / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(BadFileError, match="leads out of the folder"):
        pack(tmp_path / "source", tmp_path / "packed")


# --- stops and restarts


class Stop(Exception):
    """The process was killed."""


@pytest.mark.parametrize("writes", [1, 4])
def test_it_goes_on_where_it_was(
    writes: int, official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(pack(official, tmp_path / "whole"))
    written: list[str] = []

    def write(path: Path, *args: Any) -> WrittenFile:
        if len(written) == writes:
            path.with_name(f".{path.name}.partial").write_bytes(b"half")
            raise Stop
        written.append(path.name)
        return write_shard(path, *args)

    monkeypatch.setattr("quant.packer.write_shard", write)
    with pytest.raises(Stop):
        pack(official, tmp_path / "packed")
    assert not (tmp_path / "packed" / "manifest.json").exists()
    writes = -1
    pack(official, tmp_path / "packed")
    assert len(written) == len(set(written)) == 6  # no shard twice
    assert contents(tmp_path / "packed") == whole


def stopped_after(count: int, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run until `count` shards are finished."""
    left = iter([None] * count)

    def write(path: Path, *args: Any) -> WrittenFile:
        if next(left, Stop) is Stop:
            raise Stop
        return write_shard(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr("quant.packer.write_shard", write)
        with pytest.raises(Stop):
            pack(source, target)


def damage_shard(target: Path) -> None:
    shard = target / "layer-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


def cut_shard(target: Path) -> None:
    shard = target / "layer-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])


def cut_journal(target: Path) -> None:
    journal = target / JOURNAL_NAME
    journal.write_bytes(journal.read_bytes()[:-9])


def foreign_journal(target: Path) -> None:
    journal = target / JOURNAL_NAME
    journal.write_bytes(journal.read_bytes().replace(b'"packed 2"', b'"packed 0"'))


def odd_journal(target: Path) -> None:
    journal = target / JOURNAL_NAME
    journal.write_bytes(journal.read_bytes().replace(b'"sha256"', b'"sha512"'))


@pytest.mark.parametrize(
    "damage", [damage_shard, cut_shard, cut_journal, foreign_journal, odd_journal]
)
def test_what_cannot_be_trusted_is_done_again(
    damage: Any, official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "packed"
    stopped_after(2, official, target, monkeypatch)
    damage(target)
    pack(official, target)
    assert damaged_files(target) == []
    assert contents(target) == contents(pack(official, tmp_path / "whole"))


def test_progress_counts_up_to_the_whole(
    official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []
    stopped_after(3, official, tmp_path / "packed", monkeypatch)

    def note(progress: Progress) -> None:
        calls.append((progress.bytes_done, progress.bytes_total))

    pack(official, tmp_path / "packed", on_progress=note)
    done = [done for done, _ in calls]
    assert done == sorted(done) and len({total for _, total in calls}) == 1
    assert calls[0][0] > 0.2 * calls[0][1] and calls[-1][0] == calls[-1][1]


# --- in use


@pytest.mark.parametrize("kind", ["official", "mainline", "antirez"])
def test_logits_have_the_bits_of_weights_packed_in_memory(
    kind: str, official: Path, tmp_path: Path
) -> None:
    source = official
    if kind != "official":
        options = GgufOptions(MIXES[kind])
        source, _ = write_gguf(random_model(WHOLE), tmp_path / "m.gguf", options)
    config, weights = open_source(source)
    expected = FastTransformer(config, pack_dense(weights, 2), Team(2))
    mapped = load(pack(source, tmp_path / "packed"))
    actual = FastTransformer(config, pack_dense(mapped, 2), Team(2))
    ids = np.random.default_rng(0).integers(0, 300, 150).tolist()
    assert np.array_equal(logits(actual, ids), logits(expected, ids))
    assert np.array_equal(logits(actual, ids, [1]), logits(expected, ids, [1]))


def test_the_engine_opens_packed_folders(official: Path, tmp_path: Path) -> None:
    folder = pack(official, tmp_path / "packed")
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    rows = [
        np.concatenate([part.copy() for part in engine.logits(ids)])
        for engine in (
            Engine.load(place, Setup(threads=2, numerics="fast")) for place in (folder, official)
        )
    ]
    assert np.array_equal(rows[0], rows[1])
    with pytest.raises(UsageError, match="packed for --numerics fast"):
        Engine.load(folder, Setup(threads=2, numerics="exact"))


# --- refusals


def test_a_source_that_is_packed(official: Path, tmp_path: Path) -> None:
    folder = pack(official, tmp_path / "packed")
    with pytest.raises(UsageError, match="is packed already"):
        pack(folder, tmp_path / "again")


def test_a_disk_that_is_too_small(
    official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 24)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DoesNotFitError, match=r"needs \d\.\d MB, but the disk has 16\.8 MB"):
        pack(official, tmp_path / "packed")
    assert not list((tmp_path / "packed").glob("*.safetensors"))


def test_two_processes_at_once(official: Path, tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    with (
        FileLock(tmp_path / "packed" / LOCK_NAME),
        pytest.raises(LocalV4Error, match="another process"),
    ):
        pack(official, tmp_path / "packed")


def test_a_finished_target(official: Path, tmp_path: Path) -> None:
    pack(official, tmp_path / "packed")
    with pytest.raises(UsageError, match="finished model"):
        pack(official, tmp_path / "packed")


def test_a_target_with_other_files(official: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(UsageError, match="other files"):
        pack(official, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["letter.txt"]


def test_a_target_that_is_a_file(official: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(LocalV4Error, match="is a file"):
        pack(official, tmp_path / "file")


def test_an_expert_with_a_nan(tmp_path: Path) -> None:
    golden = load_golden("wide")
    name = "layers.2.ffn.experts.1.w2.scale"
    broken = replace(golden.stored[name], data=b"\xff" * len(golden.stored[name].data))
    stored = {**golden.stored, name: broken}
    source = write_stored(replace(golden, stored=stored), tmp_path / "source")
    with pytest.raises(
        BadFileError, match=r"layers\.2\.ffn\.experts\.1\.w2\.weight' holds a NaN or an infinity"
    ):
        pack(source, tmp_path / "packed")
