"""`localv4 doctor`: what is told of a machine, its problems, and its models."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from terminal import needs_jit, run_here

from localv4.cuda.speed import GpuSpeed
from localv4.planning import history, measuring, problems, system
from localv4.planning.machine import DiskFacts, GpuFacts, KernelShares, Machine
from localv4.planning.memory import Memory
from localv4.planning.plan import GIB

pytestmark = needs_jit

MACHINE = Machine(
    Memory(64 * GIB, 60 * GIB),
    8,
    read_bytes_s=90e9,
    int8_ops_s=3e12,
    disk=DiskFacts(7e9),
    disk_free=500 * GIB,
    kernels=KernelShares(0.8, 0.4, 5e-5),
    read_by_threads={1: 30e9, 8: 90e9},
    cpu="Some CPU",
    isa="avx2",
    measured_on="2026-11-01",
)


@pytest.fixture(autouse=True)
def _known_machine(own_folders: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring takes long, and tells something else every time."""
    monkeypatch.setattr(measuring, "measured_machine", lambda *_: MACHINE)
    monkeypatch.setattr(measuring, "known_machine", lambda *_: MACHINE)


def doctor(*arguments: str, home: Path) -> str:
    done = run_here("doctor", *arguments, home=home)
    assert done.code == 0, done.stderr
    return done.stdout


def test_machine_and_models(tmp_path: Path) -> None:
    text = doctor(home=tmp_path)
    assert text.startswith("Machine\n  processor")
    assert "90.0 GB/s (by threads: 1: 30.0, 8: 90.0)" in text
    assert "80 % of the bandwidth, 40 % of the int8 peak" in text
    row = next(line for line in text.splitlines() if line.startswith("tiny-v4"))
    assert row.split()[1] == "fits"
    assert "\x1b" not in text


def test_json_holds_no_names_of_folders(tmp_path: Path) -> None:
    text = doctor("--json", home=tmp_path)
    found = json.loads(text)
    assert found["machine"]["read_bytes_s_by_threads"] == {"1": 30e9, "8": 90e9}
    assert found["models"][0]["assessment"]["verdict"] == "fits"
    assert str(Path.home()) not in text and str(tmp_path) not in text


def test_a_gpu_is_told_of_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "GPU" not in doctor(home=tmp_path)
    card = GpuFacts("Some GPU", 16 * GIB, 15 * GIB, GpuSpeed(500e9, 20e9, 40e12))
    found = replace(MACHINE, gpu=card, gpus=("Some GPU, 16384 MiB", "Intel graphics"))
    monkeypatch.setattr(measuring, "measured_machine", lambda *_: found)
    text = doctor(home=tmp_path)
    assert "Some GPU: 16.0 GiB, 15.0 GiB free; copies 500 GB/s, PCIe 20.0 GB/s" in text
    assert "Intel graphics (not used)" in text and "16384 MiB (not used)" not in text
    model = json.loads(doctor("--json", home=tmp_path))["models"][0]["assessment"]
    assert model["gpu_plan"]["fits"] and model["gpu_forecast"]["experts_by_tier"]["gpu"] == 1


def test_another_machine(tmp_path: Path) -> None:
    text = doctor("--assume-ram", "16GiB", home=tmp_path)
    assert "16.0 GiB, 15.2 GiB available (assumed)" in text


def test_earlier_runs_are_shown(tmp_path: Path) -> None:
    from localv4.library.installed import list_installed
    from localv4.planning.assessment import assess
    from localv4.planning.subject import facts_of_installed

    model = list_installed()[-1]
    found = assess(facts_of_installed(model), MACHINE)
    assert found.plan is not None and found.forecast is not None
    history.record_run(model.name, found.plan, found.forecast, 100.0, 50)
    text = doctor(home=tmp_path)
    assert f"predicted {found.forecast.decode.likely:.2f}, achieved 100.00 tokens/s" in text
    (run,) = json.loads(doctor("--json", home=tmp_path))["models"][-1]["runs"]
    assert run["achieved"] == 100.0


def test_a_damaged_model_is_a_finding(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "models" / "broken"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "deepseek_v4"}')
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    text = doctor(home=tmp_path)
    assert "cannot be read" in text and "tiny-v4" in text


def test_problems_have_remedies(tmp_path: Path) -> None:
    assert problems.find_problems(MACHINE, tmp_path) == []
    pages = tmp_path / "kernel/mm/transparent_hugepage"
    clock = tmp_path / "devices/system/cpu/cpu0/cpufreq"
    for folder in (pages, clock):
        folder.mkdir(parents=True)
    (pages / "enabled").write_text("always madvise [never]\n")
    (clock / "scaling_governor").write_text("powersave\n")
    (clock / "scaling_driver").write_text("acpi-cpufreq\n")
    ill = replace(
        MACHINE,
        memory=Memory(64 * GIB, 3 * GIB, limit=8 * GIB),
        disk=DiskFacts(2e8),
        disk_free=GIB,
        swap_is_compressed=True,
    )
    found = problems.find_problems(ill, tmp_path)
    words = ("control group", "available", "large pages", "zram", "power", "left", "0.20 GB/s")
    assert len(found) == len(words)
    assert all(word in one.what for word, one in zip(words, found, strict=True))
    assert all(one.remedy for one in found)
    (clock / "scaling_driver").write_text("intel_pstate\n")  # there powersave is no brake
    assert len(problems.find_problems(ill, tmp_path)) == len(words) - 1


def test_what_the_system_tells(tmp_path: Path) -> None:
    assert system.huge_pages(tmp_path) is None and system.governor(tmp_path) is None
    assert not system.swap_is_compressed(tmp_path)
    (tmp_path / "swaps").write_text(
        "Filename Type Size Used Priority\n/dev/zram0 partition 8 0 100\n"
    )
    assert system.swap_is_compressed(tmp_path)
    device = tmp_path / "bus/pci/devices/0000:00:02.0"
    device.mkdir(parents=True)
    (device / "class").write_text("0x030000\n")
    (device / "vendor").write_text("0x8086\n")
    assert system._pci_cards(tmp_path) == ("Intel graphics",)
