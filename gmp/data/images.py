"""CLIP's picture preprocessing: what openai/CLIP and open_clip do, with the conversion to RGB done first.

Turn as EXIF says -> RGB, transparency on white -> shortest side to `size`, PIL bicubic -> centre crop -> 0..1
-> OpenAI's mean and deviation. openai/CLIP converts to RGB after resizing, which resizes palette pictures
without interpolation and drops the alpha channel; for RGB and grey pictures the result is the same, bit for
bit, but for large JPEGs: see `load_pixels`. Other crops are those of `crops`, random views those of `augment`.

Pictures are decoded into bytes by threads, travel as bytes, and are normalised where they are used.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from ..config import Pictures
from ..errors import InputError
from .augment import augment
from .crops import MIDDLE, Box, as_bytes, cropped, place, short_to, window

PREPROCESSING = "exif, rgb on white, jpeg draft, pil bicubic shortest side, centre crop, openai mean/std; version 2"
"""Names the procedure. Part of the keys of every cache of picture features: change it when pixels change."""

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
THREADS = max(2, min(16, os.cpu_count() or 2))  # PIL decodes and resizes without Python's lock
PLAIN = Pictures()  # CLIP's own crop, nothing random
LARGEST = 1 << 28  # pixels of a picture, 16384 x 16384: 0.8 GB once it is decoded

_NARROWEST = 200  # long side / short side; resizing a strip blows its long side up to `size` times that
_AHEAD = 256  # pictures decoded ahead of the consumer at most, 0.15 MB each at 224 pixels
_GAP = 2  # a JPEG is decoded at no less than this times the size it is resized to
_ORIENTATION = 0x0112  # EXIF's tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Loaded = TypeVar("Loaded")


# ---- decoders -------------------------------------------------------------------------------------------------------


class _Whole:
    """A file that is cut short is an error.

    PIL fills what lacks with grey where `ImageFile.LOAD_TRUNCATED_IMAGES` is set, which other code of the process does.
    """

    def load_read(self, count: int) -> bytes:
        content = self.fp.read(count)
        if not content:
            raise EOFError("truncated")
        return content


class _JPEG(_Whole, JpegImagePlugin.JpegImageFile):
    """The first picture of a file, also where a phone has put two into it (MPO)."""


class _BMP(_Whole, BmpImagePlugin.BmpImageFile):
    pass


class _GIF(_Whole, GifImagePlugin.GifImageFile):
    pass


class _PNG(PngImagePlugin.PngImageFile):
    def load_read(self, count: int) -> bytes:
        try:
            content = super().load_read(count)
        except struct.error:
            content = b""
        if not content:
            raise EOFError("truncated")
        return content


# Only these ever see a file, told by its first bytes, whatever its name is and whatever PIL was taught besides.
_DECODERS = {
    "PNG": (_PNG, lambda head: head.startswith(b"\x89PNG\r\n\x1a\n")),
    "JPEG": (_JPEG, lambda head: head.startswith(b"\xff\xd8\xff")),
    "WebP": (WebPImagePlugin.WebPImageFile, lambda head: head[:4] == b"RIFF" and head[8:12] == b"WEBP"),
    "GIF": (_GIF, lambda head: head[:6] in (b"GIF87a", b"GIF89a")),
    "BMP": (_BMP, lambda head: head.startswith(b"BM")),
}
FORMATS = ", ".join(_DECODERS)
_STRANGERS = {  # first bytes of what is found among pictures
    b"II*\0": "a TIFF",
    b"MM\0*": "a TIFF",
    b"8BPS": "a Photoshop file",
    b"%PDF": "a PDF",
    b"%!PS": "PostScript",
    b"\0\0\1\0": "an icon",
    b"\xff\x0a": "a JPEG XL",
    b"\0\0\0\x0cJXL": "a JPEG XL",
    b"\0\0\0\x0cjP": "a JPEG 2000",
    b"<": "HTML, SVG or other text",
    b"\x1aE\xdf\xa3": "a video",
}
_BRANDS = {b"avif": "an AVIF", b"avis": "an AVIF", b"heic": "an HEIC", b"heix": "an HEIC", b"mif1": "an HEIC"}


@contextlib.contextmanager
def _open(file: str | Path | BinaryIO, name: str | Path) -> Iterator[Image.Image]:
    """An opened picture, of which the header is read. Whatever fails in here is an InputError with its name."""
    head = b""
    try:
        with contextlib.ExitStack() as stack:
            stream = stack.enter_context(open(file, "rb")) if isinstance(file, (str, os.PathLike)) else file
            stream.seek(0)
            head = stream.read(16)
            decoder = next((decoder for decoder, fits in _DECODERS.values() if fits(head)), None)
            if decoder is None:
                raise InputError(f"{name}: {_stranger(head)}")
            stream.seek(0)
            image = stack.enter_context(decoder(stream))
            if image.width * image.height > LARGEST:
                raise InputError(
                    f"{name}: {image.width} x {image.height} pixels; more than {LARGEST:,} are not decoded. "
                    "Make it smaller."
                )
            if max(image.size) > _NARROWEST * min(image.size):
                raise InputError(
                    f"{name}: {image.width} x {image.height} pixels is a strip; a centre crop would show nothing."
                )
            yield image
    except (MemoryError, InputError):
        raise
    except FileNotFoundError as error:
        raise InputError(f"{name}: there is no such file.") from error
    except Exception as error:  # broken files make PIL raise OSError, SyntaxError, ValueError, struct.error and more
        raise InputError(f"{name}: {_reason(file, head, error)}") from error


def format_of(path: Path) -> str:
    """Which of FORMATS a picture file is, by its first bytes. Raises InputError for any other."""
    with open(path, "rb") as file:
        head = file.read(16)
    found = next((name for name, (_, fits) in _DECODERS.items() if fits(head)), None)
    if found is None:
        raise InputError(f"{path}: {_stranger(head)}")
    return found


def _stranger(head: bytes) -> str:
    """What a file is that is none of the pictures."""
    if not head:
        return "the file is empty."
    kind = next((kind for start, kind in _STRANGERS.items() if head.startswith(start)), None)
    if head[4:8] == b"ftyp":
        kind = _BRANDS.get(head[8:12], "a video")
    if kind:
        return f"this is {kind}, not a picture of a known format ({FORMATS}). Save it as one of these."
    return f"not a picture of a known format ({FORMATS})."


def _reason(file: str | Path | BinaryIO, head: bytes, error: Exception) -> str:
    """Why a picture of a known format cannot be decoded; of one that is cut short, how much there is."""
    length = file.seek(0, io.SEEK_END) if hasattr(file, "seek") else Path(file).stat().st_size
    whole = _declared(head)
    if whole > length:
        return f"the file is cut short: {whole - length:,} of {whole:,} bytes are missing."
    if isinstance(error, (EOFError, struct.error)) or "truncated" in str(error).lower():
        return f"the file is cut short: it ends after {length:,} bytes, before its picture does."
    return f"can't be decoded ({type(error).__name__}: {error})."


def _declared(head: bytes) -> int:
    """How long a file says that it is; 0 where its format does not."""
    if head[:4] == b"RIFF":
        return int.from_bytes(head[4:8], "little") + 8
    return int.from_bytes(head[2:6], "little") if head[:2] == b"BM" else 0


# ---- one picture ----------------------------------------------------------------------------------------------------


def load_picture(path: str | Path) -> Image.Image:
    """Decode one file fully, turn it upright, make it RGB. Raises InputError: the file and the reason."""
    with _open(path, path) as image:
        image.load()
        return to_rgb(_turned(image, _turn(image)))


def load_pixels(
    file: str | Path | BinaryIO,
    size: int,
    name: str | Path | None = None,
    pictures: Pictures = PLAIN,
    box: Box | None = None,
    seed: int | None = None,
) -> torch.Tensor:
    """A picture file, or its open content, as bytes (3, size, size). Raises InputError: its name and the reason.

    pictures: the crop, and what a seed varies; without a seed there is nothing random. box: where the salient crop is,
    as `features.salient_boxes` gives it; None takes the middle.

    The pixels of `cropped(load_picture(file), size, …)` or of `augment`, in less time: a JPEG whose short side is 4 ×
    `size` or longer is decoded at 1/2, 1/4 or 1/8, the smallest that leaves 2 × `size` or more of what is taken, as
    PIL's `thumbnail` does it. Against full decoding, photos then differ by 0.4 to 1 of 255 levels in the mean and 17 at
    the most, and their features in a small trained vision tower by 0.0003 in cosine at the most. All other pictures are
    the same to the bit.
    """
    with _open(file, file if name is None else name) as image:
        shape = image.size
        part = 1.0 if seed is None or pictures.scale == 1 else math.sqrt(0.75 * pictures.scale)  # least side of a part
        least = math.ceil(_GAP * size / part)
        drafted = image.draft(None, (least, least))  # None for anything but a JPEG
        image.load()
        turn = _turn(image)
        at = MIDDLE if box is None else place(box, *_upright(shape, turn))
        if seed is None and pictures.crop != "letterbox" and image.size != shape:
            # the box is where the picture ends, within the last pixel; it is known only until the picture is turned
            image = to_rgb(image).resize(short_to(shape, size), Image.Resampling.BICUBIC, box=drafted[1])
            return as_bytes(window(_turned(image, turn), size, at))
        image = to_rgb(_turned(image, turn))
        if seed is None:
            return as_bytes(cropped(image, size, pictures.crop, at))
        return augment(image, size, pictures, seed, at)


def load_whole(path: str | Path, size: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """All of a picture, squeezed into bytes (3, size, size), and the upright picture's width and height."""
    with _open(path, path) as image:
        shape = image.size
        image.draft(None, (_GAP * size, _GAP * size))
        image.load()
        turn = _turn(image)
        image = to_rgb(_turned(image, turn)).resize((size, size), Image.Resampling.BICUBIC)
        return as_bytes(image), _upright(shape, turn)


