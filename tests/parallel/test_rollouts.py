"""Rollouts equal HuggingFace's generate in every layout; exports equal the files that were read."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.models import make_model
from tests.parallel.cases import launch
from tests.parallel.test_parity import MODELS, PP2, SP, TP2, VPP2

SHORT = ["--max-prompt-length", "16", "--max-teacher-prompt-length", "16"]
NEW_TOKENS, LIMITS = 20, [20, 1, 7, 20, 13, 20]
GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0}
SAMPLED = {"temperature": 1.3, "top_p": 0.9, "top_k": 40}
# What else is drawn from a sharded vocabulary, at a flat distribution: all ranks' parts count.
NUCLEUS = {"temperature": 9.0, "top_p": 0.97, "top_k": 0}
UNFILTERED = {"temperature": 9.0, "top_p": 1.0, "top_k": 0}
SAMPLINGS = {"sampled": SAMPLED, "nucleus": NUCLEUS, "unfiltered": UNFILTERED}

# layout -> (processes, flags)
LAYOUTS = {
    "one": (1, []),
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "pp2_vpp2": (2, PP2 + VPP2),
    "tp2_sp": (2, TP2 + SP),
    "tp2_pp2": (4, TP2 + PP2),
    "tp4": (4, ["--tensor-model-parallel-size", "4"]),
}
# name -> (layout, model, what)
CASES = {
    **{f"greedy_{layout}": (layout, "qwen3", "greedy") for layout in LAYOUTS},
    **{f"sampled_{layout}": (layout, "qwen3", "sampled") for layout in LAYOUTS},
    **{
        f"{what}_{layout}": (layout, "qwen3", what)
        for layout in ("one", "tp2", "tp4")
        for what in ("nucleus", "unfiltered")
    },
    "greedy_untied_tp2_pp2": ("tp2_pp2", "untied", "greedy"),
    "greedy_llama_pp2": ("pp2", "llama", "greedy"),
    "greedy_qwen2_tp2": ("tp2", "qwen2", "greedy"),
    "limits_tp2_pp2": ("tp2_pp2", "qwen3", "limits"),
    "greedy_odd_tp2": ("tp2", "odd", "greedy"),
}
DECODED = {"decoding_one": "one", "decoding_pp2_vpp2": "pp2_vpp2", "decoding_tp2_pp2": "tp2_pp2"}


def prompts() -> list[list[int]]:
    generator = random.Random(5)
    return [[generator.randrange(250) for _ in range(n)] for n in (1, 12, 5, 3, 12, 7)]


def stop_id(rows: list[list[int]]) -> int:
    """A token that ends some of the rows early, and at different places."""
    tokens = {t for row in rows for t in row}
    return max(tokens, key=lambda t: sum(t in row[:-1] and row[0] != t for row in rows))


def until(row: list[int], stop: int) -> list[int]:
    return row[: row.index(stop) + 1] if stop in row else row


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("rollouts")
    for name, settings in MODELS.items():
        make_model(str(directory / name), **settings)
    return directory


@pytest.fixture(scope="module")
def greedy(files: Path) -> dict[str, list[list[int]]]:
    """transformers' greedy continuation, one prompt at a time, without a stop token."""
    rows: dict[str, list[list[int]]] = {}
    for name in MODELS:
        model = AutoModelForCausalLM.from_pretrained(files / name).eval()
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
        rows[name] = []
        for prompt in prompts():
            ids = torch.tensor([prompt])
            output = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
            rows[name].append(output[0, len(prompt) :].tolist())
    return rows


