"""Play ranks of a job on one CPU, without GPU, weights or data: what would it take, would it run?

    python tools/dry_run.py --world 8 --ranks first,middle,last --hf-config config.json -- \\
        --tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer

Behind ``--`` stand the flags of the training job.  The product's own step runs on CUDA tensors
that have no memory; printed are, for each rank, peak memory by phase and holder, communication by
group, the lines at which the host waits for the device, and whatever CUDA would refuse.  The logs
of the ranks are matched: another order, shape or group is a hang on a cluster.  Status 1 where the
job would fail, 2 for bad input.  See docs/dry_run.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from megatron_phf.cli import preflight
from megatron_phf.config.flags import parse_args
from megatron_phf.config.settings import Config
from megatron_phf.console import program
from megatron_phf.simulate import match, ranks, report
from megatron_phf.simulate.job import Job
from megatron_phf.teacher.architecture import check_models, read_models

_NAMES = ("first", "middle", "last", "stages", "all")


def _arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(the tool's own, the job's flags)."""
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world", type=int, required=True, help="ranks of the job")
    parser.add_argument(
        "--ranks", default="first,middle,last",
        help=f"numbers, {', '.join(_NAMES)}, with commas; stages: one of each pipeline stage",
    )  # fmt: skip
    parser.add_argument("--hf-config", help="a config.json, in place of the job's --hf-model")
    parser.add_argument(
        "--lengths", help="tokens PROMPT,RESPONSE or PROMPT,TEACHER_PROMPT,RESPONSE; the longest"
    )
    parser.add_argument("--decode", action="store_true", help="rollouts in process too")
    parser.add_argument("--steps", type=int, default=1, help="the last one is shown")
    parser.add_argument("--jobs", type=int, default=1, help="ranks at a time")
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="GB; more is an error")
    parser.add_argument(
        "--transformer-engine-stub", metavar="DIR", help="what stands in for Transformer Engine"
    )
    parser.add_argument("--json", metavar="FILE", help="write everything there")
    return parser.parse_args(argv[:cut]), argv[cut + 1 :]


def chosen_ranks(text: str, world: int, config: Config) -> list[int]:
    """The numbers that ``--ranks`` asks for, in order.

    Raises:
        ValueError: a word that is none, or a number outside the world.
    """
    p = config.parallel
    # Megatron's order of ranks: TP, CP, DP (with EP in it), PP.
    stages = range(0, world, world // p.pipeline_model_parallel_size)
    names = {"first": [0], "middle": [world // 2], "last": [world - 1], "all": range(world)}
    found: set[int] = set()
    for word in text.split(","):
        if word in _NAMES:
            found |= set(names.get(word, stages))
        elif word.isdecimal() and int(word) < world:
            found.add(int(word))
        else:
            raise ValueError(
                f"--ranks {word}: need a number from 0 to {world - 1}, or {', '.join(_NAMES)}"
            )
    return sorted(found)


def _lengths(text: str | None, config: Config) -> tuple[int, int, int]:
    data, response = config.data, config.rollout.max_new_tokens
    longest = data.max_prompt_length, data.max_teacher_prompt_length, response
    if text is None:
        return longest
    words = text.split(",")
    if len(words) not in (2, 3) or not all(w.isdecimal() and int(w) > 0 for w in words):
        raise ValueError(f"--lengths {text}: need PROMPT,RESPONSE in tokens, as 512,1024")
    prompt, *teacher, response = map(int, words)
    return prompt, teacher[0] if teacher else longest[1], response


@contextlib.contextmanager
def model_directory(config_file: str | None) -> Iterator[list[str]]:
    """Flags that name a directory with this config.json in it; none for None."""
    if config_file is None:
        yield []
        return
    with tempfile.TemporaryDirectory() as directory:
        try:
            shutil.copyfile(config_file, os.path.join(directory, "config.json"))
        except OSError as error:
            raise ValueError(f"--hf-config {config_file}: {error.strerror}") from error
        yield ["--hf-model", directory]


def read_job(flags: list[str], world: int, lengths: str | None, **options: Any) -> Job:
    """The job of a command line, checked as its start would, but for the files it reads.

    Raises:
        ValueError: what the job itself would refuse.
    """
    config = parse_args(flags)
    if config.model.hf_model is None:
        raise ValueError("the dry run needs --hf-config, or --hf-model in the job's flags")
    # Nothing is read, resumed or written: the simulation has a batch of its own, of full length.
    own: dict[str, Any] = dict.fromkeys(
        ("load", "save", "lora_adapter", "eval_data", "vllm_api_key_file")
    )
    own["decode_cuda_graphs"] = "off"  # which cannot be simulated
    own |= {"save_interval": 0, "keep_last": 0, "async_save": False, "exact_checkpoint": False}
    names = ("max_prompt_length", "max_teacher_prompt_length", "max_new_tokens")
    own |= dict(zip(names, _lengths(lengths, config), strict=True))
    config = config.replaced(**own, eval_interval=0, data=config.data.data or "none")
    models = read_models(config)
    if world < 1:
        raise ValueError(f"--world {world}: need at least 1")
    preflight.check_settings(config)
    preflight.check_expert_flags(models, config)
    preflight.check_fp8_model(config, models.student)
    check_models(models, config, tokenizers=False)
    preflight.check_world_size(config, world)
    # Whatever the engine: rollouts are made here, and decoded in process where asked.
    return Job(config.replaced(replay_file=None), models, world, **options)


def _too_large(results: list[dict[str, Any]], gigabytes: float) -> list[str]:
    return [
        f"rank {r['rank']}: {report.peak(r) / 1e9:.1f} GB at its peak, a GPU has {gigabytes:g}"
        for r in results
        if report.peak(r) > gigabytes * 1e9
    ]


def _run(given: argparse.Namespace, flags: list[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """(each rank's result, what is wrong between them or with their size)."""
    sim = ranks.prepare(given.transformer_engine_stub)
    with model_directory(given.hf_config) as model:
        job = read_job(
            [*flags, *model], given.world, given.lengths, decode=given.decode, steps=given.steps,
            engine_stub=given.transformer_engine_stub is not None,
        )  # fmt: skip
        numbers = chosen_ranks(given.ranks, given.world, job.config)
        results = ranks.run_ranks(sim, job, numbers, given.jobs)
    found = _too_large(results, given.gpu_memory)
    if not any(r["refused"] for r in results):  # a log that ends early matches nothing
        found += match.mismatches({r["rank"]: r["log"] for r in results})
    return results, found


@program
def main(argv: list[str] | None = None) -> int:
    """Print what each rank takes; status 1 where the job would fail, 2 for bad input."""
    given, flags = _arguments(sys.argv[1:] if argv is None else argv)
    if given.steps < 1 or given.jobs < 1:
        raise ValueError("--steps and --jobs: need at least 1")
    results, problems = _run(given, flags)
    for result in results:
        print(report.describe(result, given.world), end="\n\n")
    for problem in problems:
        print(f"error: {problem}")
    if not problems and not any(r["refused"] for r in results):
        shown = ", ".join(str(r["rank"]) for r in results)
        print(f"no error; the communication of ranks {shown} goes together")
    if given.json:
        with open(given.json, "w", encoding="utf-8") as f:
            json.dump({"world": given.world, "problems": problems, "ranks": results}, f)
    return 1 if problems or any(r["refused"] for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
