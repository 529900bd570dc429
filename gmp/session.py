"""One sitting of a run: trains from where it is, does what is asked at step boundaries, measures, saves, exports."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from . import checkpoint, evidence, memory, telemetry
from .alarms import Alarms
from .checkpoint import CHECKPOINTS
from .clip import CLIP, TextTower, VisionTower, load
from .compare import moved
from .config import RepairConfig
from .control import Control
from .data.captions import first_captions
from .distributed import ALONE, Group
from .errors import InputError
from .events import Event
from .files import write_json
from .geometric import fold_state
from .history import SNAPSHOT, History
from .layouts import Source, open_text, write_clip, write_text
from .layouts.canonical import text_part, vision_part
from .measure import measure_tower
from .objective import held_out_loss
from .pairs import Pairs
from .plots import plot_losses, save
from .report import write_report
from .sharding import own, whole
from .trainer import Training, train
from .training_data import HeldOut

log = logging.getLogger(__name__)

RESULT = "text_encoder.safetensors"
BEST = "best_text_encoder.safetensors"
REMEMBERED = 64_000_000  # bytes of the record that a run which goes on looks at, to know what is usual in it


@dataclass(frozen=True)
class Scene:
    """What stands still while a training moves."""

    pairs: Pairs
    held: HeldOut
    teachers: dict[str, TextTower]
    reference: TextTower | None  # that drift is measured from
    start: Mapping[str, Tensor]  # canonical weights before the first step
    metadata: dict[str, str]  # of every file that is written
    prompts: Tensor  # (prompts, context_length), that structure is measured on
    sources: Mapping[str, Source]  # of `text`, `vision`, and `original` if there is one
    concepts: Tensor | None = None  # (captions, context_length), of anchors on such


class Session:
    """A training, what it works on, and what is asked of it. `events` is to be taken once."""

    def __init__(
        self,
        training: Training,
        scene: Scene,
        config: RepairConfig,
        folder: Path,
        device: torch.device,
        precision: str,
        control: Control,
        taken: memory.Taken,
        group: Group = ALONE,
    ):
        """group: this is its first process; the others are told what comes next (`followers`)."""
        self.training, self.scene, self.config, self.folder = training, scene, config, folder
        self.device, self.control, self.taken, self.group = device, control, taken, group
        self.alarms = Alarms(patience=3 if precision == "fp16" else 1)
        self.best: dict[str, object] | None = None  # step 0: no step was better than the start
        self._waited = 0  # measurements since the best one, those that were asked for by hand not counted
        self._saved: int | None = None
        self._gathered: dict[bool, CLIP] = {}  # see `_whole`
        self._actions = {"measure": self.measure, "save": self.save}

    def events(self) -> Iterator[Event]:
        """Steps to the end, or until it is asked to end; the last event is `done`, `stopped` or `discarded`."""
        yield from self._begin()
        training, config, control = self.training, self.config, self.control
        if self._exhausted():  # the process ended between the decision and the result
            yield from self._finish()
            return
        self._go_on()
        scene, group = self.scene, self.group
        steps = train(training, scene.pairs, scene.teachers, config, self.device, group=group, concepts=scene.concepts)
        for event in steps:
            yield event
            yield from self.alarms.hear(event)
            if event["type"] != "step":
                continue
            self.taken.see(event["memory"])
            end_of_epoch = training.step % training.sampler.batches_per_epoch == 0
            if end_of_epoch or (config.measure_every and training.step % config.measure_every == 0):
                yield from self._measure_in_turn()
            if end_of_epoch or training.step % config.save_every == 0 or self._exhausted():
                yield from self.save()
            if training.step == training.total_steps or self._exhausted():
                break
            for told in control.obey(training.step, self._actions, self._offload):
                yield told
                self.alarms.hear(told)
            if control.discards:
                yield {"type": "discarded", "step": training.step}
                return
            if control.ends:
                if self._saved != training.step:
                    yield from self.save()
                export_text(self._clip(), self.folder / RESULT, self._metadata())
                yield {"type": "stopped", "step": training.step, "steps": training.total_steps}
                return
            self._go_on()
        yield from self._finish()

    def _go_on(self) -> None:
        self._gathered.clear()
        self.group.broadcast_json({"do": "train"})

    def _clip(self) -> CLIP:
        """The trained CLIP that is measured and given: with the mean of its weights, where there is one."""
        return self._whole(self.training.ema is not None)

    def _whole(self, mean: bool) -> CLIP:
        """The CLIP as it is now, or with means; where weights are shared out, a whole one, kept until the next step."""
        if not self.training.shards:
            return whole_clip(self.training, mean)
        if mean not in self._gathered:
            self.group.broadcast_json({"do": "gather", "mean": mean})
            self._gathered[mean] = whole_clip(self.training, mean)
        return self._gathered[mean]

    def measure(self) -> Iterator[Event]:
        """A `measure` event, and what it sets off, if there are pairs to measure on. Keeps the best encoder."""
        scene, held, training = self.scene, self.scene.held, self.training
        if not len(held.index):
            return
        clip = self._clip()
        features = held.image_features(clip)
        first = first_captions(held.index.caption_counts)
        ids, concepts = held.ids[first], scene.concepts
        losses = held_out_loss(clip, features, ids, scene.teachers, self.config, concepts=concepts)
        values = measure_tower(clip, features, held.ids, held.index.owners(), scene.reference)
        worth = goodness(self.config.best_by, losses, values)
        if self.best is None or worth > self.best["worth"]:
            if self.best is not None:
                export_text(clip, self.folder / BEST, self._metadata())
            loss = losses["loss"] if math.isfinite(losses["loss"]) else sys.float_info.max
            self.best = {"step": training.step, "by": self.config.best_by, "worth": worth, "loss": loss}
            self._waited = 0
        event = {"type": "measure", "step": training.step, "held_out": losses} | values
        yield event | {"moved": moved(clip, scene.start)}
        yield from self.alarms.hear(event)

    def _measure_in_turn(self) -> Iterator[Event]:
        self._waited += len(self.scene.held.index) > 0  # copies of one picture may leave nothing to hold out
        yield from self.measure()

    def _exhausted(self) -> bool:
        """Whether the run ends early: nothing has become better for `patience` measurements."""
        return 0 < self.config.patience <= self._waited

    def save(self) -> Iterator[Event]:
        """A checkpoint, and a snapshot of the history beside it, so that long runs are opened quickly."""
        training, clip = self.training, self._whole(mean=False)
        mean = self._whole(mean=True) if training.ema else None
        self.group.broadcast_json({"do": "save"})
        checkpoint.save(
            self.folder / CHECKPOINTS,
            training.step,
            clip,
            whole_optimizer(training, self.group),
            training.state() | {"best": self.best, "waited": self._waited},
            self.config.keep,
            self.scene.metadata,
            mean,
        )
        if mean is not None:
            self._gathered.pop(False, None)
        self._saved = training.step
        yield {"type": "checkpoint", "step": training.step}
        self._history()

    def _begin(self) -> Iterator[Event]:
        training, folder = self.training, self.folder
        steps = {"steps": training.total_steps, "device": str(self.device)}
        saved = checkpoint.list_checkpoints(folder / CHECKPOINTS)
        if not saved:
            yield {"type": "start", "step": -1} | steps  # takes back all that an attempt has recorded
            yield from self.measure()
            return
        try:
            state = restore(training, saved[-1])
        except InputError as error:
            older = f"go on from step {saved[-2].step}" if len(saved) > 1 else "start over"
            files = saved[-1].path("*")
            raise InputError(f"The newest checkpoint is damaged: {error}. Delete {files} to {older}") from None
        self.group.broadcast_json({"do": "restore", "step": training.step})
        self.best, self._waited = state["best"], state["waited"]
        yield {"type": "resume", "step": training.step} | steps
        for event in _remembered(folder):
            self.alarms.hear(event)

    def _finish(self) -> Iterator[Event]:
        training, folder = self.training, self.folder
        export_text(self._clip(), folder / RESULT, self._metadata())
        yield from self._gather()
        if self.control.ends:  # there is no result.json yet: the run goes on from its last step, and finishes then
            kind = "discarded" if self.control.discards else "stopped"
            yield {"type": kind, "step": training.step, "steps": training.total_steps}
            return
        if self.config.train == "both":
            state = {name: tensor.cpu() for name, tensor in self._clip().state_dict().items()}
            path, metadata = folder / "clip.safetensors", self.scene.metadata
            write_clip(state, path, layout="openai", config=training.clip.config, metadata=metadata)
        result = {
            "steps": training.step,
            "early": training.step < training.total_steps,  # by `patience`
            "skipped": training.skipped,
            "best": self.best,
            "memory": self.taken.as_json(),
            "measurements": [event for event in telemetry.read(folder, kinds=("measure",))],
        }
        write_json(result, folder / "result.json")
        history = self._history().whole()
        try:
            save(plot_losses(history), folder / "loss.png")
        except Exception as error:
            yield self._without("no_picture", "loss picture", error)
        try:
            write_report(folder, history)
        except Exception as error:
            yield self._without("no_report", "report", error)
        yield {"type": "done", "step": training.step, "resumed": False, "early": result["early"]}

    def _gather(self) -> Iterator[Event]:
        """Writes down what the run has changed; holds and ends in between when it is asked to."""
        work = self._evidence()
        while True:
            try:
                event = next(work, None)
            except Exception as error:
                yield self._without("no_evidence", "evidence of what has changed", error)
                return
            if event is None:
                return
            yield event
            for told in self.control.obey(self.training.step, {}, self._offload):
                yield told
                self.alarms.hear(told)
            if self.control.ends:
                work.close()
                return

    def _evidence(self) -> Iterator[Event]:
        scene, training, clip = self.scene, self.training, self._clip()
        broken = load(TextTower, clip.text_config, text_part(scene.start)).requires_grad_(False).to(self.device)
        towers = {"broken": broken, "repaired": clip}
        if scene.reference is not None:
            towers["original"] = scene.reference
        images = yield from self._images(towers)
        target = tuple(dict.fromkeys(anchor.read_point for anchor in self.config.anchors))
        found = yield from evidence.gather(
            towers, scene.prompts, scene.held.index, scene.held.ids, images, target=target, folder=self.folder
        )
        sources = {
            "broken": scene.sources["text"],
            "repaired": open_text(self.folder / RESULT).source(),
            "original": scene.sources.get("original") if scene.reference is not None else None,
            "vision": scene.sources["vision"] if len(scene.held.index) else None,
        }
        step, steps = training.step, training.total_steps
        run = {"step": step, "steps": steps, "early": step < steps, "train": self.config.train}
        write_json(evidence.as_json(found, sources, run, self.device), self.folder / evidence.EVIDENCE)

    def _images(self, towers: Mapping[str, TextTower]) -> Generator[Event, None, dict[str, Tensor]]:
        """The held-out pictures as the vision tower of each text tower sees them: only the repaired one's has moved."""
        held, clip = self.scene.held, self._clip()
        if held.features is not None or not len(held.index):
            return dict.fromkeys(towers, held.features)
        vision = (
            load(VisionTower, clip.visual.vision_config, vision_part(self.scene.start))
            .requires_grad_(False)
            .to(self.device)
        )
        crop = (held.pictures, held.boxes)
        before = yield from evidence.embed(vision, held.index, "pictures as they were seen before", *crop)
        after = yield from evidence.embed(clip.visual, held.index, "pictures as they are seen now", *crop)
        return dict.fromkeys(towers, before) | {"repaired": after}

    def _without(self, alarm: str, what: str, error: Exception) -> Event:
        """What a run can do without must not decide over it."""
        log.exception("no %s for %s", what, self.folder.name)
        advice = f"no {what}: {error}"
        step = self.training.step
        return {"type": "alarm", "alarm": alarm, "step": step, "raised": True, "advice": advice, "value": None}

    def _history(self) -> History:
        history = History.load(self.folder)
        history.follow()
        history.save(self.folder / SNAPSHOT)
        return history

    def _metadata(self) -> dict[str, str]:
        return self.scene.metadata | {"step": str(self.training.step)}

    def _offload(self, away: bool) -> None:
        self._gathered.clear()
        self.group.broadcast_json({"do": "offload", "away": away})
        reference = [self.scene.reference] if self.scene.reference else []
        towers = [*self.scene.teachers.values(), *reference]
        move(self.training, self.scene.pairs, towers, self.device, away, self.group)


