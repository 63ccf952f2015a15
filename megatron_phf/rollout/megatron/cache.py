"""Keys and values of a batch of rollouts: a token's step reads and writes memory of fixed shape.

The host launches what a step computes; where nothing it launches depends on the step's number, a
CUDA graph can launch it instead.  So the column that a token writes is a tensor, and attention goes
over more columns than are written, with the others hidden: over the whole capacity where a graph is
to be captured, else to the end of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_phf.rollout.megatron.capacity import capacity_for

_BLOCK = 16  # columns: masked attention wants multiples of it on CUDA


class KVCache:
    """Keys and values of one batch of rollouts on one pipeline stage.

    Rows are aligned at their ends (prompts padded on the left), so that every row writes the same
    column.  Positions are each row's own, hence the cache does not depend on the padding.
    """

    def __init__(self, seen: Tensor, most: int, fixed: bool = False) -> None:
        """``seen`` bool [b, prompt]: columns of a row's own tokens; ``most`` are ever needed.

        ``fixed``: a step's shapes are those of the capacity, and few.
        """
        self._seen, self._most, self._fixed = seen, most, fixed
        self.capacity = capacity_for(seen.shape[1] + 1)
        self._width = self._width_for(seen.shape[1] + 1)
        self._table: Tensor | None = None
        self._column = torch.tensor([seen.shape[1]], device=seen.device)
        self._layers: dict[int, Tensor] = {}  # [b, 2 (keys and values), ng, capacity, hn]
        self.rotation: tuple[Tensor, Tensor] | None = None
        self.mask: Tensor | None = None  # bool, what the prompts' tokens see; None: those before
        self._bias: Tensor | None = None  # [b, 1, 1, capacity]

    @property
    def bias(self) -> Tensor | None:
        """[b, 1, 1, columns] on the scores of one token; None: it is the prompts' turn."""
        return None if self._bias is None else self._bias[..., : self._width]

    def begin(self, inv_freq: Tensor, positions: Tensor, dtype: torch.dtype) -> None:
        """Prepare a forward pass of the prompts, or then of one token, at ``positions`` [b, s]."""
        if self._table is None:
            self._table = _rotation_table(self._most, inv_freq.to(positions.device), dtype)
            self.mask = self._prompt_mask()
        if self._bias is not None:
            self._bias.index_fill_(-1, self._column, 0)  # a token sees itself; so do those after it
        cos, sin = self._table[:, positions.T, None, None]  # each [s, b, 1, 1, hn]
        self.rotation = (cos, sin)

    def finish(self) -> None:
        """What was written since :meth:`begin` counts from now on."""
        if self._bias is not None:
            self._column += 1
            return
        assert self._table is not None, "KVCache.begin comes first"
        least = torch.finfo(self._table.dtype).min
        hidden = torch.zeros(self._seen.shape, dtype=self._table.dtype, device=self._seen.device)
        self._bias = self._grown(hidden.masked_fill_(~self._seen, least)[:, None, None], least)
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

    def fill(self, layer: int, both: Tensor) -> None:
        """Keys and values [s, b, ng, 2, hn] of the prompts."""
        self._layers[layer] = self._grown(both.permute(1, 3, 2, 0, 4), 0, dim=3)

    def append(self, layer: int, both: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value [1, b, ng, 2, hn] of one token -> all so far, each [b, ng, columns, hn]."""
        stored = self._layers[layer]
        stored.index_copy_(3, self._column, both.permute(1, 3, 2, 0, 4))
        keys, values = stored[..., : self._width, :].unbind(1)
        return keys, values

    def reserve(self, columns: int) -> bool:
        """Room for so many columns; whether a step then reads and writes other memory."""
        if columns > self.capacity:
            self.capacity = capacity_for(columns)
            for layer, stored in self._layers.items():  # one layer twice at a time
                self._layers[layer] = self._grown(stored, 0, dim=3)
            assert self._bias is not None
            self._bias = self._grown(self._bias, torch.finfo(self._bias.dtype).min)
        before, self._width = self._width, self._width_for(columns)
        return self._width != before

    def _width_for(self, columns: int) -> int:
        return self.capacity if self._fixed else -(-columns // _BLOCK) * _BLOCK

    def _grown(self, tensor: Tensor, rest: float, dim: int = -1) -> Tensor:
        """A copy as long as the capacity; never uninitialised: a hidden NaN would still spread."""
        shape, length = list(tensor.shape), tensor.shape[dim]
        shape[dim] = self.capacity
        grown = tensor.new_empty(shape)
        grown.narrow(dim, 0, length).copy_(tensor)
        grown.narrow(dim, length, self.capacity - length).fill_(rest)
        return grown

    def select(self, rows: Tensor) -> None:
        """These rows (indices, any number of times each) in the place of all."""
        assert self._bias is not None
        self._bias = self._bias[rows]
        for layer, stored in self._layers.items():
            self._layers[layer] = stored[rows]


def _rotation_table(length: int, inv_freq: Tensor, dtype: torch.dtype) -> Tensor:
    """cos, and sin with the sign of its half, of every position: [2, length, hn]."""
    angles = torch.arange(length, device=inv_freq.device)[:, None].float() * inv_freq
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))).to(dtype)