def _turn(image: Image.Image) -> int:
    """A loaded picture's orientation as of EXIF, 1..8; what cannot be read is 1, upright."""
    try:
        turn = image.getexif().get(_ORIENTATION, 1)
        return turn if turn in _TURNS else 1
    except Exception:  # as many kinds of it as there are ways to damage EXIF
        return 1


def _turned(image: Image.Image, turn: int) -> Image.Image:
    return image.transpose(_TURNS[turn]) if turn in _TURNS else image


def _upright(shape: tuple[int, int], turn: int) -> tuple[int, int]:
    return shape[::-1] if turn >= 5 else shape


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode -> RGB. Transparent pixels become white; 16-bit grey is scaled to 8 bits, not clipped."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64).clip(0, 65535)  # (H, W)
        levels = (values + 128) // 257  # 0..65535 -> 0..255
        if isinstance(clear := image.info.get("transparency"), int):
            levels[values == clear] = 255
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def square(image: Image.Image, size: int) -> torch.Tensor:
    """The middle of a picture, its shortest side made `size`: bytes (3, size, size)."""
    return as_bytes(cropped(to_rgb(image), size, "centre"))


def preprocess(image: Image.Image, size: int) -> torch.Tensor:
    """A picture -> normalised pixels (3, size, size) float32."""
    return normalize(square(image, size))


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """Bytes (..., 3, S, S) -> float32 on their device, OpenAI's mean and deviation.

    The same bits on every device: where all three are tensors there, division is division; by a mere number, CUDA
    multiplies with its reciprocal.
    """
    whole, mean, std = (torch.from_numpy(v).to(pixels.device) for v in (np.array(255, np.float32), MEAN, STD))
    return (pixels / whole).sub_(mean.view(3, 1, 1)).div_(std.view(3, 1, 1))


