"""The dry run's command line: which ranks, which lengths, what is refused before anything runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_phf.cli import dry_run
from megatron_phf.config.settings import Config
from tests.simulate.cases import MODEL


@pytest.mark.parametrize(
    ("text", "ranks"),
    [
        ("first,middle,last", [0, 4, 7]),
        ("7,0,7", [0, 7]),
        ("stages", [0, 4]),
        ("stages,1", [0, 1, 4]),
        ("all", list(range(8))),
    ],
)
def test_ranks(text: str, ranks: list[int]) -> None:
    config = Config().replaced(pipeline_model_parallel_size=2)
    assert dry_run.chosen_ranks(text, 8, config) == ranks


@pytest.mark.parametrize("text", ["8", "-1", "second", "", "1.5"])
def test_no_such_rank(text: str) -> None:
    with pytest.raises(ValueError, match=r"--ranks .*need a number from 0 to 7, or first, middle"):
        dry_run.chosen_ranks(text, 8, Config())


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MODEL))
    return str(path)


def job(config_file: str, flags: str, world: int = 2, lengths: str | None = None):
    with dry_run.model_directory(config_file) as model:
        return dry_run.read_job([*flags.split(), *model], world, lengths)


def test_lengths_are_the_jobs(config_file: str) -> None:
    """Given or not; files that a job would read, resume or write are left aside."""
    flags = "--max-prompt-length 32 --max-teacher-prompt-length 48 --max-new-tokens 64"
    flags += " --rollout-engine replay --replay-file nowhere --save nowhere --save-interval 1"
    found = []
    for lengths in (None, "8,16", "8,12,16"):
        config = job(config_file, flags, lengths=lengths).config
        data = config.data
        found.append(
            (data.max_prompt_length, data.max_teacher_prompt_length, config.rollout.max_new_tokens)
        )
        assert config.checkpoint.save is None and config.rollout.replay_file is None
    assert found == [(32, 48, 64), (8, 48, 16), (8, 12, 16)]


@pytest.mark.parametrize(
    "flags",
    [
        "replay --replay-file nowhere --importance-ratio-cap 2",
        "vllm --vllm-url http://nowhere:1 --vllm-sync-dir here --lora-rank 8",
        "vllm --vllm-url http://nowhere:1 --vllm-api-key-file nowhere --max-off-policy-steps 1 "
        "--vllm-sync-dir here --lora-rank 8",
    ],
)
def test_any_engine_is_played_without_its_servers_and_files(flags: str, config_file: str) -> None:
    played = job(config_file, f"--rollout-engine {flags}").config
    assert played.rollout.replay_file is None and played.vllm.vllm_api_key_file is None


@pytest.mark.parametrize(
    ("flags", "world", "lengths", "text"),
    [
        ("", 0, None, "--world 0: need at least 1"),
        ("", 2, "8", "--lengths 8: need PROMPT,RESPONSE in tokens"),
        ("", 2, "8,x", "--lengths 8,x: need"),
        ("--tensor-model-parallel-size 3", 3, None, "does not divide the model's 16 attention"),
        ("--pipeline-model-parallel-size 4", 2, None, "2 process(es) do not divide into models"),
        ("--expert-model-parallel-size 2", 2, None, "is for models with experts"),
        ("--lr x", 2, None, "argument --lr: invalid float value"),
    ],
)
def test_what_the_job_would_refuse(
    flags: str, world: int, lengths: str | None, text: str, config_file: str
) -> None:
    with pytest.raises(ValueError) as caught:
        job(config_file, flags, world, lengths)
    assert text in str(caught.value)


def test_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs --hf-config, or --hf-model in the job's flags"):
        dry_run.read_job([], 2, None)
    missing = tmp_path / "config.json"
    with (
        pytest.raises(ValueError, match=r"--hf-config .*config.json: No such file"),
        dry_run.model_directory(str(missing)),
    ):
        pass
