"""Your model, rollouts and layout: does the product compute what plain transformers computes?

    python tools/parity.py --hf-model DIR --replay-file F.jsonl \\
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2
    python tools/parity.py --make-tiny-model [layout flags]

One forward and backward pass over all rollouts of the file, in fp32: by the product in real
processes, and by megatron_phf/reference, which shares no code with it.  Prints both and exits with
1 where any value, or any parameter's gradient, deviates beyond ``--tolerance``.
All flags of examples/pretrain_phf.sh are understood; with LoRA (--lora-rank, --lora-adapter) the
reference is peft's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_phf.cli import preflight
from megatron_phf.cli.processes import model_parallel_size
from megatron_phf.config.flags import parse_args
from megatron_phf.config.settings import Config
from megatron_phf.config.teachers import teacher_directories, teacher_names
from megatron_phf.console import program
from megatron_phf.hidden.spec import flow_spec
from megatron_phf.model.architecture import aux_loss_coeff, read_architecture
from megatron_phf.runtime.environment import for_children, torchrun
from megatron_phf.runtime.visible_gpus import check_gpus_are_used

_OUTPUT = ("loss", "opsd")
_OTHERS = (
    "clipped_fraction",
    "teacher_entropy",
    "student_entropy",
    "teacher_agreement",
    "rollout_tokens",
)
# A value that should be 0 (a clip that never clips) has no relative deviation.
_SMALLEST = 1e-6


def _reference_options(config: Config) -> Any:
    from megatron_phf import reference

    m, given = config.method, config.teacher.teacher_layer_map
    layers = None if given is None else tuple(int(word) for word in given.split(","))
    arch = read_architecture(config.model.hf_model or "")
    return reference.Options(
        alpha=m.phf_alpha,
        beta=m.opsd_beta,
        temperature=m.opsd_temperature,
        clip_mode=m.opsd_clip_mode,
        clip=m.opsd_clip,
        top_k=m.opsd_top_k,
        window_size=m.phf_window_size,
        window_rule=m.phf_window_rule,
        objective=m.opsd_objective,
        opsd_weight=m.opsd_weight,
        token_weighting=m.token_weighting,
        token_keep_fraction=m.token_keep_fraction,
        token_entropy_threshold=m.token_entropy_threshold,
        skip_first_tokens=m.skip_first_tokens,
        terms=m.phf_terms,
        layers=flow_spec(config).layers,
        layer_map=layers,
        aux_coeff=aux_loss_coeff(arch, config),
        micro_batch_size=config.train.micro_batch_size,
    )


def run_product(arguments: list[str], processes: int, directory: str) -> tuple[dict, dict]:
    """(metrics, gradients by HuggingFace name) of one global batch in ``processes`` ranks.

    Raises:
        ValueError: the run failed.
    """
    from safetensors.torch import load_file

    cases = os.path.join(directory, "cases.json")
    with open(cases, "w", encoding="utf-8") as f:
        json.dump([{"name": "parity", "kind": "gradients", "argv": arguments}], f)
    command = [*torchrun(processes), "-m", "megatron_phf.cli.cases", cases, directory]
    environment = for_children({"OMP_NUM_THREADS": "1", **os.environ})
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        check=False,
        encoding="utf-8",
        errors="backslashreplace",
    )
    if done.returncode:
        raise ValueError(f"the product's run failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    metrics = json.loads(Path(directory, "parity.json").read_text())
    return metrics, load_file(os.path.join(directory, "parity.gradient.safetensors"))


def _deviation(found: float, expected: float) -> float:
    return abs(found - expected) / max(abs(expected), _SMALLEST)


def compare(product: tuple[dict, dict], expected: Any) -> list[tuple[str, float, float, float]]:
    """Rows (name, product, reference, relative deviation); gradients by their norm."""
    from megatron_phf.runtime.grad_norm import l2_norm

    metrics, gradients = product
    rows = []
    flow = [key for key in expected.metrics if key.startswith("flow")]
    for key in (*_OUTPUT, *flow, *_OTHERS):
        wanted, found = expected.metrics[key], metrics[key]
        if found is None and wanted is None:  # no directions to compare: other widths
            continue
        if found is None and metrics["flow"] is None:  # alpha 0: the flow is not computed
            continue
        listed = isinstance(wanted, list)
        pairs = zip(found, wanted, strict=True) if listed else [(found, wanted)]
        for i, (a, b) in enumerate(pairs):
            name = f"{key}[{i + 1}]" if listed else key
            rows.append((name, a, b, _deviation(a, b)))
    for name, wanted in expected.gradients.items():
        distance = float(l2_norm([gradients[name] - wanted]))
        norms = float(l2_norm([gradients[name]])), float(l2_norm([wanted]))
        rows.append((f"gradient {name}", *norms, distance / max(norms[1], _SMALLEST)))
    # The one that the job reports and clips by, not one of the gradients above.
    found, norm = metrics["grad_norm"], expected.metrics["grad_norm"]
    return [*rows, ("gradient norm", found, norm, _deviation(found, norm))]


def _print(rows: list[tuple[str, float, float, float]], tolerance: float) -> None:
    width = max(len(row[0]) for row in rows)
    print(f"{'':{width}}  {'product':>14}  {'reference':>14}  deviation")
    for name, found, expected, deviation in rows:
        mark = "" if deviation <= tolerance else "  <-- beyond the tolerance"
        print(f"{name:{width}}  {found:14.8g}  {expected:14.8g}  {deviation:.1e}{mark}")


def _tiny(directory: str) -> list[str]:
    """A random 4-layer Qwen3 and 4 rollouts of 1 to 31 tokens, made on the spot."""
    from megatron_phf.reference.tiny import make_model, make_replay

    model = make_model(os.path.join(directory, "model"))
    replay = make_replay(os.path.join(directory, "replay.jsonl"), [1, 12, 31, 5])
    lengths = ["--max-prompt-length", "32", "--max-teacher-prompt-length", "32"]
    return ["--hf-model", model, "--replay-file", replay, "--phf-window-size", "8", *lengths]


def _complete(given: list[str]) -> list[str]:
    """The product's command line: one step over the whole file, fp32."""
    fixed = ["--rollout-engine", "replay", "--train-iters", "1", "--dtype", "fp32"]
    arguments = [*given, *fixed]
    replay = parse_args(arguments).rollout.replay_file
    if replay is not None and os.path.isfile(replay) and "--global-batch-size" not in given:
        with open(replay, "rb") as f:
            arguments += ["--global-batch-size", str(sum(1 for line in f if line.strip()))]
    return arguments


