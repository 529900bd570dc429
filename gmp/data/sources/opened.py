"""What lies at a place, opened just far enough to tell which kind of captions it is, each file read once."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..captions import PICTURE_SUFFIXES

_TAR = re.compile(r"\.(tar|tgz|tar\.(gz|bz2|xz))$", re.IGNORECASE)
_MARKS = (  # UTF-32's first: its mark begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8-sig", "UTF-8"),
    (codecs.BOM_UTF32_LE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF32_BE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF16_LE, "utf-16", "UTF-16"),
    (codecs.BOM_UTF16_BE, "utf-16", "UTF-16"),
)
_BEGINNINGS = (  # what is given by mistake
    (b"PK\3\4", "a zip archive or an Excel workbook; save the sheet as CSV in UTF-8, or unpack the archive"),
    (b"\x89PNG", "a picture; give the folder that it lies in"),
    (b"\xff\xd8\xff", "a picture; give the folder that it lies in"),
    (b"\x1f\x8b", "packed with gzip; unpack it first"),
    (b"SQLite format 3", "a database; export its captions as CSV"),
)


@dataclass(frozen=True)
class Opened:
    """A place and what it holds, by its form.

    folder: nothing in content · json: objects as tuples of (key, value), so that no repeated key gets lost ·
    lines: JSON objects, one a line, as [(line, object)] · table: a `Table` · parquet, tars: nothing yet.
    """

    place: str
    form: str
    content: Any = None

    @property
    def path(self) -> Path:
        return Path(self.place)


@dataclass(frozen=True)
class Table:
    """Rows of cells between separators, as the csv module reads them."""

    separator: str
    rows: tuple[tuple[int, tuple[str, ...]], ...]  # (line, cells) of all that are not empty, the header too


def is_tars(place: str) -> bool:
    """Whether a place names WebDataset tars: by its ending, as they may lie in a store."""
    return bool(_TAR.search(place))


def open_place(place: str, problems: list[str]) -> Opened | None:
    """What lies at a place that exists; None after a problem. JSON and tables are read as a whole, and once."""
    if is_tars(place):
        return Opened(place, "tars")
    path = Path(place)
    if path.is_dir():
        return Opened(place, "folder")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        problems.append(f"There is no caption file {path}.")
        return None
    except OSError as error:
        problems.append(f"The caption file {path} can't be read: {error.strerror}.")
        return None
    return _form(place, content, problems)


def decode(content: bytes) -> str:
    """Text in UTF-8, or in what its byte order mark says.

    Raises ValueError with the failing byte, what the text seems to be, and how to save it.
    """
    encoding, name = next((found[1:] for found in _MARKS if content.startswith(found[0])), ("utf-8", "UTF-8"))
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        if name != "UTF-8":
            raise ValueError(f"it begins as {name} and is damaged at byte {error.start}; save it as UTF-8") from None
        guess = _guess(content)
        looks = f", it looks like {guess}" if guess else ""
        byte = content[error.start]
        raise ValueError(
            f"not UTF-8 text (byte {error.start} is 0x{byte:02x}{looks}); open it in an editor and save it as UTF-8"
        ) from None


def _guess(content: bytes) -> str:
    head = content[:4096]
    if head.count(0) > len(head) // 4:
        return "UTF-16 without a byte order mark"
    try:
        content.decode("cp1252")
    except UnicodeDecodeError:
        return ""
    return "Windows-1252 (cp1252)"


def _form(place: str, content: bytes, problems: list[str]) -> Opened | None:
    path = Path(place)
    if content.startswith(b"PAR1"):
        return Opened(place, "parquet")
    if not content:
        problems.append(f"The caption file {path} is empty (zero bytes). Get it again, or write it anew.")
        return None
    for beginning, what in _BEGINNINGS:
        if content.startswith(beginning):
            problems.append(f"{path} is no caption file but {what}.")
            return None
    if path.suffix.lower() in (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".npz", *PICTURE_SUFFIXES):
        problems.append(f"{path} is no caption file, as its name says. Give a JSON, CSV or metadata file.")
        return None
    if path.suffix.lower() == ".toml":
        problems.append(f"{path} holds settings and no captions. Give the folder or the metadata file that it names.")
        return None
    try:
        text = decode(content)
    except ValueError as error:
        problems.append(f"The caption file {path} can't be read: {error}.")
        return None
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson") or (suffix not in (".csv", ".tsv") and text.lstrip()[:1] in ("{", "[")):
        return _open_json(place, text, problems)
    return _open_json(place, text, problems) if suffix == ".json" else _open_table(place, text, problems)


def _open_json(place: str, text: str, problems: list[str]) -> Opened | None:
    lines = Path(place).suffix.lower() in (".jsonl", ".ndjson")
    try:
        return _json_lines(place, text) if lines else Opened(place, "json", loads(text))
    except json.JSONDecodeError as error:
        if not lines and error.msg == "Extra data":
            try:
                return _json_lines(place, text)
            except json.JSONDecodeError:
                pass
        problems.append(
            f"The caption file {place} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}."
        )
    except RecursionError:
        problems.append(f"The caption file {place} is nested too deeply. {EXPECTED}")
    return None


EXPECTED = 'Expected an object of lists of strings: {"folder/0001.jpg": ["a caption", "another"]}.'


def loads(text: str) -> Any:
    """JSON with objects as tuples of pairs. parse_int: int() raises its own error for very long numbers."""
    return json.loads(text, object_pairs_hook=tuple, parse_int=_number)


def _number(digits: str) -> int | float:
    return int(digits) if len(digits) < 20 else float(digits)


def _json_lines(place: str, text: str) -> Opened:
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                found.append((number, loads(line)))
            except json.JSONDecodeError as error:
                error.lineno = number
                raise
    return Opened(place, "lines", found)


def _open_table(place: str, text: str, problems: list[str]) -> Opened | None:
    separator = sniff(text, Path(place).suffix.lower())
    try:
        rows = tuple(_rows(text, separator))
    except csv.Error as error:
        problems.append(f"The caption file {place} is no table that can be read: {error}.")
        return None
    return Opened(place, "table", Table(separator, rows))


def _rows(text: str, separator: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                yield reader.line_num, tuple(row)
    except csv.Error as error:
        raise csv.Error(f"{error} in line {reader.line_num}; a quotation mark may be missing before it") from None


def sniff(text: str, suffix: str = "") -> str:
    """The separator that gives the first lines the same number of columns, more than one; a tab goes first in .tsv."""
    head = "\n".join(text.split("\n", 21)[:20])
    order = "\t,;|" if suffix == ".tsv" else ",\t;|"

    def score(separator: str) -> tuple[bool, bool, int]:
        try:
            widths = [len(cells) for _, cells in _rows(head, separator)]
        except csv.Error:
            return False, False, 0
        if not widths or widths[0] < 2:
            return False, False, 0
        return True, len(set(widths)) == 1, widths[0] if len(set(widths)) == 1 else 0

    return max(order, key=score)  # the first of equals
