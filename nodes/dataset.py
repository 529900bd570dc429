"""Captioned pictures, from a folder or from ComfyUI's lists of images and texts."""

from __future__ import annotations

import hashlib

from comfy_api.latest import io
from PIL import Image

from ..gmp.data.captions import Index, read_index
from ..gmp.errors import InputError
from ..gmp.files import write_json
from . import host, routes
from .sockets import CATEGORY, Dataset

BESIDE = "text files beside the pictures"


def _report(index: Index) -> str:
    """What the data set holds, and of what the reader found, all that is not zero."""
    found = [line for line in str(index.report).split("\n") if not line.endswith(": 0")]
    return "\n· ".join([f"{len(index)} pictures with {sum(index.caption_counts)} captions", *found])


class CaptionDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GmPCaptionDataset",
            display_name="Caption Dataset (GmP)",
            category=CATEGORY,
            description="Captioned pictures of a folder in ComfyUI's input folder. No picture is loaded; captions are "
            "read, counted and checked.",
            search_aliases=["load dataset", "image caption pairs", "training data", "folder", "kohya", "gmp"],
            inputs=[
                io.Combo.Input("folder", options=host.input_folders(), tooltip="A folder in ComfyUI's input folder."),
                io.Combo.Input(
                    "captions",
                    options=[BESIDE, *host.input_files(".json")],
                    default=BESIDE,
                    tooltip="0001.txt beside 0001.png, a caption per line; or a JSON file that gives each "
                    "picture's path in the folder a list of captions.",
                ),
                io.Boolean.Input(
                    "missing_ok",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Leave out pictures that the JSON file names but the folder lacks, instead of an error.",
                ),
            ],
            outputs=[Dataset.Output(display_name="dataset", tooltip="Pictures and captions, for GmP Repair.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str, captions: str, **_) -> str:
        """Changes with any picture or caption file: names, sizes, times."""
        digest = hashlib.sha256()
        files = [path for path in host.input_path(folder).rglob("*") if path.is_file()]
        files += [] if captions == BESIDE else [host.input_path(captions)]
        for path in sorted(files):
            digest.update(host.stamp(path).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    @classmethod
    def execute(cls, folder: str, captions: str, missing_ok: bool = False) -> io.NodeOutput:
        labels = None if captions == BESIDE else host.input_path(captions)
        try:
            index = read_index(host.input_path(folder), labels, missing_ok)
        except InputError as error:
            raise InputError(host.without_folders(str(error))) from None
        return routes.with_text(cls, _report(index), index)


class DatasetFromLists(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GmPDatasetFromLists",
            display_name="Dataset from Lists (GmP)",
            category=CATEGORY,
            description="Captioned pictures from ComfyUI's own data set nodes, as a list of images and a list of "
            "texts. The pictures are kept as PNG files in the user folder, each content once.",
            search_aliases=["images and texts", "image text dataset", "caption list", "training data", "gmp"],
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="A list of images, of any sizes."),
                io.String.Input(
                    "texts",
                    force_input=True,
                    tooltip="A list of texts of the same length and order. Each line of a text is a caption.",
                ),
            ],
            outputs=[Dataset.Output(display_name="dataset", tooltip="Pictures and captions, for GmP Repair.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, images: list, texts: list[str]) -> io.NodeOutput:
        pictures = [picture for batch in images for picture in batch]  # (H, W, C) in 0..1
        if len(pictures) != len(texts):
            raise InputError(
                f"There are {len(pictures)} images and {len(texts)} texts; connect lists of the same length."
            )
        root = host.cache_folder() / "pictures"
        root.mkdir(parents=True, exist_ok=True)
        captions: dict[str, list[str]] = {}
        for picture, text in zip(pictures, texts, strict=True):
            pixels = (picture[..., :3].clamp(0, 1) * 255).round().byte().cpu().numpy()
            name = hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()[:32] + ".png"
            if not (root / name).exists():
                part = root / f"{name}.part"
                Image.fromarray(pixels).save(part, format="PNG", compress_level=1)
                part.replace(root / name)
            captions.setdefault(name, []).extend(text.split("\n"))
        listing = root / f"{hashlib.sha256(repr(captions).encode()).hexdigest()[:32]}.json"
        write_json(captions, listing)
        index = read_index(root, listing)
        return routes.with_text(cls, _report(index), index)
