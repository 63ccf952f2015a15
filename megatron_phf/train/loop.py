"""The training job on a HuggingFace model: from its files to the exported student."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

from megatron_phf.config.settings import Config
from megatron_phf.data.rollouts import Rollout
from megatron_phf.estimate.utilisation import Utilisation
from megatron_phf.rollout.ahead import AheadSource
from megatron_phf.rollout.context import Prompts, RolloutContext
from megatron_phf.rollout.engines import reads_data
from megatron_phf.rollout.sources import RolloutSource, make_source
from megatron_phf.runtime.heartbeat import Heartbeat
from megatron_phf.runtime.signals import StopSignals
from megatron_phf.teacher.architecture import read_models
from megatron_phf.train.build import (
    job_tokenizer,
    load_student,
    make_distiller,
    make_prompts,
    run_moment,
)
from megatron_phf.train.collapse import CollapseSigns, copied_words
from megatron_phf.train.evaluation import Evaluations, read_questions
from megatron_phf.train.export import Export
from megatron_phf.train.hooks import RunHook, Stop
from megatron_phf.train.keep import GradedSource
from megatron_phf.train.logging import RunLogger, say
from megatron_phf.train.metrics import (
    PhaseTimer,
    StepMetrics,
    kept_rollouts,
    policy_lag,
    response_lengths,
    rollout_staleness,
    timing,
)
from megatron_phf.train.record import RecordingSource
from megatron_phf.train.run_files import write_run_file
from megatron_phf.train.session import Checkpoints, EndOfRun
from megatron_phf.train.step import Distiller
from megatron_phf.train.summary import aligned_example, run_summary

_BRIEF_STEPS = 10


class Steps:
    """Steps one by one: rollouts, training on them, and what is measured of both."""

    def __init__(
        self,
        source: RolloutSource,
        distiller: Distiller,
        prompts: Prompts | None,
        heartbeat: Heartbeat,
        example: bool,
        signs: CollapseSigns,
        ahead: AheadSource | None = None,
    ) -> None:
        """Of rollouts from ``source``.

        Args:
            prompts: None: unknown.
            example: show the first rollout as both models read it.
            ahead: what samples for steps to come, where something does.
        """
        self._source, self._distiller, self._heartbeat = source, distiller, heartbeat
        self._signs = signs
        self._tokenizer = None if prompts is None else prompts.tokenizer
        self._stop_ids = None if prompts is None else prompts.stop_ids
        self._utilisation = Utilisation(distiller.config, distiller.models)
        self._example, self._ahead = example, ahead

    def take(self, iteration: int) -> StepMetrics:
        """Step ``iteration`` (see ``Distiller.step``)."""
        timer = PhaseTimer(self._heartbeat.at, f"step {iteration}, ")
        with timer.phase("rollout"):
            rollouts = self._source.rollouts(iteration)
        beside = self._beside(iteration, rollouts, timer)
        if self._example:
            self._example = False
            say(aligned_example(rollouts[0], self._tokenizer))
        metrics = self._distiller.step(iteration, rollouts, timer)
        extra = {
            **metrics.extra,
            **timing(timer, metrics.rollout_tokens),
            "mfu": self._utilisation.mfu(
                [rollout.trained() for rollout in rollouts], timer.seconds["student"]
            ),
            "rollout_lengths": response_lengths(rollouts, self._stop_ids),
            **policy_lag(iteration, rollouts),
            "copied_words": copied_words(rollouts, self._tokenizer),
            **beside,
            **kept_rollouts(rollouts, self._distiller.config),
            "nonfinite_steps": self._distiller.nonfinite.total,
        }
        metrics = dataclasses.replace(metrics, extra=extra)
        signs = self._signs.add(metrics)
        return dataclasses.replace(metrics, extra={**extra, "collapse_signs": signs})

    def _beside(
        self, iteration: int, rollouts: Sequence[Rollout], timer: PhaseTimer
    ) -> dict[str, Any]:
        """What sampling beside training has come to."""
        if self._ahead is None:
            return {}
        beside = self._ahead.beside()
        timer.split("rollout", "rollout_wait", beside.waited)
        return {"rollout_overlap": beside.overlap, **rollout_staleness(iteration, rollouts)}


def run_steps(steps: Steps, hooks: Sequence[RunHook], done: int, total: int) -> list[StepMetrics]:
    """The steps after ``done`` up to ``total``, or to a hook's reason to stop.

    Raises:
        ValueError: what hooks have found at the end, once all of them have done their part.
    """
    history: list[StepMetrics] = []
    stop: Stop | None = None
    with contextlib.ExitStack() as closing:
        for hook in hooks:
            closing.callback(hook.close)
        for iteration in range(done + 1, total + 1):
            for hook in hooks:
                hook.before_step(iteration)
            history.append(steps.take(iteration))
            reasons = [hook.after_step(iteration, history[-1]) for hook in hooks]
            if stop := next(filter(None, reasons), None):
                say(f"{stop.reason}: ending after step {iteration}")
                break
        stopped = stop is not None and not stop.finished
        problems = [hook.at_end(done + len(history), stopped) for hook in hooks]
    if any(problems):
        raise ValueError("; ".join(filter(None, problems)))
    return history


def train(
    config: Config,
    signals: StopSignals,
    heartbeat: Heartbeat,
    prompts: Prompts | None = None,
    more: Sequence[RunHook] = (),
    brief: bool = False,
) -> list[StepMetrics]:
    """Train the student of ``--hf-model`` and export it where asked; the steps' metrics.

    Args:
        prompts: those of ``--data``, where they have been read.
        more: hooks beside the job's own, before the export.
        brief: without the start-up summary and the example, and a line for every tenth step.
    """
    directory = config.model.hf_model
    assert directory is not None
    models = read_models(config)
    if not brief:
        say(run_summary(models, config))
    questions, rendering = None, dict[str, str]()
    asks = prompts is None and reads_data(config)
    if asks or config.evaluation.eval_data is not None:
        moment = run_moment(config.checkpoint.load)
        tokenizer, stop_ids, rendering = job_tokenizer(config, models.vocab_size, moment)
        if asks:
            prompts = make_prompts(config, tokenizer, stop_ids)
        if config.evaluation.eval_data is not None:
            questions = read_questions(config, models, tokenizer, stop_ids)
    load = partial(load_student, models.student, config, directory)
    context = RolloutContext(config, models, prompts, load)
    source = make_source(context)  # what can be refused without weights is
    ahead = source if isinstance(source, AheadSource) else None
    student = context.student
    distiller = make_distiller(models, config, student)
    signs, end = CollapseSigns(config), EndOfRun(config, signals)
    checkpoints = Checkpoints(config, distiller, heartbeat, signs, ahead, rendering)
    done = checkpoints.resume()
    signals.install()  # from here on they wait for the end of a step
    write_run_file(config, models.student, done)
    logger = RunLogger(config, done, every=_BRIEF_STEPS if brief else 1)
    hooks: list[RunHook] = [
        logger,
        signs,  # before what it keeps from being written
        checkpoints,
        end,
        *more,
        Export(config, models.student, student),
    ]
    if questions is not None:  # of what is exported: behind it
        hooks.append(Evaluations(config, models, student, questions, logger, heartbeat, done))
    if config.rollout.keep_rollouts != "all":
        assert prompts is not None, "checked before launch: an engine that samples"
        source = GradedSource(source, config, prompts)
        hooks.append(source)
    if config.rollout.record_rollouts is not None:
        source = RecordingSource(source, config.rollout.record_rollouts, config, done)
        hooks.append(source)
    steps = Steps(source, distiller, prompts, heartbeat, not brief, signs, ahead)
    return run_steps(steps, hooks, done, config.train.train_iters)
