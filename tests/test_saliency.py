"""What a vision tower attends to: attention against torch's own, rollout against matrices, squares against planted
things."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from gmp import features
from gmp.clip import VisionConfig, VisionTower, initialize
from gmp.data.crops import centre_box
from gmp.data.images import normalize
from gmp.events import finish
from gmp.features import content_keys, salient_boxes
from gmp.saliency import CAP, attention, listening, saliency
from gmp.world.models import load_original
from gmp.world.scenes import COLOURS, SHAPES, SIZES, Thing, _draw_thing
from tests.small import SMALL, small_clip


def pixels(count: int = 3, size: int = 32) -> torch.Tensor:
    drawn = torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return normalize(drawn)


def tower_of(layers: int = 3, registers: int = 0) -> VisionTower:
    from gmp.clip import CLIP, CLIPConfig

    config = VisionConfig(32, layers, 2, 64, 8, 32, 16, "quick_gelu", registers=registers)
    tower = initialize(CLIP(CLIPConfig(SMALL.text, config)), torch.Generator().manual_seed(1)).visual
    with torch.no_grad():
        for block in tower.transformer.resblocks:
            block.attn.in_proj_weight.mul_(4)  # attention that is not even
    return tower


def heard(tower: VisionTower, given: torch.Tensor) -> list[torch.Tensor]:
    """What each block's attention is given, (B, L, W)."""
    found = []
    with torch.no_grad(), listening(tower.transformer.resblocks, lambda block, x: found.append(x)):
        tower(given)
    return [x.view(len(given), -1, x.shape[1]) for x in found]


def test_attention_is_that_of_torch():
    tower = tower_of()
    for block, x in zip(tower.transformer.resblocks, heard(tower, pixels()), strict=True):
        attn = block.attn
        _, expected = F.multi_head_attention_forward(
            *[x.transpose(0, 1)] * 3,
            x.shape[2],
            attn.heads,
            attn.in_proj_weight,
            attn.in_proj_bias,
            None,
            None,
            False,
            0.0,
            attn.out_proj.weight,
            attn.out_proj.bias,
            need_weights=True,
        )
        with torch.no_grad():
            found = attention(block, x)
        assert torch.allclose(found, expected, atol=1e-6) and found.std() > 1e-3


@pytest.mark.parametrize("registers", [0, 3])
def test_saliency_is_rollout_of_the_class_token_over_the_patches(registers):
    tower = tower_of(registers=registers)
    product = None
    for block, x in zip(tower.transformer.resblocks, heard(tower, pixels()), strict=True):
        with torch.no_grad():
            matrix = 0.5 * attention(block, x) + 0.5 * torch.eye(x.shape[1])
        product = matrix if product is None else torch.bmm(matrix, product)
    assert torch.allclose(product.sum(dim=2), torch.ones(1), atol=1e-5)
    expected = product[:, 0, 1 + registers :]
    found = saliency(tower, pixels())
    assert found.shape == (3, 4, 4)
    for one, row in zip(found.flatten(1), expected, strict=True):
        most = np.quantile(row.numpy(), CAP)
        assert np.allclose(one.numpy(), np.minimum(row.numpy(), most), atol=1e-6)
        assert one.argmax() == row.argmax() or row.max() > most


def test_looking_leaves_the_tower_as_it_was():
    tower = tower_of()
    with torch.no_grad():
        before = tower(pixels())
        saliency(tower, pixels())
        assert torch.equal(tower(pixels()), before)
    assert not any(block.ln_1._forward_hooks for block in tower.transformer.resblocks)
    with pytest.raises(RuntimeError), listening(tower.transformer.resblocks, lambda block, x: None):
        tower(torch.zeros(1, 1, 1, 1))
    assert not any(block.ln_1._forward_hooks for block in tower.transformer.resblocks)


# ---- squares --------------------------------------------------------------------------------------------------------


