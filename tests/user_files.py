"""A user's files, and what a job there may do with them."""

from __future__ import annotations

from pathlib import Path

from megatron_phf.cli.job_paths import check_paths, training_paths
from megatron_phf.config.flags import parse_args
from megatron_phf.config.settings import Config
from megatron_phf.files import replace

# What a job is given unless a case says otherwise; {d} is the test's directory.
GIVEN = {
    "--hf-model": "{d}/model",
    "--data": "{d}/data.jsonl",
    "--output-dir": "{d}/out",
    "--lora-rank": "8",
}
VLLM = {"--rollout-engine": "vllm", "--vllm-url": "http://127.0.0.1:1"}
VLLM |= {"--vllm-weight-sync": "checkpoint"}


def make_user_files(tmp_path: Path) -> Path:
    """The user's files: models, data, an adapter, a link, notes under every name."""
    for name in ("model", "teacher", "adapter", "mine", "mine.old", "mine.partial", "parent/below"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    for name in ("data.jsonl", "eval.jsonl", "replay.jsonl", "student.txt", "key", "spm.model"):
        (tmp_path / name).write_text("mine\n")
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "datalink").symlink_to("data.jsonl")
    (tmp_path / "empty").mkdir()
    return tmp_path


def contents(directory: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(directory)): p.read_bytes() if p.is_file() else None
        for p in directory.rglob("*")
    }


def config_of(directory: Path, **more: str) -> Config:
    flags = GIVEN | {f"--{name.replace('_', '-')}": value for name, value in more.items()}
    return parse_args([w.format(d=directory) for pair in flags.items() for w in pair])


def check(config: Config) -> None:
    check_paths(training_paths(config), config)


def named(values: dict[str, str]) -> dict[str, str]:
    return {name.removeprefix("--").replace("-", "_"): value for name, value in values.items()}


def write(directory: Path, text: str = "weights") -> Path:
    """What an export writes."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_text(text)
    return directory


def write_export(target: Path, text: str = "weights") -> None:
    partial = write(target.parent / "partial", text)
    replace.mark(str(partial))
    replace.replace_directory(str(partial), str(target))
