"""Means, intervals and paired differences over seeds; shares of the flow loss over layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_phf.evaluation.grading import bootstrap_interval
from megatron_phf.hidden.spec import FlowSpec, flow_weights, terms_of
from megatron_phf.report.runs import Line, Run, Variant


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval (None where nothing gives one); ``over``: over what."""

    mean: float
    low: float | None = None
    high: float | None = None
    over: str = ""

    def scaled(self, factor: float) -> Estimate:
        """The same in another unit; ``factor`` > 0."""
        low, high = (None if x is None else x * factor for x in (self.low, self.high))
        return Estimate(self.mean * factor, low, high, self.over)


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and t interval of one value a seed; no interval from a single one."""
    from scipy.stats import t

    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Estimate(mean)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, f"{n} seeds")


def per_problem(evaluation: Line) -> list[float] | None:
    """Fraction of correct samples of each problem."""
    correct = evaluation.get("correct")
    return None if correct is None else [sum(row) / len(row) for row in correct]


def _over_problems(values: Sequence[float]) -> Estimate:
    low, high = bootstrap_interval(values)
    return Estimate(
        math.fsum(values) / len(values), low, high, f"{len(values)} problems, bootstrap"
    )


def scored(run: Run) -> list[Line]:
    """The run's evaluations that have an Average@k."""
    return [e for e in run.evaluations if e.get("average_at_k") is not None]


def last_step(variant: Variant) -> int | None:
    """After which step the variant's last evaluation was; the first of its runs to end decides."""
    steps = [evaluations[-1]["step"] for run in variant.runs if (evaluations := scored(run))]
    return min(steps, default=None)


def _over_seed(evaluation: Line) -> Estimate:
    """Of the only seed: over its problems."""
    fractions = per_problem(evaluation)
    if fractions is not None:
        return _over_problems(fractions)
    low, high = evaluation.get("interval_95") or (None, None)
    return Estimate(evaluation["average_at_k"], low, high, "problems")


def final_accuracy(variant: Variant) -> Estimate | None:
    """Last Average@k: over seeds, within 0 and 1, or over the problems of the only seed."""
    finals = [evaluations[-1] for run in variant.runs if (evaluations := scored(run))]
    if len(finals) == 1:
        return _over_seed(finals[0])
    if not finals:
        return None
    mean = estimate([final["average_at_k"] for final in finals])
    if mean.low is None or mean.high is None:
        return mean
    return Estimate(mean.mean, max(mean.low, 0.0), min(mean.high, 1.0), mean.over)


def paired_difference(variant: Variant, baseline: Variant) -> Estimate | None:
    """Last Average@k minus the baseline's, seed by seed; over problems where one seed is shared.

    Runs whose last evaluation came after another step than their partner's make no pair.
    """
    others = {run.seed: scored(run) for run in baseline.runs}
    pairs = [
        (ours[-1], theirs[-1])
        for run in variant.runs
        if (ours := scored(run)) and (theirs := others.get(run.seed))
        if ours[-1]["step"] == theirs[-1]["step"]
    ]
    differences = [ours["average_at_k"] - theirs["average_at_k"] for ours, theirs in pairs]
    if len(pairs) != 1:
        return estimate(differences) if pairs else None
    one, other = (per_problem(evaluation) for evaluation in pairs[0])
    if one is None or other is None:
        return Estimate(differences[0])
    return _over_problems([x - y for x, y in zip(one, other, strict=True)])


def training_seconds(run: Run, until: int | None = None) -> float | None:
    """Seconds of all phases of the steps up to ``until``; no evaluations, start or checkpoints."""
    steps = [step for step in run.steps if until is None or step["step"] <= until]
    tables = [step["seconds"] for step in steps if step.get("seconds")]
    return math.fsum(v for t in tables for v in t.values() if v is not None) if tables else None


def hours(run: Run, until: int | None = None) -> float | None:
    """GPU-hours of training, or hours of the machine where there was no GPU."""
    seconds = training_seconds(run, until)
    if seconds is None:
        return None
    return seconds * (run.processes if run.on_gpu else 1) / 3600


def gains_per_hour(variant: Variant) -> list[tuple[float, float]]:
    """(hours up to the last evaluation, its Average@k minus step 0's) of each run that has both."""
    pairs = []
    for run in variant.runs:
        evaluations = scored(run)
        if len(evaluations) < 2 or evaluations[0]["step"] != 0:
            continue
        first, last = evaluations[0], evaluations[-1]
        if cost := hours(run, last["step"]):
            pairs.append((cost, last["average_at_k"] - first["average_at_k"]))
    return pairs


