"""Nothing that a model, data set or checkpoint brings along is executed, or leads elsewhere."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest

from megatron_phf.config.settings import Config
from megatron_phf.data.stop_tokens import stop_token_ids
from megatron_phf.data.tokenizer import HFTokenizer, load_tokenizer
from megatron_phf.demo.task import make_hf_directory, make_tokenizer
from megatron_phf.files.foreign import check_file_name, check_weight_index
from megatron_phf.lora.config import read_adapter_config
from megatron_phf.model.architecture import read_architecture
from megatron_phf.teacher.architecture import check_tokenizers
from megatron_phf.train.checkpoint_files import read_manifest
from tests.launch import REPO

FOLDERS = ("megatron_phf", "tools", "examples")
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
# path, what: each one read, and harmless.
ALLOWED = {
    # --trust-remote-code, off by default
    ("megatron_phf/data/tokenizer.py", "trust_remote_code=trust_remote_code"),
    # a list of the classes that an index may name
    ("megatron_phf/weights/torch_dist.py", "pickle"),
    # reads what it has just written, to see whether an error can go to other ranks
    ("megatron_phf/runtime/together.py", "pickle"),
    # handles of this process's own GPU memory, written for vLLM; nothing is read
    ("megatron_phf/rollout/vllm/ways.py", "pickle"),
}


def _name(node: ast.expr) -> str:
    """The dotted name of a called function; "" for what has none."""
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _is(keyword: ast.keyword | None, value: object) -> bool:
    constant = keyword is not None and isinstance(keyword.value, ast.Constant)
    return constant and keyword.value.value is value


def _in_call(call: ast.Call) -> list[str]:
    name = _name(call.func)
    given = {k.arg: k for k in call.keywords}
    found = [name] if name in BUILTINS or name in ("os.system", "os.popen") else []
    if name in ("torch.load", "torch.serialization.load") and not _is(
        given.get("weights_only"), True
    ):
        found.append("torch.load without weights_only=True")
    if name.endswith(".from_pretrained") and name.startswith("Auto"):
        trust = given.get("trust_remote_code")
        if trust is None:
            found.append(f"{name} without trust_remote_code=False")
        if not _is(given.get("local_files_only"), True):
            found.append(f"{name} without local_files_only=True")
    for key, harmless in (("trust_remote_code", False), ("allow_pickle", False), ("shell", False)):
        if key in given and not _is(given[key], harmless):
            found.append(f"{key}={ast.unparse(given[key].value)}")
    return found


def violations(source: str) -> list[str]:
    """What in a Python source could execute foreign data."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            root = node.module.split(".")[0]
            found += [node.module] if root in MODULES else []
            found += (
                ["torch.load"] if root == "torch" and "load" in [a.name for a in node.names] else []
            )
        elif isinstance(node, ast.Call):
            found += _in_call(node)
        elif isinstance(node, ast.Dict):
            found += [
                f"trust_remote_code={ast.unparse(value)}"
                for key, value in zip(node.keys, node.values, strict=True)
                if isinstance(key, ast.Constant) and key.value == "trust_remote_code"
                if not (isinstance(value, ast.Constant) and value.value is False)
            ]
    return found


def test_no_way_to_execute_foreign_data() -> None:
    files = [f for folder in FOLDERS for f in sorted((REPO / folder).rglob("*.py"))]
    assert len(files) > 40
    found = {(str(f.relative_to(REPO)), what) for f in files for what in violations(f.read_text())}
    assert found == ALLOWED


@pytest.mark.parametrize(
    "source",
    [
        "import torch; torch.load('x')",
        "import torch; torch.load('x', weights_only=False)",
        "from torch import load",
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "exec('1')",
        "import numpy; numpy.load('x', allow_pickle=True)",
        "import os; os.system('x')",
        "import subprocess; subprocess.run('x', shell=True)",
        "AutoTokenizer.from_pretrained('x', local_files_only=True)",
        "AutoTokenizer.from_pretrained('x', trust_remote_code=False)",
        "AutoTokenizer.from_pretrained('x', local_files_only=True, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
    ],
)
def test_the_search_finds(source: str) -> None:
    assert violations(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch; torch.load('x', weights_only=True)",
        "model.eval()",
        "AutoTokenizer.from_pretrained('x', local_files_only=True, trust_remote_code=False)",
    ],
)
def test_the_search_passes(source: str) -> None:
    assert violations(source) == []


# Whoever reads JSON that this program did not write goes through files/foreign.py: these read
# their own files, or what the program's own processes say.
OWN_JSON = {
    "megatron_phf/files/foreign.py",  # the reader
    "megatron_phf/files/replace.py",  # the marker of our exports
    *("megatron_phf/cli/convert.py", "megatron_phf/cli/merge_adapter.py"),  # the tool's job
    *("megatron_phf/cli/cases.py", "megatron_phf/cli/parity.py", "megatron_phf/cli/grid.py"),
    *(f"megatron_phf/cli/accept/{name}.py" for name in ("table", "verdicts")),
    *("megatron_phf/data/problems.py", "megatron_phf/data/rollouts.py"),  # what was read before
    *("megatron_phf/evaluation/generations.py", "megatron_phf/evaluation/grader_process.py"),
    "megatron_phf/reference/method.py",  # shares no code
    "megatron_phf/runtime/heartbeat.py",
    "megatron_phf/simulate/ranks.py",  # of a process forked from this one
    *("megatron_phf/train/evaluation.py", "megatron_phf/train/run_files.py"),
}


