"""One repair from inputs to result, in a run folder that is the long-term truth.

`repair` is a generator of events: it waits for its device, resumes what the folder holds, trains, measures, saves and
exports, and does what it is asked meanwhile (`control`). The same inputs and settings are the same run, named by
`run_id`. What a run is doing is computed from its live owner (`owner`), never stored.

    run.json            settings and identity of the inputs
    config.toml         the settings, each with a sentence; another run takes them from here
    join.json           where every tensor of the joined CLIP came from
    dataset.json        what the data set holds, what was left out and why
    events.jsonl        everything that happened, one event per line (`telemetry`)
    history.npz         the same, condensed; may be deleted
    checkpoints/        weights, optimizer and state of the newest steps
    best_text_encoder.safetensors   the best on held-out pairs, by `RepairConfig.best_by`
    text_encoder.safetensors        the result: the newest step
    evidence.json, evidence/        what it has changed, before, after and the original, with small pictures
    result.json, loss.png, report.html
    failure.txt         why the run has ended, if it failed
    lock, owner.json, commands/     while it is at work
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import READ_POINTS, __version__, checkpoint, line, memory, telemetry
from .checkpoint import CHECKPOINTS
from .clip import CLIP, TextTower
from .config import RepairConfig, holding
from .control import BOX, Control
from .data.policy import check
from .distributed import ALONE, Group
from .errors import InputError
from .events import Event, Result, finish
from .evidence import EVIDENCE, THUMBNAILS
from .files import write_json, write_text
from .followers import follow, listen
from .fsdp import Shards, check_shards
from .history import SNAPSHOT
from .join import Joined, join, text_tower, unlike
from .layouts import TowerFile
from .owner import LOCK, OWNER, own, owner
from .prompts import prompts
from .session import BEST, RESULT, Scene, Session
from .sharding import shard
from .trainer import Training, begin, precision_of, set_up
from .training_data import (
    Data,
    Inputs,
    caption_tokens,
    check_source,
    dataset_identity,
    embed_piece,
    embed_together,
    picture_keys,
    training_data,
)

FAILURE = "failure.txt"
TURN = 0.25  # seconds between two looks of a run that waits for its turn
HOUSEKEEPING = ("save_every", "keep", "checkpointing")  # settings that change no result
PASSING = (LOCK, OWNER, BOX, FAILURE)  # what a folder may hold before it is a run's
FILES = (
    *("run.json", "config.toml", "join.json", "dataset.json", "result.json", "loss.png", "report.html"),
    *("clip.safetensors", "prompt.json", "command.json", telemetry.EVENTS, SNAPSHOT, RESULT, BEST, FAILURE, OWNER),
    EVIDENCE,
)
_TRAINING = ("start", "resume", "step", "measure", "checkpoint", "resumed", "alarm", "out_of_memory")


@dataclass(frozen=True)
class Status:
    """What a run is doing: `waiting`, `preparing`, `running` or `paused` while it has a live owner; without one
    `empty`, `interrupted` or `failed` (both resumable at `step`), or `finished`."""

    state: str
    step: int  # of a run at work the newest one that was taken
    device: str | None = None
    ahead: tuple[str, ...] = ()  # runs that a waiting one waits for
    error: str | None = None

    @property
    def at_work(self) -> bool:
        return self.state in ("waiting", "preparing", "running", "paused")

    def __str__(self) -> str:
        if self.state in ("interrupted", "failed"):
            return f"{self.state}, resumable at step {self.step}" + (f": {self.error}" if self.error else "")
        return f"waiting for {', '.join(self.ahead)}" if self.state == "waiting" else self.state


def is_done(folder: Path) -> bool:
    """Whether a run has its result: there is nothing to go on with."""
    return (folder / "result.json").exists() and (folder / RESULT).exists()


def saved_step(folder: Path) -> int:
    """The step that a run can go on from."""
    saved = checkpoint.list_checkpoints(folder / CHECKPOINTS)
    return saved[-1].step if saved else 0


def status(folder: Path) -> Status:
    """Computed from the folder and its live owner: a crashed run does not look alive."""
    mine = owner(folder)
    if mine is None:
        return _status_at_rest(folder)
    if ahead := line.ahead(mine.device, folder):
        return Status("waiting", saved_step(folder), mine.device, tuple(one.name for one in ahead))
    newest = telemetry.newest(folder) or {}
    step = newest.get("step")
    step = step if isinstance(step, int) else saved_step(folder)
    kind = newest.get("type")
    state = "paused" if kind == "paused" else "running" if kind in _TRAINING else "preparing"
    return Status(state, step, mine.device)


def _status_at_rest(folder: Path) -> Status:
    step = saved_step(folder)
    if (folder / "result.json").exists():
        return Status("finished", step)
    if (folder / FAILURE).exists():
        with contextlib.suppress(OSError):
            return Status("failed", step, error=(folder / FAILURE).read_text(encoding="utf-8").partition("\n")[0])
    return Status("interrupted" if (folder / "run.json").exists() else "empty", step)


def delete(folder: Path) -> list[str]:
    """Deletes a run: the files that runs make, and the folder if nothing else is in it. Returns what is left in it.

    Raises InputError while the run is at work, and for a folder that is no run's.
    """
    if not ((folder / "run.json").is_file() or (folder / FAILURE).is_file()):
        raise InputError(f"{folder} is not a run's folder; nothing was deleted")
    return _clear_away(folder)


def _clear_away(folder: Path) -> list[str]:
    with own(folder, "none"):
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        for name in (CHECKPOINTS, BOX, THUMBNAILS):
            shutil.rmtree(folder / name, ignore_errors=True)
    (folder / LOCK).unlink(missing_ok=True)
    left = sorted(path.name for path in folder.iterdir())
    if not left:
        folder.rmdir()
    return left


def describe_run(inputs: Inputs, keys: list[str], config: RepairConfig) -> dict[str, object]:
    """Settings and identity of all inputs; two runs are the same if, and only if, these are equal."""
    config = holding(config, inputs.concepts)
    return {
        "config": {name: value for name, value in config.to_json().items() if name not in HOUSEKEEPING},
        "text": _identity(inputs.text),
        "vision": _identity(inputs.vision),
        "original": inputs.original and _identity(inputs.original),
        "dataset": dataset_identity(inputs.index, keys),
        "concepts": hashlib.sha256(json.dumps(inputs.concepts).encode()).hexdigest() if inputs.concepts else None,
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
        strangers = [p.name for p in folder.iterdir() if p.name not in (*PASSING, "prompt.json", "command.json")]
        if strangers:
            raise InputError(
                f"{folder} is not empty and not a run's folder (it holds {', '.join(strangers[:5])}); choose another"
            )


class _OfAnotherRun(InputError):
    """The folder is not this run's: nothing of this one may be noted in it."""


