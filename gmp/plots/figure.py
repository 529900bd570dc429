"""What all pictures share: size, colours, words, and how a figure becomes bytes, pixels and a file."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from ..files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HEAT = "cividis"  # perceptually uniform, and the same to readers with colour-vision deficiency
DIVERGING = "PuOr"  # orange to purple, for values on both sides of zero
GREY = "#767676"
WIDTH = 7.0  # inches; a page's, and text is still read when a picture is shown 512 pixels wide
DPI = 120
FORMATS = ("png", "svg")
SHORT = 30  # characters of a name in a legend or title


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, without a window, laid out so that no text overlaps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    return _bytes(figure, "png")


def svg(figure: Figure) -> bytes:
    return _bytes(figure, "svg", metadata={"Date": None})


def pixels(figure: Figure) -> np.ndarray:
    """What the figure looks like: (height, width, 3) fp32, 0 to 1"""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(np.float32) / 255


def save(figure: Figure, path: Path) -> None:
    """Writes a picture, atomically, as its ending says: .png or .svg. Raises InputError for any other."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise InputError(f"{path.name} ends in no format of pictures; name it .{' or .'.join(FORMATS)}")
    write_bytes({"png": png, "svg": svg}[kind](figure), path)


def _bytes(figure: Figure, kind: str, **options: object) -> bytes:
    picture = BytesIO()
    figure.savefig(picture, format=kind, **options)
    return picture.getvalue()


def words(text: str) -> str:
    """A text of others as it is: matplotlib takes dollars for formulas, and leaves names with a leading _ out."""
    text = " ".join(text.split()).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def short(name: str, most: int = SHORT) -> str:
    """A long name without its suffix, then with its middle left out: beginnings tell models, endings their versions."""
    if len(name) > most:
        name = name.removesuffix(".safetensors")
    if len(name) > most:
        head = (most - 1) // 2
        name = f"{name[:head]}…{name[len(name) - (most - 1 - head) :]}"
    return words(name)


def colour(place: int) -> str:
    """The colour of the encoder at a place; the original, at 0, is grey. Beyond six others they come again."""
    return GREY if place == 0 else COLOURS[(place - 1) % (len(COLOURS) - 1)]


def panels(figure: Figure, count: int, across: int = 3, **options: object) -> list[Axes]:
    """So many axes in rows of at most `across`; what a last row has too many of is left empty."""
    columns = min(count, across)
    grid = figure.subplots(-(-count // columns), columns, squeeze=False, **options)
    axes = list(grid.flat)
    for empty in axes[count:]:
        empty.remove()
    return axes[:count]


def legend(figure: Figure, handles: Sequence[object], names: Sequence[str], columns: int = 3) -> None:
    """One legend for all axes, below them, in as many columns as its words leave room for."""
    if handles:
        room = int(11 * figure.get_size_inches()[0]) // (7 + max(map(len, names)))
        columns = max(1, min(columns, room, len(handles)))
        figure.legend(handles, list(names), loc="outside lower center", frameon=False, ncols=columns)
