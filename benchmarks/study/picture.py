"""Accuracy behind the last step against the learning rate, one curve an arm.

python -m benchmarks.study.picture runs/study/two --output rates_two.png
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path

from benchmarks.study.studies import STUDIES, Study
from benchmarks.study.tables import Cell, cells_of, interval, read_cells


def draw(study: Study, cells: Mapping[str, Cell], path: Path) -> None:
    """One panel a warm-up; bars are 95 % intervals over base models and seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    last = study.looks[-1]
    warmups = sorted({run.warmup for run in study.runs})
    found = {arm.name: cells_of(study, cells, arm.name) for arm in study.arms}
    names = [name for name, cell in found.items() if cell]
    figure, panels = pyplot.subplots(1, len(warmups), figsize=(9, 3.6), sharey=True)
    for axes, warmup in zip(panels, warmups, strict=True):
        for i, name in enumerate(names):
            points = {
                kind.lr: interval([looks[last] for looks in cell.values()])
                for kind, cell in found[name].items()
                if kind.warmup == warmup
            }
            rates = sorted(points)
            beside = 2 ** (0.06 * (i - len(names) / 2))  # so that bars can be told apart
            axes.errorbar(
                [lr * beside for lr in rates],
                [points[lr].mean for lr in rates],
                [points[lr].half for lr in rates],
                marker="o",
                ms=4,
                lw=1.4,
                elinewidth=0.8,
                label=name,
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(rates, [f"{lr:g}" for lr in rates])
        axes.minorticks_off()
        axes.set_title(f"warm-up {warmup} steps", fontsize=10)
        axes.set_xlabel("learning rate")
        axes.grid(axis="y", color="#e5e7eb")
    bases = [looks[0] for cell in found.values() for c in cell.values() for looks in c.values()]
    panels[0].axhline(100 * statistics.mean(bases), color="#6b7280", lw=1, ls=":")
    panels[0].set_ylabel(f"held-out accuracy behind step {last}, %")
    panels[-1].legend(fontsize=8, frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Draw what has run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.picture")
    parser.add_argument("directory", type=Path, help="OUTPUT/TASK of the study")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    draw(STUDIES["rates"], read_cells(arguments.directory / "rates"), arguments.output)


if __name__ == "__main__":
    main()
