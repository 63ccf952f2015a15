"""The report's pictures, each as SVG for the page and as a PNG file beside it."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron_phf.report.statistics import Estimate

# By name where readers know it from elsewhere, else in turn.
_KNOWN = {"base": "#6b7280", "opsd": "#d97706", "phf": "#2563eb", "sft": "#0f766e"}
_COLOURS = (
    "#be185d", "#15803d", "#7c3aed", "#b91c1c", "#0891b2", "#854d0e", "#4d7c0f", "#a21caf",
    "#1e40af", "#9a3412", "#047857", "#5b21b6",
)  # fmt: skip
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_INK, _QUIET, _GRID = "#1f2937", "#4b5563", "#e5e7eb"
_STYLE: Any = {
    "font.size": 10, "axes.edgecolor": "#9ca3af", "axes.labelcolor": _QUIET, "text.color": _INK,
    "xtick.color": _QUIET, "ytick.color": _QUIET, "axes.linewidth": 0.8, "svg.fonttype": "none",
    "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False,
    "axes.axisbelow": True, "axes.formatter.limits": (-4, 5), "axes.formatter.useoffset": False,
}  # fmt: skip
_SIZE = (5.0, 3.1)  # inches of 72 units: the width of a phone's screen, so that 10 is read as 10
Series = Mapping[int, Estimate]
MANY = 8  # more curves than that hide each other's bands


@dataclass(frozen=True)
class Look:
    """How a variant is drawn, everywhere the same."""

    colour: str
    dash: Any


def looks(names: Sequence[str]) -> dict[str, Look]:
    """A colour for each variant; dashed once the colours are used up."""
    result: dict[str, Look] = {}
    for name in names:
        fresh = sum(n not in _KNOWN for n in result)
        dash = 0 if name in _KNOWN else fresh // len(_COLOURS) % len(_DASHES)
        colour = _KNOWN.get(name, _COLOURS[fresh % len(_COLOURS)])
        result[name] = Look(colour, _DASHES[dash])
    return result


@dataclass(frozen=True)
class Chart:
    """A finished picture: ``svg`` for the page, ``png`` the file's name."""

    title: str
    svg: str
    png: str
    wide: bool = False


