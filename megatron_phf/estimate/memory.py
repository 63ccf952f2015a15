"""What training keeps on a rank, by formula: the start-up summary's lines and the planner's.

No import of torch: ``tools/plan.py`` asks without one.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_phf.config.settings import Config
from megatron_phf.hidden.spec import flow_spec, terms_of
from megatron_phf.lora.config import num_adapter_parameters
from megatron_phf.model.architecture import Architecture
from megatron_phf.teacher.architecture import Models

_GIB = 2**30
# What the output loss works on at a time beside a chunk's logits, fp32: see losses/chunked.py.
_BLOCK_ENTRIES = {True: 11 * 2**22, False: 11 * 2**20}
# Tensors of [transitions, hidden] in fp32 that the flow loss keeps of a layer for its backward.
_FLOW_TENSORS = 4


@dataclass(frozen=True)
class Machine:
    """``width``: bytes of a weight; ``replicas``: data-parallel ranks.

    Without ``cuda`` norms and SwiGLU are not fused and keep more.
    """

    width: int
    replicas: int
    cuda: bool = True


def _model_split(config: Config) -> int:
    p = config.parallel
    return p.tensor_model_parallel_size * p.pipeline_model_parallel_size


def _local_weights(arch: Architecture, config: Config) -> float:
    """Weights of one rank: experts are split over ETP and EP, all else over TP."""
    whole, experts, p = arch.num_parameters(), arch.num_expert_parameters(), config.parallel
    split = p.expert_tensor_size * p.expert_model_parallel_size * p.pipeline_model_parallel_size
    return (whole - experts) / _model_split(config) + experts / split


def _trained(arch: Architecture, config: Config, machine: Machine) -> tuple[float, float]:
    """(trained parameters of one rank, those whose optimizer state it keeps)."""
    split, lora = _model_split(config), config.lora
    whole = num_adapter_parameters(arch, lora) if lora.lora_rank else arch.num_parameters()
    local = whole / split if lora.lora_rank else _local_weights(arch, config)
    if not config.parallel.use_distributed_optimizer:
        return local, local
    # Experts are split over what EP leaves of the replicas: in sum each is kept once.
    replicas = machine.replicas * config.parallel.context_parallel_size
    return local, whole / split / replicas


def _teacher_bytes(models: Models, config: Config, machine: Machine) -> float:
    width, kind, arch = machine.width, config.method.teacher, models.student
    if models.other is not None:
        return _local_weights(models.other, config) * width
    if kind == "live":
        return 0
    if config.lora.lora_rank:
        return _trained(arch, config, machine)[0] * 4 if kind == "ema" else 0
    average = 4 if kind == "ema" and width != 4 else 0  # an fp32 copy is its own average
    return _local_weights(arch, config) * (width + average)


def _target_bytes(models: Models, config: Config, machine: Machine) -> float:
    method, new_tokens, arch = config.method, config.rollout.max_new_tokens, models.student
    hidden = models.teacher.hidden_size
    sequences = config.train.global_batch_size / machine.replicas
    rows = sequences * new_tokens * hidden * machine.width
    if method.phf_alpha == 0:
        return rows
    transitions = min(method.phf_window_size, new_tokens) - 1
    layers = arch.num_layers / config.parallel.pipeline_model_parallel_size + 1
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


def memory_estimate(models: Models, config: Config, machine: Machine) -> dict[str, float]:
    """GiB a rank, by formula: what training keeps, without activations and temporary buffers.

    Weights are split over TP x PP, those of experts over EP too.  Gradients are fp32; Adam keeps
    two fp32 moments and, for bf16 weights, an fp32 copy, all three split over DP x CP (those of
    experts over what EP leaves of it) with the distributed optimizer.  With LoRA only the adapters
    have gradients and optimizer state, and an EMA teacher is one more set of them.  ``targets``:
    fp32 teacher directions of a full window, for each sequence of the local batch and each local
    layer (products of the window's length where they are smaller and enough), and the teacher's
    final hidden states of as many new tokens as allowed.
    """
    width, arch = machine.width, models.student
    trained, optimized = _trained(arch, config, machine)
    adapters = trained if config.lora.lora_rank else 0
    moments = 8 if width == 4 else 12
    teacher_key = "teacher in its pass" if config.teacher.teacher_offload else "teacher"
    sizes = {
        "weights": (_local_weights(arch, config) + adapters) * width,
        "gradients": trained * 4,
        "optimizer": optimized * moments,
        teacher_key: _teacher_bytes(models, config, machine),
        "targets": _target_bytes(models, config, machine),
    }
    return {name: size / _GIB for name, size in sizes.items()}


def _layer_numbers(arch: Architecture, config: Config, cuda: bool) -> tuple[float, float]:
    """Numbers a token that one layer keeps for backward: (all, its input alone)."""
    p = config.parallel
    tp = p.tensor_model_parallel_size
    stream = arch.hidden_size / (tp if p.sequence_parallel else 1)
    groups = arch.padded_groups(tp)
    queries = groups * (arch.num_attention_heads // arch.num_query_groups) * arch.kv_channels / tp
    keys = groups * arch.kv_channels / tp
    # A norm's input and output; where it is not one kernel, the scaled input in between too.
    norm = 2 * stream if cuda else 3 * stream
    # q, k, v as one tensor; rotated q and k; the attention's output.
    attention = (queries + 2 * keys) + (queries + keys) + queries
    if arch.qk_layernorm:  # reads q from a tensor of its own
        attention += queries if cuda else 2 * queries + keys
    # gate and up as one tensor, their product; without a fused kernel silu(gate) and a copy of up.
    ffn = 3 if cuda else 5
    if arch.experts is None:
        mlp = ffn * arch.ffn_hidden_size / tp
    else:
        expert = (ffn + 1) * arch.experts.ffn_hidden_size / tp + 2 * arch.hidden_size / tp
        mlp = arch.experts.per_token * expert
    return 2 * norm + attention + mlp, stream


def _flow_bytes(arch: Architecture, config: Config) -> float:
    """What the flow loss of one microbatch keeps of the local layers."""
    method = config.method
    if method.phf_alpha == 0:
        return 0.0
    transitions = min(method.phf_window_size, config.rollout.max_new_tokens) - 1
    layers = arch.num_layers / config.parallel.pipeline_model_parallel_size + 1
    rows = config.train.micro_batch_size * transitions
    return _FLOW_TENSORS * layers * rows * arch.hidden_size * 4


def activation_bytes(arch: Architecture, config: Config, machine: Machine, tokens: int) -> float:
    """What the first pipeline stage keeps of its microbatches of ``tokens`` padded tokens each.

    1F1B: as many microbatches are under way there as there are stages.  With full recompute a layer
    keeps its input, and one layer is computed again at a time; attention keeps no scores (fused).
    """
    p = config.parallel
    everything, kept = _layer_numbers(arch, config, machine.cuda)
    layers = arch.num_layers / p.pipeline_model_parallel_size
    local = config.train.global_batch_size / machine.replicas / config.train.micro_batch_size
    under_way = min(p.pipeline_model_parallel_size, max(1, local))
    part = tokens / p.context_parallel_size * machine.width
    flow = under_way * _flow_bytes(arch, config)
    if p.recompute_granularity == "full":
        return (under_way * layers * kept + everything) * part + flow
    return under_way * layers * everything * part + flow


def output_loss_bytes(arch: Architecture, config: Config, machine: Machine) -> float:
    """Temporaries of the output loss on the last stage.

    A chunk's logits of both models, blocks, the head's fp32 gradient before it joins the others.
    """
    tp = config.parallel.tensor_model_parallel_size
    entries = arch.padded_vocab_size(config.model.make_vocab_size_divisible_by, tp) / tp
    chunk = config.method.logits_chunk_tokens
    logits = 2 * chunk * entries * machine.width
    blocks = min(_BLOCK_ENTRIES[machine.cuda], 11 * chunk * entries) * 4
    head = 0.0 if config.lora.lora_rank else entries * arch.hidden_size * 4
    return logits + blocks + head


def kv_cache_bytes(arch: Architecture, config: Config, machine: Machine) -> float:
    """Keys and values of one batch of rollouts on a rank."""
    p, r = config.parallel, config.rollout
    groups = arch.padded_groups(p.tensor_model_parallel_size) / p.tensor_model_parallel_size
    length = config.data.max_prompt_length + r.max_new_tokens
    layers = arch.num_layers / p.pipeline_model_parallel_size
    rows = min(r.rollout_batch_size, config.train.global_batch_size / machine.replicas)
    return rows * length * layers * 2 * groups * arch.kv_channels * machine.width


def peak_estimate(
    models: Models, config: Config, machine: Machine, tokens: int
) -> dict[str, float]:
    """GiB a rank at the peak of a step with microbatches of ``tokens`` padded tokens.

    The parts of :func:`memory_estimate`, and the larger of the rollouts' cache and of what the
    student's pass needs (activations, output loss): they are never there together.
    """
    parts, arch = memory_estimate(models, config, machine), models.student
    activations = activation_bytes(arch, config, machine, tokens) / _GIB
    loss = output_loss_bytes(arch, config, machine) / _GIB
    cache = kv_cache_bytes(arch, config, machine) / _GIB
    if cache > activations + loss:
        return {**parts, "kv cache": cache}
    return {**parts, "activations": activations, "output loss": loss}
