"""Every way to write captions down: told from the others, read, and what is wrong with it said by name."""

from __future__ import annotations

import builtins
import json
import os
import sys
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from gmp.data import sources
from gmp.data.captions import Picture, dataset_key, read_index
from gmp.data.sources import KINDS, mix, parse, read
from gmp.data.sources.folder import Folder
from gmp.data.sources.opened import decode, sniff
from gmp.errors import InputError

LINKS = pytest.mark.skipif(sys.platform == "win32", reason="links need a right there")
CASED = pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names of files have no case there")


def pictures(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 2 * i, 3 * i)).save(root / name)
    return root


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8", newline="")
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return pictures(tmp_path / "images", "a.jpg", "b.png", "sub/c.webp")


def captions(index) -> dict[str, tuple[str, ...]]:
    return {picture.path: picture.captions for picture in index.pictures}


THREE = {"a.jpg": ("a cat",), "b.png": ("a dog", "a grey dog"), "sub/c.webp": ("a tree",)}
COCO = {
    "images": [{"id": n, "file_name": name} for n, name in enumerate(THREE)],
    "annotations": [
        {"id": 0, "image_id": 1, "caption": "a dog"},
        {"id": 1, "image_id": 0, "caption": "a cat"},
        {"id": 2, "image_id": 1, "caption": "a grey dog"},
        {"id": 3, "image_id": 2, "caption": "a tree"},
    ],
}
KOHYA = {
    "a": {"caption": "a cat", "train_resolution": [64, 64]},
    "b.png": {"caption": "a dog", "tags": "a grey dog"},
    "sub/c": {"tags": "a tree"},
}
ROWS = "a.jpg,a cat\nb.png,a dog\nb.png,a grey dog\nsub/c.webp,a tree\n"
LINES = "".join(json.dumps({"file_name": name, "text": list(texts), "n": 3}) + "\n" for name, texts in THREE.items())
LABELS = {
    "json": ("c.json", {name: list(texts) for name, texts in THREE.items()}),
    "coco": ("c.json", COCO),
    "kohya_json": ("meta_cap.json", KOHYA),
    "imagefolder": ("metadata.jsonl", LINES),
    "csv": ("c.csv", "filepath,title\n" + ROWS),
    "interrogator": ("desc.csv", "image,prompt\n" + ROWS),
}


# ---- one reader behind all ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LABELS)
def test_each_kind_of_file_is_told_from_the_others_and_gives_the_same_pairs(kind, root, tmp_path):
    name, content = LABELS[kind]
    file = write(tmp_path / name, content)
    index = read(file, images=root)
    assert index.report.kind == kind and captions(index) == THREE
    assert read(file, kind=kind, images=root).pictures == index.pictures
    assert read_index(root, file).pictures == index.pictures


@pytest.mark.parametrize("kind", LABELS)
def test_a_file_among_its_pictures_needs_no_folder(kind, root):
    name, content = LABELS[kind]
    assert captions(read(write(root / name, content))) == THREE


@pytest.mark.parametrize("other", LABELS)
@pytest.mark.parametrize("kind", LABELS)
def test_a_file_of_another_kind_is_named_by_what_it_looks_like(kind, other, root, tmp_path):
    if kind == other or (kind, other) == ("csv", "interrogator"):  # that is a table, too
        return
    name, content = LABELS[other]
    with pytest.raises(InputError) as error:
        read(write(tmp_path / name, content), kind=kind, images=root)
    assert f"not of the kind {kind}" in str(error.value) and f"pass {other} as its kind" in str(error.value)


def test_kinds_that_are_none_are_refused_with_the_list(root):
    with pytest.raises(InputError, match="no kind of captions 'flickr'; choose one of imagefolder"):
        read(root, kind="flickr")
    assert list(KINDS) == list(dict.fromkeys(KINDS)) and len(KINDS) == 10


