"""From what the cases left behind to the rows of the table."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_phf.cli.accept.launch import LATE, Clock
from megatron_phf.cli.accept.plan import Case, Plan
from megatron_phf.cli.accept.table import Row, skipped

# (largest deviation of a value, of a gradient): rounding of the weights' dtype, and of FP8.
TOLERANCES = {"fp32": (1e-4, 1e-3), "bf16": (3e-2, 2e-1), "fp8": (1e-1, 5e-1)}
# Of the loss of any step.  bf16 stays within 1 % on a CPU; an Adam that forgets its step count is
# off by 36 %, and was within 5 % in the mean over the last 25 of 50 steps.
CURVES = {"bf16": 0.03, "fp8": 0.1}
RESUME, PRICE, MFU, DECODE, MEMORY, HEAD = 1e-4, 1.03, 0.4, 2.0, 0.1, 1.1


def _read(plan: Plan, name: str) -> Any:
    return json.loads(Path(plan.path(f"{name}.json")).read_text(encoding="utf-8"))


def parity_rows(plan: Plan, case: Case) -> list[Row]:
    """Values and gradients of one batch beside transformers in fp32."""
    from safetensors.torch import load_file

    from megatron_phf import reference
    from megatron_phf.cli.parity import compare

    samples = reference.read_replay(os.path.join(plan.tiny, "replay.jsonl"))
    model = os.path.join(plan.tiny, case.settings["model"])
    expected = reference.compute(model, samples, reference.Options())
    gradients = load_file(plan.path(f"{case.name}.gradient.safetensors"))
    product = _read(plan, case.name), {k: v.float() for k, v in gradients.items()}
    rows = compare(product, expected)
    values, slopes = (
        max(row[3] for row in rows if row[0].startswith("gradient") is gradient)
        for gradient in (False, True)
    )
    limits = TOLERANCES[case.settings["precision"]]
    return [
        Row.judged(
            case.title, f"values {values:.1e}, gradients {slopes:.1e}",
            f"at most {limits[0]:g}, {limits[1]:g}", values <= limits[0] and slopes <= limits[1],
        )
    ]  # fmt: skip


def _apart(losses: list[dict], trusted: list[dict]) -> float:
    """The largest relative deviation of a step's loss."""
    pairs = zip(losses, trusted, strict=True)
    return max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in pairs)


def curve_rows(plan: Plan, case: Case) -> list[Row]:
    """The loss of each step, on the same rollouts: that the weights moved the same way."""
    losses, trusted = _read(plan, case.name), _read(plan, case.needs[0])
    worst, most = _apart(losses, trusted), CURVES[case.settings["precision"]]
    measured = f"{len(losses)} steps, off by {100 * worst:.2g} % at most"
    return [Row.judged(case.title, measured, f"each within {100 * most:g} %", worst <= most)]


def resume_rows(plan: Plan, case: Case) -> list[Row]:
    """The losses behind the break, beside those of a run without one."""
    whole, before, after = (_read(plan, name) for name in (*case.needs, case.name))
    worst = _apart(after, whole[len(before) :])
    measured = f"{len(before)} steps, then {len(after)} off by {worst:.1e}"
    good = worst <= RESUME and 0 < len(before) < len(whole)
    return [Row.judged(case.title, measured, f"at most {RESUME:g}", good)]


def step_rows(plan: Plan, case: Case) -> list[Row]:
    """Phases, MFU, the flow loss's price, and the peak beside its formula; goals on a GPU."""
    result, title, cuda = _read(plan, case.name), case.title, plan.cuda
    phases = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in result["seconds"].items())
    mfu, price, reserved = result["mfu"], result["price"], result["reserved_gib"]
    off = reserved / result["formula_gib"] - 1
    rows = [
        Row.judged(f"{title}, {result['tokens']} tokens", phases, "", None),
        Row.judged(
            f"{title}: MFU of the student's pass",
            "this GPU's peak is not known" if mfu is None else f"{100 * mfu:.3g} %",
            f"at least {100 * MFU:g} %", mfu >= MFU if cuda and mfu is not None else None,
        ),
        Row.judged(
            f"{title}: reserved memory against the formula",
            f"{reserved:.2f} GiB ({result['peak_gib']:.2f} allocated), formula "
            f"{result['formula_gib']:.2f} ({100 * off:+.1f} %)",
            f"within {100 * MEMORY:g} %", abs(off) <= MEMORY if cuda else None,
        ),
    ]  # fmt: skip
    if price is not None:
        good = price <= PRICE if cuda else None
        words = f"{title} with the flow loss, over OPSD's"
        rows.insert(2, Row.judged(words, f"{price:.3f}", f"at most {PRICE:g}", good))
    # The formula is about local layers.
    return rows if "local" in case.argv else rows[:-1]


