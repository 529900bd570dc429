"""WebDataset tars: which there are, and the captioned pictures in one, streamed once.

In a tar, a picture lies beside its captions: `0001.jpg` beside `0001.txt`, each line that is not empty a caption, or
beside `0001.json` with a string or a list of strings as `caption`; img2dataset writes both. Files lie here, or in a
store that fsspec opens. Nothing is run to read them: webdataset's `gopen` opens URLs with shell commands (`pipe:`),
with curl and with gsutil, so that of it only the grouping of members into samples is used.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import InputError, some
from .sources.opened import decode

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif")
TEXTS = ("txt", "json")
SCHEMES = (
    *("file", "memory", "http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "hdfs", "webhdfs"),
    *("oci", "oss", "sftp", "ftp"),
)
MOST = 1_000_000  # tars
LARGEST = 1 << 28  # bytes of a member; a header of a few bytes may promise any number
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]+):")  # two letters or more: C: is a drive
_RANGE = re.compile(r"(-?\d{1,18})\.\.(-?\d{1,18})")
_COMPRESSION = {".gz": "gzip", ".tgz": "gzip", ".bz2": "bz2", ".xz": "xz"}


@dataclass(frozen=True)
class Tar:
    """One tar, and what tells it from what may lie at the same place another day."""

    url: str  # or a path
    size: int | None  # bytes
    version: str  # etag, checksum or time of the last change, as its store says it; "" where it does not

    @property
    def key(self) -> str:
        """SHA-256 of place, size and version."""
        return hashlib.sha256(json.dumps([self.url, self.size, self.version]).encode()).hexdigest()


@dataclass(frozen=True)
class Tars:
    """The tars of a data set in the order of their places, however they were named."""

    files: tuple[Tar, ...]

    def __len__(self) -> int:
        return len(self.files)

    @property
    def key(self) -> str:
        """SHA-256 over the tars: another one when one is added, or written anew."""
        return hashlib.sha256("".join(tar.key for tar in self.files).encode()).hexdigest()


@dataclass(frozen=True)
class Sample:
    """A picture's file and what it may be called."""

    name: str  # of the picture in its tar
    picture: bytes
    captions: tuple[str, ...]  # at least one, stripped, no two the same

    @property
    def key(self) -> str:
        """SHA-256 of the picture's file, as `captions.content_key` has it."""
        return hashlib.sha256(self.picture).hexdigest()


def find_tars(patterns: str | Sequence[str]) -> Tars:
    """The tars that patterns such as `shards/{00000..00009}.tar` or `s3://bucket/{train,more}/0.tar` name.

    None of them is opened, but each is looked at. Raises InputError for a scheme that is not in `SCHEMES`, for a tar
    named twice, and for all that are not there at once; and where webdataset or fsspec is not installed.
    """
    urls = [_place(url) for pattern in ([patterns] if isinstance(patterns, str) else patterns) for url in _all(pattern)]
    if twice := [url for url, count in Counter(urls).items() if count > 1]:
        raise InputError(f"named more than once: {some(twice)}; name every tar once")
    if not urls:
        raise InputError("no tars were named; give a path or URL such as shards/{00000..00009}.tar")
    look = _library()[0]
    with ThreadPoolExecutor(16, thread_name_prefix="gmp-tars") as pool:
        found = list(pool.map(functools.partial(_look, look), sorted(urls)))
    faults = [one for one in found if isinstance(one, str)]
    if faults:
        listed = "\n".join(f"  {fault}" for fault in faults[:6])
        more = f"\n  … {len(faults)} in all" if len(faults) > 6 else ""
        raise InputError(
            f"{len(faults)} of {len(urls)} tars cannot be read; mend their names or get them:\n{listed}{more}"
        )
    return Tars(tuple(found))


def read_samples(tar: Tar, left_out: Callable[[str, str], object]) -> Iterator[Sample]:
    """Streams a tar's captioned pictures in its order; left_out hears (name, reason) of each that cannot be used.

    Raises InputError for a tar that is damaged, or ends before its end, also right behind a whole member: tar's own
    reader takes such an end for the end of all.
    """
    _, group, open_url = _library()

    def repeated(error: Exception) -> bool:
        left_out(tar.url, str(error.args[0]))
        return True

    try:
        with open_url(tar.url, "rb", compression=_COMPRESSION.get(Path(tar.url).suffix.lower())) as stream:
            for found in group(_members(stream, tar.url, left_out), handler=repeated):
                sample = _sample(found, left_out)
                if sample is not None:
                    yield sample
    except FileNotFoundError:
        raise InputError(f"{tar.url} is not there any more") from None
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise InputError(f"{tar.url} is damaged or cut, or cannot be read: {error}; get it again") from error