def _check_same(folder: Path, description: dict[str, object], begun: bool) -> None:
    """Raises InputError when the folder belongs to another run, naming what differs.

    begun: whether there is work in it; otherwise other settings may take its place.
    """
    path = folder / "run.json"
    if not path.exists():
        return
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        config = dict(known["config"])
    except (ValueError, KeyError, TypeError):
        raise _OfAnotherRun(f"{path} is damaged; choose another folder") from None
    differing = list(_differing(config, description["config"]))
    differing += [
        f"another {name} was used" for name in description if name != "config" and known.get(name) != description[name]
    ]
    if differing and begun:
        raise _OfAnotherRun(
            f"{folder} holds another run: {'; '.join(differing)}. Choose another folder, or repeat the run's settings"
        )


def _differing(before: dict[str, object], now: dict[str, object], where: str = "") -> Iterator[str]:
    """A clause for every setting that is another one."""
    for name, value in now.items():
        was = before.get(name)
        if isinstance(was, dict) and isinstance(value, dict):
            yield from _differing(was, value, f"{where}{name}.")
        elif was != value:
            yield f"{where}{name} was {was!r}, is {value!r}"


def _has_begun(folder: Path) -> bool:
    """Whether a run has taken a step, saved anything, or is finished."""
    if saved_step(folder) or is_done(folder):
        return True
    return any(True for _ in telemetry.read(folder, kinds=("step",)))


