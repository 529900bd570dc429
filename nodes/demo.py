"""The shipped small world: all that a repair needs, without a download."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..gmp.data.captions import read_index
from ..gmp.join import join
from ..gmp.layouts import read_text, read_vision
from ..gmp.world.models import ASSETS, ORIGINAL, RUINED
from ..gmp.world.write import CAPTIONS_FILE, write_world
from . import host, routes
from .sockets import CATEGORY, Dataset, TextEncoder, VisionPart, VisionTower

SEED = 0


class DemoWorld(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GmPDemoWorld",
            display_name="Demo World (GmP)",
            category=CATEGORY,
            description="A small CLIP that knows coloured shapes, its text encoder ruined, and captioned pictures to "
            "repair it with. Everything is shipped or drawn; nothing is downloaded.",
            search_aliases=["example", "demo", "toy clip", "test data", "gmp"],
            inputs=[
                io.Int.Input(
                    "pictures",
                    default=4000,
                    min=64,
                    max=20000,
                    step=64,
                    tooltip="How many pictures to draw, once, into the user folder: 4000 take a few seconds.",
                )
            ],
            outputs=[
                TextEncoder.Output(display_name="text_encoder", tooltip="The ruined text encoder."),
                VisionTower.Output(display_name="vision_tower", tooltip="The original CLIP."),
                Dataset.Output(display_name="dataset", tooltip="Pictures of coloured shapes with captions."),
                io.Clip.Output(display_name="clip", tooltip="The ruined text encoder as ComfyUI's CLIP."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, pictures: int) -> io.NodeOutput:
        folder = host.cache_folder() / "world" / f"{pictures}_{SEED}"
        progress = host.Progress()
        for event in write_world(folder, pictures, SEED):
            progress.show(event["done"], event["total"])
            host.raise_if_interrupted()
        with torch.inference_mode(False):
            ruined, original = read_text(ASSETS / RUINED), read_text(ASSETS / ORIGINAL)
            part = VisionPart(read_vision(ASSETS / ORIGINAL), original)
            projection = join(ruined, part.vision, original).state["text_projection"]
        clip = host.build_clip(ruined.state | {"text_projection": projection}, ruined.config)
        index = read_index(folder, folder / CAPTIONS_FILE)
        words = f"{len(index)} pictures of {len(set(index.captions()))} different captions"
        return routes.with_text(cls, words, ruined, part, index, clip)
