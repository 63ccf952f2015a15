"""Mixtures of experts: values, gradients, weights and rollouts equal plain transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_phf import reference
from tests.models import make_model, make_replay
from tests.parallel.cases import compare_metrics, compare_tensors, flags, launch, selected
from tests.parallel.test_parity import MB2, PP2, SP, TP2, VPP2
from tests.parallel.test_rollouts import GREEDY, NEW_TOKENS, SHORT, prompts, stop_id, until

EXPERTS = {
    "architecture": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.3,
}
MODELS = {
    "moe": EXPERTS,
    "raw": {**EXPERTS, "norm_topk_prob": False, "tie_word_embeddings": False},
}
EP2, MB4 = ["--expert-model-parallel-size", "2"], ["--micro-batch-size", "4"]
ETP1 = ["--expert-tensor-parallel-size", "1"]
OFF = ["--moe-aux-loss-coeff", "0"]
DISTRIBUTED = ["--use-distributed-optimizer"]
FULL = ["--recompute-granularity", "full"]
# All rollouts of the batch in one microbatch.
PACKED = ["--max-tokens-per-microbatch", "1000", "--pack-sequences"]
TP2 = TP2 + SP
BATCH, STEPS, TOLERANCE = 8, 3, 1e-5
LENGTHS = [1, 2, 20, 7, 31, 3, 12, 9, 5, 14, 2, 8, 11, 1, 6, 17, 4, 9, 23, 2, 7, 10, 3, 5]

# name -> (processes, model, layout flags)
GRADIENTS = {
    "one": (1, "moe", []),
    "one_mb4_off": (1, "moe", MB4 + OFF),
    "ep2_mb4": (2, "moe", EP2 + MB4),
    "ep2_off_live": (2, "moe", [*EP2, *MB2, *OFF, "--teacher", "live"]),
    "tp2_live": (2, "moe", [*TP2, *MB2, "--teacher", "live"]),
    "pp2_vpp2": (2, "moe", [*PP2, *VPP2, *MB2]),
    "pp2_full": (2, "raw", [*PP2, *MB2, *FULL]),
    "packed_tp2": (2, "moe", TP2 + PACKED),
    "pp2_ep2": (4, "moe", [*PP2, *EP2, *MB2]),
}
TRAINED = {
    "tp2_ep2": (4, "moe", [*TP2, *EP2, *MB2, *DISTRIBUTED]),
    # Whole experts, shared out over the ranks of TP as well.
    "tp2_ep2_etp1": (4, "moe", [*TP2, *EP2, *ETP1, *MB2, *DISTRIBUTED]),
}
ROLLOUTS = {
    "rollouts_one": (1, "moe", []),
    "rollouts_ep2": (2, "moe", EP2),
    "rollouts_pp2": (2, "raw", PP2),
    "rollouts_tp2_etp1": (2, "moe", TP2 + EP2 + ETP1),
    "rollouts_tp2_ep2": (4, "moe", TP2 + EP2),
    "rollouts_pp2_ep2": (4, "moe", PP2 + EP2),
}
# The first saves a checkpoint's weights, the others load them.
RESHARDED = {
    "saved_ep2": (2, "moe", EP2),
    "loaded_tp2": (2, "moe", TP2),
    "loaded_pp2": (2, "moe", PP2),
    "loaded_tp2_etp1": (2, "moe", TP2 + EP2 + ETP1),
}
# Ranks of an expert-parallel group leave the loop at different times, and have unlike batches.
LIMITS, ROWS = [20, 1, 7, 2, 13, 3, 20], 3


def options(layout: list[str]) -> reference.Options:
    """The reference's view of a layout: all that its aux loss depends on is the microbatch."""
    size = int(layout[layout.index("--micro-batch-size") + 1]) if MB2[0] in layout else 1
    size = BATCH if PACKED[0] in layout else size
    coefficient = 0.0 if OFF[0] in layout else EXPERTS["router_aux_loss_coef"]
    return reference.Options(
        alpha=0.7, window_size=8, clip=0.02, aux_coeff=coefficient, micro_batch_size=size
    )


def asked() -> list[list[int]]:
    return [*prompts(), [17, 4, 99, 4]]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("moe")
    for name, settings in MODELS.items():
        make_model(str(directory / name), **settings)
    make_replay(str(directory / "replay.jsonl"), LENGTHS)
    (directory / "data.jsonl").write_text('{"problem": "1+1?", "solution": "2"}')
    return directory


@pytest.fixture(scope="module")
def greedy(files: Path) -> dict[str, list[list[int]]]:
    rows: dict[str, list[list[int]]] = {}
    for name in MODELS:
        model = AutoModelForCausalLM.from_pretrained(files / name).eval()
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
        rows[name] = []
        for prompt in asked():
            ids = torch.tensor([prompt])
            output = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
            rows[name].append(output[0, len(prompt) :].tolist())
    return rows


