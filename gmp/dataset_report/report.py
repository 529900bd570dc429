"""The report of a data set: one pass over its pictures, one over its captions, and all findings in one value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..config import RepairConfig
from ..data.captions import Index, held_out_count
from ..data.images import THREADS
from ..data.survey import Survey, survey
from ..errors import InputError
from ..events import Event
from ..features import remember_keys
from .captions import Texts, caption_findings, read_texts
from .findings import KINDS, USUAL, Case, Finding, Limits
from .pictures import picture_findings

if TYPE_CHECKING:
    import torch

    from ..join import Joined
    from ..tokenizer import Tokenize
    from .pairs import Fits

VERSION = 1
EXAMPLES = 20  # cases of a kind that the JSON form and the page show; the fix list has all
LOWEST = 20  # pairs that are listed as those that fit worst


@dataclass(frozen=True)
class Report:
    """What is in a data set, and what is wrong with it."""

    index: Index  # as it was read
    survey: Survey
    texts: Texts
    limits: Limits
    findings: tuple[Finding, ...]  # of all kinds that were looked for, in the order of KINDS, with or without cases
    fits: Fits | None  # None where no CLIP was given, or no picture can be read
    lowest: tuple[Case, ...]  # pairs that fit worst, wrong or not
    notes: tuple[str, ...]  # what was not looked for and why, and how the data set was read

    def __getitem__(self, name: str) -> Finding:
        """The finding of a kind; one without cases where it was not looked for."""
        return next((one for one in self.findings if one.name == name), Finding(name, ()))

    @property
    def readable(self) -> int:
        """Captioned pictures that a repair can train on."""
        return len(self.survey) - len(self.survey.faults)

    @property
    def formats(self) -> dict[str, int]:
        return dict(Counter(kind for kind in self.survey.formats if kind).most_common())


def examine(
    index: Index,
    cache: Path,
    limits: Limits = USUAL,
    *,
    clip: Joined | None = None,
    tokenize: Tokenize | None = None,
    device: torch.device | None = None,
    lowest: int = LOWEST,
    threads: int = THREADS,
) -> Generator[Event, None, Report]:
    """Looks at every picture and reads every caption. Yields progress events, and an alarm where nothing can be kept.

    cache: what was found of pictures is kept there, and the features of a CLIP. clip: the original CLIP, for pairs that
    are likely wrong; without one they are not looked for. tokenize: of its text tower; None is CLIP-L's, of the
    context of `limits`. device: that it computes on; None is the CPU. lowest: how many of the pairs that fit worst are
    listed. Raises InputError for limits that are no limits, and where the folder vanishes.
    """
    _check(limits, lowest)
    names = [picture.path for picture in index.pictures]
    seen = yield from survey(index.root, names, cache, threads=threads)
    hashed = zip(seen.content_keys().items(), seen.keys.any(axis=1), strict=True)
    remember_keys(index.root, dict(pair for pair, read in hashed if read), cache)  # a repair need not read them again
    texts = yield from read_texts(index.captions(), limits.context)
    findings = [
        *(yield from picture_findings(seen, limits, index.report.broken)),
        *caption_findings(index, seen, texts, limits),
    ]
    notes = list(index.report.notes)
    fits, worst = None, ()
    if clip is None:
        notes.append("Likely wrong pairs were not looked for: that takes the original CLIP (--vision).")
    elif not seen.readable.any():
        notes.append("Likely wrong pairs were not looked for: no picture can be read.")
    else:
        import torch

        from ..tokenizer import Tokenizer
        from .pairs import FEWEST, lowest_pairs, read_fits, wrong_pairs

        fits = yield from read_fits(
            clip, index, seen.faults, seen.content_keys(), tokenize or Tokenizer(limits.context), cache,
            device or torch.device("cpu"),
        )  # fmt: skip
        findings.append(wrong_pairs(index, fits))
        worst = lowest_pairs(index, fits, lowest)
        if fits.others <= FEWEST:
            notes.append(f"{fits.others} pictures are too few to tell wrong pairs by; more than {FEWEST} are needed.")
    order = list(KINDS)
    findings.sort(key=lambda finding: order.index(finding.name))
    return Report(index, seen, texts, limits, tuple(findings), fits, worst, tuple(notes))


def _check(limits: Limits, lowest: int) -> None:
    wrong = [
        f"{name} is {value}; {words}"
        for name, value, holds, words in (
            ("the least size", limits.size, limits.size >= 1, "give 1 pixel or more"),
            ("the largest aspect", limits.aspect, limits.aspect >= 1, "give 1 or more: long side / short side"),
            ("the context", limits.context, limits.context >= 2, "give 2 tokens or more"),
            ("the number of lowest pairs", lowest, lowest >= 0, "give 0 or more"),
        )
        if not holds
    ]
    if wrong:
        raise InputError("The report cannot be made like this: " + "; ".join(wrong) + ".")


# ---- in words and numbers -------------------------------------------------------------------------------------------


def summary(report: Report) -> str:
    """One sentence: how many pictures are to be looked at, by what is not found of all of them."""
    total = report.index.report.listed or len(report.index)
    general = _general(report)
    faulty = {case.picture for one in report.findings if one not in general for case in one.cases}
    if not faulty and not general:
        return (
            f"Nothing was found wrong with {_count(total, 'picture')} and {_count(len(report.texts.lengths), 'pair')}."
        )
    words = f"{_count(report.readable, 'picture')} of {total:,} can be trained on"
    words += f"; {_count(len(faulty), 'picture or file', 'pictures or files')} should be looked at"
    return f"{words}, besides what was found of all: {_titles(general)}." if general else f"{words}."


def _general(report: Report) -> list[Finding]:
    """Findings of every single picture, which tell of the data set or of a limit: no picture of it stands out."""
    readable = {name for name in report.survey.names if name not in report.survey.faults}
    if len(readable) < 2:
        return []
    return [one for one in report.findings if readable <= {case.picture for case in one.cases}]


def counts(report: Report) -> dict[str, object]:
    """Names and numbers of what there is."""
    sizes = np.minimum(report.survey.widths, report.survey.heights)[report.survey.readable]
    lengths = report.texts.lengths
    return {
        "pictures": report.index.report.listed or len(report.index),
        "captioned pictures that can be read": report.readable,
        "pairs": len(lengths),
        "captions a picture": round(len(lengths) / len(report.index), 2) if len(report.index) else 0,
        "formats": report.formats,
        "megabytes": round(int(report.survey.bytes.sum()) / 1e6, 1),
        "short side in pixels": _spread(sizes),
        "length of captions in tokens": _spread(lengths),
        "languages": report.texts.counts,
    }


def remarks(report: Report) -> list[str]:
    """What the numbers of pictures and captions mean for a repair with the usual settings, in sentences."""
    usual, there = RepairConfig(), report.readable
    held = held_out_count(there, usual.held_out, usual.held_out_most)
    told = []
    if there - held < usual.step_pairs:
        told.append(
            f"{_count(there, 'picture')}, of which {held} would be held out, are fewer than one step of "
            f"{usual.step_pairs} pairs: the usual settings refuse them. Add pictures, or make the batch smaller."
        )
    if held:
        # of a share of one half, which is uncertain the most
        told.append(
            f"{_count(held, 'picture')} would be held out to measure: a recall is then certain to about "
            f"± {98 / held**0.5:.0f} percentage points."
        )
    if report["small"] in _general(report):
        words = f"All pictures are smaller than {report.limits.size} pixels"
        assumed = report.fits is None and report.limits.size == USUAL.size
        why = ", which are assumed where no vision tower is given (--vision), nor a size (--size)" if assumed else ""
        told.append(f"{words}{why}.")
    return told


def _spread(values: np.ndarray) -> dict[str, int]:
    if not len(values):
        return {}
    ends = np.quantile(values, (0, 0.5, 1), method="nearest")
    return dict(zip(("least", "median", "most"), map(int, ends), strict=True))


def _count(number: int, one: str, several: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def histogram(report: Report) -> tuple[np.ndarray, np.ndarray]:
    """Captions by their length: edges (B + 1,) in tokens, counts (B,). What is beyond the last edge is in the last."""
    context = report.limits.context
    width = max(1, context // 25)
    edges = np.arange(2, max(context + 1, 3) + 8 * width, width)
    return edges, np.histogram(report.texts.lengths.clip(0, edges[-1]), edges)[0]


def as_json(report: Report) -> dict[str, object]:
    """The report as one JSON document: all counts, and the first cases of every finding."""
    edges, heights = histogram(report)
    foreign = report.texts.foreign
    return {
        "version": VERSION,
        "kind": "dataset",
        "folder": report.index.root.name,
        "summary": summary(report),
        "counts": counts(report),
        "remarks": remarks(report),
        "limits": asdict(report.limits),
        "findings": [_finding_json(finding) for finding in report.findings],
        "lengths": {"edges": edges.tolist(), "captions": heights.tolist()},
        "not_english": None if np.isnan(foreign) else foreign,
        "lowest_pairs": [asdict(case) for case in report.lowest],
        "notes": list(report.notes),
    }


def _finding_json(finding: Finding) -> dict[str, object]:
    kind = finding.kind
    return {
        "name": finding.name,
        "title": kind.title,
        "unit": kind.unit,
        "count": len(finding),
        "meaning": kind.meaning,
        "action": kind.action,
        "drop": kind.drop,
        "examples": [asdict(case) for case in finding.cases[:EXAMPLES]],
    }


def lines(report: Report) -> list[str]:
    """The report for a terminal."""
    told = [summary(report), ""]
    for name, value in counts(report).items():
        shown = ", ".join(f"{k} {v:,}" for k, v in value.items()) if isinstance(value, dict) else f"{value:,}"
        told.append(f"{name}: {shown or 'none'}")
    if not np.isnan(report.texts.foreign):
        told.append(f"not English, of captions whose language can be told: {100 * report.texts.foreign:.1f} %")
    told += remarks(report)
    for finding in report.findings:
        if len(finding):
            told += ["", f"{finding.kind.title}: {len(finding):,}", f"  {finding.kind.meaning}"]
            told += [f"  - {_case(case)}" for case in finding.cases[:3]]
            told += [f"  … and {len(finding.cases) - 3:,} more"] if len(finding.cases) > 3 else []
            told.append(f"  To do: {finding.kind.action}.")
    if report.lowest:
        told += ["", "Pairs that fit worst, wrong or not:"]
        told += [f"  - {_case(case)}" for case in report.lowest[:5]]
    told += ["", words] if (words := not_found(report)) else []
    return [*told, *report.notes]


def not_found(report: Report) -> str:
    """What was looked for and is nowhere, in a sentence; empty where everything was found."""
    clear = [finding for finding in report.findings if not len(finding)]
    return f"Looked for and not found: {_titles(clear)}." if clear else ""


def _titles(findings: Iterable[Finding]) -> str:
    return "; ".join(one.kind.title[0].lower() + one.kind.title[1:] for one in findings)


def _case(case: Case) -> str:
    words = f"{case.picture}: {case.detail}" + (f": {_short(case.caption)}" if case.caption else "")
    return words.encode("utf-8", "backslashreplace").decode("utf-8")


def _short(caption: str, most: int = 80) -> str:
    caption = " ".join(caption.split())
    return f"“{caption if len(caption) <= most else caption[: most - 2] + ' …'}”"
