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
    QuickGELU,
    TextConfig,
    TextTower,
    VisionConfig,
    VisionTower,
    end_of_text,
    initialize,
    pack,
    set_checkpointing,
)
from gmp.clip import precision as precision_of
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


def of_lengths(sizes, vocab=100, context=77, seed=3):
    """Captions of these lengths, with start and end of text."""
    ids = torch.randint(0, vocab - 2, (len(sizes), context), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = vocab - 2
    return torch.where(torch.arange(context)[None] < torch.tensor(sizes)[:, None] - 1, ids, vocab - 1)


SIZES = [5, 77, 3, 12, 12, 4, 30, 5, 2, 31, 12]


@pytest.mark.parametrize("worth", [0, 8, 10**9])
def test_a_stream_holds_every_caption_in_stretches(worth):
    ids = of_lengths(SIZES)
    packed = pack(ids, None, worth)
    assert sum(n * size for n, size in packed.shapes) == len(packed.ids) == len(packed.positions)
    assert sum(n for n, _ in packed.shapes) == len(SIZES)
    assert {0: 8, 10**9: 1}.get(worth, 4) == len(packed.shapes)  # every length by itself; few; all to the longest
    for caption, size, end in zip(ids, SIZES, packed.ends.tolist(), strict=True):
        rows = slice(end + 1 - size, end + 1)
        assert torch.equal(packed.ids[rows], caption[:size])
        assert torch.equal(packed.positions[rows], torch.arange(size))


@pytest.mark.parametrize("worth", [0, 1, 7, 20, 50, 400])
def test_stretches_are_the_cheapest(worth):
    sizes = sorted(set(SIZES))
    found = pack(of_lengths(SIZES), None, worth).shapes
    costs = []
    for cuts in range(2 ** (len(sizes) - 1)):  # every way to divide the lengths
        tops = [size for i, size in enumerate(sizes) if i == len(sizes) - 1 or cuts >> i & 1]
        padded = sum(min(top for top in tops if top >= size) for size in SIZES)
        costs.append(padded + worth * len(tops))
    assert sum(n * size for n, size in found) + worth * len(found) == min(costs)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("geometric", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_a_stream_gives_the_features_and_gradients_of_padded_captions(layers, geometric, checkpointing):
    config = CLIPConfig(TextConfig(32, layers, 4, 72, 77, 100, 24), VisionConfig(32, 1, 2, 64, 8, 16, 24))
    clip = initialize(CLIP(config), torch.Generator().manual_seed(0)).double()
    if geometric:
        to_geometric(clip)
    set_checkpointing(clip, checkpointing)
    ids = of_lengths(SIZES)
    weights = torch.randn(len(SIZES), 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for encode in (lambda: clip(ids).projected, lambda: clip.encode_text(ids)):
        clip.zero_grad()
        features = encode()
        (features * weights).sum().backward()
        results.append((features.detach(), {n: p.grad for n, p in clip.named_parameters() if p.grad is not None}))
    (expected, gradients), (found, others) = results
    assert relative(found, expected) < 1e-12
    assert gradients.keys() == others.keys() and len(gradients) > 10
    for name, gradient in gradients.items():
        assert relative(others[name], gradient) < 1e-10, name


def test_a_stream_ends_at_the_end_token_that_the_tower_names():
    """An id above end-of-text, as textual inversion adds them, does not end a caption."""
    config = CLIPConfig(TextConfig(32, 2, 4, 72, 20, 104, 24, end_of_text=99), VisionConfig(32, 1, 2, 64, 8, 16, 24))
    clip = initialize(CLIP(config), torch.Generator().manual_seed(0))
    ids = of_lengths([9, 12, 5], context=20)
    ids[:, 2] = 102
    with torch.no_grad():
        expected = clip(ids).projected
        assert relative(clip.encode_text(ids), expected) < 1e-5
    assert pack(ids, 99, 0).ends.tolist() == [13, 25, 4]
    assert pack(ids, None, 0).ends.tolist() == [2, 5, 8]  # the largest id of each row, wherever it stands


@pytest.mark.parametrize("part", ["text", "vision"])
def test_low_precision_rounds_products_and_nothing_else(part):
    clip = initialize(CLIP(CHECKPOINTED), torch.Generator().manual_seed(0))
    exact = through(clip, part)
    with precision_of(torch.bfloat16, clip):
        found = through(clip, part)
    assert found.dtype == torch.float32
    assert 1e-4 < relative(found, exact) < 0.03
    assert torch.equal(through(clip, part), exact)  # and is over afterwards


def test_quick_gelu_has_the_gradients_of_its_formula():
    x = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(QuickGELU(), (x,))
    assert relative(QuickGELU()(x), x * torch.sigmoid(1.702 * x)) < 1e-14


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
    with precision_of(torch.bfloat16 if precision == "bf16" else None, clip):
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
