"""Weights saved in one layout load in every other, bit for bit; nothing else loads."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_phf.weights import torch_dist
from tests.models import make_model, make_replay
from tests.parallel.cases import launch
from tests.parallel.test_parity import PP2, TP2, VPP2

LAYOUTS = {"one": [], "tp2": TP2, "pp2_vpp2": PP2 + VPP2, "tp2_pp2": TP2 + PP2, "dp2": []}
PROCESSES = {"one": 1, "tp2": 2, "pp2_vpp2": 2, "tp2_pp2": 4, "dp2": 2}
# An odd number of groups gets zero heads at TP 2, and the vocabulary of 250 other padding.
MODELS = {
    "tied": {"num_attention_heads": 6, "num_key_value_heads": 3},
    "untied": {"tie_word_embeddings": False},
}
COMMON = ["--dtype", "fp32", "--make-vocab-size-divisible-by", "100", "--pad-attention-heads"]
COMMON += ["--max-prompt-length", "32", "--max-teacher-prompt-length", "32"]
COMMON += ["--rollout-engine", "replay", "--global-batch-size", "4"]
SAVED = ("one", "tp2", "pp2_vpp2")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("sharded")
    for name, settings in MODELS.items():
        make_model(str(directory / name), **settings)
    replay = make_replay(str(directory / "replay.jsonl"), [1, 1, 1, 1], vocab_size=200)
    jobs: dict[tuple[int, bool], list[dict]] = {}
    for model in MODELS:
        for layout, argv in LAYOUTS.items():
            base = {
                "kind": "reshard",
                "argv": [
                    "--hf-model",
                    str(directory / model),
                    "--replay-file",
                    replay,
                    *COMMON,
                    *argv,
                ],
            }
            if layout in SAVED:
                case = {"name": f"{model}-{layout}", "save": str(directory / f"{model}-{layout}.w")}
                jobs.setdefault((PROCESSES[layout], True), []).append({**base, **case})
            for source in SAVED:
                name = f"{model}-{source}-{layout}"
                case = {"name": name, "load": str(directory / f"{model}-{source}.w")}
                jobs.setdefault((PROCESSES[layout], False), []).append({**base, **case})
    launch(1, jobs[1, True], directory)
    launch(2, jobs[2, True] + jobs[2, False], directory)
    launch(1, jobs[1, False], directory)
    launch(4, jobs[4, False], directory)
    return directory


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("source", SAVED)
def test_every_layout_loads_them(files: Path, model: str, source: str) -> None:
    expected = load_file(files / model / "model.safetensors")
    for layout in LAYOUTS:
        found = load_file(files / f"{model}-{source}-{layout}.safetensors")
        found.pop("lm_head.weight", None) if model == "tied" else None
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), (layout, name)


class _Attack:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("attacked",)


def test_no_code_runs(files: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (torch_dist.INDEX, torch_dist.COMMON):
        copy = tmp_path / f"copy{name}"
        shutil.copytree(files / "tied-one.w", copy)
        torch_dist.check_plain(str(copy))
        if name == torch_dist.INDEX:
            (copy / name).write_bytes(pickle.dumps(_Attack()))
        else:
            torch.save({"x": _Attack()}, copy / name)
        with pytest.raises(ValueError, match=f"{name}: damaged"):
            torch_dist.check_plain(str(copy))
    assert not (tmp_path / "attacked").exists()
