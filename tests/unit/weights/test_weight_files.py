"""Weight files against their headers and config.json: each damage is named with its file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_phf.model.architecture import read_architecture
from megatron_phf.weights.headers import check_hf_weights
from tests.models import make_adapter, make_model


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


def other_values(source: Path, target: Path) -> None:
    """The same tensors with other numbers."""
    tensors = {name: tensor + 1 for name, tensor in load_file(source).items()}
    save_file(tensors, target, {"format": "pt"})


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def whole(directory: Path) -> None:
    """Shards and index become one file."""
    tensors = {n: t for p in directory.glob("*.safetensors") for n, t in load_file(p).items()}
    for path in directory.glob("*safetensors*"):
        path.unlink()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def one_file(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        whole(directory)
        change(directory)

    return make


def with_head(factor: float, tied: bool = True) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        tensors["lm_head.weight"] = factor * tensors["model.embed_tokens.weight"]
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        edit_json(directory / "config.json", tie_word_embeddings=tied)

    return one_file(make)


def renamed(name: str) -> Callable[[Path], None]:
    return one_file(lambda d: (d / "model.safetensors").rename(d / name))


def stray(name: str, source: str = "model.safetensors") -> Callable[[Path], None]:
    return one_file(lambda d: other_values(d / source, d / name))


def embedded_adapter(directory: Path) -> None:
    made = make_adapter(str(directory / "x"), str(directory))
    shutil.copy(Path(made, "adapter_config.json"), directory)
    shutil.copy(Path(made, "adapter_model.safetensors"), directory)


def in_a_folder(directory: Path) -> None:
    (directory / "part").mkdir()
    (directory / SECOND).rename(directory / "part" / SECOND)
    index = next(directory.glob("*.index*"))
    index.write_text(index.read_text().replace(SECOND, f"part/{SECOND}"))


def twice(directory: Path) -> None:
    """A tensor of the third shard stands in the first one, too, with other numbers."""
    first, _, third = sorted(directory.glob("*.safetensors"))
    name, tensor = next(iter(load_file(third).items()))
    save_file({**load_file(first), name: tensor + 1}, first, {"format": "pt"})


# What a directory holds -> None where the same tensors as transformers' are to be read, else why
# it is refused.
CHOICES: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "shards": (lambda d: None, None),
    "one file": (whole, None),
    "an older model beside it": (stray("model_old.safetensors"), None),
    "a later name beside it": (stray("zzz.safetensors"), None),
    "a variant beside it": (stray("model.fp16.safetensors"), None),
    "a pickle beside it": (one_file(lambda d: (d / "pytorch_model.bin").write_bytes(b"x")), None),
    "a shard beside shards": (
        lambda d: other_values(d / SECOND, d / "model-00004-of-00004.safetensors"), None,
    ),
    "an index beside one file": (
        lambda d: other_values(d / SECOND, d / "model.safetensors"),
        "model.safetensors and model.safetensors.index.json with other files",
    ),
    "an index of the one file": (
        one_file(
            lambda d: (d / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"model.norm.weight": "model.safetensors"}})
            )
        ),
        None,
    ),
    "another name": (renamed("weights.safetensors"), "but 'weights.safetensors'; rename"),
    "a variant": (renamed("model.fp16.safetensors"), "but 'model.fp16.safetensors'; rename"),
    "pickle": (renamed("pytorch_model.bin"), r"no \*.safetensors in it, only pytorch_model.bin"),
    "shards without index": (
        lambda d: (d / "model.safetensors.index.json").unlink(), "neither model.safetensors nor",
    ),
    "named in config.json": (
        one_file(
            lambda d: (
                other_values(d / "model.safetensors", d / "b.safetensors"),
                edit_json(d / "config.json", transformers_weights="b.safetensors"),
            )
        ),
        "transformers_weights='b.safetensors' is not supported",
    ),
    "a shard in a folder": (in_a_folder, "is not the plain name of a file"),
    "a tensor in two shards": (twice, "is in model-00003-of-00003.safetensors and in model-00001"),
    "an adapter embedded": (embedded_adapter, "adapter_config.json: transformers adds this"),
    "a tied head": (with_head(1.0), None),
    "a tied head of its own": (with_head(0.5), "lm_head.weight is not model.embed_tokens.weight"),
    "an untied head": (with_head(0.5, tied=False), None),
}  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES)
def test_the_files_that_transformers_loads(model: Path, tmp_path: Path, choice: str) -> None:
    directory = tmp_path / "model"
    shutil.copytree(model, directory)
    make, message = CHOICES[choice]
    make(directory)
    if message is not None:
        with pytest.raises(ValueError, match=message):
            check(directory)
        return
    found = check(directory)
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    expected = dict(loaded.named_parameters())
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        with safe_open(tensor.file, "pt") as f:
            assert torch.equal(f.get_tensor(name), expected[name])


@pytest.mark.parametrize("name", ["mlp.down_proj.qweight", "mlp.down_proj.weight_scale_inv"])
def test_quantised_checkpoints(model: Path, tmp_path: Path, name: str) -> None:
    """GPTQ's integers beside no weight, FP8 with its scales: named as what they are."""
    directory = tmp_path / "model"
    shutil.copytree(model, directory)

    def quantise(tensors: dict) -> None:
        whole_name = one(tensors)
        weight = tensors.pop(whole_name)
        added = whole_name.replace("mlp.down_proj.weight", name)
        if name.endswith("qweight"):
            tensors[added] = torch.zeros(8, 8, dtype=torch.int32)
        else:
            tensors |= {whole_name: weight.to(torch.float8_e4m3fn), added: torch.ones(1, 1)}

    edit_shard(quantise)(directory)
    with pytest.raises(ValueError, match="quantised models must be dequantised first"):
        check(directory)


def test_experts_in_one_tensor_are_refused_by_their_name(tmp_path: Path) -> None:
    """As transformers 5 has them in memory, where they would seem to be missing."""
    settings = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
    make_model(str(tmp_path), "qwen3_moe", **settings)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    first = "model.layers.0.mlp.experts"
    pairs = [
        torch.cat([tensors.pop(f"{first}.{i}.{n}_proj.weight") for n in ("gate", "up")])
        for i in range(2)
    ]
    save_file({**tensors, f"{first}.gate_up_proj": torch.stack(pairs)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj holds all experts in one tensor"):
        check(tmp_path)
    check(Path(make_model(str(tmp_path), "qwen3_moe", **settings)))  # what save_pretrained writes
