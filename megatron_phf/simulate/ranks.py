"""Several ranks of a job: one process imports everything once, and forks for each of them.

No import of torch before :func:`prepare`, which loads the shim first.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_phf.simulate import shim
from megatron_phf.simulate.job import Job

if TYPE_CHECKING:
    from megatron_phf.simulate.mode import FakeCuda


def prepare(engine_stub: str | None = None) -> FakeCuda:
    """Make this process one that has CUDA, and import the product; torch must not be there yet.

    Args:
        engine_stub: a directory with a package ``transformer_engine``, found before any other.

    Raises:
        ValueError: the shim cannot be had, or a private name is missing; says what to do.
    """
    shim.load()
    if engine_stub is not None:
        if not (Path(engine_stub) / "transformer_engine").is_dir():
            raise ValueError(f"{engine_stub}: no package transformer_engine in it")
        sys.path.insert(0, os.path.abspath(engine_stub))
    warnings.filterwarnings("ignore")
    from megatron_phf.runtime import cuda_on_cpu

    cuda_on_cpu.import_uncompiled()  # compiled kernels would not be simulated
    from megatron_phf.simulate import rank, surface, torch_names

    torch_names.check()
    sim = rank.make_simulator()
    surface.install(sim)
    gc.freeze()  # what all ranks share is not looked through, nor copied, by each of them
    return sim


def run_ranks(sim: FakeCuda, job: Job, ranks: Sequence[int], jobs: int = 1) -> list[dict[str, Any]]:
    """Each rank's result (see ``rank.simulate``) from a process of its own, ``jobs`` at a time."""
    with tempfile.TemporaryDirectory() as directory:
        paths = [Path(directory) / str(rank) for rank in ranks]
        waiting, running = list(zip(ranks, paths, strict=True)), set[int]()
        while waiting or running:
            if waiting and len(running) < jobs:
                running.add(_fork(sim, job, *waiting.pop(0)))
            else:
                pid, _ = os.waitpid(-1, 0)
                running.discard(pid)
        return [_read(rank, path) for rank, path in zip(ranks, paths, strict=True)]


def _fork(sim: FakeCuda, job: Job, rank: int, path: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        from megatron_phf.simulate.rank import simulate

        path.write_text(json.dumps(simulate(sim, job, rank)))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(0)


def _read(rank: int, path: Path) -> dict[str, Any]:
    if path.exists():
        return json.loads(path.read_text())
    lost = ["", "the simulation of this rank ended without a result (out of host memory?)", "?", 1]
    return {"rank": rank, "refused": [lost], "log": [], "memory": {}, "syncs": [], "place": {}}
