"""Text encoder + vision tower = CLIP."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..gmp.join import join
from ..gmp.layouts import TowerFile
from . import routes
from .sockets import CATEGORY, ClipParts, ReassembledCLIP, TextEncoder, VisionPart, VisionTower


class ReassembleCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GmPReassembleCLIP",
            display_name="Reassemble CLIP (GmP)",
            category=CATEGORY,
            description="Puts a text encoder and a vision tower together as one CLIP that can be trained, and tells "
            "where every part came from. Towers that do not belong together are refused.",
            search_aliases=["join clip", "merge towers", "full clip", "gmp"],
            inputs=[
                TextEncoder.Input("text_encoder", tooltip="The text encoder to repair."),
                VisionTower.Input("vision_tower", tooltip="The vision tower that it was trained with."),
                TextEncoder.Input(
                    "original",
                    optional=True,
                    tooltip="The text encoder from before it broke, where the vision tower's file has none or another "
                    "is to lend the text projection and the logit scale, and to be the anchor.",
                ),
            ],
            outputs=[ReassembledCLIP.Output(display_name="gmp_clip", tooltip="A whole CLIP, for GmP Repair.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, text_encoder: TowerFile, vision_tower: VisionPart, original: TowerFile | None = None
    ) -> io.NodeOutput:
        parts = ClipParts(text_encoder, vision_tower.vision, original or vision_tower.original)
        with torch.inference_mode(False):
            joined = join(parts.text, parts.vision, parts.original)
        anchor = f"anchor ← {parts.original.source.path}" if parts.original else "anchor: none, no file has an original"
        lines = [f"{origin.name} ← {origin.source}: {origin.reason}" for origin in joined.report]
        return routes.with_text(cls, "\n· ".join([*lines, anchor, *joined.assumptions]), parts)