def move(
    training: Training, pairs: Pairs, towers: Sequence[TextTower], device: torch.device, away: bool, group: Group
) -> None:
    """Moves a training and towers beside it from their device to the CPU, or back.

    Weights that are shared out stay: FSDP has them in memory of its own.
    """
    clip, optimizer, shards = training.clip, training.optimizer, training.shards
    staying = [] if pairs.pixels else [clip.visual]  # a locked one is on the CPU already
    staying += [clip.transformer, clip.visual.transformer] if shards else []
    place = torch.device("cpu") if away else device
    mean = [training.ema.clip()] if training.ema and not shards else []  # means that are shared out stay, too
    memory.move([clip, *mean, *towers], optimizer if shards else own(optimizer, group), place, staying)
    if away:
        memory.release(device)


def restore(training: Training, saved: checkpoint.Checkpoint) -> dict[str, object]:
    """Takes a training to a saved step; the checkpoint's JSON state. Raises InputError as `checkpoint.restore`."""
    means = training.ema.means if training.ema else {}
    state = checkpoint.restore(saved, training.clip, training.optimizer, training.shards.parts, means)
    training.restore(state)
    return state


def whole_clip(training: Training, mean: bool) -> CLIP:
    """The CLIP with all weights, or means, in the first process. Where they are shared out all processes call it."""
    return training.ema.clip() if mean else training.shards.whole_clip(training.clip)


