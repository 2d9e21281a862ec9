"""Conversions by recipes: right values, refusals, stops at every step, bounded memory."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numba
import numpy as np
import psutil
import pytest
from conversions import add_tokenizer, converted, copied, drawn_moments, official_model
from gguf import GGMLQuantizationType, quants
from golden_files import load_golden, write_stored
from model_folders import damaged_files
from numpy.typing import NDArray
from test_packer import contents, leaves, load, open_source

from localv4.errors import BadFileError, DoesNotFitError, UsageError
from localv4.kernels import blocks
from localv4.model.matrix import Matrix, decode
from localv4.model.packing import PackedExpert, PackedMatrix
from localv4.storage import open_checkpoint
from localv4.storage.packed_folder import open_packed_folder
from quant import direct_writer, output_file
from quant.formats import GGML_TARGETS, PACKED_TARGETS
from quant.journal import JOURNAL_NAME
from quant.proof import prove
from quant.quantizers import quantize_rows
from quant.recipe import Recipe, Rule
from quant.strips import give_back, is_finite, strip, strips_of
from quant.task import Progress
from quant.tensor_class import TensorClass
from quant.unpacking import unpacked

pytestmark = pytest.mark.skipif(
    bool(numba.config.DISABLE_JIT), reason="kernels that take addresses need the compiler"
)

GGML_TYPES = {kind.name: kind for kind in GGMLQuantizationType}
DENSE = ["attention_q", "attention_kv", "attention_o", "shared_gate_up", "shared_down", "head"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in official storage."""
    return official_model(tmp_path_factory.mktemp("source"))


def recipe(*formats: str, tensors: list[str] = DENSE, **fields: Any) -> Recipe:
    """A recipe of one rule."""
    kinds = [TensorClass(kind) for kind in tensors]
    rule = Rule(tensors=kinds, formats=list(formats), **fields)
    return Recipe(name="test", summary="", rules=[rule])


# --- values


@pytest.mark.parametrize("name", ["Q8", "Q6", "Q4", "Q4K", "Q3", "Q2", "IQ2", "MX4"])
def test_matrices_have_the_values_of_the_quantizer(name: str, source: Path, tmp_path: Path) -> None:
    chosen = recipe(name, tensors=["head", "attention_q"])
    folder = converted(source, tmp_path / "out", chosen)
    stored, weights = open_source(source)[1], load(folder)
    target = PACKED_TARGETS[name]
    pairs = [(stored.head, weights.head)]
    pairs += [
        (old.attention.wq_a, new.attention.wq_a)
        for old, new in zip(stored.layers, weights.layers, strict=True)
    ]
    seen = 0
    for before, after in pairs:
        assert isinstance(after, PackedMatrix)
        if not target.fits(before.rows, before.cols) or after.form.name != name:
            continue
        kin = quantize_rows(decode(before), target.kin)
        expected = quants.dequantize(kin.blocks, GGML_TYPES[target.kin])
        assert np.array_equal(unpacked(after, 0, after.rows), expected)
        seen += 1
    assert seen > 0


def test_experts_are_rounded_one_by_one(source: Path, tmp_path: Path) -> None:
    chosen = recipe("Q3", "Q4", tensors=["gate_up", "down"])
    folder = converted(source, tmp_path / "out", chosen)
    stored, weights = open_source(source)[1], load(folder)
    for old, new in zip(stored.layers[1].experts, weights.layers[1].experts, strict=True):
        assert isinstance(new, PackedExpert)
        for before, after in ((old.w1, new.w1), (old.w2, new.w2), (old.w3, new.w3)):
            assert isinstance(after, PackedMatrix)
            kin = PACKED_TARGETS[after.form.name].kin if after.form.name != "MX4" else None
            values = unpacked(after, 0, after.rows)
            if kin is None:
                assert np.array_equal(values, decode(before))
            else:
                expected = quantize_rows(decode(before), kin).blocks
                assert np.array_equal(values, quants.dequantize(expected, GGML_TYPES[kin]))


def test_the_lossless_recipe_keeps_every_value(source: Path, tmp_path: Path) -> None:
    proof = prove(converted(source, tmp_path / "out", "lossless"), source)
    assert proof.wrong_values == 0 and not proof.of("rounded")


def test_published_experts_are_never_rounded_to_another_grid_of_4_bits(
    source: Path, tmp_path: Path
) -> None:
    for name in ("MX4", "Q4", "Q4K"):
        chosen = recipe(name, tensors=["gate_up", "down"])
        proof = prove(converted(source, tmp_path / name, chosen), source)
        assert proof.wrong_values == 0 and not proof.of("rounded")


