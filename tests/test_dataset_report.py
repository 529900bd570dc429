"""The report of a data set: every kind of finding is found where it was planted, nowhere else, and can be acted on."""

from __future__ import annotations

import contextlib
import csv
import html
import io
import json
import os
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from gmp.cli import main
from gmp.data.captions import read_index
from gmp.dataset_report.captions import read_texts
from gmp.dataset_report.clean import clean, fixes, write_cleaned, write_fixes
from gmp.dataset_report.findings import KINDS, OPTIONAL, Limits
from gmp.dataset_report.page import page
from gmp.dataset_report.pairs import Fits, lowest_pairs, read_fits, wrong_pairs
from gmp.dataset_report.report import as_json, examine, lines
from gmp.dataset_report.sheet import contact_sheet
from gmp.errors import InputError
from gmp.events import finish
from gmp.features import index_keys
from gmp.join import join
from gmp.layouts import read_text, read_vision
from gmp.measure import text_features
from gmp.tokenizer import Tokenizer
from gmp.world.models import ASSETS, ORIGINAL
from gmp.world.write import write_world

WHITE = (255, 255, 255)
LONG = "a photo of a very long road, " * 40


def photo(seed, width=300, height=260):
    noise = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    """A folder with one thing wrong of every kind, among ten pictures that are as they should be."""
    root = tmp_path_factory.mktemp("messy") / "my <pictures> & more"
    root.mkdir()
    for number in range(10):
        photo(number).save(root / f"good{number}.png")
        (root / f"good{number}.txt").write_text(f"a photo of the thing number {number} on a table")

    def add(name, image, caption):
        if image is not None:
            image.save(root / name)
        (root / name).with_suffix(".txt").write_text(caption, encoding="utf-8")

    add("small.png", photo(20, 100, 300), "a small picture of a house")
    add("long.png", photo(21, 1200, 300), "a long picture of a wall")
    add("blank.png", Image.new("RGB", (300, 300), WHITE), "a white cat in the snow")
    add("near1.jpg", photo(22, 400, 300), "a first picture of a tree")
    add("near2.jpg", photo(22, 400, 300).resize((320, 240)), "a second picture of a tree")
    add("copy1.png", photo(23), "a picture of a car")
    shutil.copy(root / "copy1.png", root / "copy2.png")
    (root / "copy2.txt").write_text("a red car in the street")
    add("shared1.png", photo(24), "a nice photo of the sea")
    add("shared2.png", photo(25), "a nice photo of the sea")
    add("truncated.png", photo(26), LONG)
    add("command.png", photo(27), "a photo of a <|endoftext|> mark")
    add("garbled.png", photo(29), "")
    (root / "garbled.txt").write_bytes(b"a caf\xe9 in the morning")
    add("german.png", photo(28), "Ein Mann sitzt auf einer Bank\na man sits on a bench")
    add("twice.png", photo(29), "the same words\nthe same words")
    add("broken.jpg", None, "a broken picture of a boat")
    (root / "broken.jpg").write_bytes(b"no picture")
    photo(30).save(root / "silent.png")
    add("empty.png", photo(31), "  \n")
    (root / "orphan.txt").write_text("there is nothing here")
    return root


