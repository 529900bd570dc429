"""What a diagnosis holds, as a document and as lines for a person."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from .evaluate import Document, document
from .layouts import TowerFile
from .structure import Structure
from .trained import Trained
from .verdict import (
    Alignment,
    Reading,
    Verdict,
    alignment_clause,
    coherence,
    distance,
    targets,
)


@dataclass(frozen=True)
class Part:
    """One step of the computation: its weights, and the states after it. None: there are none, or not finite."""

    name: str  # embeddings, block 0, …, final LayerNorm, projection
    state: str  # untouched: none of its tensors has moved; moved; damaged
    tensors: int  # that both files have
    moved: int
    change: float  # ‖now - then‖ / ‖then‖ over all of its tensors
    r: float | None  # relative change of the lengths of rows, of the matrix where it is largest
    angle: float | None  # degrees that rows have turned by on average, likewise
    vectors: float | None  # ‖now - then‖ / ‖then‖ of biases and LayerNorms
    error: float | None  # root of the mean squared distance of states over the original's spread
    cosine: float | None  # of states to the original's, mean over the rows of all prompts
    structure: Structure | None  # of prompts, against the original's
    original: Structure


@dataclass(frozen=True)
class Diagnosis:
    """All that was found."""

    encoder: TowerFile
    original: TowerFile
    vision: TowerFile | None
    target: str
    trained: Trained
    parts: tuple[Part, ...]
    readings: dict[str, Reading]  # by read point
    alignment: Alignment
    retrieval: dict[str, object] | None  # of the encoder, as measurement documents have it
    verdict: Verdict
    warnings: tuple[str, ...]


def readers(found: Diagnosis, point: str) -> tuple[str, ...]:
    """The diffusion models that read this encoder there."""
    models = targets(found.encoder.source.member).values()
    return tuple(model.name for model in models if point in model.read_points)


def as_document(found: Diagnosis) -> Document:
    """A measurement document of kind "diagnosis"."""
    trained = asdict(found.trained) | {"moved": len(found.trained.moved)}
    structure = {p: asdict(one.structure) for p, one in found.readings.items() if one.structure}
    preset = found.verdict.preset
    verdict = asdict(replace(found.verdict, preset=None)) | {
        "preset": preset and {"name": preset.name, "when": preset.when, "settings": preset.config.to_json()},
        "target": found.target,
        "alignment": asdict(found.alignment) | {"text": alignment_clause(found.alignment)},
        "read_points": {
            point: {name: value for name, value in asdict(one).items() if name != "structure"}
            | {"text": _reading(one), "read_by": readers(found, point)}
            for point, one in found.readings.items()
        },
    }
    return document(
        "diagnosis",
        found.encoder.source,
        found.original.source,
        found.vision and found.vision.source,
        retrieval=found.retrieval,
        structure=structure or None,
        blocks=[asdict(part) for part in found.parts],
        trained=trained,
        verdict=verdict,
        warnings=list(found.warnings),
    )


def _reading(one: Reading) -> str:
    return f"{one.state}: {coherence(one)}, {distance(one)}" if one.state != "untouched" else "untouched"


def lines(found: Diagnosis) -> list[str]:
    """The diagnosis as a person reads it: verdict, advice, what was trained, what is read, part by part."""
    verdict = found.verdict
    result = [verdict.text, verdict.advice, *verdict.unknown, *found.warnings]
    if (seen := found.alignment).recall_at_1 is not None:
        recalls = f"{seen.recall_at_1:.3f}, the original's {seen.original_recall_at_1:.3f}"
        result.append(f"Recall@1 on {seen.images} pictures, mean of both directions: {recalls}")
    result.append(f"Trained: {found.trained.text}")
    for point, one in found.readings.items():
        models = " and ".join(readers(found, point)) or "no diffusion model"
        result.append(f"{point} (read by {models}): {_reading(one)}")
    result += [_line(part) for part in found.parts]
    return result


def _line(part: Part) -> str:
    words = [f"weights changed by {part.change:.2%}"] if part.moved else []
    words += [f"rows turned by up to {part.angle:.1f}°"] if part.moved and part.angle is not None else []
    words += [f"their lengths by {part.r:.1%}"] if part.moved and part.r is not None else []
    if part.structure is None or part.cosine is None:
        words.append("states are not finite")
    else:
        words.append(f"states: cosine {part.cosine:.3f}, error {part.error:.2f}")
        words.append(f"prompts: CKA {part.structure.cka:.2f}, rank correlation {part.structure.rank_correlation:.2f}")
    return f"{part.name}: {part.state}; {', '.join(words)}"