@pytest.mark.parametrize("kind", ["json", "coco", "csv"])
def test_a_folder_is_no_file_of_captions(kind, root):
    write(root / "a.txt", "a cat")
    with pytest.raises(InputError, match="looks like text"):
        read(root, kind=kind)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("c.json", {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"bbox": [1]}]}, "captions_train2017"),
        ("c.json", {"images": [{"id": 1, "file_name": "a.jpg"}]}, "no annotations"),
        ("c.json", [{"image": "a.jpg", "text": "x"}], "holds a list"),
        ("c.xlsx", b"PK\3\4rest", "Excel"),
        ("c.png", b"\x89PNG\r\n", "a picture"),
        ("c.safetensors", b"\x08\0\0\0", "no caption file"),
        ("c.json.gz", b"\x1f\x8bxx", "gzip"),
        ("c.json", b"", "zero bytes"),
        ("notes.txt", "a line\nanother\n", "one column"),
        ("config.toml", "[general]\nshuffle_caption = true\n", "holds settings"),
    ],
)
def test_files_without_captions_are_named_by_what_they_are(name, content, what, root, tmp_path):
    with pytest.raises(InputError, match=what):
        read(write(tmp_path / name, content), images=root)


# ---- JSON -----------------------------------------------------------------------------------------------------------


def test_coco_names_annotations_of_no_image_and_images_without_name(root, tmp_path):
    broken = {**COCO, "images": COCO["images"][1:] + [{"id": 9}]}
    with pytest.raises(InputError, match="1 of 3 images have no id of their own or no file_name"):
        read(write(tmp_path / "c.json", broken), images=root)
    with pytest.raises(InputError, match="1 captions are of images that it does not list: 0"):
        read(write(tmp_path / "c.json", {**COCO, "images": COCO["images"][1:]}), images=root)


def test_coco_images_without_captions_are_left_out_and_listed(root, tmp_path):
    index = read(write(tmp_path / "c.json", {**COCO, "annotations": COCO["annotations"][:2]}), images=root)
    assert index.report.uncaptioned == ("sub/c.webp",) and len(index) == 2


def test_kohya_metadata_names_pictures_with_or_without_suffix_and_tags_are_a_caption_more(root, tmp_path):
    index = read(write(tmp_path / "meta.json", KOHYA), images=root)
    assert captions(index) == THREE and index.report.notes == ("tags taken as a further caption: 1",)


def test_each_line_of_a_kohya_caption_is_one(root, tmp_path):
    file = write(tmp_path / "meta.json", {"a": {"caption": "a cat\r\n a big cat\n\n"}})
    assert captions(read(file, images=root)) == {"a.jpg": ("a cat", "a big cat")}


def test_a_name_without_suffix_fits_all_pictures_of_that_name(root, tmp_path):
    pictures(root, "a.bmp")
    file = write(tmp_path / "meta.json", {"a": {"caption": "a cat"}})
    assert list(captions(read(file, images=root))) == ["a.bmp", "a.jpg"]


@pytest.mark.parametrize("kind", ["json", "kohya_json", "csv"])
def test_absolute_paths_inside_the_folder_are_made_relative_and_others_refused(kind, root, tmp_path):
    def file(path: str) -> Path:
        content = {"json": {path: ["x"]}, "kohya_json": {path: {"caption": "x"}}, "csv": f"filepath,title\n{path},x\n"}
        return write(tmp_path / f"c.{'csv' if kind == 'csv' else 'json'}", content[kind])

    assert list(captions(read(file(str(root / "a.jpg")), images=root))) == ["a.jpg"]
    for path in ("/home/someone/images/a.jpg", "D:\\images\\a.jpg", str(root / ".." / "a.jpg")):
        with pytest.raises(InputError, match="1 pictures outside"):
            read(file(path), images=root)


def test_kohya_metadata_of_another_machine_is_refused_without_suffix_too(root, tmp_path):
    with pytest.raises(InputError, match="1 pictures outside"):
        read(write(tmp_path / "c.json", {"/train/a": {"caption": "x"}}), images=root)
    assert captions(read(write(tmp_path / "c.json", {str(root / "a"): {"caption": "x"}}), images=root)) == {
        "a.jpg": ("x",)
    }


