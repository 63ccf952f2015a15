"""A grid of runs: every variant with every seed, one command, resumable.

    python tools/grid.py --base examples/ablations/base/embedded.args --seeds 1,2,3,4,5 \\
        --output-dir runs/study examples/ablations/*.args [-- more flags of the training job]

A variant is a file of flags of examples/pretrain_phf.sh (# starts a comment); its name is the
file's.  --base has the flags that all share; {seed} in any flag becomes the run's seed.  Each run
has a directory OUTPUT/VARIANT/seed<N> with its metrics, evaluations and log.  A second start skips
the runs that have finished, and a run with --save-interval goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_phf.cli import preflight
from megatron_phf.cli.job_paths import check_paths, training_paths
from megatron_phf.config.flags import parse_args
from megatron_phf.config.presets import read_flags
from megatron_phf.console import program
from megatron_phf.files.replace import write_json
from megatron_phf.runtime.environment import for_children, torchrun

_LAUNCHER = Path(__file__).resolve().parents[2] / "examples" / "pretrain_phf.sh"


@dataclass(frozen=True)
class Run:
    """One variant with one seed."""

    variant: str
    seed: int
    directory: Path
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.variant} seed {self.seed}"

    def finished(self) -> bool:
        """Whether it ran to its end before.

        Raises:
            ValueError: with other flags.
        """
        marker = self.directory / "finished.json"
        if not marker.is_file():
            return False
        if tuple(json.loads(marker.read_text(encoding="utf-8"))["flags"]) != self.flags:
            raise ValueError(
                f"{marker}: this run had other flags; name another --output-dir, or remove "
                f"{self.directory} to run it again"
            )
        return True


def make_runs(
    variants: list[Path], seeds: list[int], output: Path, base: list[str], last: list[str]
) -> list[Run]:
    """Seed by seed, so that an early look at a grid compares all variants.

    Raises:
        ValueError: a flag is wrong, a file cannot be read, or two variants have one name.
    """
    names = [path.stem for path in variants]
    if len(set(names)) < len(names):
        raise ValueError(f"two variants of one name: {', '.join(sorted(names))}")
    runs = []
    for seed in seeds:
        for name, path in zip(names, variants, strict=True):
            directory = output / name / f"seed{seed}"
            own = ["--seed", str(seed), "--run-name", name, "--output-dir", str(directory)]
            flags = [*base, *read_flags(path), *last, *own]
            if "--save-interval" in flags:
                checkpoints = str(directory / "checkpoints")
                flags += ["--save", checkpoints, "--load", checkpoints, "--keep-last", "1"]
            flags = [flag.replace("{seed}", str(seed)) for flag in flags]
            try:
                config = parse_args(flags)
                preflight.check(config)
                check_paths(training_paths(config), config)
            except ValueError as error:
                raise ValueError(f"{name}, seed {seed}: {error}") from error
            runs.append(Run(name, seed, directory, tuple(flags)))
    return runs


def execute(run: Run, processes: int, threads: int) -> bool:
    """Train; whether it ended well.  What it prints goes to log.txt."""
    run.directory.mkdir(parents=True, exist_ok=True)
    command = [*torchrun(processes), str(_LAUNCHER), *run.flags]
    start = time.monotonic()
    with open(run.directory / "log.txt", "a", encoding="utf-8") as log:  # after a failed attempt's
        status = subprocess.call(
            [*command, "--no-progress"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=for_children({**os.environ, "OMP_NUM_THREADS": str(threads)}),
        )
    seconds = time.monotonic() - start
    if status == 0:
        finished = {"flags": run.flags, "seconds": round(seconds, 1)}
        write_json(str(run.directory / "finished.json"), finished)
    outcome = f"{seconds:.0f} s" if status == 0 else f"failed, see {run.directory / 'log.txt'}"
    print(f"{run.name}: {outcome}", flush=True)
    return status == 0


def run_grid(runs: list[Run], processes: int, together: int) -> int:
    """Run what has not finished, ``together`` at a time; how many failed."""
    waiting = [run for run in runs if not run.finished()]
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} finished before", flush=True)
    threads = max(1, (os.cpu_count() or 1) // (processes * together))
    with concurrent.futures.ThreadPoolExecutor(together) as pool:
        good = list(pool.map(lambda run: execute(run, processes, threads), waiting))
    return good.count(False)


@program
def main(argv: list[str] | None = None) -> int:
    """Status 1 where a run failed, 2 for a mistake in the command."""
    words = sys.argv[1:] if argv is None else argv
    split = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variants", nargs="+", type=Path, help="files of flags")
    parser.add_argument("--base", type=Path, help="file of the flags that all runs share")
    parser.add_argument("--seeds", default="1,2,3,4,5", help="comma separated")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/grid"))
    parser.add_argument("--processes", type=int, default=1, help="of each run (GPUs)")
    parser.add_argument("--parallel-runs", type=int, default=1, help="runs at the same time")
    args = parser.parse_args(words[:split])
    seeds = [int(word) for word in args.seeds.split(",")]
    base = read_flags(args.base) if args.base is not None else []
    runs = make_runs(args.variants, seeds, args.output_dir, base, words[split + 1 :])
    failed = run_grid(runs, args.processes, args.parallel_runs)
    if failed:
        print(f"{failed} run(s) failed; start the same command again to repeat them")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
