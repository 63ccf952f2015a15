"""Entry of every rank of a training job."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_phf.cli import preflight
from megatron_phf.cli.job_paths import JobPath, check_paths, training_paths
from megatron_phf.config.flags import parse_args
from megatron_phf.config.settings import Config
from megatron_phf.console import print_anything
from megatron_phf.runtime import environment, private_names
from megatron_phf.runtime.run_lock import RunLock
from megatron_phf.runtime.signals import StopSignals

if TYPE_CHECKING:
    from megatron_phf.runtime.heartbeat import Heartbeat

# What a rank does once it has joined the others.
Job = Callable[[Config, StopSignals, "Heartbeat"], Any]
# What megatron-core says on every rank of a machine without its optional packages.
_EXPECTED_WARNINGS = (
    ".*Apex (is|are) not installed.*",
    "full scope is deprecated.*",
    ".*async grad allreduce.*CUDA_DEVICE_MAX_CONNECTIONS.*",
    "MimoModelConfig is experimental.*",  # 0.19, of a model that nobody asked for
)
# What 0.19 logs of the class that it has GPT models in: (logger, start of the message).
_EXPECTED_LOG = ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED")

# How long a rank with nothing to say waits for the rank that has: its imports, on a busy machine.
_SILENT_SECONDS = 20.0


def _fail(message: str, signals: StopSignals | None = None) -> NoReturn:
    """Print and leave at once: destructors of process groups may wait for ranks that are gone.

    A rank without a message waits first: torchrun ends the others as soon as one leaves, and the
    one that has the message must not be among those.
    """
    if signals is not None:
        signals.restore()
    if message:
        print(message, file=sys.stderr, flush=True)
    elif signals is None or signals.received is None:
        time.sleep(_SILENT_SECONDS)
    sys.stdout.flush()
    os._exit(1)


def _first_to_fail() -> bool:
    """Whether no other rank has failed before: that one names the cause, the rest its echo."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return _is_first_rank()
    with contextlib.suppress(RuntimeError):  # the store itself may be gone with its rank
        return private_names.default_store().add("megatron_phf/failures", 1) == 1
    return False


def leave_on_error(run: Callable[[], None], signals: StopSignals | None = None) -> None:
    """Run a rank's work; of an error the first rank to fail says what it is, and all leave."""
    print_anything()
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message, category=UserWarning)
    logger, start = _EXPECTED_LOG
    logging.getLogger(logger).addFilter(lambda r: not r.getMessage().startswith(start))
    try:
        run()
    except ValueError as error:
        _fail(f"error: {error}" if _first_to_fail() else "", signals)
    except Exception:
        rank = os.environ.get("RANK", "0")
        _fail(f"rank {rank} failed:\n{traceback.format_exc()}" if _first_to_fail() else "", signals)


def _run(config: Config, job: Job, signals: StopSignals) -> None:
    from torch import OutOfMemoryError

    from megatron_phf.runtime import device

    device.import_megatron()
    from megatron_phf.cli import out_of_memory
    from megatron_phf.runtime import parallel
    from megatron_phf.runtime.heartbeat import Heartbeat

    device.setup()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device.init_distributed(local_rank, config.parallel.distributed_timeout_minutes)
    parallel.initialize(config.parallel)
    if config.output.record_memory_history:
        device.record_memory_history()
    heartbeat = Heartbeat()
    try:
        job(config, signals, heartbeat)
    except OutOfMemoryError as error:
        rank = int(os.environ.get("RANK", "0"))
        raise ValueError(out_of_memory.report(error, config, heartbeat.phase, rank)) from error
    except RuntimeError as error:
        raise RuntimeError(f"{error}\nthe other ranks:\n{heartbeat.report()}") from error
    heartbeat.stop()
    parallel.destroy()


def _locked(config: Config) -> list[RunLock]:
    """Rank 0 keeps other runs out of the directories that this one writes."""
    from megatron_phf.runtime.together import on_first_rank

    directories = {"--output-dir": config.output.output_dir, "--save": config.checkpoint.save}
    locks: list[RunLock] = []

    def lock() -> None:
        for flag, path in directories.items():
            if path is not None:
                locks.append(RunLock(path, flag))

    on_first_rank(lock)
    return locks


def _train(config: Config, signals: StopSignals, heartbeat: Heartbeat) -> None:
    from megatron_phf.demo import study
    from megatron_phf.train.loop import train

    locks = _locked(config)
    if config.is_embedded:
        study.run(config, signals, heartbeat)
    else:
        train(config, signals, heartbeat)
    for lock in locks:
        lock.release()


def _leave_silently_at_sigint() -> None:
    """Until a job listens to it: without a traceback of each rank."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def run_rank(
    read: Callable[[], Config], job: Job, paths: Callable[[Config], list[JobPath]] = training_paths
) -> None:
    """Check what ``read`` gives, join the other ranks, run ``job``.

    ``paths``: what the job reads and writes.  torchrun's environment says who we are.  Leaves with
    status 1, and one message from one rank, where anything fails.
    """
    print_anything()
    _leave_silently_at_sigint()
    environment.set_cuda_defaults(os.environ)
    try:
        config = read()
        preflight.check(config)
        preflight.check_world_size(config, int(os.environ.get("WORLD_SIZE", "1")))
        if _is_first_rank():  # which writes them
            check_paths(paths(config), config)
    except ValueError as error:
        # Every rank finds the same, or waits for the first; one says so.
        _fail(f"error: {error}" if _is_first_rank() else "")
    signals = StopSignals()
    leave_on_error(lambda: _run(config, job, signals), signals)


def main(argv: list[str] | None = None) -> None:
    """The training job."""
    run_rank(lambda: parse_args(argv), _train)