def test_values_that_name_text_files_are_followed_but_not_out_of_their_folder(root, tmp_path):
    write(tmp_path / "labels/1.txt", "a cat\na big cat")
    index = read(write(tmp_path / "c.json", {"a.jpg": "labels/1.txt"}), images=root)
    assert captions(index) == {"a.jpg": ("a cat", "a big cat")}
    for name in ("labels/2.txt", "../secret.txt"):
        write(tmp_path.parent / "secret.txt", "x")
        with pytest.raises(InputError, match="1 of 2 are not in"):
            read(write(tmp_path / "c.json", {"a.jpg": "labels/1.txt", "b.png": name}), images=root)


# ---- tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
def test_the_separator_is_the_one_that_fits(separator, root, tmp_path):
    rows = [("filepath", "title"), ("a.jpg", "a cat"), ("b.png", "a dog"), ("sub/c.webp", "a tree")]
    file = write(tmp_path / "c.csv", "\n".join(separator.join(row) for row in rows))
    assert len(read(file, images=root)) == 3
    assert sniff(f"filepath{separator}title\na.jpg{separator}one, two; three | four\n") in (separator, ",")


def test_quoted_cells_hold_separators_quotes_and_line_breaks(root, tmp_path):
    file = write(tmp_path / "c.csv", 'filepath,title\r\na.jpg,"one, ""two""\r\nthree"\r\n')
    assert captions(read(file, images=root)) == {"a.jpg": ('one, "two"\r\nthree',)}


def test_columns_are_taken_by_name_or_as_asked_and_said(root, tmp_path):
    file = write(tmp_path / "c.csv", "id,image,caption_1,caption_2,alt\n7,a.jpg,one,two,three\n")
    index = read(file, images=root)
    assert captions(index) == {"a.jpg": ("one", "two")}
    assert index.report.notes == (
        "columns: pictures from 'image', captions from 'caption_1', 'caption_2'; separated by commas",
    )
    assert captions(read(file, images=root, columns=("image", "ALT", "caption_1"))) == {"a.jpg": ("three", "one")}
    assert captions(read(file, images=root, columns=("2", "5"))) == {"a.jpg": ("three",)}
    with pytest.raises(InputError, match="no column 'title'; it has id, image, caption_1"):
        read(file, images=root, columns=("image", "title"))


def test_columns_asked_of_a_kind_without_any_are_said_not_to_be_used(root, tmp_path):
    note = "columns a, b: not used, since captions of the kind {} have none"
    for kind in ("json", "coco", "kohya_json"):
        notes = read(write(tmp_path / "c.json", LABELS[kind][1]), images=root, columns=("a", "b")).report.notes
        assert notes[-1] == note.format(kind)
    file = write(tmp_path / "c.csv", LABELS["csv"][1])
    assert not any("not used" in one for one in read(file, images=root, columns=("1", "2")).report.notes)
    write(root / "a.txt", "a cat")
    assert read(root, columns=("a", "b")).report.notes == (note.format("text"),)


def test_columns_that_cannot_be_told_are_listed(root, tmp_path):
    with pytest.raises(InputError, match="columns foto, x, y, of which none is known to hold the pictures.*--columns"):
        read(write(tmp_path / "c.csv", "foto,x,y\na.jpg,1,2\n"), images=root)
    with pytest.raises(InputError, match="columns image, x, y, of which none is known to hold the captions"):
        read(write(tmp_path / "c.csv", "image,x,y\na.jpg,1,2\n"), images=root)


def test_a_table_without_header_has_paths_first(root, tmp_path):
    index = read(write(tmp_path / "c.csv", ROWS), images=root)
    assert captions(index) == THREE and "no names in the first row" in index.report.notes[0]


def test_captions_with_commas_and_no_quotation_marks_are_named_by_line(root, tmp_path):
    with pytest.raises(InputError, match="2 of 3 rows have not 2 columns.*line 3, line 4.*quotation marks"):
        read(write(tmp_path / "c.csv", "image,prompt\na.jpg,x\nb.png,a, b\na.jpg,c, d, e\n"), images=root)


def test_rows_that_repeat_are_counted_and_taken_once(root, tmp_path):
    index = read(write(tmp_path / "c.csv", "filepath,title\n" + ROWS + ROWS), images=root)
    assert captions(index) == THREE and index.report.repeated == 4


# ---- Hugging Face ---------------------------------------------------------------------------------------------------


