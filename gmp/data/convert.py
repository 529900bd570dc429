"""Captions of any kind written as another, without loss where that kind can hold them; what is lost is said.

No picture is touched, but into tars, which hold the pictures themselves. Files of captions name pictures relative to
their folder: they belong into it, or are given together with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import InputError, some
from ..files import write_bytes, write_json, write_text
from . import sources
from .captions import CaptionReport, Index, Picture
from .sources import beside, coco, imagefolder, kohya, seed, table, webdataset
from .sources.folder import stem_of

LINES = ("text", "kohya", "kohya_json")  # kinds in which a line break ends a caption
FILES = {  # what a file is called in a folder that is given
    "json": "captions.json",
    "coco": "captions_coco.json",
    "kohya_json": "meta_cap.json",
    "imagefolder": "metadata.jsonl",
    "csv": "captions.csv",
    "interrogator": "desc.csv",
}
BESIDE = ("text", "kohya", "json_beside")  # kinds of a file for each picture


@dataclass(frozen=True)
class Converted:
    """What was written, and what of the source it does not hold."""

    kind: str  # of the source
    to: str
    out: Path
    files: tuple[Path, ...]
    pictures: int
    captions: int
    lost: tuple[str, ...]  # sentences with counts; empty: what was written holds all
    report: CaptionReport  # of reading the source


def convert(
    place: Path | str,
    to: str,
    out: Path | str,
    *,
    kind: str | None = None,
    images: Path | str | None = None,
    columns: Sequence[str] | None = None,
    missing_ok: bool = False,
    phrases: int | None = None,
    force: bool = False,
) -> Converted:
    """Write the captions at a place as those of another kind.

    out: a file, or a folder, which gets the name that is usual (`FILES`); for kinds of a file for each picture the
    folder under which they go, that of the pictures or another; for tars a .tar or a folder. phrases: cut each caption
    into its leading phrases, see `leading_phrases`. Raises InputError for a source that cannot be read, for files
    that would be replaced unless `force` is given, and for captions that the kind cannot hold at all.
    """
    if to not in sources.KINDS:
        raise InputError(f"There is no kind of captions {to!r}; choose one of {', '.join(sources.KINDS)}.")
    if kind == "webdataset" or kind is None and sources.holds_tars(place):
        index = webdataset.read(str(place), columns)
    else:
        index = sources.read(place, kind=kind, images=images, columns=columns, missing_ok=missing_ok)
    pictures, lost = _prepare(index.pictures, to, phrases)
    out = Path(out)
    files = _files(pictures, to, out)
    if not force and (there := [str(path) for path in files if path.exists() or path.is_symlink()]):
        raise InputError(f"{some(there)} exists; choose another place, or pass --force")
    if to == "webdataset":
        contents = _contents(str(place), index, pictures)
        files, more = webdataset.write(pictures, contents, out)
        lost += more
    else:
        lost += _write(pictures, to, out, files)
    left = (("pictures without captions", index.report.uncaptioned), ("pictures not found", index.report.missing))
    lost += [f"{what}: {len(names)} left out" for what, names in left if names]
    captions = sum(len(picture.captions) for picture in pictures)
    return Converted(index.report.kind, to, out, tuple(files), len(pictures), captions, tuple(lost), index.report)


def leading_phrases(caption: str, most: int = 140) -> tuple[str, ...]:
    """The phrases between ", " that come first, as long as they and their commas have `most` characters at most.

    What the original scripts do with CLIP-Interrogator's prompts, where each phrase becomes a caption; but a first
    phrase that is too long by itself is kept whole, where theirs leaves nothing.
    """
    found, length = [], 0
    for phrase in caption.split(", "):
        length += len(phrase) + 2
        if found and length > most:
            break
        found.append(phrase)
        if length > most:
            break
    return tuple(found)


def _prepare(pictures: Sequence[Picture], to: str, phrases: int | None) -> tuple[list[Picture], list[str]]:
    """The pictures as the kind can hold them, and what is lost on the way."""
    lost = []
    if phrases is not None:
        if phrases < 1:
            raise InputError(f"Captions cannot be cut to {phrases} characters; give 1 or more, such as 140.")
        whole = [caption for picture in pictures for caption in picture.captions]
        cut = sum(", ".join(leading_phrases(caption, phrases)) != caption for caption in whole)
        pictures, _ = _each(pictures, lambda caption: leading_phrases(caption, phrases))
        if cut:
            lost.append(f"phrases: the last ones of {cut} captions, cut at {phrases} characters")
    if to == "webdataset" and (others := [p.path for p in pictures if not webdataset.can_hold(p)]):
        pictures = [picture for picture in pictures if webdataset.can_hold(picture)]
        lost.append(f"pictures: {len(others)} of a kind that tars do not hold ({some(others)})")
    pictures, replaced = _each(pictures, lambda caption: (_text(caption),))
    if replaced:
        lost.append(f"characters: {replaced} captions have half characters that no UTF-8 file holds; they became �")
    if to in LINES:
        pictures, broken = _each(pictures, lambda caption: (" ".join(beside.lines(caption)),))
        if broken:
            lost.append(f"line breaks: those in {broken} captions became spaces")
    if to not in ("json", "coco", "kohya_json", "text", "kohya", "json_beside"):
        unnamed = [picture.path for picture in pictures if _text(picture.path) != picture.path]
        if unnamed:
            pictures = [picture for picture in pictures if _text(picture.path) == picture.path]
            lost.append(f"pictures: {len(unnamed)} whose names are no UTF-8 ({some(unnamed)})")
    repeated = [p for p in pictures if p.repeats != (kohya.repeats_of(p.path) if to == "kohya" else 1)]
    if repeated and to == "kohya":
        tops = dict.fromkeys(picture.path.partition("/")[0] for picture in repeated)
        lost.append(
            f"repeats: those of {len(repeated)} pictures are 1 and become what the folders' names say ({some(tops)})"
        )
    elif repeated:
        lost.append(f"repeats: those of {len(repeated)} pictures, since {to} has no place for them")
    if not pictures:
        raise InputError(f"No picture is left that {to} can hold: {'; '.join(lost)}.")
    return list(pictures), lost


def _each(pictures: Sequence[Picture], change: Callable[[str], tuple[str, ...]]) -> tuple[Sequence[Picture], int]:
    """Every caption changed into others, and of how many that makes a difference."""
    changed, count = [], 0
    for picture in pictures:
        made = [change(caption) for caption in picture.captions]
        count += sum(new != (old,) for new, old in zip(made, picture.captions, strict=True))
        captions = (caption.strip() for new in made for caption in new if caption.strip())
        changed.append(replace(picture, captions=tuple(dict.fromkeys(captions))))
    return changed, count


def _text(text: str) -> str:
    """Text that UTF-8 holds."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode() if _half(text) else text


