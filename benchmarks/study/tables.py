"""What a study's runs say: means, paired differences, and the best of each method against others.

    python -m benchmarks.study.tables rates runs/study/two

Differences are paired by base model and seed.  Who is best is chosen on the other seeds' runs, so
that what is compared did not choose; intervals hold for all comparisons of the table together
(Bonferroni).
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.study.studies import STUDIES, Study
from benchmarks.study.train import Run
from megatron_phf.report.runs import Run as Read
from megatron_phf.report.runs import read_variants

Key = tuple[int, int]  # base model, seed
Cell = Mapping[Key, Mapping[int, float]]  # of each run: by step, the part that it solves


@dataclass(frozen=True)
class Interval:
    """Of a mean of ``n`` values, points."""

    mean: float
    half: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:+.1f} [{self.mean - self.half:+.1f}, {self.mean + self.half:+.1f}]"


def interval(values: Sequence[float], comparisons: int = 1) -> Interval:
    """The mean of parts of 1 in points, and its t interval at 95 % for all ``comparisons``."""
    from scipy.stats import t

    n = len(values)
    quantile = float(t.ppf(1 - 0.025 / comparisons, n - 1))
    return Interval(
        100 * statistics.mean(values), 100 * quantile * statistics.stdev(values) / math.sqrt(n), n
    )


def _key(run: Read) -> Key:
    return run.seed // 10, run.seed % 10


def read_cells(directory: Path) -> dict[str, Cell]:
    """By name of the runs that differ in base model and seed alone."""
    return {
        variant.name: {
            _key(run): {e["step"]: e["average_at_k"] for e in run.evaluations}
            for run in variant.runs
        }
        for variant in read_variants([str(directory)])
    }


def cells_of(study: Study, cells: Mapping[str, Cell], arm: str) -> dict[Run, Cell]:
    """An arm's cells by learning rate and warm-up (base model and seed stand for nothing)."""
    chosen = next(a for a in study.arms if a.name == arm)
    kinds = dict.fromkeys(Run(0, 0, run.lr, run.warmup) for run in study.runs)
    names = {kind: study.name_of(chosen, kind) for kind in kinds}
    return {kind: cells[name] for kind, name in names.items() if name in cells}


Score = Callable[[Mapping[int, float]], float]


def at(step: int) -> Score:
    """The part that is solved behind ``step``."""
    return lambda looks: looks[step]


def over_all(looks: Mapping[int, float]) -> float:
    """The mean over all looks but the first: who is sooner there."""
    return statistics.mean(value for step, value in looks.items() if step)


def best(cells: Mapping[Run, Cell], score: Score) -> dict[Key, float]:
    """Of each run of the cell that is best on the other seeds: what it scores."""
    found = {}
    for key in next(iter(cells.values())):
        other = {
            kind: statistics.mean(score(v) for k, v in cell.items() if k[1] != key[1])
            for kind, cell in cells.items()
        }
        found[key] = score(cells[max(other, key=other.__getitem__)][key])
    return found


def paired(ours: Mapping[Key, float], theirs: Mapping[Key, float]) -> list[float]:
    """Differences of the runs that both have."""
    return [ours[key] - theirs[key] for key in sorted(ours) if key in theirs]


def first_look(looks: Mapping[int, float], level: float) -> float:
    """The first step behind which ``level`` is solved; infinite where none is."""
    return next((step for step, value in sorted(looks.items()) if value >= level), math.inf)


def rates_table(study: Study, cells: Mapping[str, Cell]) -> list[str]:
    """Behind the last step, by learning rate and warm-up: accuracy, and others against the first.

    The second is paired; its intervals hold for all of them together.
    """
    last = at(study.looks[-1])
    kinds = sorted(dict.fromkeys((run.warmup, run.lr) for run in study.runs))
    arms = {arm.name: cells_of(study, cells, arm.name) for arm in study.arms}
    arms = {name: found for name, found in arms.items() if found}
    head = "".join(f" {lr:g}, {warmup} |" for warmup, lr in kinds)
    rows = [f"| lr, warm-up |{head}", "|---|" + "---|" * len(kinds)]
    scores = {
        name: [
            {k: last(v) for k, v in found[Run(0, 0, lr, warmup)].items()} for warmup, lr in kinds
        ]
        for name, found in arms.items()
    }
    for name, cell in scores.items():
        means = [f" {100 * statistics.mean(values.values()):.1f} |" for values in cell]
        rows.append(f"| {name} |" + "".join(means))
    first, *others = scores
    comparisons = len(others) * len(kinds)
    for name in others:
        pairs = zip(scores[name], scores[first], strict=True)
        shown = [f" {interval(paired(*both), comparisons)} |" for both in pairs]
        rows.append(f"| {name} - {first} |" + "".join(shown))
    return rows


def best_table(study: Study, cells: Mapping[str, Cell], level: float = 0.7) -> list[str]:
    """The best of each arm against the best of the first one, every look and all of them."""
    scores: dict[str, Score] = {f"step {step}": at(step) for step in study.looks if step}
    scores["mean of looks"] = over_all
    arms = {arm.name: cells_of(study, cells, arm.name) for arm in study.arms}
    arms = {name: found for name, found in arms.items() if found}
    baseline, *others = arms
    comparisons = len(others) * len(scores)
    columns = [baseline, *(f"{name} - {baseline}" for name in others)]
    rows = ["| best against best | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for label, score in scores.items():
        base = best(arms[baseline], score)
        row = [f"{100 * statistics.mean(base.values()):.1f}"]
        row += [str(interval(paired(best(arms[n], score), base), comparisons)) for n in others]
        rows.append(f"| {label} | " + " | ".join(row) + " |")
    counts = []
    for found in arms.values():
        reached = [
            statistics.mean(first_look(looks, level) <= study.looks[-1] for looks in cell.values())
            for cell in found.values()
        ]
        counts.append(f"{100 * statistics.mean(reached):.0f} % of all runs")
    rows.append(f"| reach {100 * level:.0f} % | " + " | ".join(counts) + " |")
    return rows


def arms_table(study: Study, cells: Mapping[str, Cell], groups: int) -> list[str]:
    """Arms of one rate in groups: each one's accuracy, and its difference to the group's first."""
    last, kind = at(study.looks[-1]), study.runs[0]
    names = [arm.name for arm in study.arms]
    size = len(names) // groups
    rows = ["| arm | accuracy | against the first of its group |", "|---|---|---|"]
    for i, arm in enumerate(study.arms):
        first = study.arms[i - i % size]
        own, other = (cells.get(study.name_of(a, kind)) for a in (arm, first))
        if own is None or other is None:
            continue
        values = {key: last(looks) for key, looks in own.items()}
        difference = paired(values, {key: last(looks) for key, looks in other.items()})
        shown = "" if arm is first else str(interval(difference, len(names) - groups))
        rows.append(f"| {arm.name} | {100 * statistics.mean(values.values()):.1f} | {shown} |")
    return rows


def main() -> None:
    """Print one study's tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.tables")
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("directory", type=Path, help="OUTPUT/TASK of the study")
    arguments = parser.parse_args()
    study = STUDIES[arguments.study]
    cells = read_cells(arguments.directory / arguments.study)
    if arguments.study == "rates":
        rows = [*rates_table(study, cells), "", *best_table(study, cells)]
    else:
        rows = arms_table(study, cells, {"controls": 4, "stale": 3}[arguments.study])
    print("\n".join(rows))


if __name__ == "__main__":
    main()
