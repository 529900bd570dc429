"""Tables: CSV and TSV with a caption a row, as open_clip reads them, and CLIP-Interrogator's desc.csv.

The separator is the one that fits (comma, tab, semicolon, bar). The columns are asked for, or taken by their names.
A picture may have several rows. A first row that names a picture is no header: the path is in the first column then,
the caption in the second.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from ...errors import InputError
from ..captions import Picture, _some
from .columns import choose_columns, note
from .folder import is_picture
from .found import Listing
from .opened import Opened

OPEN_CLIP = ("filepath", "title")
INTERROGATOR = ("image", "prompt")
HUGGING_FACE = ("file_name", "text")
_NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}


def looks(opened: Opened) -> bool:
    return opened.form == "table" and bool(opened.content.rows) and len(opened.content.rows[0][1]) > 1


def looks_interrogator(opened: Opened) -> bool:
    return looks(opened) and tuple(cell.strip().lower() for cell in opened.content.rows[0][1]) == INTERROGATOR


def read(opened: Opened, columns: Sequence[str] | None, problems: list[str]) -> Listing:
    if not looks(opened):
        problems.append(f"{opened.place} has one column; expected a table with a row for each caption.")
        return Listing(())
    table = opened.content
    (_, first), *rest = table.rows
    headed = not (columns is None and any(is_picture(cell.strip()) for cell in first))
    names = first if headed else tuple(str(n) for n in range(1, len(first) + 1))
    rows = rest if headed else table.rows
    try:
        picture, captions = choose_columns(names, columns) if headed else (0, (1,))
    except InputError as error:
        problems.append(f"{opened.place}: {error}.")
        return Listing(())
    uneven = [f"line {line}" for line, cells in rows if len(cells) != len(first)]
    if uneven:
        problems.append(
            f"In {opened.place}, {len(uneven)} of {len(rows)} rows have not {len(first)} columns as the first row"
            f"{_some(uneven)}. Captions with {_NAMES[table.separator]} in them need quotation marks round them."
        )
        return Listing(())
    if not rows:
        problems.append(f"{opened.place} has a first row and no other; expected a row for each caption.")
    entries = [(cells[picture], [cells[n] for n in captions]) for _, cells in rows]
    said = (
        note(names, picture, captions)
        if headed
        else "columns: no names in the first row; pictures from 1, captions from 2"
    )
    return Listing(entries, (f"{said}; separated by {_NAMES[table.separator]}",))


def write(pictures: Sequence[Picture], header: tuple[str, str], separator: str = ",") -> str:
    """The text of the table, a row for each caption."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=separator)  # lines end as in RFC 4180: then \r within a cell is quoted, too
    writer.writerow(header)
    writer.writerows((picture.path, caption) for picture in pictures for caption in picture.captions)
    return text.getvalue()
