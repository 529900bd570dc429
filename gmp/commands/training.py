"""repair: a whole repair from the command line, in one process or in several that torchrun starts."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from ..errors import InputError
from ..events import Event, finish
from ..terminal import Stop, show, tell
from .runs import note_command
from .towers import device, read_towers

if TYPE_CHECKING:
    import torch

    from ..data.captions import Index
    from ..data.tars import Tars


def repair(options: argparse.Namespace) -> object:
    from ..config import SDXL_ANCHOR, Anchor, RepairConfig
    from ..distributed import from_environment, is_first
    from ..features import default_cache
    from ..report import REPORT
    from ..run import BEST, RESULT, Inputs
    from ..run import repair as start
    from ..tokenizer import tokenizer_for

    if options.anchor and options.no_anchor:
        raise InputError("--anchor and --no-anchor contradict each other; give one of them")
    anchors = tuple(Anchor.parse(a) for a in options.anchor or ()) or (SDXL_ANCHOR,)
    config = RepairConfig(
        train=options.train,
        epochs=options.epochs,
        batch=options.batch,
        accumulate=options.accumulate,
        lr=options.lr,
        rates=dict(_rate(text) for text in options.rate or ()),
        weight_decay=options.weight_decay,
        schedule=options.schedule,
        warmup=options.warmup,
        negatives=options.negatives,
        smoothing=options.smoothing,
        clip_norm=options.clip_norm,
        geometric=not options.plain,
        anchors=() if options.no_anchor else anchors,
        anchor_captions=options.anchor_captions,
        precision=options.precision,
        held_out=options.held_out,
        measure_every=options.measure_every,
        best_by=options.best_by,
        patience=options.patience,
        save_every=options.save_every,
        keep=options.keep,
        seed=options.seed,
        checkpointing=options.checkpointing,
        optimizer_state=options.optimizer_state,
    )
    index = _pictures(options)
    chosen = _device(options.device)
    text, vision, original = read_towers(options, tell=is_first())
    tokenize = tokenizer_for(text.config.context_length, text.source.member)
    inputs = Inputs(text, vision, original, index, tokenize)
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


def _pictures(options: argparse.Namespace) -> Index | Tars:
    """The pictures of --images, or the tars of --data."""
    from ..data.captions import read_index
    from ..data.tars import find_tars

    if bool(options.images) == bool(options.data):
        raise InputError("give captioned pictures: either a folder as --images, or WebDataset tars as --data")
    if options.data and (options.captions or options.allow_missing):
        raise InputError("--captions and --allow-missing are for a folder of pictures; tars hold their captions")
    if options.data:
        return find_tars(options.data)
    return read_index(options.images, options.captions, options.allow_missing)


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