class Gallery:
    """Draws into ``directory``; names its files after the charts."""

    def __init__(self, directory: str, variant_looks: Mapping[str, Look]) -> None:
        self._directory = directory
        self._looks = variant_looks
        self._used: set[str] = set()

    def draw(
        self, title: str, paint: Callable[[Any, Any], None], height: float = _SIZE[1]
    ) -> Chart:
        """``paint(figure, axes)`` on new axes; legends go into the file, the page has its own."""
        with _matplotlib() as pyplot:
            figure, axes = pyplot.subplots(figsize=(_SIZE[0], height), layout="constrained")
            paint(figure, axes)
            svg = _svg(figure, title)
            handles, labels = axes.get_legend_handles_labels()
            if len(labels) > 1 and axes.get_legend() is None:
                figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8,
                              frameon=False)  # fmt: skip
                figure.set_size_inches(_SIZE[0], height + 0.2 * ((len(labels) + 2) // 3))
            figure.suptitle(title, fontsize=11, fontweight="bold")
            name = self._file_name(title)
            figure.savefig(os.path.join(self._directory, name), dpi=150)
            pyplot.close(figure)
        return Chart(title, svg, name)

    def _file_name(self, title: str) -> str:
        plain = re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")[:60] or "chart"
        name, count = f"{plain}.png", 2
        while name in self._used:
            name, count = f"{plain}_{count}.png", count + 1
        self._used.add(name)
        return name

    def curves(
        self,
        title: str,
        series: Mapping[str, Series],
        label: str,
        factor: float = 1.0,
        percent: bool = False,
    ) -> Chart | None:
        """{variant: {step: estimate}} as means with bands; None without values."""
        shown = {name: points for name, points in series.items() if points}
        if not shown:
            return None

        def paint(figure: Any, axes: Any) -> None:
            for name, points in shown.items():
                quiet = len(shown) > MANY and name not in _KNOWN
                _curve(axes, name, points, self._looks[name], factor, quiet)
            axes.set_xlabel("optimizer step")
            axes.set_ylabel(label)
            axes.grid(axis="y", color=_GRID, lw=0.8)
            axes.margins(x=0.02)
            means = [factor * e.mean for points in shown.values() for e in points.values()]
            axes.set_ylim(*_limits(axes.get_ylim(), means, 102.0 if percent else math.inf))
            axes.xaxis.get_major_locator().set_params(integer=True)

        return self.draw(title, paint)

    def heat_map(
        self, title: str, steps: Sequence[int], rows: Sequence[Sequence[float]], label: str
    ) -> Chart:
        """[layers][steps] in colours, the first layer at the bottom."""

        def paint(figure: Any, axes: Any) -> None:
            n = len(rows)
            extent = (-0.5, len(steps) - 0.5, 0.5, n + 0.5)
            image = axes.imshow(
                rows, aspect="auto", origin="lower", extent=extent, cmap="viridis",
                interpolation="nearest",
            )  # fmt: skip
            places = sorted({round(i * (len(steps) - 1) / 4) for i in range(5)})
            axes.set_xticks(places, [str(steps[i]) for i in places])
            axes.set_yticks(sorted({round(1 + i * (n - 1) / min(6, max(n - 1, 1)))
                                    for i in range(min(6, n - 1) + 1)}))  # fmt: skip
            axes.set_xlabel("optimizer step")
            axes.set_ylabel(label)
            axes.spines[:].set_visible(False)
            bar = figure.colorbar(image, ax=axes, pad=0.02)
            bar.outline.set_visible(False)

        return self.draw(title, paint)

    def estimates(
        self, title: str, values: Mapping[str, Estimate], label: str, zero: bool = False
    ) -> Chart:
        """One line a variant: its mean as a dot, its interval as a bar."""

        def paint(figure: Any, axes: Any) -> None:
            for i, (name, value) in enumerate(reversed(list(values.items()))):
                colour = self._looks[name].colour
                if value.low is not None:
                    axes.plot([value.low, value.high], [i, i], color=colour, lw=5, alpha=0.3,
                              solid_capstyle="round")  # fmt: skip
                axes.plot(value.mean, i, "o", color=colour, ms=7)
            axes.set_yticks(range(len(values)), [_cut(name) for name in reversed(list(values))])
            axes.set_ylim(-0.7, len(values) - 0.3)
            axes.grid(axis="x", color=_GRID, lw=0.8)
            axes.spines["left"].set_visible(False)
            axes.tick_params(axis="y", length=0)
            axes.locator_params(axis="x", nbins=5)
            axes.set_xlabel(label)
            if zero:
                axes.axvline(0, color=_QUIET, lw=1)

        return self.draw(title, paint, height=max(1.6, 0.75 + 0.3 * len(values)))

    def bars(
        self, title: str, table: Mapping[str, Mapping[str, float]], label: str, stacked: bool
    ) -> Chart | None:
        """{variant: {part: value}} as horizontal bars, the parts in shades; None without values."""
        shown = {name: parts for name, parts in table.items() if parts}
        if not shown:
            return None
        parts = list(dict.fromkeys(part for row in shown.values() for part in row))

        def paint(figure: Any, axes: Any) -> None:
            shades = ("#1e3a8a", "#0d9488", "#f59e0b", "#9ca3af", "#be185d", "#65a30d")
            height = 0.62 if stacked else 0.75 / len(parts)
            for j, part in enumerate(parts):
                for i, row in enumerate(reversed(shown.values())):
                    value = row.get(part, 0.0)
                    before = sum(row.get(p, 0.0) for p in parts[:j]) if stacked else 0.0
                    place = i if stacked else i + 0.375 - (j + 0.5) * height
                    axes.barh(place, value, height, before, color=shades[j % len(shades)],
                              label=part if i == 0 else None)  # fmt: skip
            axes.set_yticks(range(len(shown)), [_cut(name) for name in reversed(shown)])
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="x", color=_GRID, lw=0.8)
            axes.set_xlabel(label)
            axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=4, frameon=False,
                        fontsize=9, handlelength=1, columnspacing=1.2)  # fmt: skip

        rows = len(shown) * (1 if stacked else max(1.0, 0.45 * len(parts)))
        return self.draw(title, paint, height=max(1.8, 1.1 + 0.3 * rows))

    def scatter(
        self, title: str, points: Mapping[str, Sequence[tuple[float, float]]], labels: Sequence[str]
    ) -> Chart | None:
        """{variant: [(x, y)]}: a small dot a run, a large one for their mean."""
        shown = {name: dots for name, dots in points.items() if dots}
        if not shown:
            return None

        def paint(figure: Any, axes: Any) -> None:
            for name, dots in shown.items():
                colour, (x, y) = self._looks[name].colour, zip(*dots, strict=True)
                axes.plot(x, y, "o", color=colour, ms=4, alpha=0.45, mew=0)
                mean = sum(x) / len(x), sum(y) / len(y)
                axes.plot(*mean, "o", color=colour, ms=9, mec="white", label=name)
            axes.axhline(0, color=_QUIET, lw=0.8)
            axes.set_xlim(0, 1.08 * max(x for dots in shown.values() for x, _ in dots))
            axes.grid(color=_GRID, lw=0.8)
            axes.set_xlabel(labels[0])
            axes.set_ylabel(labels[1])

        return self.draw(title, paint)

    def shares(self, title: str, values: Mapping[str, Sequence[float]]) -> Chart | None:
        """{variant: share of each layer} as lines over the layers."""
        if not values:
            return None

        def paint(figure: Any, axes: Any) -> None:
            for name, row in values.items():
                look, layers = self._looks[name], range(1, len(row) + 1)
                axes.plot(layers, [100 * share for share in row], color=look.colour,
                          ls=look.dash, lw=1.8, marker="o", ms=3.5, label=name)  # fmt: skip
            axes.set_ylim(bottom=0)
            axes.grid(axis="y", color=_GRID, lw=0.8)
            axes.set_xlabel("layer")
            axes.set_ylabel("share of the flow loss, %")
            axes.xaxis.get_major_locator().set_params(integer=True)

        return self.draw(title, paint)


