"""r and theta of a text encoder's matrices, alone or before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .drift import KINDS, ROLES
from .figure import WIDTH, colour, legend, new_figure, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..compare import Geometry, WeightDrift

MATRICES = ("attention.in", "attention.out", "mlp.in", "mlp.out")
BARS = 60  # in one axes at the most; more are drawn as lines
BINS = (12, 60)  # of r, at least and at most


def plot_distributions(encoders: Mapping[str, Sequence[Geometry]]) -> Figure:
    """Histograms of r and of theta's values, a row per kind of matrix, all blocks together; one line per encoder.

    encoders: `geometry` of each by name, the original first. Both share their bins, so heights compare.
    """
    from ..compare import REACH

    figure = new_figure(WIDTH, 8.2)
    grid = figure.subplots(len(MATRICES), 2)
    for row, role in zip(grid, MATRICES, strict=True):
        radii = {
            name: np.concatenate([np.zeros(0), *(one.r.numpy() for one in found if one.role == role)])
            for name, found in encoders.items()
        }
        low, high = _ends([r for r in radii.values() if len(r)])
        bins = int(np.clip(2 * max((len(r) for r in radii.values()), default=0) ** 0.5, *BINS))
        for place, (name, found) in enumerate(encoders.items()):
            look = {"color": colour(place), "linewidth": 1.4 if place else 2.6, "label": short(name)}
            shares, edges = np.histogram(radii[name].clip(low, high), bins, (low, high))
            row[0].stairs(shares / max(1, len(radii[name])), edges, **look)
            curves = [one.theta.numpy() for one in found if one.role == role]
            if curves:
                edges = np.linspace(-REACH, REACH, len(curves[0]) + 1)
                row[1].stairs(np.mean(curves, axis=0), edges, **look)
        row[0].set_ylabel(f"{ROLES[role]}\nshare of rows")
        row[1].set_ylabel("share of values")
        for axes in row:
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
    grid[-1][0].set_xlabel("r: length of a row")
    grid[-1][1].set_xlabel("θ: value · √columns")
    legend(figure, *grid[0][0].get_legend_handles_labels())
    return figure


def _ends(radii: Sequence[np.ndarray]) -> tuple[float, float]:
    """Where a histogram begins and ends: a few rows far out do not press all others into one bin."""
    if not radii:
        return 0.0, 1.0
    values = np.concatenate(radii)
    low, high = np.quantile(values, (0.001, 0.999))
    return (float(low), float(high)) if high > low else (float(low) - 0.5, float(low) + 0.5)


def plot_layers(encoders: Mapping[str, Sequence[Geometry]], drifts: Mapping[str, Sequence[WeightDrift]]) -> Figure:
    """Mean r of attention and MLP block by block, as bars, or lines where those were many; below, how far theta turned.

    drifts: of encoders against the first one, by the same names; empty where there is one encoder alone.
    """
    rows = 4 if drifts else 2
    figure = new_figure(WIDTH, 1.75 * rows + 0.9)
    grid = figure.subplots(rows, 2, squeeze=False, sharex=True, sharey="row")
    for number, (row, part) in enumerate(zip(grid, ("attention", "mlp") * (rows // 2), strict=True)):
        for axes, way in zip(row, ("in", "out"), strict=True):
            role = f"{part}.{way}"
            for place, name in enumerate(encoders):
                if number < 2:
                    bars = {one.block: float(one.r.mean()) for one in encoders[name] if one.role == role}
                else:
                    bars = {one.block: one.angle for one in drifts.get(name, ()) if one.role == role}
                look = {"color": colour(place), "label": short(name)}
                if len(bars) * len(encoders) > BARS:
                    axes.plot(list(bars), list(bars.values()), marker="o", markersize=2.5, linewidth=1, **look)
                    continue
                width = 0.8 / len(encoders)
                at = np.array(list(bars)) - 0.4 + width * (place + 0.5)
                axes.bar(at, list(bars.values()), width, **look)
            axes.set_title(ROLES[role], fontsize=10)
            axes.grid(axis="y", alpha=0.3)
            axes.xaxis.get_major_locator().set_params(integer=True)
        row[0].set_ylabel("mean r" if number < 2 else KINDS["angle"][0])
    for axes in grid[-1]:
        axes.set_xlabel("block")
    legend(figure, *grid[0][0].get_legend_handles_labels())
    return figure