@pytest.fixture(scope="module")
def report(messy, tmp_path_factory):
    return finish(examine(read_index(messy), tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Pictures of the small world, of which the captions of every eighth are another one's."""
    root = tmp_path_factory.mktemp("world") / "world"
    finish(write_world(root, 160, 3))
    captions = json.loads((root / "captions.json").read_text())
    names = sorted(captions)
    wrong = names[::8]
    moved = dict(zip(wrong, [*wrong[1:], wrong[0]], strict=True))
    (root / "wrong.json").write_text(json.dumps({name: captions[moved.get(name, name)] for name in names}))
    return root, set(wrong)


@pytest.fixture(scope="module")
def clip():
    text = read_text(ASSETS / ORIGINAL)
    return join(text, read_vision(ASSETS / ORIGINAL), text)


def pictures_of(report, name):
    return [case.picture for case in report[name].cases]


# --- findings


PLANTED = {
    "unreadable": ["broken.jpg"],
    "not_found": [],
    "uncaptioned": ["empty.png", "garbled.png", "silent.png"],
    "unlisted": [],
    "orphans": ["orphan.txt"],
    "linked": [],
    "small": ["small.png"],
    "aspect": ["long.png"],
    "blank": ["blank.png"],
    "duplicates": ["copy2.png"],
    "near_duplicates": ["near2.jpg"],
    "garbled": ["garbled.txt"],
    "empty": ["empty.txt"],
    "repeated": [],
    "shared": ["shared1.png", "shared2.png"],
    "truncated": ["truncated.png"],
    "commands": ["command.png"],
    "language": ["german.png"],
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_was_planted_is_found_and_nothing_else(report, name):
    assert sorted(pictures_of(report, name)) == PLANTED[name]


def test_every_kind_is_told_but_wrong_pairs_without_a_clip(report):
    assert [finding.name for finding in report.findings] == [name for name in KINDS if name != "wrong_pairs"]
    assert any("--vision" in note for note in report.notes)
    assert len(report["repeated"]) == 1 and report.readable == 23


def test_cases_say_what_exactly_is_wrong(report):
    details = {name: report[name].cases[0].detail for name in PLANTED if report[name].cases}
    assert details["small"] == "100 × 300 pixels; 224 are needed"
    assert details["aspect"] == "1200 × 300 pixels; the middle 25 % are seen"
    assert (
        details["duplicates"] == "the same file as copy1.png" and report["duplicates"].cases[0].copy_of == "copy1.png"
    )
    assert details["near_duplicates"] == "looks like near1.jpg (320 × 240 and 400 × 300 pixels)"
    assert details["language"] == "German" and "not a picture" in details["unreadable"]
    assert report["language"].cases[0].caption == "Ein Mann sitzt auf einer Bank"
    assert re.fullmatch(r"\d+ tokens; 77 are read", details["truncated"])


def test_lengths_are_those_of_the_whole_captions():
    captions = ["", "a cat", LONG, "cat " * 74, "cat " * 75, "cat " * 76, "cat " * 2000]
    texts = finish(read_texts(captions, 77))
    assert texts.lengths.tolist()[0] == 2 and texts.lengths.tolist()[3:] == [76, 77, 78, 1024]
    assert texts.lengths[1] == 4
    assert texts.lengths[2] == Tokenizer(1024)([LONG]).ids[0].tolist().index(49407) + 1
    assert finish(read_texts(captions, 248)).lengths.tolist() == texts.lengths.tolist()


def test_the_share_that_is_not_english_leaves_out_what_is_unknown():
    texts = finish(read_texts(["a man on a bench", "Ein Mann sitzt auf einer Bank", "Berlin", "XY-9"], 77))
    assert texts.foreign == 0.5 and texts.counts == {"unknown": 2, "en": 1, "de": 1}
    assert np.isnan(finish(read_texts(["Berlin"], 77)).foreign)


def test_limits_move_what_is_found(messy, tmp_path):
    found = finish(examine(read_index(messy), tmp_path, Limits(size=301, aspect=4, near=0, context=10)))
    assert len(found["small"]) > 10 and not found["aspect"].cases
    assert len(found["truncated"]) > 5


@pytest.mark.parametrize(
    ("limits", "words"),
    [(Limits(size=0), "1 pixel"), (Limits(aspect=0.5), "1 or more"), (Limits(context=1), "2 tokens"),
     (Limits(near=17), "0 to 16")],
)  # fmt: skip
def test_limits_that_are_none_are_refused(messy, tmp_path, limits, words):
    with pytest.raises(InputError, match=words):
        finish(examine(read_index(messy), tmp_path, limits))


def test_pictures_that_the_captions_do_not_name_are_found(messy, tmp_path):
    (tmp_path / "some.json").write_text(json.dumps({"good0.png": ["a thing"], "gone.png": ["another"]}))
    found = finish(examine(read_index(messy, tmp_path / "some.json", True), tmp_path))
    assert pictures_of(found, "not_found") == ["gone.png"]
    assert "good1.png" in pictures_of(found, "unlisted") and "good0.png" not in pictures_of(found, "unlisted")


@pytest.mark.skipif(os.name == "nt", reason="links and named pipes take POSIX")
def test_what_is_no_file_of_the_folder_is_no_picture_without_a_caption(tmp_path):
    root = tmp_path / "pictures"
    root.mkdir()
    for name in ("pictures/named.png", "pictures/beside.png", "outside.png"):
        photo(len(name)).save(tmp_path / name)
    (root / "folder.png").mkdir()
    (root / "nowhere.png").symlink_to("gone.png")
    (root / "link.png").symlink_to("../outside.png")
    os.mkfifo(root / "pipe.png")
    found = finish(examine(read_index_of(root, {"named.png": ["a thing"]}), tmp_path / "cache"))
    assert pictures_of(found, "unlisted") == ["beside.png"]


def test_copies_with_one_caption_are_no_shared_caption(tmp_path):
    for name in ("a", "b"):
        photo(0).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a thing")
    found = finish(examine(read_index(tmp_path), tmp_path / "cache"))
    assert not found["shared"].cases and len(found["duplicates"]) == 1


def test_red_and_blue_icons_of_one_shape_are_no_near_duplicates(tmp_path):
    for name, colour in (("red", (150, 0, 0)), ("blue", (0, 0, 250)), ("red2", (150, 0, 4))):
        image = Image.new("RGB", (300, 300), WHITE)
        image.paste(colour, (80, 60, 200, 220))
        image.paste((30, 30, 30), (10, 10, 60, 40))
        image.save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"a {name} icon")
    found = finish(examine(read_index(tmp_path), tmp_path / "cache"))
    assert pictures_of(found, "near_duplicates") == ["red2.png"]


def test_two_colours_as_bright_as_each_other_are_no_blank_picture(tmp_path):
    image = Image.new("RGB", (300, 300), (140, 0, 0))
    image.paste((0, 71, 0), (0, 0, 150, 300))
    image.save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a flag")
    found = finish(examine(read_index(tmp_path), tmp_path / "cache"))
    assert found.survey.looks.contrasts[0] <= 8 and not found["blank"].cases


def test_pictures_that_are_known_to_be_broken_are_told_too(messy, tmp_path):
    index = read_index(messy).without({"good0.png": "it was broken before"})
    found = finish(examine(index, tmp_path))
    assert sorted(pictures_of(found, "unreadable")) == ["broken.jpg", "good0.png"]
    assert not found["unlisted"].cases


def test_where_all_are_broken_there_is_a_report_but_no_cleaned_index(tmp_path, clip):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"nothing" * number)
        (tmp_path / f"{number}.txt").write_text("a thing")
    found = finish(examine(read_index(tmp_path), tmp_path / "cache", clip=clip))
    assert found.readable == 0 and len(found["unreadable"]) == 3 and found.fits is None
    assert any("no picture can be read" in note for note in found.notes)
    assert contact_sheet(found).size and "3" in page(found) and lines(found)
    with pytest.raises(InputError, match="Nothing is left"):
        clean(found)


# --- pairs


def naive_fits(images, texts, owners):
    """Shares, pair by pair, over all others."""
    images, texts = F.normalize(images, dim=-1).double(), F.normalize(texts, dim=-1).double()
    rows = []
    for c, i in enumerate(owners):
        own = images[i] @ texts[c]
        pictures = [images[k] @ texts[c] > own + 1e-6 for k in range(len(images)) if k != i]
        captions = [images[i] @ texts[d] > own + 1e-6 for d in range(len(texts)) if owners[d] != i]
        rows.append((own.item(), np.mean(pictures), np.mean(captions)))
    return np.array(rows).T


def fits_of(index, clip, cache):
    def both():
        keys = yield from index_keys(index, cache)
        tokenize = Tokenizer(clip.config.text.context_length)
        return (yield from read_fits(clip, index, {}, keys, tokenize, cache, torch.device("cpu")))

    return finish(both())


def test_fits_are_those_of_comparing_every_pair_with_all_others(world, clip, tmp_path, monkeypatch):
    from gmp.dataset_report import pairs
    from gmp.features import embed_index

    monkeypatch.setattr(pairs, "CHUNK", 50)
    root, _ = world
    index = read_index(root, root / "wrong.json")
    index = replace(index, pictures=index.pictures[:40])
    found = fits_of(index, clip, tmp_path)
    _, features, _ = finish(embed_index(clip.build_vision(), index, tmp_path))
    ids = Tokenizer(clip.config.text.context_length)(index.captions()).ids
    cosines, pictures, captions = naive_fits(features[:], text_features(clip.build_text(), ids), index.owners())
    assert np.allclose(found.cosines, cosines, atol=1e-5)
    assert np.allclose(found.pictures_better, pictures, atol=1e-6)
    assert np.allclose(found.captions_better, captions, atol=1e-6)


def test_captions_of_other_pictures_are_found_and_true_ones_are_not(world, clip, tmp_path):
    root, wrong = world
    found = finish(examine(read_index(root, root / "wrong.json"), tmp_path, clip=clip, lowest=7))
    likely = pictures_of(found, "wrong_pairs")
    assert set(likely) <= wrong and len(set(likely)) > len(wrong) / 4
    assert len(found.lowest) == 7 and {case.picture for case in found.lowest} <= wrong
    assert found.lowest[0].caption in found.index.captions() and "cosine" in found.lowest[0].detail
    right = finish(examine(read_index(root, root / "captions.json"), tmp_path, clip=clip))
    assert not right["wrong_pairs"].cases and len(right.lowest) == 20


def test_a_random_pair_is_found_about_every_second_time():
    """What the report says of pairs that it does not list, for features that have nothing to do with each other."""
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, 300, 16, generator=generator)
    cosines, pictures, captions = naive_fits(images, texts, list(range(300)))
    fits = Fits(cosines, pictures, captions, 300)
    assert 0.4 < (fits.misfit > 0.5).mean() < 0.6