def _curve(axes: Any, name: str, points: Series, look: Look, factor: float, quiet: bool) -> None:
    """``quiet``: one of many, without its band."""
    steps, means = list(points), [value.scaled(factor) for value in points.values()]
    style = {"marker": "o", "ms": 2.5 if quiet else 3.5} if len(steps) <= 25 else {}
    axes.plot(steps, [m.mean for m in means], color=look.colour, ls=look.dash, label=name,
              lw=1.0 if quiet else 1.6, zorder=2 if quiet else 3, **style)  # fmt: skip
    if quiet:
        return
    low = [m.mean if m.low is None else m.low for m in means]
    high = [m.mean if m.high is None else m.high for m in means]
    axes.fill_between(steps, low, high, color=look.colour, alpha=0.14, lw=0)


def _limits(drawn: tuple[float, float], means: Sequence[float], top: float) -> tuple[float, float]:
    """What to show of an axis: all means, and of the intervals as much as leaves those readable."""
    least, most = min(means), max(means)
    room = (most - least) or abs(most) or 1.0
    low, high = max(drawn[0], least - room), min(drawn[1], most + room, top)
    if least >= 0:  # such a quantity: an interval may reach below what can be
        low = max(low, -0.02 * (high - low))
    return low, high


def _cut(name: str) -> str:
    return name if len(name) <= 22 else name[:21] + "…"


@contextmanager
def _matplotlib() -> Iterator[Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(_STYLE):
        yield pyplot


def _svg(figure: Any, title: str) -> str:
    """The figure as one ``<svg>`` element; ``title`` keeps its ids apart from other figures'."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    svg = text[text.index("<svg") :]
    # Names that nothing refers to are the same in every picture.
    used = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda m: m[0] if m[1] in used else "", svg)
    svg = re.sub(r' height="[^"]*pt"', "", svg, count=1)
    return re.sub(r' width="[^"]*pt"', "", svg, count=1)
