"""Text encoders against the one that they come from: numbers, and the pictures of them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from . import READ_POINTS
from .clip import TextTower, load
from .compare import Geometry, WeightDrift, check_alike, geometry, neighbours, similarity, weight_drift
from .data.captions import Index, first_captions
from .errors import InputError
from .evaluate import Document, document
from .events import Event, progress
from .features import embed_index
from .join import join
from .layouts import Source, TowerFile, projection_fault
from .layouts.canonical import STACK, text_part
from .measure import Drift, drift
from .pca import fit_plane, fit_umap
from .prompts import Prompt
from .structure import LEAST, Structure, compare_structure, prompt_vectors
from .tokenizer import Tokenize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAIRS = 150  # pictures that are drawn, each with its first caption; more are a cloud
FEW_PROMPTS = 30  # with fewer, agreement of structure says little
DRIFT_PROMPTS = 64  # that drift is measured on, at the full context length
CHANGED = {1: 8, 2: 5}  # rows in the table of neighbours, by encoders; 3 beyond


@dataclass(frozen=True)
class Pairs:
    """Pictures and a caption of each, as the CLIP of every text encoder sees them, of unit length."""

    pictures: Tensor  # (N, E)
    captions: dict[str, Tensor]  # by encoder's name, (N, E)
    vision: Source


@dataclass(frozen=True)
class Comparison:
    """What is known of two or more text encoders; the first is the original. Everything is by encoder's name."""

    sources: dict[str, Source]  # the original's first
    geometries: dict[str, tuple[Geometry, ...]]
    weights: dict[str, tuple[WeightDrift, ...]]  # without the original
    prompts: tuple[Prompt, ...]
    vectors: dict[str, dict[str, Tensor]]  # by read point, (N, D)
    structure: dict[str, dict[str, Structure]]  # by read point
    drift: dict[str, dict[str, Drift]]  # by read point; without the original
    pairs: Pairs | None
    warnings: tuple[str, ...]

    @property
    def original(self) -> str:
        return next(iter(self.sources))

    def documents(self) -> list[Document]:
        """One measurement document of kind `comparison` for every encoder but the original."""
        return [
            document(
                "comparison",
                self.sources[name],
                self.sources[self.original],
                self.pairs and self.pairs.vision,
                structure={point: asdict(one) for point, one in self.structure[name].items()},
                drift={point: asdict(one) for point, one in self.drift[name].items()},
                blocks=[asdict(one) for one in rows],
                warnings=list(self.warnings) or None,
            )
            for name, rows in self.weights.items()
        ]

    def lines(self, point: str) -> list[str]:
        """What a person wants to know first, a sentence for each encoder."""
        lines = []
        for name, rows in self.weights.items():
            most = max((one for one in rows if one.block is not None), key=lambda one: one.angle, default=None)
            turned = f"; turned most: {most.layer} by {most.angle:.3g}°" if most and most.angle else ""
            one, moved = self.structure[name].get(point), self.drift[name].get(point)
            if one is None or moved is None:
                lines.append(f"{name}: {point} is not known{turned}")
                continue
            lines.append(
                f"{name} at {point}: cosine to {self.original} {moved.cosine:.3f}, structure (CKA) {one.cka:.3f}, "
                f"rank correlation {one.rank_correlation:.3f}, prompts told apart {one.told_apart:.0%}{turned}"
            )
        return lines + list(self.warnings)


