"""Kill a run at random times again and again; nothing may be lost, and the result is the same.

    python -m tests.soak [--kills 110] [--seed 1] [--directory DIR] [--served [WAY]]     (make soak)

Two ranks train a tiny model on their own rollouts and save after every step, asynchronously in
every other attempt.  Each attempt: one random rank gets SIGKILL at a random time, one in five while
the ranks start or resume, the others in the steps after that; the other rank gets the SIGTERM that
torchrun would send, and must end; the newest checkpoint must be whole; the next attempt resumes.
At the end metrics and weights must be bit-equal to those of a run that nobody disturbed.  The ranks
are forked from this process, which has imported everything once; ``tests/faults`` does the same
with torchrun and fewer kills.  ``--served``: a server with vLLM's endpoints samples the next two
steps' rollouts while a step trains, so that every kill meets some of them under way; it gets
adapters, or by another ``WAY`` all weights.  Which weights sample a token then depends on when they
come: steps and prompts must be those of the undisturbed run, no rollout too old.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from megatron_phf.cli.main import main as product
from megatron_phf.demo import study
from megatron_phf.runtime import device, heartbeat
from megatron_phf.train import checkpoint_files, loop
from tests.faults.runs import flags, latest, make_files, outputs, same_weights, steps_of
from tests.launch import free_port

RANKS, AHEAD = 2, 2
PHASES = ("start", "resume", "rollout", "teacher", "student", "optimizer", "save", "between")
# torchrun's, before it kills.
PATIENCE_SECONDS = 30.0


class Attempt:
    """One start of both ranks, as torchrun would start them."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self._places = mmap.mmap(-1, 64 * RANKS)  # shared with the ranks: where each is
        self.begin = time.monotonic()
        port = free_port()
        self.pids = [self._fork(rank, port, arguments, log) for rank in range(RANKS)]

    def _fork(self, rank: int, port: int, arguments: list[str], log: Path) -> int:
        sys.stdout.flush()
        if pid := os.fork():
            return pid
        status = 1
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            )  # fmt: skip
            self._note(rank, "start")
            heard = heartbeat.Heartbeat.at

            def at(beat: heartbeat.Heartbeat, phase: str) -> None:
                self._note(rank, phase.split(", ")[-1])
                heard(beat, phase)

            heartbeat.Heartbeat.at = at  # type: ignore[method-assign]
            resumed = loop.Checkpoints.resume

            def begin(session: loop.Checkpoints) -> int:
                self._note(rank, "resume")
                return resumed(session)

            loop.Checkpoints.resume = begin  # type: ignore[method-assign]
            product(arguments)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)

    def _note(self, rank: int, phase: str) -> None:
        self._places[64 * rank : 64 * rank + 64] = phase.encode().ljust(64)

    def place(self, rank: int) -> str:
        """The phase that ``rank`` was last seen in."""
        return self._places[64 * rank : 64 * rank + 64].decode().strip(" \0") or "start"

    def kill(self, rank: int, seconds: float, running: bool) -> str | None:
        """SIGKILL a rank ``seconds`` after its start, or (``running``) its first step's.

        Returns the phase it was in, or None where it had ended before.
        """
        while not self._ended(rank) and running and self.place(rank) in ("start", "resume"):
            time.sleep(0.01)
        end = time.monotonic() + seconds
        while not self._ended(rank) and time.monotonic() < end:
            time.sleep(0.005)
        if self._ended(rank):
            return None
        os.kill(self.pids[rank], signal.SIGKILL)
        phase = self.place(rank)
        for pid in self.pids:
            os.kill(pid, signal.SIGTERM)  # as torchrun does; nothing to the one that is dead
        return phase

    def _ended(self, rank: int) -> bool:
        status = os.waitid(os.P_PID, self.pids[rank], os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return status is not None

    def wait(self, patience: float = PATIENCE_SECONDS) -> bool:
        """Until all ranks have ended; whether each did by itself in time."""
        end = time.monotonic() + patience
        left = set(self.pids)
        in_time = True
        while left:
            left -= {pid for pid in left if os.waitpid(pid, os.WNOHANG)[0]}
            if left and time.monotonic() > end:
                in_time = False
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        return in_time


def _whole(checkpoints: Path) -> str | None:
    """What is wrong with the checkpoints that a run would see."""
    for iteration in checkpoint_files.saved_iterations(str(checkpoints)):
        path = checkpoint_files.iteration_directory(str(checkpoints), iteration)
        try:
            manifest = checkpoint_files.read_manifest(path)
        except ValueError as error:
            return str(error)
        if problems := checkpoint_files.damage(path, manifest["files"]):
            return f"{path}: {problems}"
    return None


@contextmanager
def _server(directory: Path, way: str) -> Iterator[list[str]]:
    """Flags of rollouts from a server, in a process of its own."""
    served = directory / "served"
    shutil.copytree(directory / "hf", served)
    command = [sys.executable, "-m", "tests.fake_vllm", str(served)]
    command += ["--weight-transfer-config", '{"backend": "torch_distributed"}']
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        engine = ["--rollout-engine", "vllm", "--vllm-url", url]
        engine += ["--max-off-policy-steps", str(AHEAD), "--vllm-weight-sync", way]
        ways = {"adapter": ["--lora-rank", "4"], "checkpoint": ["--vllm-sync-dir", str(served)]}
        yield [*engine, *ways.get(way, []), "--vllm-backoff-seconds", "0.1"]


def _undisturbed(directory: Path, base: list[str], steps: int) -> float:
    begin = time.monotonic()
    arguments = [*base, *_outputs(directory, "straight")]
    attempt = Attempt(arguments, directory / "straight.log")
    attempt.wait(patience=3600.0)
    assert latest(directory / "straight") == steps, (directory / "straight.log").read_text()[-3000:]
    return time.monotonic() - begin


def _outputs(directory: Path, name: str) -> list[str]:
    recorded = directory / name / "rollouts.jsonl"
    return [*outputs(directory, name), "--record-rollouts", str(recorded)]


def _differences(directory: Path, log: Path, exact: bool) -> list[str]:
    """``exact``: nothing depends on when weights come."""
    killed, straight = directory / "killed", directory / "straight"
    runs = [(steps_of(run), _prompts(run)) for run in (killed, straight)]
    (steps, prompts), (wanted, wanted_prompts) = runs
    ages = [step.get("rollout_staleness", {"max": 0})["max"] for step in steps]
    checks = {
        "a resume met a damaged checkpoint": "damaged checkpoint" not in log.read_text(),
        "steps are missing": [s["step"] for s in steps] == [s["step"] for s in wanted],
        "other prompts than the undisturbed run's": prompts == wanted_prompts,
        "a rollout was too old": max(ages) <= AHEAD,
        "the metrics differ from the undisturbed run's": not exact or steps == wanted,
        "the weights differ from the undisturbed run's": not exact
        or same_weights(killed, straight),
    }
    return [problem for problem, good in checks.items() if not good]


def _prompts(run: Path) -> list[list[int]]:
    lines = (run / "rollouts.jsonl").read_text().splitlines()
    return [json.loads(line)["student_prompt_ids"] for line in lines]


def soak(
    directory: Path, kills: int, steps: int, seed: int, more: list[str], exact: bool = True
) -> dict:
    """Run it, with ``more`` flags; the report."""
    generator = random.Random(seed)
    base = [*flags(directory, steps), *more]
    seconds = _undisturbed(directory, base, steps)
    print(f"undisturbed: {steps} steps in {seconds:.0f} s", flush=True)
    base += [*_outputs(directory, "killed"), "--save-interval", "1", "--keep-last", "2"]
    by_phase: Counter[str] = Counter()
    failures: list[str] = []
    window, attempts, begin = 2.0, 0, time.monotonic()
    checkpoints = directory / "killed" / "checkpoints"
    log = directory / "killed.log"
    while sum(by_phase.values()) < kills:
        attempts += 1
        before = max([0, *checkpoint_files.saved_iterations(str(checkpoints))])
        attempt = Attempt([*base, "--async-save"] if attempts % 2 else base, log)
        phase = attempt.kill(
            generator.randrange(RANKS), generator.uniform(0.0, window), generator.random() > 0.2
        )
        if phase is not None:
            by_phase[phase if phase in PHASES else "between"] += 1
        if not attempt.wait():
            failures.append(f"attempt {attempts}: the other rank did not end ({phase})")
        if problem := _whole(checkpoints):
            failures.append(f"attempt {attempts} ({phase}): {problem}")
        after = max([0, *checkpoint_files.saved_iterations(str(checkpoints))])
        if after < before:
            failures.append(f"attempt {attempts} ({phase}): step {before} was lost")
        if after == steps:
            failures.append(f"all {steps} steps done after {sum(by_phase.values())} kills")
            break
        # The window follows the machine's speed: about one new step an attempt.
        window *= 0.9 if after > before + 1 else 1.0 if after > before else 1.1
    Attempt(base, log).wait(patience=3600.0)
    failures += _differences(directory, log, exact)
    return {
        "kills": sum(by_phase.values()),
        "by_phase": {phase: by_phase[phase] for phase in PHASES},
        "attempts": attempts,
        "steps": steps,
        "seed": seed,
        "seconds": round(time.monotonic() - begin),
        "failures": failures,
    }


def main() -> int:
    """Print the table; 1 where anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=110)
    parser.add_argument("--steps", type=int, default=260)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--directory", type=Path)
    ways = ("adapter", "checkpoint", "torch_distributed")
    parser.add_argument("--served", nargs="?", const="adapter", choices=ways)
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    assert study is not None
    device.setup()
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        make_files(directory)
        way, numbers = arguments.served, (arguments.kills, arguments.steps, arguments.seed)
        with _server(directory, way) if way else nullcontext([]) as more:
            report = soak(directory, *numbers, more, exact=way in (None, "adapter"))
    print(f"{'killed in':<12}times")
    for phase, count in report["by_phase"].items():
        print(f"{phase:<12}{count:>5}")
    print(json.dumps(report))
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