def values_by_step(
    variant: Variant, key: str, part: str | None = None, evaluations: bool = False
) -> dict[int, list[float]]:
    """One value a run that has it: of ``key``, or of entry ``part`` of the table ``key``."""
    values: dict[int, list[float]] = {}
    for run in variant.runs:
        for line in run.evaluations if evaluations else run.steps:
            value: Any = line.get(key)
            if part is not None and value is not None:
                value = value.get(part)
            if value is not None:
                values.setdefault(line["step"], []).append(value)
    return dict(sorted(values.items()))


def estimates_by_step(
    variant: Variant, key: str, part: str | None = None, evaluations: bool = False
) -> dict[int, Estimate]:
    """Means of ``values_by_step``, from three seeds on with intervals.

    Of two, an interval is six times as wide as they are apart: it hides every other curve.
    Average@k of an only seed has one over problems.
    """
    if key == "average_at_k" and len(variant.runs) == 1:
        return {e["step"]: _over_seed(e) for e in scored(variant.runs[0])}
    values = values_by_step(variant, key, part, evaluations)
    return {step: _for_curve(found) for step, found in values.items()}


def _for_curve(values: Sequence[float]) -> Estimate:
    return estimate(values) if len(values) > 2 else Estimate(math.fsum(values) / len(values))


def _whole(values: Sequence[float | None] | None) -> bool:
    """Whether there are such values, all of them finite."""
    return bool(values) and None not in values  # type: ignore[operator]


def layer_rows(variant: Variant, key: str) -> tuple[list[int], list[list[float]]]:
    """(steps, [layers][steps]): a per-layer metric, its mean over the runs that have it whole."""
    found: dict[int, list[list[float]]] = {}
    for run in variant.runs:
        for line in run.steps:
            if _whole(line.get(key)):
                found.setdefault(line["step"], []).append(line[key])
    steps = sorted(found)
    columns = [[math.fsum(v) / len(v) for v in zip(*found[step], strict=False)] for step in steps]
    return steps, [list(row) for row in zip(*columns, strict=False)]


def flow_shares(step: Line, spec: FlowSpec | None) -> list[float] | None:
    """Each layer's share of L_flow [L], sum 1; None where nothing was computed, or all was zero.

    A layer has its terms and half of those of each pair that it is part of, each with its weight in
    L_flow.
    """
    found = {}
    for term in [] if spec is None else terms_of(spec):
        values = step.get(f"flow_{term.name}_per_{term.over}")
        if values and not _whole(values):
            return None
        if values is not None:
            found[term.name] = term, values
    if spec is None or not found:
        return None
    number = max(len(values) + (term.over == "pair") for term, values in found.values())
    equal_widths = all(t.name in found for t in terms_of(spec) if t.needs_equal_widths)
    energy = [0.0] * number
    for name, weights in flow_weights(number, spec, equal_widths).items():
        if name not in found:
            continue
        term, values = found[name]
        for i, (weight, value) in enumerate(zip(weights, values, strict=False)):
            ends = (i, i + 1) if term.over == "pair" else (i,)
            for layer in ends:
                energy[layer] += weight * value / len(ends)
    total = math.fsum(energy)
    return [e / total for e in energy] if total > 0 else None


def entropy(shares: Sequence[float]) -> float:
    """Of a distribution, nats."""
    return -math.fsum(p * math.log(p) for p in shares if p > 0)


def entropy_by_step(variant: Variant) -> dict[int, Estimate]:
    """Entropy of the shares."""
    values: dict[int, list[float]] = {}
    for run in variant.runs:
        spec = run.flow
        for step in run.steps:
            if (shares := flow_shares(step, spec)) is not None:
                values.setdefault(step["step"], []).append(entropy(shares))
    return {step: _for_curve(found) for step, found in sorted(values.items())}


def mean_shares(variant: Variant) -> list[float] | None:
    """Shares over the last tenth of the steps, mean over steps and runs."""
    found = []
    for run in variant.runs:
        spec, last = run.flow, run.steps[-max(1, len(run.steps) // 10) :]
        found += [s for step in last if (s := flow_shares(step, spec)) is not None]
    if not found or len({len(s) for s in found}) > 1:
        return None
    return [math.fsum(column) / len(found) for column in zip(*found, strict=True)]
