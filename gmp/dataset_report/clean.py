"""What to do about a data set: a list of fixes, and an index without what should not be trained on.

Pictures and caption files are never touched: a cleaned index is a caption file of its own.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..files import write_json, write_text
from .findings import KINDS, OPTIONAL, Case
from .report import Report

FIX_SUFFIXES = (".json", ".csv")
_COLUMNS = ("picture", "problem", "detail", "action", "caption", "keep")


@dataclass(frozen=True)
class Cleaned:
    """What is kept of a data set."""

    captions: dict[str, list[str]]  # by picture, as the JSON file of captions has them
    dropped: dict[str, int]  # by kind of finding: pictures, or captions, that it took
    notes: tuple[str, ...]

    @property
    def pairs(self) -> int:
        return sum(map(len, self.captions.values()))


def fixes(report: Report) -> list[dict[str, str]]:
    """Every case of every finding, by picture: what is wrong with it, and what to do.

    keep: the picture that one is a copy of. Cases that are only counted are not in it.
    """
    listed = [
        {
            "picture": case.picture,
            "problem": finding.name,
            "detail": case.detail,
            "action": finding.kind.action,
            "caption": case.caption or "",
            "keep": case.copy_of or "",
        }
        for finding in report.findings
        for case in finding.cases
    ]
    return sorted(listed, key=lambda one: one["picture"])


def write_fixes(report: Report, path: Path) -> int:
    """Writes the list of fixes, atomically; how many there are. Raises InputError for an ending that is not known."""
    found = fixes(report)
    suffix = check_fixes(path)
    if suffix == ".json":
        write_json(found, path)
    else:
        table = io.StringIO()
        writer = csv.DictWriter(table, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _safe(value) for name, value in one.items()} for one in found)
        write_text("\ufeff" + table.getvalue(), path)  # the mark tells spreadsheets that it is UTF-8
    return len(found)


def check_fixes(path: Path) -> str:
    """The ending of a list of fixes. Raises InputError for one that is not known."""
    suffix = path.suffix.lower()
    if suffix not in FIX_SUFFIXES:
        raise InputError(f"{path} will be a list of fixes; let its name end in {' or '.join(FIX_SUFFIXES)}.")
    return suffix


def _safe(value: str) -> str:
    """Text that a spreadsheet does not take for a formula, and that is UTF-8 whatever a file is called."""
    value = value.encode("utf-8", "backslashreplace").decode("utf-8")
    return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def clean(report: Report, also: Collection[str] = ()) -> Cleaned:
    """The captions of the pictures that are kept.

    Left out in any case: pictures that cannot be read, are not there or have no caption, and copies to the byte, whose
    captions go to the first of them. also: names of `findings.OPTIONAL` that are left out too; of language and wrong
    pairs the caption is, and its picture only where no caption is left. Raises InputError for other names, and where
    nothing is left.
    """
    if strangers := set(also) - set(OPTIONAL):
        raise InputError(f"{', '.join(sorted(strangers))} cannot be left out by name; {', '.join(OPTIONAL)} can.")
    kept = {picture.path: list(picture.captions) for picture in report.index.pictures}
    dropped: dict[str, int] = {}
    # copies last: a caption that was wrong at a copy does not come to the one that is kept
    for name in sorted(KINDS, key=lambda name: name in ("duplicates", "near_duplicates")):
        cases = report[name].cases
        if KINDS[name].drop == "merged" or (name == "near_duplicates" and name in also):
            dropped[name] = _leave_out_copies(kept, cases, merge=KINDS[name].drop == "merged")
        elif KINDS[name].drop == "always" or name in also:
            dropped[name] = sum([_leave_out(kept, case) for case in cases])
    if not kept:
        raise InputError("Nothing is left of the data set: all of its pairs would be left out. Nothing was written.")
    repeats = {picture.path: picture.repeats for picture in report.index.pictures}
    notes = ["How often pictures are visited is not in this file."] if any(repeats[p] != 1 for p in kept) else []
    return Cleaned(kept, {name: count for name, count in dropped.items() if count}, tuple(notes))


def _leave_out(kept: dict[str, list[str]], case: Case) -> bool:
    """Takes a picture out, or one of its captions. False where it is out already, or never was in."""
    texts = kept.get(case.picture, [])
    if case.caption is not None and case.caption not in texts:
        return False
    if case.caption is None or len(texts) == 1:
        return kept.pop(case.picture, None) is not None
    texts.remove(case.caption)
    return True


def _leave_out_copies(kept: dict[str, list[str]], cases: Collection[Case], merge: bool) -> int:
    """Takes copies out. Where the picture that they are copies of is out already, the first one left takes its place.

    merge: the captions of those that are taken out go to the one that is kept.
    """
    instead: dict[str, str] = {}
    taken = 0
    for case in cases:
        if case.picture not in kept:
            continue
        keeper = instead.setdefault(case.copy_of, case.copy_of if case.copy_of in kept else case.picture)
        if keeper == case.picture:
            continue
        texts = kept.pop(case.picture)
        if merge:
            kept[keeper] += [caption for caption in texts if caption not in kept[keeper]]
        taken += 1
    return taken


def write_cleaned(cleaned: Cleaned, path: Path) -> None:
    """Writes {"sub/0001.jpg": ["a caption", …]}, paths relative to the folder of pictures; atomically."""
    write_json(cleaned.captions, path)


def told(cleaned: Cleaned) -> str:
    """What a cleaned index holds, and what was left out."""
    words = [f"{count:,} ({KINDS[name].title})" for name, count in cleaned.dropped.items()]
    left = f"left out: {', '.join(words)}" if words else "nothing was left out"
    return f"{len(cleaned.captions):,} pictures with {cleaned.pairs:,} captions; {left}"
