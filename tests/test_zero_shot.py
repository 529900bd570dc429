"""Zero-shot classification against naive formulas, folders of classes, and the small world by its shapes."""

from __future__ import annotations

import json
import math
import random
from collections import Counter

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image

from gmp.bootstrap import ratio, share
from gmp.data.classes import read_classes, read_labels
from gmp.data.images import load_picture, preprocess
from gmp.errors import InputError
from gmp.evaluate import SCHEMA, document
from gmp.events import finish
from gmp.join import join
from gmp.layouts import read_text, read_vision
from gmp.measure import Interval
from gmp.plots.confusion import most_confused, plot_confusion, plot_no_classes
from gmp.plots.figure import pixels
from gmp.tokenizer import tokenizer_for
from gmp.world.models import ASSETS, ORIGINAL, RUINED, load_original
from gmp.world.scenes import COLOURS, RELATIONS, SHAPES, Scene, Thing, render
from gmp.zero_shot import (
    ClassAccuracy,
    Confusion,
    ZeroShot,
    batch_accuracy,
    class_features,
    gain,
    mean_per_class,
    read_templates,
    tell_classes,
    zero_shot,
)  # fmt: skip
from tests.small import small_clip, tokenize

WORLD_TEMPLATES = [f"a large {a} {{}} {relation} a large {b} {{}}" for a, b in (("red", "blue"), ("green", "white"))
                   for relation in ("left of", "above")]  # fmt: skip


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """12 pictures of each shape, two of the same shape on each."""
    folder = tmp_path_factory.mktemp("shapes")
    for shape in SHAPES:
        (folder / shape).mkdir()
        for number in range(12):
            dice = random.Random(f"{shape} {number}")
            a, b = dice.sample(sorted(COLOURS), 2)
            scene = Scene(Thing("large", a, shape), dice.choice(sorted(RELATIONS)), Thing("large", b, shape))
            render(scene, dice).save(folder / shape / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def world():
    original = load_original()
    vision, text = read_vision(ASSETS / ORIGINAL), read_text(ASSETS / ORIGINAL)
    return original, join(read_text(ASSETS / RUINED), vision, text).build()


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (len(path.name) * 20 % 255, 10, 10)).save(path)


# ---- folders --------------------------------------------------------------------------------------------------------


def test_a_folder_is_a_class_and_its_name_the_class_name(tmp_path):
    for name in ("alarm_clock/1.png", "alarm_clock/deep/2.JPG", "fox/b.webp", "fox/a.png", ".hidden/x.png"):
        picture(tmp_path / name.lower())
    (tmp_path / "fox" / "notes.txt").write_text("no picture")
    picture(tmp_path / "loose.png")
    classes = read_classes(tmp_path)
    assert classes.names == ("alarm clock", "fox")
    assert classes.pictures == ("alarm_clock/1.png", "alarm_clock/deep/2.jpg", "fox/a.png", "fox/b.webp")
    assert classes.labels == (0, 0, 1, 1)
    assert classes.loose == ("loose.png",)


@pytest.mark.parametrize(
    "name, text",
    [
        ("classes.json", json.dumps({"n01440764": "tench", "n01443537": "gold_fish", "n9": "absent"})),
        ("classes.txt", "n01440764 tench\n\nn01443537\tgold fish\n"),
    ],
)
def test_a_file_beside_the_folders_names_the_classes(tmp_path, name, text):
    for folder in ("n01440764", "n01443537"):
        picture(tmp_path / folder / "a.png")
    (tmp_path / name).write_text(text)
    assert read_classes(tmp_path).names == ("tench", "gold fish")


def test_wordnet_ids_are_no_names(tmp_path):
    for folder in ("n01440764", "n01443537"):
        picture(tmp_path / folder / "a.png")
    with pytest.raises(InputError, match="2 class folders .* WordNet ids: n01440764, n01443537.*classes.json"):
        read_classes(tmp_path)


