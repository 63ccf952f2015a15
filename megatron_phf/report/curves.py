"""The sections that are pictures: curves over the steps, heat maps, phases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_phf.hidden.term import TERMS, load_term
from megatron_phf.report.charts import MANY
from megatron_phf.report.runs import LISTS, Variant
from megatron_phf.report.section import Report, Section
from megatron_phf.report.statistics import estimates_by_step, layer_rows, values_by_step

_PHASES = ("rollout_wait", "rollout", "teacher", "student", "optimizer")
_BANDS = (
    "Means over seeds, from three on with 95 % intervals; Average@k of a single one with that "
    f"over problems. Of more than {MANY} variants only the best known ones have theirs drawn."
)


def _curves(
    report: Report, section: Section, title: str, label: str, factor: float = 1.0, **key: Any
) -> None:
    series = {v.name: estimates_by_step(v, **key) for v in report.variants}
    section.add(
        report.gallery.curves(title, series, label, factor, percent=factor == 100),
        title[0].lower() + title[1:],
    )


def _terms(variants: Sequence[Variant]) -> dict[str, str]:
    """Hidden-state terms in the metrics -> the key of their list by layer or pair."""
    steps = (step for variant in variants for run in variant.runs for step in run.steps)
    keys = dict.fromkeys(key for step in steps for key in step)
    return {
        key.removeprefix("flow_").rpartition("_per_")[0]: key
        for key in keys
        if key.startswith("flow_") and key.endswith(LISTS)
    }


def _words(term: str) -> str:
    """Of ``last_layer``: Last layer."""
    return term.replace("_", " ").capitalize()


def _label(term: str) -> str:
    """What its values are; a report runs no code of terms that are not ours."""
    return load_term(term).label if term in TERMS else ""


def accuracies(report: Report) -> Section:
    """Evaluations over the steps."""
    section = Section("Accuracy over training", _BANDS, legend=report.names)
    for name in ("average", "pass", "majority"):
        key = f"{name}_at_k"
        title = f"{name.capitalize()}@{report.k}"
        _curves(report, section, title, "%", 100, key=key, evaluations=True)
    return section


def losses(report: Report) -> Section:
    """Loss curves."""
    section = Section("Losses", _BANDS, legend=report.names)
    for key, title, label in (
        ("loss", "Loss", "loss"),
        ("opsd", "Output divergence", "nats a token"),
        ("flow", "Flow loss", "L_flow"),
        *((f"flow_{t}", f"{_words(t)} term", _label(t)) for t in _terms(report.variants)),
        ("grad_norm", "Gradient norm", "before clipping"),
    ):
        _curves(report, section, title, label, key=key)
    return section


def flow_maps(report: Report) -> Section:
    """Where in the model, and when, the flow differs from the teacher's."""
    section = Section(
        "Flow by layer",
        "Each term of the flow loss by layer (or pair of neighbours) and step, mean over seeds.",
    )
    for variant in report.variants:
        charts = []
        for name, key in _terms([variant]).items():
            steps, rows = layer_rows(variant, key)
            if rows:
                label = "layer" if key.endswith("layer") else "pair (with the next layer)"
                title = f"{variant.name}: {name}"
                charts.append(report.gallery.heat_map(title, steps, rows, label))
        if charts:
            section.folded.append((variant.name, charts))
        else:
            section.missing.append(f"flow terms by layer of {variant.name}")
    return section


def rollouts(report: Report) -> Section:
    """What was sampled, and how the teacher saw it."""
    section = Section(
        "Rollouts and teacher", "Of the training rollouts, by step.", legend=report.names
    )
    for part, title, label, factor in (
        ("mean", "Rollout length", "tokens, mean", 1.0),
        ("max", "Longest rollout", "tokens", 1.0),
        ("cut", "Rollouts cut for want of room", "%", 100.0),
    ):
        _curves(report, section, title, label, factor, key="rollout_lengths", part=part)
    modes = sorted({s["clip_mode"] for r in report.runs for s in r.steps if s.get("clip_mode")})
    of = {"entry": "vocabulary entries", "token": "tokens"}
    label = " or ".join(f"% of {of[mode]}" for mode in modes if mode in of) or "%"
    _curves(report, section, "Clipped by the loss", label, 100, key="clipped_fraction")
    _curves(report, section, "Entropy of the teacher", "nats a token", key="teacher_entropy")
    return section


def collapse(report: Report) -> Section:
    """What warns of a student that collapses."""
    text = "Each over the steps; the length as a part of that of the run's first steps."
    section = Section("Signs of collapse", text, legend=report.names)
    for key, part, title, label, factor in (
        ("student_entropy", None, "Entropy of the student", "nats a token", 1.0),
        ("collapse_signs", "length", "Length against the first steps", "times", 1.0),
        ("copied_words", None, "Words of the reference in the responses", "%", 100.0),
        ("teacher_agreement", None, "Agreement of student and teacher", "% of tokens", 100.0),
    ):
        _curves(report, section, title, label, factor, key=key, part=part)
    return section


def _by_phase(variant: Variant, key: str, factor: float) -> dict[str, float]:
    """Mean over steps and runs of each phase's entry of the table ``key``."""
    names = dict.fromkeys(
        name for run in variant.runs for step in run.steps for name in step.get(key) or ()
    )
    known = [name for name in _PHASES if name in names]
    result = {}
    for name in [*known, *(n for n in names if n not in known)]:
        series = values_by_step(variant, key, name)
        values = [value for step in series.values() for value in step]
        if values:
            result[name] = factor * sum(values) / len(values)
    return result


def phases(report: Report) -> Section:
    """Time and memory by phase."""
    section = Section("Time and memory by phase", "Means over steps and seeds, of rank 0.")
    for key, title, label, factor, stacked in (
        ("seconds", "Time of a step", "seconds", 1.0, True),
        ("memory_bytes", "Memory by phase", "GiB", 2**-30, False),
    ):
        table = {v.name: _by_phase(v, key, factor) for v in report.variants}
        section.add(report.gallery.bars(title, table, label, stacked), title.lower())
    return section
