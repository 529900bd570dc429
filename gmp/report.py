"""One self-contained HTML page about a run: what it changed, how it went, what it was given. No scripts, no links."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from .watch import Watch, checkpoints, config

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
body { color: #222; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse } th, td { text-align: left; padding: .2rem .8rem .2rem 0; vertical-align: top }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
tr + tr { border-top: 1px solid #ddd } img { max-width: 100% } code { overflow-wrap: anywhere }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #1b1b1b } tr + tr { border-color: #444 } }
"""
MEASURED = {
    "recall_at_1_text_to_image": "recall@1, text to image",
    "recall_at_1_image_to_text": "recall@1, image to text",
    "loss": "held-out loss",
    "penultimate": "cosine to the original at penultimate (SDXL, SD2, SD3)",
    "last": "cosine to the original at last (SD1)",
    "pooled": "cosine to the original at pooled (Flux)",
    "projected": "cosine to the original at projected",
}


def report(folder: Path, watch: Watch, plain: Callable[[str], str] = lambda text: text) -> str:
    """The page as text. plain: takes out of a text what must not be shown, such as folders of this machine."""
    seen, known, saved = watch.overview(folder), config(folder), checkpoints(folder)
    measures, alarms = watch.measures(folder), watch.alarms(folder)
    best = saved["best"]
    parts = [
        f"<h1>Run {_text(folder.name)}</h1><p>{_text(plain(seen['text']))}</p>",
        _section("Before and after, on pictures that were not trained on", _changes(measures)),
        _section("Losses", _picture(folder / "loss.png")),
        _section("Alarms", _rows((f"step {a['step']}", _raised(a, plain)) for a in alarms)),
        _section(
            "Saved",
            _rows(
                [
                    ("steps", ", ".join(map(str, saved["checkpoints"])) or "none"),
                    ("best", f"step {best['step']}, held-out loss {_number(best['loss'])}" if best else "not known"),
                ]
            ),
        ),
        _section("Settings", _rows(known["config"].items())),
        _section("Inputs", _rows((name, _shape(value)) for name, value in known["inputs"].items())),
        _section("Data set", _rows((n, _count(v, plain)) for n, v in known["dataset"].items())),
    ]
    title = f"<title>Run {_text(folder.name)}</title>"
    return f'<!doctype html><html lang="en"><meta charset="utf-8">{title}<style>{STYLE}</style>{"".join(parts)}</html>'


def _section(title: str, body: str) -> str:
    return f"<h2>{_text(title)}</h2>{body}" if body else ""


def _changes(measures: list[Mapping[str, object]]) -> str:
    if not measures:
        return "<p>Nothing was measured.</p>"
    first, last = measures[0], measures[-1]
    head = "".join(f'<th class="number">step {one["step"]}</th>' for one in (first, last))
    rows = [
        f"<tr><td>{_text(words)}</td>"
        + "".join(f'<td class="number">{_number(one.get(name))}</td>' for one in (first, last))
        for name, words in MEASURED.items()
        if first.get(name) is not None
    ]
    return f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def _rows(pairs: Iterable[tuple[str, object]]) -> str:
    rows = [f"<tr><td>{_text(name)}</td><td><code>{_text(_value(value))}</code></td></tr>" for name, value in pairs]
    return f"<table>{''.join(rows)}</table>" if rows else ""


def _picture(path: Path) -> str:
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="losses and measurements over the steps" src="data:image/png;base64,{data}">'


def _raised(alarm: Mapping[str, object], plain: Callable[[str], str]) -> str:
    return f"{alarm['alarm']} {'raised' if alarm['raised'] else 'cleared'}: {plain(str(alarm['advice']))}"


def _shape(value: object) -> object:
    """Hash and shape of an input in one line."""
    if not isinstance(value, dict):
        return value
    return ", ".join(f"{name} {item}" for name, item in value.items() if item is not None)


def _count(value: object, plain: Callable[[str], str]) -> object:
    """Lists are told by their length and first entries."""
    if not isinstance(value, list):
        return value
    return f"{len(value)}" + (f": {plain(json.dumps(value[:5]))}" if value else "")


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _number(value: object) -> str:
    return "–" if not isinstance(value, (int, float)) else f"{value:.4g}"


def _text(text: str) -> str:
    return html.escape(text)
