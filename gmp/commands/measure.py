"""measure: everything that can be measured of a text encoder against captioned pictures, and pictures of classes."""

from __future__ import annotations

import argparse
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..events import Event
from ..terminal import show
from .towers import check_new, check_place, device, has_pictures, read_pictures, read_towers

if TYPE_CHECKING:
    from ..data.classes import Classes
    from ..evaluate import Evaluation

LEGEND = (
    "recall@k: share of captions (text → image) and of pictures (image → text) whose own partner is among the first k. "
    "CKA, rank correlation: 1 is arranged as by the original. mean cosine near 1: all texts look alike. told apart: "
    "share of texts that differ from every other one. More: docs/measurements.md"
)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--before", type=Path, metavar="FILE", help="another encoder: say what changed from it")
    parser.add_argument("--classes", type=Path, metavar="DIR", help="zero-shot: a folder of pictures for each class")
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="FILE.csv",
        help="which class each picture in --classes shows, where they are not in folders; columns image, label",
    )
    parser.add_argument("--templates", type=Path, metavar="FILE", help="its prompts, one a line, with {} for the class")
    parser.add_argument(
        "--typographic", action="store_true", help="write words on pictures: does the CLIP read instead of looking?"
    )
    parser.add_argument(
        "--relations", action="store_true", help="captions against false ones of the same words: left for right, …"
    )
    parser.add_argument(
        "--confusion", type=Path, metavar="FILE", help="draw which classes are taken for which; .png or .svg"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the measurement there too")
    parser.add_argument("--force", action="store_true", help="replace what exists")


def measure(options: argparse.Namespace) -> object:
    from ..files import write_json
    from ..measurement import lines
    from ..plots.confusion import plot_confusion
    from ..plots.figure import save

    _check(options)
    evaluation = show(_measured(options))
    found = evaluation.document
    for line in lines(found):
        print(line)
    print(LEGEND)
    for path in (options.confusion, options.out):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
    if options.confusion:
        save(plot_confusion(evaluation.zero_shot), options.confusion)
        print(f"picture: {options.confusion}")
    if options.out:
        write_json(found, options.out)
        print(f"written: {options.out}")
    return found


def _check(options: argparse.Namespace) -> None:
    """Raises InputError for options that lack another one, before anything is read."""
    from ..plots.figure import FORMATS

    if not (has_pictures(options) or options.classes):
        raise InputError("there is nothing to measure on; give --images with captioned pictures, or --classes, or both")
    if not has_pictures(options):
        for given, name in ((options.captions, "captions"), (options.relations, "relations")):
            if given:
                raise InputError(f"--{name} needs captioned pictures; give --images, too")
    if not options.classes:
        for given, words in (
            (options.templates, "--templates are prompts for the names of classes"),
            (options.labels, "--labels tell the classes of pictures in the folder --classes"),
            (options.confusion, "--confusion draws which classes are taken for which"),
        ):
            if given:
                raise InputError(f"{words}; give --classes, too")
    if options.confusion and options.confusion.suffix.lower().removeprefix(".") not in FORMATS:
        raise InputError(f"{options.confusion} will be a picture; let its name end in .{' or .'.join(FORMATS)}")
    if options.out and options.out.suffix != ".json":
        raise InputError(f"{options.out} will be a JSON file; let its name end in .json")
    if options.templates and not options.templates.is_file():
        raise InputError(f"{options.templates} is no file; --templates is a text file with a prompt on each line")
    written = [path for path in (options.out, options.confusion) if path]
    check_new(written, options.force)
    check_place(written)


def _measured(options: argparse.Namespace) -> Generator[Event, None, Evaluation]:
    from ..evaluate import evaluate
    from ..features import default_cache
    from ..layouts import read_text
    from ..tokenizer import tokenizer_for
    from ..zero_shot import read_templates

    index = read_pictures(options) if has_pictures(options) else None
    classes = _classes(options) if options.classes else None
    templates = read_templates(options.templates) if options.templates else None
    text, vision, original = read_towers(options)
    encoders = {}
    if options.before:
        member = options.member or text.source.member
        encoders["before"] = read_text(options.before, member, options.heads, options.activation, options.end_of_text)
    evaluations = yield from evaluate(
        encoders | {"encoder": text},
        vision,
        original,
        index,
        tokenizer_for(text.config.context_length, text.source.member),
        cache=options.cache or default_cache(),
        device=device(options.device),
        classes=classes,
        templates=templates,
        typographic=options.typographic,
        relations=options.relations,
    )
    return evaluations["encoder"]


def _classes(options: argparse.Namespace) -> Classes:
    from ..data.classes import read_classes, read_labels

    return read_labels(options.labels, options.classes) if options.labels else read_classes(options.classes)
