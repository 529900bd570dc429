"""One pass over pictures: what is seen is so, what was seen is not read again, and what changed is."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gmp.data import survey as module
from gmp.data.captions import content_key
from gmp.data.images import load_whole
from gmp.data.perceptual import SIDE, looks
from gmp.data.survey import survey
from gmp.errors import InputError
from gmp.events import finish

ROOT = Path(__file__).resolve().parent.parent


def photo(seed, width=90, height=60):
    noise = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures in two folders, of all formats."""
    root = tmp_path / "pictures"
    for number in range(12):
        path = root / f"{number % 2}" / f"{number:02d}{('.jpg', '.png', '.webp', '.bmp')[number % 4]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(number, 90 + number).save(path)
    return root


def names_of(root):
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def seen(root, cache, names=None, **options):
    return finish(survey(root, names or names_of(root), cache, **options))


@pytest.fixture
def opened(monkeypatch):
    """Names of the pictures that were opened."""
    found = []

    def spy(path, size):
        found.append(Path(path).name)
        return load_whole(path, size)

    monkeypatch.setattr(module, "load_whole", spy)
    return found


def same(one, other):
    arrays = ("bytes", "widths", "heights", "keys")
    return (
        one.names == other.names
        and one.formats == other.formats
        and one.faults == other.faults
        and all(np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays)
        and all(np.array_equal(a, b) for a, b in zip(vars(one.looks).values(), vars(other.looks).values(), strict=True))
    )


# --- what is seen


def test_every_picture_is_what_it_is(folder, tmp_path):
    found = seen(folder, tmp_path / "cache")
    assert len(found) == 12 and found.readable.all() and not found.faults
    for i, name in enumerate(found.names):
        path = folder / name
        with Image.open(path) as image:
            assert (found.widths[i], found.heights[i]) == image.size
            assert found.formats[i].upper() == image.format
        assert found.bytes[i] == path.stat().st_size
        expected = looks(load_whole(path, SIDE)[0].numpy()[None])
        assert found.looks.hashes[i] == expected.hashes[0] and found.looks.contrasts[i] == expected.contrasts[0]
        assert np.array_equal(found.looks.colours[i], expected.colours[0])
        assert np.array_equal(found.looks.lights[i], expected.lights[0])
    assert found.content_keys() == {name: content_key(folder / name) for name in found.names}


def test_the_order_is_that_of_the_names_however_many_threads(folder, tmp_path):
    names = names_of(folder)[::-1]
    for threads in (1, 3):
        found = seen(folder, tmp_path / str(threads), names, threads=threads)
        assert found.names == tuple(names) and found.widths[0] == load_whole(folder / names[0], SIDE)[1][0]


def test_what_cannot_be_read_has_a_reason(folder, tmp_path):
    names = names_of(folder)
    (folder / names[0]).write_bytes((folder / names[0]).read_bytes()[:400])
    (folder / names[1]).write_bytes(b"")
    (folder / names[2]).write_bytes(b"hello")
    (folder / names[3]).unlink()
    (folder / names[4]).unlink()
    (folder / names[4]).mkdir()
    found = seen(folder, tmp_path / "cache", names)
    assert set(found.faults) == set(names[:5]) and (~found.readable).sum() == 5
    assert "cut short" in found.faults[names[0]] and "empty" in found.faults[names[1]]
    assert "not a picture" in found.faults[names[2]] and "no such file" in found.faults[names[3]]
    assert "can't be read" in found.faults[names[4]]
    keys = found.content_keys()
    assert len(set(keys.values())) == 12 and all(len(key) == 64 for key in keys.values())
    assert keys[names[0]] == content_key(folder / names[0])


def test_a_turned_picture_has_the_sides_that_it_is_seen_with(tmp_path):
    image = photo(0, 90, 60)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    found = seen(tmp_path, tmp_path / "cache", ["a.jpg"])
    assert (found.widths[0], found.heights[0]) == (60, 90)


def test_no_pictures_are_no_survey(tmp_path):
    found = seen(tmp_path, tmp_path / "cache", [])
    assert len(found) == 0 and found.readable.shape == (0,) and found.content_keys() == {}


def test_progress_counts_every_picture(folder, tmp_path):
    names = names_of(folder)
    for _ in range(2):  # remembered ones, too
        events = [event for event in survey(folder, names, tmp_path / "cache") if event["stage"] == "look at pictures"]
        assert events[-1] == {"type": "progress", "stage": "look at pictures", "done": 12, "total": 12}


def test_no_threads_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match="at least 1"):
        seen(folder, tmp_path / "cache", threads=0)


# --- what is kept


def test_the_second_time_no_picture_is_opened(folder, tmp_path, opened):
    (folder / "broken.jpg").write_bytes(b"hello")
    first = seen(folder, tmp_path / "cache")
    assert len(opened) == 13 and first.remembered == 0
    second = seen(folder, tmp_path / "cache")
    assert len(opened) == 13 and second.remembered == 13
    assert same(first, second) and list(second.faults) == ["broken.jpg"]


