"""What else of this computer matters to a model, as far as the system tells it at once."""

import subprocess
from pathlib import Path

import psutil

PROC, SYS = Path("/proc"), Path("/sys")
_DISPLAY_CLASS = "0x03"
_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}
_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
_WAIT_S = 5.0


def graphics_cards(sys_root: Path = SYS) -> tuple[str, ...]:
    """Return the names of graphics cards: NVIDIA's with their memory, of others the maker."""
    return _nvidia_cards() or _pci_cards(sys_root)


def _nvidia_cards() -> tuple[str, ...]:
    try:
        answer = subprocess.run(  # noqa: S603 - fixed words, found as the user's shell finds it
            _NVIDIA_SMI, capture_output=True, text=True, timeout=_WAIT_S, check=True
        )
    except (OSError, subprocess.SubprocessError, ValueError):
        return ()
    return tuple(line.strip() for line in answer.stdout.splitlines() if line.strip())[:16]


def _pci_cards(sys_root: Path) -> tuple[str, ...]:
    """Return the makers of display controllers on the PCI bus (Linux)."""
    found = []
    for device in sorted(sys_root.glob("bus/pci/devices/*")):
        if _text(device / "class").startswith(_DISPLAY_CLASS):
            vendor = _text(device / "vendor")
            if vendor in _VENDORS:
                found.append(f"{_VENDORS[vendor]} graphics")
    return tuple(found)


def swap_is_compressed(proc: Path = PROC) -> bool:
    """Say whether memory swaps into itself (zram): what is swapped there still takes memory."""
    lines = _text(proc / "swaps").splitlines()[1:]
    return any("zram" in line.split()[0] for line in lines if line.split())


def huge_pages(sys_root: Path = SYS) -> str | None:
    """Return the setting of transparent huge pages: always, madvise or never; None elsewhere."""
    text = _text(sys_root / "kernel/mm/transparent_hugepage/enabled")
    chosen = [word[1:-1] for word in text.split() if word.startswith("[")]
    return chosen[0] if chosen else None


def governor(sys_root: Path = SYS) -> str | None:
    """Return how the first processor's clock is governed (Linux), None where nobody tells."""
    return _text(sys_root / "devices/system/cpu/cpu0/cpufreq/scaling_governor") or None


def runs_on_battery() -> bool:
    """Say whether a battery is being emptied."""
    sensors = getattr(psutil, "sensors_battery", None)
    if sensors is None:  # a system on which psutil does not know of batteries
        return False
    try:
        battery = sensors()
    except OSError:
        return False
    return battery is not None and battery.power_plugged is False


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""
