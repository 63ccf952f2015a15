"""The product equals the reference in value and gradient, whatever the parallel layout."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_phf import reference
from tests.models import make_model, make_replay
from tests.parallel.cases import compare_metrics, compare_tensors, flags, launch

# Shorter and longer than the window of 8; and a first data-parallel rank without any token.
REPLAYS = {"uneven": [1, 2, 20, 7, 31, 3, 12, 9], "empty": [0, 0, 0, 0, 5, 1, 0, 12]}
REPLAYS["masked"] = REPLAYS["uneven"]  # some tokens are not the student's
REPLAYS["kept"] = REPLAYS["uneven"]  # the first two and the last are not trained on
REPLAYS["sampled"] = REPLAYS["uneven"]  # the same, with log-probabilities of what sampled them
BATCH = 8
TOLERANCE, BF16_TOLERANCE = 1e-5, 2e-2
BF16, ALONE = "bf16_tp2_pp2_sp", "supervised_alone"
TP2, PP2 = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
PP4 = ["--pipeline-model-parallel-size", "4"]
SP = ["--sequence-parallel"]
VPP2 = ["--num-virtual-stages-per-pipeline-rank", "2"]
OVERLAP = ["--overlap-grad-reduce"]
MB2 = ["--micro-batch-size", "2"]
FULL = ["--recompute-granularity", "full", "--recompute-num-layers"]
BUDGET = ["--max-tokens-per-microbatch", "60"]
PACKED = [*BUDGET, "--pack-sequences"]
CP2 = ["--context-parallel-size", "2"]
# Rows with room for the longest rollout that the flags allow; or for all that there are.
PACKED_CP2 = [*CP2, "--pack-sequences", "--max-tokens-per-microbatch", "96"]
ONE_ROW_CP2 = [*PACKED_CP2, "--max-tokens-per-microbatch", "1000"]
BLOCK = ["--recompute-granularity", "full", "--recompute-method", "block"]

ALL_TERMS = "pointwise,cka=0.5,mse=0.1,nmse,cka_adjacent,last_layer"

# name -> (processes, model, layout flags, options of the method)
CASES = {
    "one": (1, "qwen3", [], {}),
    "tp2": (2, "qwen3", TP2, {}),
    "pp2": (2, "qwen3", PP2, {}),
    "tp2_pp2": (4, "qwen3", TP2 + PP2, {}),
    "tp4": (4, "qwen3", ["--tensor-model-parallel-size", "4"], {"beta": 0.5, "top_k": 7}),
    BF16: (4, "qwen3", [*TP2, *PP2, *SP, "--dtype", "bf16"], {"clip_mode": "none"}),
    "tp2_sp": (2, "qwen3", [*TP2, *SP, *MB2], {}),
    "dp2": (2, "qwen3", MB2, {}),
    # An embedding large enough for a careless sum of its gradient's squares to show.
    "dp2_tp2": (4, "wide", TP2 + MB2, {}),
    "dp2_overlap": (2, "qwen3", OVERLAP, {}),
    "empty_dp2_overlap": (
        2,
        "qwen3",
        [*OVERLAP, "--use-distributed-optimizer"],
        {"replay": "empty"},
    ),
    "dp2_pp2_vpp2_overlap": (4, "qwen3", [*PP2, *VPP2, *OVERLAP], {}),
    "pp2_vpp2": (2, "qwen3", PP2 + VPP2, {}),
    "pp4": (4, "qwen3", PP4, {}),
    "pp2_full": (2, "qwen3", [*PP2, *FULL, "1"], {}),
    "pp2_full_two": (2, "qwen3", [*PP2, *FULL, "2", *MB2], {}),
    "pp2_vpp2_block": (2, "qwen3", [*PP2, *VPP2, *BLOCK], {}),
    "tp2_sp_selective": (2, "qwen3", [*TP2, *SP, "--recompute-granularity", "selective"], {}),
    "tp2_pp2_sp_full": (4, "qwen3", [*TP2, *PP2, *SP, *FULL, "1"], {}),
    "untied_uneven": (
        2,
        "untied",
        [*PP2, "--num-layers-in-first-pipeline-stage", "4"],
        {"beta": 0.5, "clip_mode": "token", "clip": 0.2},
    ),
    "untied_tp2_pp2": (4, "untied", TP2 + PP2, {"beta": 1.0, "clip_mode": "none"}),
    "llama_top_k": (2, "llama", TP2, {"top_k": 5, "beta": 0.3, "clip": 0.02}),
    "llama_pp2": (2, "llama", PP2, {"objective": "policy_gradient"}),
    "padded_heads": (2, "odd", [*TP2, "--pad-attention-heads"], {"window_rule": "contiguous"}),
    "direction": (2, "qwen3", PP2, {"terms": "direction,geometry=0,adjacent=0", "beta": 0.5}),
    "geometry": (
        2,
        "untied",
        TP2,
        {"terms": "direction=0,geometry,adjacent=0", "layers": (2, 3, 6)},
    ),
    "adjacent": (2, "qwen3", [*PP2, *FULL, "1"], {"terms": "adjacent", "layers": (2, 3)}),
    "no_adjacent": (2, "qwen3", [*TP2, *SP], {"terms": "direction,geometry,adjacent=0"}),
    "no_pairs": (1, "qwen3", [], {"layers": (1, 4)}),
    "pointwise": (2, "qwen3", [*PP2, *MB2], {"terms": "pointwise"}),
    # Terms that compare other states, and weights of their own; products alone, and both.
    "cka": (2, "qwen3", [*PP2, *MB2], {"terms": "cka"}),
    "cka_tp2_pp2_sp_full": (
        4,
        "qwen3",
        [*TP2, *PP2, *SP, *FULL, "1"],
        {"terms": "geometry,cka=0.3,pointwise=2,adjacent", "layers": (2, 3, 4)},
    ),
    # What PHF is compared with: squares, pairs of products, the teacher's last layer everywhere.
    "rivals_pp2_vpp2": (
        2,
        "qwen3",
        [*PP2, *VPP2],
        {"terms": "nmse,mse=0.5,cka_adjacent,last_layer=2", "beta": 0.5},
    ),
    "rivals_tp2_pp2_sp_full": (
        4,
        "qwen3",
        [*TP2, *PP2, *SP, *FULL, "1"],
        {"terms": "direction,last_layer,cka_adjacent,cka=0", "layers": (1, 2, 3)},
    ),
    "rivals_packed_cp2": (
        2,
        "qwen3",
        PACKED_CP2,
        {"terms": "nmse,mse,cka_adjacent,last_layer", "replay": "masked"},
    ),
    "last_layer_pp4": (4, "qwen3", PP4, {"terms": "last_layer"}),
    # Hidden states alone: OPRD.
    "oprd_dp2": (2, "untied", MB2, {"terms": "mse", "opsd_weight": 0.0, "replay": "empty"}),
    # Tokens that count more than others, in both losses; the first ones in none.
    "student_entropy_tp2_pp2_sp_full": (
        4,
        "qwen3",
        [*TP2, *PP2, *SP, *FULL, "1"],
        {"token_weighting": "student_entropy", "terms": f"{ALL_TERMS},direction,geometry,adjacent"},
    ),
    "divergence_packed_cp2": (
        2,
        "qwen3",
        PACKED_CP2,
        {
            "token_weighting": "divergence_top_p",
            "token_keep_fraction": 0.3,
            "terms": f"{ALL_TERMS},adjacent",
            "replay": "masked",
            "skip_first_tokens": 2,
        },
    ),
    "divergence_tp4": (
        4,
        "qwen3",
        ["--tensor-model-parallel-size", "4"],
        {"token_weighting": "divergence_top_p", "beta": 0.5, "top_k": 7},
    ),
    "teacher_entropy_cp2": (
        2,
        "qwen3",
        [*CP2, *MB2],
        # 45 of the 85 tokens are above it, none within 0.003.
        {"token_weighting": "teacher_entropy", "token_entropy_threshold": 4.903, "beta": 1.0},
    ),
    "position_pp2_vpp2": (2, "qwen3", PP2 + VPP2, {"token_weighting": "position"}),
    "student_entropy_empty_dp2": (
        2,
        "qwen3",
        [],
        {"token_weighting": "student_entropy", "replay": "empty"},
    ),
    "skip_first": (2, "qwen3", [*PP2, *MB2], {"skip_first_tokens": 3}),
    "supervised": (2, "qwen3", [*TP2, *SP], {"objective": "cross_entropy", "temperature": 1.0}),
    ALONE: (1, "qwen3", [], {"objective": "cross_entropy", "temperature": 1.0, "alpha": 0.0}),
    "empty_dp2": (2, "qwen3", [], {"replay": "empty"}),
    "empty_dp2_pp2": (4, "qwen3", PP2, {"replay": "empty"}),
    "empty_dp2_tp2_sp": (4, "qwen3", [*TP2, *SP, *MB2], {"replay": "empty"}),
    # Microbatches by a token budget, other ones on each data-parallel rank.
    "budget_one": (1, "qwen3", BUDGET, {}),
    "budget_dp2": (2, "qwen3", BUDGET, {}),
    "budget_dp2_pp2": (4, "qwen3", [*PP2, *BUDGET], {}),
    "budget_tp2_sp_pp2": (4, "qwen3", [*TP2, *SP, *PP2, *BUDGET], {}),
    "budget_empty_dp2": (2, "qwen3", BUDGET, {"replay": "empty"}),
    # The same in one row each.
    "packed_one": (1, "qwen3", PACKED, {}),
    "packed_tp2_sp": (2, "qwen3", [*TP2, *SP, "--recompute-granularity", "selective", *PACKED], {}),
    "packed_dp2_pp2_full": (4, "qwen3", [*PP2, *FULL, "1", *PACKED], {}),
    "packed_tp2_sp_pp2": (4, "untied", [*TP2, *SP, *PP2, *PACKED], {"beta": 0.5, "clip": 0.02}),
    "packed_empty_dp2": (2, "qwen3", PACKED, {"replay": "empty"}),
    "packed_empty_cp2": (2, "qwen3", PACKED_CP2, {"replay": "empty"}),
    "masked_tp2_pp2": (4, "qwen3", TP2 + PP2, {"replay": "masked"}),
    "masked_packed_cp2": (2, "qwen3", PACKED_CP2, {"replay": "masked", "beta": 0.5}),
    "kept_dp2_pp2": (4, "qwen3", PP2 + MB2, {"replay": "kept"}),
    "ratios_tp2_pp2": (4, "qwen3", TP2 + PP2, {"replay": "sampled", "ratio_cap": 1.5}),
    "ratios_packed_cp2": (
        2,
        "qwen3",
        PACKED_CP2,
        {"replay": "sampled", "ratio_cap": 3.0, "objective": "policy_gradient"},
    ),
    "qwen2_tp2_sp": (2, "qwen2", [*TP2, *SP], {"beta": 0.5, "clip": 0.01}),
}
MODELS = {
    "qwen3": {"architecture": "qwen3"},
    "untied": {"architecture": "qwen3", "num_hidden_layers": 6, "tie_word_embeddings": False},
    "llama": {"architecture": "llama"},
    "qwen2": {"architecture": "qwen2"},
    "wide": {"architecture": "qwen3", "vocab_size": 65536},
    "odd": {
        "architecture": "llama",
        "hidden_size": 72,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 8,
    },
}


def options(given: dict) -> reference.Options:
    settings = {key: value for key, value in given.items() if key != "replay"}
    return reference.Options(**{"alpha": 0.7, "window_size": 8, **settings})


def replay_file(files: Path, given: dict) -> str:
    return str(files / f"{given.get('replay', 'uneven')}.jsonl")


def key_of(model: str, given: dict) -> tuple:
    return model, options(given), given.get("replay", "uneven")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("parity")
    for name, settings in MODELS.items():
        make_model(str(directory / name), **settings)
    for name, lengths in REPLAYS.items():
        masked, sampled = name in ("masked", "sampled"), name == "sampled"
        make_replay(str(directory / f"{name}.jsonl"), lengths, masked=masked, log_probs=sampled)
    drop(directory / "kept.jsonl", 0, 1, 7)
    return directory


def drop(replay: Path, *numbers: int) -> None:
    """Mark some of a replay file's rollouts as not kept."""
    lines = [json.loads(line) for line in replay.read_text().splitlines()]
    for i in numbers:
        lines[i]["kept"] = False
    replay.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def chosen(request: pytest.FixtureRequest) -> dict:
    """The cases that the selected tests (pytest's -k) ask for."""
    here = [i for i in request.session.items if i.fspath == request.node.fspath]
    names = {i.callspec.params["name"] if hasattr(i, "callspec") else BF16 for i in here}
    return {name: case for name, case in CASES.items() if name in names}


