"""Embeddings as points on one plane, the same for every encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .figure import COLOURS, GREY, MARKERS, WIDTH, legend, new_figure, panels, short, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor


def plot_pairs(
    pictures: Tensor, captions: Mapping[str, Tensor], owners: Sequence[int], labels: tuple[str, str]
) -> Figure:
    """Pictures and captions, a panel per text encoder, with a line from each caption to its picture.

    pictures (N, 2) stand where they are in every panel: the vision tower is the same. captions: (M, 2) by encoder's
    name; owners[j] is the picture of caption j. labels: of the two axes. Short lines that run side by side are a CLIP
    that works; captions on one heap are one that has collapsed.
    """
    figure, all_axes = _figure(len(captions), labels)
    size = _size(2 * len(pictures))
    seen = pictures.numpy()
    for axes, (name, points) in zip(all_axes, captions.items(), strict=True):
        points = points.numpy()
        _lines(axes, points, seen[np.asarray(owners)], alpha=0.8)
        handles = [
            axes.scatter(*seen.T, s=size, color=COLOURS[1], marker="s", linewidths=0, zorder=3),
            axes.scatter(*points.T, s=size, color=COLOURS[0], marker="o", linewidths=0, zorder=3),
        ]
        axes.set_title(short(name, 72 // min(3, len(captions))), fontsize=11)
    legend(figure, handles, ["pictures", "captions"])
    return figure


def plot_prompts(prompts: Mapping[str, Tensor], kinds: Sequence[str], labels: tuple[str, str]) -> Figure:
    """Prompts by kind, a panel per text encoder, with a line from where the first one, the original, has each.

    prompts: (N, 2) by encoder's name; kinds: of each prompt.
    """
    figure, all_axes = _figure(len(prompts), labels)
    start = next(iter(prompts.values())).numpy()
    names, size = list(dict.fromkeys(kinds)), _size(len(kinds))
    for axes, (name, points) in zip(all_axes, prompts.items(), strict=True):
        points = points.numpy()
        if axes is not all_axes[0]:
            _lines(axes, points, start)
        handles = []
        for place, kind in enumerate(names):
            rows = [row for row, other in enumerate(kinds) if other == kind]
            look = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}
            if place >= len(COLOURS):  # as many again, hollow
                look = {"facecolors": "none", "edgecolors": look["color"], "marker": look["marker"], "linewidths": 1}
            handles.append(axes.scatter(*points[rows].T, s=size, zorder=3, **look))
        axes.set_title(short(name, 72 // min(3, len(prompts))), fontsize=11)
    legend(figure, handles, list(map(words, names)), columns=4)
    return figure


def _figure(count: int, labels: tuple[str, str]) -> tuple[Figure, list[Axes]]:
    across = min(count, 3)
    rows = -(-count // across)
    figure = new_figure(WIDTH, rows * min(WIDTH / across, 4.0) * 1.05 + 1.0)
    axes = panels(figure, count, sharex=True, sharey=True)
    for one in axes:
        one.grid(alpha=0.3)
        one.tick_params(labelbottom=False, labelleft=False, length=0)
    for place, one in enumerate(axes):
        if place % across == 0:
            one.set_ylabel(labels[1])
        if place + across >= count:
            one.set_xlabel(labels[0])
    return figure, axes


def _size(points: int) -> float:
    """Of a marker, in square points, so that many still leave something of each other."""
    return min(30.0, max(5.0, 3000 / max(1, points)))


def _lines(axes: Axes, points: np.ndarray, ends: np.ndarray, alpha: float = 0.45) -> None:
    from matplotlib.collections import LineCollection

    lines = np.stack([points, ends], axis=1)
    axes.add_collection(LineCollection(lines, colors=GREY, linewidths=0.6, alpha=alpha, zorder=2))
