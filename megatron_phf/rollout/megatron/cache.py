"""Keys and values of a batch of rollouts: a token's step reads and writes memory of fixed shape.

The host launches what a step computes; where nothing it launches depends on the step's number, a
CUDA graph can launch it instead.  So the column that a token writes is a tensor, and attention goes
over the whole capacity, with what no row has written yet hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_phf.rollout.megatron.capacity import capacity_for


class KVCache:
    """Keys and values of one batch of rollouts on one pipeline stage.

    Rows are aligned at their ends (prompts padded on the left), so that every row writes the same
    column.  Positions are each row's own, hence the cache does not depend on the padding.
    """

    def __init__(self, seen: Tensor, most: int) -> None:
        """``seen`` bool [b, prompt]: columns of a row's own tokens; ``most`` are ever needed."""
        self._seen, self._most = seen, most
        self.capacity = capacity_for(seen.shape[1] + 1)
        self._table: Tensor | None = None
        self._column = torch.tensor([seen.shape[1]], device=seen.device)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.rotation: tuple[Tensor, Tensor] | None = None
        self.mask: Tensor | None = None  # bool, what the prompts' tokens see; None: those before
        self.bias: Tensor | None = None  # [b, 1, 1, capacity] on scores of one token; None: prompts

    def begin(self, inv_freq: Tensor, positions: Tensor, dtype: torch.dtype) -> None:
        """Prepare a forward pass of the prompts, or then of one token, at ``positions`` [b, s]."""
        if self._table is None:
            self._table = _rotation_table(self._most, inv_freq.to(positions.device), dtype)
            self.mask = self._prompt_mask()
        if self.bias is not None:
            self.bias.index_fill_(-1, self._column, 0)  # a token sees itself; so do those after it
        cos, sin = self._table[:, positions.T, None, None]  # each [s, b, 1, 1, hn]
        self.rotation = (cos, sin)

    def finish(self) -> None:
        """What was written since :meth:`begin` counts from now on."""
        if self.bias is not None:
            self._column += 1
            return
        assert self._table is not None, "KVCache.begin comes first"
        least = torch.finfo(self._table.dtype).min
        hidden = torch.zeros(self._seen.shape, dtype=self._table.dtype, device=self._seen.device)
        self.bias = self._grown(hidden.masked_fill_(~self._seen, least)[:, None, None], least)
        self.mask = None

    def _prompt_mask(self) -> Tensor | None:
        """bool [b, 1, s, s]; None where rows of one length see all up to the token itself."""
        if bool(self._seen.all()):
            return None
        s = self._seen.shape[1]
        causal = self._seen.new_ones(s, s).tril()
        # A padded query sees itself: a row without any key would turn into NaN and spread.
        own = torch.eye(s, dtype=torch.bool, device=causal.device)
        return ((self._seen[:, None] & causal) | own).unsqueeze(1)

    def fill(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keys and values [s, b, ng, hn] of the prompts."""
        self._layers[layer] = (
            self._grown(key.permute(1, 2, 0, 3), 0, dim=2),
            self._grown(value.permute(1, 2, 0, 3), 0, dim=2),
        )

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """key and value [1, b, ng, hn] of one token -> all so far, each [b, ng, capacity, hn]."""
        keys, values = self._layers[layer]
        keys.index_copy_(2, self._column, key.permute(1, 2, 0, 3))
        values.index_copy_(2, self._column, value.permute(1, 2, 0, 3))
        return keys, values

    def reserve(self, columns: int) -> bool:
        """Room for so many columns; whether that took other memory than before."""
        if columns <= self.capacity:
            return False
        self.capacity = capacity_for(columns)
        for layer, (keys, values) in self._layers.items():  # one layer twice at a time
            self._layers[layer] = (self._grown(keys, 0, 2), self._grown(values, 0, 2))
        assert self.bias is not None
        self.bias = self._grown(self.bias, torch.finfo(self.bias.dtype).min)
        return True

    def _grown(self, tensor: Tensor, rest: float, dim: int = -1) -> Tensor:
        """A copy as long as the capacity; never uninitialised: a hidden NaN would still spread."""
        shape = list(tensor.shape)
        shape[dim] = self.capacity
        grown = tensor.new_full(shape, rest)
        grown.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
        return grown

    def select(self, rows: Tensor) -> None:
        """These rows (indices, any number of times each) in the place of all."""
        assert self.bias is not None
        self.bias = self.bias[rows]
        for layer, (keys, values) in self._layers.items():
            self._layers[layer] = (keys[rows], values[rows])


def _rotation_table(length: int, inv_freq: Tensor, dtype: torch.dtype) -> Tensor:
    """cos, and sin with the sign of its half, of every position: [2, length, hn]."""
    angles = torch.arange(length, device=inv_freq.device)[:, None].float() * inv_freq
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))).to(dtype)
