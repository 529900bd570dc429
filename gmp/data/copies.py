"""Prepared copies of a folder of pictures: cropped square, or varied. The captions beside them go along.

Copies have the sub-folders, names and formats of their pictures. Nothing is written into the folder that is read, and
nothing is replaced unasked; the same call again goes on where it ended.
"""

from __future__ import annotations

import io
import json
import os
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from PIL import Image

from ..errors import InputError, some
from ..events import Event, progress
from ..files import write_json
from .augment import flipped, random_box, seed_of, varied
from .captions import CAPTION_SUFFIXES, PICTURE_SUFFIXES, Index
from .crops import MIDDLE, Box, letterboxed, place, region
from .images import THREADS, format_of, in_batches, load_picture
from .mirror import mirror
from .sampler import seeded

if TYPE_CHECKING:
    from ..clip import VisionTower
    from ..config import Pictures

MARK = ".gmp_pictures.json"  # in a folder of copies: how they were made
CAPTIONS_FILE = "captions.json"
QUALITY = 95  # of JPEG and WebP
_AT_ONCE = 64  # copies between two events
MOST_COPIES = 1000  # of one picture


@dataclass(frozen=True)
class Copies:
    """What was written."""

    written: int  # pictures
    kept: int  # pictures that were there from the same call before
    broken: tuple[tuple[str, str], ...]  # (path, reason) of pictures that do not decode
    unmirrored: int  # copies that are flipped and whose captions are not known
    captions: Path | None  # the caption file, where an index was given
    linked: tuple[str, ...] = ()  # left out: links to nothing or out of the folder, and linked folders
    no_files: tuple[str, ...] = ()  # left out: folders, named pipes and the like, with a picture's or caption's suffix


@dataclass(frozen=True)
class _Source:
    """What is read."""

    folder: Path
    files: Mapping[str, Sequence[str]]  # pictures in the order of their paths -> the caption files beside them
    linked: tuple[str, ...]  # as in `Copies`
    no_files: tuple[str, ...]


@dataclass(frozen=True)
class _Copy:
    name: str  # of its picture, below the source
    target: str  # its own, below the folder of copies
    seed: int = 0


def write_crops(
    source: Path,
    out: Path,
    crop: str,
    *,
    tower: VisionTower | None = None,
    cache: Path | None = None,
    index: Index | None = None,
    force: bool = False,
) -> Generator[Event, None, Copies]:
    """Copies of all pictures below a folder as squares, at their own resolution; yields progress events.

    crop: one of `config.CROPS`; the salient one needs a tower and a cache. index: captions of a file, which are written
    for the copies too. Raises InputError where `source` and `out` do not suit.
    """
    there = _list(source)
    names = list(there.files)
    recipe: dict[str, object] = {"crop": crop}
    boxes: Mapping[str, Box | None] = {}
    if crop == "salient":
        from ..features import content_keys, salient_boxes, state_key

        if tower is None or cache is None:
            raise ValueError("a salient crop needs a vision tower and a cache")
        recipe["vision"] = state_key(tower.state_dict())
        _check(source, out, recipe, force)
        keys = yield from content_keys(source, names, cache)
        boxes = dict(zip(names, (yield from salient_boxes(tower, source, names, keys, cache)), strict=True))

    def make(image: Image.Image, copy: _Copy) -> Image.Image:
        if crop == "letterbox":
            return letterboxed(image)
        box = boxes.get(copy.name)
        return region(image, "salient", MIDDLE if box is None else place(box, *image.size))

    copies = [_Copy(name, name) for name in names]
    return (yield from _write(there, out, recipe, copies, make, lambda copy: False, index, force))