def planted(seed: int, turned: bool) -> tuple[Image.Image, tuple[float, float, float]]:
    """A wide or high picture of one thing of the world, and its x, y and reach."""
    dice = random.Random(seed)
    width, height, double = 160, 64, 2
    image = Image.new("RGB", (width * double, height * double), (dice.randint(15, 75),) * 3)
    thing = Thing(dice.choice(list(SIZES)), dice.choice(list(COLOURS)), dice.choice(SHAPES))
    reach = SIZES[thing.size] * 1.25
    x, y = dice.uniform(reach + 1, width - reach - 1), dice.uniform(reach + 1, height - reach - 1)
    _draw_thing(ImageDraw.Draw(image), thing, x * double, y * double, double)
    image = image.resize((width, height), Image.Resampling.BOX)
    return (image.transpose(Image.Transpose.TRANSPOSE), (y, x, reach)) if turned else (image, (x, y, reach))


def holds(box, spot) -> bool:
    (x, y, reach), (left, top, right, bottom) = spot, box
    return left <= x - reach and x + reach <= right and top <= y - reach and y + reach <= bottom


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """60 pictures of one planted thing each, wide and high ones, and where it is."""
    folder, spots = tmp_path_factory.mktemp("wide"), {}
    for seed in range(60):
        image, spots[f"{seed:02}.png"] = planted(seed, turned=seed % 2 == 1)
        image.save(folder / f"{seed:02}.png")
    return folder, spots


def boxes_of(tower, folder, names, cache, **options):
    def both():
        keys = yield from content_keys(folder, names, cache)
        return (yield from salient_boxes(tower, folder, names, keys, cache, **options))

    return finish(both())


def test_a_salient_square_holds_what_was_planted_more_often_than_the_middle_does(wide, tmp_path):
    folder, spots = wide
    boxes = dict(zip(spots, boxes_of(load_original().visual, folder, list(spots), tmp_path), strict=True))
    sizes = {name: Image.open(folder / name).size for name in spots}
    assert all(box[2] - box[0] == box[3] - box[1] == 64 for box in boxes.values())
    salient = sum(holds(boxes[name], spots[name]) for name in spots)
    centre = sum(holds(centre_box(*sizes[name]), spots[name]) for name in spots)
    assert centre < 30 and salient >= 57


def test_squares_are_those_of_the_upright_picture(wide, tmp_path):
    folder, spots = wide
    name = next(name for name in list(spots)[::2] if not holds(centre_box(160, 64), spots[name]))
    image = Image.open(folder / name)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    image.save(tmp_path / "upright.png")
    tower = load_original().visual
    one, other = boxes_of(tower, tmp_path, ["turned.png", "upright.png"], tmp_path / "cache")
    assert one == other and holds(one, spots[name])


def test_squares_are_kept_by_content_and_tower(wide, tmp_path, monkeypatch):
    folder, spots = wide
    names, seen = list(spots)[:9], []
    look = features.saliency
    monkeypatch.setattr(features, "saliency", lambda tower, part: seen.append(len(part)) or look(tower, part))
    tower = tower_of()
    first = boxes_of(tower, folder, names, tmp_path)
    assert sum(seen) == 9
    assert boxes_of(tower, folder, names[::-1], tmp_path) == first[::-1] and sum(seen) == 9
    boxes_of(small_clip().visual, folder, names, tmp_path)
    assert sum(seen) == 18
    assert all(isinstance(side, int) for box in first for side in box)


def test_a_picture_that_does_not_decode_has_no_square(tmp_path):
    Image.new("RGB", (40, 20), "red").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    Image.new("RGB", (20, 40), "red").save(tmp_path / "c.png")
    names = ["a.png", "b.png", "c.png"]
    for _ in range(2):
        first, second, third = boxes_of(small_clip().visual, tmp_path, names, tmp_path / "cache")
        assert second is None and first[3] == 20 and third[2] == 20
    assert boxes_of(small_clip().visual, tmp_path, ["b.png"], tmp_path / "other") == [None]


def test_a_pass_that_does_not_fit_is_taken_again_in_halves(wide, tmp_path, monkeypatch):
    folder, spots = wide
    names, tower = list(spots)[:8], tower_of()
    expected = boxes_of(tower, folder, names, tmp_path / "a")
    look, tried = features.saliency, []

    def short(tower, part):
        tried.append(len(part))
        if len(part) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return look(tower, part)

    monkeypatch.setattr(features, "saliency", short)
    assert boxes_of(tower, folder, names, tmp_path / "b") == expected
    assert tried == [8, 4, 2, 2, 2, 2]
