"""The embedded default: a tiny model learns modular arithmetic by OPSD and by OPSD + PHF.

Nothing is downloaded.  A tiny Qwen3 model gets a short supervised warm start that knows the plain
and the privileged prompt, and then trains on its own rollouts, with and without the flow loss,
over the same seeds.  Held-out Average@k before and after goes to ``summary.json``.
"""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any

from megatron_phf.config.settings import Config
from megatron_phf.data.problems import jsonl
from megatron_phf.data.prompts import PromptPair, build_prompt_pairs
from megatron_phf.data.rollouts import Rollout
from megatron_phf.data.tokenizer import load_tokenizer, stop_token_ids
from megatron_phf.demo.picture import plot_demo
from megatron_phf.demo.task import ARITHMETIC_TEMPLATES, make_hf_directory, make_problems
from megatron_phf.demo.warm_start import warm_start
from megatron_phf.evaluation.evaluate import (
    Evaluation,
    evaluate,
    evaluation_sampling,
    make_test_set,
)
from megatron_phf.evaluation.grading import Grader, make_grader
from megatron_phf.files.directories import write_directory
from megatron_phf.files.replace import write_json, write_new_text
from megatron_phf.model.architecture import Architecture, check_split
from megatron_phf.model.gpt import FlowGPTModel
from megatron_phf.rollout.context import Prompts
from megatron_phf.rollout.megatron.engine import MegatronRollouts, student_engine
from megatron_phf.rollout.order import problem_order, response_room
from megatron_phf.rollout.sources import OnPolicySource, sampling_params
from megatron_phf.runtime import parallel
from megatron_phf.runtime.heartbeat import Heartbeat
from megatron_phf.teacher.architecture import read_models
from megatron_phf.train.build import load_student, make_distiller
from megatron_phf.train.evaluation import EvaluationLog
from megatron_phf.train.logging import RunLogger, say
from megatron_phf.train.loop import Steps, run_steps
from megatron_phf.train.run_files import keep_earlier_files, write_run_file
from megatron_phf.train.summary import run_summary
from megatron_phf.weights.huggingface import save_hf

_TRAIN_PROBLEMS = 20_000
_EVAL_BATCH = 512
_SUMMARY, _PLOT = "summary.json", "report.png"