def _check_lora(config: Config) -> None:
    if config.lora.lora_rank and config.lora.lora_adapter is None:
        raise ValueError(
            "--lora-rank: add --lora-adapter; a new adapter has other random numbers in peft, and "
            "half of its gradients are zero"
        )
    if config.lora.lora_rank and (config.method.teacher != "frozen" or config.lora.lora_dropout):
        raise ValueError("with --lora-rank compare a frozen teacher, without --lora-dropout")


def run(given: list[str], tolerance: float, directory: str) -> int:
    """Compare and print; 0 within the tolerance, 1 beyond it."""
    from megatron_phf import reference

    check_gpus_are_used()
    arguments = _complete(given)
    config = parse_args(arguments)
    preflight.check(config)
    _check_lora(config)
    processes = model_parallel_size(config)
    preflight.check_world_size(config, processes)
    assert config.model.hf_model is not None and config.rollout.replay_file is not None
    product = run_product(arguments, processes, directory)
    teachers = teacher_directories(config)
    samples = reference.read_replay(config.rollout.replay_file)[: config.train.global_batch_size]
    expected = reference.compute(
        config.model.hf_model,
        samples,
        _reference_options(config),
        teacher_directory=teachers if teacher_names(config) else teachers.get(""),
        adapter=config.lora.lora_adapter,
    )
    rows = compare(product, expected)
    _print(rows, tolerance)
    worst = max(row[3] for row in rows)
    good = worst <= tolerance
    print(
        f"{'EQUAL' if good else 'DIFFERENT'}: {len(samples)} rollouts, {processes} process(es), "
        f"largest deviation {worst:.1e} (tolerance {tolerance:g})"
    )
    return 0 if good else 1


@program
def main(argv: list[str] | None = None) -> int:
    """0 equal, 1 different, 2 for a mistake in the flags or files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tolerance", type=float, default=1e-5, help="relative, default 1e-5")
    parser.add_argument("--make-tiny-model", action="store_true", help="instead of your own")
    args, given = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        return run([*(_tiny(directory) if args.make_tiny_model else []), *given],
                   args.tolerance, directory)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
