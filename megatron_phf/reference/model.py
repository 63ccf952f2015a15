"""Models as transformers and peft load them, and what hooks see of their layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_phf.reference.options import Options


def load_model(
    directory: str, dtype: torch.dtype = torch.float32, adapter: str | None = None
) -> Any:
    """The model with transformers' eager attention, in eval mode; peft adds the adapter."""
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=dtype,
        attn_implementation="eager",
        local_files_only=True,
        trust_remote_code=False,
    )
    if adapter is not None:
        from peft import PeftModel  # only where it is needed: tools/parity.py does without

        model = PeftModel.from_pretrained(
            model, adapter, is_trainable=True, autocast_adapter_dtype=False
        )
    return model.eval()


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    """What an optimizer gets: of a model with an adapter, the adapter, as peft names it on disk."""
    return {
        name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad
    }


def run(model: Any, ids: list[int]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """logits [s, v]; each layer's output [s, h], before the final norm; router logits [s, E]."""
    outputs: list[Tensor] = []
    routers: list[Tensor] = []

    def hook(module: Any, args: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output)[0])

    plain = model.get_base_model() if hasattr(model, "get_base_model") else model

    def router_hook(module: Any, args: Any, output: Any) -> None:
        routers.append(output[0])

    layers = plain.model.layers
    handles = [layer.register_forward_hook(hook) for layer in layers]
    gates = [layer.mlp.gate for layer in layers if hasattr(layer.mlp, "gate")]
    handles += [gate.register_forward_hook(router_hook) for gate in gates]
    logits = model(torch.tensor([ids])).logits[0]
    for handle in handles:
        handle.remove()
    return logits, outputs, routers


def load_balancing(logits: Tensor, per_token: int) -> Tensor:
    """Router logits [T, E] of one layer and microbatch -> E sum_i f_i P_i, 1 when balanced."""
    tokens, experts = logits.shape
    probabilities = torch.softmax(logits.float(), -1)
    total = torch.zeros(())
    chosen = torch.topk(probabilities, per_token).indices
    for i in range(experts):
        fraction = int((chosen == i).sum()) / (tokens * per_token)
        total = total + fraction * probabilities[:, i].sum() / tokens
    return experts * total


def aux_loss(model: Any, routers: list[list[Tensor]], o: Options) -> Tensor:
    """Router logits by sample and layer -> load-balancing loss: mean over microbatches [layers].

    A microbatch is that many samples in a row, whichever data-parallel rank has it.
    """
    size, per_token = o.micro_batch_size, model.config.num_experts_per_tok
    groups = [routers[i : i + size] for i in range(0, len(routers), size)]
    values = [
        torch.stack([load_balancing(torch.cat(layer), per_token) for layer in zip(*g, strict=True)])
        for g in groups
    ]
    return torch.stack(values).mean(0)


def by_file_name(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """In memory transformers fuses a layer's experts; files name each one's matrices."""
    result = {}
    for name, tensor in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            result[name] = tensor
            continue
        prefix, kind = name.rsplit(".", 1)
        for i, expert in enumerate(tensor):
            parts = kind.replace("gate_up_proj", "gate_proj up_proj").split()
            for part, matrix in zip(parts, expert.chunk(len(parts)), strict=True):
                result[f"{prefix}.{i}.{part}.weight"] = matrix
    return result
