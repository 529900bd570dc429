"""A diagnosis as one picture: parts by measures, each cell in the colour of its verdict."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from textwrap import wrap
from typing import TYPE_CHECKING

from .. import verdict as limits
from ..diagnosis import Diagnosis, Part, readers
from .figure import WIDTH, new_figure, short, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of the verdicts; told apart by lightness too, and by readers with colour-vision deficiency.
STATES = {"untouched": "#E9E9E9", "moved": "#8EC5E8", "damaged": "#D55E00", "": "#FFFFFF"}
INK = {"untouched": "#404040", "moved": "#000000", "damaged": "#000000", "": "#404040"}
SAME = 0.001  # of 1, in which agreement is drawn as untouched, and 10 times that in an error: what rounding leaves
ROW = 0.3  # inches
LINE = 0.2


@dataclass(frozen=True)
class _Column:
    """A measure: its words, its number as text, and which verdict that number alone stands for."""

    title: str
    width: float
    text: Callable[[Part], str]
    state: Callable[[Part], str]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _weights(value: float | None, part: Part, limit: float) -> str:
    if value is None or not part.moved:
        return "untouched" if value is not None else ""
    return "damaged" if value > limit and part.name != "embeddings" else "moved"


def _order(value: float | None) -> str:
    if value is None:
        return "damaged"
    return "untouched" if value > 1 - SAME else "damaged" if value < limits.ORDER_LOST else "moved"


def _error(value: float | None) -> str:
    if value is None:
        return "damaged"
    return "untouched" if value < 10 * SAME else "damaged" if value > limits.FAR else "moved"


def _structure(part: Part, name: str) -> float | None:
    return getattr(part.structure, name) if part.structure else None


def _collapse(part: Part) -> str:
    if part.structure is None or limits.has_collapsed(part.structure, part.original):
        return "damaged"
    return "moved" if part.structure.told_apart < part.original.told_apart else "untouched"


COLUMNS = (
    _Column("verdict", 1.35, lambda p: p.state, lambda p: p.state),
    _Column("weights\nchanged", 1, lambda p: _number(p.change, ".1%"), lambda p: _weights(p.change, p, math.inf)),
    _Column("rows\nturned", 1, lambda p: _number(p.angle, ".1f") + "°" * (p.angle is not None),
            lambda p: _weights(p.angle, p, limits.DAMAGED_ANGLE)),
    _Column("rows'\nlengths", 1, lambda p: _number(p.r, ".1%"), lambda p: _weights(p.r, p, limits.DAMAGED_LENGTH)),
    _Column("error of\nstates", 1, lambda p: _number(p.error, ".2f"), lambda p: _error(p.error)),
    _Column("CKA", 1, lambda p: _number(_structure(p, "cka"), ".2f"), lambda p: _order(_structure(p, "cka"))),
    _Column("rank\norder", 1, lambda p: _number(_structure(p, "rank_correlation"), ".2f"),
            lambda p: _order(_structure(p, "rank_correlation"))),
    _Column("told\napart", 1, lambda p: _number(_structure(p, "told_apart"), ".0%"),
            _collapse),
)  # fmt: skip


def plot_diagnosis(found: Diagnosis) -> Figure:
    """Rows: the parts in the order of computation, with the read points behind them; columns: measures.

    Weights turn the colour of damage by themselves, states by how far they lie from the original's: an untouched part
    behind a damaged one shows what it is handed.
    """
    text = wrap(words(found.verdict.text), 96)
    parts = found.parts
    height = ROW * (len(parts) + 2.4) + LINE * len(text) + 0.5
    figure = new_figure(WIDTH, height)
    figure.suptitle("\n".join(text), fontsize=10, x=0.01, ha="left")
    axes = figure.subplots()
    edges = list(accumulate((column.width for column in COLUMNS), initial=0.0))
    axes.set_xlim(0, edges[-1])
    axes.set_ylim(len(parts), 0)
    for at, part in enumerate(parts):
        for left, column in zip(edges, COLUMNS, strict=False):
            _cell(axes, left, at, column.width, column.text(part), column.state(part))
    axes.set_yticks([at + 0.5 for at in range(len(parts))], [_label(found, part) for part in parts], fontsize=9.5)
    axes.set_xticks(
        [left + c.width / 2 for left, c in zip(edges, COLUMNS, strict=False)], [c.title for c in COLUMNS], fontsize=9
    )
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xlabel(f"{short(found.encoder.source.path)} against {short(found.original.source.path)}", fontsize=9.5)
    return figure


def _cell(axes: Axes, x: float, y: int, width: float, text: str, state: str) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y), width, 1, facecolor=STATES[state], edgecolor="white", linewidth=1.5))
    axes.text(x + width / 2, y + 0.5, text, ha="center", va="center", fontsize=9.5, color=INK[state])


def _label(found: Diagnosis, part: Part) -> str:
    """The part, and what is read behind it."""
    blocks = [each.name for each in found.parts if each.name.startswith("block")]
    points = {blocks[-2] if len(blocks) > 1 else "embeddings": ("penultimate",), "projection": ("projected",)}
    points["final LayerNorm"] = ("last", "pooled")
    here = [point for point in points.get(part.name, ()) if point in found.readings]
    models = [f"{' and '.join(readers(found, point))}" for point in here if readers(found, point)]
    return f"{part.name} → {', '.join(models)}" if models else part.name
