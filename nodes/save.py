"""Writes a text encoder where ComfyUI looks for its kind: alone, as a CLIP, in a checkpoint, or as a LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from comfy_api.latest import io

from ..gmp.errors import InputError
from ..gmp.events import finish
from ..gmp.geometric import split_mlps
from ..gmp.join import join
from ..gmp.layouts import TowerFile, insert_text, write_clip, write_text
from ..gmp.layouts.canonical import LENT
from ..gmp.lora import repair_lora, write_lora
from . import host, routes
from .sockets import CATEGORY, TextEncoder, VisionPart, VisionTower

# Layout -> the kind of model that the file is for ComfyUI.
KINDS = {
    "huggingface": "text_encoders",
    "huggingface_folder": "diffusers",
    "openai": "text_encoders",
    "open_clip": "text_encoders",
    "open_clip_folder": "diffusers",
    "gmp": "gmp",
    "checkpoint": "checkpoints",
    "lora": "loras",
}
# Kind -> the nodes whose menus list it.
LISTED = {
    "text_encoders": "Load CLIP",
    "checkpoints": "Load Checkpoint",
    "loras": "Load LoRA",
    "diffusers": "Load Text Encoder (GmP)",
    "gmp": "Load Text Encoder (GmP)",
}
NONE = "(none)"


class SaveTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        checkpoints = [name for name in host.menu("checkpoint") if name != host.NOTHING]
        return io.Schema(
            node_id="GmPSaveTextEncoder",
            display_name="Save Text Encoder (GmP)",
            category=CATEGORY,
            description="Writes a text encoder in any layout, as a whole CLIP, into a checkpoint, or as the LoRA that "
            "repairs it. The file goes where ComfyUI looks for its kind, so that its loaders list it at once. Nothing "
            "is overwritten.",
            search_aliases=["export text encoder", "save clip", "write safetensors", "convert", "save lora", "gmp"],
            is_output_node=True,
            inputs=[
                TextEncoder.Input("text_encoder", tooltip="What to write."),
                io.String.Input(
                    "filename_prefix",
                    default="clip/repaired",
                    tooltip="Beginning of the name, after a folder if you like. It lies below the folder of its kind: "
                    "clip, checkpoints, loras, diffusers or gmp; that name at its beginning may be left out.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=["fp32", "fp16", "bf16"],
                    default="fp32",
                    tooltip="fp16 halves the file and is what most programs compute with. gmp is always fp32, and a "
                    "checkpoint keeps its own.",
                ),
                io.Combo.Input(
                    "layout",
                    options=list(KINDS),
                    default="huggingface",
                    tooltip="huggingface: for ComfyUI and most programs. openai, open_clip: for programs with these "
                    "names. _folder: with a config. gmp: r and theta, for this pack. checkpoint: a copy of a "
                    "checkpoint with this encoder in it. lora: the change since broken.",
                ),
                VisionTower.Input(
                    "vision_tower",
                    optional=True,
                    tooltip="Connect it to write the whole CLIP, both towers. open_clip_folder needs it; checkpoint "
                    "and lora have no place for it.",
                ),
                TextEncoder.Input(
                    "broken",
                    optional=True,
                    tooltip="Only for layout lora, which needs it: the text encoder that the LoRA will be applied to.",
                ),
                io.Combo.Input(
                    "checkpoint",
                    options=[NONE, *checkpoints],
                    default=NONE,
                    optional=True,
                    tooltip="Only for layout checkpoint, which needs it: the checkpoint to copy. All but the text "
                    "encoder keeps its bytes.",
                ),
                io.Int.Input(
                    "rank",
                    default=64,
                    min=1,
                    max=1280,
                    step=1,
                    optional=True,
                    tooltip="Only for layout lora: a higher one keeps more of the change and makes a larger file. The "
                    "node tells how much it keeps.",
                ),
                io.Combo.Input(
                    "save_in",
                    options=["output", "models"],
                    default="output",
                    optional=True,
                    tooltip="ComfyUI's output folder or its models folder. Loaders list files of both.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(
        cls,
        text_encoder: TowerFile,
        filename_prefix: str,
        dtype: str,
        layout: str,
        vision_tower: VisionPart | None = None,
        broken: TowerFile | None = None,
        checkpoint: str = NONE,
        rank: int = 64,
        save_in: str = "output",
    ) -> io.NodeOutput:
        _check(layout, vision_tower, broken, checkpoint)
        kind = KINDS[layout]
        suffix = "" if layout.endswith("_folder") else ".safetensors"
        path, name, listed = host.save_path(kind, filename_prefix, save_in, suffix)
        source = text_encoder.source
        metadata = source.metadata | host.workflow_metadata(cls.hidden.prompt, cls.hidden.extra_pnginfo)
        metadata["gmp_source"] = json.dumps({"file": source.path, "sha256": source.sha256, "notes": source.notes})
        with torch.inference_mode(False):
            if layout == "lora":
                lines = _write_lora(text_encoder, broken, path, rank, dtype, metadata)
            elif layout == "checkpoint":
                lines = _write_checkpoint(text_encoder, checkpoint, path, metadata)
            elif vision_tower is None:
                lines = _write_text(text_encoder, path, layout, dtype, metadata)
            else:
                lines = _write_clip(text_encoder, vision_tower, path, layout, dtype, metadata)
        if vision_tower is not None and layout in ("lora", "checkpoint"):
            lines.append(f"vision_tower is not part of a {layout} and was not written")
        shown = listed if kind in ("text_encoders", "checkpoints", "loras") else f"{kind}/{listed}"
        lines.append(f"{LISTED[kind]}: {shown}")
        return routes.with_text(cls, "\n· ".join([name, *lines]))


def _check(layout: str, vision_tower: VisionPart | None, broken: TowerFile | None, checkpoint: str) -> None:
    """Raises InputError for what a layout needs and is not connected."""
    if layout == "lora" and broken is None:
        raise InputError(
            "Layout lora needs broken: connect the text encoder that the change is measured from, the one that was "
            "given to the repair."
        )
    if layout == "checkpoint" and checkpoint == NONE:
        raise InputError("Layout checkpoint needs a checkpoint to copy: choose one below.")
    if layout == "open_clip_folder" and vision_tower is None:
        raise InputError("Layout open_clip_folder holds both towers: connect vision_tower, or choose another layout.")


def _write_text(encoder: TowerFile, path: Path, layout: str, dtype: str, metadata: dict[str, str]) -> list[str]:
    state, dtype, words = _in_layout(encoder.state, layout, dtype)
    write_text(state, path, layout=layout, dtype=dtype, config=encoder.config, metadata=metadata)
    lines = [f"{encoder.source.member}, {words}"]
    if lacking := [name for name in LENT if name not in encoder.state]:
        lines.append(f"without {' and '.join(lacking)}, which the connected encoder has not")
    return lines


def _write_clip(
    encoder: TowerFile, tower: VisionPart, path: Path, layout: str, dtype: str, metadata: dict[str, str]
) -> list[str]:
    joined = join(encoder, tower.vision, tower.original)
    state, dtype, words = _in_layout(joined.state, layout, dtype)
    hashes = {role: source.sha256 for role, source in joined.sources.items()}
    metadata = metadata | {"gmp_sources": json.dumps({"sha256": hashes, "tensors": joined.summary()})}
    write_clip(state, path, layout=layout, dtype=dtype, config=joined.config, metadata=metadata)
    origins = [f"{origin.name} ← {origin.source}: {origin.reason}" for origin in joined.report]
    return [f"{encoder.source.member} and vision tower, {words}", *origins]


def _in_layout(state: dict, layout: str, dtype: str) -> tuple[dict, str, str]:
    """The tensors and the dtype that a layout is written with, and both in words."""
    if layout != "gmp":
        return state, dtype, f"layout {layout}, {dtype}"
    return split_mlps(state), "fp32", "layout gmp, fp32 as always"


def _write_checkpoint(encoder: TowerFile, checkpoint: str, path: Path, metadata: dict[str, str]) -> list[str]:
    base = host.model_path("checkpoint", checkpoint)
    member = encoder.source.member
    inserted = insert_text(encoder.state, base, path, member=member, config=encoder.config, metadata=metadata)
    return [
        f"{checkpoint} with another {member}: {len(inserted.replaced)} tensors, each in the precision that it has "
        "there",
        "all other tensors keep their bytes",
        *inserted.notes,
    ]


def _write_lora(
    repaired: TowerFile, broken: TowerFile, path: Path, rank: int, dtype: str, metadata: dict[str, str]
) -> list[str]:
    lora = finish(repair_lora(repaired, broken, rank, dtype=dtype), host.Progress().hear)
    write_lora(lora, path, metadata)
    left_out: dict[str, list[str]] = {}
    for row in lora.left_out:
        left_out.setdefault(row.reason, []).append(row.name)
    return [
        f"LoRA for {lora.member}, rank {lora.rank}, {dtype}",
        f"keeps {lora.kept:.1%} of the change from {broken.source.path} to {repaired.source.path}",
        *(f"left out: {', '.join(names)} ({reason})" for reason, names in left_out.items()),
    ]
