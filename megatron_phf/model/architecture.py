"""What a HuggingFace ``config.json`` says about a model; refuses what Megatron would get wrong.

Plain JSON, no import of torch or transformers: the checks before launch read it too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_phf.config.settings import Config, ParallelConfig, flag_of
from megatron_phf.data.microbatches import round_up
from megatron_phf.files.foreign import Fields, read_json_object
from megatron_phf.model.experts import Experts, read_experts
from megatron_phf.model.families import FAMILIES, Family, family_of
from megatron_phf.model.rope import Rope, read_rope


@dataclass(frozen=True)
class Architecture:
    """The shape of a decoder; sizes are the whole model's, before any parallel split."""

    model_type: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    layernorm_epsilon: float
    rope: Rope
    tie_word_embeddings: bool
    initializer_range: float
    # Vocabulary rows on disk, where they are cut or padded to ``vocab_size`` (another teacher).
    stored_vocab_size: int | None = None
    experts: Experts | None = None

    @property
    def family(self) -> Family:
        """Its row in the table of architectures."""
        return FAMILIES[self.model_type]

    @property
    def qk_layernorm(self) -> bool:
        """Whether queries and keys are normalised."""
        return self.family.qk_layernorm

    @property
    def add_qkv_bias(self) -> bool:
        """Whether q, k and v have a bias."""
        return self.family.qkv_bias

    def padded_groups(self, tensor_parallel_size: int) -> int:
        """Key/value groups after padding to a multiple of the tensor-parallel size."""
        return round_up(self.num_query_groups, tensor_parallel_size)

    def padded_vocab_size(self, divisible_by: int, tensor_parallel_size: int) -> int:
        """Vocabulary rows, padded so that every tensor-parallel rank holds equally many."""
        return round_up(self.vocab_size, divisible_by * tensor_parallel_size)

    def layer_parameters(self, tensor_parallel_size: int = 1) -> float:
        """Dense weights of one layer on a rank, padding included; norms and routers are whole."""
        tp = tensor_parallel_size
        keys = self.padded_groups(tp) / tp * self.kv_channels
        queries = keys * (self.num_attention_heads / self.num_query_groups)
        attention = self.hidden_size * (2 * queries + 2 * keys)
        attention += self.add_qkv_bias * (queries + 2 * keys)
        norms = 2 * self.hidden_size + 2 * self.kv_channels * self.qk_layernorm
        if self.experts is None:
            return attention + norms + 3 * self.hidden_size * self.ffn_hidden_size / tp
        return attention + norms + self.hidden_size * self.experts.count

    def num_parameters(self) -> int:
        """Weights of the whole model, without padding; tied embeddings once."""
        layer = round(self.layer_parameters())
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        total = self.num_layers * layer + embeddings + self.hidden_size
        return total + self.num_expert_parameters()

    def num_expert_parameters(self) -> int:
        """Weights of all experts of all layers, which expert parallelism splits; 0 without."""
        if self.experts is None:
            return 0
        expert = 3 * self.hidden_size * self.experts.ffn_hidden_size
        return self.num_layers * self.experts.count * expert


def _check_heads(path: str, arch: Architecture) -> None:
    heads, groups = arch.num_attention_heads, arch.num_query_groups
    if heads % groups:
        raise ValueError(
            f"{path}: {heads} attention heads do not divide into {groups} key/value groups; "
            "copy the model again"
        )
    if arch.kv_channels % 2:
        raise ValueError(
            f"{path}: {arch.kv_channels} channels a head cannot be rotated in pairs; "
            "copy the model again"
        )


def read_architecture(directory: str, flag: str = "--hf-model") -> Architecture:
    """The architecture of the HuggingFace model in ``directory``, which ``flag`` named.

    Raises:
        ValueError: no such directory, a damaged ``config.json``, or a feature that the
            Megatron model would compute differently.
    """
    if not os.path.isdir(directory):
        raise ValueError(f"{flag} {directory}: no such directory")
    path = os.path.join(directory, "config.json")
    return parse_architecture(read_json_object(path), path)


