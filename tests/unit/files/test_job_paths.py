"""What a job must not write over is refused before it starts; no import of torch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_phf.cli.job_paths import check_paths, evaluation_paths
from megatron_phf.config.flags import parse_args
from megatron_phf.data.problems import keep_lines
from megatron_phf.files import replace
from tests.user_files import (
    VLLM,
    check,
    config_of,
    contents,
    make_user_files,
    named,
    write,
    write_export,
)

# flags -> the two flags (or the reason) that the one error names
LOST = [
    ({"save_hf": "{d}/model"}, ("--save-hf", "--hf-model")),
    ({"save_hf": "{d}/link"}, ("--save-hf", "--hf-model")),
    ({"save_hf": "{d}/model/"}, ("--save-hf", "--hf-model")),
    ({"save_hf": "{d}/model/exported"}, ("--save-hf", "--hf-model")),
    ({"save_hf": "{d}"}, ("--save-hf", "contains --data")),
    ({"save_hf": "{d}/out"}, ("--save-hf", "--output-dir")),
    ({"save_hf": "{d}/runs", "save": "{d}/runs/ckpt"}, ("--save-hf", "--save")),
    ({"save_hf": "{d}/runs", "load": "{d}/runs/ckpt"}, ("--save-hf", "--load")),
    ({"save_hf": "{d}/x", "save_adapter": "{d}/x"}, ("--save-hf", "--save-adapter")),
    ({"save_hf": "{d}/x/y", "save_adapter": "{d}/x"}, ("--save-adapter", "--save-hf")),
    ({"save_adapter": "{d}/adapter", "lora_adapter": "{d}/adapter"},
     ("--save-adapter", "--lora-adapter")),
    ({"save_adapter": "{d}/teacher", "teacher_hf_model": "{d}/teacher"},
     ("--save-adapter", "--teacher-hf-model")),
    ({"save_hf": "{d}/mine", "tokenizer_model": "{d}/mine"}, ("--save-hf", "--tokenizer-model")),
    ({"save_hf": "{d}/spm.model", "tokenizer_model": "{d}/spm.model",
      "tokenizer_type": "SentencePieceTokenizer"}, ("--save-hf", "--tokenizer-model")),
    ({"save": "{d}/model"}, ("--save", "--hf-model")),
    ({"output_dir": "{d}/model"}, ("--output-dir", "--hf-model")),
    ({"metrics_file": "{d}/data.jsonl"}, ("--metrics-file", "--data")),
    ({"metrics_file": "{d}/datalink"}, ("--metrics-file", "--data")),
    ({"metrics_file": "{d}/eval.jsonl", "eval_data": "{d}/eval.jsonl"},
     ("--metrics-file", "--eval-data")),
    ({"metrics_file": "{d}/model/config.json"}, ("--metrics-file", "--hf-model")),
    ({"record_rollouts": "{d}/replay.jsonl", "replay_file": "{d}/replay.jsonl"},
     ("--record-rollouts", "--replay-file")),
    ({"record_rollouts": "{d}/student.txt", "student_template": "{d}/student.txt"},
     ("--record-rollouts", "--student-template")),
    ({"record_rollouts": "{d}/key", "vllm_api_key_file": "{d}/key"},
     ("--record-rollouts", "--vllm-api-key-file")),
    ({"record_rollouts": "{d}/x", "metrics_file": "{d}/x"},
     ("--record-rollouts", "--metrics-file")),
    ({"record_rollouts": "{d}/out/metrics.jsonl"}, ("--record-rollouts", "its metrics.jsonl")),
    ({"replay_file": "{d}/out/metrics.jsonl"}, ("--replay-file", "its metrics.jsonl")),
    ({"metrics_file": "{d}/out/run.json"}, ("--metrics-file", "its run.json")),
    ({"save_hf": "{d}/out/tensorboard"}, ("--save-hf", "its tensorboard")),
    ({**VLLM, "vllm_sync_dir": "{d}/model"}, ("--vllm-sync-dir", "--hf-model")),
    ({**VLLM, "vllm_sync_dir": "{d}/parent"}, ("--vllm-sync-dir", "nor is it a copy of --hf-m")),
    ({"save_hf": "{d}/mine"}, ("--save-hf", "is not empty, and no export of this program")),
    ({"save_adapter": "{d}/parent"}, ("--save-adapter", "move it away, or name another")),
    ({"save_hf": "{d}/eval.jsonl/hf"}, ("--save-hf", "eval.jsonl is a file")),
    ({"save": "{d}/eval.jsonl/ckpt"}, ("--save", "eval.jsonl is a file")),
    ({"output_dir": "{d}/eval.jsonl"}, ("--output-dir", "eval.jsonl is a file")),
    ({"metrics_file": "{d}/eval.jsonl/x/y.jsonl"}, ("--metrics-file", "eval.jsonl is a file")),
    ({"record_rollouts": "{d}/mine"}, ("--record-rollouts", "is there, and no file")),
    ({"save_adapter": "/proc/nothing/adapter"}, ("--save-adapter", "cannot be written")),
    ({"save_hf": ""}, ("--save-hf ''", "no path")),
    ({"metrics_file": "a\0b"}, ("--metrics-file", "no path")),
    ({"record_rollouts": "{d}/\ud800"}, ("--record-rollouts", "no path")),
    ({"save_hf": "{d}/" + "x" * 250}, ("--save-hf", "too long")),
    ({"metrics_file": "/dev/null"}, ("--metrics-file", "is there, and no file")),
]  # fmt: skip


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """The user's files."""
    return make_user_files(tmp_path)


