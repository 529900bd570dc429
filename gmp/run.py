"""One repair from inputs to result, in a run folder that is the long-term truth.

`repair` is a generator of events: it resumes what the folder holds, trains, measures, saves and exports. `Worker`
drives it in a thread. The same inputs and settings are the same run, named by `run_id`.

    run.json            settings and identity of the inputs
    join.json           where every tensor of the joined CLIP came from
    dataset.json        what the data set holds, what was left out and why
    events.jsonl        everything that happened, one event per line
    checkpoints/        weights, optimizer and state of the newest steps
    best_text_encoder.safetensors   lowest loss on held-out pairs
    text_encoder.safetensors        the result: the newest step
    result.json, loss.png
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from . import __version__, checkpoint, telemetry
from .clip import CLIP, TextTower
from .config import RepairConfig
from .data.captions import Index, check_pictures, first_captions, split
from .data.images import PicturesAhead, load_batches
from .errors import InputError
from .events import Event
from .features import content_keys, embed_pictures
from .files import write_json
from .geometric import fold_state
from .join import Joined, join, text_tower, unlike
from .layouts import TowerFile, write_clip, write_text
from .measure import measure_tower
from .plots import plot_losses
from .tokenizer import Tokens
from .trainer import Pairs, Training, begin, held_out_loss, set_up, train

log = logging.getLogger(__name__)

_probing = threading.Lock()  # two who look at once must not take each other for the owner

RESULT = "text_encoder.safetensors"
BEST = "best_text_encoder.safetensors"
HOUSEKEEPING = ("save_every", "keep")  # settings that change no result


@dataclass(frozen=True)
class Inputs:
    """What a repair starts from. `original` is the text tower of the vision tower's CLIP, where the file has one."""

    text: TowerFile
    vision: TowerFile
    original: TowerFile | None
    index: Index
    tokenize: Callable[[list[str]], Tokens]


@dataclass(frozen=True)
class Status:
    """What a run folder holds: `empty`, `running`, `interrupted` (resumable at `step`) or `finished`."""

    state: str
    step: int

    def __str__(self) -> str:
        return f"interrupted, resumable at step {self.step}" if self.state == "interrupted" else self.state


def _lock(folder: Path, timeout: float = 0.0) -> FileLock:
    """Held by whoever trains in the folder; the system lets go of it when that process dies. timeout: seconds"""
    # whoever closes the run may be another thread than the one that began it
    return FileLock(folder / "lock", timeout=timeout, thread_local=False)


def is_done(folder: Path) -> bool:
    """Whether a run has its result: there is nothing to go on with."""
    return (folder / "result.json").exists() and (folder / RESULT).exists()


def _saved_step(folder: Path) -> int:
    """The step that a run can go on from."""
    saved = checkpoint.list_checkpoints(folder / "checkpoints")
    return saved[-1].step if saved else 0


def status(folder: Path) -> Status:
    """Computed from the folder and the lock's owner, never stored: a crashed run does not look alive."""
    if not (folder / "run.json").exists():
        return Status("empty", 0)
    step = _saved_step(folder)
    try:
        with _probing, _lock(folder, timeout=0.1):
            return Status("finished" if (folder / "result.json").exists() else "interrupted", step)
    except Timeout:
        return Status("running", step)


def describe_run(inputs: Inputs, keys: list[str], config: RepairConfig) -> dict[str, object]:
    """Settings and identity of all inputs; two runs are the same if, and only if, these are equal."""
    captions = [(picture.path, key, picture.captions) for picture, key in zip(inputs.index.pictures, keys, strict=True)]
    return {
        "config": {name: value for name, value in config.to_json().items() if name not in HOUSEKEEPING},
        "text": _identity(inputs.text),
        "vision": _identity(inputs.vision),
        "original": inputs.original and _identity(inputs.original),
        "dataset": hashlib.sha256(json.dumps(captions).encode()).hexdigest(),
    }


def _identity(file: TowerFile) -> dict[str, object]:
    """A file's content and how it was read: it may hold several encoders; heads and activation may be a choice."""
    shape = {name: value for name, value in asdict(file.config).items() if name != "assumed"}
    return {"sha256": file.source.sha256, "member": file.source.member} | shape


