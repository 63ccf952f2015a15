"""Recompute and random states."""

import contextlib

import torch

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager, fp8_autocast
from transformer_engine.recording import record


@contextlib.contextmanager
def activation_recompute_forward(activation_recompute=False, recompute_phase=False):
    """Only entered."""
    yield


class CudaRNGStatesTracker:
    """Only subclassed."""


def checkpoint(function, *args, distribute_saved_activations=False, get_rng_state_tracker=None,
               tp_group=None, **kwargs):  # fmt: skip
    """Runs ``function`` again in the backward pass, in the FP8 context of the first time."""
    enabled, recipe = FP8GlobalStateManager.enabled, FP8GlobalStateManager.recipe
    record.append({"what": "checkpoint", "fp8": enabled})

    def run(*given):
        with fp8_autocast(enabled, fp8_recipe=recipe):
            return function(*given, **kwargs)

    return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=True)
