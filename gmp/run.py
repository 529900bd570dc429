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
import copy
import hashlib
import json
import math
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
from .data.captions import Index, check_pictures, split
from .data.images import PicturesAhead
from .errors import InputError
from .features import content_keys, embed_pictures
from .files import write_json
from .geometric import fold, fold_state
from .join import Joined, join, text_tower
from .layouts import TowerFile, write_clip, write_text
from .measure import measure_tower
from .plots import plot_losses
from .tokenizer import Tokens
from .trainer import Pairs, Training, held_out_loss, prepare, train

Event = dict[str, object]
RESULT = "text_encoder.safetensors"
BEST = "best_text_encoder.safetensors"


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


def status(folder: Path) -> Status:
    """Computed from the folder and the lock's owner, never stored: a crashed run does not look alive."""
    if not (folder / "run.json").exists():
        return Status("empty", 0)
    saved = checkpoint.list_checkpoints(folder / "checkpoints")
    step = saved[-1].step if saved else 0
    try:
        with _lock(folder):
            return Status("finished" if (folder / "result.json").exists() else "interrupted", step)
    except Timeout:
        return Status("running", step)


def describe_run(inputs: Inputs, keys: list[str], config: RepairConfig) -> dict[str, object]:
    """Settings and identity of all inputs; two runs are the same if, and only if, these are equal."""
    captions = [(picture.path, key, picture.captions) for picture, key in zip(inputs.index.pictures, keys, strict=True)]
    return {
        "config": config.to_json(),
        "text": _identity(inputs.text),
        "vision": _identity(inputs.vision),
        "original": inputs.original and _identity(inputs.original),
        "dataset": hashlib.sha256(json.dumps(captions).encode()).hexdigest(),
    }


def _identity(file: TowerFile) -> dict[str, object]:
    """A file's content and how it was read: it may hold several encoders; heads and activation may be a choice."""
    return {"sha256": file.source.sha256, "member": file.source.member} | asdict(file.config)


