"""Which prompts lie near which: cosines of all pairs, and the neighbours that changed."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .figure import COLOURS, GREY, HEAT, WIDTH, new_figure, panels, short, words

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from ..compare import Neighbour

LETTERS = 27  # of a line in the table of neighbours
LINE = 0.17  # inches
GAP = 0.5  # lines between two rows


def plot_similarity(matrices: Mapping[str, Tensor], kinds: Sequence[str], title: str) -> Figure:
    """Cosines of all pairs of prompts, a panel per text encoder, one colour scale; prompts stand by kind.

    matrices: (N, N) by encoder's name, as `similarity` gives them; kinds: of each prompt. Blocks along the diagonal are
    kinds that the encoder keeps together; a panel of one bright colour is an encoder that tells nothing apart.
    """
    order = sorted(range(len(kinds)), key=lambda row: list(dict.fromkeys(kinds)).index(kinds[row]))
    sorted_kinds = [kinds[row] for row in order]
    edges = [row for row in range(1, len(order)) if sorted_kinds[row] != sorted_kinds[row - 1]]
    middles = [(a + b - 1) / 2 for a, b in zip([0, *edges], [*edges, len(order)], strict=True)]
    low = min(float(np.quantile(matrix.numpy(), 0.01)) for matrix in matrices.values())
    across = min(3, len(matrices))
    rows, side = -(-len(matrices) // across), min((WIDTH - 1.0) / across, 4.5)
    figure = new_figure(WIDTH, rows * (side + 0.35) + 0.9)
    axes = panels(figure, len(matrices), sharex=True, sharey=True)
    for one, (name, matrix) in zip(axes, matrices.items(), strict=True):
        image = one.imshow(matrix.numpy()[np.ix_(order, order)], cmap=HEAT, vmin=min(low, 0.99), vmax=1)
        for edge in edges:
            one.axhline(edge - 0.5, color="white", linewidth=0.5)
            one.axvline(edge - 0.5, color="white", linewidth=0.5)
        one.set_title(short(name, 66 // across), fontsize=11)
        one.set_xticks([])
        one.set_yticks(_spread(middles, len(order) * 10 / (72 * side)), [words(sorted_kinds[int(m)]) for m in middles])
        one.tick_params(axis="y", length=0, labelsize=9)
    figure.colorbar(image, ax=axes, location="bottom", label=words(title), shrink=0.6, aspect=40, extend="min")
    return figure


def _spread(places: Sequence[float], apart: float) -> list[float]:
    """Places of labels, moved down where they would overlap, and up again where they would leave the axes."""
    found: list[float] = []
    for place in places:
        found.append(max(place, found[-1] + apart) if found else place)
    for row in range(len(found) - 1, -1, -1):
        end = found[row + 1] - apart if row + 1 < len(found) else max(places)
        found[row] = min(found[row], end)
    return found


def plot_neighbours(changed: Mapping[str, Sequence[Neighbour]], title: str) -> Figure:
    """The prompts whose nearest other prompt changed most: a table for each encoder, below one another.

    changed: `neighbours` by encoder's name. Below a neighbour stands its place among those of the other tower.
    """
    tables = {name: [_cells(row) for row in rows] for name, rows in changed.items()}
    heights = {name: [max(len(text) for text, _ in row) for row in rows] for name, rows in tables.items()}
    lines = sum(3.2 + sum(rows) + GAP * len(rows) + (not rows) for rows in heights.values())
    figure = new_figure(WIDTH, LINE * (lines + 2))
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(lines, 0)
    axes.set_title(words(title), fontsize=11, loc="left")
    at = 0.6
    for name, rows in tables.items():
        axes.text(0, at, short(name, 60), va="center", fontweight="bold", fontsize=10)
        for column, text in enumerate(("prompt", "nearest in the original", "nearest here")):
            axes.text(column / 3, at + 1.2, text, va="center", color=GREY, fontsize=9.5)
        at += 2.0
        axes.axhline(at, color=GREY, linewidth=0.8)
        if not rows:
            axes.text(0, at + 0.8, "no prompt has another neighbour", va="center", fontsize=9.5)
            at += 1.0
        for row, height in zip(rows, heights[name], strict=True):
            for column, ((text, tone), below) in enumerate(zip(row, (None, *row[1:]), strict=True)):
                for line, part in enumerate(text):
                    last = below is not None and line == len(text) - 1
                    look = {"color": GREY, "fontsize": 8.5} if last else {"color": tone, "fontsize": 9.5}
                    axes.text(column / 3, at + 0.7 + line, words(part), va="center", **look)
            at += height + GAP
            axes.axhline(at, color=GREY, linewidth=0.3)
        at += 1.2
    return figure


def _cells(row: Neighbour) -> list[tuple[list[str], str]]:
    """Lines and colour of a row's three cells; the last line of the second and third says the neighbour's place."""
    before = [*_wrapped(row.before, 2), f"now its {_place(row.rank_of_before)}"]
    after = [*_wrapped(row.after, 2), f"was its {_place(row.rank_of_after)}"]
    return [(_wrapped(row.prompt, 3), "black"), (before, COLOURS[0]), (after, COLOURS[1])]


def _wrapped(text: str, lines: int) -> list[str]:
    return textwrap.wrap(text, LETTERS, max_lines=lines, placeholder=" …") or [""]


def _place(rank: int) -> str:
    """1 -> 1st, 12 -> 12th"""
    ending = "th" if 10 <= rank % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(rank % 10, "th")
    return f"{rank}{ending}"
