"""Is this text encoder broken, where, and for whom?"""

from __future__ import annotations

import json

import torch
from comfy_api.latest import io

from ..gmp.data.captions import Index
from ..gmp.diagnose import Pictures, diagnose
from ..gmp.diagnosis import as_document, lines
from ..gmp.events import finish
from ..gmp.layouts import TowerFile
from ..gmp.plots.diagnosis import plot_diagnosis
from . import host, routes
from .sockets import CATEGORY, TARGETS, Dataset, TextEncoder, VisionPart, VisionTower, as_image, original_text


class Diagnose(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GmPDiagnose",
            display_name="GmP Diagnose",
            category=CATEGORY,
            description="Tells whether a text encoder is broken, where, and for which diffusion model, held against "
            "the original: block by block and at every place that is read. Needs no pictures.",
            search_aliases=["is my clip broken", "check text encoder", "verdict", "health", "analyze TE", "gmp"],
            is_output_node=True,
            inputs=[
                TextEncoder.Input("text_encoder", tooltip="The text encoder to look at."),
                VisionTower.Input(
                    "original",
                    tooltip="The original CLIP, from Load Vision Tower; its file must have the text tower too.",
                ),
                io.Combo.Input(
                    "target",
                    options=list(TARGETS),
                    default=next(iter(TARGETS)),
                    tooltip="The diffusion model that the verdict and the suggested repair are for.",
                ),
                Dataset.Input(
                    "dataset",
                    optional=True,
                    tooltip="Captioned pictures, at least 100: measures the alignment with vision, which is only "
                    "guessed without them.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="The verdict, what was trained, and every part."),
                io.String.Output(display_name="json", tooltip="All numbers, as a measurement document."),
                io.Image.Output(display_name="image", tooltip="Parts by measures, in the colours of the verdict."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, text_encoder: TowerFile, original: VisionPart, target: str, dataset: Index | None = None
    ) -> io.NodeOutput:
        known = original_text(original)
        host.make_room(2 * sum(tensor.nbytes for tensor in text_encoder.state.values()))
        with torch.inference_mode(False):
            events = diagnose(
                text_encoder,
                known,
                target=TARGETS[target],
                tokenize=host.tokenizer(text_encoder.source.member, text_encoder.config.context_length),
                pictures=dataset and Pictures(original.vision, dataset, host.cache_folder()),
                device=host.device(),
            )
            found = finish(events, host.Progress().hear)
            image = as_image(plot_diagnosis(found))
        words = lines(found)
        shown = words[: -len(found.parts)]  # every part is in the picture
        shown.append("part by part: the outputs image and text")
        document = json.dumps(as_document(found), allow_nan=False)
        plain = "\n· ".join(shown).replace("`", "")  # one canvas shows these, the other in colours hard to read
        return routes.with_text(cls, plain, "\n".join(words), document, image)