def test_a_few_pictures_are_too_few_to_tell_wrong_pairs_by(world, clip, tmp_path):
    root, _ = world
    index = read_index(root, root / "wrong.json")
    found = finish(examine(replace(index, pictures=index.pictures[:4]), tmp_path, clip=clip))
    assert not found["wrong_pairs"].cases and found.lowest
    assert any("too few" in note for note in found.notes)
    alone = finish(examine(replace(index, pictures=index.pictures[:1]), tmp_path, clip=clip))
    assert not alone["wrong_pairs"].cases and not alone.lowest


def test_pictures_that_cannot_be_read_have_no_fit(world, clip, tmp_path):
    root, _ = world
    shutil.copytree(root, tmp_path / "world")
    index = read_index(tmp_path / "world", tmp_path / "world" / "captions.json")
    index.paths[3].write_bytes(b"broken")
    found = finish(examine(index, tmp_path / "cache", clip=clip))
    lost = np.array([index.pictures[i].path == index.pictures[3].path for i in index.owners()])
    assert np.isnan(found.fits.cosines[lost]).all() and np.isfinite(found.fits.misfit[~lost]).all()
    assert index.pictures[3].path not in {case.picture for case in lowest_pairs(index, found.fits, 10**6)}
    assert not wrong_pairs(index, found.fits).cases


