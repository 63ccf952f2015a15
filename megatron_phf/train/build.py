"""What a training job is made of, from its configuration: student, distiller, prompts."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from datetime import datetime

import torch.distributed as dist

from megatron_phf.config.settings import Config
from megatron_phf.data.privileged import TeacherView, parse_privileged, training_problems
from megatron_phf.data.problems import Problem
from megatron_phf.data.prompts import Encode, PromptPair, build_prompt_pairs, fill, prompt_templates
from megatron_phf.data.stop_tokens import (
    check_token_ids,
    prompts_digest,
    stop_token_ids,
    template_notes,
)
from megatron_phf.data.tokenizer import Tokenizer, load_tokenizer
from megatron_phf.data.unknown import unknown_tokens
from megatron_phf.lora.files import load_peft_adapter
from megatron_phf.lora.linears import add_adapters
from megatron_phf.model.architecture import Architecture
from megatron_phf.model.gpt import FlowGPTModel, build_model
from megatron_phf.rollout.context import Prompts
from megatron_phf.runtime import parallel
from megatron_phf.runtime.together import on_every_rank, on_first_rank
from megatron_phf.teacher.architecture import Models
from megatron_phf.teacher.kinds import make_teacher
from megatron_phf.train.checkpoint_files import converted_weights, recorded_rendering
from megatron_phf.train.logging import say
from megatron_phf.train.optimizer import StudentOptimizer
from megatron_phf.train.step import Distiller
from megatron_phf.weights.huggingface import load_hf_weights
from megatron_phf.weights.sharded import load_weights


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
        load_peft_adapter(chunks, config.lora.lora_adapter)
    return chunks


def make_distiller(models: Models, config: Config, student: list[FlowGPTModel]) -> Distiller:
    """Teacher and optimizer around ``student``."""
    teacher = make_teacher(student, models, config)
    return Distiller(config, models, student, teacher, StudentOptimizer(student, config))


def run_moment(load: str | None) -> datetime:
    """What chat templates read as now: rank 0's clock, or as the run in ``load`` had it."""

    def choose() -> str:
        recorded = {} if load is None else recorded_rendering(load)
        return str(recorded.get("moment") or datetime.now().isoformat())

    return datetime.fromisoformat(on_first_rank(choose))


def job_tokenizer(
    config: Config, vocab_size: int, moment: datetime
) -> tuple[Tokenizer, tuple[int, ...], dict[str, str]]:
    """The tokenizer, its stop tokens, and what a checkpoint records of how it makes prompts.

    Says what its chat template does.

    Raises:
        ValueError: it does not fit the model, or makes other prompts on another rank.
    """
    directory = config.model.hf_model
    assert directory is not None
    tokenizer = on_every_rank(load_tokenizer, config, moment)
    stop_ids = stop_token_ids(tokenizer, directory)
    check_token_ids(tokenizer, stop_ids, vocab_size)
    digests = parallel.gather_objects(on_every_rank(prompts_digest, tokenizer))
    if len(set(digests)) > 1:
        raise ValueError(
            f"{tokenizer.source}: ranks make different prompts of one message; its chat template, "
            "or its code, must depend on the message alone"
        )
    for note in template_notes(tokenizer, stop_ids):
        say(note)
    if tokenizer.says_the_date:
        say(f"prompts  the chat template reads {moment:%d %B %Y} as today, in the whole run")
    return tokenizer, stop_ids, {"moment": moment.isoformat(), "prompts_sha256": digests[0]}


def make_prompts(config: Config, tokenizer: Tokenizer, stop_ids: tuple[int, ...]) -> Prompts:
    """Those of ``--data``, with the tokenizer that made them and what ends a response."""
    pairs = read_prompts(config, tokenizer)
    ends = {pairs[0].student_ids[-1], pairs[0].teacher_ids[-1]} & set(stop_ids)
    if ends:  # as some models' templates do
        name = tokenizer.decode(sorted(ends), skip_special_tokens=False)
        say(f"warning  prompts end with the stop token {name}; does the chat template mean that?")
    return Prompts(tokenizer, pairs, stop_ids)


def in_shares(make: Encode, problems: Sequence[Problem]) -> list[list[int]]:
    """What ``make`` gives for all problems: each rank makes a share of it."""
    if not dist.is_initialized():
        return make(problems)
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = on_every_rank(make, problems[rank::world])
    whole: list[list[int]] = [[]] * len(problems)
    for first, share in enumerate(parallel.gather_objects([array("i", ids) for ids in mine])):
        whole[first::world] = [ids.tolist() for ids in share]
    return whole


def read_prompts(config: Config, tokenizer: Tokenizer) -> list[PromptPair]:
    """The prompts of ``--data``; says how many were dropped for their length."""
    data = config.data
    problems, templates = training_problems(config), prompt_templates(data)
    view = TeacherView(config, problems, tokenizer)
    pairs, dropped = build_prompt_pairs(
        tokenizer,
        problems,
        templates,
        data.max_prompt_length,
        data.max_teacher_prompt_length,
        data.overlong_prompts,
        view,
        in_shares,
    )
    say(f"data     {len(pairs)} problems from {data.data}, {dropped} dropped as too long")
    if data.privileged != "solution":
        say(f"teacher  is shown {parse_privileged(data.privileged).kind.says}: {data.privileged}")
    messages = (
        fill(template, shown)
        for p in pairs
        for template, shown in (
            (templates.student, p.problem),
            (templates.teacher, view.of(p.problem)),
        )
    )
    prompts = [ids for pair in pairs for ids in (pair.student_ids, pair.teacher_ids)]
    unknown = unknown_tokens(tokenizer, messages, prompts)
    if unknown is not None:
        say(f"warning  --data {data.data}: {unknown}")
    return pairs
