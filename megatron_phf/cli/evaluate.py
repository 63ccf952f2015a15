"""Average@k, pass@k and majority@k of a model, in any layout: k sampled answers, graded.

    torchrun --nproc-per-node 8 tools/evaluate.py --hf-model DIR --eval-data problems.jsonl \\
        --eval-samples 12 --output-dir runs/evaluate --tensor-model-parallel-size 2

The defaults are the published evaluation: thinking mode, temperature 1.0, top-p 0.95, at most 38912
new tokens (fewer where the model's positions end).  --preset paper --eval-dir DIR evaluates on its
three sets, DIR/aime2024.jsonl, aime2025.jsonl and hmmt2025.jsonl (30 problems each, fields
"problem" and "answer").  Weights: those of --hf-model, with --lora-adapter DIR, or those of --load,
a checkpoint of a run or a converted one.  Every generation is kept in --output-dir, and a second
start goes on where the first one ended.  --rollout-engine replay --replay-file generations.jsonl
grades recorded generations again, in one process without a model.  All flags of
examples/pretrain_phf.sh are understood; those of training have no effect.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megatron_phf.cli.job_paths import evaluation_paths
from megatron_phf.cli.main import run_rank
from megatron_phf.config.flags import parse_args
from megatron_phf.config.settings import Config
from megatron_phf.console import print_anything
from megatron_phf.data.problems import field_names, read_test_problems

_DEFAULTS = ["--eval-max-new-tokens", "38912", "--max-prompt-length", "2048"]
_DEFAULTS += ["--output-dir", "runs/evaluate"]
# PHF's test sets; each file has this many problems.
_SETS = ("aime2024", "aime2025", "hmmt2025")
_PROBLEMS = 30


def test_files(args: argparse.Namespace, config: Config) -> dict[str, str]:
    """Name -> file of each test set.

    Raises:
        ValueError: none is named, or a preset's is missing or has another number of problems.
    """
    path, preset = config.evaluation.eval_data, args.preset
    if (path is None) == (preset is None):
        raise ValueError("name either --eval-data FILE, or --preset and --eval-dir")
    if path is not None:
        if not Path(path).stem.strip("."):  # the name of a directory in --output-dir
            raise ValueError(f"--eval-data {path}: name the file after the set, as aime.jsonl")
        return {Path(path).stem: path}
    if args.eval_dir is None:
        raise ValueError(f"--preset {preset} needs --eval-dir, the directory of its files")
    names = _SETS if preset == "paper" else (preset,)
    files = {name: os.path.join(args.eval_dir, f"{name}.jsonl") for name in names}
    for file in files.values():
        if not os.path.isfile(file):
            raise ValueError(
                f"--preset {preset}: {file} is missing ({_PROBLEMS} problems, one a line)"
            )
    return files


def _check_counts(files: dict[str, str], preset: str | None, config: Config) -> None:
    data = config.data
    fields = field_names(data)
    for name, file in files.items():
        count = len(read_test_problems(file, fields, "--eval-data"))
        if preset is not None and count != _PROBLEMS:
            raise ValueError(f"{file}: {count} problems, but {name} has {_PROBLEMS}")


def _parse(given: list[str], args: argparse.Namespace) -> tuple[Config, dict[str, str]]:
    config = parse_args([*_DEFAULTS, *given])
    files = test_files(args, config)
    _check_counts(files, args.preset, config)
    if config.model.hf_model is None:
        raise ValueError("--hf-model is needed: the model, or that of the checkpoint")
    # What only training needs is set so that its checks hold here.
    first = next(iter(files.values()))
    config = config.replaced(
        data=first,
        eval_data=first,
        solution_field=config.data.problem_field,
        max_teacher_prompt_length=config.data.max_prompt_length,
        global_batch_size=int(os.environ.get("WORLD_SIZE", "1")),
        micro_batch_size=1,
    )
    return config, files


def _regrade(given: list[str], args: argparse.Namespace) -> None:
    from megatron_phf.cli.evaluate_job import regrade

    try:
        config = parse_args([*_DEFAULTS, *given])
        regrade(config, test_files(args, config))
    except ValueError as error:
        sys.exit(f"error: {error}")


def main(argv: list[str] | None = None) -> None:
    """One rank of the evaluation; status 1 and one error line for a mistake."""
    print_anything()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=("paper", *_SETS), help="the paper's test sets")
    parser.add_argument("--eval-dir", help="directory of the preset's files")
    args, given = parser.parse_known_args(argv)
    files: dict[str, str] = {}

    def read() -> Config:
        config, found = _parse(given, args)
        files.update(found)
        return config

    def job(config: Config, *_: object) -> None:
        from megatron_phf.cli.evaluate_job import evaluate_sets

        evaluate_sets(config, files)

    if "replay" in given:
        _regrade(given, args)
    else:
        run_rank(read, job, evaluation_paths)


if __name__ == "__main__":
    main()
