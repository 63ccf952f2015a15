"""The models of a run: its student, and a teacher that is another (``--teacher-hf-model``).

Without torch: the checks before launch read it too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_phf.config.settings import Config
from megatron_phf.config.teachers import teacher_directories
from megatron_phf.data.vocabulary import read_vocabulary, vocabulary_file
from megatron_phf.hidden.layer_map import check_layer_map, relative_layer_map
from megatron_phf.hidden.spec import flow_spec, flow_weights
from megatron_phf.model.architecture import Architecture, check_split, read_architecture
from megatron_phf.teacher.traits import traits_of

TEACHER_FLAG = "--teacher-hf-model"
# Teachers that take turns may differ in how far they read, and in how they were made.
_FREE = ("max_position_embeddings", "initializer_range")


def flag_of_teacher(name: str) -> str:
    """What an error calls the flag that a teacher's directory was given with."""
    return f"{TEACHER_FLAG} {name}".rstrip()


def teacher_config(config: Config) -> Config:
    """The settings that the other model is built with: the run's, with its own split.

    Of several teachers: the first one's.
    """
    teacher = config.teacher
    return config.replaced(
        hf_model=next(iter(teacher_directories(config).values())),
        num_layers_in_first_pipeline_stage=teacher.teacher_num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=teacher.teacher_num_layers_in_last_pipeline_stage,
        account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
        recompute_granularity=None,
        max_prompt_length=config.data.max_teacher_prompt_length,
        eval_data=None,
        lora_rank=0,
        lora_adapter=None,
    )


@dataclass(frozen=True)
class Models:
    """The architectures of a run, read once (:func:`read_models`).

    ``other``: that of ``--teacher-hf-model`` (of all, where it names several), its vocabulary cut
    or padded to the student's: with equal rows, tensor-parallel ranks hold the same tokens of both
    heads.
    """

    student: Architecture
    other: Architecture | None = None

    @property
    def teacher(self) -> Architecture:
        """The other model's, or the student's own."""
        return self.other or self.student

    @property
    def vocab_size(self) -> int:
        """Token ids that both models have; a vocabulary may be padded beyond the tokenizer's."""
        stored = None if self.other is None else self.other.stored_vocab_size
        return min(self.student.vocab_size, stored or self.student.vocab_size)


def read_models(config: Config, student: Architecture | None = None) -> Models:
    """From the ``config.json`` of each model that the flags name; ``student``: where known.

    Raises:
        ValueError: as ``read_architecture``; names the flag.  Two teachers differ.
    """
    if student is None:
        assert config.model.hf_model is not None
        student = read_architecture(config.model.hf_model)
    directories = teacher_directories(config)
    if not directories:
        return Models(student)
    own, rows = _common_architecture(directories), student.vocab_size
    return Models(
        student, dataclasses.replace(own, vocab_size=rows, stored_vocab_size=own.vocab_size)
    )


def _common_architecture(directories: Mapping[str, str]) -> Architecture:
    """That of all teachers, which take one another's place in one model; the fewest positions."""
    found = {n: read_architecture(d, flag_of_teacher(n)) for n, d in directories.items()}
    (first, own), *others = found.items()
    positions = min(arch.max_position_embeddings for arch in found.values())
    for name, arch in others:
        differing = [
            f"{field} {value}, not {vars(own)[field]}"
            for field, value in vars(arch).items()
            if field not in _FREE and value != vars(own)[field]
        ]
        if differing:
            raise ValueError(
                f"{flag_of_teacher(name)} {directories[name]}: not the architecture of {first} "
                f"({'; '.join(differing)}), and teachers take turns in one model; name teachers of "
                "one architecture"
            )
    return dataclasses.replace(own, max_position_embeddings=positions)


