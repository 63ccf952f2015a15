"""What each pipeline stage holds of a model: its layers, its parameters.  No import of torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_phf.config.settings import Config, ParallelConfig
from megatron_phf.lora.config import hf_shape, target_modules
from megatron_phf.model.architecture import Architecture

_ROW_PARALLEL = ("o_proj", "down_proj")


def layers_of_stages(num_layers: int, parallel: ParallelConfig) -> list[int]:
    """Layers of each pipeline stage, as megatron-core deals them out (virtual stages together)."""
    size = parallel.pipeline_model_parallel_size
    ends = {
        0: parallel.num_layers_in_first_pipeline_stage,
        size - 1: parallel.num_layers_in_last_pipeline_stage,
    }
    given = {stage: n for stage, n in ends.items() if n is not None}
    embedding = parallel.account_for_embedding_in_pipeline_split
    loss = parallel.account_for_loss_in_pipeline_split
    rest = num_layers - sum(given.values()) + embedding + loss
    each = rest // max(1, size - len(given))
    stages = [given.get(stage, each) for stage in range(size)]
    stages[0] -= embedding
    stages[-1] -= loss
    return stages


@dataclass(frozen=True)
class StageParameters:
    """Parameters of one rank: ``dense`` of its layers and norms, ``experts``, embedding, head."""

    dense: float
    experts: float
    embedding: float
    head: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.dense + self.experts + self.embedding + self.head


def stage_parameters(arch: Architecture, config: Config, stage: int) -> StageParameters:
    """Of a rank of pipeline stage ``stage``, padding included.

    The first stage has the whole embedding and the last the whole head, each split over TP alone;
    tied, the last of several has a copy of the embedding.
    """
    p = config.parallel
    tp, last = p.tensor_model_parallel_size, p.pipeline_model_parallel_size - 1
    layers = layers_of_stages(arch.num_layers, p)[stage]
    rows = arch.padded_vocab_size(config.model.make_vocab_size_divisible_by, tp) / tp
    table = rows * arch.hidden_size
    experts = 0.0
    if arch.experts is not None:
        expert = 3 * arch.hidden_size * arch.experts.ffn_hidden_size / p.expert_tensor_size
        experts = layers * expert * arch.experts.count / p.expert_model_parallel_size
    own_head = stage == last and not (arch.tie_word_embeddings and last == 0)
    dense = layers * arch.layer_parameters(tp) + (arch.hidden_size if stage == last else 0)
    return StageParameters(dense, experts, table if stage == 0 else 0.0, table if own_head else 0.0)


def adapter_parameters(arch: Architecture, config: Config, stage: int) -> float:
    """Of a rank of ``stage``: one of an adapter's two matrices is whole on every TP rank."""
    tp, total = config.parallel.tensor_model_parallel_size, 0.0
    for target in target_modules(config.lora):
        rows, columns = hf_shape(target, arch, arch.padded_groups(tp))
        if target in _ROW_PARALLEL:
            columns //= tp
        else:
            rows //= tp
        total += rows + columns
    return layers_of_stages(arch.num_layers, config.parallel)[stage] * config.lora.lora_rank * total
