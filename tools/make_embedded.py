"""The embedded arithmetic task as files, for the job on a HuggingFace model, and for studies.

    torchrun --nproc-per-node 1 tools/make_embedded.py --output-dir runs/study_start --seed 1

Writes OUTPUT/seed<N>/base_model (a tiny model after its supervised warm start), train.jsonl and
heldout.jsonl there, and the prompt templates student.txt and teacher.txt into OUTPUT.  The flags
are those of examples/pretrain_phf.sh for the embedded task.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_phf.config import Config
from megatron_phf.flags import parse_args
from megatron_phf.main import run_rank


def _read() -> Config:
    config = parse_args(sys.argv[1:])
    if not config.is_embedded:
        raise ValueError("--hf-model and --data belong to another task: leave them out")
    return config


def _make(config: Config) -> None:
    from megatron_phf.demo import write_task

    output = config.output.output_dir
    write_task(config, os.path.join(output, f"seed{config.train.seed}"), output)


if __name__ == "__main__":
    run_rank(_read, lambda config, *_: _make(config))