def rollout_case(files: Path, name: str, greedy: dict) -> dict:
    _, model, layout = ROLLOUTS[name]
    data = ["--data", str(files / "data.jsonl"), "--dtype", "fp32", *SHORT]
    sampling = {"max_new_tokens": NEW_TOKENS, "stop_ids": [stop_id(greedy[model])], "seed": 3}
    return {
        "name": name,
        "kind": "rollouts",
        "argv": ["--hf-model", str(files / model), *data, *layout],
        "prompts": asked(),
        "limits": LIMITS,
        "sampling": {**GREEDY, **sampling},
        "batch_size": ROWS,
        "spread": True,
    }


def reshard_case(files: Path, name: str) -> dict:
    _, model, layout = RESHARDED[name]
    data = ["--data", str(files / "data.jsonl"), "--dtype", "fp32", *SHORT]
    return {
        "name": name,
        "kind": "reshard",
        "argv": ["--hf-model", str(files / model), *data, *layout],
        "save" if name.startswith("saved") else "load": str(files / "weights"),
    }


def training_case(files: Path, name: str) -> dict:
    _, model, layout = {**GRADIENTS, **TRAINED}[name]
    more = {"lr": 1e-2, "adam-eps": 1e-4, "lr-decay-style": "constant", "train-iters": STEPS}
    replay = str(files / "replay.jsonl")
    argv = flags(options(layout), str(files / model), replay, BATCH, **more) + layout
    kind = "both" if name in TRAINED else "gradients"
    return {"name": name, "kind": kind, "steps": STEPS, "argv": argv}


def case_of(files: Path, name: str, greedy: dict) -> dict:
    if name in ROLLOUTS:
        return rollout_case(files, name, greedy)
    return (reshard_case if name in RESHARDED else training_case)(files, name)


@pytest.fixture(scope="module")
def results(files: Path, greedy: dict, request: pytest.FixtureRequest) -> Path:
    output = files / "out"
    output.mkdir()
    wanted = selected(request, {**GRADIENTS, **TRAINED, **ROLLOUTS, **RESHARDED})
    for processes in sorted({case[0] for case in wanted.values()}):
        names = [name for name, (count, *_) in wanted.items() if count == processes]
        launch(processes, [case_of(files, name, greedy) for name in names], output)
    return output


@pytest.fixture(scope="module")
def references(files: Path) -> dict:
    samples = reference.read_replay(str(files / "replay.jsonl"))[:BATCH]
    keys = {(model, options(layout)) for _, model, layout in {**GRADIENTS, **TRAINED}.values()}
    return {(m, o): reference.compute(str(files / m), samples, o) for m, o in keys}


@pytest.mark.parametrize("name", [*GRADIENTS, *TRAINED])
def test_gradient_equals_reference(name: str, results: Path, references: dict) -> None:
    _, model, layout = {**GRADIENTS, **TRAINED}[name]
    expected = references[model, options(layout)]
    found = json.loads((results / f"{name}.json").read_text())
    compare_metrics(found[0] if name in TRAINED else found, expected.metrics, TOLERANCE)
    gradients = load_file(results / f"{name}.gradient.safetensors")
    compare_tensors(gradients, expected.gradients, TOLERANCE)


def test_the_aux_loss_matters_and_depends_on_the_microbatch(references: dict) -> None:
    gradients = {
        (o.aux_coeff, o.micro_batch_size): r.gradients["model.layers.0.mlp.gate.weight"]
        for (model, o), r in references.items()
        if model == "moe"
    }
    for other in ((0.0, 2), (0.3, 1), (0.3, 4)):
        difference = (gradients[0.3, 2] - gradients[other]).norm() / gradients[0.3, 2].norm()
        assert difference > 1e-2, (other, float(difference))


@pytest.mark.parametrize("name", TRAINED)
def test_training_equals_reference(name: str, results: Path, files: Path) -> None:
    _, model, layout = TRAINED[name]
    samples = reference.read_replay(str(files / "replay.jsonl"))
    history, weights = reference.train(
        str(files / model),
        samples,
        options(layout),
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
def test_greedy_equals_transformers(name: str, results: Path, greedy: dict) -> None:
    rows = greedy[ROLLOUTS[name][1]]
    stop = stop_id(rows)
    expected = [until(row, stop)[:n] for row, n in zip(rows, LIMITS, strict=True)]
    assert json.loads((results / f"{name}.json").read_text()) == expected


@pytest.mark.parametrize("name", ROLLOUTS)
def test_export_is_bit_equal(name: str, results: Path, files: Path) -> None:
    original = load_file(files / ROLLOUTS[name][1] / "model.safetensors")
    exported = load_file(results / name / "model.safetensors")
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[key], original[key]) for key in original)


@pytest.mark.parametrize("name", RESHARDED)
def test_checkpoint_weights_load_in_another_layout(name: str, results: Path, files: Path) -> None:
    original = load_file(files / RESHARDED[name][1] / "model.safetensors")
    exported = load_file(results / f"{name}.safetensors")
    exported.pop("lm_head.weight", None)  # tied
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[key], original[key]) for key in original)
