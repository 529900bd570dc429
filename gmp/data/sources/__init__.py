"""All ways in which captions are written down, behind one function: `read`.

A page for each: how it is told from the others, how it is read, how it is written. `KINDS` is the list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import InputError
from ..captions import Index
from . import beside, coco, imagefolder, kohya, seed, table
from .columns import unused
from .folder import Folder, is_picture
from .found import Found, Listing, build, locate
from .mix import Source, mix, parse
from .opened import EXPECTED, Opened, is_tars, open_place

__all__ = ("KINDS", "Kind", "Source", "holds_tars", "mix", "parse", "read", "tars_of")

_Columns = Sequence[str] | None


@dataclass(frozen=True)
class Kind:
    """A way to write captions down. One of a file has `looks` and `read`, one of a folder `looks_folder`.

    `looks_folder` is given the folder of the captions and that of the pictures, which mostly are the same.
    """

    name: str
    sentence: str
    looks: Callable[[Opened], bool] | None = None
    read: Callable[[Opened, _Columns, list[str]], Listing] | None = None
    looks_folder: Callable[[Folder, Folder], bool] | None = None
    read_folder: Callable[[Folder, _Columns, list[str]], Listing] | None = None  # names of pictures, to be looked up
    read_beside: Callable[[Folder, Folder, _Columns, list[str]], Found] | None = None  # what lies beside pictures
    strict: bool = True  # only what it looks like is read as it
    columns: bool = False  # or keys, that may be asked for


def _desc(folder: Folder, columns: _Columns, problems: list[str]) -> Listing:
    opened = open_place(str(folder.root / "desc.csv"), problems)
    return table.read(opened, columns, problems) if opened else Listing(())


_ALL = (  # those that take less come first: the first that fits is it
    Kind(
        "imagefolder",
        "Hugging Face imagefolder: pictures with metadata.jsonl, .csv or .parquet",
        looks=imagefolder.looks,
        read=imagefolder.read,
        looks_folder=lambda folder, pictures: bool(imagefolder.files(folder)),
        read_folder=imagefolder.read_folder,
        columns=True,
    ),
    Kind(
        "interrogator",
        "CLIP-Interrogator's desc.csv: image,prompt",
        looks=table.looks_interrogator,
        read=table.read,
        looks_folder=lambda folder, pictures: "desc.csv" in folder.list("").files,
        read_folder=_desc,
        columns=True,
    ),
    Kind(
        "csv",
        "CSV or TSV with a column of paths and one of captions",
        looks=table.looks,
        read=table.read,
        columns=True,
    ),
    Kind(
        "coco",
        "COCO captions JSON: images and annotations",
        looks=coco.looks,
        read=lambda opened, columns, problems: coco.read(opened, problems),
    ),
    Kind(
        "kohya_json",
        'kohya metadata JSON: {picture: {"caption": …, "tags": …}}',
        looks=kohya.looks_metadata,
        read=lambda opened, columns, problems: kohya.read_metadata(opened, problems),
    ),
    Kind(
        "json",
        "one JSON file: {picture: [captions]}",
        looks=lambda opened: seed.looks(opened) and not coco.looks(opened),
        read=lambda opened, columns, problems: seed.read(opened, problems),
    ),
    Kind(
        "kohya",
        "kohya folders: 10_name with .txt or .caption beside the pictures",
        looks_folder=kohya.looks_folder,
        read_beside=lambda pictures, texts, columns, problems: kohya.read_folder(pictures, texts, problems),
        strict=False,
    ),
    Kind(
        "text",
        "text files beside the pictures: .txt or .caption",
        looks_folder=beside.has_texts,
        read_beside=lambda pictures, texts, columns, problems: beside.read_texts(pictures, texts, problems),
        strict=False,
    ),
    Kind(
        "json_beside",
        "a JSON file beside each picture: caption, or SPRIGHT's spatial_caption and original_caption",
        looks_folder=lambda folder, pictures: beside.has_texts(folder, pictures, (".json",)),
        read_beside=beside.read_jsons,
        columns=True,
        strict=False,
    ),
    Kind("webdataset", "WebDataset tars: 0001.jpg with 0001.txt or 0001.json"),
)
_KIND = {kind.name: kind for kind in _ALL}

KINDS: dict[str, str] = {kind.name: kind.sentence for kind in _ALL}
"""What `kind` may be, each with a sentence."""


def read(
    place: Path | str,
    *,
    kind: str | None = None,
    images: Path | str | None = None,
    columns: Sequence[str] | None = None,
    missing_ok: bool = False,
) -> Index:
    """The captioned pictures of a caption file or a folder; the report says which.

    kind: one of `KINDS`; None takes the one that it looks like. images: the folder of the pictures; without, the one
    given, or the one that the caption file lies in. columns: those of pictures and captions in a table, or the keys
    that are captions in `json_beside`. missing_ok: leave out pictures that are named but not there. No picture is
    opened. Raises InputError with all problems at once.
    """
    place = str(place)
    problems: list[str] = []
    if kind is not None and kind not in KINDS:
        raise InputError(f"There is no kind of captions {kind!r}; choose one of {', '.join(KINDS)}.")
    if kind == "webdataset" or is_tars(place):
        raise InputError(
            f"{place} is of tars, which no folder of pictures is read from: `repair` takes them with --data, and "
            "`captions convert` writes their captions into another kind."
        )
    root = Path(images if images is not None else place if not Path(place).is_file() else Path(place).parent)
    _check_root(root, problems)
    whole = Path(place) == root
    opened = None if whole and problems else open_place(place, problems)
    pictures = Folder(root)
    chosen = _choose(opened, pictures, kind, problems) if opened else None
    if chosen and chosen.read and not root.is_dir():
        chosen.read(opened, columns, problems)  # for its problems
    if chosen is None or not root.is_dir():
        raise InputError("\n".join(problems))
    found = _read(chosen, opened, pictures, columns, missing_ok, problems)
    notes = found.notes
    if kind is None and chosen.name == "text":
        notes += kohya.strays(pictures)
    if not chosen.columns:
        notes += unused(columns, chosen.name)
    return build(pictures, replace(found, kind=chosen.name, notes=notes), problems)


def holds_tars(place: Path | str) -> bool:
    """Whether a place is of WebDataset tars: named as such, or a folder with tars and no pictures."""
    if is_tars(str(place)):
        return True
    path = Path(place)
    return path.is_dir() and any(path.glob("*.tar")) and not any(is_picture(entry.name) for entry in path.iterdir())


def tars_of(place: Path | str) -> list[str]:
    """The tars of a place: those of a folder, or the pattern itself."""
    path = Path(place)
    return sorted(map(str, path.glob("*.tar"))) if path.is_dir() else [str(place)]


def _check_root(root: Path, problems: list[str]) -> None:
    if not root.exists():
        problems.append(f"There is no folder {root}. Give the folder that holds the pictures.")
    elif not root.is_dir():
        problems.append(f"{root} is a file. Give the folder that holds the pictures.")


def _choose(opened: Opened, pictures: Folder, asked: str | None, problems: list[str]) -> Kind | None:
    """The kind that was asked for, if it can be, or the one that a place looks like; None after a problem."""
    folder = _folder(opened, pictures) if opened.form == "folder" else None
    if asked is not None:
        kind = _KIND[asked]
        if (kind.looks_folder if folder else kind.looks) and not kind.strict or _looks(kind, opened, folder, pictures):
            return kind
    like = next((kind for kind in _ALL if _looks(kind, opened, folder, pictures)), None)
    if asked is None and folder and like is None and folder is pictures:
        return _KIND["text"]  # and all pictures are without captions
    if asked is None and like is None and opened.form == "json":
        return _KIND["json"]  # which says what is expected
    if asked is None and like is not None:
        return like
    problems.append(_wrong(opened, pictures, asked, like))
    return None


def _looks(kind: Kind, opened: Opened, folder: Folder | None, pictures: Folder) -> bool:
    if folder:
        return kind.looks_folder is not None and kind.looks_folder(folder, pictures)
    return kind.looks is not None and kind.looks(opened)


def _wrong(opened: Opened, pictures: Folder, asked: str | None, like: Kind | None) -> str:
    """Why a place cannot be read as asked, or at all."""
    if asked is not None:
        what = f"{opened.place} is not of the kind {asked} ({KINDS[asked]})"
        if like is not None:
            return f"{what}. It looks like {like.name} ({like.sentence}): pass {like.name} as its kind, or none."
        return f"{what}, nor of any other that is known: {', '.join(KINDS)}."
    if opened.form == "folder":
        return (
            f"The caption file {opened.place} is a folder, in which no captions were found: no .txt, .caption or "
            f".json in it lies where a picture lies in {pictures.root} (sub/a.txt for sub/a.jpg). Give a caption file, "
            "or none for .txt beside the pictures."
        )
    return (
        f"{opened.place} is of no kind of captions that is known: it is a text with one column. {EXPECTED} Or a table "
        "with columns such as filepath,title. A text file of one picture belongs beside it, in its folder."
    )


def _read(
    kind: Kind, opened: Opened, pictures: Folder, columns: _Columns, missing_ok: bool, problems: list[str]
) -> Found:
    if opened.form != "folder":
        return locate(pictures, kind.read(opened, columns, problems), opened.path, missing_ok, problems)
    folder = _folder(opened, pictures)
    if kind.read_beside:
        return kind.read_beside(pictures, folder, columns, problems)
    listing = kind.read_folder(folder, columns, problems)
    if folder is pictures and beside.has_texts(pictures, pictures):
        unread = "text files lie beside pictures, too: not read (the kind text reads them)"
        listing = replace(listing, notes=(*listing.notes, unread))
    return locate(pictures, listing, opened.path, missing_ok, problems)


def _folder(opened: Opened, pictures: Folder) -> Folder:
    """The folder that was opened; the one of the pictures where it is the same, which is listed once then."""
    return pictures if opened.path == pictures.root else Folder(opened.path)
