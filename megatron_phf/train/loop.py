"""The training job on a HuggingFace model: from its files to the exported student."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

import torch
from safetensors.torch import save_file

from megatron_phf import device, parallel
from megatron_phf.config import Config
from megatron_phf.data.problems import FieldNames, read_problems
from megatron_phf.data.prompts import PromptPair, build_prompt_pairs, prompt_templates
from megatron_phf.data.tokenizer import (
    Tokenizer,
    check_token_ids,
    load_tokenizer,
    stop_token_ids,
)
from megatron_phf.model.adapter_io import load_peft_adapter, save_peft_adapter
from megatron_phf.model.architecture import Architecture, read_architecture
from megatron_phf.model.gpt import FlowGPTModel, build_model
from megatron_phf.model.hf_weights import load_hf_weights, save_hf
from megatron_phf.model.lora import add_adapters
from megatron_phf.model.sharded_weights import load_weights
from megatron_phf.model.teacher_architecture import common_vocab_size, read_teacher
from megatron_phf.rollout.megatron import MegatronRollouts
from megatron_phf.rollout.sampling import SamplingParams
from megatron_phf.rollout.vllm import VllmRollouts, WeightSync, connect
from megatron_phf.rollout.vllm_server import VllmServer
from megatron_phf.signals import StopSignals
from megatron_phf.teacher import make_teacher
from megatron_phf.train.checkpoint_files import converted_weights
from megatron_phf.train.heartbeat import Heartbeat
from megatron_phf.train.logging import RunLogger, say
from megatron_phf.train.metrics import PhaseTimer, StepMetrics
from megatron_phf.train.optimizer import StudentOptimizer
from megatron_phf.train.session import Session
from megatron_phf.train.source import (
    OnPolicySource,
    RecordingSource,
    ReplaySource,
    RolloutSource,
    ServedSource,
)
from megatron_phf.train.step import Distiller
from megatron_phf.train.summary import aligned_example, run_summary


def load_student(arch: Architecture, config: Config, directory: str) -> list[FlowGPTModel]:
    """This rank's part of the model in ``directory``, with adapters where the run trains some.

    A --load that tools/convert_checkpoint.py wrote gives the weights instead.
    """
    chunks = build_model(arch, config)
    converted = converted_weights(config.checkpoint.load)
    if converted is None:
        load_hf_weights(chunks, arch, config, directory)
    else:
        load_weights(chunks, converted)
    if config.lora.lora_rank:
        add_adapters(chunks, arch, config)
    if config.lora.lora_adapter is not None:
        load_peft_adapter(chunks, arch, config, config.lora.lora_adapter)
    return chunks


def make_distiller(arch: Architecture, config: Config, student: list[FlowGPTModel]) -> Distiller:
    """Teacher and optimizer around ``student``."""
    teacher = make_teacher(student, arch, config)
    return Distiller(config, arch, student, teacher, StudentOptimizer(student, config))


def sampling_params(config: Config, stop_ids: tuple[int, ...]) -> SamplingParams:
    """The rollouts' sampling."""
    rollout = config.rollout
    return SamplingParams(
        temperature=rollout.rollout_temperature,
        top_p=rollout.rollout_top_p,
        top_k=rollout.rollout_top_k,
        max_new_tokens=rollout.max_new_tokens,
        stop_ids=stop_ids,
        seed=config.train.seed,
    )


def read_prompts(config: Config, tokenizer: Tokenizer) -> list[PromptPair]:
    """The prompts of ``--data``; says how many were dropped for their length."""
    data = config.data
    assert data.data is not None
    fields = FieldNames(data.problem_field, data.solution_field, data.answer_field)
    problems = read_problems(data.data, fields)
    pairs, dropped = build_prompt_pairs(
        tokenizer,
        problems,
        prompt_templates(data),
        data.max_prompt_length,
        data.max_teacher_prompt_length,
        data.overlong_prompts,
    )
    say(f"data     {len(pairs)} problems from {data.data}, {dropped} dropped as too long")
    if not tokenizer.has_chat_template:
        say("prompts  the tokenizer has no chat template: plain text and a newline")
    return pairs


