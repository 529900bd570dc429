"""Findings about pictures, from what a survey has seen of them."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator

import numpy as np

from ..data.perceptual import alike, near_groups
from ..data.survey import Survey
from ..events import Event
from .findings import Case, Finding, Limits, found


def picture_findings(
    survey: Survey, limits: Limits, broken: Iterable[tuple[str, str]] = ()
) -> Generator[Event, None, tuple[Finding, ...]]:
    """All that pictures alone tell. broken: (path, reason) of others that are known not to decode.

    Yields progress events while looks are compared.
    """
    copies, firsts = _copies(survey)
    near = yield from _near(survey, limits, firsts)
    return (
        found("unreadable", [Case(name, fault) for name, fault in (*broken, *survey.faults.items())]),
        found("small", _small(survey, limits.size)),
        found("aspect", _aspect(survey, limits.aspect)),
        found("blank", _blank(survey, limits.contrast)),
        found("duplicates", copies),
        found("near_duplicates", near),
    )


def _small(survey: Survey, size: int) -> Iterator[Case]:
    short = np.minimum(survey.widths, survey.heights)
    for i in np.flatnonzero(survey.readable & (short < size)).tolist():
        yield Case(survey.names[i], f"{survey.widths[i]} × {survey.heights[i]} pixels; {size} are needed")


def _aspect(survey: Survey, limit: float) -> Iterator[Case]:
    short, long = np.minimum(survey.widths, survey.heights), np.maximum(survey.widths, survey.heights)
    for i in np.flatnonzero(survey.readable & (long > limit * short)).tolist():
        seen = f"the middle {100 * short[i] / long[i]:.0f} % are seen"
        yield Case(survey.names[i], f"{survey.widths[i]} × {survey.heights[i]} pixels; {seen}")


def _blank(survey: Survey, contrast: int) -> Iterator[Case]:
    for i in np.flatnonzero(_is_blank(survey, contrast)).tolist():
        yield Case(survey.names[i], f"brightness differs by {survey.looks.contrasts[i]} of 255 levels")


def _is_blank(survey: Survey, contrast: int) -> np.ndarray:
    parts = survey.looks.colours.astype(np.int16).reshape(len(survey), 2, -1)
    flat = np.ptp(parts, axis=2).max(axis=1) <= contrast
    return survey.readable & (survey.looks.contrasts <= contrast) & flat


def _copies(survey: Survey) -> tuple[list[Case], np.ndarray]:
    """Copies to the byte, and the positions of the readable pictures that are none: the first of each content."""
    places = np.flatnonzero(survey.readable)
    if not len(places):
        return [], places
    rows = np.ascontiguousarray(survey.keys[places]).view("V32").reshape(-1)
    _, first, group = np.unique(rows, return_index=True, return_inverse=True)
    kept = places[first[group]]
    cases = [
        Case(survey.names[i], f"the same file as {survey.names[k]}", copy_of=survey.names[k])
        for i, k in zip(places.tolist(), kept.tolist(), strict=True)
        if i != k
    ]
    return cases, places[kept == places]


def _near(survey: Survey, limits: Limits, places: np.ndarray) -> Generator[Event, None, list[Case]]:
    """Of pictures that look the same the largest is kept, and of equally large ones the first."""
    places = places[~_is_blank(survey, limits.contrast)[places]]  # what shows nothing looks like anything
    groups = yield from near_groups(
        survey.looks.hashes[places], limits.near, lambda i, j: alike(survey.looks, places[i], places[j])
    )
    area = survey.widths[places].astype(np.int64) * survey.heights[places]
    order = np.lexsort((np.arange(len(places)), -area, groups))
    cases, kept = [], -1
    for here in order.tolist():
        if kept < 0 or groups[here] != groups[kept]:
            kept = here
            continue
        mine, theirs = (f"{survey.widths[places[at]]} × {survey.heights[places[at]]}" for at in (here, kept))
        name, like = survey.names[places[here]], survey.names[places[kept]]
        cases.append(Case(name, f"looks like {like} ({mine} and {theirs} pixels)", copy_of=like))
    return cases