def test_metadata_files_name_pictures_from_their_own_folder(root):
    write(root / "metadata.jsonl", '{"file_name": "a.jpg", "text": "a cat"}\n')
    write(root / "sub/metadata.csv", "file_name,caption\nc.webp,a tree\n")
    index = read(root)
    assert index.report.kind == "imagefolder" and captions(index) == {"a.jpg": ("a cat",), "sub/c.webp": ("a tree",)}


def test_a_metadata_file_goes_before_text_files_and_that_is_said(root):
    write(root / "metadata.csv", "file_name,text\na.jpg,from the table\n")
    write(root / "a.txt", "from the text")
    index = read(root)
    assert captions(index) == {"a.jpg": ("from the table",)}
    assert any("not read (the kind text reads them)" in note for note in index.report.notes)
    assert captions(read(root, kind="text")) == {"a.jpg": ("from the text",)}


def test_parquet_is_read_with_lists_and_strings(root):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    for values in ([["a cat", "a big cat"], None], ["a cat", ""]):
        table = arrow.table({"file_name": ["a.jpg", "b.png"], "text": values, "other": [1, 2]})
        pyarrow.parquet.write_table(table, root / "metadata.parquet")
        index = read(root)
        assert captions(index)["a.jpg"][0] == "a cat" and index.report.uncaptioned == ("b.png",)
    write(root / "metadata.parquet", b"PAR1 and nothing")
    with pytest.raises(InputError, match="damaged parquet"):
        read(root)


def test_without_pyarrow_a_parquet_file_says_what_to_install(root, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.partition(".")[0] == "pyarrow":
            raise ImportError(name)
        return real(name, *rest)

    write(root / "metadata.parquet", b"PAR1")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match="pip install pyarrow"):
        read(root)


def test_lines_that_are_no_records_are_refused(root, tmp_path):
    with pytest.raises(InputError, match="lines that are no JSON objects: 2"):
        read(write(tmp_path / "metadata.jsonl", '{"file_name": "a.jpg", "text": "x"}\n[1]\n'), images=root)
    with pytest.raises(InputError, match="not JSON.*line 2"):
        read(write(tmp_path / "metadata.jsonl", '{"file_name": "a.jpg", "text": "x"}\n{oops\n'), images=root)
    with pytest.raises(InputError, match=r"1 of 2 rows lack a path.*: 2"):
        content = '{"file_name": "a.jpg", "text": "x"}\n{"file_name": 3, "text": "x"}\n'
        read(write(tmp_path / "metadata.jsonl", content), images=root)


# ---- beside the pictures --------------------------------------------------------------------------------------------


def test_kohya_folders_say_how_often_their_pictures_are_visited(tmp_path):
    root = pictures(tmp_path, "10_cat/a.jpg", "1_dog/b.jpg", "3_a tree/deep/c.jpg")
    for name in ("10_cat/a.txt", "1_dog/b.caption", "3_a tree/deep/c.txt"):
        write(root / name, name)
    index = read(root)
    assert index.report.kind == "kohya" and index.repeats == (10.0, 1.0, 3.0)
    assert index.report.notes == ("repeats of folders: 10_cat, 3_a tree",)
    assert read(root, kind="text").repeats == (1.0, 1.0, 1.0)


def test_years_and_pictures_at_the_top_are_no_kohya_folders(tmp_path):
    root = pictures(tmp_path / "years", "2023_summer/a.jpg")
    write(root / "2023_summer/a.txt", "x")
    assert read(root).report.kind == "text" and read(root).repeats == (1.0,)
    root = pictures(tmp_path / "mixed", "10_cat/a.jpg", "b.jpg")
    write(root / "10_cat/a.txt", "x")
    assert read(root).report.kind == "text"
    assert read(root, kind="kohya").repeats == (10.0,)