def _half(text: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _files(pictures: Sequence[Picture], to: str, out: Path) -> list[Path]:
    """What will be written."""
    below = next((one for one in out.absolute().parents if os.path.lexists(one)), Path(os.sep))
    if not below.is_dir():
        raise InputError(f"{out} cannot be written: {below} is no folder; choose another place")
    if to == "webdataset":
        if out.suffix == ".tar" and out.is_dir():
            raise InputError(f"{out} is a folder; give the name of a tar, or a folder that does not end in .tar")
        if out.suffix != ".tar" and out.exists() and not out.is_dir():
            raise InputError(f"{out} is a file; let the name of a tar end in .tar, or give a folder of tars")
        return webdataset.tar_files(out, len(pictures))
    if to in BESIDE:
        if out.exists() and not out.is_dir():
            raise InputError(f"{out} is a file; {to} is a file for each picture: give a folder")
        if to == "json_beside":
            return [out / f"{stem}.json" for stem in dict.fromkeys(stem_of(p.path) for p in pictures)]
        return [out / name for name in beside.text_files(pictures)]
    endings = {
        "csv": (".csv", ".tsv"),
        "interrogator": (".csv",),
        "imagefolder": (".jsonl", ".csv", ".parquet"),
    }.get(to, (".json",))
    if out.is_dir() or not out.suffix:
        return [out / FILES[to]]
    if out.suffix.lower() not in endings:
        raise InputError(f"{out} will be {sources.KINDS[to]}; let its name end in {' or '.join(endings)}")
    if to == "imagefolder" and out.stem != "metadata":
        raise InputError(f"{out}: an imagefolder's file is called metadata{out.suffix}; give that name, or a folder")
    return [out]


def _write(pictures: Sequence[Picture], to: str, out: Path, files: Sequence[Path]) -> list[str]:
    if to in ("text", "kohya"):
        return beside.write_texts(pictures, out)
    if to == "json_beside":
        return beside.write_jsons(pictures, out)
    path = files[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix.lower()
    if to in ("json", "coco", "kohya_json"):
        writer = {"json": seed.write, "coco": coco.write, "kohya_json": kohya.write_metadata}[to]
        write_json(writer(pictures), path)
    elif to == "imagefolder" and suffix == ".jsonl":
        write_text(imagefolder.write(pictures), path)
    elif suffix == ".parquet":
        write_bytes(imagefolder.parquet(pictures, path), path)
    else:
        header = {"csv": table.OPEN_CLIP, "interrogator": table.INTERROGATOR}.get(to, table.HUGGING_FACE)
        write_text(table.write(pictures, header, "\t" if suffix == ".tsv" else ","), path)
    return []


def _contents(place: str, index: Index, pictures: Sequence[Picture]) -> Iterator[tuple[Picture, bytes | Path]]:
    """Each picture with its file: a path, or, of a tar that is streamed once more, its bytes."""
    if index.report.kind != "webdataset":
        for picture in pictures:
            yield picture, index.root / picture.path
        return
    wanted = {picture.path: picture for picture in pictures}
    for name, sample in webdataset.samples(place, lambda *fault: None):
        if picture := wanted.pop(name, None):
            yield picture, sample.picture
