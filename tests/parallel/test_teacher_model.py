"""A teacher of another width, depth and architecture: equal to the reference in every layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_phf import reference
from tests.models import make_adapter, make_model, make_replay
from tests.parallel.cases import compare_metrics, compare_tensors, flags, launch
from tests.parallel.test_parity import BUDGET, FULL, MB2, PACKED, PP2, PP4, REPLAYS, SP, TP2, VPP2

BATCH, TOLERANCE = 8, 1e-5
RANK, ALPHA = 4, 6
FIRST3 = ["--num-layers-in-first-pipeline-stage", "3"]
STUDENTS = {
    "small": {"architecture": "qwen3"},
    "six": {"architecture": "qwen3", "num_hidden_layers": 6, "tie_word_embeddings": False},
}
TEACHERS = {
    "wide": {"hidden_size": 96, "head_dim": 24, "tie_word_embeddings": False},
    # Another architecture, and a vocabulary with more padding: other rows at TP 2 if kept.
    "deep": {
        "architecture": "llama",
        "num_hidden_layers": 8,
        "hidden_size": 80,
        "vocab_size": 600,
        "tie_word_embeddings": False,
    },
    "shallow": {"num_hidden_layers": 2, "hidden_size": 48, "vocab_size": 249},
    "tall": {"num_hidden_layers": 6, "intermediate_size": 96},  # as wide as its student
    "experts": {
        "architecture": "qwen3_moe",
        "hidden_size": 80,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "num_hidden_layers": 5,
    },
    "odd": {
        "architecture": "llama",
        "hidden_size": 72,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 8,
    },
}
# Of one architecture with another, by the names math and code; whose each line of a replay is.
TWO = ("wide", "tall")
FIELDS = [*["code"] * 4, "math", None, "code", "math"]
# A window of 64 makes 2 x 63 numbers more than any width here: directions are kept, not products.
LONG = {"window_size": 64}

# name -> (processes, student, teacher, layout flags, options of the method)
CASES = {
    "wide": (1, "small", "wide", [], {}),
    "wide_long": (1, "small", "wide", [], LONG),
    "deep": (1, "small", "deep", MB2, {"top_k": 5, "beta": 0.5}),
    "shallow": (1, "six", "shallow", [], {"objective": "policy_gradient"}),
    "tall": (1, "small", "tall", [], {}),
    "wide_tp2_sp": (2, "small", "wide", [*TP2, *SP, *MB2], {}),
    "experts": (1, "small", "experts", [], {}),
    "deep_cp2": (2, "small", "deep", ["--context-parallel-size", "2"], {"layer_map": (1, 3, 6, 8)}),
    "deep_tp2": (2, "small", "deep", TP2, {"beta": 0.5, "clip_mode": "none"}),
    "deep_pp2": (2, "small", "deep", PP2, {}),
    # Stages hold other layers than are needed there; a pair of layers that no stage has both of.
    "deep_pp2_late": (2, "small", "deep", PP2, {"layer_map": (5, 6, 7, 8)}),
    "deep_pp2_early": (2, "small", "deep", PP2, {"layer_map": (1, 1, 2, 3)}),
    "deep_pp2_apart": (2, "small", "deep", PP2, {"layer_map": (1, 3, 6, 8)}),
    "deep_pp2_apart_long": (2, "small", "deep", PP2, {"layer_map": (1, 3, 6, 8), **LONG}),
    "deep_pp2_vpp2": (2, "small", "deep", PP2 + VPP2, {"layer_map": (1, 4, 6, 7)}),
    "deep_pp2_uneven": (2, "small", "deep", [*PP2, *FIRST3, *FULL, "1"], {}),
    "shallow_pp2": (2, "six", "shallow", [*PP2, *MB2], {"layer_map": (2,) * 6}),
    "tall_pp2_last": (2, "small", "tall", PP2, {"terms": "direction=0,last_layer,nmse,adjacent"}),
    "tall_pp2_uneven": (2, "small", "tall", PP2 + FIRST3, {}),
    "tall_pp2_split": (
        2,
        "small",
        "tall",
        [*PP2, "--teacher-num-layers-in-first-pipeline-stage", "1"],
        {},
    ),
    "odd_tp2": (2, "small", "odd", [*TP2, "--pad-attention-heads"], {}),
    "empty_dp2_pp2": (
        4,
        "small",
        "deep",
        PP2,
        {"layer_map": (1, 3, 6, 8), "replay": "empty", "clip_mode": "none"},
    ),
    "deep_tp2_pp2_sp": (4, "small", "deep", [*TP2, *PP2, *SP], {"layer_map": (3, 5, 5, 8)}),
    "lora_deep_pp2": (2, "small", "deep", [*PP2, "--teacher-offload"], {"lora": True}),
    "lora_wide_tp2_sp": (2, "small", "wide", TP2 + SP, {"lora": True}),
    "two_tp2_sp": (2, "small", "tall+", TP2 + SP, {"replay": "fields"}),
    "two_pp2_vpp2": (2, "small", "wide+", PP2 + VPP2, {"replay": "fields", "beta": 0.5}),
    # A data-parallel rank whose rollouts are all of one teacher, and one with both.
    "two_packed_dp2": (
        2,
        "small",
        "tall+",
        PACKED,
        {"replay": "fields", "token_weighting": "divergence_top_p"},
    ),
    "two_lora_pp2": (
        2,
        "small",
        "tall+",
        [*PP2, *BUDGET, "--teacher-offload"],
        {"replay": "fields", "lora": True, "token_weighting": "teacher_entropy"},
    ),
    "deep_pp4": (4, "small", "deep", PP4, {"layer_map": (1, 4, 5, 8)}),
    "deep_pp4_long": (4, "small", "deep", PP4, {"layer_map": (4, 6, 6, 7), **LONG}),
}


def options(given: dict) -> reference.Options:
    settings = {key: value for key, value in given.items() if key not in ("replay", "lora")}
    return reference.Options(**{"alpha": 0.7, "window_size": 8, **settings})


def replay_file(files: Path, given: dict) -> str:
    return str(files / f"{given.get('replay', 'uneven')}.jsonl")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("teacher")
    for name, settings in STUDENTS.items():
        make_model(str(directory / name), **settings)
        make_adapter(str(directory / f"{name}.adapter"), str(directory / name), RANK, ALPHA)
    for name, settings in TEACHERS.items():
        make_model(str(directory / name), seed=11, **settings)
        if name in TWO:
            make_model(str(directory / f"{name}.code"), seed=12, **settings)
    for name, lengths in REPLAYS.items():
        make_replay(str(directory / f"{name}.jsonl"), lengths, vocab_size=249)
    lines = (directory / "uneven.jsonl").read_text().splitlines()
    named = [{**json.loads(line), "teacher": t} for line, t in zip(lines, FIELDS, strict=True)]
    (directory / "fields.jsonl").write_text("".join(json.dumps(line) + "\n" for line in named))
    return directory


def teachers(files: Path, teacher: str) -> str | dict[str, str]:
    """Its directory, or those of two by their names."""
    own = str(files / teacher.rstrip("+"))
    return {"math": own, "code": f"{own}.code"} if teacher.endswith("+") else own


def command_line(files: Path, name: str) -> list[str]:
    _, student, teacher, layout, given = CASES[name]
    o = options(given)
    named = teachers(files, teacher)
    if isinstance(named, dict):
        named = ",".join(f"{name}={directory}" for name, directory in named.items())
    more = {"teacher-hf-model": named}
    if o.layer_map is not None:
        more["teacher-layer-map"] = ",".join(str(k) for k in o.layer_map)
    if "lora" in given:
        more |= {"lora-rank": RANK, "lora-alpha": ALPHA}
        more["lora-adapter"] = str(files / f"{student}.adapter")
    replay = replay_file(files, given)
    return [*flags(o, str(files / student), replay, BATCH, **more), *layout]


@pytest.fixture(scope="module")
def chosen(request: pytest.FixtureRequest) -> list[str]:
    """The cases that the selected tests (pytest's -k) ask for."""
    here = [i for i in request.session.items if i.fspath == request.node.fspath]
    return [i.callspec.params["name"] for i in here]


@pytest.fixture(scope="module")
def results(files: Path, chosen: list[str]) -> Path:
    output = files / "out"
    output.mkdir()
    for processes in sorted({CASES[name][0] for name in chosen}):
        cases = [
            {"name": name, "kind": "gradients", "argv": command_line(files, name)}
            for name in chosen
            if CASES[name][0] == processes
        ]
        launch(processes, cases, output)
    return output


@pytest.fixture(scope="module")
def references(files: Path, chosen: list[str]) -> dict:
    known: dict = {}

    def of(name: str) -> reference.Result:
        _, student, teacher, _, given = CASES[name]
        adapter = str(files / f"{student}.adapter") if "lora" in given else None
        key = student, teacher, options(given), given.get("replay"), adapter
        if key not in known:
            samples = reference.read_replay(replay_file(files, given))
            known[key] = reference.compute(
                str(files / student),
                samples,
                key[2],
                adapter=adapter,
                teacher_directory=teachers(files, teacher),
            )
        return known[key]

    return {name: of(name) for name in chosen}


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name: str, results: Path, references: dict) -> None:
    expected = references[name]
    metrics = json.loads((results / f"{name}.json").read_text())
    compare_metrics(metrics, expected.metrics, TOLERANCE)
    assert (metrics["flow_direction"] is None) == ("tall" not in CASES[name][2])
    for key in ("opsd_by_teacher", "rollout_tokens_by_teacher"):
        assert (key in metrics) == CASES[name][2].endswith("+")
        if key in metrics:
            assert metrics[key] == pytest.approx(expected.metrics[key], rel=TOLERANCE)
    found = load_file(results / f"{name}.gradient.safetensors")
    compare_tensors(found, expected.gradients, 2 * TOLERANCE)
