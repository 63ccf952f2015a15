"""The embedded default: a tiny model learns modular arithmetic by OPSD and by OPSD + PHF.

Nothing is downloaded.  A tiny Qwen3 model gets a short supervised warm start that knows the plain
and the privileged prompt, and then trains on its own rollouts, with and without the flow loss,
over the same seeds.  Each is a run of the training job on files in ``--output-dir``; what they left
goes to ``summary.json``, and to a report with its picture.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_phf.config.settings import Config
from megatron_phf.data.problems import Problem, jsonl
from megatron_phf.data.prompts import build_prompt_pairs
from megatron_phf.data.stop_tokens import stop_token_ids
from megatron_phf.data.tokenizer import load_tokenizer
from megatron_phf.demo.task import ARITHMETIC_TEMPLATES, make_hf_directory, make_problems
from megatron_phf.demo.warm_start import LossReached, warm_start_config, warm_start_prompts
from megatron_phf.files.directories import write_directory
from megatron_phf.files.replace import new_file, set_aside, write_json
from megatron_phf.report.page import check_directory, write_report
from megatron_phf.report.runs import Variant, read_variants
from megatron_phf.report.statistics import paired_difference
from megatron_phf.rollout.context import Prompts
from megatron_phf.runtime.heartbeat import Heartbeat
from megatron_phf.runtime.signals import StopSignals
from megatron_phf.runtime.together import on_first_rank
from megatron_phf.train.logging import say
from megatron_phf.train.loop import train
from megatron_phf.train.run_files import keep_earlier_files

_TRAIN_PROBLEMS = 20_000
_SUMMARY, _PLOT, _REPORT = "summary.json", "report.png", "report"


@dataclasses.dataclass(frozen=True)
class Demo:
    """The task as files, and what trains on them; ``job``: the flags of a run on the base model."""

    job: Config
    initial: str
    prompts: Prompts
    signals: StopSignals
    heartbeat: Heartbeat

    def warm_start(self) -> int | None:
        """Make the base model, which every other run starts from; steps, None if interrupted."""
        job, base = self.job, self.job.model.hf_model
        assert base is not None
        config = warm_start_config(job, self.initial, base)
        end = LossReached(config.embedded.warm_start_loss)
        prompts = warm_start_prompts(self.prompts, config.train.seed)
        say("\nwarm start")
        steps = len(train(config, self.signals, self.heartbeat, prompts, [end], brief=True))
        return steps if end.reached or steps == config.train.train_iters else None

    def arm(self, config: Config, brief: bool) -> bool:
        """Train from the base model; whether all steps were taken."""
        say(f"\n{config.output.run_name}, seed {config.train.seed}")
        steps = len(train(config, self.signals, self.heartbeat, self.prompts, brief=brief))
        return steps == config.train.train_iters


def prepare(
    config: Config, signals: StopSignals, heartbeat: Heartbeat, templates: str | None = None
) -> Demo:
    """Write the task into ``--output-dir``: models, problems, and the prompts' templates.

    These may go to another directory ``templates``.
    """
    directory, seed = config.output.output_dir, config.train.seed
    initial = os.path.join(directory, "initial_model")
    write_directory(initial, "--output-dir", lambda path: make_hf_directory(path, seed=seed))
    counts = {"train": _TRAIN_PROBLEMS, "heldout": config.embedded.eval_problems}
    splits = {split: make_problems(split, count, seed) for split, count in counts.items()}
    paths = {split: os.path.join(directory, f"{split}.jsonl") for split in splits}
    texts = {paths[split]: _lines(problems) for split, problems in splits.items()}
    for side in ("student", "teacher"):
        paths[side] = os.path.join(templates or directory, f"{side}.txt")
        texts[paths[side]] = getattr(ARITHMETIC_TEMPLATES, side)
    on_first_rank(_write_files, texts)
    job = config.replaced(
        hf_model=os.path.join(directory, "base_model"),
        data=paths["train"],
        eval_data=paths["heldout"],
        student_template=paths["student"],
        teacher_template=paths["teacher"],
        **dict.fromkeys(("metrics_file", "record_rollouts", "save_hf", "save_adapter")),
    )
    tokenizer, data = load_tokenizer(job.replaced(hf_model=initial)), config.data
    limits = data.max_prompt_length, data.max_teacher_prompt_length
    pairs, _ = build_prompt_pairs(tokenizer, splits["train"], ARITHMETIC_TEMPLATES, *limits)
    prompts = Prompts(tokenizer, pairs, stop_token_ids(tokenizer, initial))
    return Demo(job, initial, prompts, signals, heartbeat)


def _lines(problems: list[Problem]) -> str:
    """A problem a line; its number is that of the line."""
    fields = ("problem", "solution", "answer")
    return jsonl({name: getattr(problem, name) for name in fields} for problem in problems)


def _write_files(texts: dict[str, str]) -> None:
    """Those of the same content stay; others that are there are kept under another name."""
    for path, text in texts.items():
        if os.path.isfile(path) and Path(path).read_bytes() == text.encode():
            continue
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        set_aside([path])
        with new_file(path) as f:
            f.write(text)


def run(config: Config, signals: StopSignals, heartbeat: Heartbeat) -> None:
    """Warm start, both methods over the seeds, evaluations; writes summary and report."""
    begin = time.perf_counter()
    directory = config.output.output_dir
    own = config.replaced(metrics_file=None, record_rollouts=None)  # of no run here
    on_first_rank(keep_earlier_files, own, (_SUMMARY, _PLOT))
    on_first_rank(check_directory, os.path.join(directory, _REPORT))
    demo = prepare(config, signals, heartbeat)
    warm_steps, settings = demo.warm_start(), config.train
    warm_seconds = time.perf_counter() - begin
    if warm_steps is None or not _run_arms(demo):
        return  # interrupted, and said so
    seconds = {"warm_start": warm_seconds, "total": time.perf_counter() - begin}
    steps = {"on_policy": settings.train_iters, "global_batch_size": settings.global_batch_size}
    known = {
        "steps": {**steps, "warm_start": warm_steps},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    say(on_first_rank(_write_results, demo, known))


def _arms(job: Config) -> Iterator[Config]:
    """Both methods over the seeds."""
    for i in range(job.embedded.demo_seeds):
        for name, alpha in (("opsd", 0.0), ("phf", job.method.phf_alpha)):
            seed = job.train.seed + i
            where = os.path.join(job.output.output_dir, name, f"seed{seed}")
            yield job.replaced(phf_alpha=alpha, seed=seed, output_dir=where, run_name=name)


def _run_arms(demo: Demo) -> bool:
    """The first is shown whole, the others in brief; False where a signal has ended one."""
    return all(demo.arm(arm, brief=i > 0) for i, arm in enumerate(_arms(demo.job)))


def _write_results(demo: Demo, known: dict[str, Any]) -> str:
    """Summary, page and picture of what the runs have left; the summary for people."""
    directory = demo.job.output.output_dir
    variants = read_variants([arm.output.output_dir for arm in _arms(demo.job)])
    summary = {**_summary(demo.job, variants), **known}
    write_json(os.path.join(directory, _SUMMARY), summary)
    picture = f"final_average_{summary['eval_samples']}.png"
    try:
        page = write_report(variants, os.path.join(directory, _REPORT))
        shutil.copyfile(f"{os.path.dirname(page)}/{picture}", os.path.join(directory, _PLOT))
    except Exception as error:  # the runs and their summary are there
        page = f"warning: no report ({error}); make it with: python tools/report.py {directory}"
    return f"{_verdict(summary)}\n{page}"


def _summary(config: Config, variants: list[Variant]) -> dict[str, Any]:
    k = config.evaluation.eval_samples
    runs = {
        variant.name: [
            {
                "seed": run.seed,
                **{key: run.evaluations[-1][key] for key in ("average_at_k", "interval_95")},
                "seconds": round(sum(sum(s["seconds"].values()) for s in run.steps), 2),
            }
            for run in variant.runs
        ]
        for variant in variants
    }
    first = variants[0].runs[0]
    difference = paired_difference(variants[1], variants[0])
    assert difference is not None  # the same seeds and steps
    return {
        f"base_average_at_{k}": first.evaluations[0]["average_at_k"],
        **{
            f"{name}_average_at_{k}": sum(r["average_at_k"] for r in found) / len(found)
            for name, found in runs.items()
        },
        "base_interval_95": first.evaluations[0]["interval_95"],
        "difference": {
            "mean": difference.mean,
            "interval_95": [difference.low, difference.high],
            "over": difference.over,
        },
        "runs": runs,
        "seeds": variants[0].seeds,
        "phf_alpha": config.method.phf_alpha,
        "eval_problems": config.embedded.eval_problems,
        "eval_samples": k,
        "parameters": first.info["model"]["parameters"],
    }


def _meaning(difference: Mapping[str, Any]) -> str:
    """What the difference of the two methods says, in one sentence."""
    low, high = difference["interval_95"]
    if low is None:
        return "One evaluation each says nothing about which method is better."
    shown = (
        f"OPSD + PHF is {100 * difference['mean']:+.1f} points from OPSD, 95 % interval "
        f"{100 * low:+.1f} to {100 * high:+.1f} over {difference['over']}:"
    )
    if low <= 0 <= high:
        return f"{shown} no difference can be seen on this task at this rate."
    better = "better" if low > 0 else "worse"
    return f"{shown} {better} on this task at this rate."


def _verdict(summary: dict[str, Any]) -> str:
    k = summary["eval_samples"]
    base, opsd, phf = (100 * summary[f"{name}_average_at_{k}"] for name in ("base", "opsd", "phf"))
    return (
        f"\nheld-out Average@{k}, mean of {len(summary['seeds'])} seed(s):\n"
        f"  base model {base:5.1f} %\n  OPSD       {opsd:5.1f} %\n  OPSD + PHF {phf:5.1f} %"
        f"  (alpha {summary['phf_alpha']})\n{_meaning(summary['difference'])}\n"
        f"{summary['seconds']['total']:.0f} s in all"
    )
