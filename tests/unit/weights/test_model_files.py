"""What an export carries beside the weights: the tokenizer whole, and nothing that misleads."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from megatron_phf.cli.check_export import main, tokenizer_difference
from megatron_phf.cli.conversion_steps import _merged_in_bf16
from megatron_phf.config.settings import TokenizerConfig
from megatron_phf.demo.task import make_hf_directory
from megatron_phf.weights.hf_directory import copy_model_files
from megatron_phf.weights.model_files import other_files, tokenizer_files

CODE = (
    "from transformers import PreTrainedTokenizerFast\n"
    "from .naming import NAME\n"
    "class Own(PreTrainedTokenizerFast):\n"
    "    def own_name(self):\n"
    "        return NAME\n"
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    make_hf_directory(str(path), seed=1)
    return path


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def export(source: Path, target: Path, tokenizer: TokenizerConfig | None = None) -> set[str]:
    """Copy; the names of what came."""
    target.mkdir()
    copy_model_files(str(source), str(target), torch.bfloat16, tokenizer or TokenizerConfig())
    return {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()}


def test_all_vocabulary_files_of_transformers(tmp_path: Path) -> None:
    """Each file name that a tokenizer of transformers reads counts as one of the tokenizer's."""
    names = set()
    for path in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py"):
        for table in re.findall(r"VOCAB_FILES_NAMES\s*=\s*\{(.*?)\}", path.read_text(), re.S):
            names |= set(re.findall(r':\s*"([^"]+)"', table))
    assert len(names) > 20
    names |= {"qwen.tiktoken", "tokenizer.model.v3", "tekken.json", "chat_template.jinja"}
    for name in names:
        (tmp_path / name).write_text("{}")
    assert set(tokenizer_files(str(tmp_path))) == names
    assert other_files(str(tmp_path)) == []


def test_a_tokenizer_with_code_templates_and_tiktoken(source: Path, tmp_path: Path) -> None:
    (source / "tokenization_own.py").write_text(CODE)
    (source / "naming.py").write_text("NAME = 'mine'\n")
    for name in ("train.py", "modeling_other.py"):
        (source / name).write_text("raise SystemExit\n")
    edit(
        source / "tokenizer_config.json",
        tokenizer_class="Own",
        auto_map={"AutoTokenizer": ["tokenization_own.Own", None]},
    )
    edit(source / "config.json", auto_map={"AutoConfig": "owner/name--configuration_far.Config"})
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (source / "qwen.tiktoken").write_bytes(b"YQ== 0\n")
    target = tmp_path / "export"
    names = export(source, target)
    assert {
        *("tokenization_own.py", "naming.py", "qwen.tiktoken", "tokenizer.json", "config.json"),
        "additional_chat_templates/tool_use.jinja",
    } <= names
    assert not names & {"train.py", "modeling_other.py", "model.safetensors"}
    tokenizer = AutoTokenizer.from_pretrained(target, trust_remote_code=True)
    assert tokenizer.own_name() == "mine"
    assert tokenizer.chat_template["tool_use"] == "tools"
    assert tokenizer_difference(str(source), str(target)) is None


def test_a_tokenizer_of_another_directory(source: Path, tmp_path: Path) -> None:
    """Its files and none of the model's own; the model's configuration and none of its."""
    other = tmp_path / "other"
    shutil.copytree(source, other)
    (other / "generation_config.json").write_text('{"eos_token_id": 5}')
    (other / "additional_chat_templates").mkdir()
    (other / "additional_chat_templates" / "rag.jinja").write_text("rag")
    (source / "vocab.bpe").write_text("its own")
    (source / "generation_config.json").write_text('{"eos_token_id": 7}')
    edit(source / "tokenizer_config.json", model_max_length=3)
    names = export(source, tmp_path / "export", TokenizerConfig(tokenizer_model=str(other)))
    assert "additional_chat_templates/rag.jinja" in names
    assert "vocab.bpe" not in names
    for name, owner in (("generation_config.json", source), ("tokenizer_config.json", other)):
        assert (tmp_path / "export" / name).read_text() == (owner / name).read_text()


def test_a_leftover_quantisation_stays_behind(source: Path, tmp_path: Path) -> None:
    """transformers would take the weights of the export for quantised ones."""
    edit(source / "config.json", quantization_config={"quant_method": "fp8"})
    export(source, tmp_path / "export")
    content = json.loads((tmp_path / "export" / "config.json").read_text())
    expected = json.loads((source / "config.json").read_text())
    del expected["quantization_config"]
    assert content == {**expected, "dtype": "bfloat16"}


DAMAGES = {
    "chat template": lambda d: (d / "chat_template.jinja").write_text("another"),
    "does not load": lambda d: (d / "tokenizer.json").unlink(),
    "vocabulary, ids of a text": lambda d: (d / "tokenizer.json").write_text(
        (d / "tokenizer.json").read_text().replace('"+":', '"plus":')
    ),
    "special tokens": lambda d: edit(d / "tokenizer_config.json", eos_token="<|pad|>"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_verification_compares_the_tokenizers(
    source: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture
) -> None:
    target = tmp_path / "export"
    export(source, target)
    command = [str(target), "none", "--tokenizers", str(source), str(target)]
    assert main(command) == 2  # the tokenizers are equal, and there is no probe
    assert "no export probe" in capsys.readouterr().err
    DAMAGES[damage](target)
    assert main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"DIFFERENT: the tokenizer of {target} ")
    assert damage.split(",")[0] in error


@pytest.mark.parametrize(
    ("action", "lora", "dtype", "rounded"),
    [
        ("merge-adapter", None, "bfloat16", True),
        ("merge-adapter", None, "float32", False),
        ("megatron-to-hf", {"lora_rank": 4}, "bfloat16", True),
        ("megatron-to-hf", {"lora_rank": 4}, "float32", False),
        ("megatron-to-hf", None, "bfloat16", False),
        ("adapter-to-peft", {"lora_rank": 4}, "bfloat16", False),
    ],
)
def test_where_verification_allows_for_merged_weights(
    tmp_path: Path, action: str, lora: dict | None, dtype: str, rounded: bool
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"dtype": dtype}))
    assert _merged_in_bf16({"action": action, "lora": lora, "target": str(tmp_path)}) == rounded
