"""Blends of text encoders against formulas written out row by row, and their exact corners."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from gmp.blend import ALONG, STRONGEST, blend, blend_encoders, turned
from gmp.errors import InputError
from gmp.geometric import is_mlp
from gmp.layouts import read_text, write_text
from gmp.layouts.read import Source, TowerFile
from tests.small import SMALL, disturbed, small_clip

MLP = "transformer.resblocks.1.mlp.c_fc.weight"
LINEAR = "transformer.resblocks.0.attn.in_proj_weight"


def text_state(clip):
    return {name: tensor.clone() for name, tensor in clip.state_dict().items() if not name.startswith("visual.")}


@pytest.fixture
def corners():
    """Broken, repaired, original."""
    original = small_clip()
    return [text_state(disturbed(original, 0.1, 1)), text_state(disturbed(original, 0.02, 2)), text_state(original)]


def slerp(a, b, t):
    """Shoemake's closed formula for unit vectors, in fp64."""
    angle = math.acos(np.clip(a @ b, -1, 1))
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def naive(broken, repaired, t, along):
    """One MLP weight, row by row."""
    rows = []
    for a, b in zip(broken.double().numpy(), repaired.double().numpy(), strict=True):
        r, other = np.linalg.norm(a), np.linalg.norm(b)
        length = (1 - t) * r + t * other if along in ("r_and_theta", "r") else r
        rows.append(length * (slerp(a / r, b / other, t) if along in ("r_and_theta", "theta") else a / r))
    return torch.tensor(np.stack(rows)).float()


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("along", ALONG)
def test_strength_0_is_the_broken_encoder_bit_for_bit(corners, along):
    same(blend(corners[0], corners[1], 0.0, along), corners[0])


@pytest.mark.parametrize("along", ["weights", "r_and_theta"])
def test_strength_1_is_the_repaired_encoder_bit_for_bit(corners, along):
    same(blend(corners[0], corners[1], 1.0, along), corners[1])


@pytest.mark.parametrize("along", ["weights", "r_and_theta"])
def test_all_the_way_to_the_original_is_the_original_bit_for_bit(corners, along):
    same(blend(*corners[:2], 0.7, along, corners[2], 1.0), corners[2])
    same(blend(*corners[:2], 0.7, along, corners[2], 0.0), blend(*corners[:2], 0.7, along))


@pytest.mark.parametrize("strength", [0.3, 0.85, 1.2])
def test_weights_are_blended_in_a_straight_line(corners, strength):
    found = blend(*corners[:2], strength)
    for name, tensor in found.items():
        line = (1 - strength) * corners[0][name].double() + strength * corners[1][name].double()
        torch.testing.assert_close(tensor, line.float(), rtol=0, atol=1e-7)
        assert tensor.dtype == torch.float32


@pytest.mark.parametrize("along", ["r_and_theta", "r", "theta"])
@pytest.mark.parametrize("strength", [0.3, 1.0, 1.2])
def test_rows_are_blended_as_the_closed_formula_says(corners, along, strength):
    found = blend(*corners[:2], strength, along)
    for name in found:
        if name.endswith(".weight") and is_mlp(name.removesuffix(".weight")):
            expected = naive(corners[0][name], corners[1][name], strength, along)
            torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(found[name], blend(*corners[:2], strength)[name]), name


def test_r_keeps_directions_and_theta_keeps_lengths(corners):
    before = corners[0][MLP]
    longer, turned_ = (blend(*corners[:2], 0.6, along)[MLP] for along in ("r", "theta"))
    cosines = torch.nn.functional.cosine_similarity(longer.double(), before.double())
    torch.testing.assert_close(cosines, torch.ones(64, dtype=torch.float64), rtol=0, atol=1e-7)
    torch.testing.assert_close(turned_.norm(dim=1), before.norm(dim=1), rtol=1e-6, atol=0)
    assert not torch.allclose(longer.norm(dim=1), before.norm(dim=1), rtol=1e-3)
    assert (torch.nn.functional.cosine_similarity(turned_, before) < 0.9999).all()


def test_the_angle_grows_with_the_strength_and_goes_on_beyond_the_repair(corners):
    unit = torch.nn.functional.normalize
    a, b = unit(corners[0][MLP].double(), dim=1), unit(corners[1][MLP].double(), dim=1)
    whole = torch.arccos((a * b).sum(dim=1))
    for share in (0.25, 0.5, 1.0, 1.2):
        found = turned(a, b, share)
        torch.testing.assert_close(found.norm(dim=1), torch.ones(64, dtype=torch.float64))
        torch.testing.assert_close(torch.arccos((a * found).sum(dim=1)), share * whole)
    beyond = turned(a, b, 1.2)
    torch.testing.assert_close(torch.arccos((b * beyond).sum(dim=1)), 0.2 * whole)