def repair(
    inputs: Inputs,
    config: RepairConfig,
    folder: Path,
    *,
    cache: Path,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
    busy: Callable[[], bool] = lambda: False,
    make_room: Callable[[int], None] = lambda needed: None,
    group: Group = ALONE,
    sharded: bool = False,
) -> Iterator[Event]:
    """Runs or resumes a repair in `folder`; the last event is `done`, `stopped` or `discarded`.

    stop: whether this process wants it to stop. busy: whether the device is wanted for something else, which the run
    then waits for. make_room: asks for so many free bytes on the device. What others want comes by `control.send`.
    group: the processes that share every step; all call this alike, with a folder and a cache that all of them see. The
    first one owns the folder; of the others only steps are heard, and what they are asked for counts for nothing.
    sharded: whether they share the weights out as well (`fsdp`), which changes neither the result nor its checkpoints.

    Everything that can be known before training is checked first. A stopped run has saved its step. Raises InputError
    for inputs that do not work, for a folder of another run, when another process is at work in the folder, and when
    memory does not suffice.
    """
    given, config = config, holding(config, inputs.concepts)
    idle = [str(anchor) for anchor in given.anchors if anchor not in config.anchors]
    notes = [f"no captions of concepts were given: {', '.join(idle)} is off"] if idle else []
    if config.step_pairs < group.size:
        raise InputError(
            f"a step of {config.step_pairs} pairs cannot be shared by {group.size} processes; start fewer, or make the "
            "batch larger"
        )
    if sharded:
        check_shards(config, precision_of(config.precision, device), group)
    shards = Shards(group) if sharded else Shards()
    if group.rank:
        yield from _beside(inputs, config, folder, cache, device, group, shards)
        return
    _check_foreign(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ended = None
    place = line.device_name(device)
    with own(folder, place):
        control = Control(folder, stop, busy)
        try:
            for event in _repair(inputs, config, notes, folder, cache, device, control, make_room, group, shards):
                event["t"] = round(time.time(), 3)
                again = event["type"] == "progress" or event.get("resumed")  # nothing happened
                if not again and (folder / "run.json").exists():
                    telemetry.append(folder, event)
                yield event
                ended = event["type"]
        except Exception as error:
            _note_failure(folder, error)
            raise
        finally:
            shutil.rmtree(folder / BOX, ignore_errors=True)
    if ended == "discarded":
        _clear_away(folder)
    group.broadcast_json({"do": "end"})


def _note_failure(folder: Path, error: Exception) -> None:
    """Why the run has ended, for people who look at its folder; the disk may be what failed."""
    if isinstance(error, _OfAnotherRun):
        return
    with contextlib.suppress(OSError):
        text = "" if isinstance(error, InputError) else "\n" + "".join(traceback.format_exception(error))
        (folder / FAILURE).write_text(f"{str(error) or type(error).__name__}\n{text}", encoding="utf-8")
        if (folder / "run.json").exists():
            telemetry.append(folder, {"type": "failed", "error": str(error), "t": round(time.time(), 3)})


def _repair(
    inputs: Inputs,
    config: RepairConfig,
    notes: list[str],
    folder: Path,
    cache: Path,
    device: torch.device,
    control: Control,
    make_room: Callable[[int], None],
    group: Group,
    shards: Shards,
) -> Iterator[Event]:
    keys = yield from _interruptible(picture_keys(inputs.index, cache), control, folder)
    if keys is None:
        return
    description = describe_run(inputs, keys, config)
    begun = _has_begun(folder)
    _check_same(folder, description, begun)
    if is_done(folder):
        yield {"type": "done", "step": saved_step(folder), "resumed": True}
        return
    (folder / FAILURE).unlink(missing_ok=True)
    check_source(inputs.index, config)
    check(config.captions, inputs.tokenize)
    check_anchors(inputs.text, inputs.vision, inputs.original, config)
    precision = precision_of(config.precision, device)
    joined = join(inputs.text, inputs.vision, inputs.original)
    with torch.device("meta"):
        set_up(CLIP(joined.config), config, torch.device("meta"))  # settings that this model cannot have
    if not begun:
        write_text(config.to_toml(), folder / "config.toml")
        write_json(description | {"gmp_version": __version__}, folder / "run.json")
    with line.Place(line.device_name(device), folder) as place:
        if (yield from _wait(place, control, folder)):
            yield from _trained(
                inputs, joined, keys, config, notes, precision, folder, cache, device, control, make_room, group, shards
            )


def _wait(place: line.Place, control: Control, folder: Path) -> Generator[Event, None, bool]:
    """Waits until the run is the first in its line; False if it was asked to end first."""
    told: list[Path] = []
    while not place.is_first():
        if (ahead := place.ahead()) != told:
            yield {"type": "waiting", "ahead": [one.name for one in ahead]}
            told = ahead
        time.sleep(TURN)
        control.look()
        if control.ends:
            yield _ended(control, folder)
            return False
    return True


def _interruptible(
    work: Generator[Event, None, Result], control: Control, folder: Path
) -> Generator[Event, None, Result | None]:
    """Work before training, which holds and ends when it is asked to; what it returns, None if it was ended."""
    while True:
        try:
            event = next(work)
        except StopIteration as end:
            return end.value
        yield event
        yield from control.obey(saved_step(folder), {})
        if control.ends:
            work.close()
            yield _ended(control, folder)
            return None


def _ended(control: Control, folder: Path) -> Event:
    step = saved_step(folder)
    if control.discards:
        return {"type": "discarded", "step": step}
    return {"type": "stopped", "step": step, "steps": None}


def _trained(
    inputs: Inputs,
    joined: Joined,
    keys: list[str],
    config: RepairConfig,
    notes: list[str],
    precision: str,
    folder: Path,
    cache: Path,
    device: torch.device,
    control: Control,
    make_room: Callable[[int], None],
    group: Group,
    shards: Shards,
) -> Iterator[Event]:
    """A run whose turn it is: from the joined CLIP to the result."""
    before = memory.used(device)
    need = _check_memory(inputs, joined, config, precision, device, make_room, shards)
    clip, optimizer = _made(joined, config, device, group, shards)
    write_json(joined.as_json(), folder / "join.json")
    difference = inputs.original and unlike(inputs.text, inputs.original)
    notes = notes + ([f"drift is not measured: {difference}"] if difference else [])
    yield {"type": "join", "tensors": joined.summary(), "assumptions": joined.assumptions, "notes": notes}

    if group.size > 1:
        group.broadcast_json({"do": "prepare"})
        group.same(describe_run(inputs, keys, config) | {"sharding": bool(shards)})
        if not (yield from _interruptible(embed_together(inputs, clip, keys, config, cache, group), control, folder)):
            return
    data = yield from _interruptible(training_data(inputs, clip, keys, config, cache), control, folder)
    if data is None:
        return
    write_json(data.report, folder / "dataset.json")
    yield {"type": "dataset"} | data.report
    group.broadcast_json({"do": "read"})

    training, teachers = _begun(inputs, joined, clip, optimizer, data, config, device, shards)
    reference = teachers.get("original")
    if inputs.original and not difference and not reference:
        reference = text_tower(inputs.original, joined).to(device)
    texts = inputs.tokenize([prompt.text for prompt in prompts()]).ids
    files = _metadata(folder, joined)
    start = (joined.state, files, texts, joined.sources, data.concept_ids)
    scene = Scene(data.pairs, data.held, teachers, reference, *start)
    try:
        group.barrier()
        taken = memory.Taken(need.total, before)
        yield from Session(training, scene, config, folder, device, precision, control, taken, group).events()
    finally:
        if data.pairs.pixels:
            data.pairs.pixels.close()


def _beside(
    inputs: Inputs,
    config: RepairConfig,
    folder: Path,
    cache: Path,
    device: torch.device,
    group: Group,
    shards: Shards,
) -> Iterator[Event]:
    """A process beside the first one. It begins when that has hashed all pictures, and reads what all have embedded."""
    if listen(group)["do"] == "end":
        return
    keys = finish(picture_keys(inputs.index, cache))
    group.same(describe_run(inputs, keys, config) | {"sharding": bool(shards)})
    joined = join(inputs.text, inputs.vision, inputs.original)
    _check_memory(inputs, joined, config, precision_of(config.precision, device), device, lambda needed: None, shards)
    clip, optimizer = _made(joined, config, device, group, shards)
    actions = {
        "embed": lambda said: finish(embed_piece(inputs, clip, keys, cache, said["start"], group, config.pictures)),
        "meet": lambda said: group.barrier(),
    }
    if listen(group, actions)["do"] == "end":
        return
    data = finish(training_data(inputs, clip, keys, config, cache))
    training, teachers = _begun(inputs, joined, clip, optimizer, data, config, device, shards)
    try:
        group.barrier()
        yield from follow(training, data.pairs, teachers, config, folder, device, group, data.concept_ids)
    finally:
        if data.pairs.pixels:
            data.pairs.pixels.close()


def _made(
    joined: Joined, config: RepairConfig, device: torch.device, group: Group, shards: Shards
) -> tuple[CLIP, torch.optim.Optimizer]:
    """The CLIP to train and its optimizer, of which several processes share weights, or moments at least."""
    clip = joined.build()
    optimizer = set_up(clip, config, device, shards)
    if not shards:
        shard(optimizer, group)
    return clip, optimizer


def _begun(
    inputs: Inputs,
    joined: Joined,
    clip: CLIP,
    optimizer: torch.optim.Optimizer,
    data: Data,
    config: RepairConfig,
    device: torch.device,
    shards: Shards,
) -> tuple[Training, dict[str, TextTower]]:
    """A training at step 0, and the teachers of its anchors, on the device."""
    if config.train == "text":
        clip.visual.cpu()  # its work is done
    files = {"original": inputs.original, "broken": inputs.text}
    names = sorted({anchor.teacher for anchor in config.anchors})
    teachers = {name: text_tower(files[name], joined).to(device) for name in names}
    return begin(clip, optimizer, data.pairs.counts, config, device, data.sampler, shards), teachers


def _check_memory(
    inputs: Inputs,
    joined: Joined,
    config: RepairConfig,
    precision: str,
    device: torch.device,
    make_room: Callable[[int], None],
    shards: Shards,
) -> memory.Need:
    """Raises InputError when the training would not fit into what is free on its device."""
    known = {"caption_tokens": caption_tokens(inputs, config), "original": inputs.original is not None}
    known |= {"processes": shards.group.size}
    make_room(memory.estimate(joined.config, config, precision, device, **known).total)
    return memory.check(joined.config, config, precision, device, memory.free(device), **known)


def check_anchors(text: TowerFile, vision: TowerFile, original: TowerFile | None, config: RepairConfig) -> None:
    """Raises InputError where anchors, or the choice of the best, need an original that is not there or not alike."""
    needs = {"anchored": "the anchors to none"} if any(a.teacher == "original" for a in config.anchors) else {}
    needs |= {f"judged by {config.best_by}": "best_by to objective"} if config.best_by in READ_POINTS else {}
    if not needs:
        return
    what, advice = (
        " or ".join(needs),
        "give the full original CLIP as the vision file, or set " + " and ".join(needs.values()),
    )
    if original is None:
        raise InputError(f"The repair cannot be {what}: {vision.source.path} has no text tower; {advice}")
    if difference := unlike(text, original):
        raise InputError(f"The repair cannot be {what}: {difference}; {advice}")


def _metadata(folder: Path, joined: Joined) -> dict[str, str]:
    known = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return {
        "clip_config": json.dumps({"text": asdict(joined.config.text)}),
        "gmp_run": json.dumps(known, sort_keys=True),
        "gmp_sources": json.dumps(joined.summary()),
    }
