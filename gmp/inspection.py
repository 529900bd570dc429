"""What is this file? Told from headers alone, without torch: kind, layout, architecture, what it lacks and is for."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from .architectures import TEXT_HEADS, image_size, text_name, vision_name
from .errors import InputError, some
from .files import Header, read_header
from .layouts.detect import Contents, Part, describe
from .layouts.kinds import NAMES
from .layouts.knowledge import settle

_LAYOUTS = {
    "huggingface": "Hugging Face names",
    "openai": "OpenAI names",
    "open_clip": "OpenCLIP names",
    "single_file": "a checkpoint's names",
    "diffusers": "a diffusers folder",
    "gmp": "GmP: r and theta in place of weights",
}
# Which programs read a text encoder of this name out of a file of its own, and where they read it.
_READERS = {
    "clip_l": "SD 1.5 (last), SDXL and SD3 (penultimate), Flux (pooled)",
    "clip_g": "SDXL and SD3 (penultimate and projected)",
    "clip_h": "SD 2.x (penultimate)",
}


@dataclass(frozen=True)
class Tower:
    """One tower of a file, in words and numbers."""

    tower: str  # "text", "vision"
    member: str | None
    architecture: str  # "ViT-L/14", or its sizes where nobody has published one
    layout: str
    layers: int
    heads: int | None
    activation: str | None
    sizes: dict[str, int]
    parameters: int
    dtypes: dict[str, int]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    assumptions: tuple[str, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """The answer for one file. Sentences are complete and for people."""

    file: str
    what: str
    kind: str
    container: str
    layout: str
    tensors: int
    towers: tuple[Tower, ...]
    uses: tuple[str, ...]
    next_step: str
    notes: tuple[str, ...]
    problems: tuple[str, ...]


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """Look at a file or a model folder. Raises InputError, naming what it is, where there is no header to read."""
    header = read_header(path)
    contents = describe(header)
    parts = [*contents.text.values(), *([contents.vision] if contents.vision else [])]
    towers = tuple(_tower(part, header) for part in parts)
    return Inspection(
        file=str(path),
        what=_what(contents, towers),
        kind=contents.kind,
        container=header.container,
        layout=contents.layout,
        tensors=len(header.tensors),
        towers=towers,
        uses=_uses(towers),
        next_step=_next_step(header.path.name, contents, towers),
        notes=header.notes,
        problems=contents.problems,
    )


def _tower(part: Part, header: Header) -> Tower:
    name = text_name if part.place.tower == "text" else vision_name
    heads = activation = None
    assumptions: tuple[str, ...] = ()
    problems = part.problems
    if not problems:
        try:
            settled = settle(part, header, None, None)
            heads, activation, assumptions = settled.heads, settled.activation, settled.assumptions
        except InputError as error:
            problems = (str(error).removeprefix(f"{header.path.name}: "),)
    return Tower(
        tower=part.place.tower,
        member=part.member,
        architecture=name(part.sizes, part.layers) or _sizes(part),
        layout=part.layout,
        layers=part.layers,
        heads=heads,
        activation=activation,
        sizes=part.sizes,
        parameters=part.parameters,
        dtypes=part.dtypes,
        missing=part.missing,
        unexpected=part.unexpected,
        assumptions=assumptions,
        problems=problems,
    )


def _sizes(part: Part) -> str:
    what = f"{_blocks(part.layers)} of width {part.sizes.get('width', '?')}"
    pixels = image_size(part.sizes)
    return f"{what}, patches of {part.sizes['patch']}, pictures of {pixels} pixels" if pixels else what


def _blocks(count: int) -> str:
    return f"{count} block{'s'[: count != 1]}"


def _what(contents: Contents, towers: tuple[Tower, ...]) -> str:
    """One line: the kind, and the towers in it."""
    kind = NAMES.get(contents.kind, contents.kind)
    held = ", ".join(f"{tower.member or 'vision tower'} ({tower.architecture})" for tower in towers)
    layout = " and ".join(_LAYOUTS[layout] for layout in contents.layout.split("+") if layout)
    return kind + (f": {held}; {layout}" if held else "")


def _uses(towers: tuple[Tower, ...]) -> tuple[str, ...]:
    """What the file can be given to here, and who reads it."""
    uses = []
    for tower in towers:
        if tower.problems:
            continue
        if tower.tower == "vision":
            uses.append("Load Vision Tower, --vision: what a repair aligns the text with")
            continue
        known = tower.sizes["width"] in TEXT_HEADS
        readers = f"; read by {_READERS[tower.member]}" if known else ""
        uses.append(f"Load Text Encoder, --text: {tower.member} can be repaired{readers}")
        if len(towers) > 1 and towers[-1].tower == "vision" and not tower.missing:
            uses.append("the original of a repair: its text tower lends the projection and is the anchor")
    return tuple(uses)


def _next_step(name: str, contents: Contents, towers: tuple[Tower, ...]) -> str:
    name = shlex.quote(name)
    if not towers:
        return ""  # the problem says what to give instead
    if all(tower.problems for tower in towers):
        return "none with this file: see above what is wrong with it"
    members = [tower for tower in towers if tower.tower == "text" and not tower.problems]
    whole = len(members) == 1 and towers[-1].tower == "vision" and not towers[-1].problems
    if contents.layout == "gmp":
        return (
            f"python -m gmp convert {name} --out {Path(name).stem}_plain.safetensors folds r and theta into weights; "
            "ComfyUI's own loaders cannot read them"
        )
    if whole:
        return f"give it as --vision {name} (Load Vision Tower) to repair a text encoder of {members[0].architecture}"
    if not members:
        return f"give it as --vision {name} (Load Vision Tower); a full CLIP would lend its projection too"
    member = f" --member {members[0].member}" if len(members) > 1 else ""
    width = members[0].sizes["width"]
    partner = f"original {members[0].architecture}" if width in TEXT_HEADS else "CLIP that it came from"
    return f"give it as --text {name}{member} (Load Text Encoder), with the {partner} as --vision"


def lines(inspection: Inspection) -> list[str]:
    """The inspection as a person reads it."""
    result = [f"{inspection.file}: {inspection.what}"]
    for tower in inspection.towers:
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in tower.dtypes.items())
        settled = f", {tower.heads} head{'s'[: tower.heads != 1]}, {tower.activation}" if tower.heads else ""
        result.append(
            f"  {tower.member or 'vision'}: {_blocks(tower.layers)}{settled}, "
            + ", ".join(f"{name} {size}" for name, size in tower.sizes.items())
            + f"; {tower.parameters:,} parameters, stored as {dtypes}"
        )
        if tower.missing:
            result.append(f"    lacks {', '.join(tower.missing)}: the original CLIP lends it")
        if tower.unexpected:
            result.append(f"    not part of a CLIP, and not read: {some(tower.unexpected)}")
        result += [f"    {sentence}" for sentence in (*tower.assumptions, *tower.problems)]
    told = {f"{tower.member or 'vision'}: {problem}" for tower in inspection.towers for problem in tower.problems}
    result += [f"  {problem}" for problem in inspection.problems if problem not in told]
    result += [f"  {note}" for note in inspection.notes]
    result += [f"  for: {use}" for use in inspection.uses]
    return result + ([f"  next: {inspection.next_step}"] if inspection.next_step else [])


def sentence(inspection: Inspection) -> str:
    """One line for a menu: what it is, the first thing that is wrong with it, what is assumed, what else is in it."""
    problems = [problem for tower in inspection.towers for problem in tower.problems] or list(inspection.problems)
    assumed = [each.partition(":")[0] for tower in inspection.towers for each in tower.assumptions]
    return " · ".join([inspection.what, *problems[:1], *dict.fromkeys(assumed), *inspection.notes[:1]])