def test_the_way_back_leads_through_the_same_points(corners):
    for along in ("weights", "r_and_theta"):
        there, back = blend(*corners[:2], 0.3, along), blend(corners[1], corners[0], 0.7, along)
        for name in there:
            torch.testing.assert_close(there[name], back[name], rtol=1e-6, atol=1e-7)


def test_parallel_rows_stay_bit_for_bit(corners):
    broken, repaired = dict(corners[0]), dict(corners[1])
    repaired[MLP] = repaired[MLP].clone()
    repaired[MLP][3] = broken[MLP][3]
    repaired[MLP][4] = 2 * broken[MLP][4]
    found = blend(broken, repaired, 0.5, "r_and_theta")[MLP]
    assert torch.equal(found[3], broken[MLP][3])
    torch.testing.assert_close(found[4], 1.5 * broken[MLP][4], rtol=2e-7, atol=0)
    assert torch.equal(blend(broken, repaired, 0.5, "theta")[MLP][4], broken[MLP][4])


def test_nearly_parallel_rows_are_as_exact_as_a_straight_line(corners):
    broken, repaired = dict(corners[0]), dict(corners[1])
    repaired[MLP] = broken[MLP].clone()
    repaired[MLP][:, 0] += 1e-6 * broken[MLP].norm(dim=1)
    found, line = (blend(broken, repaired, 0.5, along)[MLP] for along in ("r_and_theta", "weights"))
    torch.testing.assert_close(found, line, rtol=1e-6, atol=1e-9)
    assert not torch.equal(found, broken[MLP])


def test_opposite_rows_turn_by_half_the_circle_and_keep_their_length():
    row = torch.nn.functional.normalize(torch.tensor([[3.0, 0.5, -1.0, 2.0]], dtype=torch.float64), dim=1)
    for share in (0.0, 0.25, 0.5, 1.0, 1.2):
        found = turned(row, -row, share)
        assert found.norm().item() == pytest.approx(1, abs=1e-12)
        assert (found @ row.T).item() == pytest.approx(math.cos(share * math.pi), abs=1e-12)
    half = turned(row, -row, 0.5)
    assert half[0].abs().argmax() == 1  # towards the axis along which the row is smallest


def test_a_row_of_zeros_takes_the_other_ones_direction(corners):
    broken, repaired = dict(corners[0]), dict(corners[1])
    broken[MLP], repaired[MLP] = broken[MLP].clone(), repaired[MLP].clone()
    broken[MLP][0] = repaired[MLP][1] = 0
    broken[MLP][2] = repaired[MLP][2] = 0
    for along, risen, fallen in (("r_and_theta", 0.4, 0.6), ("r", 0.4, 0.6), ("theta", 0.0, 1.0)):
        found = blend(broken, repaired, 0.4, along)[MLP]
        assert found.isfinite().all()
        torch.testing.assert_close(found[0], risen * repaired[MLP][0], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found[1], fallen * broken[MLP][1], rtol=1e-6, atol=1e-9)
        assert not found[2].any()


def test_a_length_does_not_fall_below_zero(corners):
    broken, repaired = dict(corners[0]), dict(corners[1])
    repaired[MLP] = 0.01 * broken[MLP]
    found = blend(broken, repaired, STRONGEST, "r")[MLP]
    assert not found.any() and not torch.signbit(found).any()


@pytest.mark.parametrize("along", ALONG)
def test_what_is_the_same_in_both_stays_bit_for_bit(corners, along):
    broken, repaired = dict(corners[0]), dict(corners[1])
    for name in (MLP, LINEAR, "token_embedding.weight", "logit_scale"):
        repaired[name] = broken[name].clone()
    for strength in (0.1, 0.7, 1.2):
        found = blend(broken, repaired, strength, along)
        assert all(torch.equal(found[n], broken[n]) for n in (MLP, LINEAR, "token_embedding.weight", "logit_scale"))


def test_nothing_of_the_inputs_is_changed(corners):
    copies = [{name: tensor.clone() for name, tensor in state.items()} for state in corners]
    blend(*corners[:2], 0.5, "r_and_theta", corners[2], 0.5)
    for state, copy in zip(corners, copies, strict=True):
        same(state, copy)


@pytest.mark.parametrize("along", ALONG)
def test_the_third_corner_is_the_same_way_from_the_blend_to_the_original(corners, along):
    found = blend(*corners[:2], 0.6, along, corners[2], 0.3)
    stepwise = blend(blend(*corners[:2], 0.6, along), corners[2], 0.3, along)
    for name in found:
        torch.testing.assert_close(found[name], stepwise[name], rtol=1e-6, atol=2e-7)


