"""Preprocessing against transformers' PIL processor and a naive copy of torchvision's formulas."""

from __future__ import annotations

import dataclasses
import io
import os
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from gmp.config import Pictures
from gmp.data import images
from gmp.data.augment import augment
from gmp.data.crops import cropped
from gmp.data.images import (
    LARGEST,
    MEAN,
    STD,
    PicturesAhead,
    format_of,
    load_batches,
    load_picture,
    load_pixels,
    load_whole,
    normalize,
    preprocess,
    square,
    to_rgb,
)
from gmp.errors import InputError

# landscape, portrait, square, smaller than the target, one pixel off, every remainder of the crop's margin
SIZES = [
    (300, 200),
    (200, 300),
    (224, 224),
    (64, 64),
    (65, 64),
    (64, 65),
    (63, 64),
    (37, 50),
    (50, 21),
    (1, 1),
]
SIZES += [(64 + d, 64) for d in range(2, 10)] + [(64, 64 + d) for d in range(2, 10)] + [(640, 427), (5, 3), (999, 100)]


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    channels = {"RGB": 3, "L": 1, "RGBA": 4, "LA": 2}[mode]
    array = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(array[:, :, 0] if channels == 1 else array)


def naive(image: Image.Image, size: int) -> np.ndarray:
    """open_clip's evaluation transform: Resize(bicubic), CenterCrop, RGB, ToTensor, Normalize."""
    w, h = image.size
    if w <= h:
        new_w, new_h = size, int(size * h / w)
    else:
        new_w, new_h = int(size * w / h), size
    image = image.resize((new_w, new_h), resample=Image.BICUBIC)
    top = int(round((new_h - size) / 2.0))
    left = int(round((new_w - size) / 2.0))
    array = np.array(image.convert("RGB"))[top : top + size, left : left + size]
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    out = np.empty((3, size, size))
    for c in range(3):
        out[c] = (array[:, :, c] / 255 - mean[c]) / std[c]
    return out


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_matches_open_clip(shape, mode):
    image = picture(*shape, mode)
    ours = preprocess(image, 64)
    assert ours.shape == (3, 64, 64) and ours.dtype == torch.float32 and ours.is_contiguous()
    assert np.abs(ours.numpy() - naive(image, 64)).max() <= 1e-6


def margin(shape: tuple[int, int]) -> int:
    """Pixels that the centre crop to 64 takes off the long side."""
    return int(64 * max(shape) / min(shape)) - 64


@pytest.mark.parametrize("mode", ["RGB", "L"])
# transformers rounds half a pixel of margin down, torchvision to even: one pixel apart for 3, 7, 11, …
@pytest.mark.parametrize("shape", [s for s in SIZES if margin(s) % 4 != 3], ids=str)
def test_matches_transformers(shape, mode):
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    image = picture(*shape, mode)
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    assert (preprocess(image, 64) - theirs).abs().max() <= 1e-6


def test_matches_transformers_at_224():
    transformers = pytest.importorskip("transformers")
    image = picture(640, 480)
    theirs = transformers.CLIPImageProcessorPil()(image, return_tensors="pt")["pixel_values"][0]
    assert (preprocess(image, 224) - theirs).abs().max() <= 1e-6