@pytest.mark.parametrize(("more", "said"), LOST, ids=lambda x: " ".join(x) if x else "")
def test_what_would_be_lost_is_refused(there: Path, more: dict, said: tuple[str, str]) -> None:
    before = contents(there)
    with pytest.raises(ValueError) as error:
        check(config_of(there, **named(more)))
    assert all(text in str(error.value) for text in said), error.value
    assert contents(there) == before


@pytest.mark.parametrize(
    "more",
    [
        {"save": "{d}/out"},
        {"save": "{d}/out/ckpt", "load": "{d}/out/ckpt", "save_hf": "{d}/out/hf"},
        {"load": "{d}/out", "save": "{d}/out", "save_adapter": "{d}/out/adapter"},
        {"data": "{d}/out/problems.jsonl", "hf_model": "{d}/out/model"},
        {"save_hf": "{d}/empty", "save_adapter": "{d}/new/below/it"},
        {"hf_model": "{d}/model", "teacher_hf_model": "{d}/model", "tokenizer_model": "{d}/link"},
        {**VLLM, "save_hf": "{d}/mine.new"},
        {"replay_file": "{d}/out/nonfinite_step_3.jsonl", "metrics_file": "{d}/deep/er/m.jsonl"},
    ],
)
def test_what_belongs_together_is_not(there: Path, more: dict) -> None:
    before = contents(there)
    check(config_of(there, **named(more)))
    assert contents(there) == before


def test_a_mounted_target_is_refused(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: path == str(there / "empty"))
    with pytest.raises(ValueError, match=r"--save-hf .*empty: .*file system is mounted"):
        check(config_of(there, save_hf="{d}/empty"))


@pytest.mark.parametrize("name", ["initial_model", "base_model"])
def test_the_embedded_task_replaces_its_own_models(there: Path, name: str) -> None:
    config = parse_args(["--output-dir", str(there / "parent")])
    check(config)
    (there / "mine").rename(there / "parent" / name)
    with pytest.raises(ValueError, match=rf"--output-dir \(its {name}\) .*is not empty, and no"):
        check(config)


def test_an_evaluation_writes_its_output_alone(there: Path) -> None:
    """Flags of training have no effect there; --output-dir has."""
    config = config_of(there, save_hf="{d}/mine")
    check_paths(evaluation_paths(config), config)
    config = config_of(there, output_dir="{d}/model")
    with pytest.raises(ValueError, match=r"--output-dir .*--hf-model"):
        check_paths(evaluation_paths(config), config)


def test_an_earlier_export_is_replaced_and_nothing_else(there: Path) -> None:
    target = there / "hf"
    write_export(target, "first")
    before = contents(there)
    check(config_of(there, save_hf="{d}/hf"))
    write_export(target, "second")
    assert (target / "model.safetensors").read_text() == "second"
    changed = {n for n, c in contents(there).items() if before.get(n, c) != c}
    assert changed == {"hf/model.safetensors", "hf/megatron_phf_export.json"}
    assert contents(there).keys() == before.keys()  # mine.old and mine.partial too


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: (d / "notes.txt").write_text("x"), "has notes.txt in it, which was not"),
        (lambda d: (d / "config.json").write_text("[]"), "has another config.json in it"),
        (lambda d: (d / "megatron_phf_export.json").unlink(), "no export of this program"),
        (lambda d: (d / "megatron_phf_export.json").write_text("{}"), "is damaged"),
        (lambda d: write(d / "sub"), "has sub/config.json in it"),
    ],
)
def test_an_export_that_was_changed_is_the_users(there: Path, change, said: str) -> None:
    write_export(there / "hf")
    change(there / "hf")
    before = contents(there)
    with pytest.raises(ValueError) as error:
        check(config_of(there, save_hf="{d}/hf"))
    assert said in str(error.value) and "--save-hf" in str(error.value)
    replace.mark(str(write(there / "partial")))
    with pytest.raises(OSError, match=r"^it "):  # and so it is at the end of the run
        replace.replace_directory(str(there / "partial"), str(there / "hf"))
    assert {n: c for n, c in contents(there).items() if not n.startswith("partial")} == before


def test_a_link_to_the_target_stays_one(there: Path) -> None:
    (there / "disk").mkdir()
    (there / "hf").symlink_to("disk/exported")
    for text in ("first", "second"):
        write_export(there / "hf", text)
    assert (there / "hf").is_symlink()
    assert (there / "disk/exported/model.safetensors").read_text() == "second"
    (there / "metrics").symlink_to("disk/m.jsonl")
    keep_lines(str(there / "metrics"), lambda number, line: True)
    assert (there / "metrics").is_symlink() and (there / "disk/m.jsonl").read_text() == ""


def test_a_copy_of_the_model_is_what_servers_may_serve(there: Path) -> None:
    served = there / "served"
    served.mkdir()
    (served / "config.json").write_text("{}")
    config = config_of(there, **named(VLLM), vllm_sync_dir="{d}/served")
    check(config)
    (served / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"--vllm-sync-dir .*nor is it a copy of --hf-model"):
        check(config)


@pytest.mark.parametrize("name", ["iter_0000010", "release"])
def test_checkpoints_of_another_run_are_not_written_over(there: Path, name: str) -> None:
    (there / "ckpt" / name).mkdir(parents=True)
    for more in ({}, {"load": "{d}/other"}):
        with pytest.raises(ValueError, match=r"--save .*ckpt: has checkpoints.*--load .*ckpt"):
            check(config_of(there, save="{d}/ckpt", **more))
    check(config_of(there, save="{d}/ckpt", load="{d}/ckpt"))
