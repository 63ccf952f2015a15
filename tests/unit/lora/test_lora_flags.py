"""LoRA's flags: what is refused before launch, and the configuration that PEFT reads."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_phf.cli import preflight
from megatron_phf.cli.merge_adapter import merge
from megatron_phf.config.settings import Config
from megatron_phf.lora.config import (
    ALLOWED,
    READ,
    WITHOUT_EFFECT,
    adapter_config,
    num_adapter_parameters,
    read_adapter_config,
)
from megatron_phf.lora.files import merge_adapter, read_adapter
from megatron_phf.model.architecture import read_architecture
from megatron_phf.weights.adapters import check_adapter
from tests.models import make_adapter, make_model

REAL = "--hf-model MODEL --data DATA --max-new-tokens 64 --max-prompt-length 64 "
REAL += "--max-teacher-prompt-length 128 --lora-rank 4 "
MISTAKES = {
    "--lora-rank -1": "--lora-rank -1: need at least 0",
    "--lora-rank 4": "--lora-rank needs --hf-model",
    "--lora-adapter ADAPTER": "--lora-adapter needs --lora-rank",
    "--save-adapter out": "--save-adapter needs --lora-rank",
    REAL + "--lora-alpha 0": "--lora-alpha 0.0: need above 0",
    REAL + "--lora-dropout 1": "--lora-dropout 1.0: need 0 to below 1",
    REAL + "--lora-target-modules q_proj,lm_head": "'lm_head' is not one of q_proj,k_proj",
    REAL + "--lora-target-modules q_proj,": "'' is not one of",
    REAL + "--teacher-offload": "with --lora-rank the teacher shares the student's weights",
    REAL + "--lora-adapter MODEL": "adapter_config.json: cannot be read",
    REAL + "--lora-adapter DAMAGED": "adapter_config.json: is not JSON",
    REAL + "--lora-adapter DORA": "adapter_config.json: use_dora: only plain LoRA",
    REAL + "--lora-adapter ADAPTER": (
        "pass --lora-rank 4 --lora-alpha 6 --lora-target-modules q_proj,up_proj"
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("lora")
    model = make_model(str(directory / "model"))
    adapter = make_adapter(str(directory / "adapter"), model, 4, 6, "q_proj,up_proj")
    config = Path(adapter, "adapter_config.json")
    for name, content in (
        ("damaged", "{"),
        ("dora", json.dumps({**json.loads(config.read_text()), "use_dora": True})),
    ):
        (directory / name).mkdir()
        (directory / name / "adapter_config.json").write_text(content)
    (directory / "data.jsonl").write_text('{"problem": "1+1?", "solution": "2"}\n')
    return {
        "MODEL": model,
        "ADAPTER": adapter,
        "DATA": str(directory / "data.jsonl"),
        "DAMAGED": str(directory / "damaged"),
        "DORA": str(directory / "dora"),
    }


@pytest.mark.parametrize("command", MISTAKES)
def test_mistakes_are_refused_before_launch(command: str, files: dict[str, str], capsys) -> None:
    assert preflight.main([files.get(word, word) for word in command.split()]) == 2
    output = capsys.readouterr()
    assert MISTAKES[command] in output.err
    assert output.err.count("\n") == 1


def test_a_fitting_adapter_is_accepted(files: dict[str, str], capsys) -> None:
    more = "--lora-adapter ADAPTER --lora-alpha 6 --lora-target-modules up_proj,q_proj"
    assert preflight.main([files.get(word, word) for word in (REAL + more).split()]) == 0


def test_adapter_config_of_the_published_recipe() -> None:
    """The fields that vLLM checks, and the paper's numbers."""
    content = adapter_config(Config().replaced(hf_model="/models/base", lora_rank=64))
    assert (content["r"], content["lora_alpha"], content["bias"]) == (64, 128, "none")
    assert content["base_model_name_or_path"] == "/models/base"
    assert content["modules_to_save"] is None
    assert set(content["target_modules"]) == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }


def test_number_of_parameters_equals_pefts(files: dict[str, str]) -> None:
    tensors = load_file(Path(files["ADAPTER"], "adapter_model.safetensors"))
    lora = Config().replaced(lora_rank=4, lora_target_modules="q_proj,up_proj").lora
    found = num_adapter_parameters(read_architecture(files["MODEL"]), lora)
    assert found == sum(t.numel() for t in tensors.values())