@pytest.fixture(scope="module")
def results(files: Path, chosen: dict) -> Path:
    """Every case's output: one launch for each number of processes."""
    output = files / "out"
    output.mkdir()
    for processes in sorted({case[0] for case in chosen.values()}):
        cases = [
            {
                "name": name,
                "kind": "gradients",
                "argv": [
                    *flags(options(given), str(files / model), replay_file(files, given), BATCH),
                    *layout,
                ],
            }
            for name, (count, model, layout, given) in chosen.items()
            if count == processes
        ]
        launch(processes, cases, output)
    return output


@pytest.fixture(scope="module")
def references(files: Path, chosen: dict) -> dict:
    known: dict = {}
    for _, model, _, given in chosen.values():
        key = key_of(model, given)
        if key not in known:
            samples = reference.read_replay(replay_file(files, given))
            known[key] = reference.compute(str(files / model), samples, options(given))
    return known


def result(name: str, results: Path, expected: reference.Result, tolerance: float) -> dict:
    """The case's gradients; its metrics are compared here."""
    metrics = json.loads((results / f"{name}.json").read_text())
    compare_metrics(metrics, expected.metrics, tolerance)
    found = load_file(results / f"{name}.gradient.safetensors")
    norm = sum(g.double().square().sum() for g in found.values()) ** 0.5
    wanted = expected.metrics["grad_norm"]
    assert float(norm) == pytest.approx(wanted, rel=tolerance)
    # What the optimizer reports and clips by.
    assert metrics["grad_norm"] == pytest.approx(wanted, rel=tolerance / 5)
    return found


