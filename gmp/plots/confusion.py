"""Which classes are taken for which: the confusion matrix of a zero-shot classification."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .figure import HEAT, new_figure, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..zero_shot import ZeroShot

SHOWN = 20  # classes
_NAME = 20  # characters of a class name
_CELL = 0.32  # inches
_SIZE = 10  # of letters, points
_OTHERS = "(others)"


def plot_confusion(result: ZeroShot) -> Figure:
    """Rows are classes, columns what their pictures are told as, cells the percentage of the row.

    Of more than 20 classes those of the most frequent confusions are shown; what their pictures are told as beside
    these is the last column. Cells without a picture are empty; classes without one have an empty row.
    """
    from matplotlib.colors import PowerNorm

    shown = most_confused(result)
    rest = len(shown) < result.classes
    shares = _shares(result, shown)
    names = [short(name, _NAME) for name in shown]
    columns = [*names, _OTHERS] if rest else names
    side = _CELL * max(len(columns), 7)
    figure = new_figure(side + 1.9, side + 2.2)
    axes = figure.subplots()
    # By the square root, since one picture in twenty that goes astray is what one looks for
    axes.imshow(shares, cmap=HEAT, norm=PowerNorm(0.5, 0, 100), aspect="equal")
    if rest:
        axes.axvline(len(shown) - 0.5, color="white", linewidth=2)
    for row, line in enumerate(shares):
        for column, value in enumerate(line):
            if value > 0:
                text = f"{value:.0f}" if value >= 0.5 else "<1"
                dark = value < 25  # cividis is dark below the middle, which is a quarter by the square root
                axes.text(column, row, text, ha="center", va="center", size=_SIZE, color="white" if dark else "black")
    axes.set_xticks(
        range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor", size=_SIZE, parse_math=False
    )
    axes.set_yticks(range(len(names)), names, size=_SIZE, parse_math=False)
    axes.set_xlabel("told as")
    axes.set_ylabel("is")
    part = f"; the {len(shown)} most confused" if rest else ""
    axes.set_title(
        f"{100 * result.top_1.value:.1f} % of {result.pictures} pictures right\n"
        f"{result.classes} classes{part}; % of each row",
        size=11,
    )
    return figure


def plot_no_classes() -> Figure:
    """A small figure that says in words that there is nothing to draw."""
    figure = new_figure(3.2, 1.4)
    figure.text(0.5, 0.5, "No confusion matrix:\nno classes were given", ha="center", va="center", size=_SIZE)
    return figure


def most_confused(result: ZeroShot, most: int = SHOWN) -> list[str]:
    """Names of at most `most` classes, in their own order: all, or those of the most frequent confusions."""
    order = [one.name for one in result.per_class]
    if len(order) <= most:
        return order
    chosen: dict[str, None] = {}
    for confusion in result.confusions:
        pair = dict.fromkeys((confusion.true, confusion.told))
        if len(chosen | pair) <= most:
            chosen |= pair
    chosen = chosen or dict.fromkeys(order[:most])
    return [name for name in order if name in chosen]


def _shares(result: ZeroShot, shown: list[str]) -> list[list[float]]:
    """Percentages of each shown class's pictures: (shown, shown), and a last column for the rest where there is one."""
    place = {name: i for i, name in enumerate(shown)}
    width = len(shown) + (len(shown) < result.classes)
    counts = [[0] * width for _ in shown]
    sizes = {one.name: one.pictures for one in result.per_class}
    for name, i in place.items():
        counts[i][i] = sizes[name]
    for confusion in result.confusions:
        if (i := place.get(confusion.true)) is not None:
            counts[i][i] -= confusion.pictures
            counts[i][place.get(confusion.told, width - 1)] += confusion.pictures
    return [
        [100 * count / sizes[name] if sizes[name] else 0.0 for count in line]
        for name, line in zip(shown, counts, strict=True)
    ]
