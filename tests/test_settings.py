"""Settings: read as a whole with all that is wrong, written with a sentence each, and the same again when read back."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmp.config import SINGLE, Anchor, Captions, Geometric, Neuron, RepairConfig, Unfreeze, holding
from gmp.errors import InputError
from gmp.settings import REQUIRED, SettingsError, as_toml, build, read_toml, setting


def problems(toml: str) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as error:
        RepairConfig.from_toml(toml, "mine.toml")
    assert str(error.value).startswith("mine.toml does not work: ")
    return error.value.problems


FULL = RepairConfig(
    train="both",
    lr=1e-6,
    betas=(0.5, 0.75),
    temperature=0.07,
    rates={"visual.*": 0.5, 'odd "name"': 2.0},
    captions=Captions(prefix='a "photo" of\n', shuffle=True),
    unfreeze=Unfreeze(start=2, end="input"),
    geometric=(Geometric(), Geometric(("qkv", "out"), tower="vision", first=-3, sphere=True)),
    anchors=(Anchor("original", "pooled", 1.0, end=0.0, fade="cosine"),),
    neurons=(Neuron("vision", 22, 2432, 1000.0), Neuron("text", 1, 2, 0.5)),
)


@pytest.mark.parametrize("config", [RepairConfig(), FULL, replace(FULL, anchors=(), geometric=(), neurons=())])
def test_a_configuration_comes_back_from_toml_and_json(config):
    assert RepairConfig.from_toml(config.to_toml(), "x") == config
    assert RepairConfig.from_json(config.to_json()) == config


def test_every_setting_is_written_under_its_sentence():
    lines = FULL.to_toml().splitlines()
    for field in fields(RepairConfig):
        begins = (f"{field.name} =", f"[{field.name}]", f"[[{field.name}]]")
        at = next(i for i, line in enumerate(lines) if line.strip("# ").startswith(begins))
        above = "\n".join(lines[max(0, at - 3) : at])
        assert field.metadata["doc"].splitlines()[0] in above, field.name


def test_all_settings_have_sentences_and_what_is_one_value_has_a_command_option():
    for kind in (RepairConfig, Anchor, Geometric, Unfreeze, Neuron, Captions):
        for field in fields(kind):
            assert len(field.metadata["doc"]) > 4, (kind, field.name)
    tables = {field.name for field in fields(RepairConfig)} - set(SINGLE)
    assert tables == {"betas", "rates", "captions", "pictures", "unfreeze", "geometric", "anchors", "neurons"}


def test_all_problems_of_a_file_are_told_at_once():
    found = problems(
        """
        epcohs = 3
        batch = 1
        loss = "infonc"
        train = "both"
        negatives = "all"
        smoothing = "much"
        betas = [0.9]
        rates = { "visual.*" = -1 }
        [captions]
        chose = "first"
        dropout = 1.0
        [[anchors]]
        teacher = "orignal"
        weight = 0.3
        """
    )
    text = "\n".join(found)
    for sentence in (
        "epcohs is no setting; did you mean epochs?",
        "batch is 1, less than 2",
        "loss is 'infonc', not one of infonce, siglip, seed (did you mean infonce?)",
        "negatives is all, which needs a locked vision tower",
        "smoothing is 'much', not a number",
        "betas has 1 values, not 2",
        "rates.visual.* is -1, less than 0",
        "captions.chose is no setting; did you mean captions.choose?",
        "captions.dropout is 1, not below 1",
        "anchors[0].teacher is 'orignal', not one of original, broken (did you mean original?)",
        "anchors[0].read_point is missing",
    ):
        assert sentence in text
    assert len(found) == 11


@pytest.mark.parametrize(
    "toml, sentence",
    [
        ("epochs = 1.5", "epochs is 1.5, not a whole number"),
        ("epochs = true", "epochs is True, not a whole number"),
        ("checkpointing = 1", "checkpointing is 1, not true or false"),
        ("lr = nan", "lr is nan, not a finite number"),
        ("lr = 0", "lr is 0, not above 0"),
        ("captions = 3", "captions is 3, not a table of settings"),
        ("rates = 3", "rates is 3, not a table"),
        ("anchors = 3", "anchors is 3, not a list"),
        ("neurons = [{tower = 'vision', block = 1, feature = 1, factor = 2}]", "which is locked: set train to both"),
        ("loss = 'siglip'\nsmoothing = 0.1", "siglip, which has no softmax"),
        ("[captions]\nseparator = ''\nshuffle = true", "captions.separator is empty"),
        ("geometric = [{first = 5, last = 2}]", "geometric[0] goes from block 5 to 2"),
        ("optimizer = 'lion'\noptimizer_state = 'bf16'", "optimizer_state bf16 is AdamW's"),
        ("[pictures]\nflip = 0.5", "set pictures.views to 2 or more"),
        ("train = 'both'\n[pictures]\nviews = 2", "for a locked vision tower"),
    ],
)
def test_what_does_not_work_is_one_sentence(toml, sentence):
    (found,) = problems(toml)
    assert sentence in found


def test_what_is_no_toml_and_an_unknown_version_are_told_by_name():
    with pytest.raises(InputError, match=r"mine.toml is not TOML: .*line 2"):
        RepairConfig.from_toml("a = 1\nb = \n", "mine.toml")
    with pytest.raises(InputError, match="mine.toml is of version 2; this program reads version 4"):
        RepairConfig.from_toml("version = 2", "mine.toml")


def test_settings_made_in_code_are_checked_the_same_way():
    with pytest.raises(SettingsError) as error:
        RepairConfig(epochs=0, anchors=(Anchor("nobody", "pooled", -1.0),) * 2)
    text = str(error.value)
    assert "epochs is 0" in text and "anchors[0].teacher" in text and "anchors[0].weight is -1, not above 0" in text
    assert "more than once" in text


@pytest.mark.parametrize(
    "text, anchor",
    [
        ("penultimate=0.3", Anchor("original", "penultimate", 0.3)),
        ("broken:pooled=.1", Anchor("broken", "pooled", 0.1)),
        ("broken@concepts:last=1..0.5", Anchor("broken", "last", 1.0, captions="concepts", end=0.5)),
        ("original:pooled=1..0,cosine", Anchor("original", "pooled", 1.0, end=0.0, fade="cosine")),
    ],
)
def test_an_anchor_is_written_in_one_word(text, anchor):
    assert Anchor.parse(text) == anchor == Anchor.parse(str(anchor))


@pytest.mark.parametrize("text", ["", "penultimate", "penultimate=", "penultimate=x", "a:b:c=1=2", "p=1..x"])
def test_a_word_that_is_no_anchor_is_refused(text):
    with pytest.raises(InputError, match="is not of the form"):
        Anchor.parse(text)


def test_anchors_on_concepts_hold_only_where_captions_are_given():
    config = RepairConfig(anchors=(Anchor("original", "last", 1.0), Anchor("broken", "last", 1.0, captions="concepts")))
    assert holding(config, ("a star",)) == config
    assert holding(config, ()).anchors == config.anchors[:1]


# ---- the mechanism --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inner:
    name: str = setting(REQUIRED, "a name")
    size: int | None = setting(None, "a size", least=1)


@dataclass(frozen=True)
class Outer:
    flag: bool = setting(False, "a flag")
    share: float = setting(0.5, "a share", least=0, most=1)
    words: tuple[str, ...] = setting((), "words")
    table: dict[str, float] = setting(dict, "numbers")
    inner: Inner | None = setting(None, "one")
    many: tuple[Inner, ...] = setting((), "some")


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
INNER = st.builds(Inner, TEXT, st.none() | st.integers(1, 9))
OUTER = st.builds(
    Outer,
    st.booleans(),
    st.floats(0, 1),
    st.lists(TEXT, max_size=3).map(tuple),
    st.dictionaries(TEXT, st.floats(allow_nan=False, allow_infinity=False), max_size=3),
    st.none() | INNER,
    st.lists(INNER, max_size=3).map(tuple),
)


@settings(max_examples=100, deadline=None)
@given(OUTER)
def test_any_settings_come_back_from_toml(one):
    assert is_dataclass(one)
    assert build(Outer, read_toml(as_toml(one, {}), "x"), "x") == one