def test_transparency_becomes_white():
    pixels = np.zeros((4, 4, 4), dtype=np.uint8)
    pixels[:2] = (255, 0, 0, 255)
    pixels[2:] = (0, 0, 255, 0)
    array = np.array(to_rgb(Image.fromarray(pixels)))
    assert (array[:2] == (255, 0, 0)).all() and (array[2:] == 255).all()
    half = to_rgb(Image.new("RGBA", (2, 2), (0, 0, 0, 51)))
    assert half.getpixel((0, 0)) == (204, 204, 204)
    assert to_rgb(Image.new("LA", (2, 2), (0, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_transparent_palette_and_colour_key(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putdata([0, 1])
    palette.save(tmp_path / "opaque.png")
    palette.save(tmp_path / "clear.png", transparency=1)
    opaque, clear = load_picture(tmp_path / "opaque.png"), load_picture(tmp_path / "clear.png")
    assert np.array(opaque).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert np.array(clear).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    Image.new("RGB", (2, 2), (1, 2, 3)).save(tmp_path / "key.png", transparency=(1, 2, 3))
    assert load_picture(tmp_path / "key.png").getpixel((0, 0)) == (255, 255, 255)


def test_palette_is_interpolated_as_colours():
    colours = picture(90, 70).quantize(16)
    assert torch.equal(preprocess(colours, 32), preprocess(colours.convert("RGB"), 32))


def test_sixteen_bit_grey_is_scaled(tmp_path):
    levels = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "grey.png")
    assert np.array(load_picture(tmp_path / "grey.png"))[0, :, 0].tolist() == [0, 1, 128, 255]
    wide = Image.fromarray(levels.astype(np.int32))
    assert wide.mode == "I" and np.array(to_rgb(wide))[0, :, 2].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("mode", ["1", "CMYK", "YCbCr", "HSV"])
def test_other_modes_become_rgb(mode):
    image = picture(8, 8).convert(mode)
    assert np.array_equal(np.array(to_rgb(image)), np.array(image.convert("RGB")))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_orientation_is_applied(tmp_path, suffix):
    upright = Image.new("RGB", (40, 20), "white")
    upright.paste("black", (0, 0, 20, 20))  # left half black
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees counter-clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / f"a.{suffix}", exif=exif)
    loaded = load_picture(tmp_path / f"a.{suffix}")
    assert loaded.size == (40, 20)
    assert np.abs(np.array(loaded).astype(int) - np.array(upright)).mean() < 3


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    """Large and small shapes, as photos have them; no two corners are alike."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (width, height))
    for cells in (3, 9, 40):
        layer = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        image = Image.blend(image, layer.resize((width, height), Image.Resampling.BICUBIC), 0.5)
    return image


def jpeg(image: Image.Image, **options) -> io.BytesIO:
    content = io.BytesIO()
    image.save(content, format="JPEG", **options)
    return content


def in_full(content: io.BytesIO, size: int) -> torch.Tensor:
    """Decoded at full scale, then resized: what openai/CLIP does."""
    with Image.open(content) as image:
        return square(ImageOps.exif_transpose(image), size)


SHAPES = [(63, 63), (127, 127), (300, 127), (64, 500)]  # the short side less than 4 × 32


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": 6}], ids=str)
def test_small_jpegs_are_the_same_to_the_bit_as_decoded_in_full(shape, mode, options):
    if "exif" in options:
        options = {"exif": turned(options["exif"])}
    content = jpeg(picture(*shape).convert(mode), **options)
    assert torch.equal(load_pixels(content, 32), in_full(content, 32))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP"])
def test_large_pictures_of_other_formats_are_the_same_to_the_bit_as_decoded_in_full(kind):
    content = io.BytesIO()
    picture(300, 200).save(content, format=kind)
    assert torch.equal(load_pixels(content, 8), in_full(content, 8))


@pytest.mark.parametrize(("side", "scale"), [(127, 1), (128, 2), (200, 2), (255, 2), (256, 4), (509, 4), (512, 8)])
def test_large_jpegs_are_decoded_as_for_a_thumbnail(side, scale, monkeypatch):
    content = jpeg(picture(side, side))
    with Image.open(content) as thumbnail:
        thumbnail.thumbnail((32, 32), Image.Resampling.BICUBIC, reducing_gap=2.0)
    expected = np.asarray(thumbnail).transpose(2, 0, 1)
    decoded = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda im, *a, **k: decoded.append(im.size) or resize(im, *a, **k))
    found = load_pixels(content, 32)
    assert decoded == [(-(-side // scale),) * 2] and side / scale >= 64 or scale == 1
    if scale > 1:  # at full scale, `thumbnail` itself would reduce by averages first
        assert np.array_equal(found.numpy(), expected)
    assert torch.equal(found, in_full(content, 32)) == (scale == 1)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# What undoes an orientation, so that the picture is upright again
UNDONE = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", UNDONE)
@pytest.mark.parametrize("shape", [(301, 210), (213, 422)], ids=str)
def test_large_jpegs_are_turned_as_exif_says(shape, orientation):
    upright = smooth(*shape)
    stored = upright if orientation == 1 else upright.transpose(UNDONE[orientation])
    content = jpeg(stored, quality=95, exif=turned(orientation))
    found = load_pixels(content, 32)
    assert not torch.equal(found, in_full(content, 32))  # it was drafted
    assert (found.int() - square(upright, 32).int()).abs().float().mean() < 2


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 2}, {"subsampling": 0}], ids=str)
@pytest.mark.parametrize("shape", [(403, 301), (1001, 260), (259, 1000)], ids=str)
def test_large_jpegs_differ_little_from_those_decoded_in_full(shape, mode, options):
    content = jpeg(smooth(*shape).convert(mode), quality=90, **options)
    found, expected = load_pixels(content, 32), in_full(content, 32)
    difference = (found.int() - expected.int()).abs()
    assert found.shape == (3, 32, 32) and 0 < difference.float().mean() < 1.5 and difference.max() < 20


def test_large_camera_jpeg_with_two_pictures_is_read():
    content = io.BytesIO()
    first = smooth(400, 300)
    first.save(content, format="MPO", save_all=True, append_images=[smooth(400, 300, seed=1)])
    assert (load_pixels(content, 32).int() - square(first, 32).int()).abs().float().mean() < 2


def test_bytes_are_normalised_exactly():
    levels = np.arange(256, dtype=np.uint8)
    expected = (levels[:, None].astype(np.float32) / np.float32(255) - MEAN) / STD  # (256, 3)
    pixels = torch.from_numpy(levels).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        found = normalize(pixels.to(device))
        assert found.device.type == device and found.dtype == torch.float32
        assert np.array_equal(found.cpu()[0].flatten(1).T.numpy(), expected)
    assert pixels.max() == 255  # they are the caller's still


@pytest.fixture
def files(tmp_path):
    paths = []
    for i in range(10):
        paths.append(tmp_path / f"{i}.png")
        picture(20 + i, 16, seed=i).save(paths[-1])
    return paths


@pytest.mark.parametrize(("batch", "threads"), [(1, 1), (3, 2), (10, 4), (64, 3)])
def test_batches_come_in_order(files, batch, threads):
    batches = list(load_batches(files, 16, batch, threads))
    assert [len(b) for b in batches] == [len(files[i : i + batch]) for i in range(0, 10, batch)]
    assert all(b.dtype == torch.uint8 for b in batches)
    assert torch.equal(normalize(torch.cat(batches)), torch.stack([preprocess(load_picture(f), 16) for f in files]))
    assert list(load_batches([], 16, batch, threads)) == []


def test_decoding_ahead_is_bounded_and_stops_with_the_consumer(files, monkeypatch):
    decoded = []
    load = images.load_pixels
    monkeypatch.setattr(images, "load_pixels", lambda path, *rest: decoded.append(path) or load(path, *rest))
    before = threading.active_count()
    batches = load_batches(files * 30, 16, 2, 2)
    next(batches)
    time.sleep(0.2)
    assert len(decoded) <= 4
    batches.close()
    assert threading.active_count() == before and len(decoded) <= 4


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty"), (b"<html>not a picture</html>", "known format"), (None, "no such file")],
    ids=["empty", "html", "missing"],
)
def test_broken_pictures_are_named(files, content, reason):
    files[4].unlink()
    if content is not None:
        files[4].write_bytes(content)
    with pytest.raises(InputError, match=rf"4\.png.*{reason}"):
        load_picture(files[4])
    batches = load_batches(files, 16, 4, 2)
    assert len(next(batches)) == 4
    with pytest.raises(InputError, match=r"4\.png"):
        next(batches)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_truncated_pictures_are_named(tmp_path, suffix):
    path = tmp_path / f"half.{suffix}"
    picture(64, 64).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match="half"):
        load_picture(path)
    for size in (64, 8):  # a JPEG is decoded in full, and at an eighth
        with pytest.raises(InputError, match="half"):
            load_pixels(path, size)


def test_an_open_picture_is_named_as_its_owner_says(tmp_path):
    content = io.BytesIO()
    picture(40, 30).save(content, format="JPEG")
    whole = content.getvalue()
    (tmp_path / "a.jpg").write_bytes(whole)
    assert torch.equal(load_pixels(io.BytesIO(whole), 8, "0001.jpg"), load_pixels(tmp_path / "a.jpg", 8))
    for bad, reason in ((b"", "empty"), (b"no picture", "known format"), (whole[:300], "cut short|can't be decoded")):
        with pytest.raises(InputError, match=f"^0001.jpg: .*{reason}"):
            load_pixels(io.BytesIO(bad), 8, "0001.jpg")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif"])
@pytest.mark.parametrize("lenient", [False, True], ids=["strict", "lenient"])
def test_a_file_that_is_cut_short_is_never_grey_whatever_the_process_says_of_such(
    tmp_path, monkeypatch, suffix, lenient
):
    """Extensions of ComfyUI set PIL's LOAD_TRUNCATED_IMAGES for all of the process."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    path = tmp_path / f"a.{suffix}"
    picture(90, 80).save(path)
    whole = path.read_bytes()
    square(load_picture(path), 8)  # a whole one is read
    for share in (0.3, 0.6, 0.95):
        path.write_bytes(whole[: int(share * len(whole))])
        for load in (load_picture, lambda path: load_pixels(path, 8), lambda path: load_pixels(path, 64)):
            with pytest.raises(InputError, match=r"a\.\w+: the file is cut short") as found:
                load(path)
        length = int(share * len(whole))
        told = f"{len(whole) - length:,} of {len(whole):,} bytes are missing"
        assert (told if suffix in ("webp", "bmp") else f"it ends after {length:,} bytes") in str(found.value)


def test_huge_and_narrow_pictures_are_refused(tmp_path, monkeypatch):
    Image.new("RGB", (1000, 4)).save(tmp_path / "strip.png")
    with pytest.raises(InputError, match="strip"):
        load_picture(tmp_path / "strip.png")
    Image.new("RGB", (100, 100)).save(tmp_path / "large.png")
    monkeypatch.setattr(images, "LARGEST", 10_000)
    assert load_picture(tmp_path / "large.png").size == (100, 100)
    monkeypatch.setattr(images, "LARGEST", 9_999)
    with pytest.raises(InputError, match=r"large\.png: 100 x 100 pixels; more than 9,999"):
        load_picture(tmp_path / "large.png")


def test_other_formats_are_never_opened(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "script.png", format="EPS")
    with pytest.raises(InputError, match="known format"):
        load_picture(tmp_path / "script.png")


def test_webp_opens_in_a_fresh_process(tmp_path):
    # PIL registers WebP late; nothing else in the process may have asked for it yet
    picture(8, 8).save(tmp_path / "a.webp")
    code = "import sys; from gmp.data.images import load_picture; load_picture(sys.argv[1])"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.webp"], check=True, env=environment, timeout=60)


def test_camera_jpeg_with_two_pictures_is_read(tmp_path):
    picture(16, 16).save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[picture(16, 16, seed=1)])
    assert load_picture(tmp_path / "phone.jpg").size == (16, 16)


@pytest.mark.parametrize("settings", [(0, 1, 1), (8, 0, 1), (8, 1, 0)])
def test_wrong_settings(files, settings):
    with pytest.raises(InputError, match="at least 1"):
        load_batches(files, *settings)


def test_pictures_ahead_gives_what_was_asked_for_and_ends_its_threads(tmp_path):
    paths = []
    for i in range(5):
        paths.append(tmp_path / f"{i}.png")
        Image.new("RGB", (8, 8), (50 * i, 0, 0)).save(paths[-1])
    before = threading.active_count()
    pictures = images.PicturesAhead(paths, 8, threads=2)
    pictures.ahead([3, 1])
    (expected,) = load_batches([paths[i] for i in (1, 4, 3)], 8, 3)
    assert torch.equal(pictures([1, 4, 3]), expected) and expected.dtype == torch.uint8
    pictures.ahead([0])
    pictures.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


# ---- what stranger files hold ---------------------------------------------------------------------------------------


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, colours: int, rows: bytes, *more: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    chunks = (chunk(b"IHDR", header), *more, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def bombs() -> dict[str, bytes]:
    """Files of a few bytes whose headers tell of billions of pixels."""
    jpg = jpeg(picture(8, 8)).getvalue()
    frame = jpg.index(b"\xff\xc0") + 5
    gif, bmp = io.BytesIO(), io.BytesIO()
    picture(8, 8).convert("P").save(gif, format="GIF")
    picture(8, 8).save(bmp, format="BMP")
    gif, bmp = gif.getvalue(), bmp.getvalue()
    return {
        "bomb.png": png(60_000, 60_000, 8, 2, b""),
        "bomb.jpg": jpg[:frame] + struct.pack(">HH", 65_000, 65_000) + jpg[frame + 4 :],
        "bomb.gif": gif[:6] + struct.pack("<HH", 65_000, 65_000) + gif[10:],
        "bomb.bmp": bmp[:18] + struct.pack("<ii", 65_000, 65_000) + bmp[26:],
    }


@pytest.mark.parametrize("name", bombs())
@pytest.mark.parametrize("limit", [None, 1000, 1 << 40], ids=str)
def test_decompression_bombs_are_refused_by_their_headers_whatever_the_process_allows(
    tmp_path, monkeypatch, name, limit
):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)  # nothing is decoded
    (tmp_path / name).write_bytes(bombs()[name])
    for load in (load_picture, lambda path: load_pixels(path, 8), lambda path: load_whole(path, 8)):
        with pytest.raises(InputError, match=rf"{name}: 6\d,?000 x 6\d,?000 pixels; more than {LARGEST:,}"):
            load(tmp_path / name)


@pytest.mark.filterwarnings("error")
def test_large_pictures_are_read_where_the_process_allows_small_ones_only(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for suffix in ("png", "jpg", "bmp"):  # PIL looks into WebP and GIF with a limit of its own
        picture(60, 50).save(tmp_path / f"a.{suffix}")
        assert load_picture(tmp_path / f"a.{suffix}").size == (60, 50)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_a_bomb_of_text_in_a_png_is_refused(tmp_path):
    text = b"comment\0\0" + zlib.compress(b"a" * 100_000_000)
    (tmp_path / "text.png").write_bytes(png(1, 1, 8, 2, b"\0\1\2\3", chunk(b"zTXt", text)))
    assert (tmp_path / "text.png").stat().st_size < 200_000
    with pytest.raises(InputError, match=r"text\.png: can't be decoded .*too large"):
        load_picture(tmp_path / "text.png")


def test_a_png_with_a_long_workflow_in_it_is_read(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 3_000_000)
    picture(8, 8).save(tmp_path / "a.png", pnginfo=info)
    assert load_picture(tmp_path / "a.png").tobytes() == picture(8, 8).tobytes()


@pytest.mark.parametrize(("real", "suffix"), [("PNG", "jpg"), ("JPEG", "png"), ("WEBP", "bmp"), ("GIF", "png")])
def test_a_wrong_suffix_does_not_matter(tmp_path, real, suffix):
    flat = Image.new("RGB", (20, 10), (200, 30, 40))
    flat.save(tmp_path / f"a.{suffix}", format=real)
    found = np.asarray(load_picture(tmp_path / f"a.{suffix}")).astype(int)
    assert found.shape == (10, 20, 3) and np.abs(found - (200, 30, 40)).max() <= 3
    assert format_of(tmp_path / f"a.{suffix}").upper() == real


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"II*\0", "a TIFF"),
        (b"\0\0\0\x20ftypavif", "an AVIF"),
        (b"\0\0\0\x18ftypheic", "an HEIC"),
        (b"\0\0\0\x18ftypisom", "a video"),
        (b"8BPS\0\1", "a Photoshop file"),
        (b"<svg xmlns", "HTML, SVG or other text"),
        (b"\xff\x0a\xfa\x1f", "a JPEG XL"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_things_are_told_by_their_first_bytes(tmp_path, head, kind):
    (tmp_path / "a.png").write_bytes(head + bytes(40))
    with pytest.raises(InputError, match=rf"a\.png: this is {kind}, not a picture of a known format \(PNG, JPEG"):
        load_picture(tmp_path / "a.png")
    with pytest.raises(InputError, match="this is"):
        format_of(tmp_path / "a.png")


# ---- modes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", UNDONE)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_all_eight_orientations_are_undone(tmp_path, orientation, suffix):
    upright = smooth(300, 200)
    stored = upright if orientation == 1 else upright.transpose(UNDONE[orientation])
    stored.save(tmp_path / f"a.{suffix}", exif=turned(orientation), quality=95)
    found = load_picture(tmp_path / f"a.{suffix}")
    assert found.size == upright.size
    assert np.abs(np.asarray(found).astype(int) - np.asarray(upright)).mean() < 4
    _, shape = load_whole(tmp_path / f"a.{suffix}", 8)
    assert shape == (300, 200)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b""], ids=str)