@pytest.mark.parametrize("name", [n for n in CASES if n not in (BF16, ALONE)])
def test_equals_reference(name: str, results: Path, references: dict) -> None:
    _, model, _, given = CASES[name]
    expected = references[key_of(model, given)]
    found = result(name, results, expected, TOLERANCE)
    compare_tensors(found, expected.gradients, 2 * TOLERANCE)
    # In bf16 another entry may be the largest.
    agreement = json.loads((results / f"{name}.json").read_text())["teacher_agreement"]
    assert agreement == pytest.approx(expected.metrics["teacher_agreement"])


@pytest.mark.parametrize("name", [ALONE])
def test_supervised_training_without_a_flow_loss_needs_no_teacher(
    name: str, results: Path, references: dict
) -> None:
    _, model, _, given = CASES[name]
    expected = references[key_of(model, given)]
    unread = {k: None for k in expected.metrics if k.startswith("flow") or k == "teacher_entropy"}
    expected = dataclasses.replace(expected, metrics={**expected.metrics, **unread})
    found = result(name, results, expected, TOLERANCE)
    compare_tensors(found, expected.gradients, 2 * TOLERANCE)


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("budget_one", 0, 0.95), ("packed_one", 1, 1), ("packed_tp2_sp", 0.95, 1)],
)
def test_packed_rows_have_no_padding(name: str, least: float, most: float, results: Path) -> None:
    useful = json.loads((results / f"{name}.json").read_text())["useful_tokens_fraction"]
    assert least <= useful <= most


def test_bf16_is_as_near_to_fp32_as_transformers_bf16(
    files: Path, results: Path, references: dict
) -> None:
    """Values to 2 %; gradients carry bf16's own rounding, which plain transformers shows too."""
    _, model, _, given = CASES[BF16]
    exact = references[key_of(model, given)]
    samples = reference.read_replay(replay_file(files, given))
    plain = reference.compute(str(files / model), samples, options(given), torch.bfloat16)
    found = result(BF16, results, exact, BF16_TOLERANCE)
    ours, theirs = (
        {
            name: float((g[name].float() - e).norm() / e.norm())
            for name, e in exact.gradients.items()
        }
        for g in (found, plain.gradients)
    )
    assert sum(ours.values()) < 1.1 * sum(theirs.values())
    assert max(ours.values()) < 1.25 * max(theirs.values())
