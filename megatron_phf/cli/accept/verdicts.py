"""From what the cases left behind to the rows of the table."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_phf.cli.accept.launch import LATE, Clock
from megatron_phf.cli.accept.plan import Plan
from megatron_phf.cli.accept.table import Row, skipped

# (largest deviation of a value, of a gradient): rounding of the weights' dtype, and of FP8; packed
# rows, those with userbuffers and those cut over context ranks, are in bf16.
TOLERANCES = {"fp32": (1e-4, 1e-3), "bf16": (3e-2, 2e-1), "fp8": (1e-1, 5e-1)}
TOLERANCES |= {name: TOLERANCES["bf16"] for name in ("packed", "context", "te", "userbuffers")}
_WORDS = {"packed": "packed rows", "context": "packed rows over context ranks",
          "te": "Transformer Engine", "userbuffers": "userbuffers", "fp8": "FP8"}  # fmt: skip
CURVE, RESUME, PRICE, MFU, DECODE, MEMORY = 0.05, 1e-4, 1.03, 0.4, 2.0, 0.1
_LAYERS = {"": "", "_te": ", Transformer Engine", "_fp8": ", FP8"}

Maker = Callable[[], list[Row]]


def _read(plan: Plan, name: str) -> Any:
    return json.loads(Path(plan.path(f"{name}.json")).read_text(encoding="utf-8"))


def parity_row(plan: Plan, kind: str) -> Row:
    """Values and gradients of one batch beside transformers in fp32."""
    from safetensors.torch import load_file

    from megatron_phf import reference
    from megatron_phf.cli.parity import compare

    samples = reference.read_replay(os.path.join(plan.tiny, "replay.jsonl"))
    expected = reference.compute(os.path.join(plan.tiny, "model"), samples, reference.Options())
    gradients = load_file(plan.path(f"parity_{kind}.gradient.safetensors"))
    found = _read(plan, f"parity_{kind}"), {k: v.float() for k, v in gradients.items()}
    rows = compare(found, expected)
    values, slopes = (
        max(row[3] for row in rows if row[0].startswith("gradient") is gradient)
        for gradient in (False, True)
    )
    limits = TOLERANCES[kind]
    return Row.judged(
        f"parity with transformers, {_WORDS.get(kind, kind)}",
        f"values {values:.1e}, gradients {slopes:.1e}",
        f"at most {limits[0]:g}, {limits[1]:g}",
        values <= limits[0] and slopes <= limits[1],
    )


def curve_row(plan: Plan, coarse: str, trusted: str) -> Row:
    """Mean loss over the last half of the steps, on the same rollouts."""
    names = {"train": "fp32", "train_bf16": "bf16", "train_fp8": "FP8"}
    histories = [_read(plan, name) for name in (trusted, coarse)]
    half = len(histories[0]) // 2
    means = [sum(s["loss"] for s in h[half:]) / (len(h) - half) for h in histories]
    return Row.judged(
        f"loss over {len(histories[0])} steps, {names[coarse]} against {names[trusted]}",
        f"{means[1]:.5f} against {means[0]:.5f}",
        f"within {100 * CURVE:g} %",
        abs(means[1] - means[0]) <= CURVE * abs(means[0]),
    )


def resume_row(plan: Plan, kind: str) -> Row:
    """Steps after a resume beside those of a run that never stopped."""
    unbroken, resumed = _read(plan, "train"), _read(plan, f"{kind}_resumed")
    expected = unbroken[len(unbroken) - len(resumed) :]
    pairs = zip(resumed, expected, strict=True)
    worst = max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in pairs)
    word = {"save": "a save", "async_save": "an asynchronous save"}[kind]
    return Row.judged(
        f"losses of {len(resumed)} steps resumed from {word}",
        f"off by {worst:.1e}", f"at most {RESUME:g}",
        worst <= RESUME and 0 < len(resumed) < len(unbroken),
    )  # fmt: skip


def _judges(plan: Plan) -> bool:
    """Whether speed means anything: a GPU, and a model that is not bound by kernel launches."""
    return plan.cuda and plan.arch.num_parameters() > 1e9


def step_rows(plan: Plan, suffix: str) -> list[Row]:
    """Phases, MFU, the flow loss's price, and the peak beside its formula."""
    found, what = _read(plan, f"step{suffix}"), _LAYERS[suffix]
    phases = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in found["seconds"].items())
    judges, mfu, peak = _judges(plan), found["mfu"], found["peak_gib"]
    off = peak / found["formula_gib"] - 1
    rows = [
        Row.judged(f"a step of {found['tokens']} tokens{what}", phases, "", None),
        Row.judged(
            f"MFU of the student's pass{what}",
            "this GPU's peak is not known" if mfu is None else f"{100 * mfu:.3g} %",
            f"at least {100 * MFU:g} %",
            mfu >= MFU if judges and mfu is not None else None,
        ),
        Row.judged(
            f"a step with the flow loss, over OPSD's{what}", f"{found['price']:.3f}",
            f"at most {PRICE:g}", found["price"] <= PRICE if judges else None,
        ),
        Row.judged(
            f"peak memory against the formula{what}",
            f"{peak:.2f} GiB, formula {found['formula_gib']:.2f} ({100 * off:+.1f} %)",
            f"within {100 * MEMORY:g} %",
            abs(off) <= MEMORY if judges else None,
        ),
    ]  # fmt: skip
    return rows[:-1] if suffix else rows  # the formula is about local layers


