"""Transformer Engine's layer spec over a stand-in with torch's arithmetic (tests/fake_te).

The stand-in shows that megatron-core's wrappers, our layers, weights and checkpoints fit together,
and where FP8 contexts are entered.  It shows nothing about FP8's or CUDA's numbers.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_phf import reference
from tests.models import make_adapter, make_model, make_replay
from tests.parallel.cases import compare_metrics, compare_tensors, flags, launch
from tests.parallel.test_parity import CP2, FULL, ONE_ROW_CP2, PACKED, PP2, SP, TOLERANCE, TP2

BATCH, LAYERS = 4, 4
TE = ["--transformer-impl", "transformer_engine", "--dtype", "auto"]  # fp32 on the CPU
FP8 = [*TE, "--fp8-format"]
TENSORWISE = [*FP8, "hybrid", "--fp8-recipe", "tensorwise"]
BF16_ENDS = ["--first-last-layers-bf16", "--num-layers-at-end-in-bf16", "2"]
USERBUFFERS = ["--tp-comm-overlap", "--max-tokens-per-microbatch", "50", "--pack-sequences"]
USERBUFFERS += ["--max-prompt-length", "9", "--max-teacher-prompt-length", "20"]
USERBUFFERS += ["--max-new-tokens", "30", *TP2, *SP]
LORA = ["--lora-rank", "8", "--lora-alpha", "12"]
# name -> (model, flags); all on two processes
PARITY = {
    "bf16_tp2_sp": ("qwen3", [*TE, *TP2, *SP]),
    "tensorwise_tp2_sp": ("qwen3", [*TENSORWISE, *BF16_ENDS, *TP2, *SP]),
    "bf16_packed_pp2": ("qwen3", [*TE, *PP2, *PACKED]),
    "bf16_cp2": ("qwen3", [*TE, *CP2]),
    "bf16_packed_cp2": ("qwen3", [*TE, *ONE_ROW_CP2]),
    "tensorwise_packed_cp2": ("qwen3", [*TENSORWISE, *ONE_ROW_CP2, *FULL, "1"]),
    "tensorwise_packed_tp2_sp": ("qwen3", [*TENSORWISE, *TP2, *SP, *PACKED]),
    "bf16_userbuffers": ("qwen3", [*TE, *USERBUFFERS, *FULL, "1", "--teacher", "live"]),
    "tensorwise_userbuffers": ("qwen3", [*TENSORWISE, *USERBUFFERS]),
    "delayed_pp2_full": ("qwen2", [*FP8, "e4m3", *PP2, *FULL, "1"]),
    "delayed_live_dp2": ("qwen3", [*FP8, "hybrid", "--teacher", "live"]),
    "mxfp8_lora_tp2": ("qwen3", [*FP8, "e4m3", "--fp8-recipe", "mxfp8", *TP2, *LORA]),
    "blockwise_moe_ep2": (
        "moe",
        [*FP8, "e4m3", "--fp8-recipe", "blockwise", "--expert-model-parallel-size", "2"],
    ),
}
# kind of optimizer -> (layout, what the middle part has besides)
RESUMED = {
    "specs": (TP2, [*FP8, "hybrid"]),
    "mixed": ([*TP2, "--dtype", "bf16"], []),
    "distributed": (["--use-distributed-optimizer"], []),
}
RESUMED_TOLERANCE = {"specs": 1e-4, "mixed": 1e-4, "distributed": 1e-4}
LINEARS = ("TELayerNormColumnParallelLinear", "TERowParallelLinear")
OPTIONS = reference.Options(alpha=0.7, window_size=8)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    d = tmp_path_factory.mktemp("te")
    make_model(str(d / "qwen3"))
    make_model(str(d / "qwen2"), "qwen2")
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    make_model(
        str(d / "moe"), "qwen3_moe", norm_topk_prob=True, decoder_sparse_step=1,
        mlp_only_layers=[], router_aux_loss_coef=0.0, **experts,
    )  # fmt: skip
    make_adapter(str(d / "adapter"), str(d / "qwen3"))
    make_replay(str(d / "r.jsonl"), [5, 1, 20, 9])
    make_replay(str(d / "long.jsonl"), [5, 7, 3, 9] * 4)
    return d


@pytest.fixture(scope="module")
def results(files: Path) -> Path:
    """All cases in one start: parity, then weights, rollouts and checkpoints in both specs."""
    out = files / "out"
    out.mkdir()
    cases = []
    for name, (model, layout) in PARITY.items():
        argv = [*flags(OPTIONS, str(files / model), str(files / "r.jsonl"), BATCH), *layout]
        if "lora" in name:
            argv += ["--lora-adapter", str(files / "adapter")]
        cases.append({"name": name, "kind": "gradients", "argv": argv})
    cases += [*weights(files), *rollouts(files), *resumed(files)]
    launch(2, cases, out, driver="tests/parallel/driver_te.py")
    return out


def weights(files: Path) -> list[dict]:
    """Saved in one spec, loaded in the other."""
    cases = []
    for model in ("qwen3", "moe"):
        argv = [*flags(OPTIONS, str(files / model), str(files / "r.jsonl"), BATCH)]
        for spec, layout in (("local", PP2), ("transformer_engine", [])):
            saved = str(files / f"{model}-{spec}.ckpt")
            impl = ["--transformer-impl", spec, *layout]
            other = "transformer_engine" if spec == "local" else "local"
            save = {"name": f"save_{model}_{spec}", "save": saved, "argv": [*argv, *impl]}
            load = {"name": f"load_{model}_{other}", "load": saved}
            load["argv"] = [*argv, "--transformer-impl", other]
            cases += [{**each, "kind": "reshard"} for each in (save, load)]
    return cases


def rollouts(files: Path) -> list[dict]:
    """The same greedy tokens from both specs."""
    sampling = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 8}
    case = {
        "kind": "rollouts",
        "prompts": [[1, 2, 3], [7] * 9, [30, 4, 9, 8]],
        "batch_size": 3,
        "sampling": {**sampling, "stop_ids": [], "seed": 0},
    }
    argv = [*flags(OPTIONS, str(files / "qwen3"), str(files / "r.jsonl"), BATCH), *TP2, *SP]
    lora = ["--lora-adapter", str(files / "adapter"), *LORA]
    specs = {"greedy_local": [], "greedy_te": [*TENSORWISE, *USERBUFFERS]}
    specs |= {"adapted_local": lora, "adapted_te": [*TE, *lora]}
    return [{**case, "name": n, "argv": [*argv, *more]} for n, more in specs.items()]


def resumed(files: Path) -> list[dict]:
    """Four steps with torch's Adam; two of them so, one with the fused one, one with torch's again.

    ``specs`` in the local spec, and there with TE's and FP8.
    """
    argv = [*flags(OPTIONS, str(files / "qwen3"), str(files / "long.jsonl"), BATCH)]
    argv += ["--train-iters", "4", "--no-tensorboard", "--lr", "1e-3", "--adam-eps", "1e-4"]
    cases = []
    for kind, (layout, more) in RESUMED.items():
        saved = [str(files / f"{kind}-{n}.ckpt") for n in range(2)]
        for part, adam, options in (
            ("straight", "torch", []),
            ("first", "torch", ["--save", saved[0], "--exit-interval", "2"]),
            ("second", "fused",
             ["--load", saved[0], "--save", saved[1], "--exit-interval", "3", *more]),
            ("third", "torch", ["--load", saved[1]]),
        ):  # fmt: skip
            name = f"{kind}_{part}"
            output = ["--output-dir", str(files / name)]
            case = {"name": name, "kind": "job", "adam": adam}
            cases.append({**case, "argv": [*argv, *layout, *output, *options]})
    return cases


@pytest.mark.parametrize("name", PARITY)
def test_equals_reference(name: str, files: Path, results: Path) -> None:
    """With FP8's padding of the sequences, which must not count in any loss."""
    model = str(files / PARITY[name][0])
    samples = reference.read_replay(str(files / "r.jsonl"))
    adapter = str(files / "adapter") if "lora" in name else None
    expected = reference.compute(model, samples, OPTIONS, adapter=adapter)
    compare_metrics(json.loads((results / f"{name}.json").read_text()), expected.metrics, TOLERANCE)
    found = load_file(results / f"{name}.gradient.safetensors")
    compare_tensors(found, expected.gradients, 3 * TOLERANCE)


