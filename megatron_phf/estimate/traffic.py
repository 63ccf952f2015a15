"""Bytes that a rank sends in one training step, by formula: for the planner.

No import of torch.  A ring's costs: of a tensor of A bytes in all, each of n ranks sends
A (n - 1) / n to gather it, or to reduce and scatter it, and twice that to reduce it for everyone.
"""

from __future__ import annotations

from megatron_phf.config.settings import Config
from megatron_phf.estimate.activations import last_layer_bytes
from megatron_phf.lora.config import num_adapter_parameters
from megatron_phf.model.architecture import Architecture
from megatron_phf.teacher.architecture import Models

_WIDTH, _GRADIENT = 2, 4  # bytes: bf16, fp32 (gradients, sums over ETP)


def _ring(size: int) -> float:
    return (size - 1) / size


def _forwards(config: Config) -> int:
    """Forward passes: the student's, the teacher's, and the student's again where recomputed."""
    return 3 if config.parallel.recompute_granularity == "full" else 2


def tensor_bytes(arch: Architecture, config: Config, activation: float) -> float:
    """TP: each half of a layer gathers its input and scatters its output, forward and backward.

    Without SP it reduces the output instead: as many bytes.  With SP the backward pass of a weight
    that is trained gathers the input once more.  A mixture of experts is no such half.
    """
    p = config.parallel
    again = p.sequence_parallel and not config.lora.lora_rank
    halves = 2 if arch.experts is None else 1
    times = 2 * _forwards(config) + 2 + again
    layers = arch.num_layers / p.pipeline_model_parallel_size
    return halves * times * layers * activation * _ring(p.tensor_model_parallel_size)


def expert_bytes(arch: Architecture, config: Config, activation: float) -> tuple[float, float]:
    """(EP's all-to-all, ETP's gathers and scatters) of the tokens that are routed.

    To the experts and back, forward and backward; between the two ETP gathers what its ranks
    received, and scatters their sums, these in the fp32 of the routing weights.
    """
    p = config.parallel
    if arch.experts is None:
        return 0.0, 0.0
    routed = arch.experts.per_token * activation / p.tensor_model_parallel_size
    layers = arch.num_layers / p.pipeline_model_parallel_size
    both_ways = 2 * (_forwards(config) + 1) * layers * routed
    gathered = (_WIDTH + _GRADIENT) / (2 * _WIDTH) * both_ways * (p.expert_tensor_size - 1)
    return both_ways * _ring(p.expert_model_parallel_size), gathered


def data_bytes(arch: Architecture, config: Config, replicas: int) -> float:
    """DP with the distributed optimizer: gradients in fp32, weights back in bf16.

    Those of an expert go over the ranks that have it too.
    """
    p, lora = config.parallel, config.lora
    pp, tp = p.pipeline_model_parallel_size, p.tensor_model_parallel_size
    experts = 0 if lora.lora_rank else arch.num_expert_parameters()
    whole = num_adapter_parameters(arch, lora) if lora.lora_rank else arch.num_parameters()
    cut = p.expert_tensor_size * p.expert_model_parallel_size
    numbers = (whole - experts) / (tp * pp) * _ring(replicas)
    if experts:
        numbers += experts / (cut * pp) * _ring(max(1, replicas * tp // cut))
    return numbers * (_GRADIENT + _WIDTH)


def traffic(arch: Architecture, config: Config, replicas: int, tokens: int) -> dict[str, float]:
    """Bytes that a rank sends in one step with ``tokens`` of each model on its replica.

    PP: one activation over a boundary and its gradient, and the teacher's (the last stage: also its
    targets, where all layers are compared with the last).
    """
    p = config.parallel
    activation = tokens * arch.hidden_size * _WIDTH
    stages = p.pipeline_model_parallel_size
    shared = p.tensor_model_parallel_size if p.sequence_parallel else 1
    boundaries = 3 * p.num_virtual_stages_per_pipeline_rank if stages > 1 else 0
    sequences = config.train.global_batch_size // replicas
    targets = (stages - 1) * last_layer_bytes(Models(arch), config, sequences)
    routed, gathered = expert_bytes(arch, config, activation)
    return {
        "tensor": tensor_bytes(arch, config, activation),
        "pipeline": boundaries * activation / shared + targets,
        "data": data_bytes(arch, config, replicas),
        "experts": routed,
        "expert tensor": gathered,
    }
