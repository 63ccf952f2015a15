"""Generations before and after training, side by side."""

from __future__ import annotations

from typing import Any

from megatron_phf.report.runs import Line
from megatron_phf.report.section import Report, Section

_LONGEST_TEXT = 6000  # characters of a sample


def _shortened(text: str | None) -> str | None:
    if text is None or len(text) <= _LONGEST_TEXT:
        return text
    half = _LONGEST_TEXT // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters …]\n{text[-half:]}"


def _sample(before: Line | None, after: Line) -> dict[str, Any]:
    texts = {
        "problem": after.get("problem"),
        "reference": after.get("reference"),
        "answer": after.get("answer"),
        "before": before.get("generation") if before else None,
        "after": after.get("generation"),
    }
    verdicts = {
        "before_correct": before.get("correct") if before else None,
        "after_correct": after.get("correct"),
    }
    return {**{name: _shortened(text) for name, text in texts.items()}, **verdicts}


def samples(report: Report) -> Section:
    """The same problems before and after training, of each variant's first seed."""
    section = Section(
        "Samples",
        "The first sample of the same problems before training and after it; first seed of each.",
    )
    for variant in report.variants:
        kept = [e for e in variant.runs[0].evaluations if e.get("samples")]
        if not kept:
            section.missing.append(f"samples of {variant.name}")
            continue
        first = kept[0]["samples"] if kept[0]["step"] == 0 and len(kept) > 1 else []
        old = {sample.get("problem"): sample for sample in first}
        pairs = [_sample(old.get(s.get("problem")), s) for s in kept[-1]["samples"]]
        step = f"after step {kept[-1]['step']}"
        seed = variant.runs[0].seed
        section.samples.append({"name": variant.name, "step": step, "seed": seed, "pairs": pairs})
    return section