def test_damaged_exif_costs_the_orientation_only(tmp_path, exif):
    content = jpeg(smooth(60, 40)).getvalue()
    marker = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    (tmp_path / "a.jpg").write_bytes(content[:2] + marker + content[2:])
    (tmp_path / "b.jpg").write_bytes(content)
    assert load_picture(tmp_path / "a.jpg").tobytes() == load_picture(tmp_path / "b.jpg").tobytes()


def test_an_orientation_that_there_is_not_is_upright(tmp_path):
    smooth(60, 40).save(tmp_path / "a.jpg", exif=turned(9))
    assert load_picture(tmp_path / "a.jpg").size == (60, 40)


def test_cmyk_of_print_shops_has_its_colours(tmp_path):
    """Adobe's programs store CMYK inverted, and say so; PIL writes it like that too."""
    image = smooth(60, 40)
    image.convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    assert b"Adobe" in (tmp_path / "a.jpg").read_bytes()
    found = np.asarray(load_picture(tmp_path / "a.jpg")).astype(int)
    assert np.abs(found - np.asarray(image)).mean() < 3


def test_ycck_is_cmyk_whose_ink_is_stored_as_luma_and_chroma(tmp_path):
    image = smooth(64, 48)
    luma = ImageOps.invert(image).convert("YCbCr")  # of cyan, magenta and yellow as if they were red, green and blue
    # PIL inverts what it writes as CMYK; with Adobe's mark for YCCK in place of CMYK, this is luma and chroma
    inverted = [band.point(lambda value: 255 - value) for band in luma.split()]
    content = bytearray(jpeg(Image.merge("CMYK", (*inverted, Image.new("L", (64, 48), 0))), quality=100).getvalue())
    mark = content.index(b"Adobe") + 11
    assert content[mark] == 0
    content[mark] = 2
    (tmp_path / "a.jpg").write_bytes(content)
    found = np.asarray(load_picture(tmp_path / "a.jpg")).astype(int)
    assert np.abs(found - np.asarray(image)).mean() < 3


