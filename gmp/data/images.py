"""CLIP's picture preprocessing: what openai/CLIP and open_clip do, with the conversion to RGB done first.

Turn as EXIF says -> RGB, transparency on white -> shortest side to `size`, PIL bicubic -> centre crop -> 0..1
-> OpenAI's mean and deviation. openai/CLIP converts to RGB after resizing, which resizes palette pictures
without interpolation and drops the alpha channel; for RGB and grey pictures the result is the same, bit for
bit, but for large JPEGs: see `load_pixels`.

Pictures are decoded into bytes by threads, travel as bytes, and are normalised where they are used.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import BmpImagePlugin, Image, ImageOps, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from ..errors import InputError

PREPROCESSING = "exif, rgb on white, jpeg draft, pil bicubic shortest side, centre crop, openai mean/std; version 2"
"""Names the procedure. Part of the keys of every cache of picture features: change it when pixels change."""

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
THREADS = max(2, min(16, os.cpu_count() or 2))  # PIL decodes and resizes without Python's lock

# Only these decoders ever see a file; the pictures of phones with two images in one (MPO) are opened as JPEG.
# Importing a plugin registers it: with `formats` given, PIL doesn't look for further ones by itself.
_PLUGINS = (PngImagePlugin, JpegImagePlugin, WebPImagePlugin, BmpImagePlugin)
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_NARROWEST = 200  # long side / short side; resizing a strip blows its long side up to `size` times that
_AHEAD = 256  # pictures decoded ahead of the consumer at most, 0.15 MB each at 224 pixels
_GAP = 2  # a JPEG is decoded at no less than this times the size it is resized to


# ---- one picture ----------------------------------------------------------------------------------------------------


def load_picture(path: str | Path) -> Image.Image:
    """Decode one file fully, turn it upright, make it RGB. Raises InputError: the file and the reason."""
    with _open(path, path) as image:
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))


def load_pixels(file: str | Path | BinaryIO, size: int, name: str | Path | None = None) -> torch.Tensor:
    """A picture file, or its open content, as bytes (3, size, size). Raises InputError: its name and the reason.

    The pixels of `square(load_picture(file), size)`, in less time: a JPEG whose short side is 4 × `size` or longer is
    decoded at 1/2, 1/4 or 1/8, the smallest that leaves 2 × `size` or more, as PIL's `thumbnail` does it. Against full
    decoding, photos then differ by 0.4 to 1 of 255 levels in the mean and 17 at the most, and their features in a small
    trained vision tower by 0.0003 in cosine at the most. All other pictures are the same to the bit.
    """
    with _open(file, file if name is None else name) as image:
        shape = image.size
        box = image.draft(None, (_GAP * size, _GAP * size))  # None for anything but a JPEG
        image.load()
        if image.size == shape:
            ImageOps.exif_transpose(image, in_place=True)
            return square(image, size)
        # the box is where the picture ends, within the last pixel; it is known only until the picture is turned
        image = to_rgb(image).resize(_resized(shape, size), Image.Resampling.BICUBIC, box=box[1])
        return _middle(ImageOps.exif_transpose(image), size)


@contextlib.contextmanager
def _open(file: str | Path | BinaryIO, name: str | Path) -> Iterator[Image.Image]:
    try:
        with Image.open(file, formats=_FORMATS) as image:
            if max(image.size) > _NARROWEST * min(image.size):
                raise InputError(
                    f"{name}: {image.width} x {image.height} pixels is a strip; a centre crop would show nothing."
                )
            yield image
    except (MemoryError, InputError):
        raise
    except Exception as error:  # broken files make PIL raise OSError, SyntaxError, ValueError, struct.error and more
        raise InputError(f"{name}: {_reason(file, error)}") from error


def _reason(file: str | Path | BinaryIO, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file."
    if isinstance(error, Image.UnidentifiedImageError):
        length = file.seek(0, io.SEEK_END) if hasattr(file, "seek") else Path(file).stat().st_size
        return f"not a picture of a known format ({', '.join(_FORMATS)})." if length else "the file is empty."
    return f"can't be decoded ({type(error).__name__}: {error})."


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode -> RGB. Transparent pixels become white; 16-bit grey is scaled to 8 bits, not clipped."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        levels = (np.asarray(image).astype(np.int64).clip(0, 65535) + 128) // 257  # (H, W) 0..65535 -> 0..255
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def square(image: Image.Image, size: int) -> torch.Tensor:
    """The middle of a picture, its shortest side made `size`: bytes (3, size, size)."""
    image = to_rgb(image)
    return _middle(image.resize(_resized(image.size, size), Image.Resampling.BICUBIC), size)


def _resized(shape: tuple[int, int], size: int) -> tuple[int, int]:
    """Width and height as of torchvision's Resize: the short side exactly, the long side rounded down."""
    width, height = shape
    return (size, int(size * height / width)) if width <= height else (int(size * width / height), size)