def test_what_has_changed_is_looked_at_again(folder, tmp_path, opened):
    names = names_of(folder)
    seen(folder, tmp_path / "cache")
    opened.clear()
    photo(99, 50, 50).save(folder / names[0])
    photo(98).save(folder / "new.png")
    (folder / names[1]).unlink()
    found = seen(folder, tmp_path / "cache", [*names, "new.png"])
    assert sorted(opened) == sorted(["new.png", Path(names[0]).name])
    assert found.widths[0] == 50 and names[1] in found.faults and found.remembered == 10
    assert same(found, seen(folder, tmp_path / "other", [*names, "new.png"]))


def test_a_part_of_the_pictures_is_remembered_too(folder, tmp_path, opened):
    names = names_of(folder)
    seen(folder, tmp_path / "cache", names[:5])
    opened.clear()
    found = seen(folder, tmp_path / "cache", names)
    assert found.remembered == 5 and len(opened) == 7
    assert seen(folder, tmp_path / "cache", names[3:8]).remembered == 5


def test_what_was_not_there_is_looked_for_again(folder, tmp_path):
    names = names_of(folder)
    content = (folder / names[0]).read_bytes()
    (folder / names[0]).unlink()
    assert list(seen(folder, tmp_path / "cache", names).faults) == [names[0]]
    (folder / names[0]).write_bytes(content)
    found = seen(folder, tmp_path / "cache", names)
    assert not found.faults and found.remembered == 11


def test_a_pass_that_stops_goes_on_where_it_was(folder, tmp_path, opened, monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 2)
    events = survey(folder, names_of(folder), tmp_path / "cache", threads=1)
    for event in events:
        if event["stage"] == "look at pictures" and event["done"] == 6:
            break
    events.close()
    opened.clear()
    found = seen(folder, tmp_path / "cache")
    assert found.remembered == 6 and len(opened) == 6
    assert same(found, seen(folder, tmp_path / "other"))


def test_a_pass_that_is_killed_goes_on_where_it_was(folder, tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from gmp.data import survey as module\n"
        "module.AT_ONCE = 2\n"
        "for event in module.survey(Path(sys.argv[1]), sys.argv[3:], Path(sys.argv[2]), threads=1):\n"
        "    if event['stage'] == 'look at pictures' and event['done'] >= 4: os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    command = [sys.executable, "-c", code, folder, tmp_path / "cache", *names_of(folder)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode
    found = seen(folder, tmp_path / "cache")
    assert found.remembered >= 4 and same(found, seen(folder, tmp_path / "other"))


def test_torn_and_strange_lines_are_passed_over(folder, tmp_path):
    first = seen(folder, tmp_path / "cache")
    (memory,) = (tmp_path / "cache" / "survey").iterdir()
    lines = memory.read_text().splitlines()
    rows = [json.loads(line) for line in lines if line]
    rows[0][5] = "wide"
    rows[1][1] = None
    rows[2][6] = "zz"
    rows[3][8] = "00"
    rows[4][7] = -1
    rows[5] = {"a": 1}
    rows[6] = rows[6][:4]
    rows[7] = [*rows[7][:2], "", "", 0, 0, "", 0, "", "", 0]  # nothing wrong, and nothing known
    damaged = "\n".join(json.dumps(row) for row in rows)
    memory.write_bytes(damaged[: -len(json.dumps(rows[-1])) // 2].encode() + b"\xff")  # no end of line
    second = seen(folder, tmp_path / "cache")
    assert second.remembered == 3 and same(first, second)
    assert seen(folder, tmp_path / "cache").remembered == 12  # what follows a torn line is kept


def test_a_name_that_is_no_text_is_kept(folder, tmp_path):
    name = os.fsdecode(b"\xff\xfe.png")
    try:
        shutil.copy(folder / names_of(folder)[1], folder / name)
    except OSError:
        pytest.skip("this file system takes no such name")
    assert not seen(folder, tmp_path / "cache").faults
    again = seen(folder, tmp_path / "cache")
    assert again.remembered == 13 and name in again.content_keys()


def test_two_folders_do_not_share_what_is_kept(folder, tmp_path, opened):
    seen(folder, tmp_path / "cache")
    shutil.copytree(folder, tmp_path / "copy")
    assert seen(tmp_path / "copy", tmp_path / "cache").remembered == 0


# --- what goes wrong


def test_a_cache_that_cannot_be_written_to_is_told_once_and_harms_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 2)
    (tmp_path / "cache").write_text("a file")
    events = []
    found = finish(survey(folder, names_of(folder), tmp_path / "cache"), events.append)
    alarms = [event for event in events if event["type"] == "alarm"]
    assert len(alarms) == 1 and "not kept" in alarms[0]["advice"]
    assert same(found, seen(folder, tmp_path / "other"))


@pytest.mark.skipif(
    os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_a_cache_without_permission_is_told(folder, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(stat.S_IRUSR | stat.S_IXUSR)
    events = []
    finish(survey(folder, names_of(folder), tmp_path / "cache"), events.append)
    assert [event["alarm"] for event in events if event["type"] == "alarm"] == ["cache"]


def test_a_folder_that_vanishes_is_no_fault_of_its_pictures(folder, tmp_path):
    names = names_of(folder)
    events = survey(folder, names, tmp_path / "cache")
    next(events)
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="is gone"):
        list(events)
    shutil.copytree(ROOT / "docs", folder)  # something is there again: what was missed has not been kept
    assert seen(folder, tmp_path / "cache", names).remembered == 0
