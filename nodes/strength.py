"""How much of a repair to take: a blend of text encoders, and the scan that suggests its strength."""

from __future__ import annotations

import json

import torch
from comfy_api.latest import io

from ..gmp.blend import ALONG, STRONGEST, blend_encoders
from ..gmp.data.captions import Index
from ..gmp.errors import InputError
from ..gmp.events import finish
from ..gmp.layouts import TowerFile
from ..gmp.plots.strength import plot_scan
from ..gmp.strength import POINTS, Curve, Point, Scan, even, scan
from . import host, routes
from .sockets import (
    CATEGORY,
    TARGETS,
    ClipParts,
    Dataset,
    ReassembledCLIP,
    TextEncoder,
    VisionPart,
    as_image,
    original_input,
    original_text,
)

_ALONG = (
    "What moves. weights: every weight in a straight line. r_and_theta: the MLPs' rows by length and direction. "
    "r, theta: only one of the two; strength 1 is then not the repair."
)


class BlendTextEncoders(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GmPBlendTextEncoders",
            display_name="Blend Text Encoders (GmP)",
            category=CATEGORY,
            description="Takes part of a repair: a text encoder between the broken one and the repaired one, a little "
            "past it, or on the way back to the original. Strength Scan suggests how much.",
            search_aliases=["merge text encoders", "interpolate", "slerp", "wise-ft", "strength", "gmp"],
            inputs=[
                TextEncoder.Input("broken", tooltip="The text encoder before the repair."),
                TextEncoder.Input("repaired", tooltip="The text encoder after it."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=STRONGEST,
                    step=0.01,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="0: broken. 1: repaired. Above 1: past the repair, in the same direction.",
                ),
                io.Float.Input(
                    "toward_original",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="From that blend, the share of the way to the original; above 0 it needs original.",
                ),
                io.Combo.Input("along", options=list(ALONG), default=ALONG[0], tooltip=_ALONG),
                original_input(True, "The full original CLIP, from Load Vision Tower; only for toward_original."),
            ],
            outputs=[
                TextEncoder.Output(
                    display_name="text_encoder", tooltip="The blend, for Apply to CLIP or Save Text Encoder."
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        broken: TowerFile,
        repaired: TowerFile,
        strength: float,
        toward_original: float,
        along: str,
        original: TowerFile | VisionPart | None = None,
    ) -> io.NodeOutput:
        if toward_original and original is None:
            raise InputError(
                f"toward_original is {toward_original:g} and there is no original text encoder: connect a full CLIP "
                "from Load Vision Tower to original, or set it to 0."
            )
        with torch.inference_mode(False):
            corner = original_text(original) if toward_original else None
            made = blend_encoders(broken, repaired, strength, along, corner, toward_original)
        return routes.with_text(cls, made.source.notes[-1], made)


class StrengthScan(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GmPStrengthScan",
            display_name="Strength Scan (GmP)",
            category=CATEGORY,
            description="Measures a repair at growing strength and suggests how much of it to take: the smallest "
            "strength with nearly all of the gain, in recall and in how prompts are arranged where the diffusion model "
            "reads, never in one of them alone.",
            search_aliases=["how much", "best strength", "wise-ft", "knee", "blend", "gmp"],
            is_output_node=True,
            inputs=[
                ReassembledCLIP.Input("gmp_clip", tooltip="The broken CLIP, from Reassemble CLIP, with its original."),
                TextEncoder.Input("repaired", tooltip="The repaired text encoder."),
                io.Combo.Input(
                    "target",
                    options=list(TARGETS),
                    default=next(iter(TARGETS)),
                    tooltip="Which diffusion model the encoder is for: at its read point the gain counts.",
                ),
                io.Combo.Input("along", options=list(ALONG), default=ALONG[0], tooltip=_ALONG),
                Dataset.Input(
                    "dataset",
                    optional=True,
                    tooltip="Captioned pictures, to measure recall too. Of those that the repair was trained on, only "
                    "the held-out ones are taken.",
                ),
                io.Int.Input(
                    "points",
                    default=POINTS,
                    min=3,
                    max=61,
                    step=1,
                    optional=True,
                    advanced=True,
                    tooltip="How many strengths from 0 to 1.2 are measured. More take longer.",
                ),
            ],
            outputs=[
                TextEncoder.Output(
                    display_name="text_encoder",
                    tooltip="The blend at the suggested strength; the repair itself where none is suggested.",
                ),
                io.Float.Output(display_name="strength", tooltip="The suggested strength; 1 where none is suggested."),
                io.Image.Output(display_name="image", tooltip="Recall, structure and drift over the strength."),
                io.String.Output(display_name="json", tooltip="Every number, as a measurement document."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        gmp_clip: ClipParts,
        repaired: TowerFile,
        target: str,
        along: str,
        dataset: Index | None = None,
        points: int = POINTS,
    ) -> io.NodeOutput:
        if gmp_clip.original is None:
            raise InputError(
                f"{gmp_clip.vision.source.path} has no text tower to measure against: load the full original CLIP as "
                "vision tower, or connect original to Reassemble CLIP."
            )
        with torch.inference_mode(False):
            host.make_room(_needed(gmp_clip))
            broken = gmp_clip.text
            events = scan(
                broken,
                repaired,
                gmp_clip.original,
                gmp_clip.vision,
                host.tokenizer(broken.source.member, broken.config.context_length),
                dataset,
                target=TARGETS[target],
                along=(along,),
                strengths=even(points),
                cache=host.cache_folder(),
                device=host.device(),
            )
            found = finish(events, host.Progress().hear)
            suggested = found.suggested.strength
            strength = 1.0 if suggested is None else suggested
            made = blend_encoders(broken, repaired, strength, along)
        image = as_image(plot_scan(found))
        text = json.dumps(found.as_json(), allow_nan=False)
        return routes.with_text(cls, "\n· ".join(words(found)), made, strength, image, text)


def _needed(parts: ClipParts) -> int:
    """Bytes of the towers on the device, and as many again for what they compute."""
    states = [parts.text.state, parts.original.state, parts.vision.state]
    return 2 * sum(tensor.numel() * 4 for state in states for tensor in state.values())


def words(found: Scan) -> list[str]:
    """What the node shows. The page's button reads strength and way in the first line."""
    curve = found.curves[0]
    suggested = curve.suggested
    if suggested.strength is None:
        lines = [f"no strength is suggested, the repair is passed on whole: {suggested.reason}"]
    else:
        lines = [f"suggested strength {suggested.strength:g} along {curve.along}: {suggested.reason}"]
    shown = dict.fromkeys((0.0, suggested.strength, 1.0))
    lines += [_line(found, curve, point) for point in curve.points if point.strength in shown]
    return lines + list(found.warnings)


def _line(found: Scan, curve: Curve, point: Point) -> str:
    parts = [] if point.recall is None else [f"recall@1 {point.recall.value:.3f}"]
    for name in found.read_points:
        structure = point.structure[name]
        parts.append(
            f"{name}: CKA {structure.cka:.3f}, rank correlation {structure.rank_correlation:.3f}, cosine to the "
            f"original {point.from_original[name].cosine:.3f}, to the broken one {point.from_broken[name].cosine:.3f}"
        )
    return f"at {point.strength:g}: " + "; ".join(parts)