def test_pictures_outside_of_kohyas_folders_are_named_since_no_folder_counts_then(tmp_path):
    root = pictures(tmp_path, "3_foo/a.jpg", "5_bar/b.jpg", "stray.png", "._stray.png")
    for name in ("3_foo/a", "5_bar/b", "stray"):
        write(root / f"{name}.txt", name)
    index = read(root)
    note = (
        "3_foo and 5_bar look like kohya's folders of repeats, but stray.png lies outside of them: "
        "--kind kohya takes them"
    )
    assert index.report.kind == "text" and index.report.notes == (note,) and note in str(index.report)
    assert read(root, kind="text").report.notes == ()  # as it was asked for
    assert read(root, kind="kohya").repeats == (3.0, 5.0, 1.0)
    (root / "stray.png").unlink()
    assert read(root).report.kind == "kohya"  # a name that begins with a dot is no picture of the set
    pictures(root, "5_bar/deep/c.jpg", "plain/c.jpg", "plain/d.jpg")
    (root / "3_foo/a.jpg").unlink()
    assert read(root).report.notes == (
        "5_bar looks like one of kohya's folders of repeats, but plain/c.jpg, plain/d.jpg lie outside of it: "
        "--kind kohya takes it",
    )


def test_kohya_without_a_folder_of_repeats_says_that_none_says_how_often(root, tmp_path):
    write(root / "a.txt", "a cat")
    (note,) = read(root, kind="kohya").report.notes
    assert note == f"no folder in {root} says how often (10_name): an epoch visits each picture once"
    once = pictures(tmp_path / "once", "1_dog/b.jpg")
    write(once / "1_dog/b.txt", "a dog")
    assert read(once, kind="kohya").report.notes == ()


def test_repeats_change_the_key_of_a_data_set_and_single_visits_do_not(root):
    write(root / "a.txt", "x")
    index = read(root)
    keys = {"a.jpg": "k"}
    assert dataset_key(mix([(index, 1.0)]), keys) == dataset_key(index, keys) != dataset_key(mix([(index, 2.0)]), keys)


def test_text_files_may_lie_in_a_folder_of_their_own(root, tmp_path):
    write(tmp_path / "texts/a.txt", "a cat")
    write(tmp_path / "texts/sub/c.txt", "a tree")
    write(tmp_path / "texts/gone.txt", "nothing")
    index = read(tmp_path / "texts", images=root, kind="text")
    assert captions(index) == {"a.jpg": ("a cat",), "sub/c.webp": ("a tree",)}
    assert index.report.orphans == ("gone.txt",)


@pytest.mark.parametrize("kind", ["text", "json_beside", "kohya"])
def test_a_folder_of_captions_at_the_places_of_pictures_is_told_by_itself(kind, tmp_path):
    names = ("3_x/a.jpg", "5_y/b.png") if kind == "kohya" else ("a.jpg", "sub/b.png")
    root = pictures(tmp_path / "images", *names)
    suffix, content = (".json", {"caption": "a cat"}) if kind == "json_beside" else (".txt", "a cat")
    for name in names:
        write((tmp_path / "texts" / name).with_suffix(suffix), content)
    for index in (read(tmp_path / "texts", images=root), read_index(root, tmp_path / "texts")):
        assert index.report.kind == kind and captions(index) == dict.fromkeys(names, ("a cat",))
        assert index.repeats == ((3.0, 5.0) if kind == "kohya" else (1.0, 1.0))


def test_a_folder_of_texts_that_fit_no_picture_is_refused_with_where_they_would_be(root, tmp_path):
    write(tmp_path / "texts/other/a.txt", "a cat")
    with pytest.raises(InputError, match=r"no captions were found: no \.txt.* lies where a picture lies in .*images"):
        read(tmp_path / "texts", images=root)


@CASED
def test_a_folder_of_texts_in_other_case_is_told_by_itself(root, tmp_path):
    write(tmp_path / "texts/A.txt", "a cat")
    assert captions(read(tmp_path / "texts", images=root)) == {"a.jpg": ("a cat",)}


def test_json_beside_pictures_as_of_spright_and_img2dataset(root):
    write(root / "a.json", {"original_caption": "a cat", "spatial_caption": "a cat on the left"})
    write(root / "sub/c.json", {"caption": ["a tree"], "width": 3})
    index = read(root)
    assert index.report.kind == "json_beside"
    assert captions(index) == {"a.jpg": ("a cat on the left", "a cat"), "sub/c.webp": ("a tree",)}
    assert captions(read(root, columns=("original_caption", "caption")))["a.jpg"] == ("a cat",)
    write(root / "b.json", [1])
    (left_out,) = read(root).report.garbled
    assert left_out[0] == "b.json" and left_out[1].startswith("no JSON object")


