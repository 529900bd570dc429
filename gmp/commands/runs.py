"""runs: what runs there are, and what is asked of them, in whatever process they train."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from ..errors import InputError

COMMAND = "command.json"  # in a run's folder: how the terminal started it


def list_runs(options: argparse.Namespace) -> object:
    from ..watch import Watch

    if not options.folder.is_dir():
        raise InputError(f"{options.folder} is no folder; name the one that holds your runs with --folder")
    watch = Watch()
    found = [watch.overview(path.parent) for path in options.folder.glob("*/run.json")]
    found.sort(key=lambda run: run["started"] or 0, reverse=True)
    for run in found:
        print(f"{run['run']:<24} {run['state']:<12} {run['text']}")
    if not found:
        print(f"there are no runs in {options.folder}")
    return {"runs": found}


def show(options: argparse.Namespace) -> object:
    from ..watch import Watch, checkpoints, config

    folder = _find(options)
    watch = Watch()
    seen = watch.overview(folder) | checkpoints(folder)
    alarms = watch.alarms(folder)
    print(f"{folder}: {seen['text']}")
    print(f"saved steps: {', '.join(map(str, seen['checkpoints'])) or 'none'}; best: {_best(seen['best'])}")
    for alarm in alarms:
        print(f"step {alarm['step']}: {alarm['alarm']} {'raised' if alarm['raised'] else 'cleared'}: {alarm['advice']}")
    settings = config(folder)["config"]
    for name, value in settings.items():
        print(f"  {name}: {'automatic' if value is None else value}")
    if not settings:
        print(f"note: {folder / 'run.json'} tells no settings: it is damaged, or not a run's", file=sys.stderr)
    return seen | {"alarm_events": alarms, "config": settings}


def _best(best: dict[str, object] | None) -> str:
    return f"step {best['step']} by {best['by']}, held-out loss {best['loss']:.4f}" if best else "not known"


def watch(options: argparse.Namespace) -> object:
    """Follows a run until it ends; Ctrl-C only ends the watching."""
    from tqdm import tqdm

    from ..watch import Watch

    folder, eye = _find(options), Watch()
    seen = eye.overview(folder)
    try:
        with tqdm(total=seen["steps"], desc=folder.name, file=sys.stderr, mininterval=0.5) as bar:
            told = 0
            while True:
                seen = eye.overview(folder)
                bar.total = seen["steps"]
                bar.update(seen["step"] - bar.n)
                loss = "" if seen["loss"] is None else f", loss {seen['loss']:.3f}"
                bar.set_postfix_str(seen["state"] + loss)
                alarms = eye.alarms(folder)
                for alarm in alarms[told:]:
                    tqdm.write(f"step {alarm['step']}: {alarm['advice']}", file=sys.stderr)
                told = len(alarms)
                if seen["state"] not in ("waiting", "preparing", "running", "paused"):
                    break
                time.sleep(options.every)
    except KeyboardInterrupt:
        pass
    print(f"{folder}: {seen['text']}")
    return seen


def command(options: argparse.Namespace) -> object:
    """pause, resume, stop, save, measure: what the run does at its next step's boundary."""
    from ..control import send
    from ..run import status

    folder = _find(options)
    now = status(folder)
    if options.ask == "resume" and not now.at_work:
        return _start_again(folder, str(now))
    send(folder, options.ask, offload=getattr(options, "offload", False))
    print(f"{folder}: asked to {options.ask}")
    return {"run": str(folder), "asked": options.ask}


def _start_again(folder: Path, state: str) -> object:
    """Repeats the command that started a run, in the folder where it was given."""
    from ..cli import main

    if state == "finished":
        raise InputError(f"{folder} is finished; there is nothing to resume")
    try:
        known = json.loads((folder / COMMAND).read_text(encoding="utf-8"))
        arguments, where = list(map(str, known["arguments"])), Path(known["folder"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{folder} was not started in a terminal; queue its graph again in ComfyUI, or press resume in the panel"
        ) from None
    if where.resolve() != Path.cwd().resolve():
        raise InputError(f"{folder} was started in {where}; ask again there, since its files are named from there")
    code = main(["repair", *arguments])
    return {"run": str(folder), "code": code}


def note_command(folder: Path, arguments: list[str]) -> None:
    """Remembers how a run was started, for `runs resume`."""
    from ..files import write_json

    write_json({"arguments": arguments, "folder": os.getcwd()}, folder / COMMAND)


def delete(options: argparse.Namespace) -> object:
    from ..run import delete as delete_run

    folder = _find(options)
    if not options.yes:
        raise InputError(f"deletes {folder} with its checkpoints and its result; say --yes if you mean it")
    left = delete_run(folder)
    print(f"{folder} is deleted" + (f", except {', '.join(left)}, which no run has made" if left else ""))
    return {"run": str(folder), "left": left}


def _find(options: argparse.Namespace) -> Path:
    from ..watch import find

    return find(options.folder, options.run)
