"""Small device tensors whose value is known: a real copy beside the one without memory.

Token ids, masks, positions and counts come from the host; what is computed from them alone is
computed for real, so that indexing by masks has the right sizes.  Everything that a weight or an
activation went into is unknown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_phf.simulate.torch_names import (
    FakeTensor,
    operator_name,
    tree_map,
    written_arguments,
)

LARGEST = 2**22  # entries of a tensor whose value is kept, of floating point a quarter
_CPU = torch.device("cpu")
# Of the shape of their argument alone; the value that fills them, or the call's last argument.
_LIKE: dict[str, int | None] = {
    "zeros_like": 0, "new_zeros": 0, "empty_like": 0, "new_empty": 0, "new_empty_strided": 0,
    "ones_like": 1, "new_ones": 1, "full_like": None, "new_full": None,
}  # fmt: skip
_MADE = {
    "arange", "zeros", "ones", "full", "scalar_tensor", "eye", "empty", "empty_strided", "tensor",
}  # fmt: skip
_RANDOM = {
    "normal_", "uniform_", "bernoulli_", "random_", "native_dropout", "rand", "randn",
    "exponential_", "bernoulli", "multinomial", "randint", "rand_like", "randn_like",
}  # fmt: skip
_FINITE = {"isfinite": True, "isnan": False, "isinf": False}


@dataclass
class _Storage:
    """Whether the real copies of one memory are still what the device would hold."""

    valid: bool = True


def leaves(value: Any) -> list[Any]:
    """What lists, tuples and dictionaries hold, in order; much faster than torch's own for any."""
    found: list[Any] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[Any]) -> None:
    if isinstance(value, list | tuple):
        for each in value:
            _collect(each, found)
    elif isinstance(value, dict):
        for each in value.values():
            _collect(each, found)
    else:
        found.append(value)


def known(tensor: Any) -> Tensor | None:
    """The real value of a tensor of the device; of a host tensor itself; None: unknown."""
    if not isinstance(tensor, FakeTensor):
        return tensor
    value, storage = getattr(tensor, "known_value", (None, None))
    return value if storage is not None and storage.valid else None


def give(tensor: Any, value: Tensor, storage: _Storage | None = None) -> Any:
    """``tensor`` has this value from now on."""
    tensor.known_value = (value, storage or _Storage())
    return tensor


def small(tensors: list[Any]) -> bool:
    """Whether their values are worth the time and memory."""
    return sum(t.numel() * (4 if t.is_floating_point() else 1) for t in tensors) <= LARGEST


def forget(tensor: Any) -> None:
    """Nobody knows what is in its memory any more."""
    if hasattr(tensor, "known_value"):
        tensor.known_value[1].valid = False


def propagate(func: Any, args: tuple, kwargs: dict, out: Any) -> None:
    """After ``func`` ran without values: what its results are, where that can be known."""
    outs = [t for t in leaves(out) if isinstance(t, FakeTensor)]
    inputs = [t for t in leaves((args, kwargs)) if isinstance(t, Tensor)]
    name = operator_name(func)
    if not outs or _from_shapes(name, args, inputs, outs):
        return
    if not _computable(name, inputs, outs):
        for position, argument in written_arguments(func):
            written = args[position] if position < len(args) else kwargs.get(argument)
            for t in leaves(written):
                forget(t)
        return
    storages = {
        value.untyped_storage().data_ptr(): t.known_value[1]
        for t in inputs
        if isinstance(t, FakeTensor) and (value := known(t)) is not None
    }
    result = func(*tree_map(_real, args), **tree_map(_real, kwargs))
    results = [t for t in leaves(result) if isinstance(t, Tensor)]
    for fake, value in zip(outs, results, strict=False):
        if known(fake) is not value and fake.shape == value.shape:
            give(fake, value, storages.get(value.untyped_storage().data_ptr()))


def _from_shapes(name: str, args: tuple, inputs: list[Tensor], outs: list[Any]) -> bool:
    """Results that depend on shapes alone, or that training goes on with; whether it was one."""
    first = outs[0]
    if name in _FINITE and known(inputs[0]) is None:
        if first.numel() <= LARGEST:
            give(first, torch.full(first.shape, _FINITE[name]))
        return True
    if name in ("topk", "sort", "argsort") and known(inputs[0]) is None:
        _some_order(inputs[0], outs[-1])
        return True
    if name in _LIKE or "empty" in name:
        if small([first]) and not ("empty" in name and first.is_floating_point()):
            value = _LIKE.get(name, 0)
            value = args[-1] if value is None else value
            give(first, torch.full(first.shape, value, dtype=first.dtype))
        return True
    return False


def _some_order(values: Tensor, index: Tensor) -> None:
    """Experts, or tokens, all chosen equally often."""
    if index.dim() == 2 and index.numel() <= LARGEST:
        rows, chosen = index.shape
        give(index, torch.arange(rows * chosen).view(rows, chosen) % values.shape[1])


def _computable(name: str, inputs: list[Tensor], outs: list[Any]) -> bool:
    if name in _RANDOM or not small(outs):
        return False
    return all(known(t) is not None for t in inputs) if inputs else name in _MADE


def _real(x: Any) -> Any:
    if isinstance(x, torch.device):
        return _CPU
    return known(x) if isinstance(x, FakeTensor) else x
