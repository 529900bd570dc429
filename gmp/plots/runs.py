"""Pictures of a run: losses, what was measured on held-out pairs, and how far layers have moved, over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .figure import COLOURS, WIDTH, new_figure, save, short, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RECALLS = {
    "recall_at_1_text_to_image": "recall@1 text → image",
    "recall_at_1_image_to_text": "recall@1 image → text",
}
READERS = {
    "penultimate": "penultimate (SDXL, SD3)",
    "last": "last (SD1)",
    "pooled": "pooled (Flux)",
    "projected": "projected",
}
# Of what a run moves, as `layer_and_role` names it
ROLES = {
    "theta": "θ of MLPs",
    "r": "r of MLPs",
    "attention": "attention",
    "layer_norm": "LayerNorms",
    "mlp": "MLPs' biases",
    "embedding": "embeddings",
    "projection": "projection",
}
History = Mapping[str, object]  # the whole one of a run, as `History.whole` gives it


def smooth(values: Sequence[float | None], horizon: int) -> list[float]:
    """Exponential moving average that starts unbiased (Adam's correction); None counts as nothing."""
    keep = 1 - 1 / max(1, horizon)
    total = weight = 0.0
    line = []
    for value in values:
        if value is not None:
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        line.append(total / weight if weight else float("nan"))
    return line


def plot_losses(history: History) -> Figure:
    """Losses over steps, and below, on held-out pairs, recall and the cosine to the original at every read point."""
    figure = new_figure(8, 8)
    upper, middle, lower = figure.subplots(3, 1, sharex=True, height_ratios=[1.3, 1, 1])
    _losses(upper, history)
    _lines(middle, history["measures"], RECALLS, "recall on\nheld-out pairs")
    _lines(lower, history["measures"], READERS, "cosine to\nthe original")
    lower.set_xlabel("step")
    return figure


def plot_measures(history: History, best: int | None = None) -> Figure:
    """Recall on held-out pairs, cosine to the original at every read point, and how far layers have moved, over steps.

    best: the step that the run kept as its best. Recall and closeness to the original stand below one another because
    neither says alone whether a repair is one.
    """
    measures = history["measures"]
    told = [one for one in measures if one.get("moved")]
    figure = new_figure(WIDTH, 7.6 if told else 5.2)
    axes = figure.subplots(2 + bool(told), 1, sharex=True)
    _lines(axes[0], measures, RECALLS, "recall on\nheld-out pairs")
    _lines(axes[1], measures, READERS, "cosine to\nthe original")
    if told:
        _moved(axes[2], told)
    if best is not None:
        for one in axes:
            one.axvline(best, color="black", linewidth=1, linestyle=":")
        axes[0].set_title(f"dotted: the best, step {best}", fontsize=10, loc="right")
    axes[-1].set_xlabel("step")
    return figure


def _losses(axes: Axes, history: History) -> None:
    at, series = history["at"], history["series"]
    horizon = max(1, len(at) // 50)
    names = [name for name in series if name.startswith("losses.")]
    for place, name in enumerate(names):
        colour, values = COLOURS[place % len(COLOURS)], series[name]["mean"]
        axes.plot(at, [float("nan") if v is None else v for v in values], color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(at, smooth(values, horizon), color=colour, label=words(name.removeprefix("losses.")))
    axes.set_ylabel("loss")
    axes.set_yscale("log")
    if names:
        axes.legend(frameon=False)
    axes.grid(alpha=0.3)


def _lines(axes: Axes, measures: Sequence[Mapping[str, object]], lines: Mapping[str, str], label: str) -> None:
    there = {name: text for name, text in lines.items() if any(one.get(name) is not None for one in measures)}
    at, marker = [one["step"] for one in measures], "o" if len(measures) <= 60 else ""
    for colour, (name, text) in zip(COLOURS, there.items(), strict=False):
        values = [float("nan") if (v := one.get(name)) is None else v for one in measures]
        axes.plot(at, values, color=colour, marker=marker, markersize=4, label=text)
    axes.set_ylim(-0.05, 1.05)
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    if there:
        axes.legend(frameon=False, loc="lower right", ncols=2, fontsize=9)
    else:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)


def _moved(axes: Axes, measures: Sequence[Mapping[str, object]]) -> None:
    """One line per role: the mean over its layers, which differ by far less than roles do."""
    from matplotlib.ticker import LogLocator, NullFormatter

    at = [one["step"] for one in measures]
    names = {name.rpartition(".")[2]: None for one in measures for name in one["moved"]}
    for colour, role in zip(COLOURS, [role for role in ROLES if role in names], strict=False):
        lines = [[v for n, v in one["moved"].items() if n.endswith(f".{role}") and v and v > 1e-5] for one in measures]
        values = [100 * sum(line) / len(line) if line else float("nan") for line in lines]
        axes.plot(at, values, color=colour, marker="o" if len(at) <= 60 else "", markersize=4, label=ROLES[role])
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("moved since\nthe start, %")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))


def plot_nearest(captions: Sequence[str], found: dict[str, Sequence[Path]], path: Path) -> None:
    """Which picture each text encoder finds for a caption: one row per caption, one column per encoder, as a PNG."""
    from ..data.images import load_picture

    figure = new_figure(1.5 * len(found) + 4.2, 1.25 * len(captions) + 0.3)
    grid = figure.subplots(len(captions), len(found) + 1, squeeze=False, width_ratios=[2.8, *[1] * len(found)])
    for row, caption in zip(grid, captions, strict=True):
        row[0].text(1, 0.5, words(caption), ha="right", va="center", wrap=True, transform=row[0].transAxes)
        row[0].axis("off")
    for column, (name, paths) in enumerate(found.items(), start=1):
        grid[0][column].set_title(short(name))
        for row, picture in zip(grid, paths, strict=True):
            row[column].imshow(load_picture(picture))
            row[column].axis("off")
    save(figure, path)