def run_id(description: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


def _check_foreign(folder: Path) -> None:
    """Raises InputError when the folder holds something that is no run."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; a run needs a folder")
    if folder.exists() and not (folder / "run.json").exists():
        strangers = [p.name for p in folder.iterdir() if p.name not in ("lock", "failure.txt")]
        if strangers:
            raise InputError(
                f"{folder} is not empty and not a run's folder (it holds {', '.join(strangers[:5])}); choose another"
            )


def _check_same(folder: Path, description: dict[str, object]) -> None:
    """Raises InputError when the folder belongs to another run, naming what differs."""
    path = folder / "run.json"
    if not path.exists():
        return
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        config = dict(known["config"])
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is damaged; choose another folder") from None
    differing = [
        f"{name} was {config.get(name)!r}, is {value!r}"
        for name, value in description["config"].items()
        if config.get(name) != value
    ]
    differing += [
        f"another {name} was used" for name in description if name != "config" and known.get(name) != description[name]
    ]
    if differing:
        raise InputError(
            f"{folder} holds another run: {'; '.join(differing)}. Choose another folder, or repeat the run's settings"
        )


def repair(
    inputs: Inputs,
    config: RepairConfig,
    folder: Path,
    *,
    cache: Path,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Runs or resumes a repair in `folder`; the last event is `done` or `stopped`.

    Everything that can be known before training is checked first. A stopped run has saved its step. Raises InputError
    for inputs that do not work, for a folder of another run, and when another process is at work in the folder.
    """
    _check_foreign(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _lock(folder, timeout=1.0):  # longer than `status` holds it
            for event in _repair(inputs, config, folder, cache, device, stop):
                event["t"] = round(time.time(), 3)
                if event["type"] != "progress":
                    telemetry.append(folder, event)
                yield event
                if event["type"] == "progress" and stop():
                    last = {
                        "type": "stopped",
                        "step": _saved_step(folder),
                        "steps": None,
                        "run": str(folder),
                        "t": event["t"],
                    }
                    if (folder / "run.json").exists():
                        telemetry.append(folder, last)
                    yield last
                    return
    except Timeout:
        raise InputError(f"{folder} is being trained by another process; wait for it or stop it") from None


def _repair(
    inputs: Inputs, config: RepairConfig, folder: Path, cache: Path, device: torch.device, stop: Callable[[], bool]
) -> Iterator[Event]:
    names = [picture.path for picture in inputs.index.pictures]
    keys = yield from content_keys(inputs.index.root, names, cache)
    description = describe_run(inputs, keys, config)
    _check_same(folder, description)
    if is_done(folder):
        yield {"type": "done", "run": str(folder), "resumed": True}
        return
    _check_size(len(names), config)
    check_anchors(inputs.text, inputs.vision, inputs.original, config)
    joined = join(inputs.text, inputs.vision, inputs.original)
    clip = joined.build().to(device)
    optimizer = set_up(clip, config, device)

    if not (folder / "run.json").exists():
        write_json(description | {"gmp_version": __version__}, folder / "run.json")
    write_json(joined.as_json(), folder / "join.json")
    difference = inputs.original and unlike(inputs.text, inputs.original)
    notes = [f"drift is not measured: {difference}"] if difference else []
    yield {"type": "join", "tensors": joined.summary(), "assumptions": joined.assumptions, "notes": notes}

    data = yield from _data(inputs, clip, keys, config, cache)
    write_json(data.report, folder / "dataset.json")
    yield {"type": "dataset"} | data.report

    if config.train == "text":
        clip.visual.cpu()  # its work is done
    teachers = {name: tower.to(device) for name, tower in _teachers(inputs, joined, config).items()}
    reference = teachers.get("original")
    if inputs.original and not difference and not reference:
        reference = text_tower(inputs.original, joined).to(device)
    training = begin(clip, optimizer, data.pairs.counts, config, device)
    scene = Scene(data.pairs, data.held, teachers, reference, _metadata(folder, joined))
    try:
        yield from _train(training, scene, config, folder, device, stop)
    finally:
        if data.pairs.pixels:
            data.pairs.pixels.close()


def _check_size(pictures: int, config: RepairConfig) -> None:
    held_out = _held_out(pictures, config)
    if pictures - held_out < config.step_pairs:
        raise InputError(
            f"{pictures} pictures, of which {held_out} are held out, are fewer than one step of {config.step_pairs} "
            f"pairs (batch {config.batch} × accumulate {config.accumulate}); add pictures, or make the batch smaller"
        )


def _held_out(pictures: int, config: RepairConfig) -> int:
    """How many pictures are measured and not trained on: at least 2 unless none are wanted, at most half."""
    if not config.held_out:
        return 0
    return min(max(2, round(config.held_out * pictures)), config.held_out_most, pictures // 2)


def check_anchors(text: TowerFile, vision: TowerFile, original: TowerFile | None, config: RepairConfig) -> None:
    """Raises InputError for an anchor to an original that is not there, or that has another shape."""
    if not any(anchor.teacher == "original" for anchor in config.anchors):
        return
    advice = "give the full original CLIP as the vision file, or set the anchors to none"
    if original is None:
        raise InputError(f"{vision.source.path} has no text tower to anchor to; {advice}")
    if difference := unlike(text, original):
        raise InputError(f"The repair cannot be anchored: {difference}; {advice}")


def _teachers(inputs: Inputs, joined: Joined, config: RepairConfig) -> dict[str, TextTower]:
    files = {"original": inputs.original, "broken": inputs.text}
    return {name: text_tower(files[name], joined) for name in sorted({anchor.teacher for anchor in config.anchors})}


# ---- data -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOut:
    """Pairs that are measured and never trained on."""

    index: Index
    ids: Tensor  # (captions, context_length)
    features: Tensor | None  # (pictures, embed_dim) of a locked vision tower

    @torch.no_grad()
    def image_features(self, clip: CLIP) -> Tensor:
        """(pictures, embed_dim): as they were cached, or by the tower as it is now"""
        if self.features is not None:
            return self.features
        batches = load_batches(self.index.paths, clip.visual.vision_config.image_size, batch=64)
        return torch.cat([clip.encode_image(pixels.to(clip.logit_scale.device)).float().cpu() for pixels in batches])


@dataclass(frozen=True)
class Data:
    """What a run trains on, what it measures, and the report of both."""

    pairs: Pairs
    held: HeldOut
    report: dict[str, object]


def _data(
    inputs: Inputs, clip: CLIP, keys: list[str], config: RepairConfig, cache: Path
) -> Generator[Event, None, Data]:
    """The pictures that decode, embedded where the vision tower is locked, and their captions as tokens."""
    index, features = inputs.index, None
    if config.train == "text":
        names = [picture.path for picture in index.pictures]
        features, broken = yield from embed_pictures(clip.visual, index.root, names, keys, cache)
        index = index.without(broken)
    else:
        index = yield from check_pictures(index)
    train_index, held_index = split(index, _held_out(len(index), config), config.seed)
    train_tokens = inputs.tokenize(train_index.captions())
    held_tokens = inputs.tokenize(held_index.captions())
    report = asdict(index.report) | {
        "training pictures": len(train_index),
        "held-out pictures": len(held_index),
        "captions cut to the context length": train_tokens.truncated + held_tokens.truncated,
        "captions with a literal special token taken out": train_tokens.specials + held_tokens.specials,
    }
    if features is None:
        pixels = PicturesAhead(train_index.paths, clip.visual.vision_config.image_size)
        pairs = Pairs(train_tokens.ids, train_index.caption_counts, None, pixels)
        return Data(pairs, HeldOut(held_index, held_tokens.ids, None), report)
    pairs = Pairs(train_tokens.ids, train_index.caption_counts, _rows(features, train_index), None)
    return Data(pairs, HeldOut(held_index, held_tokens.ids, _rows(features, held_index)), report)


def _rows(features: dict[str, Tensor], index: Index) -> Tensor:
    """Features of an index's pictures, in its order: (pictures, embed_dim)"""
    return torch.stack([features[picture.path] for picture in index.pictures]) if len(index) else torch.empty(0, 0)


# ---- training -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """What stands still while a training moves."""

    pairs: Pairs
    held: HeldOut
    teachers: dict[str, TextTower]
    reference: TextTower | None  # that drift is measured from
    metadata: dict[str, str]  # of every file that is written


def _train(
    training: Training, scene: Scene, config: RepairConfig, folder: Path, device: torch.device, stop: Callable[[], bool]
) -> Iterator[Event]:
    clip = training.clip
    best: dict[str, float] | None = None  # step 0: no step was better than the start

    def save() -> Event:
        state = training.state() | {"best": best}
        saves = folder / "checkpoints"
        checkpoint.save(saves, training.step, clip, training.optimizer, state, config.keep, scene.metadata)
        return {"type": "checkpoint", "step": training.step}

    def export(name: str) -> None:
        export_text(clip, folder / name, scene.metadata | {"step": str(training.step)})

    saved = checkpoint.list_checkpoints(folder / "checkpoints")
    if saved:
        try:
            state = checkpoint.restore(saved[-1], clip, training.optimizer)
        except InputError as error:
            older = f"go on from step {saved[-2].step}" if len(saved) > 1 else "start over"
            files = saved[-1].path("*")
            raise InputError(f"The newest checkpoint is damaged: {error}. Delete {files} to {older}") from None
        training.restore(state)
        best = state["best"]
        telemetry.rewind(folder, training.step)
        yield {"type": "resume", "step": training.step, "steps": training.total_steps}
    else:
        telemetry.rewind(folder, -1)
        yield {"type": "start", "steps": training.total_steps, "device": str(device)}
        for values in _measured(training, scene, config):
            best = {"step": 0, "loss": min(values["held_out"]["loss"], sys.float_info.max)}
            yield values

    for event in train(training, scene.pairs, scene.teachers, config, device):
        yield event
        if event["type"] != "step":
            continue
        end_of_epoch = training.step % training.sampler.batches_per_epoch == 0
        if end_of_epoch:
            for values in _measured(training, scene, config):
                if values["held_out"]["loss"] < best["loss"]:
                    best = {"step": training.step, "loss": values["held_out"]["loss"]}
                    export(BEST)
                yield values
        stopping = stop() and training.step < training.total_steps
        if end_of_epoch or stopping or training.step % config.save_every == 0:
            yield save()
        if stopping:
            export(RESULT)
            yield {"type": "stopped", "step": training.step, "steps": training.total_steps, "run": str(folder)}
            return

    export(RESULT)
    if config.train == "both":
        state = {name: tensor.cpu() for name, tensor in clip.state_dict().items()}
        write_clip(state, folder / "clip.safetensors", layout="openai", config=clip.config, metadata=scene.metadata)
    events = telemetry.read(folder)
    result = {
        "steps": training.step,
        "skipped": training.skipped,
        "best": best,
        "measurements": [event for event in events if event["type"] == "measure"],
    }
    write_json(result, folder / "result.json")
    try:
        plot_losses(events, folder / "loss.png")
    except Exception as error:  # a picture must not decide over a run
        log.exception("no loss picture for %s", folder.name)
        yield {"type": "alarm", "alarm": "no_picture", "step": training.step, "advice": f"no loss picture: {error}"}
    yield {"type": "done", "run": str(folder), "resumed": False}


def _measured(training: Training, scene: Scene, config: RepairConfig) -> Iterator[Event]:
    """A `measure` event, if there are pairs to measure on."""
    held = scene.held
    if not len(held.index):
        return
    features = held.image_features(training.clip)
    first = first_captions(held.index.caption_counts)
    losses = held_out_loss(training.clip, features, held.ids[first], scene.teachers, config)
    values = measure_tower(training.clip, features, held.ids, held.index.owners(), scene.reference)
    yield {"type": "measure", "step": training.step, "held_out": losses} | values


def _metadata(folder: Path, joined: Joined) -> dict[str, str]:
    known = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return {
        "clip_config": json.dumps({"text": asdict(joined.config.text)}),
        "gmp_run": json.dumps(known, sort_keys=True),
        "gmp_sources": json.dumps(joined.summary()),
    }


def text_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The text encoder's part of a canonical state dict, r and theta folded, in fp32 on the CPU."""
    return fold_state({n: t.detach().cpu().float() for n, t in state.items() if not n.startswith("visual.")})


def export_text(clip: CLIP, path: Path, metadata: dict[str, str]) -> None:
    """Writes the text encoder of a CLIP that may be in GmP form: Hugging Face names, fp32, ready for the CLIP slot."""
    write_text(text_state(clip.state_dict()), path, config=clip.text_config, metadata=metadata)


class Worker:
    """Drives a repair in a thread of its own and keeps its newest event."""

    def __init__(
        self, events: Callable[[Callable[[], bool]], Iterator[Event]], folder: Path, listen: Callable[[Event], None]
    ):
        """`events` takes the stop function and gives the generator; `listen` hears every event, in the thread."""
        self.folder = folder
        self.latest: Event = {"type": "queued"}
        self.error: Exception | None = None
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._events = events
        self._listen = listen
        self._thread = threading.Thread(target=self._work, name=f"gmp {folder.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Asks for a stop at the next step's boundary, where the run saves itself."""
        self._stop.set()

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def wait(self, seconds: float) -> Event:
        """Waits for an event, `seconds` at most, and returns the newest one."""
        with self._changed:
            if self.alive:
                self._changed.wait(seconds)
        return self.latest

    def _work(self) -> None:
        try:
            events, self._events = self._events, None  # what the run holds is freed when it is through
            for event in events(self._stop.is_set):
                self._hear(event)
        except Exception as error:  # the thread's last stand: what went wrong becomes the run's `failed` event
            with contextlib.suppress(OSError):  # the disk may be what failed
                (self.folder / "failure.txt").write_text(traceback.format_exc(), encoding="utf-8")
            traceback.clear_frames(error.__traceback__)  # their variables hold the model, on the card even
            self.error = error.with_traceback(None)
            self._hear({"type": "failed", "error": str(error), "t": round(time.time(), 3)})

    def _hear(self, event: Event) -> None:
        self.latest = event
        try:
            self._listen(event)
        except Exception:  # whoever listens must not end the training
            log.exception("a listener of run %s failed", self.folder.name)
        with self._changed:
            self._changed.notify_all()
