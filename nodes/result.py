"""What a repair gives: a text encoder, put into a CLIP."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from comfy_api.latest import io

from ..gmp.checkpoint import CHECKPOINTS, list_checkpoints
from ..gmp.errors import InputError
from ..gmp.layouts import TowerFile, read_text
from ..gmp.run import BEST, RESULT
from . import host, routes, runs
from .sockets import CATEGORY, Run, RunHandle, TextEncoder

_TRIES = 3  # a checkpoint may be cleared away while it is read


def _find(run: RunHandle, which: str, step: int) -> Path | None:
    """The file with the wanted weights, None if there is none yet."""
    saved = list_checkpoints(run.folder / CHECKPOINTS)
    if which == "best":
        path = run.folder / BEST
        return path if path.exists() else None
    if which == "step":
        for checkpoint in saved:
            if checkpoint.step == step:
                return checkpoint.given()
        there = ", ".join(str(checkpoint.step) for checkpoint in saved) or "none yet"
        raise InputError(f"The run {run.id} keeps no step {step}; it has {there}. Set keep higher to have more.")
    if (run.folder / "result.json").exists():
        return run.folder / RESULT
    return saved[-1].given() if saved else None


def _read(run: RunHandle, which: str, step: int) -> TowerFile | None:
    for attempt in range(_TRIES):
        path = _find(run, which, step)
        if path is None:
            return None
        try:
            encoder = read_text(path)
        except (InputError, OSError):
            if path.exists() or attempt == _TRIES - 1:
                raise
            continue
        return replace(encoder, source=replace(encoder.source, path=path.name))
    return None


class RepairedTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GmPRepairedTextEncoder",
            display_name="Repaired Text Encoder (GmP)",
            category=CATEGORY,
            description="The text encoder of a run: the newest, the best, or a certain step, also while it trains. "
            "Nodes behind it are left out while there is none.",
            search_aliases=["training result", "checkpoint", "repaired TE", "gmp"],
            inputs=[
                Run.Input("run", tooltip="A run of GmP Repair."),
                io.Combo.Input(
                    "which",
                    options=["latest", "best", "step"],
                    default="latest",
                    tooltip="latest: the newest saved step. best: by best_by of GmP Repair, on pictures that are not "
                    "trained on. step: the one given below.",
                ),
                io.Int.Input(
                    "step",
                    default=0,
                    min=0,
                    max=10**8,
                    step=1,
                    tooltip="A saved step; only for which = step.",
                ),
                io.Boolean.Input(
                    "wait",
                    default=True,
                    tooltip="On: wait until the run is through; cancelling stops the run, which saves itself. "
                    "Off: take what is there now.",
                ),
            ],
            outputs=[
                TextEncoder.Output(display_name="text_encoder", tooltip="The repaired text encoder."),
                io.String.Output(
                    display_name="report",
                    tooltip="Link to the page about the run, below ComfyUI's address: what it has changed, and how it "
                    "went.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, run: RunHandle, which: str, step: int, wait: bool) -> io.NodeOutput:
        if wait:
            progress = host.Progress()
            runs.wait(run, lambda event: runs.show_progress(event, progress))
        with torch.inference_mode(False):
            encoder = _read(run, which, step)
        runs.taken(run.id, cls.hidden.unique_id)
        if encoder is None:
            state = runs.status_of(run.id)
            words = f"The run {run.id} has no {which} step yet: {state}. Queue again later, or wait."
            if state.state == "finished":
                words = f"No step of the run {run.id} was better than its start; take the latest one."
            routes.show_text(cls, words)
            return io.NodeOutput(None, None, block_execution=words)
        text = f"{encoder.source.path} of run {run.id}, {runs.status_of(run.id)}"
        return routes.with_text(cls, text, encoder, f"/gmp/runs/{run.id}/report")


class ApplyToCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GmPApplyToCLIP",
            display_name="Apply to CLIP (GmP)",
            category=CATEGORY,
            description="Puts a text encoder into a CLIP, as a patch on a copy: the other encoders (T5, clip_g) stay "
            "as they are, LoRAs before and after still count, and the strength blends.",
            search_aliases=["replace text encoder", "patch clip", "swap clip_l", "strength", "gmp"],
            inputs=[
                io.Clip.Input(
                    "clip", tooltip="The CLIP to put it into; where LoRAs were baked in, the one before them."
                ),
                TextEncoder.Input("text_encoder", tooltip="A text encoder of the same shape."),
                io.Combo.Input(
                    "member",
                    options=["auto", *host.MEMBERS],
                    default="auto",
                    tooltip="Which encoder of the CLIP it replaces. auto takes the one that it is.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.2,
                    step=0.01,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="1: the given encoder. 0: the CLIP as it was. Between: a blend of the weights. Above 1: "
                    "past it, in the same direction.",
                ),
            ],
            outputs=[
                io.Clip.Output(display_name="clip", tooltip="The CLIP with this text encoder, for CLIP Text Encode.")
            ],
        )

    @classmethod
    def execute(cls, clip, text_encoder: TowerFile, member: str, strength: float) -> io.NodeOutput:
        if member == "auto":
            member = text_encoder.source.member or "auto"
        with torch.inference_mode(False):
            return io.NodeOutput(host.patch_clip(clip, host.member_of(clip, member), text_encoder, strength))
