"""Everything that can be measured of a text encoder against captioned pictures."""

from __future__ import annotations

import json

import torch
from comfy_api.latest import io

from ..gmp.data.captions import Index
from ..gmp.data.classes import Classes, read_classes
from ..gmp.errors import InputError
from ..gmp.evaluate import evaluate
from ..gmp.events import Event, finish
from ..gmp.layouts import TowerFile
from ..gmp.measurement import lines
from . import host, routes
from .sockets import CATEGORY, ClipParts, Dataset, ReassembledCLIP, TextEncoder

NO_CLASSES = "(none)"


def _classes(folder: str) -> Classes | None:
    if folder == NO_CLASSES:
        return None
    try:
        return read_classes(host.input_path(folder))
    except InputError as error:
        raise InputError(host.without_folders(str(error))) from None


class MeasureCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GmPMeasureCLIP",
            display_name="Measure CLIP (GmP)",
            category=CATEGORY,
            description="Measures a text encoder on captioned pictures, with confidence intervals: retrieval, "
            "alignment, calibration, and what became of it at every place where a diffusion model reads it.",
            search_aliases=["evaluate clip", "recall", "retrieval", "zero-shot", "modality gap", "benchmark", "gmp"],
            is_output_node=True,
            inputs=[
                ReassembledCLIP.Input(
                    "gmp_clip", tooltip="The CLIP to measure. Its original is what the read points are compared with."
                ),
                Dataset.Input(
                    "dataset", tooltip="Captioned pictures, best such that were not trained on; 100 or more."
                ),
                TextEncoder.Input(
                    "text_encoder",
                    optional=True,
                    tooltip="Another encoder to measure in place of the gmp_clip's own, such as its repair. What it "
                    "changed is then told too.",
                ),
                io.Combo.Input(
                    "classes",
                    options=[NO_CLASSES, *(name for name in host.input_folders() if name != host.NOTHING)],
                    default=NO_CLASSES,
                    optional=True,
                    advanced=True,
                    tooltip="Zero-shot classification: a folder in ComfyUI's input folder with a folder of pictures "
                    "for each class.",
                ),
                io.Boolean.Input(
                    "typographic",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Write words on pictures: does the CLIP read instead of looking?",
                ),
                io.Boolean.Input(
                    "relations",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Hold captions against false ones of the same words: left for right, one thing's colour "
                    "for the other's, two for three, small for large.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="What the node shows, as a table."),
                io.String.Output(display_name="json", tooltip="The measurement document, with every number."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        gmp_clip: ClipParts,
        dataset: Index,
        text_encoder: TowerFile | None = None,
        classes: str = NO_CLASSES,
        typographic: bool = False,
        relations: bool = False,
    ) -> io.NodeOutput:
        text = gmp_clip.text
        encoders = {"before": text, "encoder": text_encoder} if text_encoder else {"encoder": text}
        progress = host.Progress()

        def hear(event: Event) -> None:
            if event["type"] == "progress":
                progress.show(event["done"], event["total"])
            host.raise_if_interrupted()

        towers = (text, gmp_clip.vision, *((gmp_clip.original,) if gmp_clip.original else ()))
        host.make_room(sum(tensor.nbytes for tower in towers for tensor in tower.state.values()))
        with torch.inference_mode(False):
            found = finish(
                evaluate(
                    encoders,
                    gmp_clip.vision,
                    gmp_clip.original,
                    dataset,
                    host.tokenizer(text.source.member, text.config.context_length),
                    cache=host.cache_folder(),
                    device=host.device(),
                    classes=_classes(classes),
                    typographic=typographic,
                    relations=relations,
                ),
                hear,
            )["encoder"]
        told = lines(found)
        shown = "\n· ".join(" ".join(line.split()) for line in told)
        return routes.with_text(cls, shown, "\n".join(told), json.dumps(found, allow_nan=False))