def _all(pattern: str) -> list[str]:
    """What a pattern's braces stand for."""
    try:
        import braceexpand
    except ImportError:
        raise InputError(_MISSING) from None
    # it is unfolded as a whole: too large a range would fill memory
    ranges = (abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(pattern))
    if math.prod(ranges) > MOST:
        raise InputError(f"{pattern} stands for more than {MOST:,} tars; name fewer")
    try:
        return list(braceexpand.braceexpand(pattern, escape=False))
    except ValueError:
        raise InputError(f"{pattern} has a brace without its pair; write it like {{00000..00009}}") from None


def _place(url: str) -> str:
    """A URL that may be opened, or an absolute path. Raises InputError for any other."""
    found = _SCHEME.match(url)
    if found is None and url.strip() not in ("", "-"):
        return str(Path(url).absolute())
    scheme = found[1].lower() if found else url
    if scheme in SCHEMES and url[found.end() :].startswith("//") and "::" not in url:
        return url
    reason = "it would be run as a command, and no command is run" if scheme == "pipe" else "it is not opened"
    raise InputError(f"{url}: {reason}; give a path, or a URL that begins with {', '.join(f'{s}://' for s in SCHEMES)}")


_MISSING = (
    "reading tars needs webdataset and fsspec, which are not installed; install both with "
    "`pip install webdataset fsspec`, or give a folder of pictures"
)


def _library() -> tuple[Callable, Callable, Callable]:
    """fsspec's look at a URL, webdataset's grouping of members, fsspec's opening."""
    try:
        import fsspec
        from webdataset.tariterators import group_by_keys
    except ImportError:
        raise InputError(_MISSING) from None
    return fsspec.core.url_to_fs, group_by_keys, fsspec.open


def _look(url_to_fs: Callable, url: str) -> Tar | str:
    """What is there, or why it cannot be read."""
    try:
        store, path = url_to_fs(url)
        store.invalidate_cache()  # listings from before a tar was written anew
        info = store.info(path)
    except FileNotFoundError:
        return f"{url}: not there"
    except Exception as error:  # every store has its own; one without its library raises ImportError
        return f"{url}: {error or type(error).__name__}"
    if info.get("type") == "directory":
        return f"{url}: a folder; name the tars in it"
    names = ("ETag", "etag", "md5Hash", "checksum", "mtime", "LastModified", "last_modified", "updated", "created")
    version = next((str(info[name]) for name in names if info.get(name)), "")
    return Tar(url, info.get("size"), version)


class _Member(tarfile.TarInfo):
    """A member's header. tarfile takes a header that is damaged or not there for the end, without a word."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # zeros: the end that a whole tar has
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"no whole header at byte {archive.offset:,} ({error})") from error


def _members(stream: BinaryIO, url: str, left_out: Callable[[str, str], object]) -> Iterator[dict[str, object]]:
    """Pictures and texts as webdataset's grouping takes them; all else in the tar is passed over."""
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member) as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # it keeps every header: memory would grow with the tar
            if not member.isfile() or member.name.rpartition(".")[2].lower() not in (*PICTURES, *TEXTS):
                continue
            if member.size > LARGEST:
                left_out(member.name, f"{member.size:,} bytes, more than {LARGEST:,}")
                continue
            yield {"fname": member.name, "data": archive.extractfile(member).read(), "__url__": url}


def _sample(found: dict[str, object], left_out: Callable[[str, str], object]) -> Sample | None:
    key = str(found["__key__"])
    suffix = next((suffix for suffix in PICTURES if suffix in found), None)
    if suffix is None:
        left_out(key, "no picture beside its text")
        return None
    try:
        captions = _captions(found)
    except ValueError as error:
        left_out(f"{key}.{suffix}", f"its text cannot be read ({error})")
        return None
    if not captions:
        left_out(f"{key}.{suffix}", "no caption")
        return None
    return Sample(f"{key}.{suffix}", found[suffix], captions)


def _captions(found: dict[str, object]) -> tuple[str, ...]:
    """Raises ValueError for a text that is neither UTF-8 nor has a byte order mark, and for JSON of another shape."""
    captions = decode(found["txt"]).split("\n") if "txt" in found else []
    if "json" in found:
        try:
            # parse_int: int() raises its own error for very long numbers
            values = json.loads(decode(found["json"]), parse_int=float)
        except RecursionError:
            raise ValueError("JSON nested too deeply") from None
        if not isinstance(values, dict):
            raise ValueError("JSON without the key caption")
        value = values.get("caption") or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(caption, str) for caption in value):
            raise ValueError("caption is neither a string nor a list of strings")
        captions += value
    return tuple(dict.fromkeys(caption.strip() for caption in captions if caption.strip()))
