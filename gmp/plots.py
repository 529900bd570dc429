"""Pictures of a run, drawn with matplotlib without touching its global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

from .files import write_bytes

# Okabe and Ito's colours, told apart by colour-blind readers too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


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


def plot_losses(history: Mapping[str, object], path: Path) -> None:
    """Losses over steps, and recall and read-point cosine on held-out pairs below, as a PNG.

    history: the whole one of a run, as `History.whole` gives it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    at, series, measures = history["at"], history["series"], history["measures"]
    figure = Figure(figsize=(8, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    horizon = max(1, len(at) // 50)
    names = [name for name in series if name.startswith("losses.")]
    for colour, name in zip(COLOURS, names, strict=False):
        values = series[name]["mean"]
        upper.plot(at, [float("nan") if v is None else v for v in values], color=colour, alpha=0.25, linewidth=0.8)
        upper.plot(at, smooth(values, horizon), color=colour, label=name.removeprefix("losses."))
    upper.set_ylabel("loss")
    upper.set_yscale("log")
    upper.legend(frameon=False)
    upper.grid(alpha=0.3)

    lines = {
        "recall_at_1_text_to_image": "recall@1 text → image",
        "recall_at_1_image_to_text": "recall@1 image → text",
        "penultimate": "cosine to the original, penultimate",
        "pooled": "cosine to the original, pooled",
    }
    there = {name: words for name, words in lines.items() if measures and measures[0].get(name) is not None}
    for colour, (name, words) in zip(COLOURS, there.items(), strict=False):
        at, values = [one["step"] for one in measures], [one.get(name) for one in measures]
        values = [float("nan") if v is None else v for v in values]
        lower.plot(at, values, color=colour, marker="o", markersize=4, label=words)
    lower.set_ylim(-0.05, 1.05)
    lower.set_ylabel("held-out pairs")
    lower.set_xlabel("step")
    if there:
        lower.legend(frameon=False, loc="lower right")
    lower.grid(alpha=0.3)
    picture = BytesIO()
    figure.savefig(picture, format="png")
    write_bytes(picture.getvalue(), path)


def plot_nearest(captions: Sequence[str], found: dict[str, Sequence[Path]], path: Path) -> None:
    """Which picture each text encoder finds for a caption: one row per caption, one column per encoder, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from .data.images import load_picture

    figure = Figure(figsize=(1.5 * len(found) + 4.2, 1.25 * len(captions) + 0.3), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(captions), len(found) + 1, squeeze=False, width_ratios=[2.8, *[1] * len(found)])
    for row, caption in zip(grid, captions, strict=True):
        row[0].text(1, 0.5, caption, ha="right", va="center", wrap=True, transform=row[0].transAxes)
        row[0].axis("off")
    for column, (name, paths) in enumerate(found.items(), start=1):
        grid[0][column].set_title(name)
        for row, picture in zip(grid, paths, strict=True):
            row[column].imshow(load_picture(picture))
            row[column].axis("off")
    picture = BytesIO()
    figure.savefig(picture, format="png")
    write_bytes(picture.getvalue(), path)