def synchronisation_row(plan: Plan) -> list[Row]:
    """How often each phase waits for the device, and where most."""
    name, found = "host waits for the GPU in a step", _read(plan, "synchronisations")
    if not found:
        return [skipped(name, "CUDA")]
    counts = ", ".join(f"{phase} {count}" for phase, count in found["phases"].items())
    most = ", ".join(f"{where} {count} times" for _, where, count in found["places"][:3])
    return [Row.judged(name, f"{counts or 'none'}; {most}" if most else "none", "", None)]


def decode_row(plan: Plan, suffix: str) -> list[Row]:
    """Tokens a second, and a token's time beside the reading of weights and cache."""
    found = _read(plan, f"decode{suffix}")
    times = found["seconds"] / found["memory_seconds"]
    measured = (
        f"{found['tokens_per_second']:.0f} tokens/s, {times:.2f} times the reading of weights and "
        f"cache at {found['bandwidth'] / 1e12:.2f} TB/s"
    )
    good = times <= DECODE if _judges(plan) else None
    rows = f"{found['rows']} rows{_LAYERS[suffix]}"
    equal = found["graphs_equal"]
    graphs = f"tokens with CUDA graphs and without, {rows}"
    return [
        Row.judged(f"decoding in process, {rows}", measured, f"at most {DECODE:g} times", good),
        skipped(graphs, "CUDA graphs")
        if equal is None
        else Row.judged(graphs, "equal" if equal else "not equal", "equal", equal),
    ]


def _makers(plan: Plan) -> list[tuple[str, tuple[str, ...], Maker]]:
    """(name, cases that it needs, its rows), in the order of the cases."""

    def parity(kind: str) -> tuple[str, tuple[str, ...], Maker]:
        name = f"parity with transformers, {_WORDS.get(kind, kind)}"
        return name, (f"parity_{kind}",), lambda: [parity_row(plan, kind)]

    def curve(coarse: str, trusted: str, name: str) -> tuple[str, tuple[str, ...], Maker]:
        return name, (trusted, coarse), lambda: [curve_row(plan, coarse, trusted)]

    def resume(kind: str, name: str) -> tuple[str, tuple[str, ...], Maker]:
        return name, ("train", f"{kind}_half", f"{kind}_resumed"), lambda: [resume_row(plan, kind)]

    def large(suffix: str) -> list[tuple[str, tuple[str, ...], Maker]]:
        name = f"a step: time, MFU, price, memory{_LAYERS[suffix]}"
        return [(name, (f"step{suffix}",), lambda: step_rows(plan, suffix))]

    def decoding(suffix: str) -> list[tuple[str, tuple[str, ...], Maker]]:
        name = f"decoding in process{_LAYERS[suffix]}"
        return [(name, (f"decode{suffix}",), lambda: decode_row(plan, suffix))]

    waits = ("host waits for the GPU in a step", ("synchronisations",))
    return [
        *(parity(kind) for kind in ("fp32", "bf16", "packed", "context")),
        curve("train_bf16", "train", "loss, bf16 against fp32"),
        resume("save", "resume after a save"),
        resume("async_save", "resume after an asynchronous save"),
        *large(""), (*waits, lambda: synchronisation_row(plan)), *decoding(""),
        *(parity(kind) for kind in ("te", "userbuffers", "fp8")),
        curve("train_fp8", "train_bf16", "loss, FP8 against bf16"),
        *large("_te"), *decoding("_te"), *large("_fp8"),
    ]  # fmt: skip


def _need(plan: Plan, cases: tuple[str, ...]) -> str:
    """Why this machine has no such case."""
    split = {"parity_context", "parity_userbuffers"} & set(cases)
    if plan.engine is not None and cases != ("parity_context",):
        return plan.engine
    assert split, cases
    return "several GPUs"


def evaluate(plan: Plan, clock: Clock) -> list[Row]:
    """All rows; those whose case failed, was too late or does not exist here say so."""
    planned = {case.name for case in plan.cases()}
    made = {case.name for case in plan.cases() if case.settings}
    rows: list[Row] = []
    for name, needed, make in _makers(plan):
        needs = ("large", *needed) if made & set(needed) else needed  # the model comes first
        broken = [case for case in needs if case in clock.problems]
        if not planned.issuperset(needed):
            rows.append(skipped(name, _need(plan, needed)))
        elif any(clock.problems[case] == LATE for case in broken) or not (
            broken or all(os.path.exists(plan.path(f"{case}.json")) for case in needed)
        ):
            rows.append(Row(name, "", "", "late"))
        elif broken:
            problem = " ".join(clock.problems[broken[0]].split())
            rows.append(Row(name, f"{broken[0]}: {problem[-200:]}", "", "fail"))
        else:
            rows += _made(name, make)
    return rows


def _made(name: str, make: Maker) -> list[Row]:
    """Its rows; what a case left may be short or not finite, and must not hide the others."""
    try:
        return make()
    except (ArithmeticError, KeyError, OSError, ValueError) as error:
        return [Row(name, f"{type(error).__name__}: {error}"[:200], "", "fail")]
