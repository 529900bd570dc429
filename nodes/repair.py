"""Starts a repair in the background, or joins the one that runs."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io

from ..gmp.clip import CLIPConfig
from ..gmp.config import BEST_BY, NEGATIVES, PRECISIONS, TRAIN, Anchor, RepairConfig
from ..gmp.data.captions import Index
from ..gmp.data.tars import Tars
from ..gmp.events import finish
from ..gmp.memory import estimate
from ..gmp.optim import STATES
from ..gmp.presets import DEFAULT, presets
from ..gmp.presets import preset as known_preset
from ..gmp.run import Inputs, check_anchors, describe_run, repair, run_id
from ..gmp.settings import over, plain, read_toml
from ..gmp.trainer import precision_of
from ..gmp.training_data import picture_keys
from ..gmp.verdict import REPAIR_TARGETS
from . import host, routes, runs
from .sockets import CATEGORY, ClipParts, Dataset, ReassembledCLIP, Run, RunHandle, TarDataset

TARGETS = {words: point for point, words in REPAIR_TARGETS.items()}
# Presets set these inputs; `nodes/routes.py` tells the page their values.
WEIGHTS = {
    "anchor_weight": ("original", "dataset"),
    "broken_weight": ("broken", "dataset"),
    "concept_weight": ("broken", "concepts"),
}
SET = (
    *("train", "epochs", "batch", "accumulate", "smoothing", "warmup", "precision", "held_out", "save_every", "keep"),
    *("checkpointing", "measure_every", "best_by", "patience", "negatives", "optimizer_state"),
)
_last: dict[str, str] = {}  # node id -> the run that it gave last
_given: dict[str, str] = {}  # node id -> its last fingerprint


class Repair(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GmPRepair",
            display_name="GmP Repair",
            category=CATEGORY,
            description="Fine-tunes the text encoder back into agreement with its vision tower, by geometric "
            "parametrization (GmP), in the background. The same inputs are the same run: queueing again joins it, "
            "resumes it, or takes its result.",
            search_aliases=[
                "train clip",
                "fine-tune text encoder",
                "geometric parametrization",
                "repair TE",
                "gmp",
            ],
            inputs=[
                ReassembledCLIP.Input("gmp_clip", tooltip="The CLIP to repair, from Reassemble CLIP."),
                io.MultiType.Input(
                    "dataset", [Dataset, TarDataset], tooltip="Captioned pictures, in a folder or in tars."
                ),
                io.Combo.Input(
                    "preset",
                    options=list(presets()),
                    default=DEFAULT,
                    tooltip="A recipe by what broke. Choosing one sets the values below, which count; what has no "
                    "input here, such as the optimizer, is the preset's. The panel lists when to use which.",
                ),
                io.Combo.Input(
                    "target",
                    options=list(TARGETS),
                    default=next(iter(TARGETS)),
                    tooltip="The diffusion model that will read the text encoder. It decides where the anchor holds.",
                ),
                io.Float.Input(
                    "anchor_weight",
                    default=0.3,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    tooltip="How strongly the encoder is held to the original at the place that the target reads. "
                    "0 is off: alignment alone, which may drift from what the diffusion model knows.",
                ),
                io.Int.Input("epochs", default=5, min=1, max=1000, step=1, tooltip="How often every picture is seen."),
                io.Int.Input(
                    "batch",
                    default=256,
                    min=2,
                    max=16384,
                    step=2,
                    tooltip="Pairs per forward pass. Every pair is a negative of every other; more need more memory.",
                ),
                io.Float.Input(
                    "lr",
                    display_name="lr (0 = automatic)",
                    default=0.0,
                    min=0.0,
                    max=0.1,
                    step=1e-8,  # the page rounds to it
                    round=False,
                    tooltip="Learning rate. 0 chooses by the encoder's width: 7e-6 for clip_l, 2.5e-6 for clip_g.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**53 - 1,
                    control_after_generate=False,
                    tooltip="Order of the pictures and choice of captions. Another seed is another run.",
                ),
                io.Boolean.Input(
                    "wait",
                    default=False,
                    tooltip="Off: give back at once and train in the background. On: hold the queue until the run is "
                    "through; cancelling stops the run, which saves itself and resumes when queued again.",
                ),
                io.Combo.Input(
                    "train",
                    options=list(TRAIN),
                    default="text",
                    optional=True,
                    advanced=True,
                    tooltip="text: the vision tower stays as it is, its features are computed once. both: train it "
                    "too, slower and with more memory.",
                ),
                io.Int.Input(
                    "accumulate",
                    default=1,
                    min=1,
                    max=256,
                    step=1,
                    optional=True,
                    advanced=True,
                    tooltip="Batches per step. Every pair of a step is a negative of every other, as in one big batch.",
                ),
                io.Float.Input(
                    "smoothing",
                    default=0.0,
                    min=0.0,
                    max=0.5,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="Label smoothing of the contrastive loss. 0 is off.",
                ),
                io.Float.Input(
                    "warmup",
                    default=0.1,
                    min=0.0,
                    max=0.9,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="Share of the steps in which the learning rate rises.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="Of the computation; weights are fp32 always. auto: bf16 or fp16 on a GPU, fp32 on a CPU.",
                ),
                io.Float.Input(
                    "held_out",
                    default=0.05,
                    min=0.01,
                    max=0.5,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="Share of the pictures that is measured and not trained on. The best step is chosen by it.",
                ),
                io.Int.Input(
                    "save_every",
                    default=200,
                    min=1,
                    max=100000,
                    step=1,
                    optional=True,
                    advanced=True,
                    tooltip="Steps between two checkpoints. The end of every epoch is always saved.",
                ),
                io.Int.Input(
                    "keep",
                    default=3,
                    min=1,
                    max=1000,
                    step=1,
                    optional=True,
                    advanced=True,
                    tooltip="How many checkpoints are kept: three times the encoder's size each.",
                ),
                io.Float.Input(
                    "broken_weight",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="Holds the encoder to what it is now, broken, at the same place: keeps what the fine-tune "
                    "taught the diffusion model to read. 0 is off.",
                ),
                io.Combo.Input(
                    "while_generating",
                    options=list(runs.POLICIES),
                    default="pause",
                    optional=True,
                    advanced=True,
                    tooltip="pause: hold the run while ComfyUI makes pictures, which are then as fast as ever. "
                    "share: train on beside them.",
                ),
                io.Boolean.Input(
                    "checkpointing",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Less memory, a third slower: keeps each block's input only and computes the rest again.",
                ),
                io.Int.Input(
                    "measure_every",
                    default=0,
                    min=0,
                    max=100000,
                    step=1,
                    optional=True,
                    advanced=True,
                    tooltip="Steps between two measurements of the held-out pictures. The end of every epoch is always "
                    "measured; 0: only that.",
                ),
                io.Combo.Input(
                    "best_by",
                    options=list(BEST_BY),
                    default="objective",
                    optional=True,
                    advanced=True,
                    tooltip="What the best encoder is chosen by, on held-out pictures. objective: what is trained, "
                    "alignment and anchors together. recall, or cosine to the original at a read point: each alone is "
                    "blind to the other.",
                ),
                io.Int.Input(
                    "patience",
                    default=0,
                    min=0,
                    max=1000,
                    step=1,
                    optional=True,
                    advanced=True,
                    tooltip="End the run early after so many measurements without a better one. 0 is off.",
                ),
                io.Combo.Input(
                    "negatives",
                    options=list(NEGATIVES),
                    default="batch",
                    optional=True,
                    advanced=True,
                    tooltip="Which pictures a caption tells its own from. batch: those of its step. all: all training "
                    "pictures, by their features; needs train = text, and takes time where there are very many. pass: "
                    "only those of its forward pass, as the original scripts accumulate. Equal pictures or captions "
                    "are never each other's negatives.",
                ),
                io.Combo.Input(
                    "optimizer_state",
                    options=list(STATES),
                    default="fp32",
                    optional=True,
                    advanced=True,
                    tooltip="What AdamW's two moments are kept in. fp32: 8 bytes per weight. bf16: half of that, "
                    "rounded at random. 8bit: a quarter, needs torchao or bitsandbytes. Checkpoints become smaller "
                    "with it.",
                ),
                io.String.Input(
                    "concepts",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Captions of what the fine-tune taught, one per line; pictures are not needed. On these "
                    "the encoder is held to what it is now, so that the cure does not take back what was taught.",
                ),
                io.Float.Input(
                    "concept_weight",
                    default=0.3,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="How strongly it is held on the concepts. 0 is off.",
                ),
                io.String.Input(
                    "settings",
                    default="",
                    multiline=True,
                    optional=True,
                    advanced=True,
                    tooltip="Any other setting as TOML, over preset and inputs: ema = 0.999, or [captions] and below "
                    "it shuffle = true. `python -m gmp presets sdxl-repair` lists all, each with a sentence.",
                ),
            ],
            outputs=[
                Run.Output(
                    display_name="run",
                    tooltip="The run, for Repaired Text Encoder. It may still be training.",
                )
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            is_output_node=True,  # it may stand at the end of a graph: what it makes lies in the run's folder
        )

    @classmethod
    def fingerprint_inputs(cls, **_) -> str:
        """Changes when the run that this node gave last has something that the nodes behind have not taken.

        It stays when they have: a graph that waited for its run does not execute once more to see it finished.
        """
        node = cls.hidden.unique_id
        run = _last.get(node)
        if run and not runs.all_taken(run):
            _given[node] = runs.stamp(run)
        return _given.get(node, "")

    @classmethod
    def execute(
        cls,
        gmp_clip: ClipParts,
        dataset: Index | Tars,
        preset: str,
        target: str,
        anchor_weight: float,
        epochs: int,
        batch: int,
        lr: float,
        seed: int,
        wait: bool,
        train: str = "text",
        accumulate: int = 1,
        smoothing: float = 0.0,
        warmup: float = 0.1,
        precision: str = "auto",
        held_out: float = 0.05,
        save_every: int = 200,
        keep: int = 3,
        broken_weight: float = 0.0,
        while_generating: str = "pause",
        checkpointing: bool = False,
        measure_every: int = 0,
        best_by: str = "objective",
        patience: int = 0,
        negatives: str = "batch",
        optimizer_state: str = "fp32",
        concepts: str = "",
        concept_weight: float = 0.3,
        settings: str = "",
    ) -> io.NodeOutput:
        held = {"original": anchor_weight, "broken": broken_weight}
        anchors = [Anchor(teacher, TARGETS[target], weight) for teacher, weight in held.items() if weight]
        captions = tuple(dict.fromkeys(line.strip() for line in concepts.splitlines() if line.strip()))
        if concept_weight and captions:
            anchors.append(Anchor("broken", TARGETS[target], concept_weight, captions="concepts"))
        values = known_preset(preset).config.to_json() | {
            "train": train,
            "epochs": epochs,
            "batch": batch,
            "accumulate": accumulate,
            "lr": lr or None,
            "smoothing": smoothing,
            "warmup": warmup,
            "anchors": plain(tuple(anchors)),
            "precision": precision,
            "held_out": held_out,
            "save_every": save_every,
            "keep": keep,
            "seed": seed,
            "checkpointing": checkpointing,
            "measure_every": measure_every,
            "best_by": best_by,
            "patience": patience,
            "negatives": negatives,
            "optimizer_state": optimizer_state,
        }
        config = RepairConfig.from_json(
            over(values, read_toml(settings, "the text of `settings`")), "the configuration of GmP Repair"
        )
        text = gmp_clip.text
        device = host.device()
        computed = precision_of(precision, device)
        check_anchors(text, gmp_clip.vision, gmp_clip.original, config)
        tokenize = host.tokenizer(text.source.member, text.config.context_length)
        inputs = Inputs(text, gmp_clip.vision, gmp_clip.original, dataset, tokenize, captions)
        cache = host.cache_folder()
        progress = host.Progress()
        keys = _keys(dataset, cache, progress)
        run = run_id(describe_run(inputs, keys, config))
        handle = RunHandle(run, runs.folder_of(run))
        _last[cls.hidden.unique_id] = run

        def events(stop):
            return repair(
                inputs,
                config,
                handle.folder,
                cache=cache,
                device=device,
                stop=stop,
                busy=lambda: runs.busy(run),
                make_room=routes.ask_for_room,
            )

        now = runs.status_of(run)
        if not now.at_work and now.state != "finished":
            shape = CLIPConfig(text.config, gmp_clip.vision.config)
            host.make_room(estimate(shape, config, computed, device).total)
        prompt = _ancestors(cls.hidden.prompt, cls.hidden.unique_id)
        worker = runs.attach(handle, events, while_generating, prompt)
        if wait:
            runs.wait(handle, lambda event: runs.show_progress(event, progress))
        words = [f"run {run}"]
        if worker is None or not worker.alive:  # how far a run at work is, the widget on the node tells
            now = runs.status_of(run)
            words.append(runs.summary(handle.folder) if now.state == "finished" else str(now))
        return routes.with_text(cls, "\n".join(words), handle)


def inputs_of(config: RepairConfig) -> dict[str, object]:
    """What the node's inputs are set to by a preset; the target stays where it has no anchor."""
    weights = {(anchor.teacher, anchor.captions): anchor.weight for anchor in config.anchors}
    found = {name: getattr(config, name) for name in SET} | {"lr": config.lr or 0.0}
    found |= {name: weights.get(place, 0.0) for name, place in WEIGHTS.items()}
    target = [REPAIR_TARGETS[anchor.read_point] for anchor in config.anchors[:1]]
    return found | ({"target": target[0]} if target else {})


def _ancestors(prompt: dict[str, dict], node: str) -> dict[str, dict]:
    """The part of a prompt that a node needs, with the node."""
    kept: dict[str, dict] = {}
    todo = [node]
    while todo:
        name = todo.pop()
        if name in kept or name not in prompt:
            continue
        kept[name] = {key: prompt[name][key] for key in ("class_type", "inputs")}
        todo += [v[0] for v in kept[name]["inputs"].values() if isinstance(v, list) and len(v) == 2]
    return kept


def _keys(dataset: Index | Tars, cache: Path, progress: host.Progress) -> list[str]:
    """The hash of every picture; quick for those that have been hashed before. None of tars."""
    return finish(picture_keys(dataset, cache), progress.hear)
