"""What nobody has seen on a GPU, checked in ten minutes: a pass/fail table to paste into an issue.

    bash examples/h100/acceptance.sh [path/to/model problems.jsonl] [--gpus N] [--dry-run]

Parity with plain transformers in each precision, FP8 against bf16 over a training run on the same
rollouts, memory against the start-up estimate, speed, and the flow loss's price.  Without a model,
a tiny random one.  Without CUDA the same checks run on the CPU, bf16 against fp32 in FP8's place;
what means nothing there is shown without a verdict.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_phf.console import print_anything  # noqa: E402

# (largest deviation of a value, of a gradient): rounding of the weights' dtype, and of FP8; packed
# rows, those with userbuffers and those cut over context ranks, are in bf16.
TOLERANCES = {"fp32": (1e-4, 1e-3), "bf16": (3e-2, 2e-1), "fp8": (1e-1, 5e-1)}
TOLERANCES |= {name: TOLERANCES["bf16"] for name in ("packed", "userbuffers", "context")}
_CURVE, _OVERHEAD, _MFU = 0.05, 0.25, 0.2
_PEAK_FLOPS = 989e12  # H100 SXM, bf16, dense
_LAYOUTS = {
    1: [],
    2: ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    8: ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2",
        "--sequence-parallel", "--use-distributed-optimizer", "--overlap-grad-reduce"],
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the table; ``good`` None: shown without a verdict."""

    name: str
    measured: str
    required: str
    good: bool | None


@dataclass(frozen=True)
class Plan:
    """What is run: cases of tests/parallel/driver.py by name, and what they start from."""

    directory: str
    model: str
    tiny: str
    cuda: bool
    processes: int
    steps: int
    precise: list[str]
    coarse: list[str]
    job: list[str]
    layout: list[str] = field(default_factory=list)

    @property
    def coarse_name(self) -> str:
        """The precision that is compared with the trusted one."""
        return "fp8" if self.cuda else "bf16"

    @property
    def userbuffers(self) -> bool:
        """Whether the layout has communication to overlap by Transformer Engine's userbuffers."""
        return self.cuda and "--sequence-parallel" in self.layout

    @property
    def context(self) -> bool:
        """Whether there are GPUs to cut packed rows over."""
        return self.cuda and bool(self.layout)

    def case(self, name: str, kind: str, *argv: str) -> dict[str, Any]:
        """A case for the driver, its output under the plan's directory."""
        output = ["--output-dir", os.path.join(self.directory, name), "--no-progress"]
        return {"name": name, "kind": kind, "argv": [*argv, *output, "--no-tensorboard"]}

    def cases(self) -> list[dict[str, Any]]:
        """Parity, then training on rollouts that the first run records."""
        from tests.parallel.cases import flags
        from tests.reference import Options

        replay = os.path.join(self.tiny, "replay.jsonl")
        unsplit = flags(Options(), os.path.join(self.tiny, "model"), replay, 4)
        parity = [*unsplit, *self.layout]
        fp32 = ["--dtype", "fp32", "--transformer-impl", "local"]
        cases = [self.case("parity_fp32", "gradients", *parity, *fp32)]
        cases.append(self.case("parity_bf16", "gradients", *parity, "--dtype", "bf16"))
        packed = ["--dtype", "bf16", "--max-tokens-per-microbatch", "128", "--pack-sequences"]
        cases.append(self.case("parity_packed", "gradients", *parity, *packed))
        if self.userbuffers:
            more = ["--transformer-impl", "transformer_engine", "--tp-comm-overlap"]
            cases.append(self.case("parity_userbuffers", "gradients", *parity, *packed, *more))
        if self.context:
            more = ["--context-parallel-size", "2"]
            cases.append(self.case("parity_context", "gradients", *unsplit, *packed, *more))
        if self.cuda:
            coarse = ["--dtype", "bf16", *self.coarse]
            cases.append(self.case("parity_fp8", "gradients", *parity, *coarse))
        recorded = os.path.join(self.directory, "rollouts.jsonl")
        again = ["--rollout-engine", "replay", "--replay-file", recorded]
        sampled = [*self.job, "--record-rollouts", recorded]
        cases.append(self.case("train", "job", *sampled, *self.precise))
        cases.append(self.case("train_coarse", "job", *self.job, *again, *self.coarse))
        no_flow = ["--phf-alpha", "0"]
        cases.append(self.case("train_opsd", "job", *self.job, *again, *self.precise, *no_flow))
        return cases


