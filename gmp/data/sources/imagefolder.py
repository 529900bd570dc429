"""Hugging Face's imagefolder: pictures with `metadata.jsonl`, `.csv` or `.parquet` in their folder.

Each row has `file_name`, relative to the folder of the metadata file, and a column with a caption or a list of them.
https://huggingface.co/docs/datasets/image_dataset#imagefolder. Every folder may have such a file of its own.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import InputError
from ..captions import Picture, _some
from . import table
from .columns import choose_columns, note
from .folder import Folder
from .found import Listing
from .opened import Opened, open_place

NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def looks(opened: Opened) -> bool:
    if opened.form in ("lines", "parquet"):
        return True
    return opened.form == "table" and opened.path.name == "metadata.csv" and "file_name" in opened.content.rows[0][1]


def files(folder: Folder) -> list[str]:
    """The metadata files in a folder and below."""
    return [f"{place}/{name}".lstrip("/") for place, listed in folder.walk() for name in NAMES if name in listed.files]


def read_folder(folder: Folder, columns: Sequence[str] | None, problems: list[str]) -> Listing:
    """The metadata files of a folder and those below it, as one."""
    entries: list[tuple[str, Sequence[str]]] = []
    notes: dict[str, None] = {}
    for path in files(folder):
        opened = open_place(str(folder.root / path), problems)
        if opened is None:
            continue
        listing = read(opened, columns, problems)
        above = path.rpartition("/")[0]
        for name, captions in listing.entries:
            below = above and folder.relative(name) is not None and not Path(name).is_absolute()
            entries.append((f"{above}/{name}" if below else name, captions))
        notes.update(dict.fromkeys(listing.notes))
    return Listing(entries, tuple(notes))


def read(opened: Opened, columns: Sequence[str] | None, problems: list[str]) -> Listing:
    if opened.form == "table":
        return table.read(opened, columns, problems)
    if opened.form == "parquet":
        return _read_parquet(opened, columns, problems)
    strangers = [str(line) for line, value in opened.content if not isinstance(value, tuple)]
    if strangers or not opened.content:
        problems.append(
            f"{opened.place} has lines that are no JSON objects{_some(strangers) or ': it is empty'}. Expected "
            '{"file_name": "0001.jpg", "text": "a caption"} on each line.'
        )
        return Listing(())
    records = [dict(value) for _, value in opened.content]
    names = list(dict.fromkeys(name for record in records for name in record))
    return _listing(opened.place, names, records, columns, problems)


def write(pictures: Sequence[Picture]) -> str:
    """The text of metadata.jsonl: strings where every picture has one caption, lists otherwise; never both."""
    single = all(len(picture.captions) == 1 for picture in pictures)
    rows = ({"file_name": p.path, "text": p.captions[0] if single else list(p.captions)} for p in pictures)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def parquet(pictures: Sequence[Picture], path: Path) -> bytes:
    """The content of metadata.parquet. Raises InputError where pyarrow is not installed."""
    arrow, writer = _pyarrow(path)
    columns = {"file_name": [p.path for p in pictures], "text": [list(p.captions) for p in pictures]}
    content = io.BytesIO()
    writer.write_table(arrow.table(columns), content)
    return content.getvalue()


def _read_parquet(opened: Opened, columns: Sequence[str] | None, problems: list[str]) -> Listing:
    try:
        arrow, reader = _pyarrow(opened.path)
    except InputError as error:
        problems.append(str(error))
        return Listing(())
    try:
        names = reader.ParquetFile(opened.place).schema_arrow.names
        picture, captions = choose_columns(names, columns)
        records = reader.read_table(opened.place, columns=[names[n] for n in (picture, *captions)]).to_pylist()
    except InputError as error:
        problems.append(f"{opened.place}: {error}.")
        return Listing(())
    except (arrow.ArrowException, OSError) as error:
        problems.append(f"{opened.place} is a damaged parquet file ({error}); get it again.")
        return Listing(())
    return _listing(opened.place, names, records, [names[n] for n in (picture, *captions)], problems)


def _listing(
    place: str,
    names: Sequence[str],
    records: Sequence[dict[str, Any]],
    columns: Sequence[str] | None,
    problems: list[str],
) -> Listing:
    try:
        picture, captions = choose_columns(names, columns)
    except InputError as error:
        problems.append(f"{place}: {error}.")
        return Listing(())
    entries, strangers = [], []
    for number, record in enumerate(records, 1):
        values = [_strings(record.get(names[n])) for n in captions]
        path = record.get(names[picture])
        if isinstance(path, str) and None not in values:
            entries.append((path, [caption for value in values for caption in value or ()]))
        else:
            strangers.append(str(number))
    if strangers:
        problems.append(
            f"In {place}, {len(strangers)} of {len(records)} rows lack a path that is text, or have captions that are "
            f"neither text nor lists of texts{_some(strangers)}."
        )
    return Listing(entries, (note(names, picture, captions),))


def _strings(value: Any) -> list[str] | None:
    value = [value] if isinstance(value, str) else [] if value is None else value
    return value if isinstance(value, list) and all(isinstance(one, str) for one in value) else None


def _pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            f"{path} is a parquet file, which pyarrow reads and writes; install it with `pip install pyarrow`, or use "
            "metadata.jsonl"
        ) from None
    return pyarrow, pyarrow.parquet