def run_id(description: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


def _check_folder(folder: Path, description: dict[str, object]) -> None:
    """Raises InputError when the folder belongs to another run, naming what differs, or to something else."""
    path = folder / "run.json"
    if not path.exists():
        strangers = [p.name for p in folder.iterdir() if p.name not in ("lock", "failure.txt")]
        if strangers:
            raise InputError(f"{folder} is not empty and not a run's folder (it holds {strangers[:5]}); choose another")
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

    Everything that must be known before training is checked first. A stopped run has saved its step. Raises InputError
    for inputs that do not work, for a folder of another run, and when another process is at work in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _lock(folder, timeout=1.0):  # longer than `status` holds it
            for event in _repair(inputs, config, folder, cache, device, stop):
                event["t"] = round(time.time(), 3)
                if event["type"] != "progress":
                    telemetry.append(folder, event)
                yield event
                if event["type"] == "progress" and stop():
                    yield {"type": "stopped", "step": 0, "steps": None, "run": str(folder)}
                    return
    except Timeout:
        raise InputError(f"{folder} is being trained by another process; wait for it or stop it") from None


def _repair(
    inputs: Inputs, config: RepairConfig, folder: Path, cache: Path, device: torch.device, stop: Callable[[], bool]
) -> Iterator[Event]:
    names = [picture.path for picture in inputs.index.pictures]
    keys = yield from content_keys(inputs.index.root, names, cache)
    description = describe_run(inputs, keys, config)
    _check_folder(folder, description)
    if (folder / "result.json").exists() and (folder / RESULT).exists():
        yield {"type": "done", "run": str(folder), "resumed": True}
        return
    held_out = _held_out(len(names), config)
    if len(names) - held_out < config.step_pairs:
        raise InputError(
            f"{len(names)} pictures, of which {held_out} are held out, are fewer than one step of {config.step_pairs} "
            f"pairs (batch {config.batch} × accumulate {config.accumulate}); add pictures, or make the batch smaller"
        )
    joined = join(inputs.text, inputs.vision, inputs.original)
    teachers = _teachers(inputs, joined, config, device)
    if not (folder / "run.json").exists():
        write_json(description | {"gmp_version": __version__}, folder / "run.json")
    report = {"tensors": [asdict(origin) for origin in joined.report], "assumptions": joined.assumptions}
    write_json(report, folder / "join.json")
    yield {"type": "join", "tensors": joined.summary(), "assumptions": joined.assumptions}
    clip = joined.build().to(device)

    index, pictures = yield from _pictures(inputs.index, clip, names, keys, config, cache)
    train_index, held_index = split(index, _held_out(len(index), config), config.seed)
    training_tokens = inputs.tokenize(train_index.captions())
    held_tokens = inputs.tokenize(held_index.captions())
    dataset = asdict(index.report) | {
        "training pictures": len(train_index),
        "held-out pictures": len(held_index),
        "captions cut to the context length": training_tokens.truncated + held_tokens.truncated,
        "captions with a literal special token taken out": training_tokens.specials + held_tokens.specials,
    }
    write_json(dataset, folder / "dataset.json")
    yield {"type": "dataset"} | dataset

    pairs = Pairs(
        training_tokens.ids,
        train_index.caption_counts,
        _rows(pictures, train_index) if pictures else None,
        None if pictures else PicturesAhead(train_index.paths, clip.visual.vision_config.image_size),
    )
    held = HeldOut(
        held_index,
        held_tokens.ids,
        _rows(pictures, held_index) if pictures else None,
    )
    reference = teachers.get("original") or (inputs.original and text_tower(inputs.original, joined).to(device))
    training = prepare(clip, pairs, config, device)
    yield from _train(training, pairs, held, teachers, reference, config, folder, joined, device, stop)


def _held_out(pictures: int, config: RepairConfig) -> int:
    """How many pictures are measured and not trained on: at least 2 unless none are wanted, at most half."""
    if not config.held_out:
        return 0
    return min(max(2, round(config.held_out * pictures)), config.held_out_most, pictures // 2)


def _pictures(
    index: Index, clip: CLIP, names: list[str], keys: list[str], config: RepairConfig, cache: Path
) -> Generator[Event, None, tuple[Index, dict[str, Tensor] | None]]:
    """The pictures that decode, and their features where the vision tower is locked."""
    if config.train == "both":
        yield {"type": "progress", "stage": "check pictures", "done": 0, "total": len(index)}
        return check_pictures(index), None
    found, broken = yield from embed_pictures(clip.visual, index.root, names, keys, cache)
    return index.without(broken), found


def _teachers(inputs: Inputs, joined: Joined, config: RepairConfig, device: torch.device) -> dict[str, TextTower]:
    wanted = {anchor.teacher for anchor in config.anchors}
    if "original" in wanted and inputs.original is None:
        raise InputError(
            f"{inputs.vision.source.path} has no text tower to anchor to; give the full original CLIP as the vision "
            "file, or set the anchors to none"
        )
    files = {"original": inputs.original, "broken": inputs.text}
    towers = {name: text_tower(files[name], joined).to(device) for name in sorted(wanted)}
    for name, tower in towers.items():
        if tower.text_config.width != joined.config.text.width:
            raise InputError(
                f"the anchor's {name} text tower is {tower.text_config.width} wide, the encoder to repair "
                f"{joined.config.text.width}"
            )
    return towers


def _rows(features: dict[str, Tensor], index: Index) -> Tensor:
    """Features of an index's pictures, in its order: (pictures, embed_dim)"""
    return torch.stack([features[picture.path] for picture in index.pictures]) if len(index) else torch.empty(0, 0)


@dataclass(frozen=True)
class HeldOut:
    """Pairs that are measured and never trained on."""

    index: Index
    ids: Tensor  # (captions, context_length)
    features: Tensor | None  # (pictures, embed_dim) of a locked vision tower

    @torch.no_grad()
    def image_features(self, clip: CLIP) -> Tensor:
        if self.features is not None:
            return self.features
        load = PicturesAhead(self.index.paths, clip.visual.vision_config.image_size)
        device = clip.logit_scale.device
        chunks = torch.arange(len(self.index)).split(64)
        return torch.cat([clip.encode_image(load(chunk.tolist()).to(device)).float().cpu() for chunk in chunks])


def _train(
    training: Training,
    pairs: Pairs,
    held: HeldOut,
    teachers: dict[str, TextTower],
    reference: TextTower | None,
    config: RepairConfig,
    folder: Path,
    joined: Joined,
    device: torch.device,
    stop: Callable[[], bool],
) -> Iterator[Event]:
    clip = training.clip
    saves = folder / "checkpoints"
    best: dict[str, float] | None = None
    metadata = _metadata(folder, joined)

    def measured() -> Iterator[Event]:
        if not len(held.index):
            return
        features = held.image_features(clip)
        first = torch.tensor((0, *held.index.caption_counts[:-1])).cumsum(0)
        losses = held_out_loss(clip, features, held.ids[first], teachers, config)
        values = measure_tower(clip, features, held.ids, held.index.owners(), reference)
        yield {"type": "measure", "step": training.step, "held_out": losses} | values

    def save() -> Event:
        state = training.state() | {"best": best}
        # whole text tower, so that a checkpoint can be used without the files it came from
        checkpoint.save(saves, training.step, clip, training.optimizer, state, config.keep, metadata)
        return {"type": "checkpoint", "step": training.step}

    saved = checkpoint.list_checkpoints(saves)
    if saved:
        state = checkpoint.restore(saved[-1], clip, training.optimizer)
        training.restore(state)
        best = state["best"]
        telemetry.rewind(folder, training.step)
        yield {"type": "resume", "step": training.step, "steps": training.total_steps}
    else:
        telemetry.rewind(folder, -1)
        yield {"type": "start", "steps": training.total_steps, "device": str(device)}
        yield from measured()

    per_epoch = training.sampler.batches_per_epoch
    for event in train(training, pairs, teachers, config, device):
        yield event
        if event["type"] != "step":
            continue
        end_of_epoch = training.step % per_epoch == 0
        if end_of_epoch:
            for values in measured():
                if values["held_out"]["loss"] < (best["loss"] if best else math.inf):
                    best = {"step": training.step, "loss": values["held_out"]["loss"]}
                    export_text(clip, folder / BEST, metadata | {"step": str(training.step)})
                yield values
        stopping = stop() and training.step < training.total_steps
        if end_of_epoch or stopping or training.step % config.save_every == 0:
            yield save()
        if stopping:
            export_text(clip, folder / RESULT, metadata | {"step": str(training.step)})
            yield {"type": "stopped", "step": training.step, "steps": training.total_steps, "run": str(folder)}
            return

    export_text(clip, folder / RESULT, metadata | {"step": str(training.step)})
    if config.train == "both":
        folded = copy.deepcopy(clip).cpu()
        fold(folded)
        write_clip(
            folded.state_dict(), folder / "clip.safetensors", layout="openai", config=clip.config, metadata=metadata
        )
    result = {
        "steps": training.step,
        "skipped": training.skipped,
        "best": best,
        "measurements": [e for e in telemetry.read(folder) if e["type"] == "measure"],
    }
    plot_losses(telemetry.read(folder), folder / "loss.png")
    write_json(result, folder / "result.json")
    yield {"type": "done", "run": str(folder), "resumed": False}


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
        self._listen(event)
        with self._changed:
            self._changed.notify_all()
