"""What the passes of a step keep and need for a moment, by formula.  No import of torch.

Held against the simulation (``python tools/dry_run.py``) by tests/simulate.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_phf.config.settings import Config
from megatron_phf.estimate.layer import (
    Machine,
    context_numbers,
    layer_numbers,
    momentary_numbers,
    widths,
)
from megatron_phf.estimate.stage import layers_of_stages
from megatron_phf.hidden.spec import flow_spec, terms_of
from megatron_phf.model.architecture import Architecture
from megatron_phf.teacher.architecture import Models

# fp32 numbers of one block of the output loss on CUDA and on a CPU (losses/chunked.py), and how
# many tensors of a block there are: fewer where the vocabulary is split.
_BLOCK_ENTRIES = {True: 2**25, False: 2**20}
_BLOCKS, _BLOCKS_SPLIT = 8, 6
# Tensors of [transitions, hidden] in fp32 that the flow loss keeps of a layer for its backward.
_FLOW_TENSORS = 3


@dataclass(frozen=True)
class Microbatch:
    """Padded tokens of the student's and the teacher's rows, sequences in them, tokens scored."""

    student: float
    teacher: float
    sequences: int
    scored: int


def microbatch(config: Config, tokens: int) -> Microbatch:
    """The largest one, of ``tokens`` padded tokens of the student."""
    data, new = config.data, config.rollout.max_new_tokens
    student, teacher = data.max_prompt_length + new, data.max_teacher_prompt_length + new
    sequences = max(1, round(tokens / student))
    return Microbatch(tokens, max(tokens, sequences * teacher), sequences, sequences * new)


def flow_bytes(arch: Architecture, config: Config, layers: int, sequences: int) -> float:
    """What the flow loss of one microbatch keeps of ``layers``."""
    method = config.method
    if method.phf_alpha == 0:
        return 0.0
    transitions = min(method.phf_window_size, config.rollout.max_new_tokens) - 1
    return _FLOW_TENSORS * (layers + 1) * sequences * transitions * arch.hidden_size * 4


def activation_bytes(
    arch: Architecture, config: Config, machine: Machine, batch: Microbatch, stage: int
) -> tuple[float, float]:
    """(what a stage keeps of the student's pass, what it needs beside it for a moment).

    1F1B: the first stage has as many microbatches under way as there are stages, the last one.
    With full recompute a layer keeps its input, and one layer is computed again at a time;
    attention keeps no scores (fused).
    """
    p = config.parallel
    everything = layer_numbers(arch, config, machine, batch.sequences)
    stream = widths(arch, config)[0]
    layers = layers_of_stages(arch.num_layers, p)[stage]
    under_way = _under_way(config, machine, batch, stage)
    part = batch.student / p.context_parallel_size * machine.width
    momentary = momentary_numbers(arch, config) * part
    ends = stream * part  # the embedding's output, or what came from the stage before
    ends += stream * part if stage == p.pipeline_model_parallel_size - 1 else 0  # the last norm's
    flow = flow_bytes(arch, config, layers, batch.sequences)
    if p.recompute_granularity == "full":
        kept = layers * stream * part + ends
        return under_way * (kept + flow), everything * part + momentary
    return under_way * (layers * everything * part + ends + flow), momentary


def _under_way(config: Config, machine: Machine, batch: Microbatch, stage: int) -> float:
    """Microbatches whose activations a stage holds at a time.

    Interleaved (arXiv:2104.04473): of v chunks each, 2 (p - stage - 1) + (v - 1) p + 1 of them.
    """
    p = config.parallel
    local = config.train.global_batch_size / machine.replicas / batch.sequences
    size, virtual = p.pipeline_model_parallel_size, p.num_virtual_stages_per_pipeline_rank
    if virtual == 1:
        return min(size - stage, max(1.0, local))
    chunks = 2 * (size - stage - 1) + (virtual - 1) * size + 1
    return min(chunks, max(1.0, local) * virtual) / virtual


def output_loss_bytes(
    arch: Architecture, config: Config, machine: Machine, batch: Microbatch
) -> float:
    """What the output loss of one microbatch needs on the last stage.

    The head's fp32 gradient; of both models' rows and the gradient of the student's; and either
    a chunk's logits and blocks, or its logits and a block of what they add to the head's gradient
    (losses/chunked.py).
    """
    tp = config.parallel.tensor_model_parallel_size
    entries = arch.padded_vocab_size(config.model.make_vocab_size_divisible_by, tp) / tp
    chunk = min(config.method.logits_chunk_tokens, batch.scored)
    logits = chunk * entries * machine.width
    count = -(-chunk * entries // _BLOCK_ENTRIES[machine.cuda])
    blocks = (_BLOCKS if tp == 1 else _BLOCKS_SPLIT) * chunk * entries / count * 4
    rows = 3 * batch.scored * arch.hidden_size * machine.width
    if config.lora.lora_rank:
        return rows + 2 * logits + blocks
    head = entries * arch.hidden_size * 4
    added = min(head, _BLOCK_ENTRIES[machine.cuda] * 4) if machine.width < 4 else 0.0
    return head + rows + max(2 * logits + blocks, logits + added)


def teacher_pass_bytes(
    models: Models, config: Config, machine: Machine, batch: Microbatch
) -> float:
    """What a layer of the teacher's pass needs for a moment: nothing is kept."""
    teacher = models.teacher
    part = batch.teacher / config.parallel.context_parallel_size * machine.width
    more = 2 * widths(teacher, config)[0] + context_numbers(teacher, config)
    return (momentary_numbers(teacher, config) + more) * part


def target_bytes(
    models: Models, config: Config, machine: Machine, batch: Microbatch, stage: int
) -> float:
    """Teacher's directions of a full window for each local layer, and, on the last stage, rows.

    Products of the window's length where they are smaller and enough; rows are its final hidden
    states of as many new tokens as allowed.
    """
    method, p, arch = config.method, config.parallel, models.student
    hidden = models.teacher.hidden_size
    sequences = config.train.global_batch_size / machine.replicas
    rows = 0.0
    if stage == p.pipeline_model_parallel_size - 1:
        rows = sequences * config.rollout.max_new_tokens * hidden * machine.width
    if method.phf_alpha == 0:
        return rows
    transitions = min(method.phf_window_size, config.rollout.max_new_tokens) - 1
    layers = layers_of_stages(arch.num_layers, p)[stage] + (1 if stage else 0)
    numbers = hidden if hidden == arch.hidden_size else min(hidden, 2 * transitions)
    own = sequences * transitions * layers * numbers * 4
    return rows + own + last_layer_bytes(models, config, sequences)


def last_layer_bytes(models: Models, config: Config, sequences: float) -> float:
    """The teacher's last layer at the window, where every layer is compared with it.

    fp32, on each pipeline stage; the last one sends as much to each of the others once a step.
    """
    method, width = config.method, models.teacher.hidden_size
    if method.phf_alpha == 0:
        return 0.0
    terms = terms_of(flow_spec(config), width == models.student.hidden_size)
    kinds = {term.states for term in terms if term.against == "last"}
    rows = min(method.phf_window_size, config.rollout.max_new_tokens)
    return len(kinds) * sequences * rows * width * 4.0