def test_sixteen_bit_colours_are_those_of_their_upper_half(tmp_path):
    levels = np.random.default_rng(0).integers(0, 65536, (6, 5, 3))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    (tmp_path / "a.png").write_bytes(png(5, 6, 16, 2, rows))
    found = np.asarray(load_picture(tmp_path / "a.png")).astype(int)
    assert np.abs(found - levels / 257).max() <= 1


def test_sixteen_bit_grey_with_a_clear_level_is_white_there(tmp_path):
    levels = np.array([[0, 257, 128 * 257, 65535, 513]])
    rows = b"\0" + levels.astype(">u2").tobytes()
    clear = chunk(b"tRNS", struct.pack(">H", 257))
    (tmp_path / "a.png").write_bytes(png(5, 1, 16, 0, rows, clear))
    assert np.asarray(load_picture(tmp_path / "a.png"))[0, :, 1].tolist() == [0, 255, 128, 255, 2]


def test_sixteen_bit_grey_with_alpha_lies_on_white(tmp_path):
    values = np.array([[[0, 65535], [0, 0], [65535, 65535], [0, 32896]]])
    (tmp_path / "a.png").write_bytes(png(4, 1, 16, 4, b"\0" + values.astype(">u2").tobytes()))
    found = np.asarray(load_picture(tmp_path / "a.png"))[0, :, 0].astype(int)
    assert found[:3].tolist() == [0, 255, 255] and abs(found[3] - 127) <= 1


