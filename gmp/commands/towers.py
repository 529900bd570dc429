"""What several commands need: the towers that were named, and the device."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    import torch

    from ..data.captions import Index
    from ..layouts import TowerFile


def read_towers(options: argparse.Namespace, tell: bool = True) -> tuple[TowerFile, TowerFile, TowerFile | None]:
    """text tower, vision tower, and the original's text tower: of --original, or the vision file's where it has one.

    tell: say on standard error what the original is.
    """
    from ..layouts import read_lender, read_text, read_vision

    text = read_text(options.text, options.member, options.heads, options.activation, options.end_of_text)
    vision = read_vision(options.vision, options.vision_heads, options.activation)
    lender = options.original or options.vision
    original, sentence = read_lender(lender, text.source.member, options.heads, options.activation)
    if options.original and original is None:
        raise InputError(f"{lender.name} was given as the original: {sentence}")
    if tell:
        print(f"{lender.name}: {sentence}", file=sys.stderr)
    return text, vision, original


def check_new(paths: list[Path], force: bool) -> None:
    """Raises InputError for files that would be replaced, unless that is asked for."""
    if not force and (there := [str(path) for path in paths if os.path.lexists(path)]):
        raise InputError(f"{', '.join(there)} exists; choose another name, or pass --force")


def check_out(path: Path, force: bool) -> None:
    """Raises InputError for a name that is not that of a safetensors file, and for one that is taken."""
    if path.suffix not in (".safetensors", ".sft"):
        raise InputError(f"{path} will be a safetensors file; let its name end in .safetensors")
    check_new([path], force)


def device(name: str | None) -> torch.device:
    """The device of that name; "auto" and None take the best there is. Raises InputError for one that is not there."""
    import torch

    if name and name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError, NotImplementedError):
            there = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
            there += ["mps"] if torch.backends.mps.is_available() else []
            raise InputError(f"device {name!r} cannot be used here; there is {', '.join(there)}, or auto") from None
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def check_place(paths: list[Path]) -> None:
    """Raises InputError for files that cannot be written, before anything is computed for them."""
    for path in paths:
        if path.is_dir():
            raise InputError(f"{path} is a folder; give the name of a file")
        there = next(one for one in path.absolute().parents if os.path.lexists(one))
        if not there.is_dir():
            raise InputError(f"{path} cannot be written: {there} is no folder; choose another place")
        if not os.access(there, os.W_OK):
            raise InputError(f"{path} cannot be written: nothing may be made in {there}; choose another place")


def add_pictures(
    parser: argparse.ArgumentParser, images: str = "folder with the captioned pictures", required: bool = True
) -> None:
    """The options of `read_pictures`, and those of embedding what it reads. images: the help of --images."""
    parser.add_argument("--images", type=Path, required=required, metavar="DIR", help=images)
    parser.add_argument(
        "--captions", type=Path, metavar="FILE", help="JSON, COCO, CSV, metadata.jsonl …; without: .txt files beside"
    )
    parser.add_argument("--kind", metavar="KIND", help="of the captions (as they look); see `captions kinds`")
    parser.add_argument(
        "--columns", metavar="A,B", help="of a table: the pictures', then the captions' (by their names)"
    )
    parser.add_argument(
        "--source",
        action="append",
        metavar="[KIND:]PLACE[@IMAGES][=WEIGHT]",
        help="a further folder or caption file, whose pictures an epoch visits WEIGHT times; may be repeated",
    )
    parser.add_argument("--allow-missing", action="store_true", help="leave out pictures that are named but not there")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps or auto, the best there is (auto)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="for picture features (~/.cache/gmp)")


def has_pictures(options: argparse.Namespace) -> bool:
    """Whether captioned pictures were given, in either way."""
    return bool(options.images or options.source)


def read_pictures(options: argparse.Namespace) -> Index:
    """The captioned pictures of --images and of every --source, as one data set.

    Tells on standard error how they were read, and what is left out. Raises InputError with the problems of all.
    """
    from ..data import sources

    columns = split_columns(options.columns)
    given, found, problems = [], [], []
    for text in options.source or ():
        try:
            given.append(sources.parse(text, sources.KINDS))
        except InputError as error:
            problems.append(str(error))
    if options.images:
        place = str(options.captions or options.images)
        given.insert(0, sources.Source(place, options.kind, str(options.images)))
    elif options.captions or options.kind:
        raise InputError("--captions and --kind are of --images; give it, too, or write --source KIND:FILE@IMAGES")
    for one in given:
        try:
            index = sources.read(
                one.place, kind=one.kind, images=one.images, columns=columns, missing_ok=options.allow_missing
            )
        except InputError as error:
            problems.append(str(error))
        else:
            found.append((index, one.weight))
    if problems:
        raise InputError("\n".join(problems))
    if not found:
        raise InputError("give captioned pictures: a folder as --images, or any place as --source")
    index = sources.mix(found)
    for line in left_out(index):
        print(line, file=sys.stderr)
    return index


def split_columns(text: str | None) -> list[str] | None:
    """--columns, as `sources.read` takes them."""
    return [name.strip() for name in text.split(",")] if text else None


def left_out(index: Index) -> list[str]:
    """What a person should know of how captions were read: the kind where it is not the usual, and what is left out."""
    from ..data.captions import printable

    told = (
        "not found: ",
        "without captions: ",
        "text files without",
        "links that",
        "caption files that hold nothing: ",
        "caption files that can't be read: ",
    )
    report = index.report
    lines = [f"captions: {report.kind}"] if report.kind not in ("", "text", "json") else []
    lines += [f"captions: {printable(note)}" for note in report.notes]
    found = [line for line in str(report).splitlines() if not line.endswith(": 0")]
    lines += [f"left out: {line}" for line in found if line.startswith(told)]
    return lines + [line for line in found if line.startswith("found under another spelling: ")]