def write_augmented(
    source: Path,
    out: Path,
    count: int,
    pictures: Pictures,
    seed: int = 0,
    *,
    index: Index | None = None,
    force: bool = False,
) -> Generator[Event, None, Copies]:
    """`count` varied copies of every picture below a folder, at their own resolution; yields progress events.

    One copy has its picture's name, of several the first one of a.png is a-1.png. A random part keeps its shape. The
    captions of flipped copies are mirrored; pictures of one name but for their suffix, which share captions, flip
    together. index: as in `write_crops`. Raises InputError where `source` and `out` do not suit.
    """
    if count < 1:
        raise InputError(f"cannot write {count} copies of each picture; at least 1")
    if count > MOST_COPIES:
        raise InputError(f"cannot write {count} copies of each picture; at most {MOST_COPIES}")
    if not pictures.varies:
        raise InputError("copies would all be like their pictures; say what varies: jitter, grey, flip or scale")
    there = _list(source)
    varying = asdict(replace(pictures, crop="centre", views=1))
    recipe = {"copies": count, "seed": seed, "pictures": varying}

    def make(image: Image.Image, copy: _Copy) -> Image.Image:
        if pictures.scale < 1:
            image = image.crop(random_box(*image.size, pictures.scale, seeded(f"part {copy.seed}")))
        return varied(image, pictures, copy.seed)

    copies = [
        _Copy(name, name if count == 1 else _numbered(name, number), seed_of(f"{seed} {_stem(name)}", number))
        for name in there.files
        for number in range(1, count + 1)
    ]
    flips: Callable[[_Copy], bool] = lambda copy: flipped(pictures, copy.seed)  # noqa: E731
    return (yield from _write(there, out, recipe, copies, make, flips, index, force))


# ---- folders --------------------------------------------------------------------------------------------------------


def _list(source: Path) -> _Source:
    """The pictures below a folder and the captions beside them.

    As data sets are read: links out of the folder, linked folders, and names that start with a dot, are left out. So is
    what is no file, which is never opened: a named pipe would be waited for.
    """
    if not source.is_dir():
        raise InputError(f"{source} is no folder; give the folder that holds the pictures")
    real = source.resolve()
    names, linked, no_files = [], [], []
    for folder, folders, files in _walk(source):
        for name in (*folders, *files):
            path = Path(folder, name)
            below = path.relative_to(source).as_posix()
            link, wanted = path.is_symlink(), name.lower().endswith((*PICTURE_SUFFIXES, *CAPTION_SUFFIXES))
            if link and (path.is_dir() or (wanted and not _leads_to_file(path, real))):
                linked.append(below)
            elif wanted and not path.is_file():
                no_files.append(below)
            elif wanted:
                names.append(below)
    captions: dict[str, list[str]] = {}
    for name in sorted(names):
        if name.lower().endswith(CAPTION_SUFFIXES):
            captions.setdefault(_stem(name), []).append(name)
    found = {name: captions.get(_stem(name), []) for name in sorted(names) if name.lower().endswith(PICTURE_SUFFIXES)}
    if not found:
        links = f"; links that were not followed: {some(linked)}" if linked else ""
        raise InputError(f"there are no pictures in {source}; they end in {', '.join(PICTURE_SUFFIXES)}{links}")
    return _Source(source, found, tuple(sorted(linked)), tuple(sorted(no_files)))


def _leads_to_file(link: Path, root: Path) -> bool:
    """Whether a link leads to a file below a folder, which is given as it is without links."""
    return root in Path(os.path.realpath(link)).parents and link.is_file()


