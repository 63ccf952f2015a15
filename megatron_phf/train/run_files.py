"""What a run leaves in its directory for others to read: ``run.json``, and its files' lines."""

from __future__ import annotations

import datetime
import glob
import json
import os
import platform
from collections.abc import Iterable
from typing import Any

import megatron.core
import torch
import torch.distributed as dist

import megatron_phf
from megatron_phf.config.settings import Config
from megatron_phf.files.replace import set_aside, write_json
from megatron_phf.model.architecture import Architecture
from megatron_phf.runtime import device
from megatron_phf.runtime.together import on_first_rank

# What a run writes into --output-dir anew, beside its metrics and what its flags name.
_FILES = ("run.json", "evaluations.jsonl", "export_probe.safetensors")
_SNAPSHOTS = "out_of_memory_rank*.pickle"


def plain_config(config: Config) -> dict[str, dict[str, Any]]:
    """{group: {field: value}}."""
    return {group: dict(vars(values)) for group, values in vars(config).items()}


def versions() -> dict[str, str]:
    """Of what computes."""
    return {
        "megatron_phf": megatron_phf.__version__,
        "megatron-core": megatron.core.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def metrics_path(config: Config) -> str:
    """The run's metrics file."""
    return config.output.metrics_file or os.path.join(config.output.output_dir, "metrics.jsonl")


def keep_earlier_files(config: Config, names: Iterable[str] = _FILES) -> None:
    """Rename what an earlier run left where this one starts anew, and say so.  For rank 0."""
    directory = config.output.output_dir
    paths = [metrics_path(config), config.rollout.record_rollouts]
    paths += [os.path.join(directory, name) for name in names]
    paths += glob.glob(os.path.join(glob.escape(directory), _SNAPSHOTS))
    # An empty file holds nothing, and may be one that somebody watches.
    kept = set_aside(path for path in paths if path is not None and _has_content(path))
    if kept:
        print(f"files of an earlier run are kept: {', '.join(kept)}", flush=True)


def _has_content(path: str) -> bool:
    return os.path.isfile(path) and os.path.getsize(path) > 0


def write_run_file(config: Config, arch: Architecture, done: int = 0) -> None:
    """``run.json`` in --output-dir: what is run, on what; every rank calls, rank 0 writes.

    A run that starts anew (``done`` 0) renames the files of an earlier one there, and says so.
    """
    on_first_rank(_write_run_file, config, arch, done)


def _write_run_file(config: Config, arch: Architecture, done: int) -> None:
    directory = config.output.output_dir
    os.makedirs(directory, exist_ok=True)
    if not done:
        keep_earlier_files(config)
    content = {
        "run_name": config.output.run_name,
        "seed": config.train.seed,
        "config": plain_config(config),
        "world_size": dist.get_world_size(),
        "device": device.device().type,
        "hardware": device.describe(),
        "model": {
            "num_layers": arch.num_layers,
            "hidden_size": arch.hidden_size,
            "parameters": arch.num_parameters(),
        },
        "versions": versions(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    write_json(os.path.join(directory, "run.json"), content)


def step_of(line: str) -> int:
    """The step of a line of a run's JSONL files; -1 where it is torn."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1
