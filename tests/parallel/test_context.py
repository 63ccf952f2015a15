"""Context parallelism: sequences sharded in zig-zag order give the same numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_phf import reference
from tests.models import make_model, make_replay
from tests.parallel.cases import compare_metrics, compare_tensors, flags, launch, selected
from tests.parallel.test_moe import EXPERTS
from tests.parallel.test_parity import CP2, FULL, MB2, ONE_ROW_CP2, PACKED_CP2, PP2, SP, TP2
from tests.parallel.test_rollouts import GREEDY, NEW_TOKENS, SHORT, prompts

BATCH, STEPS, TOLERANCE = 8, 3, 1e-5
LENGTHS = [1, 2, 20, 7, 31, 3, 12, 9, 5, 14, 2, 8, 11, 1, 6, 17, 4, 9, 23, 2, 7, 10, 3, 5]
MODELS = {"dense": {}, "moe": EXPERTS}
DISTRIBUTED = ["--use-distributed-optimizer"]

# name -> (processes, model, layout flags)
CASES = {
    "cp2_full": (2, "dense", [*CP2, *MB2, "--recompute-granularity", "full"]),
    "cp2_ep2": (2, "moe", [*CP2, *MB2, "--expert-model-parallel-size", "2"]),
    "cp4": (4, "dense", ["--context-parallel-size", "4", *MB2]),
    "cp2_pp2": (4, "dense", [*CP2, *PP2, *MB2]),
    "cp2_tp2_sp_moe": (4, "moe", [*CP2, *TP2, *SP, *MB2]),
    "packed_cp2_full": (2, "dense", [*PACKED_CP2, *FULL, "1"]),
    "packed_cp4": (4, "dense", [*PACKED_CP2, "--context-parallel-size", "4"]),
    "packed_cp2_pp2": (4, "dense", [*PACKED_CP2, *PP2]),
    "packed_cp2_tp2_sp": (4, "dense", [*PACKED_CP2, *TP2, *SP]),
    "packed_cp2_dp2": (4, "dense", PACKED_CP2),
    "packed_cp2_tp2_sp_moe": (4, "moe", [*ONE_ROW_CP2, *TP2, *SP]),
}
TRAINED = {"cp2_dp2": (4, "dense", [*CP2, *MB2, *DISTRIBUTED])}
ROLLOUTS = {"cp2_rollouts": (2, "dense", CP2)}


def options(model: str, rollouts: int = 2) -> reference.Options:
    """``rollouts``: of a microbatch, over which the experts' loss is computed."""
    coefficient = EXPERTS["router_aux_loss_coef"] if model == "moe" else 0.0
    return reference.Options(
        alpha=0.7, window_size=8, clip=0.02, aux_coeff=coefficient, micro_batch_size=rollouts
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("context")
    for name, settings in MODELS.items():
        make_model(str(directory / name), **settings)
    make_replay(str(directory / "replay.jsonl"), LENGTHS)
    (directory / "data.jsonl").write_text('{"problem": "1+1?", "solution": "2"}')
    return directory


def case(files: Path, name: str, model: str, layout: list[str]) -> dict:
    more = {"lr": 1e-2, "adam-eps": 1e-4, "lr-decay-style": "constant", "train-iters": STEPS}
    replay = str(files / "replay.jsonl")
    argv = flags(options(model), str(files / model), replay, BATCH, **more) + layout
    kind = "both" if name in TRAINED else "gradients"
    return {"name": name, "kind": kind, "steps": STEPS, "argv": argv}


def rollout_case(files: Path, name: str, model: str, layout: list[str]) -> dict:
    data = ["--data", str(files / "data.jsonl"), "--dtype", "fp32", *SHORT]
    return {
        "name": name,
        "kind": "rollouts",
        "argv": ["--hf-model", str(files / model), *data, *layout],
        "prompts": prompts(),
        "sampling": {**GREEDY, "max_new_tokens": NEW_TOKENS, "stop_ids": [], "seed": 3},
        "batch_size": 4,
    }


@pytest.fixture(scope="module")
def results(files: Path, request: pytest.FixtureRequest) -> Path:
    output = files / "out"
    output.mkdir()
    wanted = selected(request, {**CASES, **TRAINED, **ROLLOUTS})
    for processes in sorted({case[0] for case in wanted.values()}):
        cases = [
            (rollout_case if name in ROLLOUTS else case)(files, name, model, layout)
            for name, (count, model, layout) in wanted.items()
            if count == processes
        ]
        launch(processes, cases, output)
    return output


@pytest.fixture(scope="module")
def references(files: Path) -> dict:
    samples = reference.read_replay(str(files / "replay.jsonl"))[:BATCH]
    kinds = [("dense", 2), ("moe", 2), ("moe", BATCH)]
    return {(m, n): reference.compute(str(files / m), samples, options(m, n)) for m, n in kinds}


@pytest.mark.parametrize("name", [*CASES, *TRAINED])
def test_gradient_equals_reference(name: str, results: Path, references: dict) -> None:
    _, model, layout = {**CASES, **TRAINED}[name]
    expected = references[model, BATCH if ONE_ROW_CP2[-1] in layout else 2]
    found = json.loads((results / f"{name}.json").read_text())
    found = found[0] if name in TRAINED else found
    compare_metrics(found, expected.metrics, TOLERANCE)
    gradients = load_file(results / f"{name}.gradient.safetensors")
    compare_tensors(gradients, expected.gradients, TOLERANCE)


@pytest.mark.parametrize("name", TRAINED)
def test_training_equals_reference(name: str, results: Path, files: Path) -> None:
    history, weights = reference.train(
        str(files / "dense"),
        reference.read_replay(str(files / "replay.jsonl")),
        options("dense"),
        steps=STEPS,
        lr=1e-2,
        eps=1e-4,
        clip_grad=0.1,
        teacher_kind="frozen",
        ema_decay=0.0,
    )
    _, *found = json.loads((results / f"{name}.json").read_text())
    for ours, expected in zip(found, history, strict=True):
        compare_metrics(ours, expected, 5 * TOLERANCE)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5 * TOLERANCE)
    compare_tensors(load_file(results / f"{name}.safetensors"), weights, TOLERANCE)


@pytest.mark.parametrize("name", ROLLOUTS)
def test_rollouts_are_greedy(name: str, results: Path, files: Path) -> None:
    model = reference.load_model(str(files / "dense"))
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    rows = json.loads((results / f"{name}.json").read_text())
    for prompt, row in zip(prompts(), rows, strict=True):
        ids = torch.tensor([prompt])
        output = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert row == output[0, len(prompt) :].tolist()
