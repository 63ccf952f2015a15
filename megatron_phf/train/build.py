"""What a training job is made of, from its configuration: student, distiller, prompts."""

from __future__ import annotations

from megatron_phf.config.settings import Config
from megatron_phf.data.privileged import TeacherView, parse_privileged, training_problems
from megatron_phf.data.prompts import PromptPair, build_prompt_pairs, fill, prompt_templates
from megatron_phf.data.tokenizer import (
    Tokenizer,
    check_token_ids,
    load_tokenizer,
    stop_token_ids,
)
from megatron_phf.data.unknown import unknown_tokens
from megatron_phf.lora.files import load_peft_adapter
from megatron_phf.lora.linears import add_adapters
from megatron_phf.model.architecture import Architecture
from megatron_phf.model.gpt import FlowGPTModel, build_model
from megatron_phf.rollout.context import Prompts
from megatron_phf.teacher.architecture import Models
from megatron_phf.teacher.kinds import make_teacher
from megatron_phf.train.checkpoint_files import converted_weights
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


def make_prompts(config: Config, models: Models) -> Prompts:
    """Those of ``--data``, with the tokenizer that made them and what ends a response."""
    directory = config.model.hf_model
    assert directory is not None
    tokenizer = load_tokenizer(config)
    stop_ids = stop_token_ids(tokenizer, directory)
    check_token_ids(tokenizer, stop_ids, models.vocab_size)
    pairs = read_prompts(config, tokenizer)
    ends = {pairs[0].student_ids[-1], pairs[0].teacher_ids[-1]} & set(stop_ids)
    if ends:  # as some models' templates do
        name = tokenizer.decode(sorted(ends), skip_special_tokens=False)
        say(f"warning  prompts end with the stop token {name}; does the chat template mean that?")
    return Prompts(tokenizer, pairs, stop_ids)


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
    )
    say(f"data     {len(pairs)} problems from {data.data}, {dropped} dropped as too long")
    if not tokenizer.has_chat_template:
        say("prompts  the tokenizer has no chat template: plain text and a newline")
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