def test_empty_text_files_are_counted(root):
    write(root / "a.txt", "x")
    write(root / "b.txt", b"")
    write(root / "sub/c.txt", " \n")
    index = read(root)
    assert index.report.empty == ("b.txt", "sub/c.txt") and index.report.uncaptioned == ("b.png", "sub/c.webp")
    assert "caption files that hold nothing: 2: b.txt, sub/c.txt" in str(index.report)


# ---- text that is not UTF-8 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_with_a_byte_order_mark_is_read(encoding, root, tmp_path):
    for name in LABELS.values():
        content = name[1] if isinstance(name[1], str) else json.dumps(name[1])
        content = content.replace("a tree", "ein Gr\u00fcn")
        file = write(tmp_path / name[0], content.encode(encoding))
        assert captions(read(file, images=root))["sub/c.webp"] == ("ein Gr\u00fcn",)
    write(root / "a.txt", "caf\u00e9".encode(encoding))
    assert captions(read(root)) == {"a.jpg": ("caf\u00e9",)}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("caf\u00e9".encode("cp1252"), r"byte 3 is 0xe9, it looks like Windows-1252 \(cp1252\)"),
        ("caf\u00e9 and more".encode("utf-16-le"), "UTF-16 without a byte order mark"),
        (b"\xff\xfea", "begins as UTF-16 and is damaged"),
        (b"caf\x81\xe9", r"byte 3 is 0x81\)"),
    ],
)
def test_other_text_is_refused_with_what_it_seems_to_be(content, what):
    with pytest.raises(ValueError, match=what):
        decode(content)


def test_a_file_in_another_encoding_is_named(root, tmp_path):
    file = write(tmp_path / "c.csv", "filepath,title\na.jpg,caf\u00e9\n".encode("cp1252"))
    with pytest.raises(InputError, match=r"c\.csv can't be read.*cp1252.*save it as UTF-8"):
        read(file, images=root)


# ---- names ----------------------------------------------------------------------------------------------------------


@CASED
def test_other_case_is_found_where_one_file_fits_and_counted(root, tmp_path):
    file = write(tmp_path / "c.json", {"A.JPG": ["a cat"], "SUB\\C.WebP": ["a tree"], "b.png": ["a dog"]})
    index = read(file, images=root)
    assert list(captions(index)) == ["a.jpg", "b.png", "sub/c.webp"]
    assert index.report.respelled == (("A.JPG", "a.jpg"), ("SUB\\C.WebP", "sub/c.webp"))
    assert "found under another spelling: 2: A.JPG -> a.jpg" in str(index.report)


@CASED
def test_other_case_that_fits_several_files_is_a_problem(root, tmp_path):
    pictures(root, "A.jpg")
    with pytest.raises(InputError, match=r"several others fit but for case: a\.JPG \(A\.jpg or a\.jpg\)"):
        read(write(tmp_path / "c.json", {"a.JPG": ["x"], "b.png": ["y"]}), images=root)
    assert list(captions(read(write(tmp_path / "c.json", {"a.jpg": ["x"]}), images=root))) == ["a.jpg"]


@CASED
def test_text_files_in_other_case_are_found(root):
    write(root / "A.TXT", "a cat")
    write(root / "Sub.txt", "nothing")
    index = read(root, kind="text")
    assert captions(index) == {"a.jpg": ("a cat",)} and index.report.orphans == ("Sub.txt",)
    assert index.report.respelled == (("A.TXT", "a.jpg"),)


@pytest.mark.skipif(sys.platform == "darwin", reason="one form only there")
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_accents_are_found_in_either_unicode_form(form, tmp_path):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    root = pictures(tmp_path / "images", unicodedata.normalize(form, "\u00e9t\u00e9/caf\u00e9.jpg"))
    name = unicodedata.normalize(other, "\u00e9t\u00e9/caf\u00e9.jpg")
    index = read(write(tmp_path / "c.json", {name: ["x"]}), images=root)
    assert len(index) == 1 and len(index.report.respelled) == 1 and index.paths[0].is_file()


