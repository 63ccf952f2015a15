"""The training job on a HuggingFace model: from its files to the exported student."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

from megatron_phf.config.settings import Config
from megatron_phf.data.tokenizer import (
    Tokenizer,
    check_token_ids,
    load_tokenizer,
    stop_token_ids,
)
from megatron_phf.estimate.utilisation import Utilisation
from megatron_phf.evaluation.evaluate import evaluation_sampling, read_test_set
from megatron_phf.evaluation.grading import make_grader
from megatron_phf.model.architecture import Architecture, read_architecture
from megatron_phf.model.gpt import FlowGPTModel
from megatron_phf.rollout.context import Prompts, RolloutContext
from megatron_phf.rollout.megatron.engine import student_engine
from megatron_phf.rollout.sources import RecordingSource, RolloutSource, make_source
from megatron_phf.runtime.heartbeat import Heartbeat
from megatron_phf.runtime.signals import StopSignals
from megatron_phf.teacher.architecture import common_vocab_size
from megatron_phf.train.build import load_student, make_distiller, read_prompts
from megatron_phf.train.evaluation import EvaluationLog, Evaluator
from megatron_phf.train.export import export
from megatron_phf.train.logging import RunLogger, say
from megatron_phf.train.metrics import (
    PhaseTimer,
    StepMetrics,
    policy_lag,
    response_lengths,
    timing,
)
from megatron_phf.train.run_files import write_run_file
from megatron_phf.train.session import Session
from megatron_phf.train.step import Distiller
from megatron_phf.train.summary import aligned_example, run_summary


@dataclasses.dataclass(frozen=True)
class StepHooks:
    """What happens around the steps of a run.

    ``tokenizer``, ``show_example``: for the example that is shown at the first step;
    ``stop_ids``: what ends a response, where known; ``entered`` hears of every phase; after each
    step the run goes on as long as ``goes_on``.
    """

    tokenizer: Tokenizer | None = None
    show_example: bool = True
    stop_ids: tuple[int, ...] | None = None
    entered: Callable[[str], None] = lambda phase: None
    goes_on: Callable[[int], bool] = lambda iteration: True


def train_steps(
    distiller: Distiller,
    source: RolloutSource,
    logger: RunLogger,
    hooks: StepHooks,
    done: int = 0,
) -> list[StepMetrics]:
    """Run the steps after ``done`` up to ``train_iters`` (see ``Distiller.step``)."""
    history: list[StepMetrics] = []
    utilisation = Utilisation(distiller.config, distiller.arch)
    for iteration in range(done + 1, distiller.config.train.train_iters + 1):
        timer = PhaseTimer(lambda phase, i=iteration: hooks.entered(f"step {i}, {phase}"))  # type: ignore[misc]
        with timer.phase("rollout"):
            rollouts = source.rollouts(iteration)
        if not history and hooks.show_example:
            say(aligned_example(rollouts[0], hooks.tokenizer))
        metrics = distiller.step(iteration, rollouts, timer)
        extra = {
            **metrics.extra,
            **timing(timer, metrics.rollout_tokens),
            "mfu": utilisation.mfu(rollouts, timer.seconds["student"]),
            "rollout_lengths": response_lengths(rollouts, hooks.stop_ids),
            **policy_lag(iteration, rollouts),
            "nonfinite_steps": distiller.nonfinite.total,
        }
        metrics = dataclasses.replace(metrics, extra=extra)
        logger.step(iteration, metrics)
        history.append(metrics)
        hooks.entered(f"step {iteration}, save")
        if not hooks.goes_on(iteration):
            break
    return history


def _read_prompts(config: Config, arch: Architecture, directory: str) -> Prompts:
    tokenizer = load_tokenizer(config)
    stop_ids = stop_token_ids(tokenizer, directory)
    check_token_ids(tokenizer, stop_ids, common_vocab_size(arch, config))
    pairs = read_prompts(config, tokenizer)
    ends = {pairs[0].student_ids[-1], pairs[0].teacher_ids[-1]} & set(stop_ids)
    if ends:  # as some models' templates do
        name = tokenizer.decode(sorted(ends), skip_special_tokens=False)
        say(f"warning  prompts end with the stop token {name}; does the chat template mean that?")
    return Prompts(tokenizer, pairs, stop_ids)


def _recorded(source: RolloutSource, config: Config, done: int) -> RolloutSource:
    path = config.rollout.record_rollouts
    if path is None:
        return source
    return RecordingSource(source, path, done * config.train.global_batch_size)


@contextlib.contextmanager
def _evaluation(
    config: Config, arch: Architecture, student: list[FlowGPTModel], logger: RunLogger, done: int
) -> Iterator[Callable[[int], None]]:
    """What to call after each step: evaluates on --eval-data where it is time to."""
    path = config.evaluation.eval_data
    if path is None:
        yield lambda step: None
        return
    assert config.model.hf_model is not None
    tokenizer = load_tokenizer(config)
    stop_ids = stop_token_ids(tokenizer, config.model.hf_model)
    tests = read_test_set(path, "--eval-data", config, tokenizer)
    if tests.unknown is not None:
        say(f"warning  {tests.unknown}")
    room = arch.max_position_embeddings - tests.longest_prompt
    log = EvaluationLog(config.output.output_dir, done)
    with make_grader(config.evaluation.grader) as grader:
        yield Evaluator(
            config=config,
            engine=student_engine(config, arch, student),
            tokenizer=tokenizer,
            tests=tests,
            sampling=evaluation_sampling(config, stop_ids, room),
            grader=grader,
            log=log,
            report=logger.evaluation,
        ).after
    say(log.describe())


def train(config: Config, signals: StopSignals, heartbeat: Heartbeat) -> list[StepMetrics]:
    """Train the student of ``--hf-model`` and export it where asked; the steps' metrics."""
    directory = config.model.hf_model
    assert directory is not None
    arch = read_architecture(directory)
    replay = config.rollout.rollout_engine == "replay"
    say(run_summary(arch, config))
    prompts = None if replay else _read_prompts(config, arch, directory)
    context = RolloutContext(config, arch, prompts, lambda: load_student(arch, config, directory))
    source = make_source(context)  # what can be refused without weights is
    student = context.student
    distiller = make_distiller(arch, config, student)
    session = Session(config, distiller, signals)
    done = session.begin()
    write_run_file(config, arch, done)
    source = _recorded(source, config, done)
    logger = RunLogger(config, config.train.train_iters, done=done)
    with contextlib.closing(logger), _evaluation(config, arch, student, logger, done) as evaluate:

        def goes_on(iteration: int) -> bool:
            if not session.goes_on(iteration):
                return False
            if iteration < config.train.train_iters:  # the last save comes before the last one
                heartbeat.at(f"step {iteration}, evaluation")
                evaluate(iteration)
            return True

        hooks = StepHooks(
            None if prompts is None else prompts.tokenizer,
            stop_ids=None if prompts is None else prompts.stop_ids,
            entered=heartbeat.at,
            goes_on=goes_on,
        )
        evaluate(done)
        history = train_steps(distiller, source, logger, hooks, done)
        session.end(done + len(history))
        if not session.stopped:
            problem = export(student, arch, config, directory)
            evaluate(done + len(history))
            if problem is not None:
                raise ValueError(problem)
    return history
