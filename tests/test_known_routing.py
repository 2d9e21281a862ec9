"""Hit rates of a forecast: from the model's own runs, from a trace, else those of typical text."""

from pathlib import Path

import numpy as np
import pytest
from terminal import LAPTOP, needs_jit, run_here

from localv4 import paths
from localv4.engine.earlier_routing import earlier_routing, traced_routing
from localv4.engine.fingerprint import weights_fingerprint
from localv4.errors import UsageError
from localv4.library.installed import embedded_model_path
from localv4.model.config import ModelConfig
from localv4.model.loading import read_model_config, read_names
from localv4.paging.replay import replay
from localv4.paging.synthetic_routes import STYLES, synthetic_trace
from localv4.paging.trace import Trace, TraceWriter
from localv4.paging.usage_file import Usage, save_usage, usage_path
from localv4.planning.hit_rate import CountedRouting, SeveralTopics
from localv4.planning.subject import flash_network
from localv4.planning.traced_routing import TracedRouting
from localv4.storage import open_checkpoint

pytestmark = needs_jit


@pytest.fixture(autouse=True)
def _own_home(own_folders: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(paths, "home_dir", lambda: tmp_path / "home")


def embedded() -> tuple[Path, ModelConfig, str]:
    path = embedded_model_path()
    with open_checkpoint(path) as checkpoint:
        return (
            path,
            read_model_config(checkpoint, read_names(checkpoint)),
            weights_fingerprint(checkpoint),
        )


def keep_usage() -> tuple[Path, ModelConfig]:
    """Pretend that an earlier session has used one half of the experts."""
    path, config, fingerprint = embedded()
    scores = np.zeros((config.n_layers, config.n_experts), np.float32)
    scores[:, : config.n_experts // 2] = 50
    save_usage(usage_path(fingerprint), fingerprint, Usage(scores))
    return path, config


def write(path: Path, trace: Trace) -> Path:
    with TraceWriter(path, trace.head) as writer:
        writer.append(trace.chosen, False)
    return path


def test_what_earlier_sessions_used_is_known() -> None:
    path, config, fingerprint = embedded()
    assert earlier_routing(path, config) is None
    keep_usage()
    found = earlier_routing(path, config)
    assert found is not None and found.source == "counted in earlier runs"
    assert found.hit_rate(0.5).likely == pytest.approx(1.0)
    assert 0.3 < found.hit_rate(0.25).likely < 0.6
    usage_path(fingerprint).write_bytes(b"damaged")
    assert earlier_routing(path, config) is None


def test_topics_count_apart() -> None:
    one, other = np.zeros((2, 40)), np.zeros((2, 40))
    one[:, :10], other[:, 10:20] = 30, 30
    assert SeveralTopics([one, other]).hit_rate(0.25).likely == pytest.approx(1.0)
    assert CountedRouting(one + other).hit_rate(0.25).likely < 0.6
    assert SeveralTopics([one, np.zeros((2, 40))]).hit_rate(0.25).likely == pytest.approx(1.0)
    with pytest.raises(ValueError, match="counted"):
        SeveralTopics([np.zeros((2, 40))])


def test_a_trace_is_replayed() -> None:
    trace = synthetic_trace(STYLES["calibrated"], 400, 1)
    total = trace.head.experts * sum(trace.head.record_bytes)
    hits = replay(trace, ["decay"], [int(0.34 * total)]).outcomes["decay"][0].hits
    found = TracedRouting(trace)
    rate = found.hit_rate(0.34)
    assert rate.likely == pytest.approx(hits, abs=1e-3)
    assert rate.low < rate.likely < rate.high < 1
    assert found.hit_rate(1.0).low == 1
    with pytest.raises(UsageError, match="needed"):
        TracedRouting(synthetic_trace(STYLES["calibrated"], 120, 1))


def test_a_trace_of_another_network_is_refused(tmp_path: Path) -> None:
    _, config, _ = embedded()
    file = write(tmp_path / "t.trace", synthetic_trace(STYLES["calibrated"], 320, 1))
    assert traced_routing(file, flash_network()).source == "replayed from a trace"
    with pytest.raises(UsageError, match="of a network with 6 of 256"):
        traced_routing(file, config)


def test_fit_names_where_its_hit_rate_comes_from(tmp_path: Path) -> None:
    file = write(tmp_path / "t.trace", synthetic_trace(STYLES["diverse"], 320, 1))
    typical = run_here("fit", "v4-flash:q4", *LAPTOP, home=tmp_path)
    traced = run_here("fit", "v4-flash:q4", *LAPTOP, "--routes", str(file), home=tmp_path)
    assert typical.code == traced.code == 0, traced.stderr
    assert "(typical text, simulated)" in typical.stdout
    assert "(replayed from a trace)" in traced.stdout
    assert "typical" not in traced.stdout
