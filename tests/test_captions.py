"""Reading captioned pictures: both ways to write captions down, and the mistakes to be made with them."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time

import pytest
from PIL import Image

from gmp.data import captions
from gmp.data.captions import Index, Picture, check_pictures, content_key, printable, read_index, split
from gmp.errors import InputError
from gmp.events import finish


def pictures(root, *names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 2 * i, 3 * i)).save(root / name)


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "images"
    pictures(folder, "b.png", "a.jpg", "sub/c.webp", "sub/deep/d.JPEG", "e.bmp")
    return folder


# ---- captions beside the pictures


def test_text_files_beside_pictures(root):
    write(root / "a.txt", "a cat\n\n  a grey cat  \r\n")
    write(root / "b.caption", "a dog")
    write(root / "sub/c.txt", "\ufeffa caf\u00e9\u2028still one line")
    write(root / "sub/deep/d.TXT", "a tree")
    write(root / "e.txt", "  \n\n")
    write(root / "readme.txt", "about this data set")
    index = read_index(root)
    assert index.pictures == (
        Picture("a.jpg", ("a cat", "a grey cat")),
        Picture("b.png", ("a dog",)),
        Picture("sub/c.webp", ("a caf\u00e9\u2028still one line",)),
        Picture("sub/deep/d.JPEG", ("a tree",)),
    )
    assert index.root == root and len(index) == 4
    assert index.caption_counts == (2, 1, 1, 1)
    assert index.paths[2] == root / "sub/c.webp"
    assert index.report.listed == 5
    assert index.report.uncaptioned == ("e.bmp",)
    assert index.report.orphans == ("readme.txt",)
    assert index.report.missing == ()


def test_both_kinds_of_text_file_and_pictures_with_one_stem(tmp_path):
    pictures(tmp_path, "x.png", "x.jpg", "y.v2.png")
    write(tmp_path / "x.txt", "one")
    write(tmp_path / "x.caption", "two\none")
    write(tmp_path / "y.v2.txt", "three")
    index = read_index(tmp_path)
    assert {p.path: set(p.captions) for p in index.pictures} == {
        "x.jpg": {"one", "two"},
        "x.png": {"one", "two"},
        "y.v2.png": {"three"},
    }
    assert index.report.repeated == 2 and index.report.shared == 2


def test_hidden_names_are_skipped(root):
    for name in ("a", "b", "e", "sub/c", "sub/deep/d"):
        write(root / f"{name}.txt", name)
    write(root / "._a.jpg", "resource fork")
    pictures(root, ".thumbnails/t.png")
    assert read_index(root).report.listed == 5


def test_text_files_that_are_not_utf8_are_all_named(root):
    (root / "a.txt").write_bytes(b"caf\xe9")
    (root / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"None of the caption files.*a\.txt.*cp1252.*UTF-8"):
        read_index(root)
    write(root / "e.txt", "whole")  # the others are left out then, and told
    report = read_index(root).report
    assert [path for path, _ in report.garbled] == ["a.txt", "b.txt"] and len(report.uncaptioned) == 4
    assert "caption files that can't be read: 2: a.txt (not UTF-8 text" in str(report)


def test_no_captions_at_all(root):
    with pytest.raises(InputError, match=r"None of the 5 pictures.*has a caption"):
        read_index(root)


def test_no_pictures(tmp_path):
    write(tmp_path / "a.txt", "text")
    with pytest.raises(InputError, match="no pictures"):
        read_index(tmp_path)


# ---- one JSON file


def test_json(root, tmp_path):
    file = write(
        tmp_path / "captions.json",
        {
            "sub/c.webp": ["two", " one ", "two", "", "  "],
            "a.jpg": "a plain string",
            "sub\\deep\\d.JPEG": ["one"],
            "./b.png": [],
        },
    )
    index = read_index(root, file)
    assert index.pictures == (
        Picture("a.jpg", ("a plain string",)),
        Picture("sub/c.webp", ("two", "one")),
        Picture("sub/deep/d.JPEG", ("one",)),
    )
    report = index.report
    assert (report.listed, report.uncaptioned, report.repeated, report.shared) == (4, ("b.png",), 1, 1)
    assert read_index(str(root), str(file)).pictures == index.pictures


def test_json_order_does_not_matter(root, tmp_path):
    content = {"a.jpg": ["x"], "b.png": ["y"], "e.bmp": ["z"]}
    one = read_index(root, write(tmp_path / "1.json", content))
    two = read_index(root, write(tmp_path / "2.json", dict(reversed(content.items()))))
    assert one == two


def test_json_keys_that_repeat_are_joined(root, tmp_path):
    file = write(tmp_path / "c.json", '\ufeff{"a.jpg": ["x"], "a.jpg": ["y", "x"], "./a.jpg": "z"}')
    index = read_index(root, file)
    assert index.pictures == (Picture("a.jpg", ("x", "y", "z")),)
    assert index.report.repeated == 1


def test_json_that_does_not_parse(root, tmp_path):
    file = write(tmp_path / "c.json", '{"a.jpg": ["x"],\n  oops}')
    with pytest.raises(InputError, match="line 2, column 3"):
        read_index(root, file)


@pytest.mark.parametrize("content", ["[]", "3", "null", '"x"', "true", "[" * 200_000, "1" * 5000])
def test_json_that_is_no_object(root, tmp_path, content):
    with pytest.raises(InputError, match="Expected an object of lists of strings"):
        read_index(root, write(tmp_path / "c.json", content))


def test_json_without_pictures(root, tmp_path):
    with pytest.raises(InputError, match="names no pictures"):
        read_index(root, write(tmp_path / "c.json", {}))


def test_json_with_wrong_values_names_the_first_five(root, tmp_path):
    wrong = {f"{i}.png": value for i, value in enumerate([3, None, {}, {"caption": "x"}, ["x", 1], [["x"]], True])}
    with pytest.raises(InputError, match=r"7 of 8 pictures.*: 0\.png, 1\.png, 2\.png, 3\.png, 4\.png, …"):
        read_index(root, write(tmp_path / "c.json", {"a.jpg": ["fine"], **wrong}))


def test_json_that_is_not_utf8(root, tmp_path):
    (tmp_path / "c.json").write_bytes(b'{"a.jpg": ["caf\xe9"]}')
    with pytest.raises(InputError, match="not UTF-8"):
        read_index(root, tmp_path / "c.json")


@pytest.mark.parametrize(
    "key",
    [
        "../a.jpg",
        "sub/../../a.jpg",
        "/etc/a.jpg",
        "..\\a.jpg",
        "C:\\a.jpg",
        "C:a.jpg",
        "\\\\server\\share\\a.jpg",
    ],
)
def test_paths_that_leave_the_folder_are_refused(root, tmp_path, key):
    pictures(tmp_path, "a.jpg")
    with pytest.raises(InputError, match="1 pictures outside"):
        read_index(root, write(tmp_path / "c.json", {key: ["x"], "a.jpg": ["y"]}))


@pytest.mark.parametrize("key", ["", ".", "sub", "a.tif", "notes.txt"])
def test_files_that_are_not_pictures(root, tmp_path, key):
    with pytest.raises(InputError, match="not pictures"):
        read_index(root, write(tmp_path / "c.json", {key: ["x"]}))


@pytest.mark.parametrize("key", ["nul\0.png", "x" * 5000 + ".png", "folder.png", "\ud800.png"])
def test_names_that_no_file_can_have_are_missing(root, tmp_path, key):
    (root / "folder.png").mkdir()
    with pytest.raises(InputError, match="1 of the pictures"):
        read_index(root, write(tmp_path / "c.json", {key: ["x"]}))


def test_messages_can_be_printed_whatever_the_names(root, tmp_path):
    with pytest.raises(InputError) as error:
        read_index(root, write(tmp_path / "c.json", {"\ud800.png": ["x"], "../\ud800.png": [], "\ud800": []}))
    assert str(error.value).encode("utf-8").count(b"\\ud800") == 3


def test_what_a_terminal_would_obey_is_printed_as_escapes():
    assert printable("\x1b]0;title\x07 \x9b2J\r\n\x7f\ud800") == r"\x1b]0;title\x07 \x9b2J\r\n\x7f\ud800"
    assert printable("a\u202eb\u2028c") == r"a\u202eb\u2028c"
    kept = "caf\u00e9\u00a0\u732b \U0001f468\u200d\U0001f469 a\\b"
    assert printable(kept) == kept


def test_reports_hold_no_control_characters_whatever_files_are_called(root, tmp_path):
    names = {"gone\x1b[2J\n.jpg": ["x"], "a.jpg": ["y"]}
    report = read_index(root, write(tmp_path / "c.json", names), missing_ok=True).report
    assert r"not found: 1: gone\x1b[2J\n.jpg" in str(report).split("\n")
    with pytest.raises(InputError) as error:
        read_index(root, tmp_path / "c.json")
    assert "\x1b" not in str(error.value) and "\n" not in str(error.value)


def test_missing_pictures(root, tmp_path):
    file = write(tmp_path / "c.json", {"a.jpg": ["x"], **{f"gone/{i}.jpg": ["y"] for i in range(7)}})
    with pytest.raises(InputError, match=r"7 of the pictures.*gone/0\.jpg.*gone/4\.jpg, …"):
        read_index(root, file)
    index = read_index(root, file, missing_ok=True)
    assert [p.path for p in index.pictures] == ["a.jpg"]
    assert index.report.missing == tuple(f"gone/{i}.jpg" for i in range(7)) and index.report.listed == 8
    with pytest.raises(InputError, match="1 of the pictures"):
        read_index(root, write(tmp_path / "d.json", {"gone.jpg": ["y"]}), missing_ok=True)


def test_all_problems_come_at_once(root, tmp_path):
    file = write(tmp_path / "c.json", {"gone.jpg": ["x"], "../b.png": ["x"], "a.tif": ["x"], "a.jpg": [1]})
    with pytest.raises(InputError) as error:
        read_index(root, file)
    assert len(str(error.value).split("\n")) == 4
    with pytest.raises(InputError, match=r"no folder(.|\n)*no caption file"):
        read_index(tmp_path / "nowhere", tmp_path / "nothing.json")


def test_wrong_kinds_of_path(root, tmp_path):
    with pytest.raises(InputError, match="is a file"):
        read_index(root / "a.jpg")
    with pytest.raises(InputError, match="is a folder"):
        read_index(root, tmp_path)


# ---- checking


def captioned(root) -> Index:
    for path in sorted(root.rglob("*")):
        if path.is_file():
            write(path.with_suffix(".txt"), path.name)
    return read_index(root)


def test_broken_pictures_are_left_out_and_listed(root):
    index = captioned(root)
    (root / "b.png").write_bytes((root / "b.png").read_bytes()[:40])
    (root / "sub/c.webp").write_bytes(b"")
    write(root / "e.bmp", "<html>")
    checked = finish(check_pictures(index, threads=2))
    assert [p.path for p in checked.pictures] == ["a.jpg", "sub/deep/d.JPEG"]
    assert [path for path, _ in checked.report.broken] == ["b.png", "e.bmp", "sub/c.webp"]
    reasons = dict(checked.report.broken)
    assert "empty" in reasons["sub/c.webp"] and "known format" in reasons["e.bmp"]
    assert not any(str(root) in reason for reason in reasons.values())
    assert "broken: 3: b.png (" in str(checked.report)
    assert len(index) == 5 and index.report.broken == ()


def test_checking_reports_progress_and_can_be_stopped(root):
    index = captioned(root)
    seen = []
    assert finish(check_pictures(index, 3), seen.append) == index
    assert [(event["done"], event["total"]) for event in seen] == [(i, 5) for i in range(1, 6)]
    before = threading.active_count()
    checking = check_pictures(index, 1)
    next(checking)
    checking.close()
    assert threading.active_count() == before


def test_a_stopped_check_opens_no_further_pictures(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(captions, "_fault", lambda path: opened.append(path) or time.sleep(0.005) or "")
    checking = check_pictures(many(tmp_path), 1)
    next(checking)
    checking.close()
    assert len(opened) < 100


def test_nothing_left_is_an_error(root):
    index = captioned(root)
    for path in index.paths:
        path.write_bytes(b"")
    with pytest.raises(InputError, match="None of the 5 pictures"):
        finish(check_pictures(index))
    with pytest.raises(InputError, match="at least 1"):
        finish(check_pictures(index, threads=0))


def test_report_as_text_lists_five_names_at_most(tmp_path):
    pictures(tmp_path, *(f"{i}.png" for i in range(9)))
    write(tmp_path / "8.txt", "x")
    assert "without captions: 8: 0.png, 1.png, 2.png, 3.png, 4.png, …" in str(read_index(tmp_path).report)


# ---- keys and split


def test_content_key_is_sha256_of_the_bytes(tmp_path):
    data = os.urandom(3_000_000)
    (tmp_path / "x").write_bytes(data)
    assert content_key(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def many(tmp_path, count=200) -> Index:
    return Index(tmp_path, tuple(Picture(f"{i:04}.png", (str(i),)) for i in range(count)), None)


def by_name(index: Index) -> dict[str, str]:
    """A content key per picture, as if each held its own name."""
    return {p.path: p.path.removesuffix(".png") for p in index.pictures}


def test_split_is_a_partition(tmp_path):
    index = many(tmp_path)
    train, held = split(index, by_name(index), 50)
    assert len(train) == 150 and len(held) == 50
    assert sorted([*train.pictures, *held.pictures], key=lambda p: p.path) == list(index.pictures)
    assert [p.path for p in train.pictures] == sorted(p.path for p in train.pictures)
    assert train.root == held.root == tmp_path
    assert split(index, by_name(index), 0)[0].pictures == index.pictures


def test_split_depends_on_contents_only(tmp_path):
    index = many(tmp_path)
    renamed = Index(tmp_path, tuple(Picture(f"b/{p.path}", ("other",)) for p in reversed(index.pictures)), None)
    keys = by_name(index)
    held = {keys[p.path] for p in split(index, keys, 50)[1].pictures}
    moved = {f"b/{path}": key for path, key in keys.items()}
    assert held == {moved[p.path] for p in split(renamed, moved, 50)[1].pictures}
    # fixed for good: held-out pictures must stay held out in every later version
    order = sorted(keys.values(), key=lambda key: hashlib.sha256(f"held out {key}".encode()).digest())
    assert held == set(order[:50])


def test_copies_of_a_picture_are_on_one_side(tmp_path):
    index = many(tmp_path)
    keys = {path: key[:-1] for path, key in by_name(index).items()}  # ten copies of each
    train, held = (part.pictures for part in split(index, keys, 55))
    assert len(held) == 50 and len(train) == 150
    assert not {keys[p.path] for p in train} & {keys[p.path] for p in held}


def test_split_stays_mostly_the_same_when_pictures_are_added(tmp_path):
    few, more = (split(one, by_name(one), 50)[1] for one in (many(tmp_path, 200), many(tmp_path, 210)))
    assert len({p.path for p in few.pictures} & {p.path for p in more.pictures}) >= 40


@pytest.mark.parametrize("held_out", [-1, 200, 201])
def test_split_of_impossible_size(tmp_path, held_out):
    with pytest.raises(InputError, match="of 200 pictures"):
        split(many(tmp_path), by_name(many(tmp_path)), held_out)
