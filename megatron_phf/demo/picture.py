"""The picture of a demonstration run (``make demo``)."""

from __future__ import annotations

from typing import Any

_COLOURS = {"base": "#8a8f98", "opsd": "#d97706", "phf": "#2563eb"}
_NAMES = {"base": "base model", "opsd": "OPSD", "phf": "OPSD + PHF"}


def _accuracy(axes: Any, summary: dict[str, Any]) -> None:
    k = summary["eval_samples"]
    for i, name in enumerate(_NAMES):
        mean = 100 * summary[f"{name}_average_at_{k}"]
        axes.bar(i, mean, color=_COLOURS[name], width=0.62, alpha=0.85)
        axes.text(i, mean + 1.5, f"{mean:.1f} %", ha="center", va="bottom", fontsize=11)
        for run in summary["runs"].get(name, []):
            axes.plot(i + 0.4, 100 * run["average_at_k"], "o", color=_COLOURS[name], ms=4)
    axes.set_xticks(range(len(_NAMES)), list(_NAMES.values()))
    axes.set_ylim(0, 105)
    axes.set_ylabel(f"held-out Average@{k}, %")
    axes.set_title(f"Accuracy (bar: mean, dots: {len(summary['seeds'])} seed(s))")


def _smooth(values: list[float], width: int = 9) -> list[float]:
    """Mean of the values at most ``width`` // 2 steps away."""
    near = [values[max(0, i - width // 2) : i + width // 2 + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in near]


def _curves(axes: Any, curves: dict[str, list[list[Any]]], key: str, title: str) -> None:
    for name, runs in curves.items():
        seeds = [[step[key] for step in steps] for steps in runs]
        if not seeds or None in seeds[0]:
            continue
        steps = range(1, len(seeds[0]) + 1)
        for values in seeds:
            axes.plot(steps, values, color=_COLOURS[name], lw=0.6, alpha=0.35)
        mean = [sum(column) / len(column) for column in zip(*seeds, strict=True)]
        axes.plot(steps, _smooth(mean), color=_COLOURS[name], lw=2, label=_NAMES[name])
    axes.set_title(f"{title} (bold: mean)", fontsize=11)
    axes.set_xlabel("optimizer step")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)


def _flow_map(figure: Any, axes: Any, curves: dict[str, list[list[Any]]]) -> None:
    steps = curves["phf"][0] if curves.get("phf") else []
    rows = [step["flow_direction_per_layer"] for step in steps]
    if not rows or rows[0] is None:
        axes.set_axis_off()
        return
    columns = list(zip(*rows, strict=True))
    image = axes.imshow(columns, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_yticks(range(len(columns)), [str(i + 1) for i in range(len(columns))])
    axes.set_ylabel("layer")
    axes.set_xlabel("optimizer step")
    axes.set_title("Direction loss per layer (PHF, first seed)")
    figure.colorbar(image, ax=axes)


def plot_demo(path: str, summary: dict[str, Any], curves: dict[str, list[list[Any]]]) -> None:
    """Accuracies, output loss, flow loss and its layers, as one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    _accuracy(axes[0][0], summary)
    _curves(axes[0][1], curves, "opsd", "Output divergence, nats a token")
    _curves(axes[1][0], curves, "flow", "Flow loss")
    _flow_map(figure, axes[1][1], curves)
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Embedded arithmetic task: privileged self-distillation", fontsize=14)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
