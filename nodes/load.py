"""The two halves of a CLIP: a text encoder, from a file or a CLIP, and a vision tower."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..gmp.layouts import Source, read_lender, read_text, read_vision
from . import host, routes
from .sockets import CATEGORY, TextEncoder, VisionPart, VisionTower


def _shape_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            "heads",
            default=0,
            min=0,
            max=64,
            step=1,
            optional=True,
            advanced=True,
            tooltip="Attention heads. 0 finds out: they are in no tensor, but every published CLIP is known.",
        ),
        io.Combo.Input(
            "activation",
            options=["auto", "quick_gelu", "gelu"],
            default="auto",
            optional=True,
            advanced=True,
            tooltip="Activation of the MLPs: quick_gelu in OpenAI's CLIPs, gelu in LAION's. auto goes by the family.",
        ),
    ]


def _shape(heads: int, activation: str) -> dict[str, object]:
    return {"heads": heads or None, "activation": None if activation == "auto" else activation}


def _facts(source: Source) -> str:
    lines = [
        f"{source.path}: {source.member or 'vision tower'}, layout {source.layout}",
        *source.assumptions,
        *source.notes,
    ]
    if source.missing:
        lines.append(f"not in it: {', '.join(source.missing)}")
    return "\n· ".join(lines)


class LoadTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GmPLoadTextEncoder",
            display_name="Load Text Encoder (GmP)",
            category=CATEGORY,
            description="Reads the CLIP text encoder to repair, in full precision, from its own file, a full CLIP, an "
            "SDXL, SD1, SD2 or SD3 checkpoint, or a diffusers folder. Tells what the file holds before anything is "
            "queued, and what had to be assumed.",
            search_aliases=["clip loader", "text encoder", "TE", "clip_l", "clip_g", "gmp", "fine-tune clip"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.menu("text"),
                    tooltip="A file of models/text_encoders; or a checkpoint, a diffusers folder or a GmP file, below "
                    "the name of their folder.",
                ),
                io.Combo.Input(
                    "member",
                    options=["auto", *host.MEMBERS],
                    default="auto",
                    tooltip="Which text encoder, where the file holds several. auto takes the only one, or clip_l.",
                ),
                *_shape_inputs(),
                io.Int.Input(
                    "end_of_text",
                    default=0,
                    min=0,
                    max=1_000_000,
                    step=1,
                    optional=True,
                    advanced=True,
                    tooltip="Only for a vocabulary that was extended: the id of the token that ends a caption and is "
                    "pooled. 0 finds out, as the config says or else the largest id of the caption.",
                ),
            ],
            outputs=[TextEncoder.Output(display_name="text_encoder", tooltip="The text encoder in full precision.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **_) -> str:
        return host.stamp(host.model_path("text", file))

    @classmethod
    def execute(
        cls, file: str, member: str, heads: int = 0, activation: str = "auto", end_of_text: int = 0
    ) -> io.NodeOutput:
        with torch.inference_mode(False):
            path = host.model_path("text", file)
            wanted = None if member == "auto" else member
            encoder = read_text(path, wanted, **_shape(heads, activation), end_of_text=end_of_text or None)
        return routes.with_text(cls, _facts(encoder.source), encoder)


class TextEncoderFromCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GmPTextEncoderFromCLIP",
            display_name="Text Encoder from CLIP (GmP)",
            category=CATEGORY,
            description="Takes a text encoder out of a CLIP as it works now, LoRAs included. To give the repaired one "
            "back, connect the CLIP from before these LoRAs to Apply to CLIP.",
            search_aliases=["extract text encoder", "clip to text encoder", "bake lora", "TE", "gmp"],
            inputs=[
                io.Clip.Input("clip", tooltip="A CLIP with clip_l, clip_g or clip_h."),
                io.Combo.Input(
                    "member",
                    options=["auto", *host.MEMBERS],
                    default="auto",
                    tooltip="Which of its text encoders. auto takes the only one, or clip_l.",
                ),
            ],
            outputs=[TextEncoder.Output(display_name="text_encoder", tooltip="The text encoder in full precision.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, clip, member: str) -> io.NodeOutput:
        with torch.inference_mode(False):
            encoder = host.read_clip(clip, host.member_of(clip, member))
        return routes.with_text(cls, _facts(encoder.source), encoder)


class LoadVisionTower(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GmPLoadVisionTower",
            display_name="Load Vision Tower (GmP)",
            category=CATEGORY,
            description="Reads the vision tower that the text encoder was trained with. Best is the full original "
            "CLIP: its own text tower then lends the projection that text-encoder files lack, "
            "and keeps the repair anchored. Tells what the file holds before anything is queued.",
            search_aliases=["clip vision", "image encoder", "original clip", "ViT-L-14", "gmp"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.menu("vision"),
                    tooltip="A file of models/clip_vision; or a full CLIP in models/text_encoders, a checkpoint, a "
                    "model folder or a GmP file, below the name of their folder.",
                ),
                *_shape_inputs(),
            ],
            outputs=[
                VisionTower.Output(
                    display_name="vision_tower",
                    tooltip="The vision tower, and the original text tower where there is one.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **_) -> str:
        return host.stamp(host.model_path("vision", file))

    @classmethod
    def execute(cls, file: str, heads: int = 0, activation: str = "auto") -> io.NodeOutput:
        with torch.inference_mode(False):
            path = host.model_path("vision", file)
            vision = read_vision(path, **_shape(heads, activation))
            original, lends = read_lender(path, **_shape(0, activation))  # the heads asked for are the vision tower's
        return routes.with_text(cls, f"{_facts(vision.source)}\n· {lends}", VisionPart(vision, original))
