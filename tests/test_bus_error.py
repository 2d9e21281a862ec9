"""A model file that is cut or overwritten while it is read never ends in silence or wrong text."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from terminal import needs_jit, start_localv4

from localv4.library.installed import embedded_model_path

CUT = """
import mmap, os, sys
from localv4.kernels.bus_error import end_with_a_line
end_with_a_line()
with open(sys.argv[1], "w+b") as file:
    file.truncate(100_000)
    pages = mmap.mmap(file.fileno(), 100_000)
    os.truncate(sys.argv[1], 10)
    print(pages[90_000])
"""

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="mapped files cannot be cut")


@posix_only
def test_a_cut_page_ends_the_process_with_a_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CUT, str(tmp_path / "mapped")], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.strip().startswith("error: bad file")
    assert len(done.stderr.strip().splitlines()) == 1


@posix_only
@needs_jit
@pytest.mark.parametrize("is_cut", [True, False])
def test_a_change_during_the_answer_ends_it(is_cut: bool, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(embedded_model_path(), folder)
    story = "Tell me a short story about a fox."
    process = start_localv4("run", "-q", "-m", str(folder), story, home=tmp_path)
    assert process.stdout is not None
    os.read(process.stdout.fileno(), 1)
    for file in folder.glob("*.safetensors"):
        if is_cut:
            os.truncate(file, 4096)
        else:
            with file.open("r+b") as written:
                written.seek(200_000)
                written.write(bytes(file.stat().st_size - 200_000))
    _, error = process.communicate(timeout=60)
    assert process.returncode == 5
    assert error.decode().strip().startswith("error: bad file")
    assert len(error.decode().strip().splitlines()) == 1
