"""Gradients and movement by layer, from a run's history."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .figure import COLOURS, GREY, HEAT, MARKERS, WIDTH, new_figure, panels, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TALLEST = 8.5  # inches of a heat map
NAME = 0.125  # inches that a row's name needs; where rows are lower, blocks are named
ROLES = {"r": "r", "theta": "θ", "attention": "attention", "mlp": "MLP", "layer_norm": "LayerNorms"}
OUTSIDE = {"layer_norm": "final LayerNorm", "logit_scale": "temperature"}
_IN_BLOCK = re.compile(r"(text|vision)\.(\d+)\.(\w+)")
History = Mapping[str, object]


def plot_gradients(history: History) -> Figure:
    """Gradient norms: layers from bottom to top as a text goes through them, steps from left to right, log colours.

    A bucket's colour is its highest norm; what has none, or is not finite, stays grey.
    """
    from matplotlib.colors import LogNorm

    layers = history["layers"]
    order = sorted(range(len(layers["names"])), key=lambda row: _place(layers["names"][row]))
    names = [layers["names"][row] for row in order]
    table = np.array([[np.nan if v is None else v for v in layers["grad_norm"][row]] for row in order], float)
    table[~(table > 0)] = np.nan
    height = 0.65 + min(TALLEST, max(1.5, 0.16 * len(names)))
    figure = new_figure(WIDTH, height)
    figure.set_layout_engine(None)  # laying out would draw all labels twice
    axes = figure.add_axes((1.35 / WIDTH, 0.55 / height, (WIDTH - 2.35) / WIDTH, 1 - 0.65 / height))
    scale = figure.add_axes((1 - 0.9 / WIDTH, 0.55 / height, 0.14 / WIDTH, 1 - 0.65 / height))
    axes.set_facecolor("#cccccc")
    known = table[np.isfinite(table)]
    low, high = (known.min(), known.max()) if len(known) else (1.0, 1.0)
    norm = LogNorm(low, high if high > low else 10 * low)
    at = layers["at"]
    edges = [0, *at]
    image = axes.pcolormesh(edges, np.arange(len(names) + 1), table, cmap=HEAT, norm=norm, rasterized=True)
    _name_rows(axes, names, (height - 0.65) / len(names))
    axes.set_xlabel("step")
    figure.colorbar(image, cax=scale, label="gradient norm")
    return figure


def _place(name: str) -> tuple[object, ...]:
    """Vision below text; of each tower embedding, blocks, then what comes after them."""
    tower = 0 if name.startswith("vision") else 1 if name.startswith("text") else 2
    if found := _IN_BLOCK.fullmatch(name):
        roles = [*ROLES]
        return tower, 1, int(found[2]), roles.index(found[3]) if found[3] in roles else len(roles), name
    return tower, 0 if "embedding" in name else 2, 0, 0, name


def _name_rows(axes: Axes, names: Sequence[str], height: float) -> None:
    """height: of a row, in inches."""
    both = any(name.startswith("vision.") for name in names) and any(name.startswith("text.") for name in names)
    if height >= NAME:
        axes.set_yticks(np.arange(len(names)) + 0.5, [_label(name, both) for name in names], fontsize=7)
        return
    starts: dict[str, int] = {}
    for row, name in enumerate(names):
        if found := _IN_BLOCK.fullmatch(name):
            starts.setdefault(f"{found[1]} {found[2]}" if both else f"block {found[2]}", row)
    shown: dict[str, int] = {}
    outside = {_label(name, both): row for row, name in enumerate(names) if not _IN_BLOCK.fullmatch(name)}
    for label, row in (starts | outside).items():
        if all(abs(row - other) * height >= NAME for other in shown.values()):
            shown[label] = row
    axes.set_yticks([row + 0.5 for row in shown.values()], list(shown), fontsize=7)


def _label(name: str, both: bool) -> str:
    """`text.3.theta` -> `block 3 θ`"""
    if found := _IN_BLOCK.fullmatch(name):
        tower = f"{found[1]} " if both else "block "
        return f"{tower}{found[2]} {ROLES.get(found[3], found[3])}"
    tower, _, rest = name.rpartition(".")
    return words(" ".join(filter(None, (tower if both else "", OUTSIDE.get(rest, rest)))))


def plot_moved(history: History) -> Figure:
    """How far r, θ and the rest of every block have moved since the start, by the newest measurement that tells.

    A panel per trained tower; what lies outside of blocks stands to the right. On a log scale: r and θ move by
    different orders of magnitude.
    """
    moved = next(one["moved"] for one in reversed(history["measures"]) if one.get("moved"))
    towers = [tower for tower in ("text", "vision") if any(name.startswith(f"{tower}.") for name in moved)]
    figure = new_figure(WIDTH, 3.2 * max(1, len(towers)))
    figure.set_layout_engine(None)
    inch = 1 / figure.get_size_inches()[1]
    figure.subplots_adjust(left=0.1, right=0.98, bottom=0.85 * inch, top=1 - 0.35 * inch, hspace=0.6)
    for axes, tower in zip(panels(figure, len(towers), across=1), towers, strict=True):
        _moved(axes, {n: v for n, v in moved.items() if n.startswith(f"{tower}.") and v is not None and v > 0})
        axes.set_ylabel("moved, in %" if len(towers) == 1 else f"{tower}: moved, in %")
    return figure


def _moved(axes: Axes, moved: Mapping[str, float]) -> None:
    lines: dict[str, dict[int, float]] = {}
    outside: dict[str, float] = {}
    for name, value in moved.items():
        if found := _IN_BLOCK.fullmatch(name):
            lines.setdefault(found[3], {})[int(found[2])] = 100 * value
        else:
            outside[name.partition(".")[2]] = 100 * value
    for place, (role, line) in enumerate(sorted(lines.items(), key=lambda one: _role(one[0]))):
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        blocks = sorted(line)
        values = [line[block] for block in blocks]
        axes.plot(blocks, values, color=colour, marker=marker, markersize=4, label=ROLES.get(role, words(role)))
    end = 1 + max((block for line in lines.values() for block in line), default=-1)
    axes.scatter(range(end, end + len(outside)), list(outside.values()), color=GREY, marker="x", zorder=3)
    blocks = range(0, end, max(1, end // 12))
    names = [OUTSIDE.get(name, words(name)) for name in outside]
    axes.set_xticks([*blocks, *range(end, end + len(outside))], [*map(str, blocks), *names], fontsize=8)
    for label in axes.get_xticklabels()[len(blocks) :]:
        label.set(rotation=35, horizontalalignment="right", rotation_mode="anchor")
    axes.set_xlabel("block", loc="left")
    axes.xaxis.set_label_coords(0, -0.14)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if lines:
        axes.legend(frameon=False, fontsize=8, ncols=len(lines), loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _role(role: str) -> int:
    return [*ROLES].index(role) if role in ROLES else len(ROLES)
