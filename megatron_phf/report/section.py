"""A part of the page, and what all parts work on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_phf.report.charts import Chart, Gallery
from megatron_phf.report.runs import Run, Variant
from megatron_phf.report.statistics import Estimate, estimate


@dataclass
class Section:
    """One part of the page; ``missing``: what the runs have nothing of."""

    title: str
    text: str = ""
    head: Sequence[str] = ()
    rows: list[Sequence[str]] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    legend: Sequence[str] = ()  # names that the pictures show by colour alone
    folded: list[tuple[str, list[Chart]]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, chart: Chart | None, name: str) -> None:
        """A picture, or a word on what there is none of."""
        if chart is None:
            self.missing.append(name)
        else:
            self.charts.append(chart)


@dataclass(frozen=True)
class Report:
    """What all sections work on."""

    variants: Sequence[Variant]
    baseline: Variant
    gallery: Gallery

    @property
    def runs(self) -> list[Run]:
        """Of all variants."""
        return [run for variant in self.variants for run in variant.runs]

    @property
    def k(self) -> str:
        """The k of Average@k, as text."""
        found = {e["k"] for run in self.runs for e in run.evaluations if e.get("k") is not None}
        return "/".join(f"{k:g}" for k in sorted(found)) or "k"

    @property
    def hour(self) -> str:
        """What an hour of training is counted in."""
        devices = {run.on_gpu for run in self.runs}
        if devices == {True}:
            return "GPU-hour"
        return "machine-hour" if devices == {False} else "GPU- or machine-hour"

    @property
    def names(self) -> list[str]:
        """Of all variants."""
        return [variant.name for variant in self.variants]

    def by_variant(self, value: Callable[[Variant], Any]) -> dict[str, Any]:
        """{name: value}, without those that have none."""
        found = {variant.name: value(variant) for variant in self.variants}
        return {name: each for name, each in found.items() if each is not None}


def points(value: Estimate | None, signed: bool = False) -> str:
    """A fraction as percent or, signed, as points; with its interval."""
    if value is None:
        return "–"
    sign = "+" if signed else ""
    text = f"{100 * value.mean:{sign}.1f}" + ("" if signed else " %")
    if value.low is not None and value.high is not None:
        text += f" [{100 * value.low:{sign}.1f}, {100 * value.high:{sign}.1f}]"
    return text.replace("-", "−")


def plain(value: Estimate | None, digits: int = 1) -> str:
    """A number with its interval."""
    if value is None:
        return "–"
    text = f"{value.mean:,.{digits}f}"
    if value.low is not None and value.high is not None:
        text += f" [{value.low:,.{digits}f}, {value.high:,.{digits}f}]"
    return text.replace("-", "−")


def bytes_text(value: float | None) -> str:
    """In MiB or GiB."""
    if value is None:
        return "–"
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def mean_of(variant: Variant, value: Callable[[Run], float | None]) -> Estimate | None:
    """Over the runs that have a value."""
    found = [each for run in variant.runs if (each := value(run)) is not None]
    return estimate(found) if found else None