@torch.no_grad()
def compare(
    files: Mapping[str, TowerFile],
    prompts: Sequence[Prompt],
    tokenize: Tokenize,
    *,
    device: torch.device,
    index: Index | None = None,
    vision: TowerFile | None = None,
    lender: TowerFile | None = None,
    cache: Path | None = None,
) -> Generator[Event, None, Comparison]:
    """Text encoders, the original first, by name: their weights, and what they make of prompts and captioned pictures.

    index, vision and cache: for pictures; all or none. lender: has the projection that the original's file may lack.
    Raises InputError for encoders of different shapes, fewer than two of them, and fewer than four prompts.
    """
    original, *others = files
    if not others:
        raise InputError("there is one text encoder alone; give the original and at least one other")
    if len(prompts) < LEAST:
        raise InputError(f"{len(prompts)} prompts are too few to compare by; give at least {LEAST}")
    check_alike(files[original], [files[name] for name in others])
    geometries, weights = {}, {}
    for done, (name, file) in enumerate(files.items()):
        yield progress("compare weights", done, len(files))
        geometries[name] = geometry(file.state)
        if name != original:
            weights[name] = weight_drift(file.state, files[original].state)
    yield progress("compare weights", len(files), len(files))
    towers, warnings = build_towers(files, lender)
    points = [point for point in READ_POINTS if point != "projected" or not warnings.get(original)]
    tokens = tokenize([prompt.text for prompt in prompts])
    some = tokens.ids[torch.linspace(0, len(tokens.ids) - 1, min(len(tokens.ids), DRIFT_PROMPTS)).long()]
    pairs, told = None, [*warnings.values(), *_doubts(files, prompts)]
    if index is not None and vision is not None and cache is not None:
        if "projected" not in points:
            raise InputError(f"{warnings[original]}; give the full original CLIP to compare with pictures")
        pictures_given = len(index)
        pictures, index, broken = yield from _pictures(files[original], vision, lender, index, cache, device)
        captions = tokenize(index.captions()).ids[first_captions(index.caption_counts)]
        told += [f"left out: {name} ({reason})" for name, reason in broken.items()]
        if pictures_given > PAIRS:
            told.append(f"{PAIRS} of {pictures_given} pictures are drawn, evenly taken")
    vectors, moved, texts = {}, {}, {}
    for done, (name, tower) in enumerate(towers.items()):
        yield progress("read prompts", done, len(towers))
        tower.to(device)
        seen = prompt_vectors(tower, tokens.ids)
        vectors[name] = {point: seen[point] for point in points}
        if name != original:
            moved[name] = {point: one for point, one in drift(tower, towers[original], some).items() if point in points}
        if index is not None and vision is not None:
            texts[name] = F.normalize(prompt_vectors(tower, captions)["projected"], dim=1)
        if name != original:
            tower.cpu()
    yield progress("read prompts", len(towers), len(towers))
    if texts:
        pairs = Pairs(F.normalize(pictures, dim=1), texts, vision.source)
    structure = {name: compare_structure(vectors[name], vectors[original]) for name in vectors}
    sources = {name: file.source for name, file in files.items()}
    found = tuple(prompts), vectors, structure, moved, pairs, tuple(dict.fromkeys(told))
    return Comparison(sources, geometries, weights, *found)


def _doubts(files: Mapping[str, TowerFile], prompts: Sequence[Prompt]) -> list[str]:
    """Why there is little to see."""
    original, *others = files
    same = [name for name in others if files[name].source.sha256 == files[original].source.sha256]
    doubts = [f"{name} and {original} hold the same weights" for name in same]
    if len(prompts) < FEW_PROMPTS:
        doubts.append(f"{len(prompts)} prompts are too few to judge CKA by; give {FEW_PROMPTS} or more")
    return doubts


def own_prompts(text: str) -> tuple[Prompt, ...]:
    """Prompts of a person: one a line, or kind, tab, prompt. Each is taken once; empty lines are not."""
    found: dict[str, Prompt] = {}
    for line in text.splitlines():
        kind, tab, prompt = line.partition("\t")
        if prompt := (prompt if tab else kind).strip():
            found.setdefault(prompt, Prompt(kind.strip() if tab else "prompts", prompt))
    return tuple(found.values())


def build_towers(
    files: Mapping[str, TowerFile], lender: TowerFile | None = None
) -> tuple[dict[str, TextTower], dict[str, str]]:
    """Frozen text towers, and what had to be lent to each, in sentences; the first file is the original.

    The original lends a projection and a last block to those that lack them, as `join` does. Where it has no projection
    itself and nobody lends one, there is a sentence for it, and its `projected` means nothing.
    """
    original = next(iter(files))
    first = files[original]
    if f"{STACK['text']}.{first.config.layers}" in first.source.missing:
        raise InputError(f"{first.source.path} ends before its last block; give the full original CLIP")
    said: dict[str, str] = {}
    lent = _projection(first)
    if lent is None and lender is not None:
        lent = _projection(lender, first.config.width)
    if lent is None:
        said[original] = f"{first.source.path} has no text_projection, so that projected is not compared"
        lent = torch.eye(first.config.width)
    towers = {}
    for name, file in files.items():
        own, state = _projection(file), text_part(file.state)
        if own is None or own.shape != lent.shape:
            own = lent
            if name != original and original not in said:
                said[name] = f"{file.source.path} has no usable text_projection; the original lends its own"
        if (missing := file.config.layers) < first.config.layers:
            head = f"{STACK['text']}.{missing}."
            state |= {n: t for n, t in first.state.items() if n.startswith(head)}
            said[name] = f"{file.source.path} ends before its last block; the original lends it"
        config = replace(file.config, layers=first.config.layers, embed_dim=lent.shape[1])
        towers[name] = load(TextTower, config, state | {"text_projection": own}).requires_grad_(False)
    return towers, said


def _projection(file: TowerFile, width: int | None = None) -> Tensor | None:
    """A file's projection where it may be a trained one."""
    own = file.state.get("text_projection")
    if own is None or projection_fault(own) or own.shape[0] != (width or file.config.width):
        return None
    return own


