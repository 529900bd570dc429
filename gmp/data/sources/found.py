"""From what a caption file says, or what lies in a folder, to an index: every picture looked up, every problem kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import InputError
from ..captions import PICTURE_SUFFIXES, CaptionReport, Index, Picture, _some, printable
from .folder import Folder, is_picture

Entry = tuple[str, Sequence[str]]  # a picture's path as it is written, and captions


@dataclass(frozen=True)
class Listing:
    """What a caption file says."""

    entries: Sequence[Entry]
    notes: tuple[str, ...] = ()
    stems: bool = False  # names may lack their suffix: they fit all pictures of that name


@dataclass(frozen=True)
class Found:
    """Pictures that are there with what was found for each, and what was not found."""

    captions: Mapping[str, Sequence[str]]  # by path, relative to the folder
    repeats: Mapping[str, float] = field(default_factory=dict)
    missing: Sequence[str] = ()
    orphans: Sequence[str] = ()
    empty: Sequence[str] = ()
    garbled: Sequence[tuple[str, str]] = ()
    linked: Sequence[str] = ()
    respelled: Sequence[tuple[str, str]] = ()
    kind: str = ""
    notes: tuple[str, ...] = ()


def locate(folder: Folder, listing: Listing, source: Path | str, missing_ok: bool, problems: list[str]) -> Found:
    """Look up the pictures that a caption file names. Links out of the folder are left out; the rest are problems."""
    found: dict[str, list[str]] = {}
    outside, strangers, missing, rivals = [], [], [], []
    linked: dict[str, None] = {}
    respelled: dict[tuple[str, str], None] = {}
    for key, captions in listing.entries:
        path = folder.relative(key)
        if path is None:
            outside.append(key)
            continue
        if path in found:
            found[path].extend(captions)
            continue
        if not is_picture(path.rpartition("/")[2]) and not (listing.stems and path not in ("", ".")):
            strangers.append(key)
            continue
        hit = folder.find(path, listing.stems)
        if hit.outside:
            linked[key] = None
        elif hit.rivals:
            rivals.append(f"{key} ({' or '.join(hit.rivals)})")
        elif not hit.paths:
            missing.append(key)
        for one in hit.paths:
            found.setdefault(one, []).extend(captions)
            if hit.respelled:
                respelled[(key, one)] = None
    _complain(folder, source, outside, strangers, rivals, problems)
    if missing and not (missing_ok and found):
        problems.append(
            f"{len(missing)} of the pictures that the caption file {source} names are not in {folder.root}"
            f"{_some(missing)}. Paths are relative to that folder: check that it is the right one "
            f"and complete, or allow missing pictures to leave these out.{_hint(folder, missing)}"
        )
    if linked and not found and not problems:
        problems.append(f"All pictures that the caption file {source} names are links out of {folder.root}; copy them.")
    return Found(found, missing=missing, linked=list(linked), respelled=list(respelled), notes=listing.notes)


def _complain(
    folder: Folder,
    source: Path | str,
    outside: Sequence[str],
    strangers: Sequence[str],
    rivals: Sequence[str],
    problems: list[str],
) -> None:
    if outside:
        problems.append(
            f"The caption file {source} names {len(outside)} pictures outside {folder.root}{_some(outside)}. "
            "Write paths relative to that folder, without '..'."
        )
    if strangers:
        problems.append(
            f"The caption file {source} names {len(strangers)} files that are not pictures"
            f"{_some(strangers)}. Pictures end in {', '.join(PICTURE_SUFFIXES)}."
        )
    if rivals:
        problems.append(
            f"The caption file {source} names {len(rivals)} pictures that are not there as written, while several "
            f"others fit but for case{_some(rivals)}. Write their names as they are."
        )


def _hint(folder: Folder, missing: Sequence[str]) -> str:
    """Where the pictures may be instead."""
    first = missing[0].replace("\\", "/")
    begins, _, rest = first.partition("/")
    if rest and begins == Path(folder.root).absolute().name and folder.find(rest).paths:
        return f" Their paths begin with {begins!r}: give the folder above it, {Path(folder.root).absolute().parent}."
    below = [
        name for name in folder.list("").folders if not name.startswith(".") and folder.find(f"{name}/{first}").paths
    ]
    return printable(f" There is {below[0]}/{first}: give {folder.root / below[0]}.") if below else ""


def build(folder: Folder, found: Found, problems: Iterable[str] = ()) -> Index:
    """The index of what was found. Raises InputError for problems, and where nothing is left, all at once."""
    root = folder.root
    problems = list(problems)
    if folder.closed:
        problems.append(
            f"{len(folder.closed)} folders in {root} can't be read{_some(folder.closed)}. "
            "Allow reading them or move them away."
        )
    if problems:
        raise InputError("\n".join(problems))
    if not found.captions:
        tars = [name for name in folder.list("").files if name.endswith(".tar")]
        links = " It holds tars: give them as --data, or convert them." if tars else ""
        links += f" What is there are links out of it{_some(found.linked)}." if found.linked else ""
        raise InputError(f"There are no pictures in {root}. Pictures end in {', '.join(PICTURE_SUFFIXES)}.{links}")
    pictures, uncaptioned = [], []
    repeated = 0
    for path, raw in sorted(found.captions.items()):
        stripped = [caption.strip() for caption in raw if caption.strip()]
        captions = tuple(dict.fromkeys(stripped))
        repeated += len(stripped) - len(captions)
        if captions:
            pictures.append(Picture(path, captions, float(found.repeats.get(path, 1.0))))
        else:
            uncaptioned.append(path)
    if not pictures:
        raise InputError(
            f"None of the {len(found.captions)} pictures in {root} has a caption{_some(uncaptioned)}. Put a text file "
            "of the same name beside each picture (0001.jpg, 0001.txt), or give a caption file"
            + (f"; {printable(', '.join(listings))} may be one." if (listings := _label_files(folder)) else ".")
        )
    carriers = Counter(caption for picture in pictures for caption in picture.captions)
    report = CaptionReport(
        listed=len(found.captions) + len(found.missing) + len(found.linked),
        missing=tuple(found.missing),
        orphans=tuple(sorted(found.orphans)),
        uncaptioned=tuple(uncaptioned),
        repeated=repeated,
        shared=sum(count > 1 for count in carriers.values()),
        empty=tuple(sorted(found.empty)),
        garbled=tuple(found.garbled),
        linked=tuple(found.linked),
        respelled=tuple(found.respelled),
        kind=found.kind,
        notes=found.notes,
    )
    return Index(root, tuple(pictures), report)


def _label_files(folder: Folder) -> list[str]:
    endings = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
    return sorted(name for name in folder.list("").files if name.lower().endswith(endings))[:5]
