"""Every read point and the picture features, held to transformers' CLIPModel in fp32."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from safetensors.torch import save_file
from transformers.models.clip.configuration_clip import CLIPConfig as HFConfig
from transformers.models.clip.modeling_clip import CLIPModel

from gmp.clip import (
    CLIP,
    Block,
    CLIPConfig,
    TextConfig,
    TextTower,
    VisionConfig,
    VisionTower,
    end_of_text,
    initialize,
    set_checkpointing,
)
from gmp.geometric import to_geometric
from gmp.layouts import read_text, read_vision

TOLERANCE = 1e-5
SMALL_TEXT = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4}
SMALL_VISION = {
    "hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


def relative(found, expected):
    """Largest error over the largest value."""
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def hugging_face(text, vision, activation, embed, vocab=100, context=77, std=0.1):
    """A random CLIPModel in fp32 whose weights fit into fp16, made without torch's initialisation."""
    last = {"bos_token_id": vocab - 2, "eos_token_id": vocab - 1, "pad_token_id": vocab - 1}
    config = HFConfig(
        text_config={
            **text, **last, "vocab_size": vocab, "hidden_act": activation, "projection_dim": embed,
            "max_position_embeddings": context,
        },
        vision_config={**vision, "hidden_act": activation, "projection_dim": embed},
        projection_dim=embed,
    )  # fmt: skip
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = CLIPModel(config)
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            middle = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(middle, std, generator=generator).copy_(parameter.half())
    for tower in (model.text_model, model.vision_model):
        positions = tower.embeddings.position_ids
        positions.copy_(torch.arange(positions.shape[1])[None])
    return model.eval()


def ours(model, folder, activation, heads=(None, None)):
    path = folder / "model.safetensors"
    tensors = {n: p.detach().half() for n, p in model.named_parameters() if n != "logit_scale"}
    save_file(tensors | {"logit_scale": model.logit_scale.detach().clone()}, path, {"format": "pt"})
    text = read_text(path, heads=heads[0], activation=activation)
    vision = read_vision(path, heads=heads[1], activation=activation)
    path.unlink()
    with torch.device("meta"):
        clip = CLIP(CLIPConfig(text.config, vision.config))
    clip.load_state_dict(text.state | vision.state, assign=True)
    return clip