def whole_optimizer(training: Training, group: Group) -> torch.optim.Optimizer | SimpleNamespace:
    """The optimizer's groups and state with all moments, in the first process. All processes call it."""
    if training.shards:
        return training.shards.whole_optimizer(training.optimizer)
    return whole(training.optimizer, group)


def goodness(by: str, losses: Mapping[str, float], values: Mapping[str, object]) -> float:
    """What the best encoder has the most of, by one of `BEST_BY`; finite always, the least for NaN."""
    if by == "objective":
        worth = -losses["loss"]
    elif by == "recall":
        worth = (values["recall_at_1_text_to_image"] + values["recall_at_1_image_to_text"]) / 2
    else:
        worth = values["drift"][by]["cosine"]
    return worth if math.isfinite(worth) else -sys.float_info.max


def _remembered(folder: Path) -> list[Event]:
    """What a run that goes on has recorded and not taken back, without what it recorded layer by layer."""
    path = folder / telemetry.EVENTS
    found: list[Event] = []
    for _, event in telemetry.lines(path, max(0, os.path.getsize(path) - REMEMBERED)):
        if event["type"] == "resume":
            found = [one for one in found if one.get("step", 0) <= event["step"]]
        found.append({name: value for name, value in event.items() if name not in ("grad_norms", "update_ratios")})
    return found


def text_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The text encoder's part of a canonical state dict, r and theta folded, in fp32 on the CPU."""
    return fold_state({n: t.detach().cpu().float() for n, t in state.items() if not n.startswith("visual.")})


def export_text(clip: CLIP, path: Path, metadata: dict[str, str]) -> None:
    """Writes the text encoder of a CLIP that may be in GmP form: Hugging Face names, fp32, ready for the CLIP slot."""
    write_text(text_state(clip.state_dict()), path, config=clip.text_config, metadata=metadata)