def train_steps(
    distiller: Distiller,
    source: RolloutSource,
    logger: RunLogger,
    tokenizer: Tokenizer | None = None,
    show_example: bool = True,
    done: int = 0,
    goes_on: Callable[[int], bool] = lambda iteration: True,
    entered: Callable[[str], None] = lambda phase: None,
) -> list[StepMetrics]:
    """Run the steps after ``done`` up to ``train_iters``, as long as ``goes_on`` after each.

    Each reads as the method does (see ``Distiller.step``); ``entered`` hears of every phase.
    """
    history: list[StepMetrics] = []
    for iteration in range(done + 1, distiller.config.train.train_iters + 1):
        timer = PhaseTimer(lambda phase, step=iteration: entered(f"step {step}, {phase}"))  # type: ignore[misc]
        with timer.phase("rollout"):
            rollouts = source.rollouts(iteration)
        if not history and show_example:
            say(aligned_example(rollouts[0], tokenizer))
        metrics = distiller.step(iteration, rollouts, timer)
        total = sum(timer.seconds.values())
        metrics = dataclasses.replace(
            metrics,
            extra={
                **metrics.extra,
                "seconds": timer.seconds,
                "tokens_per_second": metrics.rollout_tokens / total,
                "peak_memory_bytes": device.peak_memory_bytes(),
                "nonfinite_steps": distiller.nonfinite.total,
            },
        )
        logger.step(iteration, metrics)
        history.append(metrics)
        entered(f"step {iteration}, save")
        if not goes_on(iteration):
            break
    return history


@dataclasses.dataclass(frozen=True)
class _Prompts:
    """What on-policy rollouts start from and end at."""

    tokenizer: Tokenizer
    pairs: list[PromptPair]
    stop_ids: tuple[int, ...]


def _read_prompts(config: Config, arch: Architecture, directory: str) -> _Prompts:
    tokenizer = load_tokenizer(config)
    stop_ids = stop_token_ids(tokenizer, directory)
    check_token_ids(tokenizer, stop_ids, common_vocab_size(arch, config))
    return _Prompts(tokenizer, read_prompts(config, tokenizer), stop_ids)


def _make_source(
    config: Config,
    arch: Architecture,
    student: list[FlowGPTModel],
    prompts: _Prompts | None,
    servers: list[VllmServer] | None,
    done: int,
) -> RolloutSource:
    rollout = config.rollout
    vocab_size = common_vocab_size(arch, config)
    source: RolloutSource
    if prompts is None:
        assert rollout.replay_file is not None
        source = ReplaySource(rollout.replay_file, vocab_size, config)
    else:
        sampling = sampling_params(config, prompts.stop_ids)
        batch = config.train.global_batch_size
        teacher = read_teacher(arch, config) or arch
        positions = arch.max_position_embeddings, teacher.max_position_embeddings
        start = prompts.pairs, sampling, batch, *positions
        if servers is None:
            engine = MegatronRollouts(student, vocab_size, rollout.rollout_batch_size)
            source = OnPolicySource(engine, *start)
        else:
            sync = WeightSync(servers, student, arch, config)
            source = ServedSource(VllmRollouts(servers, sync, vocab_size, config), *start)
    if rollout.record_rollouts is not None:
        source = RecordingSource(
            source, rollout.record_rollouts, done * config.train.global_batch_size
        )
    return source


def _export(student: list[FlowGPTModel], arch: Architecture, config: Config, source: str) -> None:
    """Save the student, and what it computes: ``tools/check_export.py`` compares the two."""
    targets = [t for t in (config.lora.save_adapter, config.output.save_hf) if t is not None]
    if not targets:
        return
    if config.lora.save_adapter is not None:
        save_peft_adapter(student, arch, config, config.lora.save_adapter)
    if config.output.save_hf is not None:
        save_hf(student, arch, config, source, config.output.save_hf)
    tokens = torch.randint(arch.vocab_size, (4, 32), generator=torch.Generator().manual_seed(0))
    engine = MegatronRollouts(student, arch.vocab_size, len(tokens))
    logits = engine.next_token_logits(tokens).float().cpu()
    probe = os.path.join(config.output.output_dir, "export_probe.safetensors")
    if parallel.is_first_rank():
        save_file({"tokens": tokens, "logits": logits}, probe)
    for target in targets:
        check = f"python tools/check_export.py {target} {probe}"
        say(f"exported to {target}; compare its logits: {check}")


def train(config: Config, signals: StopSignals, heartbeat: Heartbeat) -> list[StepMetrics]:
    """Train the student of ``--hf-model`` and export it where asked; the steps' metrics."""
    directory = config.model.hf_model
    assert directory is not None
    arch = read_architecture(directory)
    replay = config.rollout.rollout_engine == "replay"
    say(run_summary(arch, config))
    prompts = None if replay else _read_prompts(config, arch, directory)
    servers = connect(config, arch) if config.rollout.rollout_engine == "vllm" else None
    student = load_student(arch, config, directory)
    distiller = make_distiller(arch, config, student)
    session = Session(config, distiller, signals)
    done = session.begin()
    source = _make_source(config, arch, student, prompts, servers, done)
    tokenizer = None if prompts is None else prompts.tokenizer
    logger = RunLogger(config, config.train.train_iters, done=done)
    try:
        history = train_steps(
            distiller, source, logger, tokenizer, True, done, session.goes_on, heartbeat.at
        )
        session.end(done + len(history))
    finally:
        logger.close()
    if not session.stopped:
        _export(student, arch, config, directory)
    return history
