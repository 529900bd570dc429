"""Captioned pictures: from a folder, from several data sets, from tars, or from ComfyUI's lists of images and texts."""

from __future__ import annotations

import hashlib
from fnmatch import fnmatch
from pathlib import Path

from comfy_api.latest import io
from PIL import Image

from ..gmp.data.captions import Index, read_index
from ..gmp.data.sources import KINDS, mix, read
from ..gmp.data.tars import Tars, find_tars
from ..gmp.errors import InputError
from ..gmp.files import write_json
from . import host, routes
from .sockets import CATEGORY, Dataset, TarDataset

BESIDE = "text files beside the pictures"
FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
AUTO = "auto"
KIND = "kind of captions: "  # what follows in a report is said in a sentence here
SEVERAL = 4  # data sets that are mixed at the most


def _report(index: Index) -> str:
    """What the data set holds, what its captions are, and of what the reader found, all that is not zero."""
    known = (KIND, f"pictures: {len(index)}")
    lines = str(index.report).split("\n")
    found = [line for line in lines if not line.endswith(": 0") and not line.startswith(known)]
    kinds = [KINDS.get(name, name) for name in index.report.kind.split(" and ") if name]
    return "\n· ".join([f"{len(index)} pictures with {sum(index.caption_counts)} captions", *kinds, *found])


class CaptionDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GmPCaptionDataset",
            display_name="Caption Dataset (GmP)",
            category=CATEGORY,
            description="Captioned pictures of a folder in ComfyUI's input folder, whatever way the captions are "
            "written down. No picture is loaded; captions are read, counted and checked.",
            search_aliases=[
                "load dataset",
                "image caption pairs",
                "training data",
                "folder",
                "kohya",
                "coco",
                "csv",
                "parquet",
                "imagefolder",
                "gmp",
            ],
            inputs=[
                io.Combo.Input("folder", options=host.input_folders(), tooltip="A folder in ComfyUI's input folder."),
                io.Combo.Input(
                    "captions",
                    options=[BESIDE, *host.input_files(*FILES)],
                    default=BESIDE,
                    tooltip="What lies in the folder: 0001.txt beside 0001.png, a caption per line, kohya's 10_name "
                    "folders, or metadata.jsonl; or a caption file anywhere in the input folder, JSON, CSV, TSV, JSON "
                    "lines or Parquet, with paths in the folder. The node says what it is taken for.",
                ),
                io.Boolean.Input(
                    "missing_ok",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Leave out pictures that the caption file names but the folder lacks, instead of an error.",
                ),
                io.Combo.Input(
                    "kind",
                    options=[AUTO, *(name for name in KINDS if name != "webdataset")],
                    default=AUTO,
                    optional=True,
                    advanced=True,
                    tooltip="How the captions are written down. auto: as they look. Another one is an error where "
                    "they look like something else.",
                ),
                io.String.Input(
                    "columns",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Of a table: the column of the pictures and those of captions, such as filepath,title. "
                    "Empty: by their names. With kind json_beside: the keys that are captions.",
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
    def execute(
        cls, folder: str, captions: str, missing_ok: bool = False, kind: str = AUTO, columns: str = ""
    ) -> io.NodeOutput:
        images = host.input_path(folder)
        names = [name.strip() for name in columns.split(",") if name.strip()]
        try:
            index = read(
                images if captions == BESIDE else host.input_path(captions),
                kind=None if kind == AUTO else kind,
                images=images,
                columns=names or None,
                missing_ok=missing_ok,
            )
        except InputError as error:
            raise InputError(host.without_folders(str(error))) from None
        return routes.with_text(cls, _report(index), index)


class MixDatasets(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GmPMixDatasets",
            display_name="Mix Datasets (GmP)",
            category=CATEGORY,
            description="Several data sets as one, each with a weight: how often an epoch visits its pictures. A "
            "picture in two of them keeps the captions of both.",
            search_aliases=["combine datasets", "merge", "several folders", "repeats", "training data", "gmp"],
            inputs=[part for number in range(1, SEVERAL + 1) for part in _part(number)],
            outputs=[Dataset.Output(display_name="dataset", tooltip="All pictures and captions, for GmP Repair.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, dataset_1: Index, weight_1: float, **others) -> io.NodeOutput:
        given = {1: (dataset_1, weight_1)}
        for number in range(2, SEVERAL + 1):
            if (index := others.get(f"dataset_{number}")) is not None:
                given[number] = index, others.get(f"weight_{number}", 1.0)
        try:
            index = mix(list(given.values()))
        except InputError as error:
            raise InputError(host.without_folders(str(error))) from None
        parts = [f"dataset_{number}: {len(part)} pictures × {weight:g}" for number, (part, weight) in given.items()]
        visits = f"an epoch visits {sum(index.repeats):g} pictures"
        first, *rest = _report(index).split("\n· ")
        return routes.with_text(cls, "\n· ".join([first, *parts, visits, *rest]), index)


def _part(number: int) -> list[io.Input]:
    """The inputs for one of the data sets; the first two are needed."""
    needed = number <= 2
    return [
        Dataset.Input(f"dataset_{number}", optional=not needed, tooltip="Captioned pictures."),
        io.Float.Input(
            f"weight_{number}",
            default=1.0,
            min=0.01,
            max=1000.0,
            step=0.05,
            optional=not needed,
            tooltip=f"How often an epoch visits each picture of dataset_{number}: 2 twice, 0.5 every second one.",
        ),
    ]


class TarFileDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GmPTarDataset",
            display_name="Tar Dataset (GmP)",
            category=CATEGORY,
            description="Captioned pictures in WebDataset tars of a folder in ComfyUI's input folder, for data sets "
            "that are too large for single files. GmP Repair reads them once, with a locked vision tower.",
            search_aliases=["webdataset", "img2dataset", "shards", "large dataset", "training data", "gmp"],
            inputs=[
                io.Combo.Input("folder", options=host.input_folders(), tooltip="A folder in ComfyUI's input folder."),
                io.String.Input(
                    "files",
                    default="*.tar",
                    tooltip="Which of its files are taken: * and ? stand for any letters. In a tar, 0001.jpg lies "
                    "beside 0001.txt or 0001.json.",
                ),
            ],
            outputs=[TarDataset.Output(display_name="dataset", tooltip="Tars, for GmP Repair alone.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str, files: str, **_) -> str:
        """Changes with any of the tars: names, sizes, times."""
        stamps = "\n".join(map(host.stamp, _tars(folder, files)))
        return hashlib.sha256(stamps.encode("utf-8", "surrogatepass")).hexdigest()

    @classmethod
    def execute(cls, folder: str, files: str) -> io.NodeOutput:
        paths = _tars(folder, files)
        if not paths:
            raise InputError(f"No file in {folder} is called like {files}; choose another folder, or other letters.")
        try:
            tars: Tars = find_tars(list(map(str, paths)))
        except InputError as error:
            raise InputError(host.without_folders(str(error))) from None
        size = sum(tar.size or 0 for tar in tars.files)
        return routes.with_text(cls, f"{len(tars)} tars of {size / 1e6:,.1f} MB, read when a repair begins", tars)


def _tars(folder: str, files: str) -> list[Path]:
    """The files of a folder whose names a pattern fits, in order."""
    place = host.input_path(folder)
    inside = place.iterdir() if place.is_dir() else ()
    return sorted(path for path in inside if path.is_file() and fnmatch(path.name, files.strip()))


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