def record(results: Path, name: str) -> list[dict]:
    return json.loads((results / f"{name}.record.json").read_text())


@pytest.mark.parametrize("name", [n for n in PARITY if not n.startswith("bf16")])
def test_fp8_is_where_the_student_trains_and_nowhere_else(name: str, results: Path) -> None:
    met = record(results, name)
    kinds = (*LINEARS, "TEColumnParallelGroupedLinear")  # "Adapted..." with LoRA
    gemms = [r for r in met if r["what"].endswith(kinds)]
    student, teacher = ([r for r in gemms if r["training"] is t] for t in (True, False))
    assert teacher and not any(r["fp8"] for r in teacher)
    losses = [r for r in met if r["what"] in ("flow", "output loss")]
    assert {r["what"] for r in losses} >= {"flow"} and not any(r["fp8"] for r in losses)
    recipe = {
        "tensorwise": "Float8CurrentScaling",
        "delayed": "TEDelayedScaling",
        "mxfp8": "MXFP8BlockScaling",
        "blockwise": "Float8BlockScaling",
    }[name.split("_")[0]]
    used = {r["recipe"] for r in student if r["fp8"]}
    assert used == {recipe}
    if "tensorwise" not in name:
        assert student and all(r["fp8"] for r in student)
    assert not any(r["fp8"] for r in met if r["what"] == "RMSNorm")


