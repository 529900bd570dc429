"""What is in a data set, and what is wrong with it, before it trains."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace

import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image

from ..gmp.data.captions import Index
from ..gmp.dataset_report.clean import Cleaned, clean, told, write_fixes
from ..gmp.dataset_report.findings import OPTIONAL, USUAL
from ..gmp.dataset_report.page import page, plot_lengths
from ..gmp.dataset_report.report import Report, examine, lines, remarks, summary
from ..gmp.dataset_report.sheet import contact_sheet
from ..gmp.errors import InputError
from ..gmp.events import finish
from ..gmp.files import write_bytes
from ..gmp.join import Joined, join
from . import host, routes
from .sockets import CATEGORY, Dataset, VisionPart, VisionTower, as_image, original_text

_OPTION = re.compile(r" \(--[\w-]+\)")  # of the command line, behind what a sentence says


class DatasetReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GmPDatasetReport",
            display_name="Dataset Report (GmP)",
            category=CATEGORY,
            description="Looks at every picture and caption before anything trains: what is there, what is wrong with "
            "it, what that means for a repair, and the data set without it. No file of yours is changed.",
            search_aliases=[
                "check dataset",
                "broken images",
                "duplicates",
                "caption length",
                "contact sheet",
                "clean dataset",
                "gmp",
            ],
            is_output_node=True,
            inputs=[
                Dataset.Input("dataset", tooltip="Captioned pictures."),
                VisionTower.Input(
                    "vision_tower",
                    optional=True,
                    tooltip="The original CLIP, from Load Vision Tower, whose file has the text tower too: looks for "
                    "captions that hardly fit their picture. Every picture is embedded once for it.",
                ),
                io.String.Input(
                    "leave_out",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="What the cleaned data set lacks besides what cannot be trained on, separated by commas: "
                    f"{', '.join(OPTIONAL)}.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="All findings, what they mean, and what to do."),
                io.Image.Output(
                    display_name="contact_sheet", tooltip="A sample of the data set, and pictures of every finding."
                ),
                io.Image.Output(display_name="lengths", tooltip="Captions by their length in CLIP's tokens."),
                Dataset.Output(
                    display_name="cleaned",
                    tooltip="The data set without pictures that cannot be read, and with the captions of equal "
                    "pictures at one of them, for GmP Repair.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, dataset: Index, vision_tower: VisionPart | None = None, leave_out: str = "") -> io.NodeOutput:
        also = [name.strip() for name in leave_out.split(",") if name.strip()]
        _check(also, vision_tower)
        with torch.inference_mode(False):
            found = _examined(dataset, vision_tower)
            sheet = contact_sheet(found)
            cleaned = clean(found, also)
            pixels = torch.from_numpy(np.asarray(sheet, dtype=np.float32) / 255)[None]  # (1, H, W, 3)
            lengths = as_image(plot_lengths(found))
        saved, kept = _save(found, sheet), f"cleaned: {told(cleaned)}"
        full = [_OPTION.sub("", line) for line in lines(found)]
        shown = "\n· ".join([*_short(found), kept, saved])
        return routes.with_text(cls, shown, "\n".join([*full, "", kept]), pixels, lengths, _index(dataset, cleaned))


def _check(also: list[str], vision_tower: VisionPart | None) -> None:
    """Raises InputError for kinds of findings that cannot be left out, before anything is looked at."""
    if strangers := [name for name in also if name not in OPTIONAL]:
        raise InputError(f"leave_out names {', '.join(strangers)}; it takes {', '.join(OPTIONAL)}, with commas.")
    if "wrong_pairs" in also and vision_tower is None:
        raise InputError("leave_out names wrong_pairs, which the original CLIP tells: connect it as vision_tower.")


def _examined(dataset: Index, vision_tower: VisionPart | None) -> Report:
    clip, tokenize, limits = None, None, USUAL
    if vision_tower is not None:
        clip = _whole(vision_tower)
        host.make_room(sum(tensor.nbytes for tensor in clip.state.values()))
        text = clip.config.text
        tokenize = host.tokenizer(original_text(vision_tower).source.member, text.context_length)
        limits = replace(USUAL, size=clip.config.vision.image_size, context=text.context_length)
    work = examine(dataset, host.cache_folder(), limits, clip=clip, tokenize=tokenize, device=host.device())
    try:
        return finish(work, host.Progress().hear)
    except InputError as error:
        raise InputError(host.without_folders(str(error))) from None


def _whole(vision_tower: VisionPart) -> Joined:
    text = original_text(vision_tower)
    return join(text, vision_tower.vision, text)


def _short(found: Report) -> list[str]:
    """What the node shows: how many of what was found. What it means, and which pictures, is in the output."""
    counts = [f"{finding.kind.title}: {len(finding):,}" for finding in found.findings if len(finding)]
    return [summary(found), *counts, *remarks(found), *(_OPTION.sub("", n) for n in found.notes)]


def _save(found: Report, sheet: Image.Image) -> str:
    """The page and the list of fixes, in the output folder; says where."""
    pictures = [(picture.path, picture.captions) for picture in found.index.pictures]
    key = hashlib.sha256(repr(pictures).encode("utf-8", "surrogatepass")).hexdigest()[:8]
    folder = host.reports_folder()
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{re.sub(r'[^0-9A-Za-z_-]+', '_', found.index.root.name) or 'pictures'}_{key}"
    write_bytes(page(found, sheet).encode("utf-8", "backslashreplace"), folder / f"{name}.html")
    write_fixes(found, folder / f"{name}.csv")
    return f"the whole report, and what to do about each picture: {folder.name}/{name}.html and .csv, in output"


def _index(dataset: Index, cleaned: Cleaned) -> Index:
    """The data set as it was cleaned; how often pictures are visited stays."""
    kept = [
        replace(picture, captions=tuple(cleaned.captions[picture.path]))
        for picture in dataset.pictures
        if picture.path in cleaned.captions
    ]
    return replace(dataset, pictures=tuple(kept))