def test_paths_that_begin_too_high_or_too_low_get_a_hint(root, tmp_path):
    with pytest.raises(InputError, match="begin with 'images': give the folder above it"):
        read(write(tmp_path / "c.json", {"images/a.jpg": ["x"]}), images=root)
    with pytest.raises(InputError, match=r"There is sub/c\.webp: give"):
        read(write(tmp_path / "c.json", {"c.webp": ["x"]}), images=root)


def test_a_name_of_thousands_of_folders_is_missing(root, tmp_path):
    with pytest.raises(InputError, match="1 of the pictures"):
        read(write(tmp_path / "c.json", {"a/" * 50_000 + "a.jpg": ["x"]}), images=root)


# ---- links ----------------------------------------------------------------------------------------------------------


@LINKS
def test_links_out_of_the_folder_are_left_out_and_listed(root, tmp_path):
    outside = pictures(tmp_path / "private", "p.jpg", "deep/q.jpg")
    write(outside / "p.txt", "private")
    (root / "link.jpg").symlink_to(outside / "p.jpg")
    (root / "link.txt").symlink_to(outside / "p.txt")
    (root / "folder").symlink_to(outside)
    (root / "b.txt").symlink_to(outside / "p.txt")
    write(root / "a.txt", "a cat")
    index = read(root)
    assert captions(index) == {"a.jpg": ("a cat",)}
    assert index.report.linked == ("b.txt", "folder", "link.jpg", "link.txt")
    assert "links that were not followed: 4: b.txt, folder, link.jpg, link.txt" in str(index.report)
    names = ("a.jpg", "link.jpg", "folder/p.jpg", "folder/deep/q.jpg")
    index = read(write(tmp_path / "c.json", {name: ["x"] for name in names}), images=root)
    assert list(captions(index)) == ["a.jpg"] and index.report.linked == names[1:] and index.report.listed == 4
    with pytest.raises(InputError, match="links out of"):
        read(write(tmp_path / "c.json", {"link.jpg": ["x"]}), images=root)


@LINKS
def test_links_within_the_folder_are_found_by_name_and_not_walked_into(root, tmp_path):
    (root / "latest").symlink_to(root / "sub")
    (root / "loop").symlink_to(root)
    (root / "same.jpg").symlink_to(root / "a.jpg")
    index = read(write(tmp_path / "c.json", {"latest/c.webp": ["x"], "same.jpg": ["y"]}), images=root)
    assert list(captions(index)) == ["latest/c.webp", "same.jpg"] and index.report.linked == ()
    for name in ("a", "same", "sub/c"):
        write(root / f"{name}.txt", name)
    index = read(root)
    assert list(captions(index)) == ["a.jpg", "same.jpg", "sub/c.webp"]
    assert index.report.linked == ("latest", "loop")


@LINKS
def test_a_picture_folder_may_itself_be_a_link(root, tmp_path):
    (tmp_path / "alias").symlink_to(root)
    write(root / "a.txt", "a cat")
    assert len(read(tmp_path / "alias")) == 1


def test_no_file_is_looked_at_by_itself(root, monkeypatch):
    """Reading a folder lists it: a system call for each of a million files would take minutes."""
    for name in ("a", "b", "sub/c"):
        write(root / f"{name}.txt", name)
    looked = []
    for name in ("stat", "lstat", "readlink"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda path, *a, _real=real, **k: looked.append(str(path)) or _real(path, *a, **k)
        )
    folder = Folder(root)
    assert len([None for _, listed in folder.walk() for _ in listed.files]) == 6
    assert folder.find("sub/c.webp").paths == ("sub/c.webp",)
    assert not [path for path in looked if path.endswith((".jpg", ".png", ".webp", ".txt"))]


# ---- several sources ------------------------------------------------------------------------------------------------


