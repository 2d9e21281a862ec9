"""The picture of a benchmark: what is drawn, and where it cannot be."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from localv4.cli import bench_plot, picture
from localv4.cli.bench_report import Report
from localv4.engine.measurement import (
    Case,
    CaseKind,
    Measurement,
    Memory,
    PeerResult,
    Sample,
    Series,
)
from localv4.errors import LocalV4Error, NotFoundError, UsageError
from localv4.planning.roofs import Roof

GB = 1_000_000_000


def measured(
    kind: CaseKind, tokens: int, depth: int, rate: float, peer_rate: float | None
) -> Measurement:
    """Return a test with two samples that are a little off a rate."""

    def series(rate: float) -> Series:
        return Series(tokens, tuple(Sample(tokens / (rate + off), 0.0) for off in (-1, 1)))

    return Measurement(
        case=Case(kind, tokens, depth),
        own=series(rate),
        roofs=(Roof(36.0 * GB, 1e12), Roof(40.0 * GB, 1e12)),
        token_bytes=GB // 2 + depth * 1000,
        state_bytes=0,
        token_macs=1,
        memory=Memory(1, {}),
        peer=None if peer_rate is None else PeerResult(series(peer_rate), None),
    )


def report(*measurements: Measurement) -> Report:
    """Return what a picture needs of a report."""
    benchmark = SimpleNamespace(threads=2, numerics="fast")
    found = SimpleNamespace(model="a $b$", measurements=list(measurements), benchmark=benchmark)
    return cast(Report, found)


TESTS: list[tuple[CaseKind, int, float]] = [("pp", 512, 100), ("pp", 2048, 150), ("tg", 128, 60)]
DEEP = [
    measured(kind, tokens, depth, rate - depth / 1000, 10)
    for kind, tokens, rate in TESTS
    for depth in (0, 4096, 32768)
]


def test_lines() -> None:
    pytest.importorskip("matplotlib", reason="comes with the plot extra")
    figure = bench_plot.make_figure(report(*DEEP))
    reading, generating = figure.axes
    lines = {str(line.get_label()): np.asarray(line.get_ydata()) for line in generating.get_lines()}
    assert set(lines) == {"localv4 tg128", "llama.cpp tg128", "read roof (40.0 GB/s)"}
    assert list(lines["localv4 tg128"]) == pytest.approx([60, 55.9, 27.2], abs=0.1)
    # 40 GB/s over half a GB and the state
    roof = [80, 40e9 / (0.5e9 + 4096e3), 40e9 / (0.5e9 + 32768e3)]
    assert list(lines["read roof (40.0 GB/s)"]) == pytest.approx(roof)
    assert len(reading.get_lines()) == 4
    ticks = [text.get_text() for text in generating.get_xticklabels()]
    assert ticks == ["0", "4,096", "32,768"]
    texts = [text.get_text() for text in generating.texts]
    assert "60 (75 %)" in texts and "10" in texts
    assert generating.get_ylim()[0] == 0
    assert figure.get_suptitle().startswith(r"a \$b\$, fast, 2 threads, ")


@pytest.mark.parametrize(
    ("heights", "sides"),
    [
        ([50, 20], ["above", "above"]),
        ([50, 45], ["above", "below"]),
        ([5, 8], ["right", "above"]),  # no room between the lower one and the axis
        ([50, 45, 41, 10], ["above", "right", "below", "above"]),
        ([50, 45, 30], ["above", "right", "above"]),
        ([40, 40], ["below", "above"]),
    ],
)
def test_labels_keep_apart(heights: list[float], sides: list[str]) -> None:
    assert bench_plot.label_sides(heights, 10) == sides


def test_bars_for_a_single_depth() -> None:
    pytest.importorskip("matplotlib", reason="comes with the plot extra")
    cases = [measured("tg", 128, 64, 60, 20), measured("tg", 256, 64, 50, None)]
    figure = bench_plot.make_figure(report(*cases, measured("tg", 512, 64, 40, None)))
    (axes,) = figure.axes
    heights = [bar.get_height() for bar in axes.patches]  # type: ignore[attr-defined]
    assert heights == pytest.approx([60, 20, 50, 40], abs=0.1)
    assert [line.get_label() for line in axes.get_lines()] == ["read roof (40.0 GB/s)"]
    assert axes.get_xlabel() == "with 64 tokens in the context before"


@pytest.mark.parametrize("suffix", ["png", "SVG"])
def test_files(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="comes with the plot extra")
    first, again = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    for path in (first, again):
        bench_plot.draw(report(*DEEP), path)
    data = first.read_bytes()
    start = b"\x89PNG" if suffix == "png" else b"<?xml"
    assert data.startswith(start)
    assert b"<dc:date>" not in data
    assert data == again.read_bytes()
    assert sorted(tmp_path.iterdir()) == [first, again]
    bench_plot.draw(report(), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="comes with the plot extra")
    (tmp_path / "a.png").mkdir()
    with pytest.raises(LocalV4Error, match=r"a\.png"):
        bench_plot.draw(report(*DEEP), tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_targets_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"speed\.jpg"):
        picture.check_target(tmp_path / "speed.jpg")
    with pytest.raises(NotFoundError, match="no folder"):
        picture.check_target(tmp_path / "none" / "a.png")
    (tmp_path / "b.png").mkdir()
    with pytest.raises(LocalV4Error, match="cannot write"):
        picture.check_target(tmp_path / "b.png")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NotFoundError, match="matplotlib") as caught:
        picture.check_target(tmp_path / "a.png")
    assert caught.value.hint == "pip install 'localv4[plot]'"