def head_rows(plan: Plan, case: Case) -> list[Row]:
    """A larger chunk must not be needed: the default is as fast."""
    result = _read(plan, case.name)
    (few, a), (many, b) = result["seconds"].items()
    measured = f"{1e3 * a:.1f} ms by {few} tokens, {1e3 * b:.1f} ms by {many}"
    good = a / b <= HEAD if plan.cuda else None
    title = f"{case.title}, {result['tokens']} tokens"
    return [Row.judged(title, measured, f"at most {HEAD:g} times as long by {few}", good)]


def synchronisation_rows(plan: Plan, case: Case) -> list[Row]:
    """How often each phase waits for the device, and where most."""
    result = _read(plan, case.name)
    counts = ", ".join(f"{phase} {count}" for phase, count in result["phases"].items())
    most = ", ".join(f"{where} {count} times" for _, where, count in result["places"][:3])
    measured = f"{counts or 'none'}; {most}" if most else "none"
    return [Row.judged(case.title, measured, "", None)]


def graph_rows(plan: Plan, case: Case) -> list[Row]:
    """No row may get another token from a captured step."""
    result = _read(plan, case.name)
    measured = f"{result['different']} of {result['rows']} rows differ"
    return [Row.judged(case.title, measured, "none", result["different"] == 0)]


def decode_rows(plan: Plan, case: Case) -> list[Row]:
    """Tokens a second, and a token's time beside the reading of weights and cache."""
    result = _read(plan, case.name)
    times = result["seconds"] / result["memory_seconds"]
    measured = (
        f"{result['tokens_per_second']:.0f} tokens/s, {times:.2f} times the reading of weights and "
        f"cache at {result['bandwidth'] / 1e12:.2f} TB/s"
    )
    good = times <= DECODE if plan.cuda else None
    return [Row.judged(case.title, measured, f"at most {DECODE:g} times", good)]


def ran_rows(plan: Plan, case: Case) -> list[Row]:
    """It came to its end: a communicator that adds up, a job's steps."""
    result = _read(plan, case.name)
    if isinstance(result, dict):
        measured = f"{result['processes']} processes, {result['device']}"
    else:
        losses = ", ".join(f"{step['loss']:.3g}" for step in result)
        measured = f"{len(result)} steps, losses {losses}"
    return [Row.judged(case.title, measured, "it ends by itself", True)]


ROWS: dict[str, Callable[[Plan, Case], list[Row]]] = {
    "all_reduce": ran_rows, "parity": parity_rows, "graphs": graph_rows, "decode": decode_rows,
    "step": step_rows, "head": head_rows, "synchronisations": synchronisation_rows,
    "ran": ran_rows, "killed": ran_rows, "curve": curve_rows, "resume": resume_rows,
}  # fmt: skip


def evaluate(plan: Plan, cases: list[Case], clock: Clock) -> list[Row]:
    """The rows of ``cases``; those that failed, were too late or cannot run here say so."""
    return [row for case in cases if case.title for row in _rows(plan, case, clock)]


def _rows(plan: Plan, case: Case, clock: Clock) -> list[Row]:
    if case.missing is not None:
        return [skipped(case.title, case.missing)]
    written = ("large",) if plan.large in case.argv and plan.random else ()
    names = (*written, *case.needs, case.name)
    broken = [name for name in names if name in clock.problems]
    problem = " ".join(clock.problems[broken[0]].split()) if broken else ""
    if problem == LATE or not (broken or _there(plan, (*case.needs, case.name))):
        return [Row(case.title, "", "", "late")]
    if case.row == "killed":
        good = "--vllm-" in problem  # the product's own words, which name what has gone
        words = problem[-200:] or "the server was not missed"
        return [Row.judged(case.title, words, "an error that names the server", good)]
    if broken:
        return [Row(case.title, f"{broken[0]}: {problem[-200:]}", "", "fail")]
    return _made(plan, case)


def _there(plan: Plan, names: tuple[str, ...]) -> bool:
    return all(os.path.exists(plan.path(f"{name}.json")) for name in names)


def _made(plan: Plan, case: Case) -> list[Row]:
    """Its rows; what a case left may be short or not finite, and must not hide the others."""
    try:
        return ROWS[case.row](plan, case)
    except (ArithmeticError, KeyError, OSError, ValueError) as error:
        return [Row(case.title, f"{type(error).__name__}: {error}"[:200], "", "fail")]
