"""What a run leaves in its directory for others to read: ``run.json``, and its files' lines."""

from __future__ import annotations

import datetime
import json
import os
import platform
from typing import Any

import megatron.core
import torch
import torch.distributed as dist

import megatron_phf
from megatron_phf import device, parallel
from megatron_phf.config import Config
from megatron_phf.model.architecture import Architecture
from megatron_phf.output import write_json


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


def write_run_file(config: Config, arch: Architecture) -> None:
    """``run.json`` in --output-dir: what is run, on what.  Rank 0 writes."""
    if not parallel.is_first_rank():
        return
    directory = config.output.output_dir
    os.makedirs(directory, exist_ok=True)
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
