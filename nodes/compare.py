"""Pictures of what tells text encoders from the original, and of what one is made of."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from comfy_api.latest import io

from ..gmp import READ_POINTS
from ..gmp.compare import Geometry, check_alike, geometry, weight_drift
from ..gmp.comparison import PICTURES, Comparison, compare, over_steps, own_prompts
from ..gmp.data.captions import Index
from ..gmp.errors import InputError
from ..gmp.events import finish
from ..gmp.layouts import TowerFile
from ..gmp.pca import check_umap
from ..gmp.plots import plot_distributions, plot_layers
from ..gmp.prompts import prompts as shipped
from . import host, routes, runs
from .sockets import (
    CATEGORY,
    ClipParts,
    Dataset,
    ReassembledCLIP,
    Run,
    RunHandle,
    TextEncoder,
    VisionPart,
    as_image,
    original_input,
    original_text,
)

WITH_PICTURES = "pictures and captions"
OVER_STEPS = "recall and drift over steps"
_last: dict[object, Comparison] = {}  # the newest one, so that another picture of it is drawn at once


class CompareCLIPs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GmPCompareCLIPs",
            display_name="Compare CLIPs (GmP)",
            category=CATEGORY,
            description="Draws what tells a broken text encoder, and its repair, from the original: in the weights, "
            "block by block, and in what they make of prompts and captioned pictures.",
            search_aliases=["compare clip", "drift", "difference", "pca", "umap", "similarity", "plot", "gmp"],
            inputs=[
                original_input(False, "The text encoder from before it broke."),
                TextEncoder.Input("broken", tooltip="The text encoder to hold against it."),
                io.Combo.Input(
                    "picture",
                    options=[*PICTURES, OVER_STEPS],
                    default="weights by block",
                    tooltip="What to draw. Pictures and captions needs a gmp_clip and a dataset.",
                ),
                io.Combo.Input(
                    "read_point",
                    options=list(READ_POINTS),
                    default="penultimate",
                    tooltip="Where prompts are looked at: penultimate is what SDXL, SD2 and SD3 read, last SD1, pooled "
                    "Flux; projected is what pictures are compared with.",
                ),
                TextEncoder.Input("repaired", optional=True, tooltip="A third one to compare: the repair."),
                ReassembledCLIP.Input(
                    "gmp_clip",
                    optional=True,
                    tooltip="Has the vision tower for pictures and captions, and lends a text projection.",
                ),
                Dataset.Input("dataset", optional=True, tooltip="Captioned pictures; up to 150 of them are drawn."),
                Run.Input("run", optional=True, tooltip="A run of GmP Repair, for recall and drift over steps."),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    optional=True,
                    advanced=True,
                    tooltip="Prompts of your own, one a line, at least four; or kind, tab, prompt. Empty: the shipped "
                    "ones of every kind.",
                ),
                io.Boolean.Input(
                    "umap",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="UMAP in place of PCA for what is drawn as points; needs the package umap-learn.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The picture, for Preview Image or Save Image."),
                io.String.Output(display_name="text", tooltip="What the node shows."),
                io.String.Output(
                    display_name="json", tooltip="A list of measurement documents, one for each encoder compared."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        original: TowerFile | VisionPart,
        broken: TowerFile,
        picture: str,
        read_point: str,
        repaired: TowerFile | None = None,
        gmp_clip: ClipParts | None = None,
        dataset: Index | None = None,
        run: RunHandle | None = None,
        prompts: str = "",
        umap: bool = False,
    ) -> io.NodeOutput:
        if umap:
            check_umap()
        if picture != WITH_PICTURES:
            dataset = None
        elif gmp_clip is None or dataset is None:
            raise InputError(f"{WITH_PICTURES} needs both a gmp_clip and a dataset; connect them, or draw another.")
        if picture == OVER_STEPS and run is None:
            raise InputError(f"{OVER_STEPS} needs a run of GmP Repair; connect its run, or draw another.")
        files = {"original": original_text(original), "broken": broken} | ({"repaired": repaired} if repaired else {})
        one = _compared(files, prompts.strip(), gmp_clip, dataset)
        if picture == OVER_STEPS:
            figure = over_steps(run.folder, runs.watch.history(run.folder, 0))
        else:
            figure = PICTURES[picture](one, read_point, umap)
        image = as_image(figure)
        lines = one.lines(read_point)
        documents = json.dumps(one.documents(), allow_nan=False)
        return routes.with_text(cls, "\n· ".join(lines), image, "\n".join(lines), documents)


def _compared(files: dict[str, TowerFile], prompts: str, clip: ClipParts | None, index: Index | None) -> Comparison:
    weights = tuple((name, file.source.path, file.source.sha256) for name, file in files.items())
    lent = clip and (clip.vision.source.sha256, clip.original and clip.original.source.sha256)
    key = weights, prompts, lent, index and (index.root, index.pictures)
    if key in _last:
        return _last[key]
    tensors = [tensor for file in files.values() for tensor in file.state.values()]
    host.make_room(sum(tensor.nbytes for tensor in tensors))
    original = files["original"]
    with torch.inference_mode(False):
        events = compare(
            files,
            own_prompts(prompts) if prompts else shipped(),
            host.tokenizer(original.source.member, original.config.context_length),
            device=host.device(),
            index=index,
            vision=clip and clip.vision,
            lender=clip and clip.original,
            cache=host.cache_folder(),
        )
        found = finish(events, host.Progress().hear)
    _last.clear()
    _last[key] = found
    return found


class InspectGmP(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GmPInspectGmP",
            display_name="Inspect GmP",
            category=CATEGORY,
            description="Draws r and theta of a text encoder's matrices, the lengths and directions that a GmP repair "
            "trains: as distributions, or block by block; beside those of the original, how far they have gone.",
            search_aliases=["geometric parametrization", "radius", "theta", "weights", "histogram", "plot", "gmp"],
            inputs=[
                TextEncoder.Input("text_encoder", tooltip="The text encoder to look at."),
                io.Combo.Input(
                    "picture",
                    options=["distributions", "by block"],
                    default="distributions",
                    tooltip="distributions: histograms of r and theta, all blocks together. by block: mean r, and "
                    "beside an original how far theta has turned.",
                ),
                original_input(True, "Another one to compare it with: the original."),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The picture, for Preview Image or Save Image."),
                io.String.Output(display_name="text", tooltip="What the node shows."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, text_encoder: TowerFile, picture: str, original: TowerFile | VisionPart | None = None
    ) -> io.NodeOutput:
        name, files, drifts = "text encoder", {}, {}
        with torch.inference_mode(False):
            if original is not None:
                other = original_text(original)
                check_alike(other, [text_encoder])
                files["original"] = geometry(other.state)
                drifts[name] = weight_drift(text_encoder.state, other.state)
            host.raise_if_interrupted()
            files[name] = geometry(text_encoder.state)
        figure = plot_distributions(files) if picture == "distributions" else plot_layers(files, drifts)
        lines = [
            f"{role}: r {r.mean():.3f} on average, standard deviation {r.std(correction=0):.3f}"
            for role, r in _radii(files[name]).items()
        ]
        for one in sorted((d for d in drifts.get(name, ()) if d.block is not None), key=lambda d: -d.angle)[:3]:
            lines.append(f"{one.layer}: theta turned by {one.angle:.3g}°, r changed by {one.r:.2%}")
        return routes.with_text(cls, "\n· ".join(lines), as_image(figure), "\n".join(lines))


def _radii(found: Sequence[Geometry]) -> dict[str, torch.Tensor]:
    """r of all blocks together, by role."""
    roles = dict.fromkeys(one.role for one in found)
    return {role: torch.cat([one.r for one in found if one.role == role]) for role in roles}