def test_a_palette_whose_colours_are_partly_clear_lies_on_white(tmp_path):
    palette = Image.new("P", (4, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50, 0, 0, 0])
    palette.putdata([0, 1, 2, 0])
    palette.save(tmp_path / "a.png", transparency=bytes([255, 0, 51]))
    found = np.asarray(load_picture(tmp_path / "a.png"))[0]
    assert found.tolist() == [[10, 20, 30], [255, 255, 255], [204, 204, 204], [10, 20, 30]]


def test_of_animations_the_first_frame_is_taken(tmp_path):
    frames = [Image.new("RGB", (24, 16), colour) for colour in ("red", "lime", "blue")]
    for suffix, options in (("gif", {}), ("webp", {"lossless": True}), ("png", {})):
        path = tmp_path / f"a.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, **options)
        with Image.open(path) as image:
            assert image.n_frames == 3
        assert load_picture(path).getcolors() == [(24 * 16, (255, 0, 0))]
        assert torch.equal(load_pixels(path, 8), square(frames[0], 8))


def test_a_first_frame_that_fills_a_part_lies_on_white(tmp_path):
    first = Image.new("P", (4, 4), 1)
    first.putpalette([0, 0, 0, 255, 0, 0])
    first.paste(0, (0, 0, 2, 4))
    first.save(tmp_path / "a.gif", transparency=0)
    found = np.asarray(load_picture(tmp_path / "a.gif"))
    assert (found[:, :2] == 255).all() and (found[:, 2:] == (255, 0, 0)).all()


