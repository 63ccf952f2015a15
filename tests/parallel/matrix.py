"""The axes of the layout matrix, and small selections that cover all their combinations.

python -m tests.parallel.matrix REPORT.json      # the table of docs/parallelism.md
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

AXES: dict[str, tuple] = {
    "model": ("qwen3", "untied", "llama"),
    "tensor": (1, 2, 4),
    "pipeline": (1, 2, 4),
    "virtual": (1, 2, 3),
    "sequence_parallel": (False, True),
    "data": (1, 2),
    "distributed_optimizer": (False, True),
    "recompute": ("none", "selective", "uniform", "block"),
    "microbatches": (1, 2, 4),
    "teacher": ("frozen", "ema"),
    "split": ("even", "first", "accounted"),
}
MODELS = {
    "qwen3": {"architecture": "qwen3"},
    "untied": {"architecture": "qwen3", "num_hidden_layers": 6, "tie_word_embeddings": False},
    "llama": {"architecture": "llama", "num_hidden_layers": 6},
}
BATCH = 8
Layout = dict


def processes(layout: Layout) -> int:
    """World size of a layout."""
    return layout["tensor"] * layout["pipeline"] * layout["data"]


def layout_flags(layout: Layout) -> list[str]:
    """The command line of a layout."""
    words = [
        *("--tensor-model-parallel-size", layout["tensor"]),
        *("--pipeline-model-parallel-size", layout["pipeline"]),
        *("--num-virtual-stages-per-pipeline-rank", layout["virtual"]),
        *("--micro-batch-size", BATCH // layout["data"] // layout["microbatches"]),
        *("--teacher", layout["teacher"]),
    ]
    if layout["sequence_parallel"]:
        words += ["--sequence-parallel"]
    if layout["distributed_optimizer"]:
        words += ["--use-distributed-optimizer"]
    if layout["recompute"] == "selective":
        words += ["--recompute-granularity", "selective"]
    elif layout["recompute"] != "none":
        words += ["--recompute-granularity", "full", "--recompute-method", layout["recompute"]]
    if layout["split"] == "first":
        words += ["--num-layers-in-first-pipeline-stage", 2 * layout["virtual"]]
    elif layout["split"] == "accounted":
        words += ["--account-for-embedding-in-pipeline-split"]
        words += ["--account-for-loss-in-pipeline-split"]
    return [str(word) for word in words]


def is_distinct(layout: Layout) -> bool:
    """Whether the layout is not another one in disguise (an axis that has no effect here)."""
    if layout["pipeline"] == 1 and layout["split"] != "even":
        return False
    return layout["tensor"] > 1 or not layout["sequence_parallel"]


def name(layout: Layout) -> str:
    """A file name."""
    return "-".join(str(v) for v in layout.values())


def all_layouts() -> Iterator[Layout]:
    """The whole product of the axes."""
    for values in itertools.product(*AXES.values()):
        yield dict(zip(AXES, values, strict=True))


def _tuples(layout: Layout, strength: int) -> set[tuple]:
    return set(itertools.combinations(layout.items(), strength))


def covering(
    strength: int, accepted: Callable[[Layout], bool], seed: int = 0
) -> tuple[list[Layout], int]:
    """Accepted layouts in which every possible combination of ``strength`` values occurs.

    Greedy: of the smallest layouts that contain the first uncovered combination, the one (of a
    random sample) that covers most.  Returns the layouts and the number of combinations.
    """
    candidates = [layout for layout in all_layouts() if accepted(layout)]
    random.Random(seed).shuffle(candidates)
    wanted: dict[tuple, list[Layout]] = {}
    for layout in candidates:
        for each in _tuples(layout, strength):
            wanted.setdefault(each, []).append(layout)
    total, chosen = len(wanted), []
    uncovered = dict.fromkeys(sorted(wanted, key=lambda each: (len(wanted[each]), str(each))))
    while uncovered:
        options = wanted[next(iter(uncovered))]
        fewest = min(map(processes, options))
        options = [layout for layout in options if processes(layout) == fewest][:60]
        best = max(options, key=lambda layout: len(_tuples(layout, strength) & uncovered.keys()))
        chosen.append(best)
        for each in _tuples(best, strength):
            uncovered.pop(each, None)
    return chosen, total


def table(rows: list[dict]) -> str:
    """Markdown: the largest deviation of each value of each axis, over the layouts that have it."""
    kinds = ("metrics", "gradient", "weights")
    lines = ["| axis | value | layouts | metrics | gradient | weights after 3 steps |"]
    lines += ["|---|---|---|---|---|---|"]
    for axis, values in AXES.items():
        for value in values:
            found = [row for row in rows if row["layout"][axis] == value]
            if found:
                worst = " | ".join(f"{max(row[kind] for row in found):.1e}" for kind in kinds)
                lines.append(f"| {axis} | {value} | {len(found)} | {worst} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
