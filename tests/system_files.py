"""Trees of small files, as /sys and /proc are."""

from pathlib import Path


def write_tree(root: Path, files: dict[str, str]) -> Path:
    """Make files of these texts by their paths below `root`; return it."""
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return root
