"""CLIP's picture preprocessing: what openai/CLIP and open_clip do, with the conversion to RGB done first.

Turn as EXIF says -> RGB, transparency on white -> shortest side to `size`, PIL bicubic -> centre crop -> 0..1
-> OpenAI's mean and deviation. openai/CLIP converts to RGB after resizing, which resizes palette pictures
without interpolation and drops the alpha channel; for RGB and grey pictures the result is the same, bit for
bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import BmpImagePlugin, Image, ImageOps, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from ..errors import InputError

PREPROCESSING = "exif, rgb on white, pil bicubic shortest side, centre crop, openai mean/std; version 1"
"""Names the procedure. Part of the keys of every cache of picture features: change it when pixels change."""

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)

# Only these decoders ever see a file; the pictures of phones with two images in one (MPO) are opened as JPEG.
# Importing a plugin registers it: with `formats` given, PIL doesn't look for further ones by itself.
_PLUGINS = (PngImagePlugin, JpegImagePlugin, WebPImagePlugin, BmpImagePlugin)
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_NARROWEST = 200  # long side / short side; resizing a strip blows its long side up to `size` times that
_AHEAD = 256  # pictures decoded ahead of the consumer at most, 0.6 MB each at 224 pixels


def load_picture(path: str | Path) -> Image.Image:
    """Decode one file fully, turn it upright, make it RGB. Raises InputError: the file and the reason."""
    try:
        with Image.open(path, formats=_FORMATS) as image:
            image.load()
            image = to_rgb(ImageOps.exif_transpose(image))
    except MemoryError:
        raise
    except Exception as error:  # broken files make PIL raise OSError, SyntaxError, ValueError, struct.error and more
        raise InputError(f"{path}: {_reason(path, error)}") from error
    if max(image.size) > _NARROWEST * min(image.size):
        raise InputError(f"{path}: {image.width} x {image.height} pixels is a strip; a centre crop would show nothing.")
    return image


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


def preprocess(image: Image.Image, size: int) -> torch.Tensor:
    """A picture -> normalised pixels (3, size, size) float32."""
    image = to_rgb(image)
    width, height = image.size
    short = min(width, height)
    # torchvision's Resize: the short side exactly, the long side rounded down
    width, height = (size, int(size * height / short)) if width == short else (int(size * width / short), size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    # torchvision's CenterCrop: a half pixel goes to the even side
    left, top = int(round((width - size) / 2.0)), int(round((height - size) / 2.0))
    image = image.crop((left, top, left + size, top + size))
    pixels = np.asarray(image, dtype=np.float32) / np.float32(255)  # (S, S, 3)
    return torch.from_numpy(np.ascontiguousarray(((pixels - MEAN) / STD).transpose(2, 0, 1)))


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """Bytes (B, 3, S, S) of pictures that have their size already -> float32, OpenAI's mean and deviation."""
    mean, std = (torch.from_numpy(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


def load_batches(
    paths: Sequence[str | Path],
    size: int,
    batch: int,
    threads: int = 4,
    broken: dict[str | Path, str] | None = None,
) -> Iterator[torch.Tensor]:
    """Pixels (B, 3, size, size) float32 of the files, in order; the last batch may be shorter.

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
        queue = deque(pool.submit(_load, path, size) for path in paths[:ahead])
        upcoming = ahead
        for start in range(0, len(paths), batch):
            chunk = paths[start : start + batch]
            pixels = torch.empty(len(chunk), 3, size, size)
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
                    queue.append(pool.submit(_load, paths[upcoming], size))
                    upcoming += 1
            yield pixels[:filled]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class PicturesAhead:
    """Pictures by position, decoded by threads before they are asked for."""

    def __init__(self, paths: Sequence[str | Path], size: int, threads: int = 4):
        self._paths, self._size = paths, size
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="gmp-pictures")
        self._queued: dict[int, Future] = {}

    def _decode(self, position: int) -> Future:
        return self._queued.pop(position, None) or self._pool.submit(_load, self._paths[position], self._size)

    def ahead(self, positions: Sequence[int]) -> None:
        """Starts decoding these, 256 at the most; what was queued before and is not among them is forgotten."""
        self._queued = {i: self._decode(i) for i in positions[:_AHEAD]}

    def __call__(self, positions: Sequence[int]) -> torch.Tensor:
        """Pixels (B, 3, S, S) float32. Raises InputError naming a picture that does not decode."""
        return torch.stack([future.result() for future in [self._decode(i) for i in positions]])

    def close(self) -> None:
        """Ends the threads."""
        self._queued.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)


def _load(path: str | Path, size: int) -> torch.Tensor:
    return preprocess(load_picture(path), size)


def _reason(path: str | Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file."
    if isinstance(error, Image.UnidentifiedImageError):
        empty = Path(path).stat().st_size == 0
        return "the file is empty." if empty else f"not a picture of a known format ({', '.join(_FORMATS)})."
    return f"can't be decoded ({type(error).__name__}: {error})."