def test_one_reader_of_json_from_elsewhere() -> None:
    files = [f for folder in FOLDERS for f in sorted((REPO / folder).rglob("*.py"))]
    found = {
        str(f.relative_to(REPO))
        for f in files
        for node in ast.walk(ast.parse(f.read_text()))
        if isinstance(node, ast.Attribute) and _name(node) in ("json.load", "json.loads")
    }
    assert found == OWN_JSON


TWICE = r"has the key 'num_hidden_layers' twice in one object; remove one"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", '{"num_hidden_layers": 4, "num_hidden_layers": 3}', TWICE),
        ("config.json", '{"a": [{"num_hidden_layers": 4, "num_hidden_layers": 4}]}', TWICE),
        ("config.json", '{"vocab_size": 1' + "0" * 4999 + "}", "has an integer of 5000 digits"),
        ("adapter_config.json", '{"num_hidden_layers": 4, "num_hidden_layers": 3}', TWICE),
        ("generation_config.json", '{"num_hidden_layers": 4, "num_hidden_layers": 3}', TWICE),
        ("model.safetensors.index.json", '{"num_hidden_layers": 1, "num_hidden_layers": 1}', TWICE),
        ("checkpoint.json", '{"num_hidden_layers": 1, "num_hidden_layers": 1}', TWICE),
        ("tokenizer.json", '{"num_hidden_layers": 1, "num_hidden_layers": 1}', TWICE),
    ],
)
def test_json_of_which_readers_read_different_things(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    tokenizer = HFTokenizer(make_tokenizer())
    readers = {
        "config.json": read_architecture,
        "adapter_config.json": read_adapter_config,
        "generation_config.json": lambda path: stop_token_ids(tokenizer, path),
        "model.safetensors.index.json": check_weight_index,
        "checkpoint.json": read_manifest,
        "tokenizer.json": lambda path: check_tokenizers(path + "/student", path, 9, True),
    }
    with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
        readers[name](str(tmp_path))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    make_hf_directory(str(tmp_path / "hf"), seed=1)
    return tmp_path / "hf"


def test_code_of_a_tokenizer_runs_only_when_told(model: Path, monkeypatch) -> None:
    """A tokenizer that is also a Python file: not run, refused by name, run with the flag."""
    proof = model / "code_ran"
    (model / "foreign.py").write_text(
        f"open({str(proof)!r}, 'w').close()\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class Foreign(PreTrainedTokenizerFast): pass\n"
    )
    path = model / "tokenizer_config.json"
    content = json.loads(path.read_text())
    content["tokenizer_class"] = "Foreign"
    content["auto_map"] = {"AutoTokenizer": [None, "foreign.Foreign"]}
    path.write_text(json.dumps(content))
    config = Config().replaced(hf_model=str(model))
    assert type(load_tokenizer(config)._tokenizer).__name__ != "Foreign"  # Qwen3's own will do
    (model / "config.json").unlink()
    with pytest.raises(ValueError, match="--trust-remote-code"):  # and now nothing else will
        load_tokenizer(config)
    assert not proof.exists()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(model / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    trusted = load_tokenizer(config.replaced(trust_remote_code=True))
    assert type(trusted._tokenizer).__name__ == "Foreign"
    assert proof.exists()


def test_a_chat_template_stays_in_its_sandbox(model: Path) -> None:
    """transformers renders templates in jinja's sandbox: Python's own attributes are hidden."""
    tokenizer = load_tokenizer(Config().replaced(hf_model=str(model)))
    tokenizer._tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ValueError, match=r"chat template fails .SecurityError"):
        tokenizer.prompt("1+1", thinking=False)


@pytest.mark.parametrize(
    "name",
    ["../../etc/x.safetensors", "/etc/x", "a/b.safetensors", "..", ".", "", "a\\b", "C:x", "a\0", 3,
     None, ["a"]],
)  # fmt: skip
def test_names_that_lead_out_of_a_directory(model: Path, name: object) -> None:
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(
        ValueError, match=r"index\.json: weight_map\['lm_head.weight'\].*plain name"
    ):
        check_weight_index(str(model))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "not a JSON object but list"),
        ("{}", "weight_map is empty"),
        ('{"weight_map": []}', "'weight_map' is .*, not an object"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "'gone.safetensors' is missing"),
    ],
)
def test_damaged_weight_indexes(model: Path, text: str, message: str) -> None:
    (model / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        check_weight_index(str(model))


def test_plain_names_pass(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model.safetensors"}}'
    )
    check_weight_index(str(model))
    assert (
        check_file_name("model-00001-of-00002.safetensors", "")
        == "model-00001-of-00002.safetensors"
    )