# --- what to do


def test_every_case_is_in_the_list_of_fixes(report, tmp_path):
    listed = fixes(report)
    assert len(listed) == sum(len(finding.cases) for finding in report.findings)
    assert [one["picture"] for one in listed] == sorted(one["picture"] for one in listed)
    assert write_fixes(report, tmp_path / "fixes.json") == len(listed)
    assert json.loads((tmp_path / "fixes.json").read_text(encoding="utf-8")) == listed
    write_fixes(report, tmp_path / "fixes.csv")
    with open(tmp_path / "fixes.csv", encoding="utf-8-sig", newline="") as file:
        assert list(csv.DictReader(file)) == listed
    broken = next(one for one in listed if one["picture"] == "broken.jpg")
    assert broken["problem"] == "unreadable" and broken["action"] == KINDS["unreadable"].action
    with pytest.raises(InputError, match=".json or .csv"):
        write_fixes(report, tmp_path / "fixes.txt")


def test_a_spreadsheet_is_given_no_formula(tmp_path):
    photo(0).save(tmp_path / "=cmd.png")
    found = finish(
        examine(read_index_of(tmp_path, {"=cmd.png": ["@SUM(A1)"], "=cmd2.png": ["a thing"]}), tmp_path / "c")
    )
    write_fixes(found, tmp_path / "fixes.csv")
    with open(tmp_path / "fixes.csv", encoding="utf-8-sig", newline="") as file:
        assert all(row["picture"].startswith("'=") for row in csv.DictReader(file))