def _middle(image: Image.Image, size: int) -> torch.Tensor:
    """torchvision's CenterCrop: a half pixel goes to the even side. Bytes (3, size, size)"""
    left, top = int(round((image.width - size) / 2.0)), int(round((image.height - size) / 2.0))
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))  # (S, S, 3)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


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
) -> Iterator[torch.Tensor]:
    """Bytes (B, 3, size, size) of the files, in order, for `normalize`; the last batch may be shorter.

    Threads decode up to 256 pictures ahead while the consumer works. A broken file raises InputError naming it when
    its batch is due; with `broken` it is left out of its batch instead and its reason is noted there by path.
    """
    wrong = [f"{name} = {n}" for name, n in (("size", size), ("batch", batch), ("threads", threads)) if n < 1]
    if wrong:
        raise InputError(f"Pictures can't be loaded with {', '.join(wrong)}; each must be at least 1.")
    return _batches(paths, size, batch, threads, broken)


def _batches(
    paths: Sequence[str | Path], size: int, batch: int, threads: int, broken: dict[str | Path, str] | None
) -> Iterator[torch.Tensor]:
    ahead = max(threads, min(batch, _AHEAD))
    pool = ThreadPoolExecutor(threads, thread_name_prefix="gmp-pictures")
    try:
        queue = deque(pool.submit(load_pixels, path, size) for path in paths[:ahead])
        upcoming = ahead
        for start in range(0, len(paths), batch):
            chunk = paths[start : start + batch]
            pixels = torch.empty(len(chunk), 3, size, size, dtype=torch.uint8)
            filled = 0
            for path in chunk:
                try:
                    pixels[filled] = queue.popleft().result()
                    filled += 1
                except InputError as error:
                    if broken is None:
                        raise
                    broken[path] = str(error).removeprefix(f"{path}: ")
                if upcoming < len(paths):
                    queue.append(pool.submit(load_pixels, paths[upcoming], size))
                    upcoming += 1
            yield pixels[:filled]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class PicturesAhead:
    """Pictures by position, decoded by threads before they are asked for."""

    def __init__(self, paths: Sequence[str | Path], size: int, threads: int = THREADS):
        self._paths, self._size = paths, size
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="gmp-pictures")
        self._queued: dict[int, Future] = {}

    def _decode(self, position: int) -> Future:
        return self._queued.pop(position, None) or self._pool.submit(load_pixels, self._paths[position], self._size)

    def ahead(self, positions: Sequence[int]) -> None:
        """Starts decoding these, 256 at the most; what was queued before and is not among them is forgotten."""
        self._queued = {i: self._decode(i) for i in positions[:_AHEAD]}

    def __call__(self, positions: Sequence[int]) -> torch.Tensor:
        """Bytes (B, 3, S, S), for `normalize`. Raises InputError naming a picture that does not decode."""
        return torch.stack([future.result() for future in [self._decode(i) for i in positions]])

    def close(self) -> None:
        """Ends the threads."""
        self._queued.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)
