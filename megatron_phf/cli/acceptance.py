"""What nobody has seen on a GPU, checked in ten minutes: a table to paste into an issue, and JSON.

    bash examples/h100/acceptance.sh [path/to/model problems.jsonl] [--gpus N] [--dry-run]
    python tools/acceptance.py --table runs/acceptance.json      the table of a run before

Parity with plain transformers, losses in bf16 and FP8, resume, and of a large model (a random
Qwen3-1.7B, or the one that is named) step time by phase, MFU, the flow loss's price, memory beside
its formula, synchronisations and decoding.  Local layers and bf16 need CUDA
alone; rows that need Transformer Engine say so where it is missing.  Without CUDA the same runs on
CPUs with a small model, whose speed is shown without a verdict.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from megatron_phf.cli.accept.launch import Clock, run_all
from megatron_phf.cli.accept.model import large_settings, write_tiny
from megatron_phf.cli.accept.plan import LAYOUTS, Plan
from megatron_phf.cli.accept.table import render, write_report
from megatron_phf.cli.accept.verdicts import evaluate
from megatron_phf.console import program
from megatron_phf.runtime.environment import for_children
from megatron_phf.runtime.visible_gpus import visible_gpus

_PACKAGES = ("torch", "megatron-core", "mbridge", "transformers", "transformer-engine")


def engine_problem(cuda: bool) -> str | None:
    """What Transformer Engine's rows are skipped for; tried in a process of its own."""
    if not cuda:
        return "CUDA and Transformer Engine"
    if importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine"
    reason = _asked(
        "from megatron_phf.runtime.optional_packages import import_failure as failure; "
        "print(failure('transformer_engine') or '')"
    )
    return f"Transformer Engine ({reason})" if reason else None


def _asked(code: str) -> str:
    """What ``code`` prints in another process: a context here would take memory from the cases."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=for_children(os.environ),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    good = done.returncode == 0
    return done.stdout.strip() if good else f"unknown ({done.stderr.strip()[-200:]})"


def _job(args: argparse.Namespace, tiny: str, steps: int, processes: int) -> list[str]:
    """Flags of the training whose losses are compared: the given model, or the tiny one."""
    model = args.model or os.path.join(tiny, "trained")
    job = ["--hf-model", model, "--data", args.data or os.path.join(tiny, "problems.jsonl")]
    if args.model is None:
        for side in ("student", "teacher"):
            job += [f"--{side}-template", os.path.join(tiny, f"{side}.txt")]
        job += ["--max-new-tokens", "32", "--max-prompt-length", "64", "--lr", "1e-3"]
        job += ["--max-teacher-prompt-length", "128"]
    else:
        job += ["--max-new-tokens", "128"]
    if args.model is None and processes == 8:  # three layers over two stages
        job += ["--num-layers-in-first-pipeline-stage", "2"]
        job += ["--num-layers-in-last-pipeline-stage", "1"]
    return [*job, "--train-iters", str(steps), "--global-batch-size", "16"]


def make_plan(args: argparse.Namespace, directory: str) -> Plan:
    """The cases for this machine."""
    from megatron_phf.model.architecture import parse_architecture, read_architecture
    from megatron_phf.runtime import device

    device.check_gpus_are_used()
    cuda = device.has_cuda()
    # All that are there, of the layouts that there are: a second GPU is what NCCL is met on.
    most = max((n for n in LAYOUTS if n <= visible_gpus()), default=1)
    processes = args.gpus or (most if cuda else 2)
    tiny = os.path.join(directory, "tiny")
    write_tiny(tiny)
    steps = args.steps or (10 if cuda else 4)
    if args.model is None:
        config = {"model_type": "qwen3", **large_settings(cuda), "rope_theta": 1e6}
        arch = parse_architecture(config, "the large model")
    else:
        arch = read_architecture(args.model)
    return Plan(
        directory=directory,
        tiny=tiny,
        large=args.model or os.path.join(directory, "large"),
        arch=arch,
        cuda=cuda,
        engine=engine_problem(cuda),
        processes=processes,
        steps=steps,
        job=[*_job(args, tiny, steps, processes), *LAYOUTS[processes]],
    )


def machine() -> str:
    """Its devices."""
    return _asked("from megatron_phf.runtime import device; print(device.describe())")


def describe(plan: Plan, where: str, given: str | None, began: float) -> dict[str, Any]:
    """What ran ``where``, for the report."""
    versions = {"python": sys.version.split()[0]}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    billions = plan.arch.num_parameters() / 1e9
    return {
        "device": where,
        "processes": plan.processes,
        "model": given or f"a random Qwen3 of {billions:.2g} B parameters",
        "versions": versions,
        "expected_seconds": round(plan.expected_seconds()),
        "seconds": round(time.monotonic() - began, 1),
    }


def _dry_run(plan: Plan, minutes: float) -> None:
    for case in plan.cases():
        print(
            f"{case.name} ({plan.processes} process(es), expected {case.seconds:.0f} s on an H100, "
            f"at most {case.limit:.0f} s): {' '.join(case.argv)}"
        )
    if plan.engine is not None:
        print(f"skipped: what needs {plan.engine}")
    print(f"expected {plan.expected_seconds():.0f} s on an H100 of {60 * minutes:.0f} s at most")


def run(args: argparse.Namespace, directory: str) -> int:
    """0: nothing failed or came too late, 1: something did."""
    began = time.monotonic()
    plan = make_plan(args, directory)
    if args.dry_run:
        _dry_run(plan, args.minutes)
        return 0
    where, clock = machine(), Clock(began + 60 * args.minutes)
    cases = plan.cases()
    if args.model is None:
        cases = [plan.make_large(), *cases]

    def report() -> None:
        write_report(
            args.json, describe(plan, where, args.model, began), evaluate(plan, clock), clock.times
        )

    run_all(plan, cases, clock, report)
    for name, problem in clock.problems.items():
        print(f"{name} failed:\n{problem}\n", file=sys.stderr)
    print(f"megatron_phf acceptance: {render(args.json)}\n\nalso in {args.json}")
    rows = evaluate(plan, clock)
    return 1 if any(row.result in ("fail", "late") for row in rows) else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; SystemExit for a mistake in it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="HuggingFace directory; a random model without")
    parser.add_argument("data", nargs="?", help="problems.jsonl")
    parser.add_argument("--gpus", type=int, choices=sorted(LAYOUTS), help="default: all there are")
    parser.add_argument("--steps", type=int, default=0, help="of the loss curves, default 10")
    parser.add_argument("--minutes", type=float, default=10, help="until what is left is not run")
    parser.add_argument("--json", default="runs/acceptance.json", help="the report")
    parser.add_argument("--dry-run", action="store_true", help="print what would run")
    parser.add_argument("--table", metavar="JSON", help="print the table of a report, run nothing")
    args = parser.parse_args(argv)
    if (args.model is None) != (args.data is None):
        parser.error("a model needs its problems.jsonl")
    if args.steps and args.steps < 4:
        parser.error("--steps: need at least 4")
    return args


@program
def main(argv: list[str] | None = None) -> int:
    """0 passed, 1 failed, 2 for a mistake in the command line."""
    args = parse(argv)
    with tempfile.TemporaryDirectory() as directory:
        if args.table is not None:
            print(render(args.table))
            return 0
        return run(args, directory)


if __name__ == "__main__":
    sys.exit(main())
