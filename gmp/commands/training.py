"""repair: a whole repair from the command line."""

from __future__ import annotations

import argparse
import json

from ..errors import InputError
from ..events import Event
from ..terminal import Stop, show, tell
from .runs import note_command
from .towers import device, read_towers


def repair(options: argparse.Namespace) -> object:
    from ..config import SDXL_ANCHOR, Anchor, RepairConfig
    from ..data.captions import read_index
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
    )
    index = read_index(options.images, options.captions, options.allow_missing)
    text, vision, original = read_towers(options)
    tokenize = tokenizer_for(text.config.context_length, text.source.member)
    inputs = Inputs(text, vision, original, index, tokenize)
    last: Event = {}

    def hear(event: Event) -> str | None:
        if event["type"] in ("waiting", "join"):  # from here on the folder is this run's
            note_command(options.out, options.arguments)
        last.update(event)
        return tell(event)

    with Stop() as stop:
        cache = options.cache or default_cache()
        events = start(inputs, config, options.out, cache=cache, device=device(options.device), stop=stop)
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


def _rate(text: str) -> tuple[str, float]:
    pattern, _, factor = text.rpartition("=")
    try:
        return pattern, float(factor)
    except ValueError:
        raise InputError(f"rate {text!r} is not of the form PATTERN=FACTOR, such as token_embedding*=0.1") from None