def test_merge_rounds_once() -> None:
    """In bf16, adding a product that was rounded first would give another weight."""
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (
        torch.randn(*shape, generator=generator).bfloat16()
        for shape in ((64, 48), (8, 48), (64, 8))
    )
    name = "model.layers.0.mlp.up_proj"
    adapter = {
        f"base_model.model.{name}.lora_A.weight": a,
        f"base_model.model.{name}.lora_B.weight": b,
    }
    other = ("model.norm.weight", torch.ones(48))
    merged = dict(merge_adapter([(f"{name}.weight", weight), other], adapter, 0.37))
    exact = weight.double() + 0.37 * (b.double() @ a.double())
    assert torch.equal(merged["model.norm.weight"], other[1])
    assert (merged[f"{name}.weight"] != exact.bfloat16()).double().mean() < 1e-3
    twice = weight + (0.37 * (b @ a)).bfloat16()
    assert (twice != exact.bfloat16()).double().mean() > 0.1


def test_every_field_of_pefts_is_classified() -> None:
    """A new one must be looked at: does it change what an adapter computes?"""
    known = [*ALLOWED, *READ, *WITHOUT_EFFECT]
    assert len(known) == len(set(known))
    assert {f.name for f in dataclasses.fields(peft.LoraConfig)} == set(known)


# Values that PEFT gives a meaning to.
CHANGES = {
    **dict.fromkeys(ALLOWED, True),
    "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 2}, "layers_to_transform": [0],
    "alora_invocation_tokens": [0], "modules_to_save": ["lm_head"], "exclude_modules": ["lm_head"],
    "target_parameters": ["lm_head"],
    "layers_pattern": "layers", "layer_replication": [[0, 2]], "trainable_token_indices": [1],
    "init_lora_weights": "pissa", "bias": "all", "peft_type": "LOHA",
}  # fmt: skip


@pytest.fixture
def adapter(files: dict[str, str], tmp_path: Path) -> Path:
    shutil.copytree(files["ADAPTER"], tmp_path / "adapter")
    return tmp_path / "adapter"


def change(adapter: Path, **values: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_the_arithmetic_is_refused(adapter: Path, name: str) -> None:
    change(adapter, **{name: CHANGES[name]})
    with pytest.raises(ValueError, match=rf"adapter_config.json: .*({name}|LoRA adapter)"):
        read_adapter_config(str(adapter))


@pytest.mark.parametrize(
    "value", ["pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica", "new", 1, "True"]
)
def test_initialisations_that_change_the_base_are_refused(adapter: Path, value: object) -> None:
    change(adapter, init_lora_weights=value)
    with pytest.raises(ValueError, match="init_lora_weights: only plain LoRA is supported, not"):
        read_adapter_config(str(adapter))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"a_later_variant": 0.5}, "a_later_variant: only plain LoRA"),
        ({"target_modules": [["q_proj"]]}, "target_modules must be a list"),
        ({"r": 0}, "'r' is 0"),
        ({"r": True}, "'r' is True"),
        ({"lora_alpha": None}, "'lora_alpha' is null"),
        ({"use_rslora": 1}, "use_rslora: only plain LoRA"),
    ],
)
def test_other_adapters(adapter: Path, values: dict, message: str) -> None:
    change(adapter, **values)
    with pytest.raises(ValueError, match=message):
        read_adapter_config(str(adapter))


@pytest.mark.parametrize(
    "values",
    [
        *({"init_lora_weights": value} for value in ALLOWED["init_lora_weights"]),
        {"a_later_variant": None, "another": False, "lora_dropout": 0.5, "loftq_config": {}},
    ],
    ids=str,
)
def test_adapters_that_are_read_are_pefts(adapter: Path, files: dict, values: dict) -> None:
    """Weight for weight what peft merges, whatever the adapter was initialised with."""
    change(adapter, **values)
    merged, base = merged_by_peft(files["MODEL"], adapter)
    tensors, scale = read_adapter(str(adapter))
    found = dict(merge_adapter(base.items(), tensors, scale))
    assert found.keys() == merged.keys()
    changed = 0
    for name, weight in merged.items():
        assert torch.allclose(found[name], weight, atol=1e-6)
        changed += not torch.equal(weight, base[name])
    assert changed == 8


def merged_by_peft(model: str, adapter: Path) -> tuple[dict, dict]:
    base = AutoModelForCausalLM.from_pretrained(model)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    return {name: p.detach() for name, p in merged.named_parameters()}, before


def test_pissa_is_not_plain(adapter: Path, files: dict) -> None:
    """Why it is refused: peft changes the base weights where it loads one."""
    plain, _ = merged_by_peft(files["MODEL"], adapter)
    change(adapter, init_lora_weights="pissa")
    other, _ = merged_by_peft(files["MODEL"], adapter)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (plain[name] - other[name]).abs().max() > 0.1


