"""The embedded default: a tiny model learns modular arithmetic by OPSD and by OPSD + PHF.

Nothing is downloaded.  A tiny Qwen3 model gets a short supervised warm start that knows the plain
and the privileged prompt, and then trains on its own rollouts, with and without the flow loss,
over the same seeds.  Held-out Average@k before and after goes to ``summary.json``.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

import torch.distributed as dist

from megatron_phf import parallel
from megatron_phf.config import Config
from megatron_phf.data.arithmetic import ARITHMETIC_TEMPLATES, make_hf_directory, make_problems
from megatron_phf.data.prompts import PromptPair, build_prompt_pairs
from megatron_phf.data.replay_file import Rollout
from megatron_phf.data.tokenizer import load_tokenizer, stop_token_ids
from megatron_phf.evaluate import Evaluation, evaluate
from megatron_phf.model.architecture import Architecture, check_split, read_architecture
from megatron_phf.model.gpt import FlowGPTModel
from megatron_phf.model.hf_weights import save_hf
from megatron_phf.report import plot_demo
from megatron_phf.rollout.megatron import MegatronRollouts
from megatron_phf.train.logging import RunLogger, say
from megatron_phf.train.loop import load_student, make_distiller, sampling_params, train_steps
from megatron_phf.train.source import OnPolicySource
from megatron_phf.train.summary import run_summary
from megatron_phf.train.warm_start import warm_start

_TRAIN_PROBLEMS = 20_000
_EVAL_SEED = 10_001


class _Demo:
    """What all runs of the demonstration share."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.directory = config.output.output_dir
        initial = os.path.join(self.directory, "initial_model")
        if parallel.is_first_rank():
            os.makedirs(self.directory, exist_ok=True)
            make_hf_directory(initial, seed=config.train.seed)
        dist.barrier()
        self.arch = read_architecture(initial)
        check_split(self.arch, config)
        self.initial = initial
        self.base = os.path.join(self.directory, "base_model")
        self.tokenizer = load_tokenizer(config.replaced(hf_model=initial))
        self.stop_ids = stop_token_ids(self.tokenizer, initial)
        seed = config.train.seed
        self.train = self._pairs(make_problems("train", _TRAIN_PROBLEMS, seed))
        self.held_out = self._pairs(make_problems("heldout", config.embedded.eval_problems, seed))

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
        save_hf(student, self.arch, self.config, self.initial, self.base)
        return student, len(losses)

    def _solution(self, pair: PromptPair) -> list[int]:
        return self.tokenizer.encode(pair.problem.solution)

    def evaluate(self, student: list[FlowGPTModel]) -> Evaluation:
        """Held-out Average@k, at temperature 1 without filters."""
        settings = self.config.replaced(
            rollout_temperature=1.0, rollout_top_p=1.0, rollout_top_k=0, seed=_EVAL_SEED
        )
        sampling = sampling_params(settings, self.stop_ids)
        engine = MegatronRollouts(student, self.arch.vocab_size, 512)
        return evaluate(
            engine, self.tokenizer, self.held_out, sampling, self.config.embedded.eval_samples
        )

    def train_and_evaluate(
        self, name: str, config: Config, show_example: bool
    ) -> tuple[Evaluation, float, list[Any]]:
        """One run from the base model: its evaluation, seconds of training, and its steps."""
        student = load_student(self.arch, config, self.base)
        engine = MegatronRollouts(student, self.arch.vocab_size, config.rollout.rollout_batch_size)
        sampling = sampling_params(config, self.stop_ids)
        batch, positions = config.train.global_batch_size, self.arch.max_position_embeddings
        source = OnPolicySource(engine, self.train, sampling, batch, positions)
        distiller = make_distiller(self.arch, config, student)
        metrics_file = os.path.join(self.directory, f"{name}.jsonl")
        logger = RunLogger(
            config.replaced(metrics_file=metrics_file), config.train.train_iters, name
        )
        start = time.perf_counter()
        try:
            history = train_steps(distiller, source, logger, self.tokenizer, show_example)
        finally:
            logger.close()
        seconds = time.perf_counter() - start
        return self.evaluate(student), seconds, [m.as_json() for m in history]


def _record(evaluation: Evaluation, seconds: float) -> dict[str, Any]:
    return {
        "average_at_k": evaluation.average,
        "interval_95": list(evaluation.interval),
        "seconds": round(seconds, 2),
    }


def _mean(runs: list[dict[str, Any]]) -> float:
    return sum(run["average_at_k"] for run in runs) / len(runs)


def run(config: Config) -> dict[str, Any]:
    """Warm start, both methods over the seeds, evaluations; writes summary and plot."""
    begin = time.perf_counter()
    demo = _Demo(config)
    say(run_summary(demo.arch, config))
    student, warm_steps = demo.warm_started()
    warm_seconds = time.perf_counter() - begin
    base = demo.evaluate(student)
    say(f"base model: {_describe(base)}")
    del student
    seeds = [config.train.seed + i for i in range(config.embedded.demo_seeds)]
    arms = {"opsd": config.replaced(phf_alpha=0.0), "phf": config}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    curves: dict[str, list[list[Any]]] = {name: [] for name in arms}
    for seed in seeds:
        for name, arm in arms.items():
            result, seconds, steps = demo.train_and_evaluate(
                f"{name}_seed{seed}", arm.replaced(seed=seed), show_example=not runs["opsd"]
            )
            say(f"{name} seed {seed}: {_describe(result)} after {seconds:.0f} s")
            runs[name].append({"seed": seed, **_record(result, seconds)})
            curves[name].append(steps)
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
    k = config.embedded.eval_samples
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
    path = os.path.join(directory, "summary.json")
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(summary, f, indent=2)
    os.replace(path + ".tmp", path)
    plot_demo(os.path.join(directory, "report.png"), summary, curves)
