"""The states of all random generators of this process, as tensors that a checkpoint can hold."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from megatron_phf import device

_PYTHON, _NUMPY, _TORCH, _CUDA, _TRACKED = "python", "numpy", "torch", "cuda", "tracked."
_NONE = float("nan")  # no second normal variate is waiting


def rng_state() -> dict[str, Tensor]:
    """Every generator's state; integers int64, except torch's own bytes."""
    version, words, waiting = random.getstate()
    name, keys, position, has_gauss, gauss = np.random.get_state()
    assert version == 3 and name == "MT19937"
    state = {
        _PYTHON: torch.tensor(words, dtype=torch.int64),
        _PYTHON + "_gauss": torch.tensor([_NONE if waiting is None else waiting]).double(),
        _NUMPY: torch.tensor([*map(int, keys), position, has_gauss], dtype=torch.int64),
        _NUMPY + "_gauss": torch.tensor([gauss], dtype=torch.float64),
        _TORCH: torch.get_rng_state(),
    }
    if device.has_cuda():
        state[_CUDA] = torch.cuda.get_rng_state()
    for key, value in get_cuda_rng_tracker().get_states().items():
        state[_TRACKED + key] = value
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Undo everything since :func:`rng_state`."""
    gauss = float(state[_PYTHON + "_gauss"])
    words = tuple(state[_PYTHON].tolist())
    random.setstate((3, words, None if np.isnan(gauss) else gauss))
    *keys, position, has_gauss = state[_NUMPY].tolist()
    numbers = np.array(keys, dtype=np.uint32)
    gauss = float(state[_NUMPY + "_gauss"])
    np.random.set_state(("MT19937", numbers, position, has_gauss, gauss))
    torch.set_rng_state(state[_TORCH].cpu())
    if device.has_cuda():
        torch.cuda.set_rng_state(state[_CUDA].cpu())
    tracked = {k.removeprefix(_TRACKED): v for k, v in state.items() if k.startswith(_TRACKED)}
    get_cuda_rng_tracker().set_states(tracked)
