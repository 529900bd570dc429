"""scan and blend: how much of a repair to take, and taking it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..events import Event, progress
from ..terminal import show
from .files import check_writing
from .towers import add_pictures, check_new, check_place, device, has_pictures, read_pictures

if TYPE_CHECKING:
    from ..layouts import TowerFile
    from ..strength import Curve, Scan

WAYS = ("weights", "r_and_theta", "r", "theta")  # gmp.blend.ALONG, which would import torch
TARGETS = ("sdxl", "sd1", "flux")
LEGEND = (
    "CKA, rank corr.: 1 is prompts arranged as by the original; apart: share of prompts that differ from every other "
    "one; to original, to broken: cosine of states. More: docs/measurements.md"
)


def scan_arguments(parser: argparse.ArgumentParser) -> None:
    _add_ends(parser)
    parser.add_argument("--original", type=Path, required=True, metavar="CLIP", help="the full original CLIP")
    add_pictures(parser, "pictures to measure recall on, not trained on", required=False)
    parser.add_argument(
        "--target", choices=TARGETS, default="sdxl", help="whose read point counts (sdxl; SD2, SD3 too)"
    )
    parser.add_argument(
        "--along", choices=WAYS, action="append", help="what moves (weights); more than once to compare"
    )
    parser.add_argument("--points", type=int, default=13, help="strengths from 0 to 1.2 (13)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where scan.png and scan.json go")
    parser.add_argument("--force", action="store_true", help="replace what exists")


def blend_arguments(parser: argparse.ArgumentParser) -> None:
    _add_ends(parser)
    parser.add_argument(
        "--strength", type=float, required=True, help="0: broken, 1: repaired, up to 1.2: beyond, as `scan` suggests"
    )
    parser.add_argument("--along", choices=WAYS, default="weights", help="what moves (weights)")
    parser.add_argument("--original", type=Path, metavar="FILE", help="the original, for --toward-original")
    parser.add_argument(
        "--toward-original", type=float, default=0.0, help="share of the way from the blend to the original (0)"
    )


def _add_ends(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--broken", type=Path, required=True, metavar="FILE", help="the encoder before the repair")
    parser.add_argument("--repaired", type=Path, required=True, metavar="FILE", help="the encoder after it")


def scan(options: argparse.Namespace) -> object:
    from ..features import default_cache
    from ..files import write_json
    from ..layouts import read_lender, read_text, read_vision
    from ..plots.figure import save
    from ..plots.strength import plot_scan
    from ..strength import even
    from ..strength import scan as measure
    from ..tokenizer import tokenizer_for

    if options.captions and not options.images:
        raise InputError("--captions needs --images, the folder with the pictures")
    written = [options.out / name for name in ("scan.png", "scan.json")] if options.out else []
    check_new(written, options.force)
    check_place(written)
    index = read_pictures(options) if has_pictures(options) else None
    broken, repaired = show(_read_ends(options))
    vision = read_vision(options.original, options.vision_heads, options.activation)
    original, sentence = read_lender(options.original, broken.source.member, options.heads, options.activation)
    if original is None:
        read_text(options.original, options.member, options.heads, options.activation)  # says what the file is
        raise InputError(f"{options.original.name} was given as the original: {sentence}")
    found = show(
        measure(
            broken,
            repaired,
            original,
            vision,
            tokenizer_for(broken.config.context_length, broken.source.member),
            index,
            target=options.target,
            along=options.along or WAYS[:1],
            strengths=even(options.points),
            cache=options.cache or default_cache(),
            device=device(options.device),
        )
    )
    print("\n".join([*lines(found), LEGEND]))
    answer = found.as_json()
    if written:
        options.out.mkdir(parents=True, exist_ok=True)
        save(plot_scan(found), written[0])
        write_json(answer, written[1])
        print(f"written: {', '.join(map(str, written))}")
    return answer


def lines(scan: Scan) -> list[str]:
    """A table for every way of blending, the suggested strength marked, and the warnings."""
    text = []
    for curve in scan.curves:
        at = "none" if curve.suggested.strength is None else f"{curve.suggested.strength:g}"
        text += [*_table(scan, curve), f"suggested strength along {curve.along}: {at}, {curve.suggested.reason}", ""]
    return text[:-1] + [f"note: {words}" for words in scan.warnings]


def _table(scan: Scan, curve: Curve) -> list[str]:
    recall = curve.points[0].recall is not None
    where = "".join(f"  {name:<46}" for name in scan.read_points).rstrip()
    each = "    CKA  rank corr.  apart  to original  to broken"
    text = [
        f"along {curve.along:<10}" + "  recall@1 (95 %)    " * recall + where,
        "  strength      " + " " * 21 * recall + each * len(scan.read_points),
    ]
    for point in curve.points:
        mark = "→" if point.strength == curve.suggested.strength else " "
        row = f"{mark} {point.strength:<14.4g}"
        if recall:
            row += f"  {point.recall.value:.3f} ({point.recall.low:.3f}–{point.recall.high:.3f})"
        for name in scan.read_points:
            structure, original, broken = (
                point.structure[name], point.from_original[name], point.from_broken[name]
            )  # fmt: skip
            row += f"  {structure.cka:>5.3f}  {structure.rank_correlation:>10.3f}  {structure.told_apart:>5.2f}"
            row += f"  {original.cosine:>11.3f}  {broken.cosine:>9.3f}"
        text.append(row)
    return text


def blend(options: argparse.Namespace) -> object:
    from ..blend import blend_encoders
    from ..geometric import split_mlps
    from ..layouts import write_text

    options.layout = options.layout or "huggingface"
    check_writing(options)
    if options.toward_original and not options.original:
        raise InputError("--toward-original goes to the original; give its file with --original")
    if options.original and not options.toward_original:
        raise InputError("--original does nothing alone; give --toward-original, the share of the way to it, 0 to 1")
    broken, repaired = show(_read_ends(options))
    original = _read(options, options.original, broken.source.member) if options.original else None

    def write() -> Generator[Event, None, TowerFile]:
        doing: Event = progress("blend and write", 0, 2)
        yield doing
        made = blend_encoders(broken, repaired, options.strength, options.along, original, options.toward_original)
        yield doing | {"done": 1}
        state = split_mlps(made.state) if options.layout == "gmp" else made.state
        about = {"layout": options.layout, "dtype": options.dtype, "config": made.config}
        write_text(state, options.out, **about, metadata=made.source.metadata)
        yield doing | {"done": 2}
        return made

    made = show(write())
    print(made.source.notes[-1])
    print(f"written: {options.out}")
    return {"out": str(options.out), **json.loads(made.source.metadata["gmp_blend"])}


def _read_ends(options: argparse.Namespace) -> Generator[Event, None, tuple[TowerFile, TowerFile]]:
    """Broken and repaired; the member of the first is looked for in the second."""
    reading: Event = progress("read files", 0, 2)
    yield reading
    broken = _read(options, options.broken, options.member)
    yield reading | {"done": 1}
    repaired = _read(options, options.repaired, broken.source.member)
    yield reading | {"done": 2}
    if broken.source.sha256 == repaired.source.sha256:
        names = f"{options.broken.name} and {options.repaired.name}"
        _tell(f"note: {names} hold the same weights: there is no repair between them")
    return broken, repaired


def _read(options: argparse.Namespace, path: Path, member: str | None) -> TowerFile:
    from ..layouts import read_text

    file = read_text(path, member, options.heads, options.activation, options.end_of_text)
    for sentence in file.source.assumptions:
        _tell(f"{path.name}: assumed: {sentence}")
    return file


def _tell(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)  # above a bar that is there
