"""Every combination of two (``--matrix-strength``) layout settings against the reference."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_phf import reference
from megatron_phf.cli import preflight
from megatron_phf.config.flags import parse_args
from megatron_phf.model.architecture import check_split, read_architecture
from tests.models import make_model, make_replay
from tests.parallel import matrix
from tests.parallel.cases import flags, launch, metrics_deviation, tensor_deviation

STEPS = 3
# Per step 1 token, 2 tokens, fewer than the window, as many, and more.
LENGTHS = [1, 2, 20, 7, 31, 3, 8, 9, 5, 1, 12, 2, 8, 17, 4, 26, 2, 1, 9, 30, 6, 8, 3, 11]
OPTIONS = reference.Options(alpha=0.7, window_size=8, beta=0.5, clip=0.02)
DECAY, RATE, EPSILON, CLIP_GRAD = 0.6, 1e-2, 1e-4, 0.1
# What an axis that cannot make a layout impossible does not need checking for.
FREE = ("recompute", "teacher", "distributed_optimizer")
TOLERANCE = {"metrics": 1e-5, "gradient": 1e-5, "weights": 1e-5}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("matrix")
    for name, settings in matrix.MODELS.items():
        make_model(str(directory / name), **settings)
    make_replay(str(directory / "replay.jsonl"), LENGTHS)
    return directory


def command_line(files: Path, layout: matrix.Layout) -> list[str]:
    return [
        *flags(
            OPTIONS,
            str(files / layout["model"]),
            str(files / "replay.jsonl"),
            matrix.BATCH,
            **{"train-iters": STEPS, "lr": RATE, "lr-decay-style": "constant"},
            **{"adam-eps": EPSILON, "clip-grad": CLIP_GRAD, "ema-decay": DECAY},
        ),
        *matrix.layout_flags(layout),
    ]


def make_filter(files: Path, most_processes: int):
    """Whether the product accepts a layout (its own checks decide) and the machine can hold it."""
    architectures = {name: read_architecture(str(files / name)) for name in matrix.MODELS}

    @functools.cache
    def possible(items: tuple) -> bool:
        layout = dict(items) | {"recompute": "none", "teacher": "frozen"}
        layout["distributed_optimizer"] = False
        config = parse_args(command_line(files, layout))
        try:
            preflight._check_combinations(config)
            check_split(architectures[layout["model"]], config)
            preflight.check_world_size(config, matrix.processes(layout))
        except ValueError:
            return False
        return True

    def accepted(layout: matrix.Layout) -> bool:
        if matrix.processes(layout) > most_processes or not matrix.is_distinct(layout):
            return False
        if matrix.BATCH % (layout["data"] * layout["microbatches"]):
            return False
        return possible(tuple((k, v) for k, v in layout.items() if k not in FREE))

    return accepted


@pytest.fixture(scope="module")
def layouts(files: Path, pytestconfig: pytest.Config) -> list[matrix.Layout]:
    most = pytestconfig.getoption("--matrix-processes")
    strength = pytestconfig.getoption("--matrix-strength")
    chosen, combinations = matrix.covering(strength, make_filter(files, most))
    print(f"{len(chosen)} layouts cover {combinations} combinations of {strength} settings")
    return chosen


@pytest.fixture(scope="module")
def references(files: Path) -> dict:
    samples, known = reference.read_replay(str(files / "replay.jsonl")), {}
    for model in matrix.MODELS:
        directory = str(files / model)
        gradients = reference.compute(directory, samples[: matrix.BATCH], OPTIONS).gradients
        for teacher in matrix.AXES["teacher"]:
            history, weights = reference.train(
                directory,
                samples,
                OPTIONS,
                steps=STEPS,
                lr=RATE,
                eps=EPSILON,
                clip_grad=CLIP_GRAD,
                teacher_kind=teacher,
                ema_decay=DECAY,
            )
            known[model, teacher] = history, gradients, weights
    return known


def deviations(layout: matrix.Layout, output: Path, expected: tuple) -> dict:
    history, gradients, weights = expected
    name = matrix.name(layout)
    first, *found = json.loads((output / f"{name}.json").read_text())
    norms = [
        abs(ours["grad_norm"] / wanted["grad_norm"] - 1)
        for ours, wanted in zip(found, history, strict=True)
    ]
    pairs = [(first, history[0]), *zip(found, history, strict=True)]
    return {
        "layout": layout,
        "metrics": max([metrics_deviation(*pair) for pair in pairs] + norms),
        "gradient": tensor_deviation(load_file(output / f"{name}.gradient.safetensors"), gradients),
        "weights": tensor_deviation(load_file(output / f"{name}.safetensors"), weights),
    }


def test_every_layout_gives_the_same_numbers(
    files: Path, layouts: list, references: dict, pytestconfig: pytest.Config
) -> None:
    output = files / "out"
    output.mkdir()
    rows = []
    for processes in sorted({matrix.processes(layout) for layout in layouts}):
        group = [layout for layout in layouts if matrix.processes(layout) == processes]
        cases = [
            {
                "name": matrix.name(layout),
                "kind": "both",
                "steps": STEPS,
                "argv": command_line(files, layout),
            }
            for layout in group
        ]
        launch(processes, cases, output, timeout=60 + 60 * len(cases))
        for layout in group:
            expected = references[layout["model"], layout["teacher"]]
            rows.append(deviations(layout, output, expected))
    report = pytestconfig.getoption("--matrix-report")
    if report is not None:
        Path(report).write_text(json.dumps(rows, indent=1))
    print(matrix.table(rows))
    wrong = [row for row in rows if any(row[kind] > TOLERANCE[kind] for kind in TOLERANCE)]
    assert not wrong, wrong
