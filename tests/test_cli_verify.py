"""`localv4 verify`: a table, a document, and exit code 5 with the file that is wrong."""

import hashlib
import json
from pathlib import Path

import pytest
from terminal import run_here

NAMES = ("layer-00000.safetensors", "embedding-and-head.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the manifest of a packed model."""
    folder = tmp_path / "data" / "models" / "mine"
    folder.mkdir(parents=True)
    files = {}
    for name in NAMES:
        data = name.encode() * 1000
        (folder / name).write_bytes(data)
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    container = {"format": "localv4-packed", "version": 1}
    manifest = {"container": container, "source": "a test", "files": files, "matrices": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_everything_right(tmp_path: Path, folder: Path) -> None:
    for arguments in (["mine"], ["-m", "mine"], [str(folder)], []):
        done = run_here("verify", *arguments, home=tmp_path)
        assert done.code == 0
        rows = [line.split() for line in done.stdout.splitlines()]
        assert [(row[0], row[-1]) for row in rows[1:]] == [(name, "right") for name in NAMES]
        assert done.stderr == "mine: all 2 files right\n"
    assert run_here("verify", "-q", "mine", home=tmp_path).stderr == ""


def test_one_flipped_bit(tmp_path: Path, folder: Path) -> None:
    file = folder / NAMES[0]
    data = bytearray(file.read_bytes())
    data[7] ^= 1
    file.write_bytes(data)
    done = run_here("verify", "mine", home=tmp_path)
    assert done.code == 5
    assert "damaged: its SHA-256 is not " in done.stdout
    assert done.stdout.splitlines()[2].endswith("right")
    assert f"error: bad file ({file}: its SHA-256" in done.stderr
    assert "all 2 files" not in done.stderr
    done = run_here("verify", "mine", "--json", home=tmp_path)
    assert done.code == 5
    document = json.loads(done.stdout)
    assert document["right"] is False
    assert [item["state"] for item in document["files"]] == ["damaged", "right"]


def test_files_that_are_not_there(tmp_path: Path, folder: Path) -> None:
    (folder / NAMES[0]).unlink()
    done = run_here("verify", str(folder), home=tmp_path)
    assert (done.code, "missing: the file is not there" in done.stdout) == (5, True)
    (folder / NAMES[1]).unlink()
    assert "; one more file is wrong" in run_here("verify", str(folder), home=tmp_path).stderr


def test_no_digests(tmp_path: Path) -> None:
    done = run_here("verify", "tiny-v4", home=tmp_path)
    assert (done.code, done.stdout) == (1, "")
    assert "no digests of tiny-v4 are known" in done.stderr
    assert run_here("verify", "nobody", home=tmp_path).code == 1
    assert run_here("verify", "a", "-m", "b", home=tmp_path).code == 2