# ---- other crops, and views -----------------------------------------------------------------------------------------

VARIED = Pictures(scale=0.5, flip=0.5, jitter=(0.2, 0.2, 0.1, 0.0), jitter_chance=0.7, grey=0.2)


@pytest.mark.parametrize("crop", ["centre", "letterbox", "salient"])
def test_pixels_of_a_file_are_those_of_its_picture(tmp_path, crop):
    image = picture(90, 40)
    image.save(tmp_path / "a.png")
    pictures, box = Pictures(crop), (10, 0, 50, 40) if crop == "salient" else None
    at = 0.2 if crop == "salient" else 0.5
    expected = cropped(image, 16, crop, at)
    found = load_pixels(tmp_path / "a.png", 16, None, pictures, box)
    assert np.array_equal(found.numpy(), np.asarray(expected).transpose(2, 0, 1))
    for seed in range(4):
        view = load_pixels(tmp_path / "a.png", 16, None, dataclasses.replace(VARIED, crop=crop), box, seed)
        assert torch.equal(view, augment(image, 16, dataclasses.replace(VARIED, crop=crop), seed, at))


@pytest.mark.parametrize("orientation", [1, 6, 7])
@pytest.mark.parametrize("crop", ["letterbox", "salient"])
def test_large_jpegs_differ_little_in_other_crops_too(orientation, crop):
    upright = smooth(640, 400)
    stored = upright if orientation == 1 else upright.transpose(UNDONE[orientation])
    content = jpeg(stored, quality=95, exif=turned(orientation))
    box = (60, 0, 460, 400) if crop == "salient" else None
    found = load_pixels(content, 32, "a.jpg", Pictures(crop), box)
    expected = np.asarray(cropped(upright, 32, crop, 0.25)).transpose(2, 0, 1).astype(int)
    difference = np.abs(found.numpy() - expected)
    assert 0 < difference.mean() < 2 and difference.max() < 40


