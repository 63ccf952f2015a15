"""Models with experts: what their config.json may say, which layouts fit, how large they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_phf.cli import preflight
from megatron_phf.config.flags import parse_args
from megatron_phf.model.architecture import Experts, read_architecture
from megatron_phf.teacher.architecture import read_models
from tests.models import make_model, make_replay

SETTINGS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("experts")
    more = {"norm_topk_prob": True, "router_aux_loss_coef": 0.01}
    make_model(str(directory / "moe"), "qwen3_moe", **SETTINGS, **more)
    make_model(str(directory / "dense"))
    make_replay(str(directory / "replay.jsonl"), [3] * 4)
    return directory


def rewritten(files: Path, tmp_path: Path, **changes: object) -> str:
    content = json.loads((files / "moe" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, **changes}))
    return str(tmp_path)


def test_architecture_and_size(files: Path) -> None:
    arch = read_architecture(str(files / "moe"))
    assert arch.experts == Experts(6, 2, 48, normalize_weights=True, aux_loss_coeff=0.01)
    weights = load_file(files / "moe" / "model.safetensors")
    assert arch.num_parameters() == sum(w.numel() for w in weights.values())
    experts = [w.numel() for name, w in weights.items() if ".experts." in name]
    assert arch.num_expert_parameters() == sum(experts)


def test_the_hubs_name_of_the_number_of_experts(files: Path, tmp_path: Path) -> None:
    directory = rewritten(files, tmp_path, num_experts=6)
    path = Path(directory) / "config.json"
    content = json.loads(path.read_text())
    del content["num_local_experts"]
    path.write_text(json.dumps(content))
    assert read_architecture(directory) == read_architecture(str(files / "moe"))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok=1"),
    ],
)
def test_refused_models(changes: dict, text: str, files: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=text):
        read_architecture(rewritten(files, tmp_path, **changes))


TP2 = ["--tensor-model-parallel-size", "2"]
EP, ETP = "--expert-model-parallel-size", "--expert-tensor-parallel-size"


@pytest.mark.parametrize(
    ("model", "layout", "processes", "text"),
    [
        ("moe", [EP, "4"], 4, f"{EP} 4 does not divide the model's 6 experts"),
        ("moe", [EP, "2"], 1, f"{EP} 2 does not divide the 1 data-parallel rank"),
        ("moe", [EP, "2", *TP2, "--sequence-parallel"], 2, "start a multiple of 4"),
        ("moe", [EP, "0"], 1, f"{EP} 0: need at least 1"),
        ("moe", TP2, 2, "needs --sequence-parallel"),
        ("moe", ["--tensor-model-parallel-size", "32"], 32, "32 does not divide"),
        ("moe", ["--moe-aux-loss-coeff", "-1"], 1, "--moe-aux-loss-coeff -1.0: need at least 0"),
        ("moe", [ETP, "2"], 2, f"{ETP} 2 does not divide --tensor-model-parallel-size 1"),
        ("moe", [ETP, "1", *TP2, "--sequence-parallel"], 2, f"{ETP} 1 below .* needs {EP} above 1"),
        ("moe", [ETP, "1", EP, "2", *TP2, "--sequence-parallel"], 3, "do not divide into models"),
        ("moe", [ETP, "0"], 1, f"{ETP} 0: need at least 1"),
        ("dense", [ETP, "1"], 1, f"{ETP} is for models with experts"),
        ("dense", [EP, "2"], 2, f"{EP} is for models with experts"),
        ("dense", ["--moe-aux-loss-coeff", "0.1"], 1, "is for a model with experts"),
    ],
)
def test_refused_layouts(
    model: str, layout: list[str], processes: int, text: str, files: Path
) -> None:
    replay = ["--rollout-engine", "replay", "--replay-file", str(files / "replay.jsonl")]
    short = ["--max-prompt-length", "32", "--max-teacher-prompt-length", "32"]
    config = parse_args(["--hf-model", str(files / model), *replay, *short, *layout])
    with pytest.raises(ValueError, match=text):
        preflight.check(config)
        preflight.check_world_size(config, processes)


@pytest.mark.parametrize(("model", "teacher"), [("moe", "dense"), ("dense", "moe")])
def test_experts_in_one_of_two_models(model: str, teacher: str, files: Path) -> None:
    """They are not shared out: a model without them has no such ranks."""
    argv = ["--rollout-engine", "replay", "--replay-file", str(files / "replay.jsonl")]
    argv += ["--hf-model", str(files / model), "--teacher-hf-model", str(files / teacher), EP, "2"]
    config = parse_args(argv)
    models = read_models(config)
    with pytest.raises(ValueError, match=f"{EP} above 1 needs experts in student and teacher"):
        preflight.check_expert_flags(models, config)
    preflight.check_expert_flags(models, config.replaced(expert_model_parallel_size=1))


def test_whole_experts_go_over_the_ranks_of_tensor_parallelism_too(files: Path) -> None:
    """Of 2 processes under TP 2 each has half of the experts, whole; cut in two, EP needs 4."""
    layout = [EP, "2", *TP2, "--sequence-parallel"]
    whole = parse_args(["--hf-model", str(files / "moe"), *layout, ETP, "1"])
    preflight.check_world_size(whole, 2)
    with pytest.raises(ValueError, match="start a multiple of 4"):
        preflight.check_world_size(whole.replaced(expert_tensor_parallel_size=None), 2)


def test_the_embedded_model_has_no_experts() -> None:
    with pytest.raises(ValueError, match=f"{EP} is for models with experts"):
        preflight.check(parse_args([EP, "2"]))