@pytest.mark.parametrize(("dtype", "kind"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_merging_into_a_dtype_rounds_once(
    files: dict, tmp_path: Path, dtype: str, kind: torch.dtype
) -> None:
    """A bf16 base merged to fp32 keeps every digit of the sum."""
    source = tmp_path / "source"
    shutil.copytree(files["MODEL"], source)
    base = {n: t.bfloat16() for n, t in load_file(source / "model.safetensors").items()}
    save_file(base, source / "model.safetensors", {"format": "pt"})
    job = {"source": str(source), "adapter": files["ADAPTER"], "target": str(tmp_path / "merged")}
    merge({**job, "dtype": dtype, "max_shard_bytes": 10**9})
    found = load_file(tmp_path / "merged" / "model.safetensors")
    tensors, scale = read_adapter(files["ADAPTER"])
    assert found.keys() == base.keys()
    for name, weight in base.items():
        adapted = "base_model.model." + name.removesuffix(".weight")
        exact = weight.double()
        if f"{adapted}.lora_A.weight" in tensors:
            a, b = (tensors[f"{adapted}.lora_{x}.weight"].double() for x in "AB")
            exact = exact + scale * (b @ a)
        assert found[name].dtype is kind
        unit = 2.0**-22 if dtype == "fp32" else 2.0**-8  # of the last digit, and of fp32's sum
        assert ((found[name].double() - exact).abs() <= unit * (exact.abs() + 0.1)).all(), name


def rewrite(adapter: Path, change) -> None:
    """Write the adapter's tensors as ``change`` leaves them."""
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, {"format": "pt"})


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
NOT_WHOLE = {
    "a key is missing": (lambda t: t.pop(FIRST), {}, "q_proj.lora_A.weight is not in it"),
    "a target is missing": (
        lambda t: [t.pop(n) for n in list(t) if "up_proj" in n], {}, "up_proj.lora_A.weight is not",
    ),
    "one too many": (lambda t: t.update(x=t[FIRST].clone()), {}, "x is in it"),
    "another rank": (lambda t: None, {"r": 2}, "has shape [4, 64], but r in its"),
    "other targets": (lambda t: None, {"target_modules": ["q_proj"]}, "is in it, against its"),
    "another width": (lambda t: t.update({FIRST: t[FIRST][:, :9]}), {}, "has shape [4, 9]"),
    "no such linear": (lambda t: None, {"target_modules": ["q_proj", "lm_head"]}, "names lm_head"),
    "a bad pattern": (lambda t: None, {"target_modules": "("}, "no regular expression"),
}  # fmt: skip
START = (REAL + "--lora-alpha 6 --lora-target-modules q_proj,up_proj --lora-adapter").split()


@pytest.mark.parametrize("name", NOT_WHOLE)
def test_an_adapter_that_is_not_whole(adapter: Path, files: dict, name: str, capsys) -> None:
    """Refused at its headers, before a weight is read: to merge, and to start from."""
    change_tensors, values, message = NOT_WHOLE[name]
    rewrite(adapter, change_tensors)
    change(adapter, **values)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_adapter(str(adapter), read_architecture(files["MODEL"]))
    assert preflight.main([*(files.get(word, word) for word in START), str(adapter)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "targets",
    [
        r"model\.layers\.\d+\.(self_attn\.q_proj|mlp\.up_proj)",
        [f"model.layers.{i}.{n}" for i in range(4) for n in ("self_attn.q_proj", "mlp.up_proj")],
        ["self_attn.q_proj", "up_proj"],
    ],
)
def test_targets_as_peft_saves_them(adapter: Path, files: dict, targets: object) -> None:
    change(adapter, target_modules=targets)
    _, modules = check_adapter(str(adapter), read_architecture(files["MODEL"]))
    assert len(modules) == 8
    merged, base = merged_by_peft(files["MODEL"], adapter)
    tensors, scale = read_adapter(str(adapter))
    for name, ours in merge_adapter(base.items(), tensors, scale):
        assert torch.allclose(ours, merged[name], atol=1e-6), name


def test_all_linears(files: dict, tmp_path: Path) -> None:
    adapter = make_adapter(str(tmp_path / "all"), files["MODEL"])
    change(Path(adapter), target_modules="all-linear")
    assert len(check_adapter(adapter, read_architecture(files["MODEL"]))[1]) == 4 * 7


def test_adapters_on_some_layers_are_merged_and_not_trained(
    adapter: Path, files: dict, capsys
) -> None:
    rewrite(adapter, lambda t: [t.pop(n) for n in list(t) if ".layers.0." not in n])
    change(adapter, target_modules=r"model\.layers\.0\..*(q_proj|up_proj)")
    assert len(check_adapter(str(adapter), read_architecture(files["MODEL"]))[1]) == 2
    assert preflight.main([*(files.get(word, word) for word in START), str(adapter)]) == 2
    assert "adapts q_proj in 1 of 4 layers" in capsys.readouterr().err
