"""Towers and what is lent, put together: where every tensor comes from, and what is refused."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from gmp.clip import CLIP as Clip
from gmp.clip import CLIPConfig, TextConfig, VisionConfig, initialize
from gmp.errors import InputError
from gmp.join import START_LOGIT_SCALE, join, text_tower
from gmp.layouts import Source, TowerFile

CONFIG = CLIPConfig(TextConfig(32, 3, 2, 64, 20, 64, 32), VisionConfig(48, 1, 2, 64, 16, 32, 32))


def parts(seed: int, name: str, **source) -> tuple[TowerFile, TowerFile]:
    """Text tower and vision tower of a random CLIP, as if read from a file of that name."""
    state = initialize(Clip(CONFIG), torch.Generator().manual_seed(seed)).state_dict()
    origin = Source(name, f"sha of {name}", "openai", "clip_l", {}, (), (), (), ())
    text = {key: tensor for key, tensor in state.items() if not key.startswith("visual.")}
    vision = {key: tensor for key, tensor in state.items() if key.startswith("visual.")}
    text_source = dataclasses.replace(origin, **source)
    return TowerFile(text, CONFIG.text, text_source), TowerFile(vision, CONFIG.vision, origin)


def without(tower: TowerFile, *names: str) -> TowerFile:
    return dataclasses.replace(tower, state={k: t for k, t in tower.state.items() if k not in names})


@pytest.fixture
def broken():
    return without(parts(1, "broken")[0], "text_projection", "logit_scale")


def origins(joined) -> dict[str, str]:
    """Source by canonical name, for every tensor."""
    return {name: origin.source for origin in joined.report for name in origin.names}


def test_three_files_give_one_clip_and_every_tensor_has_an_origin(broken):
    _, vision = parts(2, "vision")
    original, _ = parts(3, "lender")
    joined = join(broken, vision, original)
    found = origins(joined)
    assert found.keys() == joined.state.keys() == joined.build().state_dict().keys()
    for name, tensor in joined.state.items():
        source = "vision" if name.startswith("visual.") else "broken"
        source = "lender" if name in ("text_projection", "logit_scale") else source
        assert found[name] == source
        owner = {"vision": vision, "broken": broken, "lender": original}[source]
        assert torch.equal(tensor, owner.state[name])
    assert [origin.tensors for origin in joined.report] == [len(broken.state), 1, 1, len(vision.state)]


def test_the_vision_file_lends_what_no_third_file_does(broken):
    original, vision = parts(2, "full")
    found = origins(join(broken, vision, original))
    assert {name for name, source in found.items() if source == "full"} == {
        "text_projection", "logit_scale", *vision.state,
    }  # fmt: skip


def test_an_own_projection_is_kept_and_the_originals_scale_taken():
    text, _ = parts(1, "broken")
    original, vision = parts(1, "full")
    text.state["text_projection"] = text.state["text_projection"] * 1.1  # a fine-tune of the original's
    joined = join(text, vision, original)
    assert torch.equal(joined.state["text_projection"], text.state["text_projection"])
    assert origins(joined)["text_projection"] == "broken" and origins(joined)["logit_scale"] == "full"


@pytest.mark.parametrize(
    ("fake", "reason"),
    [
        (torch.zeros(32, 32), "is all zeros"),
        (torch.eye(32), "is an identity"),
        (torch.full((32, 32), math.nan), "holds NaN"),
        (torch.randn(32, 32, generator=torch.Generator().manual_seed(9)) * 1e20, "is noise"),
        (torch.randn(32, 32, generator=torch.Generator().manual_seed(9)) * 0.2, "nothing in common with"),
    ],
)
def test_projections_that_cannot_be_real_are_not_used(fake, reason):
    text, _ = parts(1, "broken")
    text.state["text_projection"] = fake
    original, vision = parts(2, "full")
    joined = join(text, vision, original)
    assert torch.equal(joined.state["text_projection"], original.state["text_projection"])
    lent = next(origin for origin in joined.report if origin.name == "text_projection")
    assert lent.source == "full" and reason in lent.reason


def test_sd2s_text_encoder_is_given_its_last_block():
    whole, vision = parts(1, "full")
    last = [name for name in whole.state if name.startswith("transformer.resblocks.2.")]
    short = without(parts(5, "sd2", missing=("transformer.resblocks.2",))[0], *last)
    short = dataclasses.replace(short, config=dataclasses.replace(CONFIG.text, layers=2))
    joined = join(short, vision, whole)
    assert joined.config.text.layers == 3
    found = origins(joined)
    assert all(found[name] == "full" and torch.equal(joined.state[name], whole.state[name]) for name in last)
    assert found["transformer.resblocks.1.ln_1.weight"] == "sd2"
    ids = torch.randint(0, 50, (3, CONFIG.text.context_length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # the teacher of an anchor reads where the student does
        student, teacher = joined.build()(ids), text_tower(short, joined)(ids)
    assert torch.equal(student.penultimate, teacher.penultimate) and torch.equal(student.pooled, teacher.pooled)
    with pytest.raises(InputError, match="sd2 ends before its last block; give the full original CLIP"):
        text_tower(short, join(whole, vision, whole))


def test_a_shorter_tower_that_is_not_known_to_lack_a_block_stays_short():
    whole, vision = parts(1, "full")
    last = [name for name in whole.state if name.startswith("transformer.resblocks.2.")]
    short = without(parts(5, "short")[0], *last)
    short = dataclasses.replace(short, config=dataclasses.replace(CONFIG.text, layers=2))
    assert join(short, vision, whole).config.text.layers == 2


def test_without_a_scale_anywhere_clips_starting_value_is_taken(broken):
    _, vision = parts(2, "vision")
    original = without(parts(3, "lender")[0], "logit_scale")
    joined = join(broken, vision, original)
    assert joined.state["logit_scale"].item() == pytest.approx(START_LOGIT_SCALE)
    assert origins(joined)["logit_scale"] == "CLIP's starting value 1/0.07"


def test_towers_that_do_not_belong_together_are_refused_with_their_widths(broken):
    other = CLIPConfig(dataclasses.replace(CONFIG.text, embed_dim=24), dataclasses.replace(CONFIG.vision, embed_dim=24))
    state = initialize(Clip(other), torch.Generator().manual_seed(0)).state_dict()
    vision = TowerFile({k: t for k, t in state.items() if k.startswith("visual.")}, other.vision, broken.source)
    original, _ = parts(3, "lender")
    with pytest.raises(InputError, match=r"do not belong together: .* 32 wide, .* 24 dimensions.* lender is 32 × 32"):
        join(broken, vision, original)
    with pytest.raises(InputError, match="no usable text_projection"):
        join(broken, vision)
