"""Floating-point operations of a step by formula; the base of MFU and of the planner.

What the model needs, whatever the implementation does: no recomputation, no padding, causal
attention's lower triangle alone.  A multiply-add counts 2.  No import of torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_phf.config.settings import Config
from megatron_phf.lora.config import LINEARS, hf_shape, target_modules
from megatron_phf.model.architecture import Architecture


@dataclass(frozen=True)
class ForwardFlops:
    """Of one forward pass: the layers' matrix products, attention scores and values, the head."""

    layers: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.layers + self.attention + self.head


def _layer_weights(arch: Architecture) -> int:
    """Weights of one layer that each token is multiplied with."""
    heads = 2 * arch.num_attention_heads + 2 * arch.num_query_groups
    attention = arch.hidden_size * arch.kv_channels * heads
    if arch.experts is None:
        return attention + 3 * arch.hidden_size * arch.ffn_hidden_size
    router = arch.hidden_size * arch.experts.count
    expert = 3 * arch.hidden_size * arch.experts.ffn_hidden_size
    return attention + router + arch.experts.per_token * expert


def forward_flops(arch: Architecture, lengths: Sequence[int], scored: int) -> ForwardFlops:
    """Sequences of ``lengths`` tokens, ``scored`` of whose outputs go through the head."""
    tokens = sum(lengths)
    pairs = sum(n * (n + 1) / 2 for n in lengths)  # a token sees itself and those before
    width = arch.num_attention_heads * arch.kv_channels
    return ForwardFlops(
        layers=2.0 * tokens * arch.num_layers * _layer_weights(arch),
        attention=4.0 * pairs * arch.num_layers * width,
        head=2.0 * scored * arch.hidden_size * arch.vocab_size,
    )


def student_flops(
    arch: Architecture, teacher: Architecture, config: Config, lengths: Sequence[int], scored: int
) -> float:
    """The student's forward and backward passes, and the teacher's logits, which they meet there.

    Backward is twice the forward; with LoRA the frozen linears have no gradient of their weights,
    while the adapters have.  The flow loss (a window of positions) is not counted; what a weighting
    of tokens reads beforehand is: the teacher's logits, or the student once more.
    """
    forward = forward_flops(arch, lengths, scored)
    head = 2.0 * scored * teacher.hidden_size * teacher.vocab_size
    before = {"teacher_entropy": head, "student_entropy": forward.total}
    before["divergence_top_p"] = forward.total + head
    head += before.get(config.method.token_weighting, 0.0)
    if not config.lora.lora_rank:
        return 3 * forward.total + head
    adapters = 0
    for _, _, fused in LINEARS:
        for target in set(fused) & set(target_modules(config.lora)):
            adapters += config.lora.lora_rank * sum(hf_shape(target, arch))
    low = 2.0 * sum(lengths) * arch.num_layers * adapters
    return 2 * (forward.layers + forward.head) + 3 * (forward.attention + low) + head
