"""What the acceptance would run: every case passes its own checks, and the lists hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_phf.cli import acceptance, gpu_flags, preflight
from megatron_phf.cli.accept.model import settings_of, write_tiny
from megatron_phf.cli.accept.plan import LAYOUTS, MINUTES, PARTS, Plan
from megatron_phf.config.flags import parse_args
from megatron_phf.demo.task import make_tokenizer
from megatron_phf.reference.tiny import make_replay

ENGINE = "Transformer Engine"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small files that the acceptance makes, and the large models without their weights."""
    top = tmp_path_factory.mktemp("acceptance")
    write_tiny(str(top / "tiny"))
    make_replay(str(top / "rollouts.jsonl"), [9] * 160, vocab_size=32)
    for name, size in (("large", "1.7B"), ("eight", "8B")):
        config = {"model_type": "qwen3", **settings_of(size), "rope_theta": 1e6}
        (top / name).mkdir()
        (top / name / "config.json").write_text(json.dumps(config))
        make_tokenizer().save_pretrained(top / name)
    return top


def plan(top: Path, processes: int = 1, **changed) -> Plan:
    arguments = acceptance.argparse.Namespace(model=None, data=None)
    tiny = str(top / "tiny")
    values = {"engine": None, "vllm": None, "disk": None, "cuda": True, **changed}
    return Plan(
        directory=str(top), tiny=tiny, large=str(top / "large"), traces=str(top / "traces"),
        processes=processes, job=acceptance._job(arguments, tiny), **values,
    )  # fmt: skip


@pytest.mark.parametrize("processes", LAYOUTS)
@pytest.mark.parametrize("cuda", [True, False])
def test_every_case_passes_its_own_checks(
    processes: int, cuda: bool, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But those of the large models' weights, which are not there."""
    monkeypatch.setattr(gpu_flags, "why_missing", lambda name: None)  # Transformer Engine is there
    monkeypatch.setattr(preflight, "_check_weights", lambda models, config: None)
    monkeypatch.setattr(preflight, "visible_gpus", lambda: processes)
    names = set()
    lacks = {} if cuda else dict.fromkeys(("engine", "vllm", "disk"), "CUDA")
    for case in plan(directory, processes, cuda=cuda, **lacks).cases():
        assert case.part in PARTS and case.name not in names
        names.add(case.name)
        if case.kind == "write" or case.missing:
            continue
        config = parse_args(case.argv)
        preflight.check(config)
        preflight.check_world_size(config, case.processes)
        assert case.processes in (1, processes)
        assert config.train.global_batch_size >= 1
        if case.kind == "decode":
            assert config.parallel.pipeline_model_parallel_size == 1


def test_the_hour_and_the_ten_minutes(directory: Path) -> None:
    """The parts in their order; what a card's list may take leaves room for three starts."""

    def parts(processes: int) -> list[str]:
        return list(dict.fromkeys(case.part for case in plan(directory, processes).cases()))

    card = ["write", "parity", "graphs", "decode", "step", "head", "synchronisations", "engine"]
    assert parts(1) == [*card, "end"]
    assert parts(8) == ["machine", *card, "layouts", "recipe", "vllm", "engines", "end"]
    assert sum(PARTS[part] for part in card[:-1]) + 3 * 20 <= 60 * MINUTES[1]
    for case in plan(directory, 8).cases():
        most = {"recipe": 240.0, "engines": 240.0, "vllm": 110.0}.get(case.part, 60)
        assert case.seconds <= most


def test_speed_is_judged_at_the_recipes_shape(directory: Path) -> None:
    """Rows of 6,144 tokens that rollouts fill without padding, adapters, and no stages."""
    cases = {case.name: case for case in plan(directory).cases()}
    config, lengths = parse_args(cases["step"].argv), cases["step"].settings
    assert config.lora.lora_rank == 64 and config.batching.max_tokens_per_microbatch == 6144
    assert 4 * (lengths["prompt"] + lengths["response"]) == 6144
    assert 2 * (lengths["teacher_prompt"] + lengths["response"]) == 6144
    assert {
        name: case.settings["rows"] for name, case in cases.items() if case.kind == "decode"
    } == {f"decode{suffix}_{rows}": rows for suffix in ("", "_lora") for rows in (4, 8, 64)}


def test_without_transformer_engine_all_else_is_local(directory: Path) -> None:
    """Its rows are skipped, not failed; no other case asks for it."""
    cases = plan(directory, 8, engine=ENGINE).cases()
    skipped = {case.name for case in cases if case.missing == ENGINE}
    assert skipped == {
        "parity_te", "parity_fp8", "step_te", "step_fp8", "parity_te_8", "parity_userbuffers",
        "recipe_te", "recipe_fp8", "train_fp8",
    }  # fmt: skip
    for case in cases:
        assert ("transformer_engine" in case.argv) is (case.name in skipped)