def captions(rows, vocab, context, seed=0):
    """Start, words, end-of-text and padding with end-of-text; row 0 fills the context, row 1 is empty."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab - 2, (rows, context), generator=generator)
    ids[:, 0] = vocab - 2
    ends = torch.randint(2, context - 1, (rows,), generator=generator)
    ends[0] = context - 1
    if rows > 1:
        ends[1] = 1
    for row, end in enumerate(ends.tolist()):
        ids[row, end:] = vocab - 1
    return ids, ends


def pictures(count, size, seed=1):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def text_reference(model, ids):
    found = model.text_model(input_ids=ids, output_hidden_states=True)
    return {
        "penultimate": found.hidden_states[-2],
        "last": found.last_hidden_state,
        "pooled": found.pooler_output,
        "projected": model.text_projection(found.pooler_output),
    }


def image_reference(model, pixels):
    return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)


def check(model, clip, ids, pixels):
    with torch.no_grad():
        points = clip(ids)
        for name, expected in text_reference(model, ids).items():
            assert relative(getattr(points, name), expected) < TOLERANCE, name
        assert relative(clip.encode_image(pixels), image_reference(model, pixels)) < TOLERANCE


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def small(request, tmp_path_factory):
    model = hugging_face(SMALL_TEXT, SMALL_VISION, request.param, embed=24, std=0.3)
    return model, ours(model, tmp_path_factory.mktemp("small"), request.param, heads=(4, 3))


@pytest.fixture(scope="module")
def clip(small):
    return small[1]


def test_small(small):
    ids, _ = captions(5, 100, 77)
    check(*small, ids, pictures(3, 32))


def test_activations_differ(tmp_path):
    model = hugging_face(SMALL_TEXT, SMALL_VISION, "gelu", embed=24, std=0.3)
    wrong = ours(model, tmp_path, "quick_gelu", heads=(4, 3))
    ids, _ = captions(2, 100, 77)
    with torch.no_grad():
        assert relative(wrong(ids).last, text_reference(model, ids)["last"]) > 100 * TOLERANCE
        assert relative(wrong.encode_image(pictures(1, 32)), image_reference(model, pictures(1, 32))) > 100 * TOLERANCE


def test_full_size_vit_l_14(tmp_path):
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    vision = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 224, "patch_size": 14,
    }  # fmt: skip
    model = hugging_face(text, vision, "quick_gelu", embed=768, vocab=49408, std=0.02)
    clip = ours(model, tmp_path, "quick_gelu")
    assert clip.config == CLIPConfig(
        TextConfig(768, 12, 12, 3072, 77, 49408, 768, "quick_gelu"),
        VisionConfig(1024, 24, 16, 4096, 14, 224, 768, "quick_gelu"),
    )
    ids, _ = captions(2, 49408, 77)
    check(model, clip, ids, pictures(1, 224))


@pytest.mark.parametrize(("width", "mlp_width"), [(1664, 2048), (1408, 1024)], ids=["bigG: 104", "g: 88"])
def test_head_widths_that_are_not_64(width, mlp_width, tmp_path):
    vision = {
        "hidden_size": width, "intermediate_size": mlp_width, "num_hidden_layers": 1, "num_attention_heads": 16,
        "image_size": 42, "patch_size": 14,
    }  # fmt: skip
    model = hugging_face(SMALL_TEXT, vision, "gelu", embed=24, std=0.05)
    clip = ours(model, tmp_path, "gelu", heads=(4, None))
    assert clip.visual.transformer.resblocks[0].attn.heads == 16
    ids, _ = captions(1, 100, 77)
    check(model, clip, ids, pictures(2, 42))


def test_long_context(tmp_path):
    model = hugging_face(SMALL_TEXT, SMALL_VISION, "gelu", embed=24, context=248, std=0.3)
    clip = ours(model, tmp_path, "gelu", heads=(4, 3))
    assert clip.text_config.context_length == 248
    ids, ends = captions(4, 100, 248)
    assert ends.max() == 247
    check(model, clip, ids, pictures(1, 32))


def test_gradients_are_those_of_transformers(small):
    model, clip = small
    ids, _ = captions(3, 100, 77)
    weight = torch.randn(3, 24, generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    clip.zero_grad()
    (text_reference(model, ids)["projected"] * weight).sum().backward()
    (image_reference(model, pictures(3, 32)) * weight).sum().backward()
    (clip(ids).projected * weight).sum().backward()
    (clip.encode_image(pictures(3, 32)) * weight).sum().backward()
    theirs, block = model.text_model, clip.transformer.resblocks[1]
    layer = theirs.encoder.layers[1]
    attention = layer.self_attn
    fused = torch.cat([p.weight.grad for p in (attention.q_proj, attention.k_proj, attention.v_proj)])
    for found, expected in (
        (block.attn.in_proj_weight.grad, fused),
        (block.attn.out_proj.weight.grad, attention.out_proj.weight.grad),
        (block.mlp.c_fc.weight.grad, layer.mlp.fc1.weight.grad),
        (clip.token_embedding.weight.grad, theirs.embeddings.token_embedding.weight.grad),
        (clip.positional_embedding.grad, theirs.embeddings.position_embedding.weight.grad),
        (clip.text_projection.grad, model.text_projection.weight.grad.T),
        (clip.visual.conv1.weight.grad, model.vision_model.embeddings.patch_embedding.weight.grad),
        (clip.visual.class_embedding.grad, model.vision_model.embeddings.class_embedding.grad),
        (clip.visual.proj.grad, model.visual_projection.weight.grad.T),
    ):
        assert relative(found, expected) < 1e-4


@pytest.mark.parametrize("point", ["penultimate", "last", "pooled", "projected"])
def test_gradients_flow_from_every_read_point(clip, point):
    ids, _ = captions(3, 100, 77)
    clip.zero_grad()
    getattr(clip(ids), point).square().sum().backward()
    without = {n for n, p in clip.named_parameters() if p.grad is None or not p.grad.any()}
    expected = {n for n, _ in clip.named_parameters() if n.startswith("visual.") or n == "logit_scale"}
    if point == "penultimate":
        expected |= {n for n, _ in clip.named_parameters() if n.startswith(("transformer.resblocks.2.", "ln_final"))}
    if point != "projected":
        expected.add("text_projection")
    assert without == expected


@torch.no_grad()
def test_what_follows_end_of_text_changes_nothing_before_it(clip):
    ids, ends = captions(6, 100, 77)
    other = ids.clone()
    for row, end in enumerate(ends.tolist()):
        other[row, end + 1 :] = torch.arange(76 - end) % 90
    assert not torch.equal(ids, other)
    a, b = clip(ids), clip(other)
    for row, end in enumerate(ends.tolist()):
        for point in ("penultimate", "last"):
            x, y = (getattr(points, point)[row, : end + 1] for points in (a, b))
            assert relative(x, y) < 1e-6
    assert relative(a.projected, b.projected) < 1e-6
    assert relative(a.penultimate, b.penultimate) > 1e-3  # the rows behind it are different ones


@torch.no_grad()
def test_a_batch_may_be_cut_to_its_longest_caption(clip):
    ids, ends = captions(6, 100, 77)
    ids, ends = ids[1:], ends[1:]
    length = int(ends.max()) + 1
    assert length < 77
    full, cut = clip(ids), clip(ids[:, :length])
    for point in ("penultimate", "last"):
        assert relative(getattr(cut, point), getattr(full, point)[:, :length]) < 1e-6
    for point in ("pooled", "projected"):
        assert relative(getattr(cut, point), getattr(full, point)) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_penultimate_alone(layers):
    config = CLIPConfig(TextConfig(32, layers, 2, 64, 12, 50, 16), VisionConfig(32, 1, 2, 64, 8, 16, 16))
    clip = initialize(CLIP(config), torch.Generator().manual_seed(0))
    ids, _ = captions(3, 50, 12)
    assert torch.equal(clip.penultimate(ids), clip(ids).penultimate)


@torch.no_grad()
@pytest.mark.parametrize("vocab", [60, 49408, 49410])
def test_end_of_text_is_the_first_of_the_largest_ids(vocab):
    ids, ends = captions(7, vocab, 20)
    assert torch.equal(end_of_text(ids), ends)
    padded = ids.clone()  # clip_g pads with 0
    for row, end in enumerate(ends.tolist()):
        padded[row, end + 1 :] = 0
    assert torch.equal(end_of_text(padded), ends)
    config = CLIPConfig(TextConfig(32, 1, 2, 64, 20, vocab, 16), VisionConfig(32, 1, 2, 64, 8, 16, 16))
    points = initialize(CLIP(config), torch.Generator().manual_seed(0))(padded)
    for row, end in enumerate(ends.tolist()):
        assert torch.equal(points.pooled[row], points.last[row, end])


def test_initialize_is_repeatable_and_leaves_nothing_out():
    config = CLIPConfig(TextConfig(32, 2, 2, 64, 12, 50, 16), VisionConfig(32, 2, 2, 64, 8, 16, 16))
    state = torch.get_rng_state()
    with torch.device("meta"):
        a, b = CLIP(config), CLIP(config)
    a, b = a.to_empty(device="cpu"), b.to_empty(device="cpu")
    with torch.no_grad():
        for clip in (a, b):
            for name, parameter in clip.named_parameters():
                if name != "logit_scale":
                    parameter.fill_(torch.nan)
            clip.logit_scale.fill_(1.0)
            initialize(clip, torch.Generator().manual_seed(3))
    for name, parameter in a.named_parameters():
        assert parameter.isfinite().all(), name
        assert torch.equal(parameter, b.get_parameter(name)), name
    assert torch.equal(torch.get_rng_state(), state)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="16 dimensions, vision into 24"):
        CLIP(CLIPConfig(TextConfig(32, 1, 2, 64, 12, 50, 16), VisionConfig(32, 1, 2, 64, 8, 16, 24)))
    with pytest.raises(ValueError, match="width 32 is not a multiple of 5 heads"):
        TextTower(TextConfig(32, 1, 5, 64, 12, 50, 16))
    with pytest.raises(ValueError, match="image size 20 is not a multiple of patch size 8"):
        VisionTower(VisionConfig(32, 1, 2, 64, 8, 20, 16))
    with pytest.raises(ValueError, match="'relu'"):
        TextTower(TextConfig(32, 1, 2, 64, 12, 50, 16, "relu"))


CHECKPOINTED = CLIPConfig(TextConfig(32, 3, 2, 64, 12, 50, 16), VisionConfig(32, 2, 2, 64, 8, 16, 16))


def through(clip, part):
    """What one part of a CLIP computes, as numbers that a loss may be made of."""
    if part == "vision":
        return clip.encode_image(pictures(3, 16))
    ids, _ = captions(3, 50, 12)
    if part == "penultimate":
        return clip.penultimate(ids)
    points = clip(ids)
    return torch.cat([points.penultimate.flatten(), points.last.flatten(), points.projected.flatten()])


def output_and_gradients(part, precision, geometric, checkpointing):
    clip = initialize(CLIP(CHECKPOINTED), torch.Generator().manual_seed(0))
    if geometric:
        to_geometric(clip)
    set_checkpointing(clip, checkpointing)
    runs = Counter()
    for name, module in clip.named_modules():
        if isinstance(module, Block):
            module.register_forward_pre_hook(lambda *_, name=name: runs.update([name]))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        output = through(clip, part)
        output.float().square().sum().backward()
    return output.detach(), {n: p.grad for n, p in clip.named_parameters() if p.grad is not None}, runs


@pytest.mark.parametrize("geometric", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("part", ["text", "vision", "penultimate"])
def test_checkpointing_changes_neither_outputs_nor_gradients(part, precision, geometric):
    expected, gradients, once = output_and_gradients(part, precision, geometric, checkpointing=False)
    found, again, twice = output_and_gradients(part, precision, geometric, checkpointing=True)
    assert relative(found.float(), expected.float()) < 1e-6
    assert again.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert relative(again[name], gradient) < 1e-6, name
    assert len(once) == {"text": 3, "vision": 2, "penultimate": 2}[part]
    assert set(once.values()) == {1}
    assert {name: 2 * count for name, count in once.items()} == twice  # it was in force


def test_checkpointing_keeps_the_inputs_of_blocks_and_little_else():
    clip = CLIP(CHECKPOINTED)
    sizes = {}
    for on in (False, True):
        set_checkpointing(clip, on)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            through(clip, "text")
        sizes[on] = kept
    stream = 3 * 12 * 32
    assert sizes[True].count(stream) == 3 + 1  # and the final LayerNorm's
    assert sum(sizes[True]) < sum(sizes[False]) / 5


@torch.no_grad()
def test_checkpointing_leaves_passes_without_gradients_alone():
    clip = initialize(CLIP(CHECKPOINTED), torch.Generator().manual_seed(0))
    expected = through(clip, "text")
    set_checkpointing(clip, True)
    runs = []
    for block in clip.transformer.resblocks:
        block.register_forward_pre_hook(lambda *_: runs.append(1))
    assert torch.equal(through(clip, "text"), expected)
    assert len(runs) == 3


def test_checkpointing_touches_no_random_numbers(monkeypatch):
    clip = initialize(CLIP(CHECKPOINTED), torch.Generator().manual_seed(0))
    set_checkpointing(clip, True)
    asked = []
    for name in ("get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch, name, lambda *_, name=name: asked.append(name))
    through(clip, "text").sum().backward()
    assert not asked
