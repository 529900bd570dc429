"""captions show | convert | kinds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.captions import printable
from ..errors import InputError
from .parsers import add_command
from .towers import split_columns

if TYPE_CHECKING:
    from ..data.captions import Index


def arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="WHAT")

    def add(name: str, run: object, text: str, example: str) -> argparse.ArgumentParser:
        one = add_command(commands, name, text, f"captions {example}")
        one.set_defaults(command=run)
        return one

    def add_place(one: argparse.ArgumentParser) -> None:
        one.add_argument("place", metavar="PLACE", help="a caption file, a folder of pictures, or tars")
        one.add_argument("--kind", metavar="KIND", help="of the captions (as they look)")
        one.add_argument("--images", type=Path, metavar="DIR", help="the pictures' folder (that of the caption file)")
        one.add_argument(
            "--columns", metavar="A,B", help="of a table: the pictures', then the captions' (by their names)"
        )
        one.add_argument("--allow-missing", action="store_true", help="leave out pictures that are not there")

    one = add(
        "show", show, "Say what captions are at a place: the kind, the columns, counts, the first.", "show pictures"
    )
    add_place(one)
    one.add_argument("--first", type=int, default=5, metavar="N", help="pictures to print (5)")

    one = add(
        "convert",
        convert,
        "Write captions as those of another kind; says what that kind cannot hold. No picture is touched.",
        "convert my-dataset-labels.json --images pictures --to kohya_json --out pictures/meta_cap.json",
    )
    add_place(one)
    one.add_argument("--to", required=True, metavar="KIND", help="see `captions kinds`")
    one.add_argument("--out", type=Path, required=True, help="a file, or a folder; for tars a .tar or a folder")
    one.add_argument("--force", action="store_true", help="replace what exists")
    one.add_argument(
        "--phrases",
        type=int,
        metavar="N",
        help="cut captions into their leading phrases of N characters in all, each a caption (140 for desc.csv)",
    )

    add("kinds", kinds, "List the kinds of captions.", "kinds")


def kinds(options: argparse.Namespace) -> object:
    from ..data.sources import KINDS

    width = max(map(len, KINDS))
    for name, sentence in KINDS.items():
        print(f"{name:{width}}  {sentence}")
    return KINDS


def show(options: argparse.Namespace) -> object:
    if options.first < 0:
        raise InputError(f"--first {options.first}: give how many pictures to print, 0 or more")
    index = _read(options)
    report = index.report
    captions = sum(index.caption_counts)
    print(f"{len(index)} pictures with {captions} captions")
    print("\n".join(line for line in str(report).splitlines() if not line.endswith(": 0")))
    if any(repeats != 1 for repeats in index.repeats):
        print(f"visits in an epoch: {sum(index.repeats):g}")
    for picture in index.pictures[: options.first]:
        print(printable(picture.path))
        for caption in picture.captions:
            print(f"    {printable(caption)}")
    return {
        "kind": report.kind,
        "notes": report.notes,
        "pictures": len(index),
        "captions": captions,
        "missing": report.missing,
        "without_captions": report.uncaptioned,
        "orphans": report.orphans,
        "empty": report.empty,
        "linked": report.linked,
        "respelled": report.respelled,
        "broken": report.broken,
    }


def convert(options: argparse.Namespace) -> object:
    from ..data.convert import convert as write

    made = write(
        options.place,
        options.to,
        options.out,
        kind=options.kind,
        images=options.images,
        columns=split_columns(options.columns),
        missing_ok=options.allow_missing,
        phrases=options.phrases,
        force=options.force,
    )
    print(f"{made.kind} -> {made.to}: {made.pictures} pictures with {made.captions} captions")
    for note in made.report.notes:
        print(printable(note))
    for sentence in made.lost:
        print(f"lost: {printable(sentence)}")
    if not made.lost:
        print("nothing was lost")
    where = made.files[0] if len(made.files) == 1 else f"{len(made.files)} files in {made.out}"
    print(f"written: {printable(str(where))}")
    return {
        "kind": made.kind,
        "to": made.to,
        "out": str(made.out),
        "files": len(made.files),
        "pictures": made.pictures,
        "captions": made.captions,
        "lost": made.lost,
    }


def _read(options: argparse.Namespace) -> Index:
    from ..data import sources
    from ..data.sources import webdataset

    if options.kind == "webdataset" or options.kind is None and sources.holds_tars(options.place):
        return webdataset.read(options.place, split_columns(options.columns))
    return sources.read(
        options.place,
        kind=options.kind,
        images=options.images,
        columns=split_columns(options.columns),
        missing_ok=options.allow_missing,
    )
