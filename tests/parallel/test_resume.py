"""A run that stops and resumes equals one that does not: bit for bit, or to 1e-5 when resharded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_phf.demo.task import make_hf_directory, make_problems
from tests.launch import unmeasured
from tests.models import make_model, make_replay
from tests.parallel.cases import compare_tensors, launch
from tests.parallel.test_moe import EXPERTS
from tests.parallel.test_parity import PP2, TP2

STEPS, HALF, BATCH = 6, 3, 4
UNEVEN = ["--num-layers-in-first-pipeline-stage", "2", "--num-layers-in-last-pipeline-stage", "1"]
DISTRIBUTED = ["--use-distributed-optimizer"]
GATHER = ["--overlap-grad-reduce", "--overlap-param-gather"]
# name -> flags; rollouts are sampled by the student in each
EXACT = {
    "frozen_tp2": [*TP2, "--teacher", "frozen", "--privileged", "hint:0.3-1"],
    "ema_dp2_gather": [*DISTRIBUTED, *GATHER, "--teacher", "ema", "--dtype", "bf16"],
    "live_pp2": [*PP2, *UNEVEN, "--teacher", "live", "--phf-alpha", "0"],
    "lora_frozen_tp2": [*TP2, "--lora-rank", "4", "--lora-dropout", "0.1"],
    "lora_ema_dp2": ["--lora-rank", "4", "--teacher", "ema"],
    "ema_tp2_async": [*TP2, "--teacher", "ema", "--async-save"],
}
EP2 = ["--expert-model-parallel-size", "2"]
# A model with experts: saved and loaded in these layouts, by 2 processes.  Under expert parallelism
# its experts have an optimizer of their own.
EXPERTS_MOVED = {"ep1_to_2": ([], EP2), "ep2_to_1": (EP2, [])}
RESHARDED = {"pp2": (2, PP2), "tp2_pp2": (4, TP2 + PP2), "dp2": (2, [])}
TRAIN = ["--train-iters", str(STEPS), "--global-batch-size", str(BATCH), "--lr", "1e-3"]
TRAIN += ["--max-prompt-length", "64", "--max-teacher-prompt-length", "128", "--seed", "9"]
TRAIN += ["--max-new-tokens", "8", "--no-tensorboard", "--lr-warmup-iters", "2"]
TRAIN += ["--ema-decay", "0.6"]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def job(name: str, directory: Path, argv: list[str], **more: str) -> dict:
    files = {"metrics-file": directory / f"{name}.jsonl", "output-dir": directory / "out", **more}
    given = [word for key, value in files.items() for word in (f"--{key}", str(value))]
    return {"name": name, "kind": "job", "argv": [*TRAIN, *argv, *given]}


def _schedule_cases(d: Path, sampled: list[str]) -> list[dict]:
    """A cosine over 4 steps, stopped after 2: resumed for 6 steps, that again, and changed."""
    argv = [*sampled, "--phf-alpha", "0", "--min-lr", "1e-5"]
    steps = {"first": ("4", "2"), "longer": ("6", "4"), "again": ("5", "5"), "other": ("3", "3")}
    before = {"longer": "first", "again": "longer", "other": "first"}
    more = {"other": ["--lr", "2e-3", "--min-lr", "1e-4", "--lr-decay-iters", "10"]}
    cases = []
    for name, (total, end) in steps.items():
        own = ["--train-iters", total, "--exit-interval", end, *more.get(name, [])]
        load = {"load": str(d / f"rate-{before[name]}.ckpt")} if name in before else {}
        save = str(d / f"rate-{name}.ckpt")
        cases.append(job(f"rate-{name}", d, [*argv, *own], save=save, **load))
    return cases


def _collapse_cases(d: Path) -> list[dict]:
    """Responses of 8 tokens, from step 4 on of 2; the second run starts at the checkpoint of 3."""
    make_replay(str(d / "short.jsonl"), [8] * BATCH * 3 + [2] * BATCH * 3)
    argv = ["--hf-model", str(d / "model"), "--rollout-engine", "replay", "--dtype", "fp32"]
    argv += ["--replay-file", str(d / "short.jsonl"), "--save-interval", "1", "--keep-last", "1"]
    argv += ["--stop-on-collapse", "--collapse-steps", "2", "--collapse-length", "0.7"]
    argv += ["--collapse-entropy", "0", "--collapse-agreement", "0"]
    save, more = str(d / "collapse.ckpt"), {"save-hf": str(d / "collapsed")}
    return [
        job("collapse", d, argv, save=save, **more),
        job("collapse-again", d, argv, save=save, load=save, **more),
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    d = tmp_path_factory.mktemp("resume")
    make_hf_directory(str(d / "hf"), seed=3)
    problems = make_problems("train", 7, 1)
    with open(d / "data.jsonl", "w") as f:
        f.writelines(
            json.dumps({"problem": p.problem, "solution": p.solution}) + "\n" for p in problems
        )
    for side, text in (("student", "{problem}="), ("teacher", "{problem}|{solution}=")):
        (d / f"{side}.txt").write_text(text)
    make_model(str(d / "model"))
    make_replay(str(d / "replay.jsonl"), [5, 7, 3, 9] * STEPS)
    sampled = ["--hf-model", str(d / "hf"), "--data", str(d / "data.jsonl")]
    for side in ("student", "teacher"):
        sampled += [f"--{side}-template", str(d / f"{side}.txt")]
    half = ["--exit-interval", str(HALF)]
    cases = []
    for name, flags in EXACT.items():
        argv, save = [*sampled, *flags], str(d / f"{name}.ckpt")
        plain = [word for word in argv if word not in ("--async-save", GATHER[1])]
        straight = job(f"{name}-straight", d, plain, **{"save-hf": str(d / f"{name}-straight")})
        record = {"record-rollouts": str(d / f"{name}.rollouts")}
        first = job(name, d, [*argv, *half], save=save, **record)
        second = job(name, d, plain, load=save, **record, **{"save-hf": str(d / f"{name}-resumed")})
        cases += [straight, first, second]
    cases += [*_schedule_cases(d, sampled), *_collapse_cases(d)]
    replayed = ["--hf-model", str(d / "model"), "--rollout-engine", "replay", "--teacher", "ema"]
    replayed += ["--replay-file", str(d / "replay.jsonl"), "--dtype", "fp32", "--adam-eps", "1e-4"]
    save = str(d / "reshard.ckpt")
    cases.append(
        job("reshard-straight", d, [*replayed, *TP2], **{"save-hf": str(d / "reshard-straight")})
    )
    cases.append(job("reshard-half", d, [*replayed, *TP2, *half], save=save))
    make_model(str(d / "experts"), **EXPERTS)
    moe = ["--hf-model", str(d / "experts"), *replayed[2:], "--moe-aux-loss-coeff", "0"]
    straight = {"save-hf": str(d / "reshard-experts-straight")}
    cases.append(job("reshard-experts-straight", d, moe, **straight))
    for name, (first, second) in EXPERTS_MOVED.items():
        for more in ([], DISTRIBUTED):
            run, save_moe = (
                f"{name}{'_distributed' * bool(more)}",
                str(d / f"{name}{len(more)}.ckpt"),
            )
            export = {"save-hf": str(d / f"reshard-{run}")}
            cases.append(job(f"{run}-half", d, [*moe, *first, *more, *half], save=save_moe))
            cases.append(job(f"reshard-{run}", d, [*moe, *second, *more], load=save_moe, **export))
    for processes in (2, 4):
        for name, (count, layout) in RESHARDED.items():
            if count == processes:
                more = {"load": save, "save-hf": str(d / f"reshard-{name}")}
                cases.append(job(f"reshard-{name}", d, [*replayed, *layout], **more))
        launch(processes, cases, d)
        cases = []
    return d


@pytest.mark.parametrize("name", EXACT)
def test_resumed_run_is_bit_equal(files: Path, name: str) -> None:
    straight, resumed = (lines(files / f"{n}.jsonl") for n in (f"{name}-straight", name))
    assert [line["step"] for line in resumed] == list(range(1, STEPS + 1))
    for a, b in zip(straight, resumed, strict=True):
        assert unmeasured(a) == unmeasured(b)
    weights = [
        load_file(files / f"{name}-{n}" / "model.safetensors") for n in ("straight", "resumed")
    ]
    for key in weights[0]:
        assert torch.equal(weights[0][key], weights[1][key]), key
    assert len(lines(files / f"{name}.rollouts")) == STEPS * BATCH


@pytest.mark.parametrize(
    "name", [*RESHARDED, *EXPERTS_MOVED, *(f"{name}_distributed" for name in EXPERTS_MOVED)]
)
def test_resharded_run_continues(files: Path, name: str) -> None:
    whole = "straight" if name in RESHARDED else "experts-straight"
    straight, resumed = (lines(files / f"reshard-{n}.jsonl") for n in (whole, name))
    assert [line["step"] for line in resumed] == list(range(HALF + 1, STEPS + 1))
    for a, b in zip(straight[HALF:], resumed, strict=True):
        for key in ("loss", "opsd", "flow", "grad_norm", "teacher_entropy"):
            assert b[key] == pytest.approx(a[key], rel=1e-5, abs=1e-7), key
    expected, found = (
        load_file(files / f"reshard-{n}" / "model.safetensors") for n in (whole, name)
    )
    compare_tensors(found, expected, 1e-5)


def test_another_number_of_steps_makes_the_rate_no_jump(files: Path) -> None:
    """Warm-up of 2 steps to 1e-3, then half of a cosine to 1e-5 a step."""

    def rates(name: str) -> dict[int, float]:
        return {line["step"]: line["learning_rate"] for line in lines(files / f"rate-{name}.jsonl")}

    half = (1e-3 + 1e-5) / 2
    assert rates("first") == pytest.approx({1: 0.0, 2: 5e-4})
    assert rates("longer") == pytest.approx({3: 1e-3, 4: half})
    assert rates("again") == pytest.approx({5: 1e-5})
    # Rates that are asked for are taken: the peak, at the end of the warm-up.
    assert rates("other") == pytest.approx({3: 2e-3})


def test_a_collapse_ends_the_run_and_leaves_the_checkpoint_before(files: Path) -> None:
    """The first steps' level is in the checkpoint: a resumed run ends at the same step."""
    first, again = lines(files / "collapse.jsonl"), lines(files / "collapse-again.jsonl")
    lengths = [line["collapse_signs"]["length"] for line in first]
    assert lengths == [1, 1, 1, pytest.approx(5 / 8)]
    assert unmeasured(again[0]) == unmeasured(first[3]) and len(again) == 1
    assert [p.name for p in (files / "collapse.ckpt").glob("iter_*")] == ["iter_0000003"]
    assert not (files / "collapsed").exists()


def test_what_is_on_the_disk(files: Path) -> None:
    directory = files / "ema_tp2_async.ckpt"
    assert (directory / "latest_checkpointed_iteration.txt").read_text() == str(HALF)
    assert sorted(p.name for p in directory.iterdir()) == [
        f"iter_{HALF:07d}",
        "latest_checkpointed_iteration.txt",
    ]
    manifest = json.loads((directory / f"iter_{HALF:07d}" / "checkpoint.json").read_text())
    assert {"hf/config.json", "hf/tokenizer.json", "common.pt", ".metadata"} <= manifest[
        "files"
    ].keys()
    assert manifest["progress"]["iteration"] == HALF
    shutil.rmtree(directory)
