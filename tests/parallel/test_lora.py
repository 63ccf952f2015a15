"""LoRA equals peft in value, gradient and training, in every layout; teachers share the base."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_phf import reference
from tests.models import ALL_LINEARS, make_adapter, make_model, make_replay
from tests.parallel.cases import compare_metrics, compare_tensors, flags, launch
from tests.parallel.test_moe import EXPERTS
from tests.parallel.test_parity import CP2, FULL, MODELS, PACKED, PACKED_CP2, PP2, SP, TP2, VPP2

STEPS, BATCH, RANK, ALPHA = 3, 4, 8, 12
LENGTHS = [5, 1, 9, 14, 3, 8, 2, 11, 6, 12, 4, 7]
DISTRIBUTED = ["--use-distributed-optimizer"]
PAD = ["--pad-attention-heads"]
DECAY, RATE, EPSILON = 0.6, 1e-2, 1e-4  # as in test_training
OPTIONS = reference.Options(alpha=0.7, window_size=8, beta=0.5, clip=0.02)

ADAPTED = {
    **{name: MODELS[name] for name in ("qwen3", "odd", "qwen2")},
    "some": MODELS["qwen3"],
    "moe": {**EXPERTS, "router_aux_loss_coef": 0.0},
}
TARGETS = {"some": "q_proj,v_proj,up_proj", "moe": "q_proj,k_proj,v_proj,o_proj"}

# name -> (processes, model, layout flags, teacher)
TRAINED = {
    "one": (1, "qwen3", [], "frozen"),
    "tp2": (2, "qwen3", TP2, "frozen"),
    "tp2_sp": (2, "qwen3", TP2 + SP, "frozen"),
    "pp2": (2, "qwen3", PP2, "frozen"),
    "tp2_pp2": (4, "qwen3", TP2 + PP2, "frozen"),
    "tp2_pp2_sp": (4, "qwen3", TP2 + PP2 + SP, "frozen"),
    "pp2_vpp2": (2, "qwen3", PP2 + VPP2, "frozen"),
    "pp2_full": (2, "qwen3", [*PP2, *FULL, "1"], "frozen"),
    "tp2_dp2_distributed": (4, "qwen3", TP2 + DISTRIBUTED, "ema"),
    "tp2_sp_full_live": (2, "qwen3", [*TP2, *SP, *FULL, "2"], "live"),
    "padded_heads": (2, "odd", TP2 + PAD, "frozen"),
}
GRADIENTS = {
    "qwen2_tp2_sp": (2, "qwen2", TP2 + SP, "frozen"),
    "some_tp2": (2, "some", TP2, "frozen"),
    "moe_tp2_sp": (2, "moe", TP2 + SP, "frozen"),
    "packed_tp2_sp": (2, "qwen3", TP2 + SP + PACKED, "frozen"),
    "cp2": (2, "qwen3", CP2, "frozen"),
    "packed_cp2": (2, "qwen3", PACKED_CP2, "frozen"),
}
BF16 = {"bf16": (4, "qwen3", [*TP2, *PP2, *SP, "--dtype", "bf16"], "frozen")}
GRADIENT_CASES = [*GRADIENTS, *(n for n, case in TRAINED.items() if case[3] == "frozen")]
CAP = ["--importance-ratio-cap", "1.5"]
# Nothing to compare with but each other: peft's random numbers are others.
DROPOUT = {
    "dropout": (2, "qwen3", TP2, "frozen"),
    "dropout_recompute": (2, "qwen3", [*TP2, *FULL, "1"], "frozen"),
    "dropout_sp": (2, "qwen3", TP2 + SP, "frozen"),
    "dropout_sp_recompute": (2, "qwen3", [*TP2, *SP, *FULL, "1"], "frozen"),
    "dropout_weighed_sp": (2, "qwen3", [*TP2, *SP, *CAP], "frozen"),
    "dropout_weighed_vpp2": (2, "qwen3", [*PP2, *VPP2, *CAP], "frozen"),
}
ROLLOUTS = {
    "rollouts_tp2_pp2": (4, "qwen3", [*TP2, *PP2, "--lora-dropout", "0.5"]),
    "rollouts_padded": (2, "odd", TP2 + PAD),
    "rollouts_sp": (2, "qwen3", TP2 + SP),
    "rollouts_some": (2, "some", TP2),
}
GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 3, "stop_ids": []}
NEW_TOKENS = 12


def prompts() -> list[list[int]]:
    generator = random.Random(5)
    return [[generator.randrange(250) for _ in range(n)] for n in (1, 12, 5, 3)]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("lora")
    for name, settings in ADAPTED.items():
        make_model(str(directory / name), **settings)
        targets = TARGETS.get(name, ALL_LINEARS)
        make_adapter(
            str(directory / f"{name}.adapter"), str(directory / name), RANK, ALPHA, targets
        )
    make_replay(str(directory / "replay.jsonl"), LENGTHS, log_probs=True)
    return directory


def argv_of(files: Path, model: str, layout: list[str], teacher: str) -> list[str]:
    lora = {
        "lora-rank": RANK,
        "lora-alpha": ALPHA,
        "lora-adapter": files / f"{model}.adapter",
        "lora-target-modules": TARGETS.get(model, ALL_LINEARS),
    }
    training = {
        "teacher": teacher,
        "ema-decay": DECAY,
        "lr": RATE,
        "adam-eps": EPSILON,
        "lr-decay-style": "constant",
        "train-iters": STEPS,
    }
    replay = str(files / "replay.jsonl")
    return flags(OPTIONS, str(files / model), replay, BATCH, **lora, **training) + layout


def cases_of(files: Path, processes: int) -> list[dict]:
    cases = []
    for name, (count, model, layout, teacher) in {
        **TRAINED,
        **GRADIENTS,
        **DROPOUT,
        **BF16,
    }.items():
        kind = "gradients" if name in GRADIENTS else "both" if teacher == "frozen" else "train"
        more = ["--lora-dropout", "0.3"] if name in DROPOUT else []
        case = {"name": name, "kind": kind, "steps": STEPS}
        if count == processes:
            cases.append({**case, "argv": argv_of(files, model, layout + more, teacher)})
    for name, (count, model, layout) in ROLLOUTS.items():
        sampling = {**GREEDY, "max_new_tokens": NEW_TOKENS}
        case = {"name": name, "kind": "rollouts", "prompts": prompts(), "sampling": sampling}
        if count == processes:
            argv = argv_of(files, model, layout, "frozen")
            cases.append({**case, "batch_size": 4, "argv": argv})
    if processes == 1:
        for teacher in ("frozen", "ema", "live"):
            argv = argv_of(files, "qwen3", [], teacher)
            cases.append({"name": f"memory_{teacher}", "kind": "teacher_memory", "argv": argv})
        full = argv_of(files, "qwen3", [], "frozen")
        at = full.index("--lora-rank")
        del full[at : at + 8]
        cases.append({"name": "memory_full", "kind": "teacher_memory", "argv": full})
    return cases


def needed(name: str, tests: str) -> bool:
    """Whether one of the collected ``tests`` reads the case: with -k, the others are not run."""
    return f"[{name.removesuffix('_recompute')}]" in tests or f"test_{name.split('_')[0]}_" in tests


@pytest.fixture(scope="module")
def results(files: Path, request: pytest.FixtureRequest) -> Path:
    output = files / "out"
    output.mkdir()
    tests = " ".join(item.name for item in request.session.items)
    for processes in (1, 2, 4):
        cases = [case for case in cases_of(files, processes) if needed(case["name"], tests)]
        if cases:
            launch(processes, cases, output)
    return output


@pytest.fixture(scope="module")
def samples(files: Path) -> list[dict]:
    return reference.read_replay(str(files / "replay.jsonl"))


@pytest.fixture(scope="module")
def gradients(files: Path, samples: list[dict]) -> dict[str, reference.Result]:
    return {
        model: reference.compute(
            str(files / model), samples[:BATCH], OPTIONS, adapter=str(files / f"{model}.adapter")
        )
        for model in ADAPTED
    }


@pytest.fixture(scope="module")
def trained(files: Path, samples: list[dict]) -> dict:
    return {
        (model, teacher): reference.train(
            str(files / model),
            samples,
            OPTIONS,
            steps=STEPS,
            lr=RATE,
            eps=EPSILON,
            clip_grad=0.1,
            teacher_kind=teacher,
            ema_decay=DECAY,
            adapter=str(files / f"{model}.adapter"),
        )
        for model, teacher in sorted({case[1::2] for case in TRAINED.values()})
    }


def read(results: Path, name: str) -> list[dict]:
    found = json.loads((results / f"{name}.json").read_text())
    return found if isinstance(found, list) else [found]


@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_value_and_gradient_equal_peft(name: str, results: Path, gradients: dict) -> None:
    expected = gradients[{**TRAINED, **GRADIENTS}[name][1]]
    compare_metrics(read(results, name)[0], expected.metrics, 1e-5)
    found = load_file(results / f"{name}.gradient.safetensors")
    assert all(float(g.norm()) > 0 for g in expected.gradients.values())
    compare_tensors(found, expected.gradients, 2e-5)


@pytest.mark.parametrize("name", TRAINED)
def test_training_equals_peft(name: str, results: Path, trained: dict) -> None:
    _, model, _, teacher = TRAINED[name]
    history, adapters = trained[model, teacher]
    for ours, expected in zip(read(results, name)[-STEPS:], history, strict=True):
        compare_metrics(ours, expected, 5e-5)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5e-5)
    compare_tensors(load_file(results / f"{name}.safetensors"), adapters, 2e-5)


def test_bf16_is_as_near_to_fp32_as_pefts_bf16(
    results: Path, files: Path, samples: list[dict], gradients: dict
) -> None:
    exact, adapter = gradients["qwen3"], str(files / "qwen3.adapter")
    plain = reference.compute(
        str(files / "qwen3"), samples[:BATCH], OPTIONS, torch.bfloat16, adapter=adapter
    )
    assert read(results, "bf16")[0]["loss"] == pytest.approx(exact.metrics["loss"], rel=2e-2)
    ours, theirs = (
        {
            name: float((g[name].float() - e).norm() / e.norm())
            for name, e in exact.gradients.items()
        }
        for g in (load_file(results / "bf16.gradient.safetensors"), plain.gradients)
    )
    assert sum(ours.values()) < 1.1 * sum(theirs.values())
    assert max(ours.values()) < 1.25 * max(theirs.values())


def test_the_teachers_differ(trained: dict) -> None:
    losses = {kind: trained["qwen3", kind][0][-1]["loss"] for kind in ("frozen", "ema", "live")}
    assert len({round(x, 4) for x in losses.values()}) == 3, losses


@pytest.mark.parametrize("name", ["dropout", "dropout_sp"])
def test_dropout_survives_recompute(name: str, results: Path, gradients: dict) -> None:
    """And it acts on the student alone: the teacher's entropy is that without it."""
    plain, recomputed = (read(results, n) for n in (name, f"{name}_recompute"))
    for ours, expected in zip(plain, recomputed, strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    for suffix in (".gradient.safetensors", ".safetensors"):
        pair = (load_file(results / f"{n}{suffix}") for n in (name, f"{name}_recompute"))
        compare_tensors(*pair, 1e-6)
    without = gradients["qwen3"].metrics
    assert plain[0]["teacher_entropy"] == pytest.approx(without["teacher_entropy"], rel=1e-6)
    assert abs(plain[0]["loss"] - without["loss"]) > 1e-3 * without["loss"]


@pytest.mark.parametrize("name", ["dropout_weighed_sp", "dropout_weighed_vpp2"])
def test_tokens_are_weighed_without_dropout(
    name: str, results: Path, files: Path, samples: list[dict]
) -> None:
    """What measures the student measures it as it samples."""
    options = dataclasses.replace(OPTIONS, ratio_cap=1.5)
    adapter = str(files / "qwen3.adapter")
    expected = reference.compute(str(files / "qwen3"), samples[:BATCH], options, adapter=adapter)
    step = read(results, name)[0]
    for key in ("importance_weight", "importance_clipped_fraction"):
        assert step[key] == pytest.approx(expected.metrics[key], rel=1e-5), key


def test_memory_of_the_teacher(results: Path) -> None:
    """Nothing, one set of adapters, nothing; a whole model without LoRA."""
    found = {kind: read(results, f"memory_{kind}")[0] for kind in ("frozen", "ema", "live", "full")}
    assert found["frozen"]["added"] == found["live"]["added"] == 0
    assert found["ema"]["added"] == found["ema"]["adapters"] > 0
    assert found["full"]["added"] >= found["full"]["model"] > 5 * found["ema"]["adapters"]


def peft_model(files: Path, model: str, adapter: Path):
    plain = AutoModelForCausalLM.from_pretrained(files / model)
    return PeftModel.from_pretrained(plain, adapter).eval()


@pytest.mark.parametrize("name", ROLLOUTS)
def test_rollouts_use_the_adapters(name: str, results: Path, files: Path) -> None:
    model = ROLLOUTS[name][1]
    adapted = peft_model(files, model, files / f"{model}.adapter")
    adapted.generation_config.eos_token_id = adapted.generation_config.pad_token_id = None
    rows, base = [], []
    for prompt in prompts():
        ids, most = torch.tensor([prompt]), {"max_new_tokens": NEW_TOKENS, "do_sample": False}
        rows.append(adapted.generate(input_ids=ids, **most)[0, len(prompt) :].tolist())
        with adapted.disable_adapter():
            base.append(adapted.generate(input_ids=ids, **most)[0, len(prompt) :].tolist())
    assert json.loads((results / f"{name}.json").read_text()) == rows != base


@pytest.mark.parametrize("name", ROLLOUTS)
def test_exported_adapter_and_merged_model(name: str, results: Path, files: Path) -> None:
    """The adapter bit for bit, and equal logits of peft's, ours and the merged model."""
    model = ROLLOUTS[name][1]
    exported = load_file(results / f"{name}.adapter" / "adapter_model.safetensors")
    original = load_file(files / f"{model}.adapter" / "adapter_model.safetensors")
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[key], original[key]) for key in original)
    ids = torch.tensor([prompts()[1]])
    with torch.no_grad():
        wanted = peft_model(files, model, files / f"{model}.adapter")(input_ids=ids).logits
        ours = peft_model(files, model, results / f"{name}.adapter")(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(results / name).eval()(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(files / model).eval()(ids).logits
    assert torch.equal(ours, wanted)
    torch.testing.assert_close(merged, wanted, rtol=1e-4, atol=1e-4)
    assert float((plain - wanted).abs().max()) > 0.1
