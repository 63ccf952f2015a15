"""The sections with tables: results, cost, shares of the layers, settings."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_phf.report.runs import Run, Variant
from megatron_phf.report.section import Report, Section, bytes_text, mean_of, plain, points
from megatron_phf.report.statistics import (
    Estimate,
    entropy,
    entropy_by_step,
    estimate,
    final_accuracy,
    gains_per_hour,
    hours,
    last_step,
    mean_shares,
    paired_difference,
    scored,
    training_seconds,
)


def _best(variant: Variant) -> str:
    """Mean over seeds of each one's best evaluation, and after which steps they were."""
    found = [evaluations for run in variant.runs if (evaluations := scored(run))]
    tops = [max(evaluations, key=lambda e: e["average_at_k"]) for evaluations in found]
    if not tops:
        return "–"
    mean = sum(top["average_at_k"] for top in tops) / len(tops)
    steps = sorted({top["step"] for top in tops})
    place = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
    return f"{100 * mean:.1f} % (step {place})"


def _final(variant: Variant, longest: int) -> str:
    """The last accuracy, and when it was where others trained for longer."""
    step = last_step(variant)
    early = f", step {step}" if step is not None and step < longest else ""
    return points(final_accuracy(variant)) + early


def _reading(variant: Variant, base: Variant, difference: Estimate | None) -> str:
    if difference is None and last_step(variant) != last_step(base):
        return "other steps: not comparable"
    if difference is None or difference.low is None or difference.high is None:
        return "not known"
    if difference.low > 0:
        return "better"
    return "worse" if difference.high < 0 else "no difference seen"


def result(report: Report) -> Section:
    """The headline: final accuracies and their paired differences."""
    base, k = report.baseline, report.k
    over = next((f.over for v in report.variants if (f := final_accuracy(v)) and f.over), "")
    section = Section(
        "Result",
        f"Average@{k}: mean share of correct samples. In brackets 95 % intervals"
        + (f" (over {over})" if over else "")
        + f"; differences to “{base.name}” are paired: seed by seed, or problem by "
        "problem where one seed is shared. They are not corrected for looking at many variants. "
        "“Best” is chosen on the same problems and therefore flattered.",
        ("Variant", "Seeds", "Before", f"Final Average@{k}", f"Against {base.name}, points",
         "Reading", "Best evaluation"),
    )  # fmt: skip
    finals, differences = {}, {}
    longest = max((s for v in report.variants if (s := last_step(v)) is not None), default=0)
    for variant in report.variants:
        final = final_accuracy(variant)
        difference = None if variant is base else paired_difference(variant, base)
        if final is not None:
            finals[variant.name] = final.scaled(100)
        if difference is not None:
            differences[variant.name] = difference.scaled(100)
        section.rows.append(
            (
                variant.name, str(len(variant.runs)),
                points(mean_of(variant, _before)).split(" [")[0], _final(variant, longest),
                "baseline" if variant is base else points(difference, signed=True),
                "" if variant is base else _reading(variant, base, difference), _best(variant),
            )
        )  # fmt: skip
    if finals:
        title = f"Final Average@{k}"
        section.charts.append(report.gallery.estimates(title, finals, "%"))
    else:
        section.missing.append("evaluations")
    if differences:
        title = f"Difference to {base.name}"
        section.charts.append(report.gallery.estimates(title, differences, "points", zero=True))
    return section


def _before(run: Run) -> float | None:
    evaluations = scored(run)
    return evaluations[0]["average_at_k"] if evaluations and evaluations[0]["step"] == 0 else None


def _peak(run: Run) -> float | None:
    values = [s["peak_memory_bytes"] for s in run.steps if s.get("peak_memory_bytes") is not None]
    return max(values, default=None)


def _hours(value: Estimate | None) -> str:
    return plain(value, 4 if value is not None and value.mean < 1 else 2)