def test_first_and_last_layers_in_bf16(results: Path) -> None:
    """Four linears a layer, four microbatches: of four layers the second alone is in FP8."""
    met = record(results, "tensorwise_tp2_sp")
    student = [r for r in met if r["what"] in LINEARS and r["training"]]
    assert len(student) == 4 * LAYERS * BATCH
    for start in range(0, len(student), 4 * LAYERS):
        layers = [r["fp8"] for r in student[start : start + 4 * LAYERS]]
        assert layers == [False] * 4 + [True] * 4 + [False] * 8


def test_recompute_is_transformer_engines(results: Path) -> None:
    """It enters FP8 again when a layer is computed the second time."""
    met = record(results, "delayed_pp2_full")
    assert sum(r["what"] == "checkpoint" and r["fp8"] for r in met) == BATCH * LAYERS // 2
    student = [r for r in met if r["what"] in LINEARS and r["training"]]
    assert len(student) == 2 * 4 * BATCH * LAYERS // 2
    assert sum(r["grad"] for r in student) == len(student) // 2


def test_sequences_have_lengths_that_fp8_takes(results: Path) -> None:
    """Times TP where sequence parallelism cuts them: each rank quantises its own piece."""
    for name, multiple in (("tensorwise_tp2_sp", 32), ("delayed_pp2_full", 16)):
        gemms = [r for r in record(results, name) if r["what"] in LINEARS and r["training"]]
        assert gemms and all(r["sequence"] % multiple == 0 for r in gemms)
    plain = [r for r in record(results, "bf16_tp2_sp") if r["what"] in LINEARS]
    assert any(r["sequence"] % 16 for r in plain)


@pytest.mark.parametrize(("name", "tokens"), [("bf16", 50), ("tensorwise", 64)])
def test_userbuffers_are_where_the_student_trains(name: str, tokens: int, results: Path) -> None:
    """Rows have the buffers' length there, whatever they hold; the stand-in refuses others."""
    met = record(results, f"{name}_userbuffers")
    assert [r["tokens"] for r in met if r["what"] == "initialize_ub"] == [tokens]
    gemms = [r for r in met if r["what"] in LINEARS]
    student, teacher = ([r for r in gemms if r["training"] is t] for t in (True, False))
    assert student and all(r.get("userbuffers") and r["tokens"] == tokens for r in student)
    assert teacher and not any(r.get("userbuffers") for r in teacher)
    assert not any(r.get("userbuffers") for r in record(results, "greedy_te"))


