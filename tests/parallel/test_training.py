"""Several optimizer steps equal the reference's: teacher kinds, layouts, distributed optimizer."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_phf import reference
from tests.models import make_model, make_replay
from tests.parallel.cases import compare_metrics, compare_tensors, flags, launch
from tests.parallel.test_parity import OVERLAP, PACKED, PACKED_CP2, PP2, SP, TP2

STEPS, BATCH = 3, 4
LENGTHS = [5, 1, 9, 14, 3, 8, 2, 11, 6, 12, 4, 7]
OFFLOAD = ["--teacher-offload"]
DISTRIBUTED = ["--use-distributed-optimizer"]
GATHER = [*DISTRIBUTED, *OVERLAP, "--overlap-param-gather"]

# name -> (processes, layout flags, teacher, gradient clip)
CASES = {
    "frozen": (1, [], "frozen", 0.1),
    "ema": (1, [], "ema", 0.1),
    "live": (1, [], "live", 0.1),
    "frozen_unclipped": (1, [], "frozen", 0.0),
    "ema_dp2_distributed": (2, DISTRIBUTED, "ema", 0.1),
    "ema_packed_dp2_distributed": (2, PACKED + DISTRIBUTED, "ema", 0.1),
    "ema_packed_cp2": (2, PACKED_CP2, "ema", 0.1),
    "ema_dp2_gather": (2, GATHER, "ema", 0.1),
    "ema_pp2": (2, PP2, "ema", 0.1),
    "live_tp2_sp": (2, TP2 + SP, "live", 0.1),
    "ema_tp2_pp2": (4, TP2 + PP2, "ema", 0.1),
    "frozen_tp2_dp2_distributed": (4, TP2 + DISTRIBUTED, "frozen", 0.1),
    "frozen_tp2_dp2_gather": (4, TP2 + GATHER, "frozen", 0.1),
    "ema_offload": (1, OFFLOAD, "ema", 0.1),
    "frozen_offload_pp2": (2, PP2 + OFFLOAD, "frozen", 0.1),
    "ema_offload_tp2": (2, TP2 + OFFLOAD, "ema", 0.1),
    "gap_ema_pp2": (2, PP2, "ema", 0.1),
    "gap_ema_packed_dp2": (2, PACKED + DISTRIBUTED, "ema", 0.1),
}
# A teacher that never moves tells nothing of its decay: move it fast.
DECAY, RATE = 0.6, 1e-2
# Adam divides by the gradient's size: with the usual 1e-8 it amplifies rounding where that is 0.
EPSILON = 1e-4
# A starting loss of zero would tell nothing of the gradient's scale.
OPTIONS = reference.Options(alpha=0.7, window_size=8, beta=0.5, clip=0.02)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("training")
    make_model(str(directory / "model"))
    make_replay(str(directory / "replay.jsonl"), LENGTHS)
    # As a run with --keep-rollouts records it: of the second step nothing is trained on.
    lines = (directory / "replay.jsonl").read_text().splitlines()
    dropped = [json.dumps({**json.loads(line), "kept": False}) for line in lines[:BATCH]]
    lines[BATCH:BATCH] = dropped
    (directory / "gap.jsonl").write_text("\n".join(lines))
    return directory


@pytest.fixture(scope="module")
def results(files: Path) -> Path:
    output = files / "out"
    output.mkdir()
    for processes in (1, 2, 4):
        cases = []
        for name, (count, layout, teacher, clip) in CASES.items():
            replay, steps = ("gap", STEPS + 1) if name.startswith("gap") else ("replay", STEPS)
            more = {
                "teacher": teacher,
                "ema-decay": DECAY,
                "lr": RATE,
                "adam-eps": EPSILON,
                "lr-decay-style": "constant",
                "clip-grad": clip,
                "train-iters": steps,
            }
            path = str(files / f"{replay}.jsonl")
            argv = flags(OPTIONS, str(files / "model"), path, BATCH, **more) + layout
            if count == processes:
                cases.append({"name": name, "kind": "train", "steps": steps, "argv": argv})
        launch(processes, cases, output)
    return output


@pytest.fixture(scope="module")
def references(files: Path) -> dict:
    samples = reference.read_replay(str(files / "replay.jsonl"))
    known = {}
    for _, _, teacher, clip in CASES.values():
        if (teacher, clip) not in known:
            known[teacher, clip] = reference.train(
                str(files / "model"),
                samples,
                OPTIONS,
                steps=STEPS,
                lr=RATE,
                eps=EPSILON,
                clip_grad=clip or 1e9,
                teacher_kind=teacher,
                ema_decay=DECAY,
            )
    return known


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name: str, results: Path, references: dict, files: Path) -> None:
    _, _, teacher, clip = CASES[name]
    history, weights = references[teacher, clip]
    found = json.loads((results / f"{name}.json").read_text())
    if name.startswith("gap"):  # a step that changes nothing, and says that it knows nothing
        gap = found.pop(1)
        assert gap["rollout_tokens"] == 0 and math.isnan(gap["loss"])
        assert {value for key, value in gap.items() if key.startswith("flow")} == {None}
    for ours, expected in zip(found, history, strict=True):
        compare_metrics(ours, expected, 5e-5)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5e-5)
        assert ours["learning_rate"] == RATE
    compare_tensors(load_file(results / f"{name}.safetensors"), weights, 1e-5)


def test_the_teachers_differ(references: dict) -> None:
    losses = {kind: references[kind, 0.1][0][-1]["loss"] for kind in ("frozen", "ema", "live")}
    assert len({round(x, 4) for x in losses.values()}) == 3, losses
