"""report: one page about a run, as a file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..errors import InputError
from .towers import check_new, check_place


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder, or its name below --folder")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where runs lie (runs)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.html", help="where it goes (report.html in the run's folder, made anew)"
    )
    parser.add_argument("--force", action="store_true", help="replace what exists")


def report(options: argparse.Namespace) -> object:
    from ..report import read, write_report
    from ..watch import Watch, find

    folder, watch = find(options.folder, options.run), Watch()
    if options.out:
        if options.out.suffix.lower() not in (".html", ".htm"):
            raise InputError(f"{options.out} will be a page; let its name end in .html")
        check_new([options.out], options.force)
        check_place([options.out])
        options.out.parent.mkdir(parents=True, exist_ok=True)
    history, state = watch.history(folder, 0), watch.overview(folder)["text"]
    path = write_report(folder, history, state, options.out)
    run = read(folder, history, state)
    outcome = run.evidence["outcome"] if run.evidence else None
    print(f"{run.name}: {run.state}")
    for sentence in (*outcome["text"], outcome["unknown"]) if outcome else ():
        print(sentence)
    if not run.run.get("config"):
        print(f"note: {folder / 'run.json'} tells no settings: it is damaged, or not a run's", file=sys.stderr)
    if outcome is None:
        print("there is no comparison of before, after and original in this run; the page says why")
    print(f"report: {path}")
    return {"run": str(folder), "report": str(path), "state": run.state, "outcome": outcome}
