"""Userbuffers: nothing is allocated, but their shape is kept, and linears are held to it."""

import enum

import torch

from transformer_engine.recording import record

shape: list[int] = []


class UserBufferQuantizationMode(enum.Enum):
    """Of the buffers."""

    NONE = "none"
    FP8 = "fp8"


def initialize_ub(shape, tp_size, use_fp8=False, quantization_modes=None, dtype=torch.bfloat16,
                  ub_cfgs=None, bootstrap_backend=None) -> None:  # fmt: skip
    """Once a process, until :func:`destroy_ub`."""
    if globals()["shape"]:
        raise RuntimeError("UB communicators are already initialized.")
    fp8 = quantization_modes == [UserBufferQuantizationMode.FP8] if quantization_modes else use_fp8
    record.append({"what": "initialize_ub", "tokens": shape[0], "fp8_buffers": fp8})
    globals()["shape"] = list(shape)


def destroy_ub() -> None:
    """The buffers go."""
    globals()["shape"] = []


def _check(x, fp8: bool) -> None:
    """As the real buffers do with a tensor that they are to hold."""
    assert shape == [x.shape[:-1].numel(), x.shape[-1]], f"userbuffers {shape}: {tuple(x.shape)}"
    started = [r for r in record if r["what"] == "initialize_ub"]
    assert started[-1]["fp8_buffers"] == fp8, "userbuffers of this precision are not registered"
