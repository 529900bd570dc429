"""dataset report: what is in a folder of captioned pictures, before it trains."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from .towers import add_pictures, check_new, check_place, device, read_pictures

if TYPE_CHECKING:
    from ..events import Event
    from ..join import Joined

DROP = {  # options of what a cleaned index leaves out besides what is always left out -> kinds of findings
    "small": ("small", "pictures smaller than the vision tower's input"),
    "long": ("aspect", "pictures of an extreme aspect"),
    "blank": ("blank", "pictures that show nothing"),
    "near": ("near_duplicates", "all but the largest of pictures that look the same"),
    "foreign": ("language", "captions that do not look English"),
    "wrong": ("wrong_pairs", "captions that hardly fit their picture (needs --vision)"),
}


def arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """`dataset report`: its parser, with its options."""
    from ..dataset_report.findings import USUAL

    commands = parser.add_subparsers(required=True, metavar="WHAT")
    text = "Look at every picture and caption: what is in a data set, what is wrong with it, and what to do."
    parser = commands.add_parser("report", help=text, description=text)
    parser.set_defaults(command=report, code=0)
    parser.add_argument("--json", action="store_true", help="print the answer as JSON on the last line")
    add_pictures(parser, "folder with the captioned pictures", required=False)
    parser.add_argument(
        "--vision", type=Path, metavar="FILE", help="the original CLIP: look for captions that hardly fit their picture"
    )
    parser.add_argument(
        "--original", type=Path, metavar="FILE", help="its text tower, where the file of --vision has none"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="write the report as one page")
    parser.add_argument("--fix", type=Path, metavar="FILE", help="write what to do about each picture; .json or .csv")
    parser.add_argument(
        "--drop",
        type=Path,
        metavar="FILE.json",
        help="write a cleaned caption file, for --captions: without pictures that cannot be read, are not there or "
        "have no caption, and with the captions of copies at one of them; no picture is touched",
    )
    for name, (_, words) in DROP.items():
        parser.add_argument(f"--drop-{name}", action="store_true", help=f"in it, leave out {words}, too")
    parser.add_argument(
        "--size", type=int, help=f"least pixels of the shorter side (the vision tower's input, or {USUAL.size})"
    )
    parser.add_argument(
        "--aspect", type=float, default=USUAL.aspect, help=f"largest long/short side ({USUAL.aspect:g})"
    )
    parser.add_argument(
        "--near", type=int, default=USUAL.near, help=f"bits of 64 by which near duplicates differ ({USUAL.near})"
    )
    parser.add_argument("--lowest", type=int, default=20, help="pairs that fit worst, to be listed (20)")
    parser.add_argument("--force", action="store_true", help="replace what exists")
    return parser


def report(options: argparse.Namespace) -> object:
    """Prints the report; writes what was asked for."""
    from ..dataset_report.clean import clean, told, write_cleaned, write_fixes
    from ..dataset_report.findings import USUAL, Limits
    from ..dataset_report.page import write_page
    from ..dataset_report.report import as_json, examine, lines
    from ..features import default_cache
    from ..terminal import show

    _check(options)
    options.allow_missing = True  # they are what a report tells of
    index = read_pictures(options)
    clip = _clip(options) if options.vision else None
    size = options.size or (clip.config.vision.image_size if clip else USUAL.size)
    context = clip.config.text.context_length if clip else USUAL.context
    limits = Limits(size=size, aspect=options.aspect, near=options.near, context=context)
    cache = options.cache or default_cache()
    found = show(
        examine(
            index, cache, limits, clip=clip, device=device(options.device) if clip else None, lowest=options.lowest
        ),
        _alarm,
    )
    cleaned = None
    if options.drop:
        cleaned = clean(found, [kind for name, (kind, _) in DROP.items() if getattr(options, f"drop_{name}")])
    for line in lines(found):
        print(line)
    for path in (options.out, options.fix, options.drop):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
    if options.out:
        write_page(found, options.out)
        print(f"page: {options.out}")
    if options.fix:
        print(f"fixes: {options.fix}, {write_fixes(found, options.fix):,} of them")
    if cleaned:
        write_cleaned(cleaned, options.drop)
        print(f"cleaned captions: {options.drop}, for --images {index.root}: {told(cleaned)}")
        for note in cleaned.notes:
            print(f"note: {note}")
    answer = as_json(found)
    if cleaned:
        answer["cleaned"] = {
            "pictures": len(cleaned.captions), "captions": cleaned.pairs, "left out": cleaned.dropped
        }  # fmt: skip
    return answer


def _check(options: argparse.Namespace) -> None:
    """Raises InputError for options that lack another one, or name what cannot be written, before anything is read."""
    from ..dataset_report.clean import check_fixes

    if options.original and not options.vision:
        raise InputError("--original lends a text tower to the file of --vision; give that one too")
    asked = [f"--drop-{name}" for name in DROP if getattr(options, f"drop_{name}")]
    if asked and not options.drop:
        raise InputError(f"{', '.join(asked)} tells what a cleaned caption file leaves out; give its name with --drop")
    if options.drop_wrong and not options.vision:
        raise InputError(
            "--drop-wrong needs the original CLIP, which tells which pairs are wrong; give it with --vision"
        )
    if options.out and options.out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{options.out} will be a page; let its name end in .html")
    if options.drop and options.drop.suffix.lower() != ".json":
        raise InputError(f"{options.drop} will be a JSON file of captions; let its name end in .json")
    if options.fix:
        check_fixes(options.fix)
    if options.size is not None and options.size < 1:
        raise InputError(f"--size {options.size} is no size; give 1 pixel or more")
    written = [path for path in (options.out, options.fix, options.drop) if path]
    if len({path.absolute() for path in written}) < len(written):
        raise InputError("--out, --fix and --drop name the same file; give each a name of its own")
    if options.drop and options.captions and options.drop.absolute() == options.captions.absolute():
        raise InputError(f"--drop would replace the captions that were read, {options.captions}; choose another name")
    check_new(written, options.force)
    check_place(written)


def _clip(options: argparse.Namespace) -> Joined:
    """The original CLIP, whole."""
    from ..join import join
    from ..layouts import read_lender, read_vision

    vision = read_vision(options.vision, options.vision_heads, options.activation)
    lender = options.original or options.vision
    text, sentence = read_lender(lender, options.member, options.heads, options.activation)
    if text is None:
        raise InputError(f"{lender.name}: {sentence}; how pairs fit takes the whole original CLIP")
    joined = join(text, vision, text)
    for sentence in joined.assumptions:
        print(f"assumed: {sentence}", file=sys.stderr)
    return joined


def _alarm(event: Event) -> str | None:
    return f"note: {event['advice']}" if event["type"] == "alarm" else None
