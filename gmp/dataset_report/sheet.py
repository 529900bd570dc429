"""The contact sheet: a sample of the data set, and some pictures of every finding, on one picture."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..data.images import THREADS, load_picture
from ..errors import InputError
from .findings import Case
from .report import Report

TILE = 160  # pixels of a thumbnail's place
ACROSS = 6  # thumbnails in a row
_LINE = 16  # pixels of a line of text
_LINES = 3  # below a thumbnail
_GAP = 8
_HEAD = 40
_INK, _SOFT, _PAPER, _EMPTY = (31, 35, 40), (89, 99, 110), (255, 255, 255), (228, 232, 237)


@dataclass(frozen=True)
class _Tile:
    picture: str  # below the folder
    words: str


@dataclass(frozen=True)
class _Row:
    title: str
    tiles: tuple[_Tile, ...]


def contact_sheet(report: Report, across: int = ACROSS, tile: int = TILE) -> Image.Image:
    """An RGB picture: a row of pictures evenly spread over the data set, and a row for each finding that has pictures.

    A copy stands behind the picture that is kept. Raises InputError for less than two pictures in a row, or thumbnails
    of less than 32 pixels.
    """
    if across < 2 or tile < 32:
        raise InputError(
            f"A contact sheet of {across} pictures of {tile} pixels in a row cannot be drawn; "
            "take at least 2, of 32 pixels or more."
        )
    rows = _rows(report, across)
    thumbnails = _thumbnails(report.index.root, rows, tile)
    high = _HEAD + tile + _LINES * _LINE + 2 * _GAP
    sheet = Image.new("RGB", (across * (tile + _GAP) + _GAP, max(1, len(rows)) * high), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        top = number * high
        pen.text((_GAP, top + _GAP), _fit(row.title, 17, sheet.width - 2 * _GAP), _INK, font=_font(17))
        for column, one in enumerate(row.tiles):
            left = _GAP + column * (tile + _GAP)
            _draw(sheet, pen, thumbnails[one.picture], (left, top + _HEAD), tile, one.words)
    return sheet


def _rows(report: Report, across: int) -> list[_Row]:
    names = [name for name in report.survey.names if name not in report.survey.faults] or list(report.survey.names)
    places = range(len(names)) if len(names) <= across else [i * len(names) // across for i in range(across)]
    captions = {picture.path: picture.captions[0] for picture in report.index.pictures}
    sample = tuple(_Tile(names[i], captions[names[i]]) for i in places)
    rows = [_Row(f"The data set: {len(names):,} pictures, of which these are evenly spread", sample)] if sample else []
    known = set(report.survey.names) | set(report.index.report.uncaptioned)
    for finding in report.findings:
        tiles = _tiles([case for case in finding.cases if case.picture in known], across)
        if tiles:
            rows.append(_Row(f"{finding.kind.title}: {len(finding):,}", tiles))
    if report.lowest and not report["wrong_pairs"].cases:
        rows.append(_Row("Pairs that fit worst, which need not be wrong", _tiles(report.lowest, across)))
    return rows


def _tiles(cases: Sequence[Case], across: int) -> tuple[_Tile, ...]:
    if any(case.copy_of for case in cases):
        pairs = cases[: across // 2]
        return tuple(t for c in pairs for t in (_Tile(c.copy_of, f"kept: {c.copy_of}"), _Tile(c.picture, c.picture)))
    return tuple(_Tile(c.picture, c.caption or f"{c.picture}: {c.detail}") for c in cases[:across])


def _thumbnails(root: Path, rows: Sequence[_Row], tile: int) -> dict[str, Image.Image | None]:
    """By name; None for those that cannot be read."""

    def load(name: str) -> Image.Image | None:
        try:
            image = load_picture(root / name)
        except InputError:
            return None
        image.thumbnail((tile, tile), Image.Resampling.BICUBIC, reducing_gap=2.0)
        return image

    names = list(dict.fromkeys(one.picture for row in rows for one in row.tiles))
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(load, names), strict=True))


def _draw(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, image: Image.Image | None, at: tuple[int, int], tile: int, words: str
) -> None:
    left, top = at
    pen.rectangle((left, top, left + tile - 1, top + tile - 1), fill=_EMPTY)
    if image is None:
        pen.text((left + _GAP, top + tile // 2 - _LINE), _fit("cannot be read", 12, tile), _SOFT, font=_font(12))
    else:
        sheet.paste(image, (left + (tile - image.width) // 2, top + (tile - image.height) // 2))
    pen.rectangle((left, top, left + tile - 1, top + tile - 1), outline=_EMPTY)
    for number, line in enumerate(_wrapped(words, tile)):
        pen.text((left, top + tile + 4 + number * _LINE), line, _SOFT, font=_font(12))


def _wrapped(words: str, width: int) -> list[str]:
    """At most three lines, broken between words where that is possible, the last one cut."""
    left, lines = _printable(words), []
    while left and len(lines) < _LINES - 1:
        count = len(left)
        while count > 1 and _font(12).getlength(left[:count]) > width:
            count -= 1
        if count < len(left) and (space := left.rfind(" ", 1, count + 1)) > 0:
            count = space
        lines.append(left[:count])
        left = left[count:].lstrip()
    return [*lines, _fit(left, 12, width)] if left else lines


def _fit(text: str, size: int, width: int) -> str:
    text = _printable(text)
    if _font(size).getlength(text) <= width:
        return text
    while text and _font(size).getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _printable(text: str) -> str:
    text = " ".join(text.split())[:300].encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(letter if letter.isprintable() else "�" for letter in text)


@lru_cache(maxsize=4)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along: Latin, Greek and Cyrillic letters; others are drawn as boxes."""
    from matplotlib import get_data_path

    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