def parse_architecture(mapping: Mapping[str, Any], path: str) -> Architecture:
    """As :func:`read_architecture`, of the content of a ``config.json``.

    Args:
        path: what an error names.
    """
    content = Fields(path, mapping)
    family = family_of(content)
    heads, hidden_size = content.size("num_attention_heads"), content.size("hidden_size")
    groups, kv_channels = family.head_sizes(content, heads, hidden_size)
    arch = Architecture(
        model_type=content.text("model_type"),
        num_layers=content.size("num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_hidden_size=content.size("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=kv_channels,
        vocab_size=content.size("vocab_size"),
        max_position_embeddings=content.size("max_position_embeddings"),
        layernorm_epsilon=content.number("rms_norm_eps", 1e-6),
        rope=read_rope(content, family.rope_kinds),
        tie_word_embeddings=content.boolean("tie_word_embeddings", False),
        initializer_range=content.number("initializer_range", 0.02),
        experts=read_experts(content, family.experts) if family.experts else None,
    )
    _check_heads(path, arch)
    return arch


def aux_loss_coeff(arch: Architecture, config: Config) -> float:
    """Weight of the load-balancing loss: the flag's, else the model's own; 0 without experts."""
    if arch.experts is None:
        return 0.0
    given = config.model.moe_aux_loss_coeff
    return arch.experts.aux_loss_coeff if given is None else given


def check_split(arch: Architecture, config: Config) -> None:
    """Raise ValueError where the parallel sizes do not divide the model, naming the flag."""
    parallel = config.parallel
    tp = parallel.tensor_model_parallel_size
    if arch.num_query_groups % tp and not config.model.pad_attention_heads:
        raise ValueError(
            f"--tensor-model-parallel-size {tp} does not divide the model's "
            f"{arch.num_attention_heads} attention heads in {arch.num_query_groups} key/value "
            "groups; choose a divisor, or add zero heads with --pad-attention-heads"
        )
    _check_channels(arch, config)
    _check_experts(arch, config)
    _check_stages(arch.num_layers, config)
    longest = _longest_prompt(config)
    if longest >= arch.max_position_embeddings:
        raise ValueError(
            f"a prompt of {longest} tokens leaves no room for a rollout in the model's "
            f"{arch.max_position_embeddings} positions; lower --max-prompt-length and "
            "--max-teacher-prompt-length"
        )


def _longest_prompt(config: Config) -> int:
    """Tokens of a prompt that leaves room for an answer; recorded ones are what they are."""
    data = config.data
    if config.rollout.rollout_engine != "replay":
        return max(data.max_prompt_length, data.max_teacher_prompt_length)
    return 0 if config.evaluation.eval_data is None else data.max_prompt_length


def _check_channels(arch: Architecture, config: Config) -> None:
    parallel = config.parallel
    channels, size = arch.ffn_hidden_size, parallel.tensor_model_parallel_size
    name = "tensor_model_parallel_size"
    if arch.experts is not None:
        channels, size = arch.experts.ffn_hidden_size, parallel.expert_tensor_size
        if parallel.expert_tensor_parallel_size is not None:
            name = "expert_tensor_parallel_size"
    if channels % size:
        raise ValueError(
            f"{flag_of(name)} {size} does not divide the model's {channels} MLP channels"
        )


def _check_experts(arch: Architecture, config: Config) -> None:
    parallel, flag = config.parallel, flag_of("expert_model_parallel_size")
    size, tp, cut = (
        parallel.expert_model_parallel_size,
        parallel.tensor_model_parallel_size,
        parallel.expert_tensor_size,
    )
    if arch.experts is None:
        return
    if tp % cut:
        raise ValueError(
            f"{flag_of('expert_tensor_parallel_size')} {cut} does not divide "
            f"--tensor-model-parallel-size {tp}"
        )
    if cut < tp and size == 1:
        raise ValueError(
            f"{flag_of('expert_tensor_parallel_size')} {cut} below --tensor-model-parallel-size "
            f"{tp} needs {flag} above 1 (megatron-core would not sum the experts' gradients over "
            "tensor-parallel ranks); leave it out"
        )
    if arch.experts.count % size:
        raise ValueError(f"{flag} {size} does not divide the model's {arch.experts.count} experts")
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        raise ValueError(
            "a model with experts needs --sequence-parallel with --tensor-model-parallel-size "
            f"{parallel.tensor_model_parallel_size} (megatron-core's rule for training them)"
        )


def _stages_divide(num_layers: int, parallel: ParallelConfig) -> bool:
    """Whether the layers, and what counts as one, fill all (virtual) stages alike."""
    uneven = (
        parallel.num_layers_in_first_pipeline_stage,
        parallel.num_layers_in_last_pipeline_stage,
    )
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    stages = parallel.pipeline_model_parallel_size - sum(n is not None for n in uneven)
    left = num_layers - sum(n or 0 for n in uneven)
    left += parallel.account_for_embedding_in_pipeline_split
    left += parallel.account_for_loss_in_pipeline_split
    if stages <= 0:
        return stages == 0 and left == 0
    chunks = [n for n in (*uneven, left // stages) if n is not None]
    return left % stages == 0 and all(n > 0 and n % virtual == 0 for n in chunks)


def _check_stages(num_layers: int, config: Config) -> None:
    parallel = config.parallel
    first, last = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
    counted = (
        parallel.account_for_embedding_in_pipeline_split
        or parallel.account_for_loss_in_pipeline_split
    )
    if counted and any(getattr(parallel, name) is not None for name in (first, last)):
        raise ValueError(
            f"{flag_of(first)} and {flag_of(last)} exclude "
            "--account-for-embedding-in-pipeline-split and --account-for-loss-in-pipeline-split; "
            "choose one kind of uneven split"
        )
    if not _stages_divide(num_layers, parallel):
        raise ValueError(
            f"--pipeline-model-parallel-size {parallel.pipeline_model_parallel_size} with "
            f"{parallel.num_virtual_stages_per_pipeline_rank} virtual stage(s) does not divide the "
            f"model's {num_layers} layers; see also {flag_of(first)}, {flag_of(last)} and "
            "--account-for-embedding-in-pipeline-split"
        )
