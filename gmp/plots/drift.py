"""How far weights have moved, by block and part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .figure import HEAT, WIDTH, colour, legend, new_figure, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..compare import WeightDrift

# Of a block, from top to bottom of a heat map, and outside of blocks
ROLES = {
    "layer_norm": "LayerNorms",
    "attention.in": "attention in",
    "attention.out": "attention out",
    "mlp.in": "MLP in",
    "mlp.out": "MLP out",
}
OUTSIDE = {
    "embedding.token": "token\nembedding",
    "embedding.position": "position\nembedding",
    "layer_norm": "final\nLayerNorm",
    "projection": "projection",
}
# What is drawn, its name, and the factor that turns it into the unit in that name
KINDS = {
    "angle": ("θ: mean angle\nin degrees", 1.0),
    "r": ("r: mean\nchange in %", 100.0),
    "change": ("weights:\nchange in %", 100.0),
}
NUMBERS = 6  # blocks at the most for which a heat map's cells say their number
Drifts = Mapping[str, Sequence["WeightDrift"]]


def plot_drift_map(drifts: Drifts, kinds: Sequence[str] = ("angle", "r")) -> Figure:
    """Heat maps of block and part: a row per encoder, a column per kind of change, one colour scale to a column.

    drifts: `weight_drift` of encoders against the same original, by name. Parts outside of blocks stand below as bars.
    """
    blocks = 1 + max((one.block for rows in drifts.values() for one in rows if one.block is not None), default=0)
    heights = [1.55 * len(drifts) + 0.9, 2.4]
    figure = new_figure(WIDTH, sum(heights))
    upper, lower = figure.subfigures(2, 1, height_ratios=heights)
    grid = upper.subplots(len(drifts), len(kinds), squeeze=False, sharey=True, sharex=True)
    for column, kind in zip(grid.T, kinds, strict=True):
        tables = [_table(rows, blocks, kind) for rows in drifts.values()]
        top = max(np.nanmax(table, initial=0) for table in tables) or 1
        for axes, table in zip(column, tables, strict=True):
            image = axes.imshow(table, cmap=HEAT, vmin=0, vmax=top, aspect="auto", interpolation="nearest")
            axes.set_yticks(range(len(ROLES)), list(ROLES.values()), fontsize=9)
            axes.set_xticks(range(0, blocks, max(1, blocks // 6)))
            if blocks <= NUMBERS:
                _numbers(axes, table, top)
        column[-1].set_xlabel("block")
        upper.colorbar(
            image, ax=list(column), location="bottom", aspect=40, shrink=0.9, label=KINDS[kind][0].replace("\n", " ")
        )
    for axes, name in zip(grid[:, 0], drifts, strict=True):
        axes.set_title(short(name, 60), fontsize=11, loc="left")
    bars = _outside(lower.subplots(), drifts)
    if len(drifts) > 1:
        legend(figure, bars, list(map(short, drifts)))
    return figure


def _table(rows: Sequence[WeightDrift], blocks: int, kind: str) -> np.ndarray:
    """(roles, blocks), NaN where a file has no such part or the change is not finite"""
    table = np.full((len(ROLES), blocks), np.nan)
    places = {role: place for place, role in enumerate(ROLES)}
    for one in rows:
        if one.block is not None and one.role in places:
            table[places[one.role], one.block] = getattr(one, kind) * KINDS[kind][1]
    table[~np.isfinite(table)] = np.nan
    return table


def _numbers(axes: Axes, table: np.ndarray, top: float) -> None:
    for (row, column), value in np.ndenumerate(table):
        if np.isfinite(value):
            tone = "black" if value > 0.6 * top else "white"
            axes.text(column, row, f"{value:.2g}", ha="center", va="center", color=tone, fontsize=8)


def _outside(axes: Axes, drifts: Drifts) -> list[object]:
    """Bars of what lies outside of blocks, one group per encoder: mean angle of rows."""
    known = {one.role for rows in drifts.values() for one in rows if one.block is None}
    there = [role for role in OUTSIDE if role in known]
    width, groups = 0.8 / max(1, len(drifts)), []
    for place, rows in enumerate(drifts.values()):
        values = {one.role: one.angle for one in rows if one.block is None}
        at = np.arange(len(there)) - 0.4 + width * (place + 0.5)
        groups.append(axes.bar(at, [values.get(role, np.nan) for role in there], width, color=colour(place + 1)))
    axes.set_xticks(range(len(there)), [OUTSIDE[role] for role in there])
    axes.set_ylabel(KINDS["angle"][0])
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    return groups


def plot_drift_lines(drifts: Drifts, kinds: Sequence[str] = ("angle", "r")) -> Figure:
    """The same over blocks: attention left, MLP right; a colour per encoder, solid for what goes in, dashed for out."""
    figure = new_figure(WIDTH, 2.4 * len(kinds) + 0.9)
    grid = figure.subplots(len(kinds), 2, squeeze=False, sharex=True, sharey="row")
    for number, (row, kind) in enumerate(zip(grid, kinds, strict=True)):
        for axes, part in zip(row, ("attention", "mlp"), strict=True):
            for place, rows in enumerate(drifts.values()):
                for way, style in (("in", "-"), ("out", "--")):
                    line = [one for one in rows if one.block is not None and one.role == f"{part}.{way}"]
                    values = [getattr(one, kind) * KINDS[kind][1] for one in line]
                    look = {"color": colour(place + 1), "linestyle": style, "marker": "o", "markersize": 3}
                    axes.plot([one.block for one in line], values, **look)
            axes.grid(alpha=0.3)
            axes.xaxis.get_major_locator().set_params(integer=True)
            if number == 0:
                axes.set_title("attention" if part == "attention" else "MLP", fontsize=11)
            if number == len(kinds) - 1:
                axes.set_xlabel("block")
        row[0].set_ylabel(KINDS[kind][0])
        row[0].set_ylim(bottom=0)
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour(place + 1)) for place in range(len(drifts))]
    handles += [Line2D([], [], color="black", linestyle=style) for style in ("-", "--")]
    legend(figure, handles, [*map(short, drifts), "in", "out"], columns=4)
    return figure
