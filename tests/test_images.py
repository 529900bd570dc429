"""Preprocessing against transformers' PIL processor and a naive copy of torchvision's formulas."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from gmp.data import images
from gmp.data.images import MEAN, STD, load_batches, load_picture, load_pixels, normalize, preprocess, square, to_rgb
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
    monkeypatch.setattr(images, "load_pixels", lambda path, size: decoded.append(path) or load(path, size))
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
    for bad, reason in ((b"", "empty"), (b"no picture", "known format"), (whole[:300], "can't be decoded")):
        with pytest.raises(InputError, match=f"^0001.jpg: .*{reason}"):
            load_pixels(io.BytesIO(bad), 8, "0001.jpg")


def test_huge_and_narrow_pictures_are_refused(tmp_path, monkeypatch):
    Image.new("RGB", (1000, 4)).save(tmp_path / "strip.png")
    with pytest.raises(InputError, match="strip"):
        load_picture(tmp_path / "strip.png")
    Image.new("RGB", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"bomb\.png"):
        load_picture(tmp_path / "bomb.png")


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