def _problems(path: str) -> str:
    from megatron_phf.data.arithmetic import make_problems

    with open(path, "w", encoding="utf-8") as f:
        for p in make_problems("train", 64, seed=1):
            f.write(json.dumps({"problem": p.problem, "solution": p.solution}) + "\n")
    return path


def _tiny(directory: str) -> None:
    """A random model and rollouts for parity; another with a tokenizer, problems and templates."""
    from megatron_phf.data.arithmetic import make_hf_directory
    from tests.models import make_model, make_replay

    make_model(os.path.join(directory, "model"))
    make_replay(os.path.join(directory, "replay.jsonl"), [1, 12, 31, 5])
    make_hf_directory(os.path.join(directory, "trained"), seed=1)
    _problems(os.path.join(directory, "problems.jsonl"))
    for side, text in (("student", "{problem}="), ("teacher", "{problem}|{solution}=")):
        Path(directory, f"{side}.txt").write_text(text, encoding="utf-8")


def make_plan(args: argparse.Namespace, directory: str) -> Plan:
    """The cases for this machine."""
    from megatron_phf import device

    cuda = device.has_cuda()
    processes = args.gpus or (1 if cuda else 2)
    tiny = os.path.join(directory, "tiny")
    os.makedirs(tiny)
    _tiny(tiny)
    steps = args.steps or (50 if cuda else 4)
    model = args.model or os.path.join(tiny, "trained")
    job = ["--hf-model", model, "--data", args.data or os.path.join(tiny, "problems.jsonl")]
    if args.model is None:
        for side in ("student", "teacher"):
            job += [f"--{side}-template", os.path.join(tiny, f"{side}.txt")]
        job += ["--max-new-tokens", "32", "--max-prompt-length", "64", "--lr", "1e-3"]
        job += ["--max-teacher-prompt-length", "128"]
    layout = _LAYOUTS[processes]
    job += ["--train-iters", str(steps), "--global-batch-size", "16", *layout]
    engine = ["--transformer-impl", "transformer_engine"]
    fp8 = [*engine, "--fp8-format", "hybrid", "--fp8-recipe", "tensorwise"]
    precise, coarse = ["--dtype", "bf16", *engine], ["--dtype", "bf16", *fp8]
    if not cuda:
        precise, coarse = ["--dtype", "fp32"], ["--dtype", "bf16"]
    return Plan(directory, model, tiny, cuda, processes, steps, precise, coarse, job, layout)