def _pictures(
    original: TowerFile, vision: TowerFile, lender: TowerFile | None, index: Index, cache: Path, device: torch.device
) -> Generator[Event, None, tuple[Tensor, Index, dict[str, str]]]:
    """Features of at most `PAIRS` pictures (N, E), evenly taken from the data set; and those that do not decode."""
    joined = join(original, vision, lender or original)
    places = torch.linspace(0, len(index) - 1, min(len(index), PAIRS)).long().tolist()
    chosen = replace(index, pictures=tuple(index.pictures[place] for place in places))
    index, features, broken = yield from embed_index(joined.build_vision().to(device), chosen, cache)
    return features[:], index, broken


# ---- pictures -------------------------------------------------------------------------------------------------------


def _plane(first: Tensor, umap: bool) -> tuple[Callable[[Tensor], Tensor], tuple[str, str]]:
    """A map that is laid through the original's points, and the names of its axes."""
    if umap:
        return fit_umap(first), ("UMAP 1, of the original", "UMAP 2, of the original")
    plane = fit_plane(first)
    names = (f"PC {axis} ({share:.0%} of original)" for axis, share in enumerate(plane.explained, start=1))
    return plane.of, tuple(names)


def _kinds(one: Comparison) -> list[str]:
    return [prompt.kind for prompt in one.prompts]


def _known(one: Comparison, point: str) -> dict[str, Tensor]:
    if point not in one.vectors[one.original]:
        raise InputError(f"{point} is not known: {'; '.join(one.warnings)}; choose another read point")
    return {name: vectors[point] for name, vectors in one.vectors.items()}


def _prompts(one: Comparison, point: str, umap: bool) -> Figure:
    from .plots import plot_prompts

    vectors = _known(one, point)
    place, labels = _plane(vectors[one.original], umap)
    return plot_prompts({name: place(each) for name, each in vectors.items()}, _kinds(one), labels)


def _pairs(one: Comparison, point: str, umap: bool) -> Figure:
    from .plots import plot_pairs

    if one.pairs is None:
        raise InputError("there are no pictures to draw; give a vision tower and captioned pictures")
    seen, texts = one.pairs.pictures, one.pairs.captions
    place, labels = _plane(torch.cat([seen, texts[one.original]]), umap)
    captions = {name: place(each) for name, each in texts.items()}
    return plot_pairs(place(seen), captions, range(len(seen)), labels)


def _similarity(one: Comparison, point: str, umap: bool) -> Figure:
    from .plots import plot_similarity

    matrices = {name: similarity(vectors) for name, vectors in _known(one, point).items()}
    return plot_similarity(matrices, _kinds(one), f"cosine of two prompts, {point}")


def _neighbours(one: Comparison, point: str, umap: bool) -> Figure:
    from .plots import plot_neighbours

    vectors, texts = _known(one, point), [prompt.text for prompt in one.prompts]
    most = CHANGED.get(len(one.weights), 3)
    changed = {name: neighbours(vectors[one.original], vectors[name], texts, most) for name in one.weights}
    return plot_neighbours(changed, f"Prompts whose nearest other prompt changed most, at {point}")


def _drift_map(one: Comparison, point: str, umap: bool) -> Figure:
    from .plots import plot_drift_map

    return plot_drift_map(one.weights)


def _drift_lines(one: Comparison, point: str, umap: bool) -> Figure:
    from .plots import plot_drift_lines

    return plot_drift_lines(one.weights)


def _distributions(one: Comparison, point: str, umap: bool) -> Figure:
    from .plots import plot_distributions

    return plot_distributions(one.geometries)


def _layers(one: Comparison, point: str, umap: bool) -> Figure:
    from .plots import plot_layers

    return plot_layers(one.geometries, one.weights)


# What can be drawn of a comparison: (comparison, read point, with UMAP in place of PCA) -> figure
PICTURES: dict[str, Callable[[Comparison, str, bool], Figure]] = {
    "weights by block": _drift_map,
    "weights over blocks": _drift_lines,
    "r and theta": _distributions,
    "r and theta by block": _layers,
    "prompts": _prompts,
    "prompt similarity": _similarity,
    "changed neighbours": _neighbours,
    "pictures and captions": _pairs,
}


def over_steps(folder: Path, history: Mapping[str, object]) -> Figure:
    """Recall and drift over the steps of a run, whose whole history is given. Raises InputError where it has none."""
    from .plots import plot_measures
    from .watch import checkpoints

    if not history["measures"]:
        raise InputError(f"the run {folder.name} has measured nothing; it needs held-out pictures")
    best = checkpoints(folder)["best"]
    return plot_measures(history, best["step"] if best else None)