def read_index_of(root, captions):
    (root / "captions.json").write_text(json.dumps(captions))
    return read_index(root, root / "captions.json", True)


def test_a_cleaned_index_has_what_can_be_trained_on(messy, report, tmp_path):
    before = {path.name: path.read_bytes() for path in messy.iterdir()}
    cleaned = clean(report)
    write_cleaned(cleaned, tmp_path / "cleaned.json")
    again = read_index(messy, tmp_path / "cleaned.json")
    kept = {picture.path: picture.captions for picture in again.pictures}
    expected = {picture.path: picture.captions for picture in report.index.pictures}
    del expected["broken.jpg"], expected["copy2.png"]
    expected["copy1.png"] = ("a picture of a car", "a red car in the street")
    assert kept == expected and cleaned.dropped == {"unreadable": 1, "duplicates": 1}
    assert {path.name: path.read_bytes() for path in messy.iterdir()} == before


def test_what_is_asked_for_is_left_out_too(report):
    kept = clean(report, ["small", "aspect", "blank", "near_duplicates", "language"])
    whole = clean(report).captions
    assert set(whole) - set(kept.captions) == {"small.png", "long.png", "blank.png", "near2.jpg"}
    assert kept.captions["german.png"] == ["a man sits on a bench"]
    assert kept.captions["near1.jpg"] == ["a first picture of a tree"]
    assert kept.dropped == {name: 1 for name in kept.dropped} and kept.pairs == sum(map(len, kept.captions.values()))
    with pytest.raises(InputError, match="shared cannot be left out"):
        clean(report, ["shared"])


def test_a_picture_without_a_caption_left_is_left_out_and_a_copy_takes_its_place(tmp_path):
    photo(0).save(tmp_path / "a.png")
    for name in ("b", "c"):
        shutil.copy(tmp_path / "a.png", tmp_path / f"{name}.png")
    photo(1).save(tmp_path / "d.png")
    german = "Ein Mann sitzt auf einer Bank"
    captions = {"a.png": [german], "b.png": ["a man", german], "c.png": ["a bench"], "d.png": [german]}
    found = finish(examine(read_index_of(tmp_path, captions), tmp_path / "cache"))
    assert clean(found, ["language"]).captions == {"b.png": ["a man", "a bench"]}
    assert clean(found).captions == {"a.png": [german, "a man", "a bench"], "d.png": [german]}