def launch(plan: Plan, cases: list[dict[str, Any]]) -> str | None:
    """Run cases in one start of processes; the end of their output where they fail."""
    name = cases[0]["name"]
    path = os.path.join(plan.directory, f"{name}.cases.json")
    Path(path).write_text(json.dumps(cases), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(plan.processes), "tests/parallel/driver.py"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(
        [*command, path, plan.directory],
        cwd=ROOT, env=environment, capture_output=True, check=False,
        encoding="utf-8", errors="backslashreplace",
    )  # fmt: skip
    for case in cases:
        Path(plan.directory, f"{case['name']}.log").write_text(done.stdout, encoding="utf-8")
    if done.returncode == 0:
        return None
    said = done.stdout.rpartition("case ")[2]  # the driver's own words, if it came to any
    return said[:3000] or done.stderr[-3000:]


def _history(plan: Plan, name: str) -> list[dict[str, Any]]:
    return json.loads(Path(plan.directory, f"{name}.json").read_text(encoding="utf-8"))


def parity_row(plan: Plan, precision: str) -> Row:
    """Values and gradients of one batch beside transformers in fp32."""
    from safetensors.torch import load_file

    from tests import reference
    from tools.parity import compare

    samples = reference.read_replay(os.path.join(plan.tiny, "replay.jsonl"))
    expected = reference.compute(os.path.join(plan.tiny, "model"), samples, reference.Options())
    found = json.loads(Path(plan.directory, f"parity_{precision}.json").read_text())
    gradients = load_file(os.path.join(plan.directory, f"parity_{precision}.gradient.safetensors"))
    rows = compare((found, {k: v.float() for k, v in gradients.items()}), expected)
    worst = [
        max(row[3] for row in rows if row[0].startswith("gradient") is gradient)
        for gradient in (False, True)
    ]
    limits = TOLERANCES[precision]
    return Row(
        f"parity with transformers, {precision}",
        f"values {worst[0]:.1e}, gradients {worst[1]:.1e}",
        f"at most {limits[0]:g}, {limits[1]:g}",
        worst[0] <= limits[0] and worst[1] <= limits[1],
    )


def curve_row(plan: Plan) -> Row:
    """Mean loss over the last half of the steps, on the same rollouts."""
    precise, coarse = (_history(plan, name) for name in ("train", "train_coarse"))
    half = len(precise) // 2
    means = [sum(s["loss"] for s in h[half:]) / (len(h) - half) for h in (precise, coarse)]
    deviation = abs(means[1] - means[0]) / abs(means[0])
    trusted = "bf16" if plan.cuda else "fp32"
    return Row(
        f"loss over {len(precise)} steps, {plan.coarse_name} against {trusted}",
        f"{means[1]:.5f} against {means[0]:.5f}",
        f"within {100 * _CURVE:g} %",
        deviation <= _CURVE,
    )


def memory_row(plan: Plan) -> Row:
    """The start-up estimate leaves activations out: the peak lies above it."""
    log = Path(plan.directory, "train.log").read_text(encoding="utf-8")
    estimates = re.findall(r"^memory +([0-9.]+) GiB a rank", log, re.MULTILINE)
    estimate = float(estimates[0]) if estimates else float("nan")
    peak = _history(plan, "train")[-1]["peak_memory_bytes"] / 2**30
    good = estimate <= peak <= 80 if plan.cuda else None
    measured = f"{peak:.2f} GiB, estimate {estimate:.2f} without activations"
    return Row("peak memory of a rank", measured, "estimate to 80 GiB", good)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def speed_rows(plan: Plan) -> list[Row]:
    """Medians over the steps after the first."""
    from megatron_phf.model.architecture import read_architecture

    history, arch = _history(plan, "train")[1:], read_architecture(plan.model)
    rollout = _median([s["rollout_tokens"] / s["seconds"]["rollout"] for s in history])
    batch = 16
    lines = Path(plan.directory, "rollouts.jsonl").read_text(encoding="utf-8").splitlines()
    read = [json.loads(line) for line in lines[batch:]]
    tokens = sum(len(r["student_prompt_ids"]) + len(r["response_ids"]) for r in read)
    seconds = sum(s["seconds"]["student"] for s in history)
    mfu = 6 * arch.num_parameters() * tokens / seconds / (plan.processes * _PEAK_FLOPS)
    good = mfu >= _MFU if plan.cuda and arch.num_parameters() > 1e9 else None
    return [
        Row("rollouts", f"{rollout:.0f} tokens/s", "", None),
        Row("MFU of the student's pass, of 989 TFLOP/s", f"{100 * mfu:.3g} %",
            f"at least {100 * _MFU:g} % (1 B parameters and more)", good),
    ]  # fmt: skip


def overhead_row(plan: Plan) -> Row:
    """Teacher's and student's pass with the flow loss against without, same rollouts."""
    times = []
    for name in ("train", "train_opsd"):
        steps = [s["seconds"] for s in _history(plan, name)[1:]]
        times.append(_median([s["teacher"] + s["student"] for s in steps]))
    overhead = times[0] / times[1] - 1
    good = overhead <= _OVERHEAD if plan.cuda else None
    limit = f"at most {100 * _OVERHEAD:g} %"
    return Row("flow loss, over OPSD's passes", f"{100 * overhead:.1f} %", limit, good)


def table(rows: list[Row]) -> str:
    """Markdown."""
    words = {True: "pass", False: "**FAIL**", None: "shown"}
    lines = ["| check | measured | required | result |", "|---|---|---|---|"]
    lines += [f"| {r.name} | {r.measured} | {r.required} | {words[r.good]} |" for r in rows]
    return "\n".join(lines)


def evaluate(plan: Plan, failed: dict[str, str]) -> list[Row]:
    """All rows; those whose case has failed say so."""
    precisions = ["fp32", "bf16", "packed", *(["fp8"] if plan.cuda else [])]
    precisions += ["userbuffers"] if plan.userbuffers else []
    precisions += ["context"] if plan.context else []
    makers: list[tuple[str, tuple[str, ...], Any]] = [
        (f"parity, {p}", (f"parity_{p}",), lambda p=p: [parity_row(plan, p)]) for p in precisions
    ]
    makers += [
        ("loss curve", ("train", "train_coarse"), lambda: [curve_row(plan)]),
        ("peak memory", ("train",), lambda: [memory_row(plan)]),
        ("speed", ("train",), lambda: speed_rows(plan)),
        ("flow loss", ("train", "train_opsd"), lambda: [overhead_row(plan)]),
    ]
    rows: list[Row] = []
    for name, needed, make in makers:
        broken = [case for case in needed if case in failed]
        if broken:
            rows.append(Row(name, f"{broken[0]} did not run", "", False))
        else:
            rows += make()
    return rows


def run(args: argparse.Namespace, directory: str) -> int:
    """0: nothing failed, 1: something did."""
    from megatron_phf import device

    plan = make_plan(args, directory)
    cases = plan.cases()
    if args.dry_run:
        for case in cases:
            print(f"{case['name']} ({plan.processes} process(es)): {' '.join(case['argv'])}")
        return 0
    # Peak memory is a process's own: on a GPU every case gets new ones.
    starts = [[case] for case in cases] if plan.cuda else [cases]
    failed: dict[str, str] = {}
    for start in starts:
        problem = launch(plan, start)
        if problem is not None:
            failed |= {case["name"]: problem for case in start}
            print(f"{start[0]['name']} failed:\n{problem}", file=sys.stderr)
    rows = evaluate(plan, failed)
    print(
        f"megatron_phf acceptance: {device.describe()}; {plan.processes} process(es), {plan.model}"
    )
    print(table(rows))
    return 1 if any(row.good is False for row in rows) else 0


def main(argv: list[str] | None = None) -> int:
    """0 passed, 1 failed, 2 for a mistake in the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="HuggingFace directory; a tiny model without")
    parser.add_argument("data", nargs="?", help="problems.jsonl")
    parser.add_argument("--gpus", type=int, choices=sorted(_LAYOUTS), help="default 1")
    parser.add_argument("--steps", type=int, default=0, help="of the loss curves, default 50")
    parser.add_argument("--dry-run", action="store_true", help="print what would run")
    args = parser.parse_args(argv)
    if (args.model is None) != (args.data is None):
        parser.error("a model needs its problems.jsonl")
    with tempfile.TemporaryDirectory() as directory:
        try:
            return run(args, directory)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2


if __name__ == "__main__":
    print_anything()
    sys.exit(main())
