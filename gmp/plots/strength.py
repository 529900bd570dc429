"""A scan of strengths: recall, arrangement of prompts and drift, one above the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from .figure import COLOURS, GREY, WIDTH, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..strength import Curve, Point, Scan

STYLES = ("-", "--", ":", "-.")  # one for each way of blending
_TITLE = {"fontsize": 9.5, "loc": "left"}
TARGETS = {"sdxl": "SDXL", "sd1": "SD1", "flux": "Flux"}


def plot_scan(scan: Scan) -> Figure:
    """Recall with its 95 % interval (left out without pictures), structure and drift at the target's read points."""
    recall = scan.curves[0].points[0].recall is not None
    figure = new_figure(WIDTH, 7.2 if recall else 5.4)
    panels = list(figure.subplots(2 + recall, 1, sharex=True))
    target = TARGETS.get(scan.target, scan.target)
    figure.suptitle(f"broken → repaired, read as {target} does\n{_suggested(scan)}", fontsize="large")
    if recall:
        _recall(panels[0], scan)
    _structure(panels[-2], scan)
    _drift(panels[-1], scan)
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.axvline(1, color=GREY, linewidth=0.8)
        _mark(axes, scan)
    for axes in panels:
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    panels[-1].set_xlabel("strength (0: broken, 1: repaired)")
    return figure


def _recall(axes: Axes, scan: Scan) -> None:
    for curve, style, label in _ways(scan, "recall@1"):
        _line(axes, curve, lambda point: point.recall.value, COLOURS[0], style, label)
        at = [point.strength for point in curve.points]
        low, high = ([getattr(point.recall, end) for point in curve.points] for end in ("low", "high"))
        axes.fill_between(at, low, high, color=COLOURS[0], alpha=0.15, linewidth=0)
    axes.set_ylabel("recall")
    axes.set_ylim(-0.03, 1.03)
    axes.set_title(f"{scan.pictures} pictures, {scan.captions} captions", **_TITLE)


def _structure(axes: Axes, scan: Scan) -> None:
    numbers = {"cka": "CKA", "rank_correlation": "rank correlation", "told_apart": "told apart"}
    for at, name in enumerate(scan.read_points):
        for (field, words), colour in zip(numbers.items(), COLOURS[at * 3 :], strict=False):
            where = "" if len(scan.read_points) == 1 else f"\n{name}"
            for curve, style, label in _ways(scan, words + where):
                _line(axes, curve, lambda p, n=name, f=field: getattr(p.structure[n], f), colour, style, label)
    axes.set_ylabel("structure")
    axes.set_title(f"arrangement of prompts against the original: {', '.join(scan.read_points)}", **_TITLE)


def _drift(axes: Axes, scan: Scan) -> None:
    for at, name in enumerate(scan.read_points):
        where = "" if len(scan.read_points) == 1 else f"\n{name}"
        for end, colour in (("original", COLOURS[(2 * at) % 6]), ("broken", COLOURS[(2 * at + 1) % 6])):
            for curve, style, label in _ways(scan, f"to the {end}{where}"):
                _line(axes, curve, lambda p, n=name, e=end: getattr(p, f"from_{e}")[n].cosine, colour, style, label)
    axes.set_ylabel("cosine")
    axes.set_title(f"nearness of the states: {', '.join(scan.read_points)}", **_TITLE)


def _suggested(scan: Scan) -> str:
    """The suggestions in words; the lines of several ways are told apart by their styles."""
    named = zip(scan.curves, ("solid", "dashed", "dotted", "dash-dotted"), strict=False)
    found = {
        f"{curve.along} ({style})" if len(scan.curves) > 1 else curve.along: curve.suggested.strength
        for curve, style in named
    }
    words = [f"none along {way}" if at is None else f"{at:g} along {way}" for way, at in found.items()]
    return "suggested: " + ", ".join(words)


def _ways(scan: Scan, label: str) -> Iterator[tuple[Curve, str, str | None]]:
    """Each way of blending with its line style; the legend has the first one only, and the title names the styles."""
    for curve, style in zip(scan.curves, STYLES, strict=False):
        yield curve, style, label if curve is scan.curves[0] else None


def _line(
    axes: Axes, curve: Curve, value: Callable[[Point], float], colour: str, style: str, label: str | None
) -> None:
    at = [point.strength for point in curve.points]
    marker = "o" if style == STYLES[0] else None
    values = [value(point) for point in curve.points]
    axes.plot(at, values, color=colour, linestyle=style, marker=marker, markersize=3.5, label=label)


def _mark(axes: Axes, scan: Scan) -> None:
    """The suggested strength of each way of blending."""
    for curve, style in zip(scan.curves, STYLES, strict=False):
        if curve.suggested.strength is not None:
            axes.axvline(curve.suggested.strength, color=COLOURS[6], linestyle=style, linewidth=1.4)