def _walk(source: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    def fail(error: OSError) -> None:
        raise error

    for folder, folders, files in os.walk(source, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield folder, folders, [name for name in files if not name.startswith(".")]


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _numbered(name: str, number: int) -> str:
    path = PurePosixPath(name)
    return str(path.with_name(f"{path.stem}-{number}{path.suffix}"))


def _check(source: Path, out: Path, recipe: Mapping[str, object], force: bool) -> None:
    """Raises InputError where copies may not be written."""
    here, there = source.resolve(), out.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise InputError(f"copies in {out} and pictures in {source} would mix; choose a folder beside it")
    if os.path.lexists(out) and not out.is_dir():
        raise InputError(f"{out} is a file; give a folder for the copies")
    if force or not out.exists():
        return
    try:
        known = json.loads((out / MARK).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if any(out.iterdir()):
            raise InputError(
                f"{out} is not empty; choose an empty folder, one that does not exist, or pass --force"
            ) from None
        return
    except ValueError:
        raise InputError(f"{out / MARK} is damaged; choose another folder, or pass --force") from None
    if known != _told(source, recipe):
        raise InputError(f"{out} holds copies that were made otherwise; choose another folder, or pass --force")


def _told(source: Path, recipe: Mapping[str, object]) -> object:
    """What the mark says, as it is read back."""
    return json.loads(json.dumps({"version": 1, "source": str(source.resolve())} | dict(recipe)))


# ---- writing --------------------------------------------------------------------------------------------------------


def _write(
    there: _Source,
    out: Path,
    recipe: Mapping[str, object],
    copies: Sequence[_Copy],
    make: Callable[[Image.Image, _Copy], Image.Image],
    flips: Callable[[_Copy], bool],
    index: Index | None,
    force: bool,
) -> Generator[Event, None, Copies]:
    """make: a copy's picture. flips: whether it is turned round."""
    source, files = there.folder, there.files
    _check(source, out, recipe, force)
    out.mkdir(parents=True, exist_ok=True)
    write_json(_told(source, recipe), out / MARK)

    def one(i: int) -> bool:
        """Writes a copy; False where it is there."""
        copy = copies[i]
        target = out / copy.target
        if target.exists() and not force:
            return False
        path = source / copy.name
        image = load_picture(path)
        content = _encoded(make(image, copy), format_of(path), image.info.get("icc_profile"))
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.resolve() in target.resolve().parents:
            raise InputError(f"{target.parent} is a link into {source}, into which nothing is written; remove it")
        for name in files[copy.name]:  # before the picture: where that is, all is
            _replace(_captions(source / name, flips(copy)), target.with_suffix(Path(name).suffix))
        _replace(content, target)
        return True

    broken: dict[str | Path, str] = {}
    paths = [source / copy.name for copy in copies]
    written = kept = 0
    yield progress("write pictures", 0, len(copies))
    for start, part in enumerate(in_batches(one, paths, _AT_ONCE, THREADS, broken)):
        written, kept = written + sum(part), kept + len(part) - sum(part)
        yield progress("write pictures", min((start + 1) * _AT_ONCE, len(copies)), len(copies))
    if not written + kept:
        reasons = [f"{path}: {reason}" for path, reason in broken.items()]
        raise InputError(f"none of the {len(files)} pictures in {source} can be read: {some(reasons, 3)}")
    failed = {str(path): reason for path, reason in broken.items()}
    whole = [copy for copy in copies if str(source / copy.name) not in failed]
    told = {picture.path: picture.captions for picture in index.pictures} if index else {}
    if index:
        _write_index(whole, told, flips, out / CAPTIONS_FILE)
    unknown = sum(flips(copy) and not files[copy.name] and copy.name not in told for copy in whole)
    names = tuple((name, failed[str(source / name)]) for name in files if str(source / name) in failed)
    captions = out / CAPTIONS_FILE if index else None
    return Copies(written, kept, names, unknown, captions, there.linked, there.no_files)


def _write_index(
    copies: Sequence[_Copy], told: Mapping[str, Sequence[str]], flips: Callable[[_Copy], bool], path: Path
) -> None:
    """Captions of the copies as one JSON file."""
    captions = {
        copy.target: [mirror(caption) if flips(copy) else caption for caption in told[copy.name]]
        for copy in copies
        if copy.name in told
    }
    _replace(json.dumps(captions, indent=0, ensure_ascii=False).encode(), path)


def _captions(path: Path, flip: bool) -> bytes:
    """A caption file's content, mirrored where its picture is flipped."""
    content = path.read_bytes()
    if not flip:
        return content
    try:
        return "\n".join(mirror(line) for line in content.decode("utf-8-sig").split("\n")).encode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path.name} is not UTF-8 text (byte {error.start}), and its picture is flipped. Save it as UTF-8."
        ) from error


def _encoded(image: Image.Image, kind: str, profile: bytes | None) -> bytes:
    """An RGB picture as a file of a format that `format_of` tells, with the profile if it is one of RGB."""
    image.info = {}  # EXIF, which would turn it once more, and comments
    options: dict[str, object] = {}
    if kind in ("JPEG", "WebP"):
        options["quality"] = QUALITY
    if kind == "JPEG":
        options["subsampling"] = 0  # colours at full resolution
    if kind in ("JPEG", "PNG", "WebP") and profile and profile[16:20] == b"RGB ":
        options["icc_profile"] = profile
    content = io.BytesIO()
    image.save(content, format=kind, **options)
    return content.getvalue()


def _replace(content: bytes, path: Path) -> None:
    """The file is there as a whole or not at all."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")  # captions may be shared by two pictures
    part.write_bytes(content)
    os.replace(part, path)