def test_parts_of_large_jpegs_are_decoded_as_large_as_they_need(monkeypatch):
    content = jpeg(smooth(1024, 1024), quality=95)
    decoded, crop = [], Image.Image.crop
    monkeypatch.setattr(Image.Image, "crop", lambda im, box: decoded.append((im.width, box)) or crop(im, box))
    sides = []
    for seed in range(30):
        decoded.clear()
        load_pixels(content, 32, "a.jpg", Pictures(scale=0.1), None, seed)
        width, box = decoded[0]
        assert width < 1024
        sides.append(min(box[2] - box[0], box[3] - box[1]))
    assert min(sides) >= 64  # twice the size


def test_batches_have_each_its_box_and_seed(tmp_path):
    paths = []
    for i in range(5):
        paths.append(tmp_path / f"{i}.png")
        picture(40 + i, 20, seed=i).save(paths[-1])
    boxes, seeds = [(i, 0, i + 20, 20) for i in range(5)], [7, 8, 9, 7, 11]
    pictures = Pictures("salient", scale=0.6, flip=0.5)
    expected = [load_pixels(p, 8, None, pictures, b, s) for p, b, s in zip(paths, boxes, seeds, strict=True)]
    found = load_batches(paths, 8, 2, 2, None, pictures, boxes, seeds)
    assert torch.equal(torch.cat(list(found)), torch.stack(expected))
    plain = torch.cat(list(load_batches(paths, 8, 2, 2, pictures=pictures, boxes=boxes)))
    assert torch.equal(
        plain, torch.stack([load_pixels(p, 8, None, pictures, b) for p, b in zip(paths, boxes, strict=True)])
    )


