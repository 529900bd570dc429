"""Everything that can be measured of a text encoder against captioned pictures, and pictures of classes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from comfy_api.latest import io

from ..gmp.data.captions import Index
from ..gmp.data.classes import read_classes
from ..gmp.errors import InputError
from ..gmp.evaluate import evaluate
from ..gmp.events import finish
from ..gmp.layouts import TowerFile
from ..gmp.measurement import lines
from ..gmp.plots.confusion import plot_confusion, plot_no_classes
from ..gmp.zero_shot import read_templates
from . import host, routes
from .sockets import CATEGORY, ClipParts, Dataset, ReassembledCLIP, TextEncoder, as_image

NO_CLASSES = "(none)"
SHIPPED = "(shipped)"
Read = TypeVar("Read")


def _read(reader: Callable[[Path], Read], name: str) -> Read:
    try:
        return reader(host.input_path(name))
    except InputError as error:
        raise InputError(host.without_folders(str(error))) from None


class MeasureCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GmPMeasureCLIP",
            display_name="Measure CLIP (GmP)",
            category=CATEGORY,
            description="Measures a text encoder, with confidence intervals: on captioned pictures retrieval, "
            "alignment and calibration, on pictures of classes zero-shot classification; and what became of it at "
            "every place where a diffusion model reads it.",
            search_aliases=[
                "evaluate clip",
                "recall",
                "retrieval",
                "zero-shot",
                "classification",
                "confusion matrix",
                "modality gap",
                "benchmark",
                "gmp",
            ],
            is_output_node=True,
            inputs=[
                ReassembledCLIP.Input(
                    "gmp_clip", tooltip="The CLIP to measure. Its original is what the read points are compared with."
                ),
                Dataset.Input(
                    "dataset",
                    optional=True,
                    tooltip="Captioned pictures, best such that were not trained on; 100 or more. May be left open "
                    "where classes are chosen.",
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
                io.Combo.Input(
                    "templates",
                    options=[SHIPPED, *host.input_files(".txt")],
                    default=SHIPPED,
                    optional=True,
                    advanced=True,
                    tooltip="Prompts for the names of classes: a text file in ComfyUI's input folder, one prompt a "
                    "line, with a pair of empty braces for the name.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="What the node shows, as a table."),
                io.String.Output(display_name="json", tooltip="The measurement document, with every number."),
                io.Image.Output(
                    display_name="confusion",
                    tooltip="Which classes are taken for which, for Preview Image or Save Image. Without classes it "
                    "says so in words.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, classes: str = NO_CLASSES, templates: str = SHIPPED, **_) -> str:
        """Changes with the pictures of classes and with the templates."""
        chosen = [name for name, none in ((classes, NO_CLASSES), (templates, SHIPPED)) if name and name != none]
        stamps = "\n".join(host.stamp(host.input_path(name)) for name in chosen)
        return hashlib.sha256(stamps.encode("utf-8", "surrogatepass")).hexdigest()

    @classmethod
    def execute(
        cls,
        gmp_clip: ClipParts,
        dataset: Index | None = None,
        text_encoder: TowerFile | None = None,
        classes: str = NO_CLASSES,
        typographic: bool = False,
        relations: bool = False,
        templates: str = SHIPPED,
    ) -> io.NodeOutput:
        if dataset is None and classes == NO_CLASSES:
            raise InputError("There is nothing to measure on: connect a dataset, or choose a folder of classes.")
        text = gmp_clip.text
        encoders = {"before": text, "encoder": text_encoder} if text_encoder else {"encoder": text}
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
                    classes=None if classes == NO_CLASSES else _read(read_classes, classes),
                    templates=None if templates == SHIPPED else _read(read_templates, templates),
                    typographic=typographic,
                    relations=relations,
                ),
                host.Progress().hear,
            )["encoder"]
        told = lines(found.document)
        head, *rows = (" ".join(line.split()) for line in told)
        rows.sort(key=lambda row: not row.startswith("note: "))  # what forbids a conclusion stands before the numbers
        shown = "\n· ".join([head, *rows])
        figure = plot_confusion(found.zero_shot) if found.zero_shot else plot_no_classes()
        image = as_image(figure)
        return routes.with_text(cls, shown, "\n".join(told), json.dumps(found.document, allow_nan=False), image)