# ---- many pictures --------------------------------------------------------------------------------------------------


def load_batches(
    paths: Sequence[str | Path],
    size: int,
    batch: int,
    threads: int = THREADS,
    broken: dict[str | Path, str] | None = None,
    pictures: Pictures = PLAIN,
    boxes: Sequence[Box | None] | None = None,
    seeds: Sequence[int] | None = None,
) -> Iterator[torch.Tensor]:
    """Bytes (B, 3, size, size) of the files, in order, for `normalize`; the last batch may be shorter.

    pictures, and of each file its box and seed: as in `load_pixels`. Broken files: as in `in_batches`.
    """
    wrong = [f"{name} = {n}" for name, n in (("size", size), ("batch", batch), ("threads", threads)) if n < 1]
    if wrong:
        raise InputError(f"Pictures can't be loaded with {', '.join(wrong)}; each must be at least 1.")

    def load(i: int) -> torch.Tensor:
        return load_pixels(paths[i], size, None, pictures, _at(boxes, i), _at(seeds, i))

    none = torch.empty(0, 3, size, size, dtype=torch.uint8)
    return (torch.stack(part) if part else none for part in in_batches(load, paths, batch, threads, broken))


def in_batches(
    load: Callable[[int], Loaded],
    paths: Sequence[str | Path],
    batch: int,
    threads: int = THREADS,
    broken: dict[str | Path, str] | None = None,
) -> Iterator[list[Loaded]]:
    """What `load` makes of each file, by its position, in order.

    Threads decode up to 256 pictures ahead while the consumer works. A broken file raises InputError naming it when
    its batch is due; with `broken` it is left out of its batch instead and its reason is noted there by path.
    """
    ahead = max(threads, min(batch, _AHEAD))
    pool = ThreadPoolExecutor(threads, thread_name_prefix="gmp-pictures")
    try:
        queue = deque(pool.submit(load, i) for i in range(min(ahead, len(paths))))
        for start in range(0, len(paths), batch):
            found = []
            for i in range(start, min(start + batch, len(paths))):
                try:
                    found.append(queue.popleft().result())
                except InputError as error:
                    if broken is None:
                        raise
                    broken[paths[i]] = str(error).removeprefix(f"{paths[i]}: ")
                if i + ahead < len(paths):
                    queue.append(pool.submit(load, i + ahead))
            yield found
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class PicturesAhead:
    """Pictures by position, decoded by threads before they are asked for.

    pictures, boxes: as in `load_batches`. seeds: of each picture that is asked for, how it varies this time; without
    them, and where one is None, there is the crop itself.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        size: int,
        pictures: Pictures = PLAIN,
        boxes: Sequence[Box | None] | None = None,
        threads: int = THREADS,
    ):
        self._paths, self._size, self._pictures, self._boxes = paths, size, pictures, boxes
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="gmp-pictures")
        self._queued: dict[tuple[int, int | None], Future] = {}

    def _decode(self, position: int, seed: int | None) -> Future:
        queued = self._queued.pop((position, seed), None)
        if queued is not None:
            return queued
        box = _at(self._boxes, position)
        return self._pool.submit(load_pixels, self._paths[position], self._size, None, self._pictures, box, seed)

    def ahead(self, positions: Sequence[int], seeds: Sequence[int | None] | None = None) -> None:
        """Starts decoding these, 256 at the most; what was queued before and is not among them is forgotten."""
        wanted = _with_seeds(positions, seeds)[:_AHEAD]
        self._queued = {key: self._decode(*key) for key in wanted}

    def __call__(self, positions: Sequence[int], seeds: Sequence[int | None] | None = None) -> torch.Tensor:
        """Bytes (B, 3, S, S), for `normalize`. Raises InputError naming a picture that does not decode."""
        decoding = [self._decode(*key) for key in _with_seeds(positions, seeds)]
        return torch.stack([future.result() for future in decoding])

    def close(self) -> None:
        """Ends the threads."""
        self._queued.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)


def _with_seeds(positions: Sequence[int], seeds: Sequence[int | None] | None) -> list[tuple[int, int | None]]:
    return list(zip(positions, [None] * len(positions) if seeds is None else seeds, strict=True))


def _at(values: Sequence[Loaded] | None, i: int) -> Loaded | None:
    return None if values is None else values[i]