def test_of_pictures_that_look_the_same_one_stays_whatever_else_is_left_out(tmp_path):
    for name, width in (("a", 1201), ("b", 900), ("c", 700)):
        photo(0, 1200, 300).resize((width, width // 4)).save(tmp_path / f"{name}.png")
    photo(1, 400, 400).save(tmp_path / "d.png")
    captions = {"a.png": ["Ein Mann sitzt auf einer Bank"], "b.png": ["a man"], "c.png": ["men"], "d.png": ["a cat"]}
    found = finish(examine(read_index_of(tmp_path, captions), tmp_path / "cache"))
    assert pictures_of(found, "near_duplicates") == ["b.png", "c.png"]
    assert set(clean(found, ["near_duplicates", "language"]).captions) == {"b.png", "d.png"}
    assert set(clean(found, ["near_duplicates"]).captions) == {"a.png", "d.png"}


def test_how_often_pictures_are_visited_is_said_to_be_lost(report):
    index = report.index
    twice = replace(index, pictures=tuple(replace(picture, repeats=2.0) for picture in index.pictures))
    assert "not in this file" in clean(replace(report, index=twice)).notes[0] and not clean(report).notes


# --- in words, numbers and pictures


def test_the_json_form_is_json_and_counts_everything(report):
    found = json.loads(json.dumps(as_json(report), allow_nan=False))
    counts = {finding["name"]: finding["count"] for finding in found["findings"]}
    assert counts["repeated"] == 1 and counts["shared"] == 2 and counts["not_found"] == 0
    assert found["counts"]["pairs"] == len(report.index.captions()) == sum(found["lengths"]["captions"])
    assert found["counts"]["pictures"] == report.index.report.listed
    assert all(finding["meaning"] and finding["action"] for finding in found["findings"])
    assert str(report.index.root.parent) not in json.dumps(found)


def test_the_terminal_is_told_every_finding_and_what_it_means(report):
    told = "\n".join(lines(report))
    for finding in report.findings:
        assert (f"{finding.kind.title}: {len(finding)}" in told) == bool(len(finding))
        assert (finding.kind.meaning in told) == bool(len(finding))
    assert "23 pictures of 27" in told and "pictures that are named but not there" in told


def test_what_the_number_of_pictures_means_is_told(report):
    """By the settings that a repair has without any: 5 % are held out, and a step has 256 pairs."""
    few, certain = as_json(report)["remarks"]
    assert few.startswith("23 pictures, of which 2 would be held out, are fewer than one step of 256 pairs")
    assert "± 69 percentage points" in certain and few in lines(report) and html.escape(few) in page(report)
    # the widest 95 % interval of a share that is measured on so many, by the binomial's normal approximation
    assert round(100 * 1.96 * (0.25 / 2) ** 0.5) == 69


def test_what_is_found_of_every_picture_is_not_counted_in_the_headline_but_named(tmp_path, clip):
    for number in range(4):
        photo(number, 64 + number, 64 + number).save(tmp_path / f"{number}.png")
    captions = {f"{number}.png": [f"a photo of the thing number {number} on a table"] for number in range(4)}
    captions["3.png"] = ["Ein Mann sitzt auf einer Bank"]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    index = read_index_of(tmp_path, captions | {"broken.png": ["a photo of a broken thing on a table"]})
    found = finish(examine(index, tmp_path / "cache"))
    assert len(found["small"]) == 4
    assert as_json(found)["summary"] == (
        "4 pictures of 5 can be trained on; 2 pictures or files should be looked at, besides what was found of all: "
        "pictures smaller than the vision tower's input."
    )
    small = as_json(found)["remarks"][-1]
    assert small.startswith("All pictures are smaller than 224 pixels, which are assumed") and "--vision" in small
    chosen = finish(examine(index, tmp_path / "cache", Limits(size=100)))
    assert as_json(chosen)["remarks"][-1] == "All pictures are smaller than 100 pixels."
    for limits, model in ((Limits(size=64), clip), (Limits(size=66), None)):  # none is, and not all are
        other = finish(examine(index, tmp_path / "cache", limits, clip=model))
        assert not any(one.startswith("All pictures") for one in as_json(other)["remarks"])
        count = 2 + len(other["small"])
        assert f"; {count} pictures or files should be looked at." in as_json(other)["summary"]


def test_nothing_wrong_is_said_so(tmp_path):
    photo(0).save(tmp_path / "a.png")
    found = finish(examine(read_index_of(tmp_path, {"a.png": ["a photo of a cat"]}), tmp_path / "cache"))
    assert lines(found)[0] == "Nothing was found wrong with 1 picture and 1 pair."


def test_the_page_is_whole_and_escapes_what_others_wrote(report):
    found = page(report)
    assert "my &lt;pictures&gt; &amp; more" in found and "<pictures>" not in found
    assert "&lt;|endoftext|&gt;" in found and "<script" not in found and "http" not in found.replace("http-equiv", "")
    assert found.count('src="data:image/') == found.count("<img") == 2
    assert str(report.index.root.parent) not in found
    for finding in report.findings:
        assert (f"<h3>{html.escape(finding.kind.title)}" in found) == bool(len(finding))


def test_the_contact_sheet_has_a_row_for_every_finding_with_pictures(report):
    sheet = contact_sheet(report)
    with_pictures = [name for name in PLANTED if PLANTED[name] and name not in ("orphans", "garbled", "empty")]
    row = sheet.height / (1 + len(with_pictures))
    assert sheet.mode == "RGB" and row == int(row) and sheet.width == 6 * 168 + 8
    names = [name for name in report.survey.names if name not in report.survey.faults]
    second = Image.open(report.index.root / names[len(names) // 6]).convert("RGB")  # of the sample
    second.thumbnail((160, 160))
    place = np.asarray(sheet)[40:200, 176:336]
    box = (60, second.height // 2 - 20, 100, second.height // 2 + 20)
    assert np.abs(place[60:100, 60:100].astype(int) - np.asarray(second.crop(box))).mean() < 12
    narrow = contact_sheet(report, across=2, tile=64)
    assert narrow.width == 2 * 72 + 8
    with pytest.raises(InputError, match="at least 2"):
        contact_sheet(report, across=1)


# --- the command


def gmp(*arguments, code=0):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            returned = main([str(one) for one in arguments])
        except SystemExit as end:
            returned = end.code
    assert returned == code, out.getvalue() + err.getvalue()
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


def test_the_command_writes_all_that_it_is_asked_for(messy, tmp_path):
    files = {name: tmp_path / "out" / name for name in ("report.html", "fixes.json", "cleaned.json")}
    asked = ("--out", files["report.html"], "--fix", files["fixes.json"], "--drop", files["cleaned.json"])
    told = gmp("dataset", "report", "--images", messy, "--cache", tmp_path / "c", *asked, "--drop-small", "--json")
    answer = json.loads(told.stdout.splitlines()[-1])
    assert answer["cleaned"]["left out"] == {"unreadable": 1, "small": 1, "duplicates": 1}
    assert all(path.is_file() for path in files.values()) and "look at pictures" in told.stderr
    assert "small.png" not in json.loads(files["cleaned.json"].read_text())
    words = gmp("dataset", "report", "--images", messy, "--cache", tmp_path / "c", *asked, code=2).stderr
    assert "exists" in words
    gmp("dataset", "report", "--images", messy, "--cache", tmp_path / "c", *asked, "--force")


def test_the_command_finds_wrong_pairs_by_a_clip(world, tmp_path):
    root, wrong = world
    told = gmp("dataset", "report", "--images", root, "--captions", root / "wrong.json", "--cache", tmp_path / "c",
               "--vision", ASSETS / ORIGINAL, "--drop", tmp_path / "d.json", "--drop-wrong", "--json")  # fmt: skip
    answer = json.loads(told.stdout.splitlines()[-1])
    assert answer["limits"]["size"] == 64
    kept = json.loads((tmp_path / "d.json").read_text())
    captions = json.loads((root / "wrong.json").read_text())
    assert answer["cleaned"]["left out"]["wrong_pairs"] > 0
    assert {name for name in captions if kept.get(name) != captions[name]} <= wrong


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--drop-small",), "give its name with --drop"),
        (("--drop", "d.json", "--drop-wrong"), "--vision"),
        (("--original", "a.safetensors"), "--vision"),
        (("--out", "report.pdf"), ".html"),
        (("--fix", "fixes.txt"), ".json or .csv"),
        (("--drop", "cleaned.txt"), ".json"),
        (("--size", "0"), "1 pixel"),
        (("--fix", "a.json", "--drop", "a.json"), "the same file"),
        (("--near", "40"), "0 to 16"),
    ],
)
def test_the_command_says_what_an_option_lacks(messy, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    told = gmp("dataset", "report", "--images", messy, "--cache", tmp_path / "c", *arguments, code=2).stderr
    errors = [line for line in told.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in told
    assert not list(tmp_path.glob("*.json"))


def test_bad_folders_are_one_clear_error(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "silent").mkdir()
    photo(0).save(tmp_path / "silent" / "a.png")
    for folder, words in (("gone", "no folder"), ("empty", "no pictures"), ("silent", "has a caption")):
        told = gmp("dataset", "report", "--images", tmp_path / folder, "--cache", tmp_path / "c", code=2).stderr
        assert words in told and "Traceback" not in told
    assert "--images" in gmp("dataset", "report", code=2).stderr


def test_a_cache_that_cannot_be_written_to_is_a_note(messy, tmp_path):
    (tmp_path / "c").write_text("a file")
    assert "not kept" in gmp("dataset", "report", "--images", messy, "--cache", tmp_path / "c").stderr


def test_the_options_of_a_cleaned_index_are_all_that_can_be_left_out():
    from gmp.commands.dataset import DROP

    assert sorted(kind for kind, _ in DROP.values()) == sorted(OPTIONAL)
