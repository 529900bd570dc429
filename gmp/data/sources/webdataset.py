"""WebDataset tars as a source of captions, and as a place to put pictures with theirs; `tars` streams them.

The pictures of one tar are named as in it; those of several as they lie when each is unpacked into a folder of its
name: `00001/000010000.jpg`.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ...errors import InputError
from ..captions import CaptionReport, Index, Picture
from ..tars import PICTURES, Sample, find_tars, read_samples
from .columns import unused
from .folder import Folder, stem_of, suffix_of

PER_TAR = 10_000  # pictures, as img2dataset's


def samples(place: str, left_out: Callable[[str, str], object]) -> Iterator[tuple[str, Sample]]:
    """(name, picture) of all in the tars of a pattern or folder, streamed; left_out hears (name, reason) of others."""
    tars = find_tars(sorted(map(str, Path(place).glob("*.tar"))) if Path(place).is_dir() else place)
    stems = [Path(tar.url).name.partition(".")[0] for tar in tars.files]
    unique = len(set(stems)) == len(stems)
    here = Folder(Path("pictures"))
    for number, (tar, stem) in enumerate(zip(tars.files, stems, strict=True)):
        above = "" if len(stems) == 1 else f"{stem if unique else f'{number:05}'}/"
        for sample in read_samples(tar, left_out):
            name = here.relative(sample.name)
            if name is None or Path(sample.name).is_absolute():
                left_out(sample.name, "its name leads out of the tar")
            else:
                yield above + name, sample


def read(place: str, columns: Sequence[str] | None = None) -> Index:
    """The pictures in tars with their captions, as an index of what lies beside them once they are unpacked.

    columns: what was asked for; tars have none, which a note says.
    """
    broken: list[tuple[str, str]] = []
    found: dict[str, tuple[str, ...]] = {}
    for name, sample in samples(place, lambda *fault: broken.append(fault)):
        found[name] = sample.captions
    if not found:
        raise InputError(f"There is no picture with captions in the tars {place}.")
    pictures = tuple(Picture(name, captions) for name, captions in sorted(found.items()))
    carriers = Counter(caption for picture in pictures for caption in picture.captions)
    shared = sum(count > 1 for count in carriers.values())
    report = CaptionReport(
        listed=len(found) + len(broken),
        broken=tuple(broken),
        shared=shared,
        kind="webdataset",
        notes=unused(columns, "webdataset"),
    )
    return Index(Path(place).parent if "://" not in place else Path(), pictures, report)


def tar_files(out: Path, count: int) -> list[Path]:
    """What `write` writes: one tar, or a folder of 00000.tar, 00001.tar, … with `PER_TAR` pictures each."""
    if out.suffix == ".tar":
        return [out]
    return [out / f"{number:05}.tar" for number in range(max(1, -(-count // PER_TAR)))]


def write(
    pictures: Sequence[Picture], contents: Iterator[tuple[Picture, bytes | Path]], out: Path
) -> tuple[list[Path], list[str]]:
    """Writes the pictures of `contents` into tars, each beside its captions. Returns the files and what was lost.

    Captions go into .txt, a line each; those of a picture of which one has a line break into .json.
    """
    paths = tar_files(out, len(pictures))
    share = len(pictures) if out.suffix == ".tar" else PER_TAR
    taken: set[str] = set()
    renamed = as_json = 0
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        try:
            with tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as archive:
                for _, (picture, content) in zip(range(share), contents, strict=False):
                    key = _key(picture.path, taken)
                    suffix = suffix_of(picture.path)
                    renamed += key + suffix != picture.path
                    _add(archive, key + suffix, content)
                    broken = any("\n" in caption or "\r" in caption for caption in picture.captions)
                    as_json += broken
                    text = json.dumps({"caption": picture.captions}) if broken else "\n".join(picture.captions) + "\n"
                    _add(archive, key + (".json" if broken else ".txt"), text.encode("utf-8"))
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    lost = []
    if renamed:
        lost.append(
            f"names: {renamed} pictures have another one in the tar, where a name ends at its first dot, suffixes are "
            "in small letters, and no two pictures differ in them alone"
        )
    if as_json:
        lost.append(f"line breaks: kept for {as_json} pictures in .json beside them, which open_clip does not read")
    return paths, lost


def can_hold(picture: Picture) -> bool:
    return suffix_of(picture.path)[1:] in PICTURES


def _key(path: str, taken: set[str]) -> str:
    """A picture's name in a tar without suffix: webdataset cuts it at the first dot."""
    folder, slash, name = stem_of(path).rpartition("/")
    plain = key = f"{folder}{slash}{name.replace('.', '_')}"
    number = 1
    while key in taken:
        number += 1
        key = f"{plain}_{number}"
    taken.add(key)
    return key


def _add(archive: tarfile.TarFile, name: str, content: bytes | Path) -> None:
    header = tarfile.TarInfo(name)
    if isinstance(content, bytes):
        header.size = len(content)
        archive.addfile(header, io.BytesIO(content))
        return
    with content.open("rb") as file:
        header.size = os.fstat(file.fileno()).st_size
        archive.addfile(header, file)
