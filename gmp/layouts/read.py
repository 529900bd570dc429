"""Reading a tower: opened by its header, then put into canonical form tensor by tensor.

Nothing is filled in silently: what a file lacks, what was left unread and what had to be assumed is in the Source
that comes with the tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from .. import files
from ..architectures import image_size
from ..errors import ChangedError, InputError, some
from .canonical import LENT, Piece, assemble, content_hash, is_finite
from .detect import NAMES, Contents, Part, describe, shape_of
from .gmp import weight_of
from .knowledge import settle

if TYPE_CHECKING:
    from torch import Tensor

    from ..clip import TextConfig, VisionConfig

_TRIES = 3
_POSITIONS = 100_000  # more ids than these are no positions, and not looked at
# Formats of ComfyUI's quantised layers whose weight is the stored number times its scale.
_PLAIN_SCALES = ("float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True)
class Source:
    """Where a tower came from and everything that was decided while reading it."""

    path: str  # the file's name without its folder
    sha256: str  # of the tower's weights in canonical form and fp32, whatever file they lie in
    layout: str
    member: str | None
    dtypes: dict[str, int]  # as stored: how many tensors of each
    assumptions: tuple[str, ...]  # sentences
    missing: tuple[str, ...]  # canonical names that another CLIP has to lend
    unexpected: tuple[str, ...]  # tensors of the file that were not read
    notes: tuple[str, ...]  # sentences
    metadata: dict[str, str] = field(default_factory=dict)  # what this program wrote into the file: `gmp_…`


@dataclass(frozen=True)
class TowerFile:
    """One tower in canonical form: fp32 on the CPU, in memory of its own."""

    state: dict[str, Tensor]
    config: TextConfig | VisionConfig
    source: Source


@dataclass(frozen=True)
class OpenTower:
    """One tower of a file, described and checked; `tensors` makes its tensors when they are asked for."""

    header: files.Header
    part: Part
    config: TextConfig | VisionConfig
    assumptions: tuple[str, ...]
    notes: tuple[str, ...]
    unusable: tuple[str, ...]  # is there and is not taken: a projection of zeros

    def tensors(self, fold: bool = True) -> dict[str, files.Pending]:
        """Canonical name -> tensor in the dtype it is stored in; fp32 where that is scaled, or differs within it.

        fold: turn r and theta into weights; False keeps them.
        """
        found = {
            name: _pending(self.header, name, piece)
            for name, piece in self.part.pieces.items()
            if name not in self.unusable
        }
        return _folded(found) if fold else found

    def source(self, sha256: str | None = None) -> Source:
        """sha256: of the weights; None reads them all to compute it."""
        if sha256 is None:
            sha256 = content_hash((name, pending.make()) for name, pending in sorted(self.tensors().items()))
        return Source(
            path=self.header.path.name,
            sha256=sha256,
            layout=self.part.layout,
            member=self.part.member,
            dtypes=self.part.dtypes,
            assumptions=self.assumptions,
            missing=tuple(dict.fromkeys((*self.unusable, *self.part.missing))),
            unexpected=self.part.unexpected,
            notes=self.notes,
            metadata={name: value for name, value in self.header.metadata.items() if name.startswith("gmp_")},
        )


def open_text(
    path: str | os.PathLike[str],
    member: str | None = None,
    heads: int | None = None,
    activation: str | None = None,
    end_of_text: int | None = None,
) -> OpenTower:
    """Find a text encoder in a file or folder; its tensors are read later, one by one.

    member: "clip_l", "clip_g" or "clip_h"; None takes the only one, or clip_l where there are several.
    heads, activation, end_of_text: not in the tensors; None asks the metadata, the config, the family, then assumes.
    Raises InputError for files that hold no such text encoder, or a damaged one.
    """
    header = files.read_header(path)
    contents = describe(header)
    if not contents.text:
        raise InputError(f"{header.path.name} {_instead(contents, 'text')}")
    taken = ()
    if member is None:
        member = "clip_l" if "clip_l" in contents.text else next(iter(contents.text))
        if len(contents.text) > 1:
            taken = (f"holds {some(contents.text)}; {member} was taken",)
    if member not in contents.text:
        raise InputError(f"{header.path.name} has no text encoder {member!r}; it holds {some(contents.text)}")
    header = replace(header, notes=(*taken, *header.notes))
    return _open(header, contents.text[member], heads, activation, end_of_text)


def open_vision(path: str | os.PathLike[str], heads: int | None = None, activation: str | None = None) -> OpenTower:
    """Find a vision tower in a file or folder. Arguments as for `open_text`."""
    header = files.read_header(path)
    contents = describe(header)
    if contents.vision is None:
        raise InputError(f"{header.path.name} {_instead(contents, 'vision')}")
    return _open(header, contents.vision, heads, activation)


def read_text(
    path: str | os.PathLike[str],
    member: str | None = None,
    heads: int | None = None,
    activation: str | None = None,
    end_of_text: int | None = None,
    *,
    fold: bool = True,
) -> TowerFile:
    """Read a text encoder: canonical names without `visual.`; `text_projection`, `logit_scale` where there.

    Arguments as for `open_text`; fold: turn r and theta into weights, False keeps them. A file that is replaced in the
    meantime is read anew: the tensors are always those of one file.
    """
    return _steady(lambda: _read(open_text(path, member, heads, activation, end_of_text), fold))


def read_vision(
    path: str | os.PathLike[str],
    heads: int | None = None,
    activation: str | None = None,
    *,
    fold: bool = True,
) -> TowerFile:
    """Read a vision tower with its projection, all below `visual.`. Arguments as for `read_text`."""
    return _steady(lambda: _read(open_vision(path, heads, activation), fold))


def read_lender(
    path: str | os.PathLike[str], member: str | None = None, heads: int | None = None, activation: str | None = None
) -> tuple[TowerFile | None, str]:
    """The text tower beside a vision tower, which lends its projection and is the anchor; and a sentence on it.

    None where the file has none, has several and no member is named, or it cannot be read: the sentence says which.
    """
    held = describe(files.read_header(path)).text
    if not held:
        return None, "no text tower in it: nothing is lent and nothing to anchor to, unless an original is given"
    if member not in held and len(held) > 1:
        return None, f"{some(held)} in it, and nothing tells which belongs to the vision tower: give it as the original"
    try:
        tower = read_text(path, member if member in held else None, heads, activation)
    except InputError as error:
        return None, f"its text tower is not used: {error}"
    return tower, "a full CLIP: its text tower lends and anchors"


def _steady(read: Callable[[], TowerFile]) -> TowerFile:
    for _ in range(_TRIES):
        try:
            return read()
        except ChangedError:  # another program, or a repair that saves a better step, has replaced the file
            continue
    return read()


def projection_fault(projection: Tensor) -> str | None:
    """Why a projection cannot be a trained one, told by itself alone; None if it may be.

    ComfyUI's CLIPSave writes such ones for clip_l: an identity until August 2024, uninitialised memory since.
    """
    import torch

    exact = projection.double()
    if not exact.isfinite().all():
        return "holds NaN or infinity"
    if not exact.any():
        return "is all zeros"
    if projection.shape[0] == projection.shape[1] and torch.equal(exact, torch.eye(len(exact), dtype=exact.dtype)):
        return "is an identity"
    # trained ones have a root mean square of 0.01 to 0.1; memory of other use is far off, or mostly zeros
    size = exact.square().mean().sqrt().item()
    if not 1e-4 < size < 10 or (exact == 0).double().mean() > 0.5:
        return f"is noise (its root mean square is {size:.2g})"
    return None


def _instead(contents: Contents, wanted: str) -> str:
    """The rest of a sentence that says what a file holds instead of the wanted tower."""
    if wanted == "text" and contents.vision:
        return "holds a vision tower only, no text encoder; give a text encoder or a full CLIP"
    if wanted == "vision" and contents.text:
        return (
            f"holds a text encoder only ({some(contents.text)}), no vision tower; "
            "give a full CLIP or a vision tower's own file"
        )
    return "; ".join(contents.problems)


def _open(
    header: files.Header, part: Part, heads: int | None, activation: str | None, end_of_text: int | None = None
) -> OpenTower:
    from ..clip import TextConfig, VisionConfig

    problems = [*part.problems, *_unknown_scales(header, part)]
    if problems:
        raise InputError(f"{header.path.name}: the {NAMES[part.place.tower]} cannot be read: {'; '.join(problems)}")
    settled = settle(part, header, heads, activation, end_of_text)
    sizes = part.sizes
    shape = (sizes["width"], part.layers, settled.heads, sizes["mlp"])
    notes = [*header.notes, *_damages(header, part), *_changes(part)]
    if part.unexpected:
        notes.append(f"not part of a CLIP, and not read: {some(part.unexpected)}")
    unusable = ()
    if part.place.tower == "text":
        faults = _faults(header, part)
        unusable = tuple(faults)
        notes += [f"its {name} {fault} and is not used" for name, fault in faults.items()]
        own = None if "text_projection" in faults else sizes.get("embed")
        embed_dim = own or settled.embed_dim or sizes["width"]
        config = TextConfig(
            *shape,
            sizes["context"],
            sizes["vocab"],
            embed_dim,
            settled.activation,
            settled.end_of_text,
            settled.assumed,
        )
    else:
        config = VisionConfig(
            *shape,
            sizes["patch"],
            image_size(sizes),
            sizes["embed"],
            settled.activation,
            sizes.get("registers", 0),
            sizes.get("gates", 0),
            settled.assumed,
        )
    return OpenTower(header, part, config, settled.assumptions, tuple(notes), unusable)


def _read(tower: OpenTower, fold: bool) -> TowerFile:
    state, broken = {}, []
    for name, pending in tower.tensors(fold).items():
        state[name] = pending.make().float()
        if not is_finite(state[name]):
            broken += tower.part.pieces[name].keys if name in tower.part.pieces else [name]
    if broken:
        raise InputError(
            f"{tower.header.path.name}: {len(broken)} tensors hold NaN or infinity: {some(broken)}; "
            "the file is damaged, get another copy"
        )
    return TowerFile(state, tower.config, tower.source(content_hash(sorted(state.items())) if fold else None))


def _pending(header: files.Header, name: str, piece: Piece) -> files.Pending:
    dtypes = {header.tensors[key].dtype for key in piece.keys}
    dtype = "F32" if piece.scales or len(dtypes) > 1 else dtypes.pop()
    return files.Pending(dtype, shape_of(name, piece, header), partial(_make, header, name, piece))


def _make(header: files.Header, name: str, piece: Piece) -> Tensor:
    return assemble(name, piece, files.read_tensors(header, (*piece.keys, *piece.scales.values())))


def _folded(tensors: dict[str, files.Pending]) -> dict[str, files.Pending]:
    """The same with weights in place of r and theta."""
    result = dict(tensors)
    for name in tensors:
        if name.endswith(".theta"):
            stem = name.removesuffix(".theta")
            r, theta = result.pop(f"{stem}.r"), result.pop(name)
            dtype = "F64" if theta.dtype == "F64" else "F32"
            weight, columns = weight_of(stem)
            shape = theta.shape[::-1] if columns else theta.shape
            result[weight] = files.Pending(dtype, shape, partial(_merged, stem, r, theta))
    return result


def _merged(stem: str, r: files.Pending, theta: files.Pending) -> Tensor:
    from ..geometric import unsplit

    # torch has no arithmetic for fp8
    return unsplit(stem, *(half.make() if half.dtype == "F64" else half.make().float() for half in (r, theta)))


def _faults(header: files.Header, part: Part) -> dict[str, str]:
    """What is there and cannot be what its name says, by canonical name."""
    faults = {}
    for name in LENT:
        if piece := part.pieces.get(name):
            tensor = _make(header, name, piece)
            if name == "text_projection":
                fault = projection_fault(tensor)
            else:
                fault = None if is_finite(tensor) else "is not a number"
            if fault:
                faults[name] = fault
    return faults


def _changes(part: Part) -> list[str]:
    """Sentences for what is more than another name or order of the file's own numbers."""
    sentences = []
    for name, piece in part.pieces.items():
        if piece.transposed:
            sentences.append(f"{piece.keys[0]} is a Linear's weight and was transposed to {name}")
        if piece.kept:
            own, rest = piece.keys
            sentences.append(f"Long-CLIP's positions: the first {piece.kept} rows are {own}'s, the others {rest}'s")
    if scaled := sum(len(piece.scales) for piece in part.pieces.values()):
        sentences.append(f"{scaled} scaled fp8 weights were multiplied by their scales")
    return sentences