class _Demo:
    """What all runs of the demonstration share."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.directory = config.output.output_dir
        initial = os.path.join(self.directory, "initial_model")
        write_directory(
            initial, "--output-dir", lambda d: make_hf_directory(d, seed=config.train.seed)
        )
        self.models = read_models(config.replaced(hf_model=initial))
        self.arch = self.models.student
        check_split(self.arch, config)
        self.initial = initial
        self.base = os.path.join(self.directory, "base_model")
        self.tokenizer = load_tokenizer(config.replaced(hf_model=initial))
        self.stop_ids = stop_token_ids(self.tokenizer, initial)
        seed = config.train.seed
        self.train = self._pairs(make_problems("train", _TRAIN_PROBLEMS, seed))
        held_out = make_problems("heldout", config.embedded.eval_problems, seed)
        limit, name = config.data.max_prompt_length, "held-out problems"
        self.tests = make_test_set(
            held_out, self.tokenizer, ARITHMETIC_TEMPLATES, False, limit, name
        )

    def _pairs(self, problems: Any) -> list[PromptPair]:
        data = self.config.data
        pairs, dropped = build_prompt_pairs(
            self.tokenizer,
            problems,
            ARITHMETIC_TEMPLATES,
            data.max_prompt_length,
            data.max_teacher_prompt_length,
        )
        assert dropped == 0
        return pairs

    def warm_started(self) -> tuple[list[FlowGPTModel], int]:
        """The base model, exported too (every run below starts from that), and its steps."""
        student = load_student(self.arch, self.config, self.initial)
        stop = self.tokenizer.eos_id
        assert stop is not None
        examples = [
            Rollout(p.student_ids, p.teacher_ids, (*self._solution(p), stop)) for p in self.train
        ]
        losses = warm_start(student, self.arch, self.config, examples)
        if losses:
            say(f"warm start: {len(losses)} steps, loss {losses[0]:.3f} -> {losses[-1]:.3f}")
        save_hf(student, self.arch, self.config, self.initial, self.base, flag="--output-dir")
        return student, len(losses)

    def _solution(self, pair: PromptPair) -> list[int]:
        return self.tokenizer.encode(pair.problem.solution)

    def evaluate(self, student: list[FlowGPTModel], config: Config, grader: Grader) -> Evaluation:
        """Held-out Average@k of ``student``."""
        room = self.arch.max_position_embeddings - self.tests.longest_prompt
        sampling = evaluation_sampling(config, self.stop_ids, room)
        engine = MegatronRollouts(student, self.arch.vocab_size, _EVAL_BATCH)
        k = config.evaluation.eval_samples
        return evaluate(engine, self.tokenizer, self.tests, sampling, k, grader)

    def train_and_evaluate(
        self,
        config: Config,
        base: Evaluation,
        grader: Grader,
        heartbeat: Heartbeat,
        show_example: bool,
    ) -> tuple[Evaluation, float, list[Any]]:
        """One run from the base model: its evaluation, seconds of training, and its steps."""
        student = load_student(self.arch, config, self.base)
        train = config.train
        source = OnPolicySource(
            student_engine(config, self.models, student),
            problem_order(config, self.train),
            sampling_params(config, self.stop_ids),
            response_room(config, self.models),
        )
        distiller = make_distiller(self.models, config, student)
        write_run_file(config, self.arch)
        log = EvaluationLog(config.output.output_dir)
        log.add(0, base)
        prompts = Prompts(self.tokenizer, self.train, self.stop_ids)
        steps = Steps(source, distiller, prompts, heartbeat, show_example)
        start = time.perf_counter()
        history = run_steps(steps, [RunLogger(config)], 0, train.train_iters)
        seconds = time.perf_counter() - start
        result = self.evaluate(student, config, grader)
        log.add(train.train_iters, result)
        return result, seconds, [m.as_json() for m in history]


def write_task(config: Config, directory: str, templates: str) -> None:
    """Base model and problems into ``directory``, the prompt templates into ``templates``."""
    demo = _Demo(config.replaced(output_dir=directory))
    demo.warm_started()
    if not parallel.is_first_rank():
        return
    problems = {"train": [p.problem for p in demo.train], "heldout": demo.tests.problems}
    for name, split in problems.items():
        lines = [dataclasses.asdict(p) for p in split]
        for line in lines:
            del line["index"]
        write_new_text(os.path.join(directory, f"{name}.jsonl"), jsonl(lines))
    for side in ("student", "teacher"):
        path = os.path.join(templates, f"{side}.txt")
        write_new_text(path, getattr(ARITHMETIC_TEMPLATES, side))


def _record(evaluation: Evaluation, seconds: float) -> dict[str, Any]:
    return {
        "average_at_k": evaluation.average,
        "interval_95": list(evaluation.interval),
        "seconds": round(seconds, 2),
    }


def _mean(runs: list[dict[str, Any]]) -> float:
    return sum(run["average_at_k"] for run in runs) / len(runs)


def run(config: Config, heartbeat: Heartbeat) -> dict[str, Any]:
    """Warm start, both methods over the seeds, evaluations; writes summary and plot."""
    begin = time.perf_counter()
    if parallel.is_first_rank():
        own = config.replaced(metrics_file=None, record_rollouts=None)  # of no run here
        keep_earlier_files(own, ("evaluations.jsonl", _SUMMARY, _PLOT))
    demo = _Demo(config)
    say(run_summary(demo.models, config))
    student, warm_steps = demo.warm_started()
    warm_seconds = time.perf_counter() - begin
    with make_grader(config.evaluation.grader) as grader:
        base = demo.evaluate(student, config, grader)
        say(f"base model: {_describe(base)}")
        del student
        runs, curves = _run_arms(demo, config, base, grader, heartbeat)
    seeds = [run["seed"] for run in runs["phf"]]
    summary = _summary(config, demo.arch, base, runs, seeds)
    summary["steps"]["warm_start"] = warm_steps
    summary["seconds"] = {
        "warm_start": round(warm_seconds, 1),
        "total": round(time.perf_counter() - begin, 1),
    }
    if parallel.is_first_rank():
        _write(config.output.output_dir, summary, curves)
    say(_verdict(summary))
    return summary


def _run_arms(
    demo: _Demo, config: Config, base: Evaluation, grader: Grader, heartbeat: Heartbeat
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[list[Any]]]]:
    """Both methods over the seeds: what the summary says of each run, and its steps."""
    arms = {"opsd": config.replaced(phf_alpha=0.0), "phf": config}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    curves: dict[str, list[list[Any]]] = {name: [] for name in arms}
    for i in range(config.embedded.demo_seeds):
        for name, arm in arms.items():
            seed = config.train.seed + i
            directory = os.path.join(demo.directory, name, f"seed{seed}")
            arm = arm.replaced(seed=seed, output_dir=directory, run_name=name, metrics_file=None)
            first = not runs["opsd"]
            result, seconds, steps = demo.train_and_evaluate(arm, base, grader, heartbeat, first)
            say(f"{name} seed {seed}: {_describe(result)} after {seconds:.0f} s")
            runs[name].append({"seed": seed, **_record(result, seconds)})
            curves[name].append(steps)
    return runs, curves


def _describe(result: Evaluation) -> str:
    low, high = result.interval
    return f"{100 * result.average:.1f} % (95 % interval {100 * low:.1f} - {100 * high:.1f})"


def _summary(
    config: Config,
    arch: Architecture,
    base: Evaluation,
    runs: dict[str, list[dict[str, Any]]],
    seeds: list[int],
) -> dict[str, Any]:
    k = config.evaluation.eval_samples
    return {
        f"base_average_at_{k}": base.average,
        f"opsd_average_at_{k}": _mean(runs["opsd"]),
        f"phf_average_at_{k}": _mean(runs["phf"]),
        "base_interval_95": list(base.interval),
        "runs": runs,
        "seeds": seeds,
        "steps": {
            "on_policy": config.train.train_iters,
            "global_batch_size": config.train.global_batch_size,
        },
        "phf_alpha": config.method.phf_alpha,
        "eval_problems": config.embedded.eval_problems,
        "eval_samples": k,
        "parameters": arch.num_parameters(),
    }


def _verdict(summary: dict[str, Any]) -> str:
    k = summary["eval_samples"]
    base, opsd, phf = (100 * summary[f"{name}_average_at_{k}"] for name in ("base", "opsd", "phf"))
    return (
        f"\nheld-out Average@{k}, mean of {len(summary['seeds'])} seed(s):\n"
        f"  base model {base:5.1f} %\n  OPSD       {opsd:5.1f} %\n  OPSD + PHF {phf:5.1f} %"
        f"  (alpha {summary['phf_alpha']}, {phf - opsd:+.1f} points over OPSD)\n"
        f"{summary['seconds']['total']:.0f} s in all"
    )


def _write(directory: str, summary: dict[str, Any], curves: dict[str, list[list[Any]]]) -> None:
    write_json(os.path.join(directory, _SUMMARY), summary)
    plot_demo(os.path.join(directory, _PLOT), summary, curves)
