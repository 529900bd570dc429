"""One self-contained HTML page about a data set: no scripts and no links, pictures are in the page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from .. import __version__
from ..data.language import NAMES
from ..files import write_bytes
from ..plots.figure import COLOURS, GREY, WIDTH, new_figure, png
from ..report.markup import figure, listed, paragraph, percent, picture, rows, text
from ..report.style import STYLE
from .findings import Case, Finding
from .report import EXAMPLES, Report, counts, histogram, not_found, remarks, summary
from .sheet import contact_sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIMITS = {
    "size": "a picture is small if its shorter side has fewer pixels than",
    "aspect": "a picture is long if its sides differ by more than a factor of",
    "near": "near duplicates differ in at most so many of 64 bits",
    "contrast": "a picture shows nothing if its brightness differs by at most so many of 255 levels",
    "context": "a caption is too long if it has more tokens than",
}


def write_page(report: Report, path: Path) -> None:
    """Writes the page, atomically."""
    write_bytes(page(report).encode("utf-8", "backslashreplace"), path)


def page(report: Report, sheet: Image.Image | None = None) -> str:
    """The page as text. sheet: None draws `contact_sheet`. Of the folder only the name is shown."""
    title = f"Data set {text(report.index.root.name)}"
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{title}</title><style>{STYLE}</style></head>'
    )
    header = f'<header><h1>{title}</h1><div class="verdict">{paragraph(summary(report))}</div></header>'
    sections = (
        ("What is there", _counts(report)),
        ("What was found", _overview(report)),
        ("Contact sheet", _sheet(contact_sheet(report) if sheet is None else sheet)),
        ("Findings", "".join(_finding(finding) for finding in report.findings if len(finding))),
        ("Length of captions", _lengths(report)),
        ("Language of captions", _languages(report)),
        ("Pairs that fit worst", _lowest(report)),
        ("How this was decided", _decided(report)),
    )
    body = "".join(f"<section><h2>{text(name)}</h2>{part}</section>" for name, part in sections if part)
    return f"{head}<body><main>{header}{body}</main></body></html>\n"


def _counts(report: Report) -> str:
    def shown(value: object) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{name} {count:,}" for name, count in value.items()) or "none"
        return f"{value:,}"

    there = {name: value for name, value in counts(report).items() if name != "languages"}
    return rows((name, shown(value)) for name, value in there.items()) + listed([*remarks(report), *report.notes])


def _overview(report: Report) -> str:
    there = [finding for finding in report.findings if len(finding)]
    lines = "".join(
        f'<tr><th scope="row">{text(one.kind.title)}</th><td>{len(one):,}</td><td>{text(one.kind.action)}</td></tr>'
        for one in there
    )
    head = '<thead><tr><th scope="col">found</th><th scope="col">how many</th><th scope="col">to do</th></tr></thead>'
    table = f"<table>{head}<tbody>{lines}</tbody></table>" if lines else ""
    clear = not_found(report)
    return table + (paragraph(clear, "soft") if clear else "")


def _finding(finding: Finding) -> str:
    parts = [f"<h3>{text(finding.kind.title)}: {len(finding):,}</h3>", paragraph(finding.kind.meaning)]
    parts.append(_cases(finding.cases[:EXAMPLES]))
    if len(finding.cases) > EXAMPLES:
        parts.append(paragraph(f"{len(finding.cases) - EXAMPLES:,} more are in the list of fixes (--fix).", "soft"))
    return "".join(parts)


def _cases(cases: Sequence[Case]) -> str:
    return rows((case.picture, case.detail + (f"\n“{case.caption}”" if case.caption else "")) for case in cases)


def _sheet(sheet: Image.Image) -> str:
    content = io.BytesIO()
    sheet.save(content, format="JPEG", quality=85)
    words = "A sample of the data set, and pictures of every finding; what lies outside of a square crop is shown too."
    return figure(picture(content.getvalue(), words, "jpeg"), words)


def _lengths(report: Report) -> str:
    if not len(report.texts.lengths):
        return ""
    context = report.limits.context
    words = (
        f"Captions by their length in CLIP's tokens. The text tower reads {context}, start and end of text included."
    )
    return figure(picture(png(plot_lengths(report)), words), words)


def plot_lengths(report: Report) -> Figure:
    """Captions by their length in tokens; those that are cut have another colour."""
    edges, heights = histogram(report)
    drawn = new_figure(WIDTH, 2.8)
    axes = drawn.subplots()
    cut = edges[:-1] > report.limits.context - 1
    colours = [COLOURS[1] if one else COLOURS[0] for one in cut]
    axes.bar(edges[:-1], heights, width=np.diff(edges), align="edge", color=colours, edgecolor="white", linewidth=0.4)
    axes.axvline(report.limits.context + 0.5, color=GREY, linewidth=1)
    axes.set_xlabel(f"tokens; the line is what the text tower reads, and {edges[-1]} are {edges[-1]} or more")
    axes.set_ylabel("captions")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return drawn


def _languages(report: Report) -> str:
    told = rows((NAMES[code], f"{count:,}") for code, count in report.texts.counts.items())
    if np.isnan(report.texts.foreign):
        return told
    words = f"{percent(report.texts.foreign)} of the captions whose language can be told do not look English. "
    return paragraph(words + "It is guessed from letters and common words; short captions are unknown.") + told


def _lowest(report: Report) -> str:
    if not report.lowest:
        return ""
    words = "By how many other pictures and captions fit better, as the original CLIP sees it. They need not be wrong."
    return paragraph(words) + _cases(report.lowest)


def _decided(report: Report) -> str:
    limits = rows((LIMITS[name], f"{value:g}") for name, value in asdict(report.limits).items())
    return limits + paragraph(f"gmp {__version__}. What each finding means is told in docs/dataset_report.md.", "soft")
