"""How many GPUs a process will see, without torch: as CUDA reads CUDA_VISIBLE_DEVICES."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

_GPU = re.compile(r"^GPU (\d+):(?:.*\(UUID: (GPU-[^)]*)\))?")
_INDEX = re.compile(r"\s*\+?(\d+)")


@dataclass
class _Gpu:
    uuid: str
    has_instances: bool = False  # MIG: the GPU is cut into them


def _listed(listing: str) -> list[_Gpu]:
    """The GPUs of ``nvidia-smi -L``; indented lines are a GPU's MIG instances."""
    gpus: list[_Gpu] = []
    for line in listing.splitlines():
        found = _GPU.match(line)
        if found:
            gpus.append(_Gpu(found[2] or ""))
        elif gpus and line.lstrip().startswith("MIG "):
            gpus[-1].has_instances = True
    return gpus


def _chosen(entry: str, gpus: list[_Gpu]) -> int | None:
    """The GPU of an entry: its index, or the beginning of one UUID alone; None for no GPU."""
    number = _INDEX.match(entry)
    if number:
        return int(number[1]) if int(number[1]) < len(gpus) else None
    prefix = entry.strip()
    found = [i for i, gpu in enumerate(gpus) if gpu.uuid.startswith(prefix)]
    return found[0] if prefix.startswith("GPU-") and len(found) == 1 else None


def count_visible(listing: str, visible: str | None) -> int:
    """GPUs that CUDA enumerates, of those that ``nvidia-smi -L`` lists.

    Args:
        visible: CUDA_VISIBLE_DEVICES; None where it is not set.  As CUDA reads it: the list ends
            before its first entry that is no GPU ("-1"), and one named twice leaves none at all.
    """
    gpus = _listed(listing)
    if visible is not None and visible.strip().startswith("MIG-"):
        return min(1, len(gpus))
    chosen: list[int] = []
    for entry in map(str, range(len(gpus))) if visible is None else visible.split(","):
        gpu = _chosen(entry, gpus)
        if gpu is None:
            break
        chosen.append(gpu)
    if len(set(chosen)) < len(chosen):
        return 0
    # A process enumerates one MIG instance at most, and then nothing else.
    return 1 if any(gpus[i].has_instances for i in chosen) else len(chosen)


def visible_gpus() -> int:
    """GPUs of this machine that the processes started from here will see; 0 without a driver."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listing = subprocess.run(
        ["nvidia-smi", "-L"], capture_output=True, text=True, errors="replace", check=False
    )
    if listing.returncode:
        return 0
    return count_visible(listing.stdout, os.environ.get("CUDA_VISIBLE_DEVICES"))


def check_gpus_are_used() -> None:
    """Raise ValueError where torch would take the CPU of a machine that lists GPUs, unasked."""
    import torch

    count = 0 if torch.cuda.is_available() else visible_gpus()
    if not count:
        return
    try:
        torch.cuda.init()
        reason = "torch.cuda.is_available() is False"
    except (AssertionError, RuntimeError) as error:  # a CPU's torch; a driver that is too old
        reason = str(error).split("\n")[0]
    raise ValueError(
        f"nvidia-smi lists {count} GPU(s), but torch {torch.__version__} can use none ({reason}); "
        "install a driver and a torch that fit each other, or set CUDA_VISIBLE_DEVICES= to train "
        "on the CPU"
    )
