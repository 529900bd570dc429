"""The sections of the page, in their order; each takes what the run's folder holds and gives HTML."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from .. import READ_POINTS, __version__
from ..config import Anchor, RepairConfig
from ..evidence import EVIDENCE
from . import figures, redo
from .contents import Contents
from .markup import figure, listed, number, paragraph, percent, picture, plain_value, rows, text

COLUMNS = {"broken": "before", "repaired": "after", "original": "original"}
READERS = {
    "penultimate": "SDXL, SD2, SD3",
    "last": "SD1",
    "pooled": "Flux",
    "projected": "contrastive training, and clip_g’s vector",
}
DIRECTIONS = {"text_to_image": "text to image", "image_to_text": "image to text"}
# Name in a retrieval, in words, and whether it is a share
RETRIEVAL = {
    "recall_at_1": ("recall@1", True),
    "recall_at_5": ("recall@5", True),
    "recall_at_10": ("recall@10", True),
    "median_rank": ("median rank", False),
}
STRUCTURE = {
    "cka": ("CKA with the original", number),
    "rank_correlation": ("rank correlation with the original", number),
    "told_apart": ("prompts told apart", percent),
    "effective_rank": ("effective rank", lambda value: number(value, 1)),
}
# Of a run without evidence, by the history's names
MEASURED = {
    "recall_at_1_text_to_image": "recall@1, text to image",
    "recall_at_1_image_to_text": "recall@1, image to text",
    "loss": "held-out loss",
} | {point: f"cosine to the original at {point} ({words})" for point, words in READERS.items()}
LOSSES = "Losses; on held-out pairs recall@1, and the cosine to the original at every read point."
GRADIENTS = "Gradient norms by layer and step: the highest of each bucket of steps."
MOVED = (
    "Relative to what they were; r and θ are lengths and directions of the MLPs’ weights, MLP is what of them is not "
    "split so, such as biases."
)
DATA = {
    "listed": "pictures listed",
    "missing": "left out: named, but not there",
    "uncaptioned": "left out: without captions",
    "broken": "left out: cannot be read",
    "orphans": "text files without a picture",
    "repeated": "captions repeated at their own picture",
    "shared": "captions that several pictures share",
}


def head(run: Contents) -> str:
    sources = run.join.get("sources") or {}
    files = [source["path"] for role in ("text", "original") if (source := sources.get(role))]
    words = f"Repair of {files[0]}" + (f", compared with {files[1]}" if files[1:] else "") if files else ""
    return f"<h1>Run {text(run.name)}</h1>" + (paragraph(words) if words else "") + paragraph(_when(run), "soft")


def _when(run: Contents) -> str:
    times = [mark["t"] for mark in run.history["marks"] if mark.get("t")]
    begun = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(times[0])) if times else None
    return f"{run.state[:1].upper()}{run.state[1:]}" + (f"; begun {begun}" if begun else "") + "."


# ---- verdict and measurements ---------------------------------------------------------------------------------------


def verdict(run: Contents) -> str:
    if run.evidence is None:
        return ""
    outcome = run.evidence["outcome"]
    body = "".join(paragraph(sentence) for sentence in outcome["text"])
    return f'<div class="verdict">{body}</div>' + paragraph(outcome["unknown"]) + listed(run.document["warnings"])


def missing(run: Contents) -> str:
    """What the page lacks, and why."""
    lines = []
    if run.evidence is None:
        lines.append(f"The comparison of before, after and original: {_why(run)}")
    elif "original" not in run.evidence["encoders"]:
        lines.append("Everything against the original: there is none, or none of this shape, so its column is absent.")
    if run.evidence is not None and not run.evidence["counts"]["pictures"]:
        lines.append("Retrieval, and what changed in it: no pictures were held out.")
    if not run.finished:
        lines.append("The result: the run has not finished. Started again, it goes on from its last saved step.")
    if not run.history["at"]:
        lines.append("Curves and gradients: nothing was trained yet.")
    shown = (run.evidence or {}).get("changes") or {"shown": ()}
    copies = [one[way]["thumbnail"] for one in shown["shown"] for way in ("before", "after")]
    if gone := sum(run.thumbnail(name) is None for name in copies):
        lines.append(f"{gone} of {len(copies)} pictures of retrievals: their small copies are not in the run's folder.")
    return f'<div class="missing">{listed(lines)}</div>' if lines else ""


def _why(run: Contents) -> str:
    failed = [one for one in run.history["alarms"] if one["alarm"] == "no_evidence"]
    if failed:
        return failed[-1]["advice"]
    if (run.folder / EVIDENCE).exists():
        return "evidence.json is damaged."
    if run.finished:
        return "evidence.json is not there: the run was finished by a version without it, or the file was deleted."
    return "it is gathered when the run ends, and it has not ended."


def measured(run: Contents) -> str:
    if run.evidence is None:
        return _first_and_last(run.history["measures"])
    encoders, target = run.evidence["encoders"], run.evidence["target"]
    names = [name for name in COLUMNS if name in encoders]
    cells = "".join(f'<th scope="col">{COLUMNS[name]}</th>' for name in names)
    points = "".join(_point(point, [encoders[name] for name in names], point in target) for point in READ_POINTS)
    return _table(cells, points) + paragraph(_explained(run), "soft")


def _table(head: str, body: str) -> str:
    return f'<table class="measured"><thead><tr><th scope="col"></th>{head}</tr></thead>{body}</table>'


def _explained(run: Contents) -> str:
    counts, seen = run.evidence["counts"], []
    if counts["pictures"]:
        seen.append(
            f"Retrieval on {counts['pictures']} held-out pictures with {counts['captions']} captions; below each "
            "number its 95 % interval (bootstrap over pictures)."
        )
    on = "held-out captions" if counts["pictures"] else "prompts"
    seen.append(
        f"CKA, rank correlation, prompts told apart and effective rank over {counts['prompts']} prompts; cosines and "
        f"norms over {counts['drift_captions']} {on} at the full context length."
    )
    if run.evidence["run"]["train"] == "both":
        seen.append("Both towers were trained: pictures are seen as before, but for the column after.")
    if run.evidence["target"]:
        seen.append("The target is where the run's anchors hold the encoder.")
    return " ".join(seen)


def _point(point: str, encoders: Sequence[Mapping[str, object]], is_target: bool) -> str:
    tag = '<span class="tag">target of this run</span>' if is_target else ""
    kind = ' class="target"' if is_target else ""
    title = f'{point} <span class="soft">{READERS[point]}</span>{tag}'
    lines = [f'<tr class="point"><th scope="rowgroup" colspan="{1 + len(encoders)}">{title}</th></tr>']
    if point == "projected" and all(one["retrieval"] for one in encoders):
        lines.append(_line("recall@1, mean of both directions", [_interval(one["recall"], True) for one in encoders]))
        for name, (words, share) in RETRIEVAL.items():
            for direction, way in DIRECTIONS.items():
                cells = [_interval(one["retrieval"][direction][name], share) for one in encoders]
                lines.append(_line(f"{words}, {way}", cells))
    for name, (words, shown) in STRUCTURE.items():
        lines.append(_line(words, [shown(one["structure"][point][name]) for one in encoders]))
    for words, other, name in (
        ("cosine to the original", "to_original", "cosine"),
        ("cosine to the encoder before", "to_broken", "cosine"),
        ("norm relative to the original", "to_original", "relative_norm"),
    ):
        if all(one[other] for one in encoders):
            lines.append(_line(words, [number(one[other][point][name]) for one in encoders]))
    return f"<tbody{kind}>{''.join(lines)}</tbody>"


def _line(words: str, cells: Sequence[str]) -> str:
    return f'<tr><th scope="row">{text(words)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _interval(one: Mapping[str, float], share: bool) -> str:
    if not share:
        return f'{one["value"]:.0f}<span class="between">{one["low"]:.0f}–{one["high"]:.0f}</span>'
    return f'{percent(one["value"])}<span class="between">{100 * one["low"]:.1f}–{100 * one["high"]:.1f}</span>'


def _first_and_last(measures: Sequence[Mapping[str, object]]) -> str:
    """Of a run without evidence: the first and the newest measurement."""
    if not measures:
        return paragraph("Nothing was measured.")
    shown = [measures[0], *measures[1:][-1:]]
    cells = "".join(f'<th scope="col">step {one["step"]}</th>' for one in shown)
    there = [name for name in MEASURED if measures[0].get(name) is not None]
    lines = "".join(_line(MEASURED[name], [number(one.get(name), 4) for one in shown]) for name in there)
    return _table(cells, f"<tbody>{lines}</tbody>") + paragraph(
        "The first and the newest measurement while it trained, on held-out pairs.", "soft"
    )


# ---- retrievals that changed ----------------------------------------------------------------------------------------


def changed(run: Contents) -> str:
    changes = (run.evidence or {}).get("changes")
    if not changes:
        return ""
    counted = [changes[name] for name in ("became_right", "became_wrong", "stayed_right", "stayed_wrong")]
    words = (
        f"Of {sum(counted)} held-out captions, {counted[0]} find their own picture first now and did not before, "
        f"{counted[1]} did and no longer do; {counted[2]} found it both times, {counted[3]} neither time. Those shown "
        "are evenly spread over all of their kind."
    )
    parts = [paragraph(words)]
    for kind, title in (("right", "Became right"), ("wrong", "Became wrong")):
        shown = [one for one in changes["shown"] if one["became"] == kind]
        total = changes[f"became_{kind}"]
        if shown:
            cards = "".join(_card(run, one) for one in shown)
            parts.append(f'<h3 class="{kind}">{title}: {len(shown)} of {total}</h3><div class="changed">{cards}</div>')
    return "".join(parts)


def _card(run: Contents, one: Mapping[str, object]) -> str:
    both = []
    for way in ("before", "after"):
        is_right = (way == "after") == (one["became"] == "right")
        mark = '<span class="right">✓</span>' if is_right else '<span class="wrong">✗</span>'
        content, name = run.thumbnail(one[way]["thumbnail"]), one[way]["picture"]
        shown = picture(content, name, "jpeg") if content else f'<span class="none">{text(name)}</span>'
        both.append(f"<div>{mark} {way}{shown}</div>")
    return f'<figure><figcaption>{text(one["caption"])}</figcaption><div class="both">{"".join(both)}</div></figure>'


# ---- how it went ----------------------------------------------------------------------------------------------------


def curves(run: Contents) -> str:
    history, best = run.history, run.best and run.best.get("step")
    drawn = (
        (
            figures.losses(history, run.folder),
            LOSSES,
        ),
        (figures.gradients(history), GRADIENTS),
        (
            figures.moved(history),
            f"How far layers have moved since the start{_at(history)}. {MOVED}",
        ),
    )
    found = [figure(picture(content, words), words) for content, words in drawn if content]
    if found and best is not None:
        found.append(paragraph(f"The best step is {best}, by {run.best.get('by', 'held-out loss')}.", "soft"))
    return "".join(found)


def _at(history: Mapping[str, object]) -> str:
    told = [one["step"] for one in history["measures"] if one.get("moved")]
    return f", after step {told[-1]}" if told else ""


def alarms(run: Contents) -> str:
    shown = [
        f"step {one['step']}: {one['alarm']} {'raised' if one['raised'] else 'cleared'}: {one['advice']}"
        for one in run.history["alarms"]
    ]
    return listed(shown) or paragraph("None was raised.")


def saved(run: Contents) -> str:
    best = run.best
    words = "not known"
    if best and best.get("step") == 0:
        words = "step 0: no step was better than the start"
    elif best:
        words = f"step {best['step']}"
    if best:
        words += (
            f", by {best.get('by', 'held-out loss')} on held-out pairs; held-out loss {number(best.get('loss'), 4)}"
        )
    steps = ", ".join(map(str, run.saved)) or "none"
    pairs = [("steps that can be gone back to", steps), ("best", words)]
    if run.finished:
        pairs.insert(0, ("result", f"text_encoder.safetensors, step {run.result.get('steps')}"))
    return rows(pairs)


# ---- what it was given ----------------------------------------------------------------------------------------------


def data(run: Contents) -> str:
    known = {name: run.dataset[name] for name in DATA if name in run.dataset} | run.dataset
    return rows((DATA.get(name, name), _count(value)) for name, value in known.items())


def _count(value: object) -> object:
    """Lists are told by their length and first entries."""
    if not isinstance(value, list):
        return value
    shown = [
        f"{one[0]} ({one[1]})" if isinstance(one, list) and len(one) == 2 else plain_value(one) for one in value[:5]
    ]
    more = ", …" if len(value) > 5 else ""
    return f"{len(value)}" + (f": {', '.join(shown)}{more}" if value else "")


def inputs(run: Contents) -> str:
    sources, pairs = run.join.get("sources") or {}, []
    for role, words in (("text", "encoder to repair"), ("vision", "vision tower"), ("original", "original")):
        known = run.run.get(role) or {}
        if known:
            name = (sources.get(role) or {}).get("path")
            member = f", {known['member']}" if known.get("member") else ""
            shape = f"{known.get('layers')} blocks of width {known.get('width')}"
            pairs.append((words, f"{name or 'file'}{member}: {shape}\nsha256 of its weights: {known.get('sha256')}"))
    if run.run.get("dataset"):
        pairs.append(("data set", f"sha256 of names, pictures and captions: {run.run['dataset']}"))
    repaired = run.document.get("encoder")
    if repaired:
        pairs.append(("repaired encoder", f"{repaired['path']}\nsha256 of its weights: {repaired['sha256']}"))
    return rows(pairs)


def versions(run: Contents) -> str:
    known = dict((run.evidence or {}).get("versions") or {})
    if not known:
        known = {"gmp": run.run.get("gmp_version", "not recorded"), "torch, Python and device": "not recorded"}
    return rows([*known.items(), ("this page", f"gmp {__version__}")])


def settings(run: Contents) -> str:
    usual = RepairConfig().to_json()
    return rows(
        (n, _setting(n, v) + (" (default)" if usual.get(n) == v and n in usual else "")) for n, v in run.config.items()
    )


def _setting(name: str, value: object) -> str:
    if name == "anchors" and isinstance(value, list):
        return ", ".join(str(Anchor(**one)) for one in value) or "none"
    return plain_value(value)


def again(run: Contents) -> str:
    given = run.command.get("arguments")
    if given:
        words = (
            "In a folder that holds the files, or with their paths; the hashes above tell whether they are the same."
        )
        return paragraph(words) + f"<pre>{text(redo.command_line(list(map(str, given))))}</pre>"
    if run.prompt:
        words = (
            "The part of the graph that started the run, as ComfyUI's POST /prompt takes it; paths by their last part."
        )
        return paragraph(words) + f"<pre>{text(redo.graph(run.prompt))}</pre>"
    return paragraph(
        "Neither a command nor a graph is in the run's folder: it was started by a program. Settings and hashes above "
        "are all that it depends on; the same ones make the same run."
    )


SECTIONS = (
    ("", head),
    ("Verdict", verdict),
    ("What is missing here, and why", missing),
    ("Before and after", measured),
    ("Retrievals that changed", changed),
    ("How it went", curves),
    ("Alarms", alarms),
    ("Saved steps", saved),
    ("Data set", data),
    ("Inputs", inputs),
    ("Versions", versions),
    ("Settings", settings),
    ("How to do it again", again),
)
