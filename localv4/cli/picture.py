"""What all pictures share: colours, files, and that equal figures make equal files."""

import importlib.util
import os
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from localv4.errors import LocalV4Error, NotFoundError, UsageError
from localv4.finished_file import finished_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
DPI = 160

BLUE, ORANGE, GREY = "#1764ab", "#d9700a", "#5f6b76"  # also apart for the colour-blind, and in grey
GRID, TEXT = "#e3e6e9", "#22272b"


def check_target(path: Path) -> None:
    """Raise LocalV4Error if no picture can be made at `path`, long before there is one to make."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--plot is {path.name!r}, expected a name ending in .png or .svg")
    if not path.parent.is_dir():
        raise NotFoundError(f"there is no folder {path.parent} for the plot")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise LocalV4Error(f"cannot write {path}")
    if importlib.util.find_spec("matplotlib") is None:
        raise NotFoundError("--plot needs matplotlib", hint="pip install 'localv4[plot]'")


def set_title(figure: "Figure", text: str) -> None:
    """Write the title of a whole picture."""
    figure.suptitle(plain_text(text), fontsize=11, color=TEXT, x=0.01, ha="left")


def plain_text(text: str) -> str:
    """Return a text in which a dollar sign begins no formula."""
    return text.replace("$", r"\$")


def set_style(axes: "Axes", grid: Literal["both", "y"] = "both") -> None:
    """Give a panel the grid, ticks and borders of all pictures."""
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=TEXT, length=0, labelsize=9, which="both")
    axes.spines[["top", "right", "left"]].set_visible(False)


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as its name says, .png or .svg. Raises LocalV4Error if that fails."""
    kind: Literal["png", "svg"] = "svg" if path.suffix.lower() == ".svg" else "png"
    with finished_file(path) as file:
        file.write(drawn(figure, kind))


def drawn(figure: "Figure", kind: Literal["png", "svg"]) -> bytes:
    """Return a figure as the bytes of a file."""
    from matplotlib import rc_context

    buffer = BytesIO()
    metadata = {"Date": None} if kind == "svg" else None
    # a fixed salt: names inside the file would be random otherwise
    with rc_context({"svg.hashsalt": "localv4", "svg.fonttype": "path"}):
        figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata, facecolor="white")
    return buffer.getvalue()