def test_pictures_ahead_vary_by_their_seeds(tmp_path):
    paths = []
    for i in range(4):
        paths.append(tmp_path / f"{i}.png")
        picture(40, 20, seed=i).save(paths[-1])
    boxes = [(i, 0, i + 20, 20) for i in range(4)]
    pictures = PicturesAhead(paths, 8, Pictures("salient", flip=0.5, grey=0.5), boxes, threads=2)
    expected = {
        (i, seed): load_pixels(paths[i], 8, None, Pictures("salient", flip=0.5, grey=0.5), boxes[i], seed)
        for i in range(4)
        for seed in (None, 1, 2, 3)
    }
    pictures.ahead([3, 1], [1, None])
    asked = [([1, 3, 3], [2, 1, 3]), ([0, 1], None), ([2, 2], [None, 2])]
    for positions, seeds in asked:
        found = pictures(positions, seeds)
        keys = zip(positions, seeds or [None] * len(positions), strict=True)
        assert torch.equal(found, torch.stack([expected[key] for key in keys]))
    pictures.close()


def test_pictures_that_were_decoded_ahead_are_those_that_are_given(tmp_path, monkeypatch):
    picture(40, 20).save(tmp_path / "a.png")
    loaded = []
    load = images.load_pixels
    monkeypatch.setattr(images, "load_pixels", lambda *given: loaded.append(given[-1]) or load(*given))
    pictures = PicturesAhead([tmp_path / "a.png"], 8, VARIED, threads=1)
    pictures.ahead([0, 0], [5, 6])
    pictures([0, 0], [6, 5])
    assert sorted(loaded) == [5, 6]
    pictures([0], [5])
    assert sorted(loaded) == [5, 5, 6]
    pictures.close()
