"""diagnose."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from ..diagnose import Pictures

TARGETS = ("sdxl", "sd1", "flux")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", type=Path, metavar="TE", help="the text encoder, or a checkpoint")
    parser.add_argument(
        "--original",
        type=Path,
        required=True,
        metavar="CLIP",
        help="the text encoder that it was trained from; a full CLIP, where pictures are given",
    )
    parser.add_argument("--target", choices=TARGETS, default="sdxl", help="the model that the verdict is for (sdxl)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder with captioned pictures: measures alignment")
    parser.add_argument(
        "--captions",
        type=Path,
        metavar="FILE",
        help='JSON {"sub/01.jpg": ["caption", …]}; without: .txt files beside',
    )
    parser.add_argument("--allow-missing", action="store_true", help="leave out pictures that are named but not there")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps or auto, the best there is (auto)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="for picture features (~/.cache/gmp)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a picture of it, .png or .svg")
    parser.add_argument("--force", action="store_true", help="replace what exists")


def diagnose(options: argparse.Namespace) -> object:
    from ..diagnose import diagnose as start
    from ..diagnosis import as_document, lines
    from ..layouts import read_lender, read_text
    from ..plots.diagnosis import plot_diagnosis
    from ..plots.figure import FORMATS, save
    from ..terminal import show
    from .towers import check_new, device

    if options.captions and not options.images:
        raise InputError("--captions name pictures; give their folder with --images")
    if options.out:
        if options.out.suffix.lower().removeprefix(".") not in FORMATS:
            raise InputError(f"{options.out} will be a picture; let its name end in .{' or .'.join(FORMATS)}")
        check_new([options.out], options.force)
    text = read_text(options.text, options.member, options.heads, options.activation, options.end_of_text)
    original, sentence = read_lender(options.original, text.source.member, options.heads, options.activation)
    if original is None:
        raise InputError(f"{options.original.name} was given as the original: {sentence}")
    pictures = _pictures(options) if options.images else None
    found = show(start(text, original, target=options.target, pictures=pictures, device=device(options.device)))
    for line in lines(found):
        print(line)
    if options.out:
        save(plot_diagnosis(found), options.out)
        print(f"picture: {options.out}", file=sys.stderr)
    return as_document(found)


def _pictures(options: argparse.Namespace) -> Pictures:
    from ..data.captions import read_index
    from ..diagnose import Pictures
    from ..features import default_cache
    from ..layouts import read_vision

    index = read_index(options.images, options.captions, options.allow_missing)
    vision = read_vision(options.original, options.vision_heads, options.activation)
    return Pictures(vision, index, options.cache or default_cache())
