#!/usr/bin/env python3
"""Print the README's table: V4-Flash on machines of several sizes, as `localv4 fit` predicts it.

  fit_table.py
  fit_table.py --bandwidth 120GB/s --disk 14GB/s --cores 16

Everything is assumed, nothing is measured: the table is the same on every machine.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from localv4.cli.plan_report import range_text
from localv4.cli.sizes import parse_rate
from localv4.planning.assessment import Assessment, assess
from localv4.planning.machine import Machine
from localv4.planning.memory import Memory
from localv4.planning.model_facts import facts_of_recipe
from localv4.planning.plan import GIB
from localv4.planning.recipes import load_recipes
from localv4.planning.subject import flash_network

SIZES_GIB = (32, 64, 96, 128, 256)
RECIPES = ("lossless", "q8", "q4", "q3", "q2")


def main() -> None:
    """Read the command line and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bandwidth", default="90GB/s")
    parser.add_argument("--disk", default="7GB/s")
    parser.add_argument("--cores", type=int, default=8)
    options = parser.parse_args()
    bandwidth = parse_rate(options.bandwidth, "--bandwidth")
    disk = parse_rate(options.disk, "--disk")
    blank = Machine(Memory(0, 0), options.cores)
    machines = [
        blank.with_assumptions(ram=n * GIB, bandwidth=bandwidth, disk=disk, cores=options.cores)
        for n in SIZES_GIB
    ]
    lines = [
        "| V4-Flash | on disk | " + " | ".join(f"{n} GB" for n in SIZES_GIB) + " |",
        "|---|--:|" + "--:|" * len(SIZES_GIB),
    ]
    for name in RECIPES:
        facts = facts_of_recipe(name, flash_network(), load_recipes().by_name[name])
        cells = [_cell(assess(facts, machine)) for machine in machines]
        lines.append(f"| {name} | {facts.file_bytes / GIB:.0f} GiB | " + " | ".join(cells) + " |")
    sys.stdout.write("\n".join(lines) + "\n")


def _cell(found: Assessment) -> str:
    """Write the speed, and what part of the experts memory holds where it is not all."""
    if found.plan is None or found.forecast is None:
        return "-"
    speed = range_text(found.forecast.decode)
    if found.plan.fits:
        return f"**{speed}**"
    return f"{speed} ({100 * found.plan.resident_share:.0f} %)"


if __name__ == "__main__":
    main()
