"""report: one page about a run, as a file."""

from __future__ import annotations

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder, or its name below --folder")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where runs lie (runs)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where it goes (report.html in the run's folder)")


def report(options: argparse.Namespace) -> object:
    from ..report import read, write_report
    from ..watch import Watch, find

    folder, watch = find(options.folder, options.run), Watch()
    history, state = watch.history(folder, 0), watch.overview(folder)["text"]
    path = write_report(folder, history, state, options.out)
    run = read(folder, history, state)
    outcome = run.evidence["outcome"] if run.evidence else None
    print(f"{run.name}: {run.state}")
    for sentence in (*outcome["text"], outcome["unknown"]) if outcome else ():
        print(sentence)
    print(f"report: {path}")
    return {"run": str(folder), "report": str(path), "state": run.state, "outcome": outcome}
