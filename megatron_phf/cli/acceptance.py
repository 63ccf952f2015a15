"""What nobody has seen on a GPU, checked: a table to paste into an issue, and JSON.

    bash examples/h100/acceptance.sh [path/to/model problems.jsonl] [--gpus N] [--dry-run]
    python tools/acceptance.py --table runs/acceptance.json      the table of a run before

Ten minutes of one card, an hour of eight: the two lists of docs/gpu.md, in their order, each part
with a limit of its own.  Local layers and bf16 need CUDA alone; rows that need Transformer Engine
or vLLM say so where it is missing.  Without CUDA the same runs on CPUs with a small model, whose
speed is shown without a verdict.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from typing import Any

from megatron_phf.cli.accept.launch import Clock, run_all
from megatron_phf.cli.accept.model import write_tiny
from megatron_phf.cli.accept.plan import LAYOUTS, MINUTES, PARTS, Case, Plan
from megatron_phf.cli.accept.table import render, write_report
from megatron_phf.cli.accept.verdicts import evaluate
from megatron_phf.console import program
from megatron_phf.runtime.environment import for_children
from megatron_phf.runtime.visible_gpus import check_gpus_are_used, visible_gpus

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


def _job(args: argparse.Namespace, tiny: str) -> list[str]:
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
    return [*job, "--global-batch-size", "16"]


def check_machine(cuda: bool) -> None:
    """Raise ValueError where the rest would fail one by one: triton builds its launchers here."""
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    if cuda and not (shutil.which("cc") and os.path.exists(header)):
        raise ValueError(
            f"no C compiler, or no {header}, which triton needs at run time: "
            "apt-get install gcc python3-dev"
        )


def make_plan(args: argparse.Namespace, directory: str) -> Plan:
    """The cases for this machine."""
    from megatron_phf.runtime import device

    check_gpus_are_used()
    cuda = device.has_cuda()
    check_machine(cuda)
    most = max(1, visible_gpus())
    tiny = os.path.join(directory, "tiny")
    write_tiny(tiny)
    free = shutil.disk_usage(directory).free
    return Plan(
        directory=directory,
        tiny=tiny,
        large=args.model or os.path.join(directory, "large"),
        traces=f"{os.path.splitext(os.path.abspath(args.json))[0]}_traces",
        cuda=cuda,
        engine=engine_problem(cuda),
        vllm=None if cuda and shutil.which("vllm") else "CUDA and vLLM's program on PATH",
        disk=None if cuda and free > 20e9 else "CUDA and 20 GB of disk under TMPDIR",
        processes=args.gpus or max(n for n in LAYOUTS if n <= most),
        job=_job(args, tiny),
        random=args.model is None,
        steps=10 if cuda else 4,
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
    return {
        "device": where,
        "processes": plan.processes,
        "model": given or "a random Qwen3",
        "versions": versions,
        "seconds": round(time.monotonic() - began, 1),
    }


def _dry_run(plan: Plan, cases: list[Case], minutes: float) -> None:
    for case in cases:
        words = f"skipped: needs {case.missing}" if case.missing else " ".join(case.argv)
        print(f"{case.part}: {case.name} ({case.processes} process(es)): {words}")
    parts = dict.fromkeys(case.part for case in cases)
    limits = ", ".join(f"{part} {PARTS[part]:.0f} s" for part in parts)
    print(f"at most {60 * minutes:.0f} s: {limits}")


def run(args: argparse.Namespace, directory: str) -> int:
    """0: nothing failed or came too late, 1: something did."""
    began = time.monotonic()
    plan = make_plan(args, directory)
    parts = {*(args.parts or PARTS), *(["write", "machine"] if args.parts else [])}
    cases = [case for case in plan.cases() if case.part in parts]
    minutes = args.minutes or MINUTES[plan.processes]
    if args.dry_run:
        _dry_run(plan, cases, minutes)
        return 0
    where, clock = machine(), Clock(began + 60 * minutes)

    def report() -> None:
        write_report(
            args.json,
            describe(plan, where, args.model, began),
            evaluate(plan, cases, clock),
            clock.times,
        )

    run_all(plan, cases, clock, report)
    for name, problem in clock.problems.items():
        print(f"{name} failed:\n{problem}\n", file=sys.stderr)
    print(f"megatron_phf acceptance: {render(args.json)}\n\nalso in {args.json}")
    rows = evaluate(plan, cases, clock)
    return 1 if any(row.result in ("fail", "late") for row in rows) else 0


@program
def main(argv: list[str] | None = None) -> int:
    """0 passed, 1 failed, 2 for a mistake in the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="HuggingFace directory; a random model without")
    parser.add_argument("data", nargs="?", help="problems.jsonl")
    parser.add_argument("--gpus", type=int, choices=sorted(LAYOUTS), help="default: all of them")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        metavar="PART",
        help=f"only these of {', '.join(PARTS)}",
    )
    parser.add_argument("--minutes", type=float, help="until what is left is not run: 10, 20, 60")
    parser.add_argument("--json", default="runs/acceptance.json", help="the report")
    parser.add_argument("--dry-run", action="store_true", help="print what would run")
    parser.add_argument("--table", metavar="JSON", help="print the table of a report, run nothing")
    args = parser.parse_args(argv)
    if (args.model is None) != (args.data is None):
        parser.error("a model needs its problems.jsonl")
    with tempfile.TemporaryDirectory() as directory:
        if args.table is not None:
            print(render(args.table))
            return 0
        return run(args, directory)


if __name__ == "__main__":
    sys.exit(main())
