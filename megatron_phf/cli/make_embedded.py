"""The embedded arithmetic task as files, for the job on a HuggingFace model, and for studies.

    torchrun --nproc-per-node 1 tools/make_embedded.py --output-dir runs/study_start --seed 1

Writes OUTPUT/seed<N>/base_model (a tiny model after its supervised warm start), train.jsonl and
heldout.jsonl there, and the prompt templates student.txt and teacher.txt into OUTPUT.  The flags
are those of examples/pretrain_phf.sh for the embedded task.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from megatron_phf.cli.job_paths import training_paths
from megatron_phf.cli.main import run_rank
from megatron_phf.config.flags import parse_args
from megatron_phf.config.settings import Config
from megatron_phf.demo.task import ARITHMETIC_TEMPLATES
from megatron_phf.files.replace import check_new_text
from megatron_phf.runtime.signals import StopSignals

if TYPE_CHECKING:
    from megatron_phf.runtime.heartbeat import Heartbeat


def _read() -> Config:
    config = parse_args(sys.argv[1:])
    if not config.is_embedded:
        raise ValueError("--hf-model and --data belong to another task: leave them out")
    for side in ("student", "teacher"):
        path = os.path.join(config.output.output_dir, f"{side}.txt")
        check_new_text(path, getattr(ARITHMETIC_TEMPLATES, side))
    return config


def _directory(config: Config) -> str:
    return os.path.join(config.output.output_dir, f"seed{config.train.seed}")


def _make(config: Config, signals: StopSignals, heartbeat: Heartbeat) -> None:
    from megatron_phf.demo.study import prepare

    task = config.replaced(output_dir=_directory(config))
    prepare(task, signals, heartbeat, templates=config.output.output_dir).warm_start()


def main() -> None:
    """One rank of it."""
    run_rank(
        _read,
        _make,
        lambda config: training_paths(config.replaced(output_dir=_directory(config))),
    )


if __name__ == "__main__":
    main()
