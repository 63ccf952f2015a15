"""What the comparison of loaded weights with their files sees, in the layout of this process."""

from __future__ import annotations

from unittest import mock

import torch

from megatron_phf.config.settings import Config
from megatron_phf.lora.linears import is_adapter
from megatron_phf.model.architecture import Architecture
from megatron_phf.model.gpt import FlowGPTModel
from megatron_phf.weights import huggingface, loaded
from megatron_phf.weights.headers import stored_tensors


def _problem(chunk: FlowGPTModel, arch: Architecture, config: Config) -> str | None:
    """Of this chunk alone; no collective."""
    assert config.model.hf_model is not None
    base = huggingface._AsMbridgeNames(chunk)
    layers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
    stored = stored_tensors(config.model.hf_model)
    return loaded.difference(base.named_parameters(), arch, layers, stored)


def _turned(weight: torch.Tensor) -> torch.Tensor:
    """The same numbers in another place."""
    return weight.flip(0) if weight.dim() == 1 else weight.roll(1, 1)


@torch.no_grad()
def check_comparison(chunks: list[FlowGPTModel], arch: Architecture, config: Config) -> None:
    """Each loaded parameter is seen when it is changed; a mistaken load ends on every rank.

    A parameter of padding alone, which no file has, is left out.
    """
    for chunk in chunks:
        assert _problem(chunk, arch, config) is None
        seen = 0
        for name, p in chunk.named_parameters():
            if is_adapter(name):  # no part of the files
                continue
            kept = p.clone()
            p.copy_(_turned(kept))
            changed = not torch.equal(p, kept)
            problem = _problem(chunk, arch, config)
            p.copy_(kept)
            assert (problem is not None) == changed, name
            seen += changed
        assert seen > 3
    read = huggingface._StoredWeights.load_one_hf_weight

    def wrong(self: huggingface._StoredWeights, name: str) -> torch.Tensor:
        """The value projections of the first layer are mistaken for its keys."""
        return read(self, name.replace("layers.0.self_attn.v_", "layers.0.self_attn.k_"))

    assert config.model.hf_model is not None
    with mock.patch.object(huggingface._StoredWeights, "load_one_hf_weight", wrong):
        try:
            huggingface.load_hf_weights(chunks, arch, config, config.model.hf_model)
        except ValueError as error:
            expected = "after loading, decoder.layers.0.self_attention.linear_qkv.weight is not"
            assert expected in str(error), error
        else:
            raise AssertionError("a mistaken load was not seen")
    huggingface.load_hf_weights(chunks, arch, config, config.model.hf_model)
