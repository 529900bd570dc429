"""diagnose."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from .towers import add_pictures, has_pictures

if TYPE_CHECKING:
    from ..diagnose import Pictures
    from ..layouts import TowerFile
    from ..presets import Preset

LEGEND = (
    "error: distance of states to the original's; from 1 on, one state for every prompt would be nearer. "
    "CKA, rank correlation: 1 is prompts arranged as by the original. More: docs/measurements.md"
)
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
    add_pictures(parser, "folder with captioned pictures: measures alignment", required=False)
    parser.add_argument("--out", type=Path, metavar="FILE", help="a picture of it, .png or .svg")
    parser.add_argument("--force", action="store_true", help="replace what exists")


def diagnose(options: argparse.Namespace) -> object:
    from ..diagnose import diagnose as start
    from ..diagnosis import as_document, lines
    from ..layouts import read_text
    from ..plots.diagnosis import plot_diagnosis
    from ..plots.figure import FORMATS, save
    from ..terminal import show
    from .towers import check_new, check_place, device

    if options.captions and not options.images:
        raise InputError("--captions name pictures; give their folder with --images")
    if options.out:
        if options.out.suffix.lower().removeprefix(".") not in FORMATS:
            raise InputError(f"{options.out} will be a picture; let its name end in .{' or .'.join(FORMATS)}")
        check_new([options.out], options.force)
        check_place([options.out])
    text = read_text(options.text, options.member, options.heads, options.activation, options.end_of_text)
    original = _original(options, text.source.member)
    if doubt := _doubt(text, original):
        print(f"note: {doubt}", file=sys.stderr)
    pictures = _pictures(options) if has_pictures(options) else None
    found = show(start(text, original, target=options.target, pictures=pictures, device=device(options.device)))
    for line in lines(found):
        print(line)
    print(LEGEND)
    if found.verdict.preset:
        print(f"the suggested repair as a command: {_command(options, found.verdict.preset)}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        save(plot_diagnosis(found), options.out)
        print(f"picture: {options.out}")
    return as_document(found)


def _original(options: argparse.Namespace, member: str | None) -> TowerFile:
    from ..layouts import read_lender, read_text

    original, sentence = read_lender(options.original, member, options.heads, options.activation)
    if original is None:
        read_text(options.original, options.member, options.heads, options.activation)  # says what the file is
        raise InputError(f"{options.original.name} was given as the original: {sentence}")
    return original


def _doubt(text: TowerFile, original: TowerFile) -> str | None:
    """Why the file that was given as the original may be none."""
    if "gmp_run" in original.source.metadata:
        return f"{original.source.path} was written by a repair: the original is the CLIP before any fine-tuning"
    if "text_projection" in text.state and "text_projection" not in original.state:
        return (
            f"{original.source.path} has no text projection and {text.source.path} has one: make sure that the two are "
            "not swapped; --original is the CLIP before any fine-tuning"
        )
    return None


def _command(options: argparse.Namespace, preset: Preset) -> str:
    """The repair that is suggested."""
    from ..presets import preset as known

    words = ["python", "-m", "gmp", "repair", "--text", options.text, "--vision", options.original]
    if options.images or not options.source:
        words += ["--images", options.images or "PICTURES"]
    words += [word for source in options.source or () for word in ("--source", source)]
    words += ["--captions", options.captions] if options.captions else []
    words += ["--member", options.member] if options.member else []
    words += ["--preset", preset.name]
    if preset != known(preset.name):  # its anchors are at another read point
        words += [word for anchor in preset.config.anchors for word in ("--anchor", anchor)]
    return shlex.join(map(str, [*words, "--out", "runs/repair"]))


def _pictures(options: argparse.Namespace) -> Pictures:
    from ..diagnose import Pictures
    from ..features import default_cache
    from ..layouts import read_vision
    from .towers import read_pictures

    index = read_pictures(options)
    vision = read_vision(options.original, options.vision_heads, options.activation)
    return Pictures(vision, index, options.cache or default_cache())
