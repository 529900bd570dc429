"""pictures crop, pictures augment: prepared copies of a folder of pictures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, some
from .parsers import add_command

if TYPE_CHECKING:
    from ..clip import VisionTower
    from ..config import Pictures
    from ..data.captions import Index
    from ..data.copies import Copies


JITTER = (0.5, 0.5, 0.5, 0.1)  # where nothing else is asked for


def arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="WHAT")

    def add(name: str, text: str, example: str) -> argparse.ArgumentParser:
        one = add_command(commands, name, text, f"pictures {example}")
        one.add_argument("folder", type=Path, metavar="FOLDER", help="with pictures, captions beside them or not")
        one.add_argument(
            "--out", type=Path, required=True, metavar="FOLDER", help="for the copies; the same again goes on"
        )
        one.add_argument("--captions", type=Path, metavar="FILE", help="of captions; written for the copies too")
        one.add_argument("--force", action="store_true", help="write into a folder that is not empty, and replace")
        return one

    one = add(
        "crop",
        "Write square copies of pictures, at their own resolution.",
        "crop pictures --out squares --crop salient --vision ViT-L-14.safetensors",
    )
    one.set_defaults(command=crop)
    one.add_argument(
        "--crop",
        choices=("centre", "letterbox", "salient"),
        default="centre",
        help="the middle (default); the whole on a plain ground; or the square that the vision tower attends to",
    )
    one.add_argument("--vision", type=Path, metavar="FILE", help="the CLIP or vision tower that attends")
    one.add_argument("--vision-heads", type=int, help="attention heads of it, where the file does not say")
    one.add_argument("--activation", choices=("quick_gelu", "gelu"), help="likewise; LAION's CLIPs use gelu")
    one.add_argument("--device", help="cpu, cuda, cuda:1, mps or auto, the best there is (auto)")
    one.add_argument("--cache", type=Path, metavar="DIR", help="for the squares that were found (~/.cache/gmp)")

    one = add(
        "augment",
        "Write varied copies of pictures: other colours, flipped, parts of them.",
        "augment pictures --out varied --copies 4 --jitter 0.5 0.5 0.5 0.1 --flip 0.5",
    )
    one.set_defaults(command=augment)
    one.add_argument("--copies", type=int, default=1, help="of each picture (1)")
    one.add_argument(
        "--jitter",
        type=float,
        nargs=4,
        metavar=("BRIGHTNESS", "CONTRAST", "SATURATION", "HUE"),
        help="most change of each (0.5 0.5 0.5 0.1, or none where --grey, --flip or --scale is given); hue is a share "
        "of its circle, 0.5 at the most",
    )
    one.add_argument("--jitter-chance", type=float, help="chance of that change (1)")
    one.add_argument("--grey", type=float, help="chance that colours are taken out (0)")
    one.add_argument("--flip", type=float, help="chance of a flip; left and right change in captions (0)")
    one.add_argument("--scale", type=float, help="least share of the area that a copy shows (1)")
    one.add_argument("--seed", type=int, default=0)


def crop(options: argparse.Namespace) -> object:
    from ..data.copies import write_crops
    from ..features import default_cache
    from ..terminal import show
    from .towers import device

    tower = None
    if options.crop == "salient":
        if options.vision is None:
            raise InputError("a salient crop is what a vision tower attends to; give its file with --vision")
        tower = _tower(options).to(device(options.device))
    elif options.vision is not None:
        raise InputError(f"--vision is for --crop salient; the {options.crop} crop needs no tower")
    cache = options.cache or default_cache()
    index = _index(options)
    work = write_crops(
        options.folder, options.out, options.crop, tower=tower, cache=cache, index=index, force=options.force
    )
    return _tell(show(work), options)


def augment(options: argparse.Namespace) -> object:
    from ..config import RepairConfig
    from ..data.copies import write_augmented
    from ..terminal import show

    pictures = _varying(options)
    RepairConfig(train="both", pictures=pictures)  # raises for what is out of its bounds
    work = write_augmented(
        options.folder,
        options.out,
        options.copies,
        pictures,
        options.seed,
        index=_index(options),
        force=options.force,
    )
    return _tell(show(work), options)


def _varying(options: argparse.Namespace) -> Pictures:
    """How copies vary. Colours do where they are asked for, or nothing else is."""
    from ..config import Pictures

    given = {name: getattr(options, name) for name in ("grey", "flip", "scale") if getattr(options, name) is not None}
    if options.jitter is not None:
        given["jitter"] = tuple(options.jitter)
    elif not given:
        given["jitter"] = JITTER
    elif options.jitter_chance is not None:
        raise InputError("--jitter-chance is that of a jitter; say with --jitter how much colours change")
    if options.jitter_chance is not None:
        given["jitter_chance"] = options.jitter_chance
    return Pictures(**given)


def _tower(options: argparse.Namespace) -> VisionTower:
    from ..clip import VisionTower, load
    from ..layouts import read_vision
    from ..layouts.canonical import vision_part

    vision = read_vision(options.vision, options.vision_heads, options.activation)
    return load(VisionTower, vision.config, vision_part(vision.state)).requires_grad_(False)


def _index(options: argparse.Namespace) -> Index | None:
    from ..data.captions import read_index

    return read_index(options.folder, options.captions, missing_ok=True) if options.captions else None


def _tell(copies: Copies, options: argparse.Namespace) -> object:
    if copies.broken:
        named = some([f"{path} ({reason})" for path, reason in copies.broken])
        print(f"left out: {len(copies.broken)} pictures that cannot be read: {named}", file=sys.stderr)
    if copies.linked:
        print(f"links that were not followed: {len(copies.linked)}: {some(copies.linked)}", file=sys.stderr)
    if copies.no_files:
        print(f"not taken for pictures or captions, since they are no files: {some(copies.no_files)}", file=sys.stderr)
    if copies.unmirrored:
        print(
            f"note: {copies.unmirrored} copies are flipped and have no captions beside them; if a file has captions of "
            "them, give it with --captions, so that left and right change places in it",
            file=sys.stderr,
        )
    before = f", {copies.kept} were there" if copies.kept else ""
    print(f"{copies.written} pictures written to {options.out}{before}")
    if copies.captions:
        print(f"captions: {copies.captions}")
    return {
        "out": str(options.out),
        "written": copies.written,
        "kept": copies.kept,
        "broken": dict(copies.broken),
        "unmirrored": copies.unmirrored,
        "linked": list(copies.linked),
        "no_files": list(copies.no_files),
        "captions": copies.captions and str(copies.captions),
    }