def sizes_of_row(samples: list[dict], prompt: str, multiple: int) -> tuple[int, ...]:
    """Tokens of each sequence, in multiples of 2 CP, and of what fills the row up; in order."""
    sizes = [-(-len(s[prompt] + s["response_ids"]) // 4) * 4 for s in samples]
    return tuple(sorted([*sizes, *([-sum(sizes) % multiple] if sum(sizes) % multiple else [])]))


@pytest.mark.parametrize(("name", "multiple"), [("bf16", 4), ("tensorwise", 32)])
def test_packed_rows_over_context_ranks(
    name: str, multiple: int, files: Path, results: Path
) -> None:
    """Limits that 2 CP divides, the same with padding and without; a rank has half the tokens."""
    samples = reference.read_replay(str(files / "r.jsonl"))
    met = record(results, f"{name}_packed_cp2")
    calls = [r for r in met if r["what"] == "packed attention"]
    found = {tuple(sorted(b - a for a, b in pairwise(c["cu_seqlens"]))) for c in calls}
    prompts = ("student_prompt_ids", "teacher_prompt_ids")
    assert found == {sizes_of_row(samples, prompt, multiple) for prompt in prompts}
    for call in calls:
        limits = call["cu_seqlens"]
        assert call["context"] == 2 and call["tokens"] == limits[-1] // 2
        assert call["padded"] == [limits, limits]
        assert call["max_seqlen"] == max(b - a for a, b in pairwise(limits))


@pytest.mark.parametrize("model", ["qwen3", "moe"])
@pytest.mark.parametrize("spec", ["local", "transformer_engine"])
def test_a_checkpoint_of_the_other_spec_loads(
    model: str, spec: str, files: Path, results: Path
) -> None:
    exported = load_file(results / f"load_{model}_{spec}.safetensors")
    original = load_file(files / model / "model.safetensors")
    assert exported.keys() == original.keys()
    assert all((exported[name] == original[name]).all() for name in original)


@pytest.mark.parametrize("what", ["greedy", "adapted"])
def test_rollouts_are_the_same_from_plain_products(what: str, results: Path) -> None:
    """Of Transformer Engine's own weights, without its linears' Python (or FP8)."""
    local, engine = (
        json.loads((results / f"{what}_{n}.json").read_text()) for n in ("local", "te")
    )
    assert local == engine
    assert not [r for r in record(results, f"{what}_te") if r["what"].endswith(LINEARS)]


def test_adapters_count_in_rollouts(results: Path) -> None:
    adapted, plain = (
        json.loads((results / f"{n}_te.json").read_text()) for n in ("adapted", "greedy")
    )
    assert adapted != plain


@pytest.mark.parametrize("kind", RESUMED)
def test_a_run_goes_on_with_another_adam_and_spec(kind: str, results: Path) -> None:
    """Weights, moments, steps and schedule; the stand-in has no rounding of its own."""
    parts = [
        json.loads((results / f"{kind}_{part}.json").read_text())
        for part in ("straight", "first", "second", "third")
    ]
    straight, together = parts[0], [step for part in parts[1:] for step in part]
    assert [len(part) for part in parts[1:]] == [2, 1, 1]
    for ours, wanted in zip(together, straight, strict=True):
        assert ours["loss"] == pytest.approx(wanted["loss"], rel=RESUMED_TOLERANCE[kind])
        assert ours["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=RESUMED_TOLERANCE[kind])
    fp8 = [r["fp8"] for r in record(results, f"{kind}_second") if r["what"] in LINEARS]
    assert any(fp8) == (kind == "specs")
