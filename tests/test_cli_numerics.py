"""The option that chooses between exact and fast arithmetic."""

import json
from pathlib import Path

import numpy as np
import pytest
from terminal import needs_jit, run_localv4

pytestmark = needs_jit


@pytest.mark.parametrize("name", ["exact", "fast"])
def test_both_answer(name: str, tmp_path: Path) -> None:
    question = "What is the capital of France?"
    done = run_localv4("run", "-q", "--greedy", "--numerics", name, question, home=tmp_path)
    assert (done.returncode, done.stdout.decode()) == (0, "The capital of France is Paris.\n")


def test_they_differ_by_little(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.json"
    tokens.write_text(json.dumps([0, 8179, 1000, 2000, 8180, 8191]))
    logits = []
    for name in ("exact", "fast"):
        out = tmp_path / f"{name}.npy"
        arguments = ("eval", "logits", "-q", "--tokens", str(tokens), "--out", str(out))
        assert run_localv4(*arguments, "--numerics", name, home=tmp_path).returncode == 0
        logits.append(np.load(out))
    assert 1e-4 < np.abs(logits[0] - logits[1]).mean() < 0.1


def test_others_are_refused(tmp_path: Path) -> None:
    done = run_localv4("run", "--numerics", "official-sim", "x", home=tmp_path)
    assert done.returncode == 2
    assert "exact" in done.stderr.decode() and "fast" in done.stderr.decode()