def test_a_file_of_names_has_all_of_them(tmp_path):
    for folder in ("n01440764", "n01443537"):
        picture(tmp_path / folder / "a.png")
    (tmp_path / "classes.json").write_text('{"n01440764": "tench"}')
    with pytest.raises(InputError, match="no name for 1 class folders: n01443537"):
        read_classes(tmp_path)
    (tmp_path / "classes.txt").write_text("n01440764 tench\nn01443537 goldfish")
    with pytest.raises(InputError, match="Keep one of them"):
        read_classes(tmp_path)


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": 1}', "[" * 100_000])
def test_a_file_of_names_that_is_none_is_refused(tmp_path, text):
    picture(tmp_path / "a" / "a.png")
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(InputError, match=r"classes\.json"):
        read_classes(tmp_path)


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    picture(tmp_path / "red_fox" / "a.png")
    picture(tmp_path / "Red fox" / "a.png")
    picture(tmp_path / "__" / "a.png")
    for folder in ("empty", "void", "bare"):
        (tmp_path / folder).mkdir()
    with pytest.raises(InputError) as error:
        read_classes(tmp_path)
    assert "3 of 6 class folders hold no pictures: bare, empty, void." in str(error.value)
    assert "no name but underscores" in str(error.value)
    assert "1 class names are given more than once: red fox" in str(error.value)


def test_every_empty_folder_is_named(tmp_path):
    picture(tmp_path / "a" / "a.png")
    for number in range(30):
        (tmp_path / f"empty{number}").mkdir()
    with pytest.raises(InputError) as error:
        read_classes(tmp_path)
    assert all(f"empty{number}" in str(error.value) for number in range(30))


def test_folders_that_hold_no_classes_are_refused(tmp_path):
    with pytest.raises(InputError, match="is not there"):
        read_classes(tmp_path / "absent")
    picture(tmp_path / "a.png")
    with pytest.raises(InputError, match="is a file"):
        read_classes(tmp_path / "a.png")
    with pytest.raises(InputError, match="no folders.*the 1 pictures in it have no class"):
        read_classes(tmp_path)
    picture(tmp_path / "only" / "a.png")
    with pytest.raises(InputError, match="one class only"):
        read_classes(tmp_path)


def test_a_sample_takes_so_many_of_each_class_and_always_the_same(shapes):
    classes = read_classes(shapes)
    sample = classes.sample(5, seed=3)
    assert Counter(sample.labels) == dict.fromkeys(range(6), 5)
    assert sample == classes.sample(5, seed=3) != classes.sample(5, seed=4)
    pairs = zip(sample.pictures, sample.labels, strict=True)
    assert all(name.startswith(SHAPES_SORTED[label]) for name, label in pairs)
    assert classes.sample(100) == classes


SHAPES_SORTED = sorted(SHAPES)


def test_labels_of_a_csv_file(tmp_path):
    for name in ("x.png", "y.png", "z.png"):
        picture(tmp_path / "all" / name)
    table = tmp_path / "human_responses.csv"
    table.write_text("image,answer,label\nx.png,dog,alarm_clock\ny.png,cat,cat\nx.png,cat,alarm_clock\nz.png,a,cat\n")
    classes = read_labels(table, tmp_path / "all")
    assert classes.names == ("alarm clock", "cat")
    assert classes.pictures == ("x.png", "y.png", "z.png") and classes.labels == (0, 1, 1)
    assert classes.repeated == 1


def test_all_that_is_wrong_with_a_csv_file_is_said_at_once(tmp_path):
    picture(tmp_path / "x.png")
    table = tmp_path / "labels.csv"
    table.write_text("image,label\nx.png,dog\nx.png,cat\ngone.png,cat\n../y.png,cat\nx.png,\n")
    with pytest.raises(InputError) as error:
        read_labels(table, tmp_path)
    for part in ("more than one label: x.png", "are not in", "gone.png", "outside", "../y.png", "have no label"):
        assert part in str(error.value)
    table.write_text("picture,label\nx.png,dog\n")
    with pytest.raises(InputError, match="no column image; found picture, label"):
        read_labels(table, tmp_path)
    table.write_text("image,label\n")
    with pytest.raises(InputError, match="names no pictures"):
        read_labels(table, tmp_path)


# ---- prompts --------------------------------------------------------------------------------------------------------


def test_the_shipped_templates_all_have_a_place_for_the_name():
    templates = read_templates()
    assert len(templates) == len(set(templates)) == 8
    assert all(template.count("{}") == 1 for template in templates)


def test_templates_without_a_place_are_named(tmp_path):
    path = tmp_path / "templates.txt"
    path.write_text("# mine\n\na {}\nno place\nnone here {0}\n")
    with pytest.raises(InputError, match="2 of 3 templates have no {}: no place, none here {0}"):
        read_templates(path)
    path.write_text("# nothing\n")
    with pytest.raises(InputError, match="There are no templates"):
        read_templates(path)


def test_the_classifier_is_the_normalised_mean_of_normalised_prompts():
    clip, names, templates = small_clip(), [f"thing {i}" for i in range(40)], ["a {}", "the {} of {} there", "{}"]
    found = finish(class_features(clip, tokenize, names, templates))
    for name, row in zip(names, found, strict=True):
        mean = torch.zeros(16)
        for template in templates:
            with torch.no_grad():
                feature = clip(tokenize([template.replace("{}", name)]).ids).projected[0]
            mean += feature / feature.norm() / len(templates)
        assert torch.allclose(row, mean / mean.norm(), atol=1e-5)


# ---- numbers --------------------------------------------------------------------------------------------------------


def data(pictures=300, classes=12, noise=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randn(classes, 8, generator=generator)
    labels = torch.randint(classes, (pictures,), generator=generator)
    return texts[labels] + noise * torch.randn(pictures, 8, generator=generator), texts, labels


def test_ranks_are_those_of_a_full_sort():
    images, texts, labels = data()
    ranks, told = tell_classes(images, 3 * texts, labels)
    for image, label, rank, name in zip(images.tolist(), labels.tolist(), ranks.tolist(), told.tolist(), strict=True):
        scores = [np.dot(image, text) / np.linalg.norm(image) / np.linalg.norm(text) for text in texts.tolist()]
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        assert order.index(label) == rank and order[0] == name
    assert 0.3 < (ranks == 0).double().mean() < 0.95


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_a_collapsed_encoder_is_right_by_chance_alone(value):
    images, _, labels = data(classes=5)
    ranks, told = tell_classes(images, torch.full((5, 8), value), labels)
    assert told.tolist() == [0] * len(labels) and ranks.tolist() == labels.tolist()


def test_one_class_that_is_no_number_is_never_told():
    images, texts, labels = data(noise=0)
    texts[3] = math.nan
    ranks, told = tell_classes(images, texts, torch.arange(12).repeat(25))
    assert 3 not in told.tolist() and (ranks[3::12] > 0).all()


def test_the_mean_per_class_counts_each_class_the_same():
    right, labels = torch.tensor([1, 1, 1, 1, 0, 0, 1]), torch.tensor([0, 0, 0, 0, 0, 2, 2])  # class 1 has no picture
    assert mean_per_class(right, labels, 0).value == pytest.approx((4 / 5 + 1 / 2) / 2)


def test_intervals_are_those_of_a_share():
    """The normal approximation of 95 % of the binomial, for 400 pictures."""
    right = (torch.arange(400) % 10 < 7).double()
    expected = 1.96 * math.sqrt(0.7 * 0.3 / 400)
    found = share(right, 0)
    assert found.value == pytest.approx(0.7)
    assert found.high - 0.7 == pytest.approx(expected, rel=0.1) and 0.7 - found.low == pytest.approx(expected, rel=0.1)
    assert found == share(right, 0) != share(right, 1)
    by_class = mean_per_class(right, torch.arange(400) % 4, 0)
    assert by_class.high - by_class.low == pytest.approx(2 * expected, rel=0.15)


def test_values_of_one_picture_are_not_counted_as_many():
    right = (torch.arange(100) % 10 < 7).double()
    assert ratio(9 * right, torch.full((100,), 9), 0) == pytest.approx(share(right, 0))
    bare = ratio(torch.cat([right, torch.zeros(50)]), torch.cat([torch.ones(100), torch.zeros(50)]), 0)
    assert bare == share(right, 0)
    assert ratio(torch.zeros(3), torch.zeros(3), 0) is None


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("batch", [7, 48, 1000])
def test_batch_accuracy_is_that_of_the_original_script(batch, normalised):
    images, texts, labels = data()
    texts = texts * torch.linspace(0.2, 3, 12)[:, None]
    found = batch_accuracy(images, texts, labels, torch.Generator().manual_seed(5), batch, normalised)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(5)).tolist()
    right = 0
    for start in range(0, 300, batch):
        members = order[start : start + batch]
        names = [f"label {labels[i]}" for i in members]
        rows = [texts[labels[i]] / texts[labels[i]].norm() if normalised else texts[labels[i]] for i in members]
        for i, name in zip(members, names, strict=True):
            scores = torch.softmax(images[i] @ torch.stack(rows).T, dim=-1)
            right += names[scores.argmax()] == name
    assert found == pytest.approx(right / 300)


def test_batch_accuracy_depends_on_the_batch():
    images, texts, labels = data(pictures=600, classes=60)
    few, many = (batch_accuracy(images, texts, labels, torch.Generator().manual_seed(0), n, True) for n in (4, 300))
    right = (tell_classes(images, texts, labels)[0] == 0).double().mean().item()
    assert few > many + 0.2 and many == pytest.approx(right, abs=0.05)


def told(*right):
    """A classification of which only this is known."""
    return ZeroShot(*[None] * 12, right)


def test_a_gain_is_resampled_in_pairs():
    before = told(*([True, False] * 200))
    assert gain(before, before) == Interval(0, 0, 0)
    now = told(*([True, True] * 40 + [True, False] * 160))  # 40 more of 400
    found = gain(now, before)
    assert found.value == pytest.approx(0.1) and gain(before, now).value == pytest.approx(-0.1)
    wide = 2 * 1.96 * math.sqrt(0.1 * 0.9 / 400)  # of a share, which the difference is here
    assert found.high - found.low == pytest.approx(wide, rel=0.1)


# ---- the whole ------------------------------------------------------------------------------------------------------


def test_the_world_is_classified_by_its_shapes(shapes, world, tmp_path):
    original, ruined = world
    words, classes = tokenizer_for(77, "clip_l"), read_classes(shapes)
    events = []
    both = [
        zero_shot(clip, original.visual, words, classes, tmp_path, templates=WORLD_TEMPLATES)
        for clip in (original, ruined)
    ]
    found, broken = finish(both[0], events.append), finish(both[1])
    assert {event["stage"] for event in events} == {"hash pictures", "embed pictures", "embed class names"}
    assert found.top_1.value > 0.75 and found.top_1.low > broken.top_1.value
    assert found.chance == 1 / 6 and (found.pictures, found.classes) == (72, 6)

    right = Counter()
    with torch.no_grad():
        prompts = [[template.replace("{}", name) for template in WORLD_TEMPLATES] for name in SHAPES_SORTED]
        features = [original(words(some).ids).projected for some in prompts]
        texts = [(one / one.norm(dim=1, keepdim=True)).mean(0) for one in features]
        texts = torch.stack([one / one.norm() for one in texts])
        for path in sorted(shapes.rglob("*.png")):
            image = original.encode_image(preprocess(load_picture(path), 64)[None])[0]
            right[path.parent.name] += SHAPES_SORTED[(texts @ image).argmax()] == path.parent.name
    assert found.top_1.value == pytest.approx(sum(right.values()) / 72)
    assert [one.top_1 for one in found.per_class] == [right[name] / 12 for name in SHAPES_SORTED]
    assert found.mean_per_class.value == pytest.approx(found.top_1.value)  # equally many of each
    assert sum(one.pictures for one in found.confusions) == 72 - sum(right.values())
    assert found.top_1.low <= found.top_1.value <= found.top_5.value
    assert sum(found.right) == sum(right.values()) and sum(found.right[:12]) == right[SHAPES_SORTED[0]]

    written = document("measurement", None, None, None, zero_shot=found.as_json())
    written = json.loads(json.dumps(written, allow_nan=False))
    jsonschema.validate(written, json.loads(SCHEMA.read_text()))
    assert written["zero_shot"]["batch_top_1"].keys() == {"value", "batch", "choices", "normalised", "seed"}


def test_what_does_not_decode_is_listed_and_not_counted(tmp_path):
    for name in ("a/1.png", "a/2.png", "b/1.png", "c/1.png"):
        picture(tmp_path / "classes" / name)
    (tmp_path / "classes" / "a" / "2.png").write_bytes(b"no picture")
    (tmp_path / "classes" / "c" / "1.png").write_bytes(b"")
    clip = small_clip()
    found = finish(zero_shot(clip, clip.visual, tokenize, read_classes(tmp_path / "classes"), tmp_path / "cache"))
    assert found.pictures == 2 and set(found.broken) == {"a/2.png", "c/1.png"}
    assert found.per_class[2] == ClassAccuracy("c", 0, None) and found.classes == 3 and found.top_5 is None
    document_ = document("measurement", None, None, None, zero_shot=found.as_json())
    jsonschema.validate(document_, json.loads(SCHEMA.read_text()))
    for path in (tmp_path / "classes").rglob("*.png"):
        path.write_bytes(b"none")
    with pytest.raises(InputError, match="None of the 4 pictures"):
        finish(zero_shot(clip, clip.visual, tokenize, read_classes(tmp_path / "classes"), tmp_path / "cache"))


# ---- picture --------------------------------------------------------------------------------------------------------


def made(classes, confusions):
    """20 pictures of each class, and these (true, told, pictures)."""
    names = [f"class {i}" for i in range(classes)]
    wrong = Counter()
    for true, _, count in confusions:
        wrong[true] += count
    per_class = tuple(ClassAccuracy(name, 20, 1 - wrong[i] / 20) for i, name in enumerate(names))
    pairs = tuple(Confusion(names[true], names[told], count) for true, told, count in confusions)
    one = Interval(0.5, 0.4, 0.6)
    return ZeroShot(one, None, one, None, 1 / classes, 20 * classes, classes, (), per_class, pairs, {}, (), ())


def cells(figure):
    axes = figure.axes[0]
    columns, rows = ([tick.get_text() for tick in ticks] for ticks in (axes.get_xticklabels(), axes.get_yticklabels()))
    return {(rows[y], columns[x]): text.get_text() for text in axes.texts for x, y in [text.get_position()]}


def test_the_confusion_picture_shows_the_share_of_each_row():
    found = cells(plot_confusion(made(3, [(0, 1, 5), (2, 0, 1)])))
    assert found == {
        ("class 0", "class 0"): "75", ("class 0", "class 1"): "25", ("class 1", "class 1"): "100",
        ("class 2", "class 2"): "95", ("class 2", "class 0"): "5",
    }  # fmt: skip


def test_of_many_classes_the_most_confused_are_shown_and_the_rest_is_a_column():
    pairs = [(i, i + 1, 2) for i in range(20, 90, 2)]
    result = made(200, [(7, 190, 9), (190, 3, 8), *pairs, (7, 150, 1), (7, 160, 1)])
    shown = most_confused(result)
    assert shown[:3] == ["class 3", "class 7", "class 20"] and shown[-2:] == ["class 150", "class 190"]
    assert len(shown) == 20 and "class 160" not in shown
    found = cells(plot_confusion(result))
    assert found["class 7", "class 190"] == "45" and found["class 7", "(others)"] == "5"
    assert len(most_confused(made(1000, []))) == 20


def test_without_classes_the_picture_is_small_and_says_so():
    figure = plot_no_classes()
    assert "no classes were given" in figure.texts[0].get_text()
    image = pixels(figure)
    assert image.shape[0] < image.shape[1] < 512 and image.min() < 0.5  # words are drawn
    left, *_, right = np.nonzero((image < 0.9).any(axis=(0, 2)))[0]
    assert 0 < left < right < image.shape[1] - 1  # and none is cut off