def _unknown_scales(header: files.Header, part: Part) -> list[str]:
    """A sentence for quantised layers of a format whose weight is more than a number times a scale."""
    formats = set()
    for key in part.buffers:
        if key.endswith("comfy_quant"):
            formats.add(_format(header, key))
    unknown = formats.difference(_PLAIN_SCALES)
    return [f"is quantised as {some(unknown)}, which is not read; give the fp16 or fp32 edition"] if unknown else []


def _format(header: files.Header, key: str) -> str:
    """What ComfyUI's JSON beside a quantised layer names as its format."""
    info = header.tensors[key]
    if info.dtype == "U8" and info.items < 10_000:
        try:
            return str(json.loads(bytes(files.read_tensors(header, [key])[key].flatten().tolist()))["format"])
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
    return "a format that it does not name"


def _damages(header: files.Header, part: Part) -> list[str]:
    """Sentences for position ids that are not 0, 1, 2, …: merging tools average them, to 75.9975 for example."""
    import torch

    sentences = []
    for key in part.buffers:
        if not key.endswith("position_ids") or header.tensors[key].items > _POSITIONS:
            continue
        found = files.read_tensors(header, [key])[key].flatten().double()
        wrong = found != torch.arange(len(found), dtype=torch.float64)
        if wrong.any():
            at = int(wrong.nonzero()[0])
            sentences.append(f"{key} is damaged ({found[at]:g} at {at}) and was not used: positions are counted afresh")
    return sentences
