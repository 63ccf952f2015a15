"""Environment variables that CUDA, its allocator and NCCL read: our defaults, in one place.

Without torch, which must not be imported before they are set.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

# torch 2.9 renamed the first; some versions read only one of them, and for some settings only the
# older one (pytorch/pytorch#183387).
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_OURS = "MEGATRON_PHF_DEFAULTS"  # the names of those that the user has left open


def set_cuda_defaults(environment: MutableMapping[str, str]) -> None:
    """Set, in place, what the user has left open; before torch is imported."""
    given = [environment[name] for name in _ALLOCATOR if name in environment]
    defaults = {
        # Megatron's overlap of communication and computation counts on one hardware queue.
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        # NCCL registers the buffers of its calls in a CUDA graph, and must not where they expand.
        "NCCL_GRAPH_REGISTER": "0",
        # Sequences of other lengths in each step leave holes that fixed segments could not fill.
        **dict.fromkeys(_ALLOCATOR, given[0] if given else "expandable_segments:True"),
    }
    ours = {name: value for name, value in defaults.items() if name not in environment}
    if ours:
        earlier = filter(None, [environment.get(_OURS)])  # a parent process's
        environment.update({**ours, _OURS: ",".join([*earlier, *ours])})


def without_defaults(environment: Mapping[str, str]) -> dict[str, str]:
    """A copy as the user has made it: for a program with defaults of its own."""
    ours = {_OURS, *environment.get(_OURS, "").split(",")}
    return {name: value for name, value in environment.items() if name not in ours}


def for_children(environment: Mapping[str, str]) -> dict[str, str]:
    """A copy by which child processes find this package, installed or in a checkout.

    They find nothing in the working directory, whose random.py would be Python's to them.
    """
    import megatron_phf

    parent = str(Path(megatron_phf.__file__).resolve().parents[1])
    known = environment.get("PYTHONPATH", "")
    path = os.pathsep.join(p for p in (parent, known) if p)
    return {**environment, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def torchrun(processes: int) -> list[str]:
    """Words before a script, or ``-m`` and a module: so many ranks on this machine.

    Its own name may be unknown to it, and then nobody would reach torchrun's store by that.
    """
    launcher = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--local-addr", "localhost", "--nproc-per-node", str(processes)]
