"""Captions from every kind into every other and back; what a kind cannot hold is said, with its count."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gmp.cli import main
from gmp.data.captions import Picture
from gmp.data.convert import convert, leading_phrases
from gmp.data.sources import KINDS, read
from gmp.data.sources import webdataset as tars
from gmp.errors import InputError
from gmp.files import write_json

from .test_sources import captions, pictures, write

THREE = {
    "a.jpg": ["a cat"],
    "sub/b.png": ["a dog, grey", 'a "grey" dog', "ein Hund \u00fc \U0001f415"],
    "sub/c.v2.webp": ["x;y|z"],
}
FORMS = [(kind, None) for kind in KINDS] + [
    ("csv", "c.tsv"),
    ("imagefolder", "metadata.csv"),
    ("imagefolder", "metadata.parquet"),
]
TARGETS = {
    "json": "c.json",
    "coco": "coco.json",
    "kohya_json": "meta.json",
    "imagefolder": "metadata.jsonl",
    "csv": "c.csv",
    "interrogator": "desc.csv",
    "text": "texts",
    "kohya": "kohya_texts",
    "json_beside": "jsons",
    "webdataset": "w.tar",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return pictures(tmp_path / "images", *THREE)


@pytest.fixture
def labels(tmp_path: Path, root: Path) -> Path:
    return write(tmp_path / "labels.json", THREE)


def back(made, root: Path):
    """What was written, read again."""
    if made.to == "webdataset":
        return tars.read(str(made.out))
    place = made.out if made.to in ("text", "kohya", "json_beside") else made.files[0]
    return read(place, kind=made.to, images=root)


# ---- every kind into every other ------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize(("first", "name"), FORMS)
def test_all_captions_come_through_every_pair_of_kinds(first, name, second, root, labels, tmp_path):
    if name == "metadata.parquet":
        pytest.importorskip("pyarrow")
    one = convert(labels, first, tmp_path / "out" / (name or TARGETS[first]), images=root)
    assert one.pictures == 3 and one.captions == 5
    where = {"images": root, "kind": first} if first != "webdataset" else {}
    place = one.out if first in ("text", "kohya", "json_beside") else one.files[0]
    if first == "webdataset" and second != "webdataset":  # its pictures are named as in it
        pictures(root, *(picture.path for picture in tars.read(str(place)).pictures))
    two = convert(place, second, tmp_path / "out2" / TARGETS[second], **where)
    assert (two.kind, two.to, two.pictures, two.captions) == (first, second, 3, 5)
    found = back(two, root)
    assert sorted(map(sorted, captions(found).values())) == sorted(map(sorted, THREE.values()))
    if "webdataset" not in (first, second):
        assert captions(found) == {path: tuple(texts) for path, texts in THREE.items()}
        assert one.lost == two.lost == ()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "webdataset"])
def test_a_file_in_the_picture_folder_is_found_there_again(kind, root, labels):
    made = convert(labels, kind, root, images=root)
    source = root if kind in ("text", "kohya", "json_beside", "imagefolder", "interrogator") else made.files[0]
    assert captions(read(source)) == {path: tuple(texts) for path, texts in THREE.items()}


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0\ufeff"), min_size=1, max_size=12).filter(str.strip)
HELD = [kind for kind in KINDS if kind not in ("text", "kohya", "kohya_json", "webdataset")]


@pytest.mark.parametrize("kind", HELD)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXT.map(str.strip), min_size=1, max_size=3, unique=True))
def test_any_text_comes_back_to_the_letter(kind, texts, root, tmp_path):
    file = write(tmp_path / "labels.json", {"a.jpg": texts})
    made = convert(file, kind, tmp_path / "out" / TARGETS[kind], images=root, force=True)
    assert captions(back(made, root)) == {"a.jpg": tuple(texts)} and made.lost == ()


@pytest.mark.parametrize("kind", ["text", "kohya", "kohya_json"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXT.map(str.strip))
def test_any_text_comes_back_as_one_caption_where_a_line_is_one(kind, text, root, tmp_path):
    file = write(tmp_path / "labels.json", {"a.jpg": [text]})
    made = convert(file, kind, tmp_path / "out" / TARGETS[kind], images=root, force=True)
    flat = " ".join(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"))
    assert captions(back(made, root)) == {"a.jpg": (flat.strip(),)}
    assert bool(made.lost) == (flat != text)


# ---- what is lost ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_line_breaks_are_kept_or_said_to_be_lost(kind, root, tmp_path):
    file = write(tmp_path / "labels.json", {"a.jpg": ["one\ntwo", "three\rfour"], "sub/b.png": ["five"]})
    made = convert(file, kind, tmp_path / TARGETS[kind], images=root)
    found = captions(back(made, root))["a.jpg"]
    if kind in ("text", "kohya", "kohya_json"):
        assert found == ("one two", "three four")
        assert made.lost == ("line breaks: those in 2 captions became spaces",)
    else:
        assert found == ("one\ntwo", "three\rfour")
        assert bool(made.lost) == (kind == "webdataset")


def kohya_folder(tmp_path: Path) -> Path:
    root = pictures(tmp_path / "kohya", "10_cat/a.jpg", "1_dog/b.jpg")
    write(root / "10_cat/a.txt", "a cat")
    write(root / "1_dog/b.txt", "a dog")
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_repeats_are_kept_by_kohya_folders_and_said_to_be_lost_by_all_others(kind, tmp_path):
    root = kohya_folder(tmp_path)
    made = convert(root, kind, tmp_path / "out" / TARGETS[kind])
    lost = f"repeats: those of 1 pictures, since {kind} has no place for them"
    assert made.lost == (() if kind == "kohya" else (lost,))


def test_single_visits_become_what_the_folders_of_kohya_say(tmp_path):
    root = pictures(tmp_path / "images", "3_foo/a.jpg", "3_foo/b.jpg", "5_bar/c.jpg", "1_x/d.jpg")
    file = write(tmp_path / "c.json", {path.relative_to(root).as_posix(): ["x"] for path in root.rglob("*.jpg")})
    made = convert(file, "kohya", tmp_path / "out", images=root)
    assert made.lost == ("repeats: those of 3 pictures are 1 and become what the folders' names say (3_foo, 5_bar)",)
    assert read(tmp_path / "out", images=root).repeats == (1.0, 3.0, 3.0, 5.0)


def test_pictures_that_share_a_text_file_are_counted(tmp_path):
    root = pictures(tmp_path / "images", "a.jpg", "a.png", "b.jpg", "b.png")
    file = write(tmp_path / "c.json", {"a.jpg": ["one"], "a.png": ["two"], "b.jpg": ["x"], "b.png": ["x"]})
    for kind in ("text", "json_beside"):
        made = convert(file, kind, tmp_path / kind, images=root)
        assert len(made.lost) == 1 and "1 files hold the captions of several" in made.lost[0]
        assert captions(back(made, root)) == dict.fromkeys(("a.jpg", "a.png"), ("one", "two")) | dict.fromkeys(
            ("b.jpg", "b.png"), ("x",)
        )


def test_pictures_without_captions_and_missing_ones_are_counted(root, tmp_path):
    file = write(tmp_path / "c.json", {"a.jpg": ["x"], "sub/b.png": [], "gone.jpg": ["y"]})
    with pytest.raises(InputError, match=r"gone\.jpg"):
        convert(file, "csv", tmp_path / "c.csv", images=root)
    made = convert(file, "csv", tmp_path / "c.csv", images=root, missing_ok=True)
    assert made.lost == ("pictures without captions: 1 left out", "pictures not found: 1 left out")


def test_half_characters_become_a_mark_and_are_counted(root, tmp_path):
    file = tmp_path / "c.json"
    file.write_text('{"a.jpg": ["a \\ud800 cat", "fine"]}')
    for kind in KINDS:
        made = convert(file, kind, tmp_path / "out" / TARGETS[kind], images=root)
        assert set(captions(back(made, root))["a.jpg"]) == {"a ? cat", "fine"}
        assert made.lost[0].startswith("characters: 1 captions")


# ---- tars -----------------------------------------------------------------------------------------------------------


def test_tars_are_as_webdataset_reads_them_and_hold_the_pictures_bytes(root, labels, tmp_path):
    made = convert(labels, "webdataset", tmp_path / "w.tar", images=root)
    found = list(webdataset.WebDataset(str(made.files[0]), shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in found] == ["a", "sub/b", "sub/c_v2"]
    for sample, (path, texts) in zip(found, THREE.items(), strict=True):
        assert sample["txt"].decode() == "\n".join(texts) + "\n"
        assert sample[path.rpartition(".")[2]] == (root / path).read_bytes()
    assert len(made.lost) == 1 and made.lost[0].startswith("names: 1 pictures have another one")


def test_names_in_tars_are_never_the_same(tmp_path):
    root = pictures(tmp_path / "images", "a.jpg", "a.png", "a_2.jpg", "b.JPG", "c.1.jpg", "c_1.jpg")
    file = write(tmp_path / "c.json", {path.name: [path.name] for path in root.iterdir()})
    made = convert(file, "webdataset", tmp_path / "w.tar", images=root)
    found = tars.read(str(made.files[0]))
    assert sorted(text for picture in found.pictures for text in picture.captions) == sorted(
        p.name for p in root.iterdir()
    )
    assert len(found) == 6 and not found.report.broken


def test_many_pictures_go_into_several_tars_and_come_back_from_their_folder(root, labels, tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "PER_TAR", 2)
    made = convert(labels, "webdataset", tmp_path / "shards", images=root)
    assert [path.name for path in made.files] == ["00000.tar", "00001.tar"]
    again = convert(tmp_path / "shards", "json", tmp_path / "c.json")
    assert again.kind == "webdataset"
    assert list(json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))) == [
        "00000/a.jpg",
        "00000/sub/b.png",
        "00001/sub/c_v2.webp",
    ]
    one = convert(tmp_path / "shards", "webdataset", tmp_path / "one.tar")
    assert sorted(p.captions for p in tars.read(str(one.out)).pictures) == sorted(map(tuple, THREE.values()))
    with tarfile.open(one.out) as archive:
        assert archive.extractfile("00000/a.jpg").read() == (root / "a.jpg").read_bytes()


def test_members_that_lead_out_of_a_tar_are_left_out(root, tmp_path):
    with tarfile.open(tmp_path / "w.tar", "w") as archive:
        for name in ("../../evil", "/abs", "fine"):
            for suffix, file in (("jpg", root / "a.jpg"), ("txt", write(tmp_path / "t.txt", "x"))):
                archive.add(file, f"{name}.{suffix}")
                archive.members[-1].name = f"{name}.{suffix}"
    index = tars.read(str(tmp_path / "w.tar"))
    assert list(captions(index)) in (["fine.jpg"], ["abs.jpg", "fine.jpg"])
    assert ("../../evil.jpg", "its name leads out of the tar") in index.report.broken
    made = convert(tmp_path / "w.tar", "text", tmp_path / "out")
    assert all(path.resolve().is_relative_to(tmp_path / "out") for path in made.files)


# ---- files that are there -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_replaced_unless_asked_for(kind, root, labels, tmp_path):
    out = tmp_path / "out" / TARGETS[kind]
    made = convert(labels, kind, out, images=root)
    before = [path.read_bytes() for path in made.files]
    with pytest.raises(InputError, match="exists; choose another place, or pass --force"):
        convert(write(tmp_path / "other.json", {"a.jpg": ["other"]}), kind, out, images=root)
    assert [path.read_bytes() for path in made.files] == before
    convert(tmp_path / "other.json", kind, out, images=root, force=True)
    assert captions(back(made, root))["a.jpg"] == ("other",) or kind in ("text", "kohya", "json_beside")


def test_pictures_are_not_touched(root, labels):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in root.rglob("*.*") if path.is_file()}
    for kind in KINDS:
        convert(labels, kind, root / ("w.tar" if kind == "webdataset" else "."), images=root, force=True)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before


@pytest.mark.parametrize(
    ("kind", "out", "what"),
    [
        ("json", "c.txt", r"end in \.json"),
        ("csv", "c.json", r"end in \.csv or \.tsv"),
        ("imagefolder", "captions.jsonl", r"called metadata\.jsonl"),
        ("text", "labels.json", "is a file"),
        ("webdataset", "labels.json", r"labels\.json is a file; let the name of a tar end in \.tar"),
        ("webdataset", "labels.json/w.tar", r"cannot be written: .*labels\.json is no folder"),
        ("text", "labels.json/texts", "is no folder"),
        ("csv", "labels.json/c.csv", "is no folder"),
        ("webdataset", "folder.tar", "is a folder; give the name of a tar"),
        ("flickr", "x", "choose one of"),
    ],
)
def test_names_that_do_not_fit_a_kind_are_refused(kind, out, what, root, labels, tmp_path):
    (tmp_path / "folder.tar").mkdir()
    for force in (False, True):
        with pytest.raises(InputError, match=what):
            convert(labels, kind, tmp_path / out, images=root, force=force)


# ---- the original scripts' converters, on their own examples --------------------------------------------------------


def test_a_label_file_with_folders_becomes_text_files_in_folders_with_all_captions(tmp_path):
    """The original takes the first caption, makes no folders, and cuts names at the first dot."""
    labels = {
        "data/9/0.jpg": ["a colorful background", "an ai generated image"],
        "data/10/1.jpg": ["in a forest"],
        "subpath/to/0001.v1.5.jpg": ["one", "two", "three"],
    }
    root = pictures(tmp_path / "images", *labels)
    convert(write(tmp_path / "labels.json", labels), "text", tmp_path / "individual_labels", images=root)
    texts = {path.relative_to(tmp_path / "individual_labels").as_posix() for path in tmp_path.rglob("*.txt")}
    assert texts == {"data/9/0.txt", "data/10/1.txt", "subpath/to/0001.v1.5.txt"}
    assert (tmp_path / "individual_labels/data/9/0.txt").read_text() == "a colorful background\nan ai generated image\n"


def test_a_label_file_of_lists_becomes_kohya_metadata(tmp_path):
    """The original opens the list of captions as a path."""
    labels = {"data/9/0.jpg": ["spatial", "original"]}
    root = pictures(tmp_path / "images", *labels)
    convert(write(tmp_path / "labels.json", labels), "kohya_json", tmp_path / "kohya.json", images=root)
    assert json.loads((tmp_path / "kohya.json").read_text()) == {"data/9/0.jpg": {"caption": "spatial\noriginal"}}


def test_a_file_of_paths_of_captions_becomes_kohya_metadata(tmp_path):
    """The input that the original expects."""
    root = pictures(tmp_path / "images", "data/9/0.jpg")
    write(tmp_path / "data/9/0.caption", "spatial\n")
    labels = write(tmp_path / "labels.json", {"data/9/0.jpg": "data/9/0.caption"})
    convert(labels, "kohya_json", tmp_path / "kohya.json", images=root)
    assert json.loads((tmp_path / "kohya.json").read_text()) == {"data/9/0.jpg": {"caption": "spatial"}}


def test_spright_becomes_one_label_file_as_by_the_original(tmp_path):
    root = pictures(tmp_path, "data/0/0.jpg", "data/10/1.jpg")
    write(root / "data/0/0.json", {"spatial_caption": "left", "original_caption": "a cat"})
    write(root / "data/10/1.json", {"original_caption": "a dog", "spatial_caption": "right"})
    convert(root, "json", tmp_path / "labels.json")
    assert json.loads((tmp_path / "labels.json").read_text()) == {
        "data/0/0.jpg": ["left", "a cat"],
        "data/10/1.jpg": ["right", "a dog"],
    }


def original_cut(prompt: str, most: int = 140) -> list[str]:
    """What the original script keeps of a prompt."""
    kept, length = [], 0
    for phrase in prompt.split(", "):
        if length + len(phrase) + 2 > most:
            break
        kept.append(phrase)
        length += len(phrase) + 2
    return kept


def test_prompts_of_clip_interrogator_stay_whole_unless_a_cut_is_asked_for(tmp_path):
    root = pictures(tmp_path, "a.jpg", "b.jpg")
    prompt = ", ".join(f"phrase number {n}" for n in range(20))
    with open(tmp_path / "desc.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "prompt"), ("a.jpg", prompt), ("b.jpg", "x" * 150 + ", short")])
    convert(root, "json", tmp_path / "whole.json")
    assert json.loads((tmp_path / "whole.json").read_text()) == {"a.jpg": [prompt], "b.jpg": ["x" * 150 + ", short"]}
    made = convert(root, "json", tmp_path / "cut.json", phrases=140)
    cut = json.loads((tmp_path / "cut.json").read_text())
    assert cut["a.jpg"] == original_cut(prompt)
    assert cut["b.jpg"] == ["x" * 150] and original_cut("x" * 150 + ", short") == []  # the original trains on ""
    assert made.lost == ("phrases: the last ones of 2 captions, cut at 140 characters",)


@given(st.text("ab, ", max_size=60), st.integers(1, 40))
def test_leading_phrases_are_the_originals_but_for_a_long_first_one(text, most):
    kept = original_cut(text, most)
    assert list(leading_phrases(text, most)) == (kept or [text.split(", ")[0]])


# ---- the command ----------------------------------------------------------------------------------------------------


def run(capsys, *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_the_command_converts_and_says_what_is_lost(root, tmp_path, capsys):
    file = write(tmp_path / "c.json", {"a.jpg": ["one\ntwo"], "sub/b.png": ["three"]})
    words = ("captions", "convert", file, "--images", root, "--to", "text", "--out", tmp_path / "texts")
    code, out, _ = run(capsys, *words, "--json")
    assert code == 0 and "json -> text: 2 pictures with 2 captions" in out
    assert "lost: line breaks: those in 1 captions became spaces" in out
    assert json.loads(out.splitlines()[-1])["lost"] == ["line breaks: those in 1 captions became spaces"]
    code, _, err = run(capsys, *words)
    assert code == 2 and "pass --force" in err
    code, out, _ = run(
        capsys, "captions", "convert", file, "--images", root, "--to", "csv", "--out", tmp_path / "c.tsv"
    )
    assert code == 0 and "nothing was lost" in out


def test_the_command_shows_kind_columns_counts_and_the_first_pairs(root, tmp_path, capsys):
    file = write(tmp_path / "c.csv", "image\tcaption\nA.jpg\ta cat\nsub/b.png\ta dog\n".replace("A", "a"))
    code, out, _ = run(capsys, "captions", "show", file, "--images", root, "--first", 1)
    assert code == 0 and "2 pictures with 2 captions" in out and "kind of captions: csv" in out
    assert "columns: pictures from 'image', captions from 'caption'; separated by tabs" in out
    assert "a.jpg\n    a cat" in out and "a dog" not in out
    code, out, _ = run(capsys, "captions", "show", kohya_folder(tmp_path), "--json")
    assert "visits in an epoch: 11" in out and json.loads(out.splitlines()[-1])["kind"] == "kohya"
    write_json({"a.jpg": ["x"]}, tmp_path / "c.json")
    convert(tmp_path / "c.json", "webdataset", tmp_path / "w.tar", images=root)
    code, out, _ = run(capsys, "captions", "show", tmp_path / "w.tar")
    assert "kind of captions: webdataset" in out and "a.jpg\n    x" in out
    code, out, _ = run(capsys, "captions", "kinds")
    assert all(kind in out for kind in KINDS)


def test_the_command_prints_no_control_character_of_a_caption_or_a_name(root, tmp_path, capsys):
    file = write(tmp_path / "c.json", {"a.jpg": ["a\x1b[2J cat\nand \x9b more"], "gone\x1b.jpg": ["x"]})
    words = (file, "--images", root, "--allow-missing")
    for more in (("show",), ("convert", "--to", "csv", "--out", tmp_path / "o.csv")):
        code, out, err = run(capsys, "captions", more[0], *words, *more[1:])
        assert code == 0 and not [c for c in out + err if c < " " and c != "\n" or c == "\x9b"]
    _, out, _ = run(capsys, "captions", "show", *words)
    assert r"    a\x1b[2J cat\nand \x9b more" in out.split("\n") and r"gone\x1b.jpg" in out


def test_the_command_refuses_to_show_less_than_no_picture_and_says_what_columns_are_not_used(
    root, labels, tmp_path, capsys
):
    code, _, err = run(capsys, "captions", "show", labels, "--images", root, "--first", -1)
    assert code == 2 and "--first -1: give how many" in err
    code, out, _ = run(capsys, "captions", "show", labels, "--images", root, "--first", 0, "--columns", "a,b")
    assert code == 0 and "a.jpg" not in out and "columns a, b: not used" in out
    tar = convert(labels, "webdataset", tmp_path / "w.tar", images=root).out
    for more in (("show",), ("convert", "--to", "json", "--out", tmp_path / "again.json")):
        _, out, _ = run(capsys, "captions", more[0], tar, *more[1:], "--columns", "a,b")
        assert "columns a, b: not used, since captions of the kind webdataset have none" in out


def test_what_was_converted_into_a_folder_of_texts_is_read_from_there(root, labels, tmp_path, capsys):
    convert(labels, "text", tmp_path / "texts", images=root)
    code, out, _ = run(capsys, "captions", "show", tmp_path / "texts", "--images", root)
    assert code == 0 and "3 pictures with 5 captions" in out and "kind of captions: text" in out


def test_captions_are_read_and_written_without_torch(root, labels, tmp_path):
    code = (
        "import sys; from gmp.data.convert import convert; "
        f"convert({str(labels)!r}, 'csv', {str(tmp_path / 'c.csv')!r}, images={str(root)!r}); "
        "print([m for m in ('torch', 'PIL', 'pyarrow') if m in sys.modules])"
    )
    given = {"capture_output": True, "text": True, "check": True}
    found = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, **given)
    assert found.stdout.strip() == "[]"


def test_pictures_of_several_sources_are_read_by_the_commands_that_take_pictures(root, labels, tmp_path, capsys):
    import argparse

    from gmp.commands.towers import add_pictures, has_pictures, read_pictures

    parser = argparse.ArgumentParser()
    add_pictures(parser, required=False)
    other = kohya_folder(tmp_path)
    options = parser.parse_args(["--images", str(root), "--captions", str(labels), "--source", f"{other}=0.5"])
    index = read_pictures(options)
    assert [(p.path, p.repeats) for p in index.pictures[-2:]] == [
        ("kohya/10_cat/a.jpg", 5.0),
        ("kohya/1_dog/b.jpg", 0.5),
    ]
    assert index.pictures[0] == Picture("images/a.jpg", ("a cat",)) and has_pictures(options)
    assert "captions: json and kohya" in capsys.readouterr().err
    with pytest.raises(InputError) as error:
        read_pictures(parser.parse_args(["--images", str(tmp_path / "no"), "--source", str(tmp_path / "none")]))
    assert len(str(error.value).split("\n")) == 2
    with pytest.raises(InputError) as error:  # faults of writing come with those of reading
        read_pictures(parser.parse_args(["--source", f"{other}=2000000", "--source", "foo:x", "--source", "no"]))
    lines = str(error.value).split("\n")
    assert [word in line for word, line in zip(("1,000,000", "foo is no kind", "folder no"), lines, strict=True)] == [
        True,
        True,
        True,
    ]
    with pytest.raises(InputError, match="are of --images"):
        read_pictures(parser.parse_args(["--captions", str(labels), "--source", str(other)]))
    with pytest.raises(InputError, match="folder as --images, or any place as --source"):
        read_pictures(parser.parse_args([]))


def test_commands_tell_of_pictures_outside_of_kohyas_folders_without_control_characters(tmp_path):
    from gmp.commands.towers import left_out

    root = pictures(kohya_folder(tmp_path), "stray.png")
    (line,) = left_out(read(root))[:1]
    assert line.startswith("captions: 10_cat and 1_dog look like kohya's") and "stray.png lies outside" in line
    index = read(root)
    loud = replace(index, report=replace(index.report, notes=("\x1b[2J",), missing=("\x07",)))
    assert left_out(loud)[0] == r"captions: \x1b[2J" and r"left out: not found: 1: \x07" in left_out(loud)


def test_a_repair_takes_folders_or_tars_and_no_mixture(root, labels, tmp_path, capsys):
    import argparse

    from gmp.commands.towers import add_pictures
    from gmp.commands.training import _pictures

    parser = argparse.ArgumentParser()
    add_pictures(parser, required=False)
    parser.add_argument("--data", nargs="+")
    tar = convert(labels, "webdataset", tmp_path / "w.tar", images=root).files[0]
    place = f"json:{labels}@{root}"
    assert len(_pictures(parser.parse_args(["--source", place]))) == 3
    assert [Path(one.url) for one in _pictures(parser.parse_args(["--source", str(tar)])).files] == [tar]
    for words, what in (
        (["--source", place, "--source", str(tar)], "not mixed with folders"),
        (["--source", f"webdataset:{tar}=2"], "not mixed with folders or weighed"),
        (["--source", place, "--data", str(tar)], "either a folder as --images or any --source"),
        ([], "give captioned pictures"),
        (["--data", str(tar), "--kind", "json"], "tars hold their captions"),
    ):
        with pytest.raises(InputError, match=what):
            _pictures(parser.parse_args(words))