def trade_off(report: Report) -> Section:
    """What a gain costs."""
    section = Section(
        "Cost, and gain for it",
        "Gain: last Average@k minus that before training. Cost: all phases of the steps up to that "
        f"evaluation, in {report.hour}s, without evaluations, start and checkpoints.",
        (
            "Variant",
            "Seconds a run",
            f"{report.hour[0].upper()}{report.hour[1:]}s a run",
            "Gain, points",
            f"Points a {report.hour}",
            "Peak memory",
        ),
        legend=report.names,
    )
    rates: dict[str, Estimate] = {}
    for variant in report.variants:
        pairs = gains_per_hour(variant)
        rate = estimate([100 * gained / cost for cost, gained in pairs]) if pairs else None
        gained = estimate([g for _, g in pairs]) if pairs else None
        if rate is not None:
            rates[variant.name] = rate
        peaks = [p for run in variant.runs if (p := _peak(run)) is not None]
        section.rows.append(
            (
                variant.name, plain(mean_of(variant, training_seconds)),
                _hours(mean_of(variant, hours)), points(gained, signed=True),
                plain(rate), bytes_text(max(peaks, default=None)),
            )
        )  # fmt: skip
    dots = {v.name: [(h, 100 * g) for h, g in gains_per_hour(v)] for v in report.variants}
    labels = (f"cost of a run, {report.hour}s", "gain, points")
    section.add(report.gallery.scatter("Gain and cost", dots, labels), "gain and cost of a run")
    if rates:
        title = f"Gain for one {report.hour}"
        section.charts.append(report.gallery.estimates(title, rates, "points", zero=True))
    return section


def shares(report: Report) -> Section:
    """The paper's diagnostic: how the flow loss is spread over the layers."""
    section = Section(
        "Shares of the layers",
        "Each layer’s share of the flow loss over the last tenth of the steps: its own terms and "
        "half of each adjacent pair that it is part of, with their weights. The entropy of the "
        "shares is at most ln L, reached when all are equal. PHF’s paper has largest shares of "
        "6.5, 5.1 and 4.8 % and entropies of 3.17, 3.38 and 3.40 nats with 28, 36 and 36 layers.",
        ("Variant", "Layers", "Largest share", "Of layer", "Entropy, nats", "ln L, nats"),
    )
    found: Mapping[str, list[float]] = report.by_variant(mean_shares)
    section.legend = list(found)
    for name, row in found.items():
        top = max(range(len(row)), key=row.__getitem__)
        section.rows.append(
            (
                name, str(len(row)), f"{100 * row[top]:.1f} %", str(top + 1),
                f"{entropy(row):.3f}", f"{entropy([1 / len(row)] * len(row)):.3f}",
            )
        )  # fmt: skip
    section.add(report.gallery.shares("Share of each layer", found), "flow terms by layer")
    series = {v.name: entropy_by_step(v) for v in report.variants}
    title = "Entropy of the shares"
    section.add(report.gallery.curves(title, series, "nats"), "entropy of the shares")
    return section


def _flat(run: Run) -> dict[str, str]:
    config = run.info.get("config") or {}
    groups = [group for group in config.values() if isinstance(group, dict)]
    skipped = {"seed", "output_dir", "run_name", "metrics_file"}
    return {k: str(v) for group in groups for k, v in group.items() if k not in skipped}


def settings(report: Report) -> Section:
    """What was run: sizes, and the settings in which the variants differ."""
    flat = {variant.name: _flat(variant.runs[0]) for variant in report.variants}
    names = dict.fromkeys(name for settings in flat.values() for name in settings)
    differing = [n for n in names if len({settings.get(n) for settings in flat.values()}) > 1]
    section = Section(
        "Runs",
        "Settings: those in which the variants differ, of each one’s first seed.",
        ("Variant", "Seeds", "Steps", "Processes", "Device", "Parameters", "Settings"),
    )
    for variant in report.variants:
        run = variant.runs[0]
        own = flat[variant.name]
        parameters = (run.info.get("model") or {}).get("parameters")
        section.rows.append(
            (
                variant.name, ", ".join(map(str, variant.seeds)),
                str(max((s["step"] for r in variant.runs for s in r.steps), default=0)),
                str(run.processes), str(run.info.get("device") or "–"),
                f"{parameters:,}" if isinstance(parameters, int) else "–",
                ", ".join(f"{n} {own[n]}" for n in differing if n in own) or "–",
            )
        )  # fmt: skip
    return section
