"""measure: everything that can be measured of a text encoder against captioned pictures."""

from __future__ import annotations

import argparse
from collections.abc import Generator
from pathlib import Path

from ..errors import InputError
from ..events import Event
from ..terminal import show
from .towers import check_new, device, read_towers


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--before", type=Path, metavar="FILE", help="another encoder: say what changed from it")
    parser.add_argument("--classes", type=Path, metavar="DIR", help="zero-shot: a folder of pictures for each class")
    parser.add_argument("--templates", type=Path, metavar="FILE", help="its prompts, one a line, with {} for the class")
    parser.add_argument(
        "--typographic", action="store_true", help="write words on pictures: does the CLIP read instead of looking?"
    )
    parser.add_argument(
        "--relations", action="store_true", help="captions against false ones of the same words: left for right, …"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the measurement there too")
    parser.add_argument("--force", action="store_true", help="replace what exists")


def measure(options: argparse.Namespace) -> object:
    from ..files import write_json
    from ..measurement import lines

    if options.templates and not options.classes:
        raise InputError("--templates are prompts for the names of classes; give --classes, too")
    if options.out:
        if options.out.suffix != ".json":
            raise InputError(f"{options.out} will be a JSON file; let its name end in .json")
        check_new([options.out], options.force)
    found = show(_measured(options))
    for line in lines(found):
        print(line)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(found, options.out)
        print(f"written: {options.out}")
    return found


def _measured(options: argparse.Namespace) -> Generator[Event, None, dict[str, object]]:
    from ..data.captions import read_index
    from ..data.classes import read_classes
    from ..evaluate import evaluate
    from ..features import default_cache
    from ..layouts import read_text
    from ..tokenizer import tokenizer_for
    from ..zero_shot import read_templates

    index = read_index(options.images, options.captions, options.allow_missing)
    classes = read_classes(options.classes) if options.classes else None
    templates = read_templates(options.templates) if options.templates else None
    text, vision, original = read_towers(options)
    encoders = {}
    if options.before:
        member = options.member or text.source.member
        encoders["before"] = read_text(options.before, member, options.heads, options.activation, options.end_of_text)
    documents = yield from evaluate(
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
    return documents["encoder"]