def test_the_triangle_of_weights_has_barycentric_coordinates(corners):
    found = blend(*corners[:2], 0.6, "weights", corners[2], 0.3)
    for name in found:
        broken, repaired, original = (state[name].double() for state in corners)
        point = 0.7 * (0.4 * broken + 0.6 * repaired) + 0.3 * original
        torch.testing.assert_close(found[name], point.float(), rtol=1e-6, atol=1e-7)


def test_a_projection_that_one_file_lacks_is_taken_from_the_one_that_has_it(corners):
    broken = {name: t for name, t in corners[0].items() if name not in ("text_projection", "logit_scale")}
    found = blend(broken, corners[1], 0.4)
    assert torch.equal(found["text_projection"], corners[1]["text_projection"])
    assert torch.equal(blend(corners[1], broken, 0.4)["text_projection"], corners[1]["text_projection"])
    same(blend(broken, corners[1], 0.0), broken)
    same(blend(corners[1], broken, 1.0), broken)
    lent = blend(broken, broken, 0.5, "weights", corners[2], 0.5)
    assert torch.equal(lent["text_projection"], corners[2]["text_projection"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 64, "mlp_width": 64}, "width 32 against 64"),
        ({"layers": 3}, "layers 2 against 3"),
        ({"mlp_width": 96}, "MLP width 64 against 96"),
        ({"vocab_size": 65}, "vocabulary 64 against 65"),
        ({"context_length": 21}, "context length 20 against 21"),
    ],
)
def test_another_architecture_is_refused_by_name(corners, change, words):
    from gmp.clip import CLIP, initialize

    text = replace(SMALL.text, **change)
    other = text_state(initialize(CLIP(replace(SMALL, text=text)), torch.Generator().manual_seed(0)))
    with pytest.raises(InputError, match=f"the repaired text encoder .*{words}"):
        blend(corners[0], other, 0.5)
    with pytest.raises(InputError, match=f"the original text encoder .*{words}"):
        blend(*corners[:2], 0.5, "weights", other, 0.0)


def test_a_tensor_that_only_one_has_is_refused_by_name(corners):
    less = {name: tensor for name, tensor in corners[1].items() if name != "ln_final.bias"}
    with pytest.raises(InputError, match="only one has ln_final.bias"):
        blend(corners[0], less, 0.5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((-0.1,), "strength -0.1 is not within 0 and 1.2"),
        ((1.3,), "strength 1.3"),
        ((math.nan,), "strength nan"),
        ((0.5, "phi"), "along 'phi' is not one of weights, r_and_theta, r, theta"),
        ((0.5, "weights", None, 0.2), "toward_original 0.2 needs the original"),
        ((0.5, "weights", {}, 1.1), "toward_original 1.1 is not within 0 and 1"),
    ],
)
def test_numbers_out_of_range_are_refused(corners, arguments, words):
    with pytest.raises(InputError, match=words):
        blend(*corners[:2], *arguments)


# ---- encoders as they were read -------------------------------------------------------------------------------------


def encoder(state, name, **source):
    made = {"layout": "openai", "member": "clip_l", "dtypes": {}, "assumptions": (), "missing": (), "unexpected": ()}
    return TowerFile(state, SMALL.text, Source(name, name * 8, **made, notes=(), **source))


def test_a_blended_encoder_says_what_it_is_made_of(corners, tmp_path):
    files = [encoder(state, name) for state, name in zip(corners, ("b.st", "r.st", "o.st"), strict=True)]
    found = blend_encoders(*files[:2], 0.8, "r_and_theta", files[2], 0.25)
    same(found.state, blend(*corners[:2], 0.8, "r_and_theta", corners[2], 0.25))
    assert found.source.path == "blend of b.st and r.st" and found.source.member == "clip_l"
    assert "b.st → r.st at strength 0.8 along r_and_theta, then 0.25 of the way to o.st" in found.source.notes
    write_text(found.state, tmp_path / "blend.safetensors", config=found.config)
    assert read_text(tmp_path / "blend.safetensors").source.sha256 == found.source.sha256


def test_encoders_whose_heads_or_activation_differ_are_refused(corners):
    broken, repaired = encoder(corners[0], "b"), encoder(corners[1], "r")
    for change, words in (({"heads": 4}, "heads 2 against 4"), ({"activation": "gelu"}, "quick_gelu against gelu")):
        other = replace(repaired, config=replace(repaired.config, **change))
        with pytest.raises(InputError, match=f"b and r do not belong together: .*{words}"):
            blend_encoders(broken, other, 0.5)


def test_the_projections_width_comes_from_the_file_that_has_it(corners):
    lacking = {name: t for name, t in corners[1].items() if name != "text_projection"}
    repaired = replace(encoder(lacking, "r"), config=replace(SMALL.text, embed_dim=32))
    assert blend_encoders(encoder(corners[0], "b"), repaired, 0.5).config.embed_dim == 16