def layer_map(config: Config, student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """The teacher layer of each student layer: ``--teacher-layer-map``, or by relative depth.

    Raises:
        ValueError: the map given is malformed or does not fit.
    """
    given = config.teacher.teacher_layer_map
    if given is None:
        return relative_layer_map(student_layers, teacher_layers)
    try:
        layers = tuple(int(word) for word in given.split(","))
    except ValueError as error:
        raise ValueError(
            f"--teacher-layer-map {given}: not layer numbers separated by commas, as 2,4,6,8"
        ) from error
    try:
        check_layer_map(layers, student_layers, teacher_layers)
    except ValueError as error:
        raise ValueError(f"--teacher-layer-map {given}: {error}") from error
    return layers


def check_tokenizers(student: str, teacher: str, common: int, required: bool) -> None:
    """Raise ValueError where the directories' tokenizers, of any form, give a token another id.

    ``common``: token ids that both models have; ``required``: whether a directory without a
    tokenizer is a mistake (a replay needs none).
    """
    first, second = vocabulary_file(student), vocabulary_file(teacher)
    if first is None or second is None:
        if required:
            raise ValueError(
                f"{TEACHER_FLAG} {teacher}: no tokenizer to compare with that of {student}; copy "
                "tokenizer.json, or vocab.json and merges.txt, to the one that lacks it"
            )
        return
    if first.endswith(".model") and second.endswith(".model") and _same_bytes(first, second):
        return  # of whatever form
    ours, theirs = read_vocabulary(first), read_vocabulary(second)
    for token in [*ours, *theirs]:
        if ours.get(token) != theirs.get(token):
            raise ValueError(
                f"{TEACHER_FLAG}: token {token!r} has id {theirs.get(token)} in {second} and "
                f"{ours.get(token)} in {first}; the teacher must have the student's tokenizer"
            )
    largest = max(ours.values(), default=0)
    if largest >= common:
        raise ValueError(
            f"{TEACHER_FLAG}: {first} gives token ids up to {largest}, but student and teacher "
            f"have embeddings for 0 to {common} - 1 only"
        )


def _same_bytes(first: str, second: str) -> bool:
    with open(first, "rb") as a, open(second, "rb") as b:
        return a.read() == b.read()


def check_teacher_flags(config: Config) -> None:
    """Raise ValueError for flags of a teacher that exclude each other, or need one another."""
    teacher = config.teacher
    kind, traits = config.method.teacher, traits_of(config)
    if teacher.teacher_offload and not traits.copy:
        raise ValueError(
            f"--teacher-offload: a {kind} teacher has no weights of its own; leave it out"
        )
    if config.lora.lora_rank and not traits.adapters:
        raise ValueError(f"--teacher {kind} has no form for adapters; leave out --lora-rank")
    if teacher.teacher_offload and config.lora.lora_rank and teacher.teacher_hf_model is None:
        raise ValueError(
            "--teacher-offload: with --lora-rank the teacher shares the student's weights; leave "
            f"it out, or name another model with {TEACHER_FLAG}"
        )
    if teacher.teacher_hf_model is None:
        return
    if traits.follows:
        raise ValueError(
            f"--teacher {kind} follows the student's weights; {TEACHER_FLAG} is "
            "another model: use --teacher frozen, or leave one of the two out"
        )
    several = len(teacher_directories(config)) > 1
    if several and config.train.micro_batch_size > 1:
        raise ValueError(
            f"--micro-batch-size {config.train.micro_batch_size}: a microbatch has one teacher, "
            f"and {TEACHER_FLAG} names several; use 1, or --max-tokens-per-microbatch"
        )


def check_models(models: Models, config: Config, tokenizers: bool = True) -> None:
    """Raise ValueError where student, teacher and flow loss do not fit the layout or one another.

    ``tokenizers``: whether a model without one is a mistake.
    """
    own = config
    if models.other is not None:  # the long prompt is the other model's
        own = config.replaced(max_teacher_prompt_length=config.data.max_prompt_length)
    check_split(models.student, own)
    _check_teacher(models, config, tokenizers)
    layers, spec = models.student.num_layers, flow_spec(config)
    terms = f"--phf-terms {config.method.phf_terms}, --phf-layers"
    try:
        equal_widths = models.teacher.hidden_size == models.student.hidden_size
        weights = flow_weights(layers, spec, equal_widths)
    except ValueError as error:
        raise ValueError(f"{terms}: {error}") from error
    if config.method.opsd_weight == 0 and not any(map(any, weights.values())):
        raise ValueError(
            f"{terms}: every term has weight 0 or no layers to compare, and with --opsd-weight 0 "
            "nothing is trained on; change one of them"
        )


def _check_teacher(models: Models, config: Config, tokenizers: bool) -> None:
    """Raise ValueError where the other model does not fit the student or the layout."""
    if models.other is None:
        return
    directories = teacher_directories(config)
    experts = config.parallel.expert_model_parallel_size
    assert config.model.hf_model is not None
    if len(directories) > 1 and models.other.experts and experts > 1:
        raise ValueError(
            f"{TEACHER_FLAG}: several teachers with experts need --expert-model-parallel-size 1: "
            "ranks that share out experts would have other teachers at the same time"
        )
    try:
        check_split(models.other, teacher_config(config))
    except ValueError as error:
        raise ValueError(
            f"{TEACHER_FLAG} {config.teacher.teacher_hf_model}: {error} (of the teacher: "
            "--teacher-num-layers-in-first-pipeline-stage and its sibling)"
        ) from error
    layer_map(config, models.student.num_layers, models.other.num_layers)
    for directory in directories.values():
        check_tokenizers(config.model.hf_model, directory, models.vocab_size, tokenizers)
