"""MFU: the model's floating-point operations of the student's step against what the devices can."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from megatron_phf.config.settings import Config
from megatron_phf.data.rollouts import Rollout
from megatron_phf.estimate.flops import student_flops
from megatron_phf.model.gpt_config import model_dtype
from megatron_phf.runtime import device, parallel
from megatron_phf.teacher.architecture import Models

# Dense bf16 peaks in TFLOP/s by a part of torch's device name, from the makers' data sheets.
_GPU_PEAKS = (
    ("B200", 2250.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H800", 989.0),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
)
_CPU_SIZE, _CPU_SECONDS = 768, 0.15


def gpu_peak(name: str) -> float | None:
    """FLOP/s of the GPU that torch calls ``name``, in bf16 without sparsity; None: not known."""
    return next((peak * 1e12 for part, peak in _GPU_PEAKS if part in name), None)


def measured_peak(dtype: torch.dtype) -> float:
    """FLOP/s of this process's matrix products, the best of a few: its share of a busy machine."""
    a, b = (torch.ones(_CPU_SIZE, _CPU_SIZE, dtype=dtype) for _ in range(2))
    best, end = 0.0, time.perf_counter() + _CPU_SECONDS
    while time.perf_counter() < end or best == 0:
        start = time.perf_counter()
        torch.mm(a, b)
        best = max(best, 2.0 * _CPU_SIZE**3 / (time.perf_counter() - start))
    return best


class Utilisation:
    """The share of all ranks' peak that the student's steps reach."""

    def __init__(self, config: Config, models: Models) -> None:
        """Every rank calls it at the same time, so that on CPUs each measures its share."""
        self._config, self._models = config, models
        dtype, peak = model_dtype(config), None
        if not device.has_cuda():
            peak = measured_peak(dtype)
        elif dtype is torch.bfloat16:
            peak = gpu_peak(device.describe())
        peaks = parallel.gather_objects(peak)
        self._peak = None if None in peaks else sum(peaks)

    def mfu(self, rollouts: Sequence[Rollout], seconds: float) -> float | None:
        """Of a step on this data-parallel rank's ``rollouts`` whose student took ``seconds``.

        None where the device's peak is not known: a step that is beyond what was measured for one,
        on a CPU that was busy then, says that it is not.  Every rank calls it.
        """
        lengths = [len(r.student_prompt_ids) + len(r.response_ids) for r in rollouts]
        scored = sum(sum(r.scored) for r in rollouts)
        student, teacher = self._models.student, self._models.teacher
        flops = student_flops(student, teacher, self._config, lengths, scored)
        total = sum(parallel.gather_over_data_parallel(flops))
        if self._peak is None or total > self._peak * seconds:
            return None
        return total / (self._peak * seconds)
