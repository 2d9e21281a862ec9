"""The proof sees every value that was kept, and every one that was not."""

import json
from dataclasses import replace
from pathlib import Path

import numba
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf_writer import ROLES, GgufOptions, write_gguf
from golden_files import load_golden, random_model, write_stored
from terminal import run_here
from test_packer import MIXES, WHOLE, leaves, load, open_source, pack

from localv4.errors import BadFileError
from localv4.model.matrix import Matrix, decode
from localv4.model.packing import PackedExpert, PackedMatrix
from localv4.storage.packed_folder import open_packed_folder
from quant.proof import prove
from quant.unpacking import unpacked

KINDS = MIXES | {
    kind.name: dict.fromkeys(set(ROLES.values()) - {"hc", "ape"}, kind)
    for kind in (Type.Q6_K, Type.Q3_K, Type.Q2_K)
}
"""Mixes of types that together have every format of a packed folder."""

pytestmark = pytest.mark.skipif(
    bool(numba.config.DISABLE_JIT), reason="kernels that take addresses need the compiler"
)


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stored(load_golden("wide"), tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="module")
def packed(official: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(official, tmp_path_factory.mktemp("proof") / "packed")


def test_a_lossless_folder(official: Path, packed: Path) -> None:
    compared: list[int] = []
    proof = prove(packed, official, compared.append, threads=2)
    assert proof.wrong_values == 0
    assert len(proof.of("equal")) == len(proof.tensors) > 100
    config, weights = open_source(official)
    matrices = [leaf for _, leaf in leaves(weights) if isinstance(leaf, Matrix)]
    assert sum(compared) > sum(matrix.nbytes for matrix in matrices)
    assert config.n_layers > 0


@pytest.mark.parametrize("mix", KINDS)
def test_lossless_from_ggml_types(mix: str, tmp_path: Path) -> None:
    source, _ = write_gguf(random_model(WHOLE), tmp_path / "m.gguf", GgufOptions(KINDS[mix]))
    proof = prove(pack(source, tmp_path / "packed"), source)
    assert proof.wrong_values == 0 and not proof.of("different") and not proof.of("rounded")


def flipped(folder: Path, tensor: str, at: int, name: str) -> None:
    """Flip a bit of a tensor in its file."""
    with open_packed_folder(folder) as opened:
        place = opened.tensors[tensor].offset + at
    path = folder / name
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("tensor", "at", "found", "file"),
    [
        ("layers.1.attn.wq_b.weight", 100, "layers.1.attn.wq_b.weight", "layer-00001"),
        ("layers.1.attn.wq_b.scale", 3, "layers.1.attn.wq_b.weight", "layer-00001"),
        ("layers.1.ffn.experts", 64, "layers.1.ffn.experts.0.w1.weight", "layer-00001"),
        ("layers.1.attn_norm.weight", 2, "layers.1.attn_norm.weight", "layer-00001"),
        ("head.weight", 7, "head.weight", "embedding-and-head"),
        ("embed.weight", 7, "embed.weight", "embedding-and-head"),
    ],
)
def test_one_bit_is_seen(
    tensor: str, at: int, found: str, file: str, official: Path, tmp_path: Path
) -> None:
    folder = pack(official, tmp_path / "packed")
    flipped(folder, tensor, at, f"{file}.safetensors")
    wrong = prove(folder, official).of("different")
    assert [item.name for item in wrong] == [found]
    assert wrong[0].different >= 1


def test_another_source(packed: Path, tmp_path: Path) -> None:
    other = write_stored(load_golden("edges"), tmp_path / "other")
    with pytest.raises(BadFileError):
        prove(packed, other)


def test_unpacking_has_the_bits_of_the_decoders(tmp_path: Path) -> None:
    """Every format of every matrix, whole and from a row in the middle on."""
    seen = set()
    for number, mix in enumerate(KINDS.values()):
        source, _ = write_gguf(random_model(WHOLE), tmp_path / f"{number}.gguf", GgufOptions(mix))
        stored = dict(leaves(open_source(source)[1]))
        weights = load(pack(source, tmp_path / f"packed{number}"))
        for place, leaf in leaves(weights):
            if not isinstance(leaf, PackedMatrix):
                continue
            expected = decode(stored[place])
            assert np.array_equal(unpacked(leaf, 0, leaf.rows), expected), place
            if leaf.rows > 128:
                assert np.array_equal(unpacked(leaf, 128, leaf.rows), expected[128:]), place
            seen.add(leaf.form.name)
        for layer, original in zip(weights.layers, open_source(source)[1].layers, strict=True):
            for expert, own in zip(layer.experts, original.experts, strict=True):
                if isinstance(expert, PackedExpert):
                    assert isinstance(expert.w1, PackedMatrix)
                    assert np.array_equal(unpacked(expert.w1, 0, own.w1.rows), decode(own.w1))
                    seen.add(expert.form.gate_up.name)
    assert seen == {"MX4", "Q4", "Q8", "Q4K", "Q6", "Q3", "Q2", "IQ2", "B16", "F32R"}


def test_the_command(official: Path, packed: Path, tmp_path: Path) -> None:
    done = run_here("verify", str(packed), "--source", str(official), home=tmp_path)
    assert done.code == 0
    assert "equal" in done.stdout and "MX4" in done.stdout and "rounded" not in done.stdout


def test_the_command_finds_other_values(packed: Path, tmp_path: Path) -> None:
    golden = load_golden("wide")
    name = "layers.0.ffn.experts.1.w1.weight"
    tensor = golden.stored[name]
    changed = replace(tensor, data=bytes([tensor.data[0] ^ 1]) + tensor.data[1:])
    stored = {**golden.stored, name: changed}
    other = write_stored(replace(golden, stored=stored), tmp_path / "other")
    done = run_here("verify", str(packed), "--source", str(other), "--json", home=tmp_path)
    assert done.code == 5
    assert json.loads(done.stdout)["proof"]["wrong_values"] == 1
    assert f"1 values of {name} are not those of the source" in done.stderr
