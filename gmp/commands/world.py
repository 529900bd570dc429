"""world and demo: captioned pictures without a download, and a repair of the shipped ruined encoder."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..events import Event
from ..terminal import show, tell
from .towers import device


def world(options: argparse.Namespace) -> object:
    from ..world.write import write_world

    captions = show(write_world(options.out, options.count, options.seed, options.split))
    print(f"{options.count} pictures in {options.out}, captions in {captions}")
    return {"images": str(options.out), "captions": str(captions), "count": options.count}


def demo(options: argparse.Namespace) -> object:
    from ..demo import NEAREST, table
    from ..demo import demo as show_cure
    from ..report import REPORT
    from ..run import RESULT

    last: Event = {}

    def hear(event: Event) -> str | None:
        if event["type"] == "done":
            last.update(event)
        return tell(event)

    figures = show(show_cure(options.out, device(options.device)), hear)
    run = Path(figures["run"])
    print(table({name: figures[name] for name in ("ruined", "repaired", "original")}))
    print(f"\nrepaired text encoder: {run / RESULT}")
    print(f"report:                {run / REPORT}")
    print(f"what each one finds:   {options.out / NEAREST}")
    print(f"run folder:            {run}")
    print(f"{figures['seconds']} seconds")
    if last["resumed"]:
        print(f"The repair was finished before and only measured again; delete {options.out} to see it train.")
    return figures
