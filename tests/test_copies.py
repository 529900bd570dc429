"""Prepared copies of pictures: what they show, what goes along, and what is never written."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from PIL import Image, ImageCms

from gmp.cli import main
from gmp.config import Pictures
from gmp.data import copies
from gmp.data.augment import flipped, random_box, seed_of, varied
from gmp.data.captions import read_index
from gmp.data.copies import MARK, write_augmented, write_crops
from gmp.data.crops import centre_box, letterboxed
from gmp.data.images import format_of, load_picture
from gmp.data.mirror import mirror
from gmp.data.sampler import seeded
from gmp.errors import InputError
from gmp.events import finish
from gmp.features import content_keys, salient_boxes
from gmp.world.models import ASSETS, ORIGINAL, load_original

CAPTION = "a dog on the left of a red ball\nleft hand\n"
FLIP = Pictures(flip=0.5)


@pytest.fixture
def source(tmp_path):
    """Pictures of every format in sub-folders, some with captions."""
    folder = tmp_path / "pictures"
    (folder / "sub" / "deep").mkdir(parents=True)
    names = ["a.png", "sub/b.jpg", "sub/deep/c.webp", "sub/d.bmp", "e.gif", "sub/f.jpeg"]
    for i, name in enumerate(names):
        noise = np.random.default_rng(i).integers(0, 256, (5, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((80 + i, 50), Image.Resampling.BICUBIC).save(folder / name, quality=95)
    (folder / "a.txt").write_text(CAPTION)
    (folder / "sub" / "b.caption").write_text(CAPTION)
    (folder / "notes.txt").write_text("of no picture")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


def contents(folder) -> dict[str, tuple[bytes, int]]:
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def array(path):
    return np.asarray(load_picture(path)).astype(int)


NAMES = ["a.png", "e.gif", "sub/b.jpg", "sub/d.bmp", "sub/deep/c.webp", "sub/f.jpeg"]


@pytest.mark.parametrize("crop", ["centre", "letterbox"])
def test_crops_have_names_formats_and_captions_of_their_pictures(source, tmp_path, crop):
    before = contents(source)
    found = finish(write_crops(source, tmp_path / "out", crop))
    assert (found.written, found.kept, found.broken, found.unmirrored) == (6, 0, (), 0)
    assert contents(source) == before
    assert sorted(contents(tmp_path / "out")) == sorted([MARK, "a.txt", "sub/b.caption", *NAMES])
    for name in NAMES:
        image = load_picture(source / name)
        expected = image.crop(centre_box(*image.size)) if crop == "centre" else letterboxed(image)
        made = tmp_path / "out" / name
        assert format_of(made) == format_of(source / name)
        assert load_picture(made).size == expected.size
        difference = np.abs(array(made) - np.asarray(expected)).mean()
        assert difference == 0 if name.endswith(("png", "bmp")) else difference < 5
    assert (tmp_path / "out" / "a.txt").read_text() == CAPTION


def test_jpegs_are_written_at_95_without_losing_colour(source, tmp_path):
    finish(write_crops(source, tmp_path / "out", "centre"))
    with Image.open(tmp_path / "out" / "sub" / "b.jpg") as found:
        reference = tmp_path / "reference.jpg"
        Image.new("RGB", (8, 8)).save(reference, quality=95, subsampling=0)
        with Image.open(reference) as expected:
            assert found.quantization == expected.quantization
            assert [layer[1:3] for layer in found.layer] == [layer[1:3] for layer in expected.layer]


def test_salient_crops_are_the_squares_that_the_tower_attends_to(source, tmp_path):
    tower = load_original().visual
    keys = finish(content_keys(source, NAMES, tmp_path / "cache"))
    boxes = finish(salient_boxes(tower, source, NAMES, keys, tmp_path / "cache"))
    finish(write_crops(source, tmp_path / "out", "salient", tower=tower, cache=tmp_path / "cache"))
    assert any(box != centre_box(*load_picture(source / name).size) for name, box in zip(NAMES, boxes, strict=True))
    for name, box in zip(NAMES[:1], boxes, strict=False):
        assert load_picture(tmp_path / "out" / name).tobytes() == load_picture(source / name).crop(box).tobytes()


def test_copies_are_upright_and_keep_an_rgb_profile_and_nothing_else(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 40, 3), dtype=np.uint8))
    image.save(folder / "a.jpg", exif=exif, icc_profile=profile, quality=100)
    finish(write_crops(folder, tmp_path / "out", "letterbox"))
    with Image.open(tmp_path / "out" / "a.jpg") as found:
        assert found.size == (60, 60) and found.info["icc_profile"] == profile and not found.getexif()
    ground = array(tmp_path / "out" / "a.jpg")
    assert np.abs(ground[:8] - (123, 117, 104)).max() < 6  # the picture is 60 wide and 40 high, upright


# ---- varied copies --------------------------------------------------------------------------------------------------


def test_varied_copies_are_a_function_of_seed_name_and_number(source, tmp_path):
    pictures = Pictures(scale=0.5, flip=0.5, jitter=(0.5, 0.5, 0.5, 0.1), grey=0.2)
    found = finish(write_augmented(source, tmp_path / "out", 3, pictures, seed=4))
    assert found.written == 18
    image = load_picture(source / "a.png")
    for number in (1, 2, 3):
        seed = seed_of("4 a", number)
        box = random_box(*image.size, 0.5, seeded(f"part {seed}"))
        expected = varied(image.crop(box), pictures, seed)
        assert load_picture(tmp_path / "out" / f"a-{number}.png").tobytes() == expected.tobytes()
        text = (tmp_path / "out" / f"a-{number}.txt").read_text()
        assert text == ("a dog on the right of a red ball\nright hand\n" if flipped(pictures, seed) else CAPTION)
    finish(write_augmented(source, tmp_path / "again", 3, pictures, seed=4))
    finish(write_augmented(source, tmp_path / "other", 3, pictures, seed=5))
    bytes_of = {name: {k: v[0] for k, v in contents(tmp_path / name).items()} for name in ("out", "again", "other")}
    assert bytes_of["out"] == bytes_of["again"] != bytes_of["other"]


def test_one_copy_has_its_pictures_name(source, tmp_path):
    finish(write_augmented(source, tmp_path / "out", 1, Pictures(jitter=(0.5, 0.5, 0.5, 0.1))))
    assert sorted(contents(tmp_path / "out")) == sorted([MARK, "a.txt", "sub/b.caption", *NAMES])
    assert (array(tmp_path / "out" / "a.png") != array(source / "a.png")).any()


def test_captions_follow_a_flip_and_pictures_that_share_them_flip_together(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(12):
        image = Image.new("RGB", (16, 8), "white")
        image.paste("black", (0, 0, 8, 8))
        for suffix in ("png", "bmp"):
            image.save(folder / f"{i}.{suffix}")
        (folder / f"{i}.txt").write_text("black on the left")
    finish(write_augmented(folder, tmp_path / "out", 2, FLIP))
    sides = {"black on the left": 0, "black on the right": 0}
    for i in range(12):
        for number in (1, 2):
            stem = tmp_path / "out" / f"{i}-{number}"
            text = stem.with_suffix(".txt").read_text()
            for suffix in (".png", ".bmp"):
                dark = array(stem.with_suffix(suffix))[:, :8].mean() < 100
                assert text == ("black on the left" if dark else "black on the right")
            sides[text] += 1
    assert min(sides.values()) > 4


def test_captions_of_a_file_are_written_for_the_copies(source, tmp_path):
    told = {"a.png": ["left of it", "plain"], "sub/b.jpg": ["to the right"]}
    (tmp_path / "captions.json").write_text(json.dumps(told))
    index = read_index(source, tmp_path / "captions.json")
    found = finish(write_augmented(source, tmp_path / "out", 4, FLIP, index=index))
    made = json.loads((tmp_path / "out" / "captions.json").read_text())
    assert len(made) == 8 and found.captions == tmp_path / "out" / "captions.json"
    turned = set()
    for name, captions in told.items():
        stem, suffix = name.rsplit(".", 1)
        for number in range(1, 5):
            flip = flipped(FLIP, seed_of(f"0 {stem}", number))
            turned.add(flip)
            expected = [mirror(caption) for caption in captions] if flip else captions
            assert made[f"{stem}-{number}.{suffix}"] == expected
    assert turned == {True, False}
    assert len(read_index(tmp_path / "out", tmp_path / "out" / "captions.json")) == 8


def test_flips_without_known_captions_are_counted(source, tmp_path):
    found = finish(write_augmented(source, tmp_path / "out", 1, Pictures(flip=1.0)))
    assert found.unmirrored == 4


def test_captions_that_are_not_utf8_are_copied_as_they_are_and_refused_where_they_would_be_mirrored(source, tmp_path):
    (source / "a.txt").write_bytes(b"caf\xe9 left")
    finish(write_crops(source, tmp_path / "out", "centre"))
    assert (tmp_path / "out" / "a.txt").read_bytes() == b"caf\xe9 left"
    found = finish(write_augmented(source, tmp_path / "flipped", 1, Pictures(flip=1.0)))
    assert [name for name, _ in found.broken] == ["a.png"] and "not UTF-8" in found.broken[0][1]
    assert not (tmp_path / "flipped" / "a.png").exists()


# ---- folders --------------------------------------------------------------------------------------------------------


def test_the_same_call_goes_on_and_replaces_nothing(source, tmp_path, monkeypatch):
    steps = write_crops(source, tmp_path / "out", "centre")
    monkeypatch.setattr(copies, "_AT_ONCE", 2)
    next(steps), next(steps)
    steps.close()
    missing = tmp_path / "out" / "sub" / "d.bmp"
    missing.unlink(missing_ok=True)
    before = contents(tmp_path / "out")
    found = finish(write_crops(source, tmp_path / "out", "centre"))
    after = contents(tmp_path / "out")
    assert found.written + found.kept == 6 and found.written >= 1 and missing.exists()
    assert all(after[name] == before[name] for name in set(before) - {MARK})


def test_other_folders_and_other_copies_are_left_alone_unless_forced(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.png").write_bytes(b"mine")
    with pytest.raises(InputError, match="is not empty.*--force"):
        finish(write_crops(source, out, "centre"))
    assert contents(out).keys() == {"a.png"} and (out / "a.png").read_bytes() == b"mine"
    finish(write_crops(source, out, "centre", force=True))
    assert load_picture(out / "a.png").size == (50, 50)
    for work in (
        write_crops(source, out, "letterbox"),
        write_augmented(source, out, 1, FLIP),
        write_crops(source.parent / "pictures" / "sub", out, "centre"),
    ):
        with pytest.raises(InputError, match="made otherwise.*--force"):
            finish(work)
    assert finish(write_crops(source, out, "letterbox", force=True)).written == 6
    assert load_picture(out / "a.png").size == (80, 80)
    (out / MARK).write_text("{")
    with pytest.raises(InputError, match="damaged"):
        finish(write_crops(source, out, "letterbox"))


def test_nothing_is_written_into_the_folder_that_is_read(source, tmp_path):
    before = contents(source)
    link = tmp_path / "link"
    os.symlink(source, link)
    for out in (source, source / "sub" / "new", source.parent, link, link / "new"):
        for force in (False, True):
            with pytest.raises(InputError, match="would mix"):
                finish(write_crops(source, out, "centre", force=force))
    out = tmp_path / "out"
    out.mkdir()
    os.symlink(source / "sub", out / "sub")
    found = finish(write_crops(source, out, "letterbox", force=True))
    assert found.written == 2 and len(found.broken) == 4 and "is a link into" in found.broken[0][1]
    assert contents(source) == before


def test_broken_pictures_are_listed_and_do_not_stop_the_others(source, tmp_path):
    (source / "a.png").write_bytes(b"")
    content = (source / "sub" / "b.jpg").read_bytes()
    (source / "sub" / "b.jpg").write_bytes(content[: len(content) // 2])
    found = finish(write_augmented(source, tmp_path / "out", 2, FLIP))
    assert found.written == 8
    assert [name for name, _ in found.broken] == ["a.png", "sub/b.jpg"]
    assert "empty" in found.broken[0][1] and "cut short" in found.broken[1][1]
    for name in NAMES:
        (source / name).write_bytes(b"x")
    with pytest.raises(InputError, match="none of the 6 pictures"):
        finish(write_crops(source, tmp_path / "none", "centre"))


needs_links = pytest.mark.skipif(os.name == "nt", reason="links and named pipes take POSIX")


@needs_links
@pytest.mark.parametrize("what", ["crop", "augment"])
def test_links_out_of_the_folder_and_what_is_no_file_are_left_out_and_told(source, tmp_path, capsys, what):
    photo = (source / "a.png").read_bytes()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "private.png").write_bytes(photo)
    (tmp_path / "outside" / "private.txt").write_text("not to be told")
    links = {
        "link.png": tmp_path / "outside" / "private.png",
        "a.caption": tmp_path / "outside" / "private.txt",
        "sub/up.png": "../../outside/private.png",
        "nowhere.png": "gone.png",
        "loop.png": "loop.png",
        "linked": tmp_path / "outside",
    }
    for name, target in links.items():
        (source / name).symlink_to(target)
    (source / "inside.png").symlink_to("a.png")
    (source / "folder.png").mkdir()
    (source / "folder.png" / "in.png").write_bytes(photo)
    os.mkfifo(source / "pipe.png")
    os.mkfifo(source / "e.txt")  # would be waited for, if it were opened
    out = tmp_path / "out"
    code, found, told = run(capsys, "pictures", what, source, "--out", out, "--json")
    assert code == 0 and found["written"] == 8 and not found["broken"]
    assert found["linked"] == sorted(links) and found["no_files"] == ["e.txt", "folder.png", "pipe.png"]
    assert f"links that were not followed: 6: {', '.join(sorted(links))}" in told and "pipe.png" in told
    assert sorted(contents(out)) == sorted([MARK, "a.txt", "sub/b.caption", "inside.png", "folder.png/in.png", *NAMES])


@needs_links
def test_a_folder_of_links_out_alone_is_told_as_such(tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.png").symlink_to("../outside.png")
    with pytest.raises(InputError, match="no pictures.*links that were not followed: a.png"):
        finish(write_crops(tmp_path / "links", tmp_path / "out", "centre"))


@pytest.mark.parametrize(
    ("work", "told"),
    [
        (lambda s, o: write_augmented(s, o, 0, FLIP), "at least 1"),
        (lambda s, o: write_augmented(s, o, 1001, FLIP), "at most 1000"),
        (lambda s, o: write_augmented(s, o, 1, Pictures()), "what varies"),
        (lambda s, o: write_crops(s / "a.png", o, "centre"), "is no folder"),
        (lambda s, o: write_crops(s / "sub" / "empty", o, "centre"), "no pictures in"),
        (lambda s, o: write_crops(s, s.parent / "file", "centre"), "is a file"),
    ],
    ids=["none", "many", "plain", "file", "empty", "out"],
)
def test_what_does_not_work_is_told(source, tmp_path, work, told):
    (source / "sub" / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=told):
        finish(work(source, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# ---- commands -------------------------------------------------------------------------------------------------------


def run(capsys, *arguments) -> tuple[int, dict | None, str]:
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, json.loads(out.splitlines()[-1]) if code == 0 else None, err


def test_the_commands_write_what_the_functions_do(source, tmp_path, capsys):
    (source / "e.gif").write_bytes(b"")
    vision = ("--vision", ASSETS / ORIGINAL, "--cache", tmp_path / "cache", "--device", "cpu")
    salient = ("pictures", "crop", source, "--out", tmp_path / "a", "--crop", "salient", *vision, "--json")
    code, found, told = run(capsys, *salient)
    assert code == 0 and found["written"] == 5 and "e.gif" in found["broken"] and "e.gif (the file is empty" in told
    assert run(capsys, *salient)[1]["kept"] == 5
    tower = load_original().visual
    finish(write_crops(source, tmp_path / "b", "salient", tower=tower, cache=tmp_path / "cache"))
    assert (tmp_path / "a" / "a.png").read_bytes() == (tmp_path / "b" / "a.png").read_bytes()
    (source / "e.gif").unlink()
    augment = ("pictures", "augment", source, "--out", tmp_path / "c", "--copies", "2", "--seed", "3", "--json")
    code, found, told = run(capsys, *augment, "--flip", "1")
    assert code == 0 and found["written"] == 10 and found["unmirrored"] == 6 and "--captions" in told
    finish(write_augmented(source, tmp_path / "d", 2, Pictures(flip=1.0), 3))
    assert (tmp_path / "c" / "a-2.png").read_bytes() == (tmp_path / "d" / "a-2.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "pictures"),
    [
        ((), Pictures(jitter=(0.5, 0.5, 0.5, 0.1))),
        (("--jitter-chance", "0.5"), Pictures(jitter=(0.5, 0.5, 0.5, 0.1), jitter_chance=0.5)),
        (("--flip", "1"), Pictures(flip=1.0)),
        (("--scale", "0.5"), Pictures(scale=0.5)),
        (("--grey", "1"), Pictures(grey=1.0)),
        (("--flip", "1", "--jitter", "0.2", "0", "0", "0"), Pictures(flip=1.0, jitter=(0.2, 0.0, 0.0, 0.0))),
    ],
)
def test_colours_change_where_that_or_nothing_else_is_asked_for(source, tmp_path, capsys, arguments, pictures):
    assert run(capsys, "pictures", "augment", source, "--out", tmp_path / "a", *arguments, "--json")[0] == 0
    finish(write_augmented(source, tmp_path / "b", 1, pictures))
    for name in NAMES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("crop", "--crop", "salient"), "give its file with --vision"),
        (("crop", "--vision", "a.safetensors"), "needs no tower"),
        (("augment", "--jitter", "0.1", "0.1", "0.1", "-0.1"), "jitter"),
        (("augment", "--jitter", "0.1", "0.1", "0.1", "0.6"), "hue"),
        (("augment", "--flip", "2"), "flip"),
        (("augment", "--flip", "0"), "what varies"),
        (("augment", "--flip", "1", "--jitter-chance", "0.5"), "with --jitter how much"),
        (("augment", "--copies", "1001"), "at most 1000"),
        (("augment", "--jitter", "0", "0", "0", "0"), "what varies"),
    ],
)
def test_the_commands_refuse_what_does_not_work(source, tmp_path, capsys, arguments, told):
    what, *rest = arguments
    code, _, err = run(capsys, "pictures", what, source, "--out", tmp_path / "out", *rest)
    assert code == 2 and told in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["crop", "augment"])
def test_help_has_an_example(capsys, what):
    with pytest.raises(SystemExit):
        main(["pictures", what, "--help"])
    assert f"python -m gmp pictures {what} pictures --out" in capsys.readouterr().out
