"""repair: a whole repair from the command line, in one process or in several that torchrun starts."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..events import Event, finish
from ..settings import over, plain, read_toml
from ..terminal import Stop, show, tell
from .runs import note_command
from .towers import device, read_towers

if TYPE_CHECKING:
    import torch

    from ..config import RepairConfig
    from ..data.captions import Index
    from ..data.tars import Tars


def repair(options: argparse.Namespace) -> object:
    from ..data.captions import printable
    from ..distributed import from_environment, is_first
    from ..features import default_cache
    from ..report import REPORT
    from ..run import BEST, RESULT, Inputs
    from ..run import repair as start
    from ..tokenizer import tokenizer_for

    config = configuration(options)
    concepts = _concepts(options.concepts)
    if concepts:
        print(f"{len(concepts)} captions of concepts, the first: {printable(concepts[0])}", file=sys.stderr)
    index = _pictures(options)
    chosen = _device(options.device)
    text, vision, original = read_towers(options, tell=is_first())
    tokenize = tokenizer_for(text.config.context_length, text.source.member)
    inputs = Inputs(text, vision, original, index, tokenize, concepts)
    last: Event = {}

    def hear(event: Event) -> str | None:
        if event["type"] in ("waiting", "join"):  # from here on the folder is this run's
            note_command(options.out, options.arguments)
        last.update(event)
        return tell(event)

    with from_environment(chosen) as group, Stop(several=group.size > 1) as stop:
        cache = options.cache or default_cache()
        given = {"cache": cache, "device": chosen, "stop": stop, "group": group, "sharded": options.shard}
        events = start(inputs, config, options.out, **given)
        if group.rank:  # the first process speaks for all
            finish(events)
            return None
        show(events, hear)
    if last["type"] == "discarded":
        print(f"{options.out} was discarded")
        return {"run": str(options.out), "state": "discarded"}
    if last["type"] == "stopped":
        where = f"at step {last['step']} of {last['steps']}" if last["steps"] else "before training"
        print(f"stopped {where}; the same command goes on from there")
    elif last["resumed"]:
        print(f"{options.out} is finished already")
    if (options.out / RESULT).exists():
        print(f"text encoder: {options.out / RESULT}")
    if (options.out / REPORT).exists():
        print(f"report:       {options.out / REPORT}")
    files = {"text_encoder": RESULT, "best_text_encoder": BEST, "report": REPORT}
    there = {name: options.out / file for name, file in files.items()}
    answer = {"run": str(options.out), "state": last["type"]}
    answer |= {name: str(path) if path.exists() else None for name, path in there.items()}
    if last["type"] != "done":
        return answer
    result = json.loads((options.out / "result.json").read_text(encoding="utf-8"))
    if not result["measurements"]:
        print("no pictures were held out, so nothing was measured")
    if result["best"] and result["best"]["step"] == 0:
        print("no step was better than the start on the held-out pictures: lower the learning rate")
    return answer | result


def configuration(options: argparse.Namespace) -> RepairConfig:
    """The settings of a command: preset or file, and what its options change."""
    from ..config import SINGLE, Anchor, RepairConfig
    from ..presets import DEFAULT, preset, read_config

    if options.anchor and options.no_anchor:
        raise InputError("--anchor and --no-anchor contradict each other; give one of them")
    base = read_config(options.config) if options.config else preset(options.preset or DEFAULT).config
    values = base.to_json()
    given = {name: getattr(options, name) for name in SINGLE}
    values |= {name: value for name, value in given.items() if value is not None}
    values["rates"] |= dict(_rate(text) for text in options.rate or ())
    if options.plain:
        values["geometric"] = []
    if options.anchor or options.no_anchor:
        values["anchors"] = [plain(Anchor.parse(text)) for text in options.anchor or ()]
    idle = [text for text in options.anchor or () if Anchor.parse(text).captions == "concepts"]
    if idle and not options.concepts:
        raise InputError(f"--anchor {idle[0]} is about captions of concepts; give them as --concepts FILE")
    for text in options.set:
        values = _set(values, text)
    return RepairConfig.from_json(values, "the configuration")


def _set(values: dict[str, object], text: str) -> dict[str, object]:
    """A configuration's values with KEY=VALUE in its place; a value that is not TOML is a string."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not (key and equals):
        raise InputError(f"--set {text!r} is not of the form KEY=VALUE, such as captions.shuffle=true")
    if key == "preset":
        raise InputError("a preset is given as --preset")
    try:
        return over(values, read_toml(f"{key} = {value}", f"--set {text!r}"))
    except InputError:
        if value[:1] in ("'", '"', "[", "{"):  # meant as TOML
            raise
        return over(values, read_toml(f"{key} = {json.dumps(value)}", f"--set {text!r}"))


def _concepts(path: Path | None) -> tuple[str, ...]:
    """The captions of a text file, one per line."""
    if path is None:
        return ()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"the concepts' captions {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"the concepts' captions {path} are not UTF-8 text (byte {error.start})") from None
    if lines and lines[0].lstrip()[:1] in ("{", "["):
        raise InputError(f"the concepts' captions {path} look like JSON; write them as text, one per line")
    found = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not found:
        raise InputError(f"{path} has no caption; write one per line")
    return found


def _pictures(options: argparse.Namespace) -> Index | Tars:
    """The pictures of --images and every --source, or the tars of --data; a --source may name tars if all do."""
    from ..data.sources import KINDS, holds_tars, parse, tars_of
    from ..data.tars import find_tars
    from .towers import has_pictures, read_pictures

    if has_pictures(options) == bool(options.data):
        raise InputError(
            "give captioned pictures: either a folder as --images or any --source, or WebDataset tars as --data"
        )
    if options.data and (options.captions or options.kind or options.columns or options.allow_missing):
        raise InputError("--captions and --allow-missing are for a folder of pictures; tars hold their captions")
    if options.data:
        return find_tars(options.data)
    given = [parse(text, KINDS) for text in options.source or ()]
    tars = [one for one in given if one.kind == "webdataset" or one.kind is None and holds_tars(one.place)]
    if not tars:
        return read_pictures(options)
    if options.images or len(tars) < len(given) or any(one.weight != 1 for one in tars):
        raise InputError(
            "tars are streamed, and not mixed with folders or weighed; give all pictures as tars, or unpack them"
        )
    return find_tars([tar for one in tars for tar in tars_of(one.place)])


def _device(name: str | None) -> torch.device:
    """The device that is named; of several processes on GPUs, each has its own."""
    import torch

    from ..distributed import local_device, started_alone

    if name == "cuda" and not started_alone():  # looking at a GPU takes memory on it: not of the first one in each
        return local_device(torch.device("cuda"))
    return local_device(device(name))


def _rate(text: str) -> tuple[str, float]:
    pattern, _, factor = text.rpartition("=")
    try:
        return pattern, float(factor)
    except ValueError:
        raise InputError(f"rate {text!r} is not of the form PATTERN=FACTOR, such as token_embedding*=0.1") from None
