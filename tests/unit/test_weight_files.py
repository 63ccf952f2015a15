"""Weight files against their headers and config.json: each damage is named with its file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_phf.model.architecture import read_architecture
from megatron_phf.model.weight_files import check_hf_weights
from tests.models import make_model


def check(directory: Path) -> dict:
    return check_hf_weights(str(directory), read_architecture(str(directory)))


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_good_files(tmp_path: Path, architecture: str, tied: bool) -> None:
    make_model(str(tmp_path), architecture, tie_word_embeddings=tied)
    found = check(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {name: tensor.shape for name, tensor in found.items()} == parameters
    assert {tensor.dtype for tensor in found.values()} == {"F32"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards and their index."""
    source, path = (tmp_path_factory.mktemp(name) for name in ("model", "shards"))
    made = AutoModelForCausalLM.from_pretrained(make_model(str(source)))
    made.save_pretrained(path, max_shard_size="400KB")
    assert len(list(path.glob("*.safetensors"))) == 3
    return path


def edit_shard(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """Rewrite the second shard, the index along with it."""

    def damage(directory: Path) -> None:
        path, index = sorted(directory.glob("*.safetensors"))[1], next(directory.glob("*.index*"))
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})
        content = json.loads(index.read_text())
        names = {n: f for n, f in content["weight_map"].items() if f != path.name}
        content["weight_map"] = names | dict.fromkeys(tensors, path.name)
        index.write_text(json.dumps(content))

    return damage


def edit_index(directory: Path) -> None:
    index = next(directory.glob("*.index*"))
    index.write_text(index.read_text().replace('"model.norm.weight"', '"model.other"'))


def edit_config(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(path.read_text().replace('"num_hidden_layers": 4', '"num_hidden_layers": 3'))


def one(tensors: dict) -> str:
    return next(name for name in tensors if name.endswith("mlp.down_proj.weight"))


DAMAGES = {
    "cut": (
        lambda d: (d / SECOND).write_bytes((d / SECOND).read_bytes()[:-4]),
        "00002-of-00003.safetensors: .* bytes, but its header describes .*truncated",
    ),
    "cut header": (
        lambda d: (d / SECOND).write_bytes((d / SECOND).read_bytes()[:100]),
        "00002-of-00003.safetensors: truncated, or not a safetensors file",
    ),
    "empty": (lambda d: (d / SECOND).write_bytes(b""), "00002-of-00003.safetensors: truncated"),
    "missing": (
        lambda d: (d / SECOND).unlink(),
        "model-00002-of-00003.safetensors. is missing; copy",
    ),
    "index": (edit_index, "does not hold model.other"),
    "index json": (
        lambda d: next(d.glob("*.index*")).write_text("{}"),
        "model.safetensors.index.json: its weight_map is empty",
    ),
    "tensor": (
        edit_shard(lambda t: t.pop(one(t))),
        r"no tensor model.layers.\d.mlp.down_proj.weight, which config.json's qwen3 has",
    ),
    "shape": (
        edit_shard(lambda t: t.update({one(t): torch.zeros(3, 5)})),
        r"00002.*down_proj.weight has shape \[3, 5\], but config.json says \[64, 128\]",
    ),
    "quantised": (
        edit_shard(lambda t: t.update({one(t): torch.zeros(64, 128, dtype=torch.int8)})),
        "down_proj.weight is I8, not one of F32, BF16, F16; quantised",
    ),
    "layers": (edit_config, r"holds model.layers.3.*3 layers does not have"),
    "no weights": (
        lambda d: [f.unlink() for f in d.glob("*safetensors*")],
        r"no \*.safetensors in it",
    ),
}
SECOND = "model-00002-of-00003.safetensors"


@pytest.mark.parametrize("damage", DAMAGES)
def test_damages(model: Path, tmp_path: Path, damage: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    change, message = DAMAGES[damage]
    check(broken)
    change(broken)
    with pytest.raises(ValueError, match=message):
        check(broken)