class Uses:
    """Statistics in which the last experts are chosen most, and some columns matter alone."""

    def __init__(self, experts: int) -> None:
        self.experts = experts

    def weights_for(self, official: str, cols: int | None = None) -> NDArray[np.float32] | None:
        assert cols is not None
        weights = np.full(cols, 1e-3, np.float32)
        weights[: cols // 4] = 100.0
        return weights

    def expert_counts(self, layer: int) -> NDArray[np.float32] | None:
        return np.arange(self.experts, dtype=np.float32)


def test_experts_of_several_forms_in_one_layer(source: Path, tmp_path: Path) -> None:
    experts = len(open_source(source)[1].layers[0].experts)
    routed = [TensorClass.GATE_UP, TensorClass.DOWN]
    chosen = Recipe(
        name="test",
        summary="",
        rules=[
            Rule(tensors=routed, formats=["Q2", "Q3"]),
            Rule(tensors=routed, formats=["MX4"], hottest=0.5),
        ],
    )
    with pytest.raises(UsageError, match="needs to know which experts"):
        converted(source, tmp_path / "none", chosen)
    with pytest.raises(UsageError, match="one type for all experts"):
        converted(source, tmp_path / "x.gguf", chosen, statistics=Uses(experts))
    folder = converted(source, tmp_path / "out", chosen, statistics=Uses(experts))
    assert damaged_files(folder) == []
    stored, weights = open_source(source)[1], load(folder)
    forms = [set(), set()]  # type: ignore[var-annotated]
    for old, new in zip(stored.layers, weights.layers, strict=True):
        for number, (before, after) in enumerate(zip(old.experts, new.experts, strict=True)):
            assert isinstance(after, PackedExpert) and isinstance(after.w1, PackedMatrix)
            is_hot = number >= experts // 2
            forms[is_hot].add(after.form.gate_up.name)
            same = np.array_equal(unpacked(after.w1, 0, after.w1.rows), decode(before.w1))
            assert same == is_hot
    assert forms[1] == {"MX4"} and "MX4" not in forms[0]
    with open_packed_folder(folder) as opened:
        document = json.loads((folder / "manifest.json").read_text())
        entries = [entry for entry in opened.manifest.matrices.values() if entry.experts]
    assert document["container"]["version"] == 2
    assert all(len(entry.experts) == entry.records for entry in entries)
    assert len(entries) == 2 * len(weights.layers)


def test_importance_moves_the_error_to_other_columns(source: Path, tmp_path: Path) -> None:
    chosen = recipe("Q2", "Q3", "Q4", tensors=["attention_o"])
    errors = []
    for number, statistics in enumerate((None, Uses(8))):
        folder = converted(source, tmp_path / str(number), chosen, statistics=statistics)
        before, after = open_source(source)[1].layers[0], load(folder).layers[0]
        matrix = after.attention.wo_b
        assert isinstance(matrix, PackedMatrix)
        difference = unpacked(matrix, 0, matrix.rows) - decode(before.attention.wo_b)
        errors.append(float(np.square(difference[:, : matrix.cols // 4]).sum()))
    assert errors[1] < errors[0]


def test_the_report_tells_what_was_done(source: Path, tmp_path: Path) -> None:
    folder = converted(source, tmp_path / "out", "q4")
    document = json.loads((folder / "quantization.json").read_text())
    assert document["recipe"]["name"] == "q4"
    rows = {row["class"]: row for row in document["classes"]}
    assert rows["gate_up"]["exact"] == rows["gate_up"]["matrices"]
    assert rows["gate_up"]["relative_error"] == 0.0
    assert rows["attention_q"]["exact"] == 0
    assert 0.02 < rows["attention_q"]["relative_error"] < 0.2


def test_threads_change_no_byte(source: Path, tmp_path: Path) -> None:
    one = converted(source, tmp_path / "one", "q2", threads=1)
    assert contents(converted(source, tmp_path / "three", "q2", threads=3)) == contents(one)


# --- what is not finite


def damaged(source: Path, target: Path, name: str, data: Callable[[bytes], bytes]) -> Path:
    """A copy of the model with other bytes in a tensor."""
    golden = load_golden("wide")
    tensor = golden.stored[name]
    stored = {**golden.stored, name: replace(tensor, data=data(tensor.data))}
    write_stored(replace(golden, stored=stored), target)
    add_tokenizer(target, golden.preset.dims["vocab_size"])
    return target


FAULTS = {
    "FP8 NaN": ("layers.1.attn.wq_a.weight", lambda raw: b"\x7f" + raw[1:]),
    "FP8 scale": ("layers.1.attn.wq_a.scale", lambda raw: b"\xff" + raw[1:]),
    "FP4 scale": ("layers.1.ffn.experts.0.w1.scale", lambda raw: raw[:-1] + b"\xff"),
    "BF16 infinity": ("head.weight", lambda raw: raw[:-2] + b"\x80\x7f"),
    "BF16 NaN in the embedding": ("embed.weight", lambda raw: b"\xc0\xff" + raw[2:]),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("form", ["lossless", "q2", "lossless.gguf", "q2.gguf"])
def test_what_is_not_finite(fault: str, form: str, source: Path, tmp_path: Path) -> None:
    name, change = FAULTS[fault]
    broken = damaged(source, tmp_path / "source", name, change)
    named = name.replace(".scale", ".weight").replace(".", r"\.")
    with pytest.raises(BadFileError, match=f"{named}.* holds a NaN or an infinity"):
        converted(broken, tmp_path / f"out.{form}", form.removesuffix(".gguf"))
    assert not list(tmp_path.glob("out*/manifest.json")) + list(tmp_path.glob("[!.]*.gguf"))


@pytest.mark.parametrize("name", [name for name in GGML_TARGETS if name not in ("BF16", "F32")])
def test_scales_that_are_not_finite(name: str) -> None:
    values = np.random.default_rng(0).normal(size=(4, 512)).astype(np.float32)
    data = quantize_rows(values, name).blocks
    fmt = blocks.FORMATS.index(name)
    good = Matrix(fmt, 4, 512, data, np.zeros((1, 1), np.uint8))
    assert is_finite(good)
    seen = 0
    for byte in range(blocks.UNITS[fmt][1]):
        bad = data.copy()
        bad[3, byte] |= 0xFF if name == "MXFP4" else 0x7C
        with np.errstate(all="ignore"):
            expected = np.isfinite(decode(replace(good, data=bad))).all()
        assert is_finite(replace(good, data=bad)) == expected, byte
        seen += not expected
    assert seen > 0


@pytest.mark.parametrize("name", ["lossless", "q3", "q2"])
def test_records_in_memory_that_was_used_before(
    name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = contents(converted(source, tmp_path / "out", name))
    lent: list[int] = []

    def used(nbytes: int) -> NDArray[np.uint8]:
        lent.append(nbytes)
        return np.full(nbytes, 0xA5, np.uint8)

    monkeypatch.setattr(output_file, "aligned_bytes", used)
    assert contents(converted(source, tmp_path / "again", name, threads=1)) == expected
    with open_packed_folder(tmp_path / "out") as opened:
        records = sum(entry.records for entry in opened.manifest.matrices.values())
    assert 0 < len(lent) < records


# --- stops


@pytest.mark.parametrize(("form", "is_fed"), [("packed", 0), ("packed", 1), ("gguf", 0)])
def test_killed_at_any_step_it_goes_on_to_the_same_bytes(
    form: str, is_fed: bool, source: Path, tmp_path: Path
) -> None:
    """Every 37th step; `python tests/crash_loop.py packed SOURCE SCRATCH 1` takes all."""
    script = Path(__file__).with_name("crash_loop.py")
    arguments = [sys.executable, str(script), form, str(source), str(tmp_path), "37"]
    if is_fed:
        arguments.append(str(drawn_moments(source, tmp_path / "moments.safetensors")))
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    steps, taken = map(int, done.stdout.split())
    assert steps > 100 and taken >= 8


@pytest.mark.parametrize("name", ["out", "out.gguf"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_becomes_full(
    name: str, code: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = converted(source, tmp_path / "whole" / name)
    left, write = iter(range(30)), os.write

    def failing(descriptor: int, data: Any) -> int:
        if next(left, None) is None:
            raise OSError(code, os.strerror(code))
        return write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(direct_writer, "BLOCK_BYTES", 1 << 13)
        patch.setattr(os, "write", failing)
        with pytest.raises(DoesNotFitError, match="cannot write") as caught:
            converted(source, tmp_path / name)
    assert caught.value.exit_code == 4 and "it goes on where it was" in str(caught.value.hint)
    target = converted(source, tmp_path / name)
    if target.is_dir():
        assert contents(target) == contents(whole)
    else:
        assert target.read_bytes() == whole.read_bytes()


def test_space_is_reserved_before_any_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(output_file.os, "posix_fallocate", full)
        with pytest.raises(DoesNotFitError, match="the disk has"):
            converted(source, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir() if "partial" in file.name] == []
    sizes: list[int] = []

    def note(progress: Progress) -> None:
        if not sizes:
            sizes.extend(f.stat().st_size for f in (tmp_path / "out").glob(".*.partial"))

    folder = converted(source, tmp_path / "out", on_progress=note)
    with open_packed_folder(folder) as opened:
        written = [entry.nbytes for name, entry in opened.manifest.files.items()]
    assert set(sizes) <= set(written) and len(sizes) == len(list(folder.glob("*.safetensors")))


@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_a_source_that_changes(name: str, source: Path, tmp_path: Path) -> None:
    copy = copied(source, tmp_path / "source")
    shard = next(copy.glob("*.safetensors"))

    def touch(progress: Progress) -> None:
        os.utime(shard, ns=(1, 1))

    with pytest.raises(BadFileError, match="changed while in use"):
        converted(copy, tmp_path / name, on_progress=touch)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not (tmp_path / "out.gguf").exists()
    found = converted(copy, tmp_path / name)
    (tmp_path / "whole").mkdir()
    whole = converted(copy, tmp_path / "whole" / name)
    if found.is_dir():
        assert contents(found) == contents(whole)
    else:
        assert found.read_bytes() == whole.read_bytes()


def test_another_recipe_does_not_go_on_with_these_files(source: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(progress: Progress) -> None:
        if len(list((tmp_path / "out").glob("*.safetensors"))) == 2:
            raise Stop

    with pytest.raises(Stop):
        converted(source, tmp_path / "out", "q4", on_progress=stop)
    assert (tmp_path / "out" / JOURNAL_NAME).exists()
    found = contents(converted(source, tmp_path / "out", "q2"))
    assert found == contents(converted(source, tmp_path / "whole", "q2"))


@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_progress_ends_with_everything_done(name: str, source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, ...]] = []
    last: list[Progress] = []

    def note(progress: Progress) -> None:
        last[:] = [progress]
        seen.append((progress.bytes_done, progress.tensors_done))

    target = converted(source, tmp_path / name, on_progress=note)
    files = sorted(target.glob("*.safetensors")) if target.is_dir() else [target]
    nbytes = sum(file.stat().st_size for file in files)
    with open_checkpoint(target) as opened:
        tensors = len(opened.tensors)
    assert (last[0].bytes_done, last[0].tensors_done) == (nbytes, tensors)
    assert (last[0].bytes_total, last[0].tensors_total) == (nbytes, tensors)
    assert seen == sorted(seen) and len({done for _, done in seen}) > 10


# --- memory


def test_pages_that_were_read_are_given_back(tmp_path: Path) -> None:
    """Mapped pages count as memory of the process until it says that it has no need of them."""
    rows, cols = 4096, 4096
    header = json.dumps(
        {"m": {"dtype": "F32", "shape": [rows, cols], "data_offsets": [0, 4 * rows * cols]}}
    ).encode()
    with (tmp_path / "m.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.write(bytes(4 * rows * cols))
    process = psutil.Process()
    with open_checkpoint(tmp_path / "m.safetensors") as opened:
        data = opened.bytes("m").reshape(rows, 4 * cols)
        matrix = Matrix(blocks.F32, rows, cols, data, np.zeros((1, 1), np.uint8))
        before = process.memory_info().rss
        assert is_finite(strip(matrix, 0, rows // 2))
        read = process.memory_info().rss
        give_back(matrix)
        after = process.memory_info().rss
    assert read - before > 2 * rows * cols * 0.9
    assert after - before < rows * cols


def test_strips_cover_all_rows_once() -> None:
    for rows, cols in ((1, 16), (128, 1 << 20), (1000, 300), (129280, 4096)):
        found = list(strips_of(rows, cols))
        assert [first for first, _ in found] == [0, *(end for _, end in found[:-1])]
        assert found[-1][1] == rows and all(first % 128 == 0 for first, _ in found)


def test_leaves_of_the_source_are_not_changed(source: Path, tmp_path: Path) -> None:
    before = contents(source)
    converted(source, tmp_path / "out", "q2")
    assert contents(source) == before
    assert len(dict(leaves(load(tmp_path / "out")))) > 100
