"""One HTML page that needs nothing but itself, and its pictures as PNG files."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_phf.files.replace import new_file
from megatron_phf.report import curves, tables
from megatron_phf.report.charts import Gallery, looks
from megatron_phf.report.runs import Variant
from megatron_phf.report.samples import samples
from megatron_phf.report.section import Report, Section

_TEMPLATE = "page.html.jinja"
PAGE = "report.html"
_OURS = '<meta name="generator" content="megatron_phf">'
_SECTIONS: tuple[Callable[[Report], Section], ...] = (
    tables.result, tables.trade_off, curves.accuracies, curves.losses, curves.flow_maps,
    tables.shares, curves.rollouts, curves.collapse, curves.phases, samples, tables.settings,
)  # fmt: skip


def _baseline(variants: Sequence[Variant], name: str | None) -> Variant:
    found = {variant.name: variant for variant in variants}
    if name is not None and name not in found:
        raise ValueError(f"--baseline {name}: no run of this name; there are {', '.join(found)}")
    return found.get(name or "opsd", variants[0])


def check_directory(directory: str) -> None:
    """Raise ValueError where pictures or a page of somebody else's could be written over."""
    there = os.listdir(directory) if os.path.isdir(directory) else []
    page = os.path.join(directory, PAGE)
    if PAGE in there:
        with open(page, encoding="utf-8", errors="replace") as f:
            ours = _OURS in f.read(2**12)
    else:
        ours = not any(name.endswith(".png") for name in there)
    if not ours:
        raise ValueError(
            f"{directory}: has pictures or a {PAGE} that are no report of this program; name "
            "another directory with --output"
        )


def write_report(variants: Sequence[Variant], directory: str, baseline: str | None = None) -> str:
    """Write the page and its pictures into ``directory``; the page's path.

    Args:
        baseline: the variant that others are compared with; ``opsd`` or else the first if None.

    Raises:
        ValueError: no variant ``baseline``, a run's settings are damaged, or the directory has
            files of somebody else's.
    """
    from jinja2 import Environment, StrictUndefined

    base = _baseline(variants, baseline)
    check_directory(directory)
    os.makedirs(directory, exist_ok=True)
    variant_looks = looks([variant.name for variant in variants])
    report = Report(variants, base, Gallery(directory, variant_looks))
    sections = [section(report) for section in _SECTIONS]
    # Everything that is filled in is escaped, but the pictures, which matplotlib escapes.
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = (Path(__file__).parent / _TEMPLATE).read_text(encoding="utf-8")
    names = [variant.name for variant in variants]
    html = environment.from_string(source).render(
        title=", ".join(names) if len(names) <= 8 else f"{len(names)} variants",
        report=report,
        sections=sections,
        looks=variant_looks,
    )
    path = os.path.join(directory, PAGE)
    with new_file(path, errors="replace") as f:
        f.write(html)
    return path