def test_sources_are_mixed_below_their_common_folder_with_weights(tmp_path):
    one = pictures(tmp_path / "one", "10_x/a.jpg", "1_y/b.jpg")
    write(one / "10_x/a.txt", "a cat")
    write(one / "1_y/b.txt", "a dog")
    two = pictures(tmp_path / "two", "a.jpg")
    index = mix([(read(one), 0.5), (read(write(two / "c.json", {"a.jpg": ["a tree", "a cat"]})), 2.0)])
    assert index.root == Path(os.path.realpath(tmp_path))
    assert index.pictures == (
        Picture("one/10_x/a.jpg", ("a cat",), 5.0),
        Picture("one/1_y/b.jpg", ("a dog",), 0.5),
        Picture("two/a.jpg", ("a tree", "a cat"), 2.0),
    )
    assert all(path.is_file() for path in index.paths)
    assert index.report.kind == "kohya and json" and index.report.listed == 3 and index.report.shared == 1


def test_a_picture_in_two_sources_keeps_both_captions_and_the_larger_weight(root, tmp_path):
    whole = read(write(tmp_path / "1.json", {"a.jpg": ["one"], "sub/c.webp": ["two"], "b.png": []}), images=root)
    part = read(write(tmp_path / "2.json", {"c.webp": ["three", "two"]}), images=root / "sub")
    index = mix([(whole, 1.0), (part, 3.0)])
    assert index.pictures == (Picture("a.jpg", ("one",), 1.0), Picture("sub/c.webp", ("two", "three"), 3.0))
    assert index.report.uncaptioned == ("b.png",)


@pytest.mark.parametrize("weight", [0, -1, 1_000_001, float("nan"), float("inf")])
def test_weights_are_positive(weight, root):
    write(root / "a.txt", "x")
    with pytest.raises(InputError, match="positive"):
        mix([(read(root), weight)])


def test_a_source_is_written_as_kind_place_pictures_and_weight(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path, "train/a.jpg", "odd=2/a.jpg")
    Source = sources.Source
    assert parse("train", KINDS) == Source("train")
    assert parse("coco:c.json@train=0.5", KINDS) == Source("c.json", "coco", "train", 0.5)
    assert parse("train=3", KINDS) == Source("train", weight=3.0)
    assert parse("odd=2", KINDS) == Source("odd=2")
    assert parse("C:\\train", KINDS) == Source("C:\\train")
    assert parse("me@home.json", KINDS) == Source("me@home.json")
    assert parse("coco:c.json@gone", KINDS) == Source("c.json@gone", "coco")  # neither is there
    write(tmp_path / "c.json", {})
    assert parse("coco:c.json@gone=2", KINDS) == Source("c.json", "coco", "gone", 2.0)
    with pytest.raises(InputError, match=r"^There is no folder gone\. "):
        read("c.json", images="gone")
    for text in ("s3://bucket/0.tar", "file:shards/{0..9}.tar", "s3://bucket/folder", "C:/gone", "train=1000000"):
        assert parse(text, KINDS).place == text.removesuffix("=1000000")
    for text, what in (
        ("train=x", "no weight"),
        ("train=0", "not above 0"),
        ("train=1000001", "above 1,000,000"),
        ("coco:", "names no place"),
        ("c.json@", "no folder of pictures after the @"),
        ("foo:c.json", "foo is no kind of captions, and there is no foo:c.json; choose one of imagefolder, "),
        ("foo:c.json@train=2", "foo is no kind"),
    ):
        with pytest.raises(InputError, match=what):
            parse(text, KINDS)


@pytest.mark.skipif(sys.platform == "win32", reason="names have no colon there")
def test_a_folder_with_a_colon_in_its_name_is_that(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path, "12:30 photos/a.jpg", "coco/a.jpg")
    assert parse("12:30 photos=2", KINDS) == sources.Source("12:30 photos", weight=2.0)


def test_problems_of_one_file_come_at_once(root, tmp_path):
    broken = {**COCO, "annotations": [*COCO["annotations"], {"image_id": 77, "caption": "x"}, {"image_id": 1}]}
    broken["images"] = [*COCO["images"], {"id": 9, "file_name": "../x.jpg"}, {"id": 10, "file_name": "gone.jpg"}]
    with pytest.raises(InputError) as error:
        read(write(tmp_path / "c.json", broken), images=root)
    assert len(str(error.value).split("\n")) == 4