@pytest.fixture(scope="module")
def results(files: Path, greedy: dict) -> Path:
    output = files / "out"
    output.mkdir()
    data = str(files / "data.jsonl")
    Path(data).write_text('{"problem": "1+1?", "solution": "2"}')
    for processes in (1, 2, 4):
        cases = [
            decoding_case(name, files, data, greedy["qwen3"])
            for name, layout in DECODED.items()
            if LAYOUTS[layout][0] == processes
        ]
        for name, (layout, model, what) in CASES.items():
            count, flags = LAYOUTS[layout]
            stop = stop_id(greedy[model])
            chosen = SAMPLINGS.get(what, GREEDY)
            sampling = {**chosen, "max_new_tokens": NEW_TOKENS, "stop_ids": [stop], "seed": 3}
            more = ["--pad-attention-heads"] if model == "odd" else []
            real = ["--hf-model", str(files / model), "--data", data, "--dtype", "fp32", *SHORT]
            case = {
                "name": name,
                "kind": "rollouts",
                "argv": [*real, *flags, *more],
                "prompts": prompts(),
                "sampling": {
                    **sampling,
                    "max_new_tokens": NEW_TOKENS,
                    "stop_ids": [stop],
                    "seed": 3,
                },
                "batch_size": 4,
            }
            if what == "limits":
                case["limits"] = LIMITS
            if count == processes:
                cases.append(case)
        launch(processes, cases, output)
    return output


def decoding_case(name: str, files: Path, data: str, greedy: list[list[int]]) -> dict:
    sampling = {**SAMPLED, "max_new_tokens": 0, "stop_ids": [*range(0, 256, 20)], "seed": 3}
    real = ["--hf-model", str(files / "qwen3"), "--data", data, "--dtype", "fp32", *SHORT]
    argv = [*real, *LAYOUTS[DECODED[name]][1]]
    return {
        "name": name, "kind": "decoding", "argv": argv, "sampling": sampling,
        "prompts": [prompts()[i] for i in (0, 2, 3, 5)],
    }  # fmt: skip


def tokens(results: Path, name: str) -> list[list[int]]:
    return json.loads((results / f"{name}.json").read_text())


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case[2] not in SAMPLINGS])
def test_greedy_equals_transformers(name: str, results: Path, greedy: dict) -> None:
    _, model, what = CASES[name]
    stop = stop_id(greedy[model])
    limits = LIMITS if what == "limits" else [NEW_TOKENS] * len(LIMITS)
    expected = [until(row, stop)[:n] for row, n in zip(greedy[model], limits, strict=True)]
    assert len({len(row) for row in expected}) > 1, "some rows should stop early"
    assert tokens(results, name) == expected


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case[2] in SAMPLINGS])
def test_sampling_is_the_same_in_every_layout(name: str, results: Path) -> None:
    rows = tokens(results, name)
    assert rows == tokens(results, f"{CASES[name][2]}_one")
    assert rows != tokens(results, "greedy_one")


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case[2] != "unfiltered"])
def test_export_is_bit_equal(name: str, results: Path, files: Path) -> None:
    original = load_file(files / CASES[name][1] / "model.safetensors")
    exported = load_file(results / name / "model.safetensors")
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[key], original[key]) for key in original)


def test_export_gives_equal_logits_in_transformers(results: Path, files: Path) -> None:
    ids = torch.tensor([prompts()[1]])
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(d).eval()(ids).logits
        for d in (results / "greedy_untied_tp2_pp2", files / "untied")
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", DECODED)
def test_a_prompt_is_read_once_however_often_it_is_sampled(name: str, results: Path) -> None:
    """And every sample is as if it had been alone (asserted on every rank)."""
    found = json.loads((results / f"{name}.json").read_text())
    assert found["read"] == 4
    assert len(found["lengths"]) == 12 and len(set(found["lengths"])) > 3
    assert found["lengths"] == json.loads((results / "decoding_one.json").read_text())["lengths"]


def test_a_recorded_step_gives_the_later_tokens(results: Path) -> None:
    """As CUDA graphs do: recorded anew only where the cache has grown or rows have left."""
    found = json.loads((results / "decoding_one.json").read_text())
    assert found["traces"] >= 2
    assert found["replays"] + 2 * found["traces"] + 3 >= max(found["lengths"])
    assert found["replays"] > max(found["lengths"]) / 2
