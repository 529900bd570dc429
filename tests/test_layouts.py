"""Every layout in and out, held to transformers' models and to a mapping written a second time here."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.clip.configuration_clip import CLIPConfig as HFConfig
from transformers.models.clip.configuration_clip import CLIPTextConfig, CLIPVisionConfig
from transformers.models.clip.modeling_clip import (
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from gmp import __version__, files, layouts
from gmp.clip import CLIP, CLIPConfig, TextTower, VisionTower
from gmp.errors import InputError
from gmp.features import state_key
from gmp.geometric import fold_state, split

WIDTH, HEADS, LAYERS, MLP, VOCAB, EMBED = 32, 4, 3, 72, 100, 32  # a square text projection
SEEN, SEEN_HEADS, SEEN_LAYERS, PATCH, IMAGE = 48, 3, 2, 8, 32
LAYOUTS = ("huggingface", "openai")
L_PREFIX, G_PREFIX = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."


def text_config(**changes):
    return CLIPTextConfig(**{
        "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": MLP, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "projection_dim": EMBED, "hidden_act": "quick_gelu",
        "bos_token_id": VOCAB - 2, "eos_token_id": VOCAB - 1, "pad_token_id": VOCAB - 1, **changes,
    })  # fmt: skip


def vision_config():
    return CLIPVisionConfig(
        hidden_size=SEEN, intermediate_size=100, num_hidden_layers=SEEN_LAYERS,
        num_attention_heads=SEEN_HEADS, image_size=IMAGE, patch_size=PATCH, projection_dim=EMBED,
    )  # fmt: skip


def randomize(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def model():
    config = HFConfig(
        text_config=text_config().to_dict(), vision_config=vision_config().to_dict(), projection_dim=EMBED
    )
    return randomize(CLIPModel(config))


@pytest.fixture(scope="module")
def canonical(model):
    return by_hand(model.state_dict())


@pytest.fixture
def config(tmp_path, canonical):
    path = tmp_path / "config-source.safetensors"
    save(canonical, path)
    known = {"activation": "quick_gelu"}
    text, vision = layouts.read_text(path, heads=HEADS, **known), layouts.read_vision(path, heads=SEEN_HEADS, **known)
    return CLIPConfig(text.config, vision.config)


def by_hand(hf):
    """A second, independent mapping: one line per kind of tensor, from the Hugging Face side."""
    fixed = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "logit_scale": "logit_scale",
    }
    renamed = [
        ("text_model.encoder.layers", "transformer.resblocks"),
        ("vision_model.encoder.layers", "visual.transformer.resblocks"),
        ("text_model.final_layer_norm", "ln_final"), ("vision_model.pre_layrnorm", "visual.ln_pre"),
        ("vision_model.post_layernorm", "visual.ln_post"), ("layer_norm", "ln_"),
        ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"), ("self_attn.out_proj", "attn.out_proj"),
    ]  # fmt: skip
    result = {}
    for name, tensor in hf.items():
        if name in fixed:
            result[fixed[name]] = tensor.clone()
        elif name == "text_projection.weight":
            result["text_projection"] = tensor.t().contiguous()
        elif name == "visual_projection.weight":
            result["visual.proj"] = tensor.t().contiguous()
        elif "q_proj" in name:
            fused = torch.cat([hf[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"])
            name = name.replace("self_attn.q_proj.", "attn.in_proj_")
            result[name.replace(*renamed[0]).replace(*renamed[1])] = fused
        elif "k_proj" not in name and "v_proj" not in name:
            for old, other in renamed:
                name = name.replace(old, other)
            result[name] = tensor.clone()
    return result


def save(state, path, metadata=None):
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, path, metadata)
    return path


def text_part(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith("visual.")}


def vision_part(state):
    return {name: tensor for name, tensor in state.items() if name.startswith("visual.")}


def without(state, *names):
    return {name: tensor for name, tensor in state.items() if name not in names}


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def geometric(state):
    result = {}
    for name, tensor in state.items():
        if ".mlp.c_" in name and name.endswith(".weight"):
            stem = name.removesuffix("weight")
            result[f"{stem}r"], result[f"{stem}theta"] = split(tensor)
            result[f"{stem}theta"] *= 1.7  # trained rows are not of unit length
        else:
            result[name] = tensor
    return result


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == torch.float32 and found[name].is_contiguous(), name
        assert torch.equal(found[name], tensor.float()), name


# ---- reading what transformers writes


def test_clip_model(tmp_path, model, canonical):
    model.save_pretrained(tmp_path)
    text = layouts.read_text(tmp_path / "model.safetensors")
    vision = layouts.read_vision(tmp_path / "model.safetensors")
    assert_same(text.state, text_part(canonical))
    assert_same(vision.state, vision_part(canonical))
    assert text.source.missing == text.source.unexpected == ()
    assert text.source.notes == ("text_projection.weight is a Linear's weight and was transposed to text_projection",)
    assert text.source.path == "model.safetensors"
    assert text.source.sha256 == state_key(text_part(canonical))
    assert (text.source.layout, text.source.member) == ("huggingface", "clip_l")
    assert dataclasses.asdict(text.config) == {
        "width": WIDTH, "layers": LAYERS, "heads": HEADS, "mlp_width": MLP, "context_length": 77,
        "vocab_size": VOCAB, "embed_dim": EMBED, "activation": "quick_gelu", "end_of_text": VOCAB - 1, "assumed": (),
    }  # fmt: skip
    assert dataclasses.asdict(vision.config) == {
        "width": SEEN, "layers": SEEN_LAYERS, "heads": SEEN_HEADS, "mlp_width": 100, "patch_size": PATCH,
        "image_size": IMAGE, "embed_dim": EMBED, "activation": "quick_gelu", "registers": 0, "gates": 0, "assumed": (),
    }  # fmt: skip


@torch.no_grad()
def test_read_points_and_picture_embedding_equal_those_of_transformers(tmp_path, model):
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    text, vision = layouts.read_text(path, heads=HEADS), layouts.read_vision(path, heads=SEEN_HEADS)
    clip = CLIP(CLIPConfig(text.config, vision.config)).eval()
    clip.load_state_dict({**text.state, **vision.state})
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB - 1, (3, 20), generator=generator)
    ids[:, 12] = VOCAB - 1
    pixels = torch.randn(2, 3, IMAGE, IMAGE, generator=generator)
    ours = clip(ids)
    theirs = model.text_model(input_ids=ids, output_hidden_states=True)
    close = {"atol": 2e-5, "rtol": 1e-4}
    torch.testing.assert_close(ours.penultimate, theirs.hidden_states[-2], **close)
    torch.testing.assert_close(ours.last, theirs.last_hidden_state, **close)
    torch.testing.assert_close(ours.pooled, theirs.pooler_output, **close)
    torch.testing.assert_close(ours.projected, model.text_projection(theirs.pooler_output), **close)
    seen = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    torch.testing.assert_close(clip.encode_image(pixels), seen, **close)


@pytest.mark.parametrize("projected", [True, False])
def test_text_models_with_and_without_the_level(tmp_path, projected):
    model = randomize((CLIPTextModelWithProjection if projected else CLIPTextModel)(text_config()))
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    raw = load_file(path)
    prefixed_already = any(name.startswith("text_model.") for name in raw)
    assert prefixed_already == projected  # transformers >= 5.6
    with_level = raw if projected else prefixed(raw, "text_model.")
    wanted = by_hand(with_level)
    missing = ("logit_scale",) if projected else ("text_projection", "logit_scale")
    for state in (raw, with_level):
        found = layouts.read_text(save(state, path), heads=HEADS)
        assert_same(found.state, wanted)
        assert found.source.missing == missing
        contents = layouts.describe(files.read_header(path))
        assert (contents.kind, contents.layout, contents.vision) == ("text_encoder", "huggingface", None)
        assert contents.problems == ()


def test_vision_models(tmp_path):
    randomize(CLIPVisionModelWithProjection(vision_config())).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    found = layouts.read_vision(path, heads=SEEN_HEADS)
    assert_same(found.state, by_hand(load_file(path)))
    assert layouts.describe(files.read_header(path)).kind == "vision_tower"
    randomize(CLIPVisionModel(vision_config())).save_pretrained(tmp_path)
    assert layouts.describe(files.read_header(path)).kind == "vision_tower"
    with pytest.raises(InputError, match="vision tower cannot be read: tensors are missing: visual_projection.w"):
        layouts.read_vision(path, heads=SEEN_HEADS)


def test_position_ids_are_dropped_and_damage_is_reported(tmp_path, model):
    state = model.state_dict()
    key = "text_model.embeddings.position_ids"
    whole = torch.arange(77)[None]
    found = layouts.read_text(save({**state, key: whole}, tmp_path / "a.safetensors"), heads=HEADS)
    assert "damaged" not in str(found.source.notes) and found.source.unexpected == ()
    merged = whole.float()
    merged[0, 76] = 75.9975
    found = layouts.read_text(save({**state, key: merged}, tmp_path / "a.safetensors"), heads=HEADS)
    assert found.source.notes[0] == f"{key} is damaged (75.9975 at 76) and was not used: positions are counted afresh"
    assert_same(found.state, text_part(by_hand(state)))


# ---- orientation by name form


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["text_projection", "text_projection.weight"])
@pytest.mark.parametrize("embed", [EMBED, 20])
def test_the_form_of_the_name_tells_how_a_projection_lies(tmp_path, model, canonical, layout, name, embed):
    state = model.state_dict() if layout == "huggingface" else canonical
    state = without(state, "text_projection", "text_projection.weight")
    wanted = torch.randn(WIDTH, embed, generator=torch.Generator().manual_seed(5))
    stored = wanted if name == "text_projection" else wanted.T
    found = layouts.read_text(save({**state, name: stored}, tmp_path / "a.safetensors"), heads=HEADS)
    assert torch.equal(found.state["text_projection"], wanted)
    assert not torch.equal(found.state["text_projection"], wanted.T)
    assert found.config.embed_dim == embed


def test_both_forms_at_once_are_refused(tmp_path, model, canonical):
    state = {**model.state_dict(), "text_projection": canonical["text_projection"]}
    with pytest.raises(InputError, match="both text_projection and text_projection.weight"):
        layouts.read_text(save(state, tmp_path / "a.safetensors"), heads=HEADS)


# ---- OpenAI and OpenCLIP


@pytest.mark.parametrize("which", ["full", "text", "vision"])
def test_openai(tmp_path, canonical, which):
    part = {"full": canonical, "text": text_part(canonical), "vision": vision_part(canonical)}[which]
    numbers = {"input_resolution": 224, "context_length": 77, "vocab_size": VOCAB}
    scalars = {name: torch.tensor(value) for name, value in numbers.items()} if which != "vision" else {}
    path = save({**part, **scalars}, tmp_path / "a.safetensors")
    kind = {"full": "clip", "text": "text_encoder", "vision": "vision_tower"}[which]
    contents = layouts.describe(files.read_header(path))
    assert (contents.kind, contents.layout, contents.problems) == (kind, "openai", ())
    if which != "vision":
        found = layouts.read_text(path, heads=HEADS)
        assert_same(found.state, text_part(canonical))
        assert found.source.unexpected == ()
    if which != "text":
        assert_same(layouts.read_vision(path, heads=SEEN_HEADS).state, vision_part(canonical))


@pytest.mark.parametrize("module", ["", "module."])
@pytest.mark.parametrize("level", ["", "text."])
def test_open_clip(tmp_path, canonical, module, level):
    text = without(text_part(canonical), "logit_scale")
    state = {
        **prefixed(text, module + level),
        **prefixed(vision_part(canonical), module),
        f"{module}logit_scale": canonical["logit_scale"][None],
    }
    path = save(state, tmp_path / "a.safetensors")
    found = layouts.read_text(path, heads=HEADS)
    assert_same(found.state, text_part(canonical))
    assert found.source.unexpected == ()
    assert_same(layouts.read_vision(path, heads=SEEN_HEADS).state, vision_part(canonical))
    assert layouts.describe(files.read_header(path)).kind == "clip"


def test_open_clip_projection_with_a_bias_is_refused(tmp_path, canonical):
    text = without(text_part(canonical), "logit_scale", "text_projection")
    state = {
        **text,
        "text_projection.weight": torch.zeros(EMBED, WIDTH),
        "text_projection.bias": torch.zeros(EMBED),
    }
    with pytest.raises(InputError, match="not those of a CLIP: text.text_projection.bias"):
        layouts.read_text(save(prefixed(state, "text."), tmp_path / "a.safetensors"), heads=HEADS)


# ---- checkpoints


@pytest.fixture(scope="module")
def wide():
    """A clip_g of 128 channels, in canonical form."""
    config = text_config(hidden_size=128, num_attention_heads=2, intermediate_size=160, projection_dim=128)
    state = by_hand(randomize(CLIPTextModelWithProjection(config), seed=3).state_dict())
    return {**state, "logit_scale": torch.tensor(4.6)}


def sdxl(model, wide, g_projection="text_projection"):
    slim = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("text_model.")}
    slim["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    broad = without(wide, "text_projection")
    broad[g_projection] = wide["text_projection"] if g_projection == "text_projection" else wide["text_projection"].T
    return {
        "model.diffusion_model.input_blocks.0.0.weight": torch.full((4, 4), float("nan")),
        "first_stage_model.decoder.conv_in.weight": torch.zeros(4, 4),
        **{name: tensor.half() for name, tensor in prefixed(slim, L_PREFIX).items()},
        **{name: tensor.half() for name, tensor in prefixed(broad, G_PREFIX).items()},
    }


@pytest.mark.parametrize("g_projection", ["text_projection", "text_projection.weight"])
def test_sdxl(tmp_path, monkeypatch, model, canonical, wide, g_projection):
    path = save(sdxl(model, wide, g_projection), tmp_path / "sdxl.safetensors")
    contents = layouts.describe(files.read_header(path))
    assert (contents.kind, contents.layout, contents.problems) == ("checkpoint", "single_file", ())
    assert list(contents.text) == ["clip_l", "clip_g"] and contents.vision is None

    asked = []
    read = files.read_tensors

    def spy(header, names):
        names = list(names)
        asked.extend(names)
        return read(header, names)

    monkeypatch.setattr(files, "read_tensors", spy)
    slim = layouts.read_text(path, heads=HEADS)
    assert asked and all(name.startswith(L_PREFIX) for name in asked)
    halves = {name: tensor.half() for name, tensor in text_part(canonical).items()}
    assert_same(slim.state, without(halves, "text_projection", "logit_scale"))
    assert (slim.source.member, slim.config.activation) == ("clip_l", "quick_gelu")
    assert slim.source.missing == ("text_projection", "logit_scale") and slim.source.assumptions == ()
    assert slim.source.dtypes == {"F16": 4 + LAYERS * 16}

    asked.clear()
    broad = layouts.read_text(path, "clip_g")
    assert asked and all(name.startswith(G_PREFIX) for name in asked)
    assert_same(broad.state, {name: tensor.half() for name, tensor in wide.items()})
    assert (broad.source.member, broad.config.activation, broad.config.heads) == ("clip_g", "gelu", 2)
    with pytest.raises(InputError, match="sdxl.safetensors has no text encoder 'clip_h'; it holds clip_g, clip_l"):
        layouts.read_text(path, "clip_h")
    with pytest.raises(InputError, match="holds a text encoder only .clip_g, clip_l., no vision tower"):
        layouts.read_vision(path)


@pytest.mark.parametrize(
    "prefix", ["cond_stage_model.transformer.", "text_encoders.clip_l.transformer.", "clip_l.transformer."]
)
@pytest.mark.parametrize("level", ["text_model.", ""])
def test_other_checkpoints(tmp_path, model, canonical, prefix, level):
    text = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("text_")}
    state = {prefix + name.replace("text_model.", level): tensor for name, tensor in text.items()}
    state |= {
        "model.diffusion_model.x.weight": torch.zeros(1),
        "text_encoders.t5xxl.scaled_fp8": torch.zeros(1),
    }
    found = layouts.read_text(save(state, tmp_path / "a.safetensors"), "clip_l", heads=HEADS)
    assert_same(found.state, without(text_part(canonical), "logit_scale"))
    assert (found.source.layout, found.config.activation) == ("single_file", "quick_gelu")


# ---- r and theta


def test_gmp_is_folded_unless_asked_not_to(tmp_path, canonical, config):
    state = geometric(canonical)
    path = tmp_path / "a.safetensors"
    layouts.write_clip(state, path, layout="gmp", config=config)
    assert layouts.describe(files.read_header(path)).layout == "gmp"
    folded = {**layouts.read_text(path).state, **layouts.read_vision(path).state}
    assert_same(folded, fold_state(state))
    torch.testing.assert_close(folded, {name: canonical[name] for name in folded}, atol=1e-6, rtol=1e-6)
    kept = {**layouts.read_text(path, fold=False).state, **layouts.read_vision(path, fold=False).state}
    assert_same(kept, state)
    assert layouts.read_text(path, fold=False).config == config.text
    name = "transformer.resblocks.1.mlp.c_fc"
    exact = state[f"{name}.theta"].double()
    exact = state[f"{name}.r"].double() * exact / exact.norm(dim=1, keepdim=True)
    assert torch.equal(folded[f"{name}.weight"], exact.float())
    with pytest.raises(InputError, match=f"tensors are missing: {name}.r"):
        layouts.read_text(save(without(state, f"{name}.r"), path), heads=HEADS)


def test_gmp_is_written_only_from_r_and_theta_in_fp32(tmp_path, canonical, config):
    path = tmp_path / "a.safetensors"
    with pytest.raises(InputError, match="this is a state with plain weights"):
        layouts.write_clip(canonical, path, layout="gmp", config=config)
    with pytest.raises(InputError, match="layout gmp takes .* and fp32; this is a state with r and theta, and fp16"):
        layouts.write_clip(geometric(canonical), path, layout="gmp", dtype="fp16", config=config)
    assert not path.exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts_are_given_folded_weights(tmp_path, canonical, config, layout):
    path = tmp_path / "a.safetensors"
    layouts.write_text(geometric(text_part(canonical)), path, layout=layout, config=config.text)
    assert_same(layouts.read_text(path).state, fold_state(geometric(text_part(canonical))))


# ---- writing


@pytest.mark.parametrize(("one", "two"), [*itertools.permutations((*LAYOUTS, "gmp"), 2)])
def test_round_trips_between_layouts_lose_no_bit(tmp_path, canonical, config, one, two):
    start = geometric(canonical) if "gmp" in (one, two) else canonical
    plain = fold_state(start)
    for layout, name in ((one, "1"), (two, "2"), (one, "3")):
        given = start if layout == "gmp" else plain
        layouts.write_clip(given, tmp_path / name, layout=layout, config=config)
        text, vision = layouts.read_text(tmp_path / name), layouts.read_vision(tmp_path / name)
        assert (text.source.layout, vision.source.layout) == (layout, layout)
        plain = {**text.state, **vision.state}
        assert_same(plain, fold_state(start))
        assert CLIPConfig(text.config, vision.config) == config
        assert text.source.assumptions == vision.source.assumptions == ()
    assert (tmp_path / "1").read_bytes() == (tmp_path / "3").read_bytes()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lacking", [(), ("logit_scale",), ("text_projection", "logit_scale")])
def test_text_encoder_round_trip(tmp_path, canonical, config, layout, lacking):
    state = without(text_part(canonical), *lacking)
    layouts.write_text(state, tmp_path / "a", layout=layout, config=config.text, metadata={"run": "abc"})
    found = layouts.read_text(tmp_path / "a")
    assert_same(found.state, state)
    assert found.config == config.text and found.source.missing == tuple(reversed(sorted(lacking)))
    metadata = files.read_header(tmp_path / "a").metadata
    assert metadata.keys() == {"format", "clip_config", "gmp_version", "run"}
    assert (metadata["format"], metadata["gmp_version"], metadata["run"]) == ("pt", __version__, "abc")
    assert json.loads(metadata["clip_config"]) == {"text": dataclasses.asdict(config.text) | {"assumed": []}}


def test_transformers_loads_what_is_written(tmp_path, model, canonical, config):
    model.config.save_pretrained(tmp_path)
    layouts.write_clip(canonical, tmp_path / "model.safetensors", config=config)
    loaded = CLIPModel.from_pretrained(tmp_path).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name
    raw = load_file(tmp_path / "model.safetensors")
    assert raw.keys() == model.state_dict().keys()


@pytest.mark.parametrize(("dtype", "kind"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_precision(tmp_path, canonical, config, dtype, kind):
    layouts.write_clip(canonical, tmp_path / "a", layout="openai", dtype=dtype, config=config)
    assert {tensor.dtype for tensor in load_file(tmp_path / "a").values()} == {kind}
    assert_same(layouts.read_text(tmp_path / "a").state, {n: t.to(kind) for n, t in text_part(canonical).items()})


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16])
def test_plain_casts_are_read(tmp_path, model, canonical, kind):
    state = {name: tensor.to(kind) for name, tensor in model.state_dict().items()}
    found = layouts.read_text(save(state, tmp_path / "a"), heads=HEADS)
    assert_same(found.state, {name: tensor.to(kind).float() for name, tensor in text_part(canonical).items()})


@pytest.mark.parametrize(("dtype", "value"), [("fp16", 65505.0), ("fp16", -1e5), ("fp32", float("nan")),
                                              ("bf16", float("inf")), ("bf16", 3.4e38)])  # fmt: skip
def test_values_that_a_dtype_cannot_hold_are_refused(tmp_path, canonical, config, dtype, value):
    broken = canonical["transformer.resblocks.1.attn.in_proj_weight"].clone()
    broken[40, 0] = value  # a row of k
    state = {**canonical, "transformer.resblocks.1.attn.in_proj_weight": broken}
    with pytest.raises(InputError, match=r"NaN or infinity.* in 1 tensors: text_model.*1\.self_attn.k_proj.weight"):
        layouts.write_clip(state, tmp_path / "a", dtype=dtype, config=config)
    assert not (tmp_path / "a").exists()


def test_states_that_are_no_tower_are_refused_with_all_problems(tmp_path, canonical, config):
    state = without(canonical, "ln_final.bias", "transformer.resblocks.0.ln_1.weight")
    state["transformer.resblocks.1.mlp.c_fc.bias"] = torch.zeros(3)
    state["extra"] = torch.zeros(1)
    with pytest.raises(InputError) as error:
        layouts.write_clip(state, tmp_path / "a", config=config)
    for words in (
        "tensors are missing: ln_final.bias, transformer.resblocks.0.ln_1.weight",
        "1.mlp.c_fc.bias is [3] and not [72]", "not part of a CLIP: extra",
    ):  # fmt: skip
        assert words in str(error.value)
    with pytest.raises(InputError, match="not part of a text encoder: visual.*write_clip writes both"):
        layouts.write_text(canonical, tmp_path / "a", config=config.text)
    shallow = {name: tensor for name, tensor in canonical.items() if not name.startswith("transformer.resblocks.2.")}
    with pytest.raises(InputError, match="config says width 32 and 3 layers, the text encoder has width 32 and 2"):
        layouts.write_text(text_part(shallow), tmp_path / "a", config=config.text)
    for wrong in ({"layout": "nope"}, {"dtype": "fp8"}):
        with pytest.raises(InputError, match="is not one of"):
            layouts.write_clip(canonical, tmp_path / "a", config=config, **wrong)


# ---- heads and activation


def test_heads_and_activation_who_knows_them_in_order(tmp_path, canonical, config):
    path = tmp_path / "a"
    state = text_part(canonical)
    layouts.write_text(state, path, config=dataclasses.replace(config.text, heads=8, activation="gelu"))
    stored = layouts.read_text(path)
    assert (stored.config.heads, stored.config.activation, stored.source.assumptions) == (8, "gelu", ())
    given = layouts.read_text(path, heads=2, activation="quick_gelu")
    assert (given.config.heads, given.config.activation) == (2, "quick_gelu")
    bare = layouts.read_text(save(state, path), heads=4)
    assert bare.config.activation == "quick_gelu"
    assert bare.source.assumptions == (
        "activation quick_gelu assumed: a file with these names does not say; for LAION models set gelu (--activation)",
    )
    with pytest.raises(InputError, match="width 32 does not tell its number of heads; set heads .--heads"):
        layouts.read_text(path)
    with pytest.raises(InputError, match="5 attention heads do not divide the text tower's width 32"):
        layouts.read_text(path, heads=5)
    with pytest.raises(InputError, match="activation 'relu' is not one of"):
        layouts.read_text(path, heads=4, activation="relu")
    for junk in ("{", "[]", '{"text": 3}', '{"vision": {"heads": 8}}'):
        with pytest.raises(InputError, match="set heads .--heads"):
            layouts.read_text(save(state, path, {"clip_config": junk}))


def test_an_assumption_stays_one_in_what_is_made_of_the_file(tmp_path, canonical):
    read = layouts.read_text(save(text_part(canonical), tmp_path / "a.safetensors"), heads=4)
    assert read.config.assumed == ("activation",)
    model = tmp_path / "model.safetensors"
    layouts.write_text(read.state, model, config=read.config)
    again = layouts.read_text(model)
    assert (again.config.heads, again.source.assumptions) == (4, read.source.assumptions)
    given = layouts.read_text(model, activation="gelu")
    assert (given.config.activation, given.config.assumed, given.source.assumptions) == ("gelu", (), ())
    says = {"model_type": "clip_text_model", "hidden_act": "gelu", "num_attention_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps(says))  # outranks what was assumed, not what was given
    beside = layouts.read_text(model)
    assert (beside.config.activation, beside.config.heads, beside.source.assumptions) == ("gelu", 4, ())


def test_a_config_of_another_kind_of_model_is_refused(tmp_path, model, canonical):
    model.save_pretrained(tmp_path)
    for kind in ("siglip_text_model", "metaclip_2", "groupvit"):
        config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": kind}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=f"its config asks for a model of type '{kind}'"):
            layouts.read_text(tmp_path)


@pytest.mark.parametrize(
    ("width", "heads", "activation", "member"),
    [(512, 8, "quick_gelu", "clip_l"), (768, 12, "quick_gelu", "clip_l"), (1024, 16, "gelu", "clip_h"),
     (1280, 20, "gelu", "clip_g")],
)  # fmt: skip
def test_bare_text_encoders(tmp_path, width, heads, activation, member):
    config = text_config(hidden_size=width, num_attention_heads=1, intermediate_size=8, num_hidden_layers=1)
    path = save(CLIPTextModelWithProjection(config).state_dict(), tmp_path / "a")
    found = layouts.read_text(path)
    assert (found.config.heads, found.config.activation, found.source.member) == (heads, activation, member)
    assert len(found.source.assumptions) == 1


@pytest.mark.parametrize(
    ("width", "heads", "sure"),
    [
        (768, 12, True),
        (1024, 16, True),
        (1280, 16, True),
        (1408, 16, True),
        (1664, 16, True),
        (128, 2, False),
    ],
)
def test_bare_vision_towers(tmp_path, width, heads, sure):
    config = CLIPVisionConfig(
        hidden_size=width, num_attention_heads=1, intermediate_size=8, num_hidden_layers=1, image_size=16,
        patch_size=8, projection_dim=16,
    )  # fmt: skip
    path = save(CLIPVisionModelWithProjection(config).state_dict(), tmp_path / "a")
    found = layouts.read_vision(path)
    assert (found.config.heads, found.config.activation) == (heads, "gelu" if width > 1024 else "quick_gelu")
    assert any("attention heads assumed" in sentence for sentence in found.source.assumptions) != sure
    VisionTower(found.config).load_state_dict({k.removeprefix("visual."): v for k, v in found.state.items()})


def test_a_text_encoder_without_projection_has_its_width_as_embedding_width(tmp_path, canonical, config):
    layouts.write_text(without(text_part(canonical), "text_projection"), tmp_path / "a", config=config.text)
    found = layouts.read_text(tmp_path / "a")
    assert found.config == config.text
    lost = TextTower(found.config).load_state_dict(found.state, strict=False).missing_keys
    assert lost == ["text_projection"]


@pytest.mark.parametrize(
    ("prefix", "width", "member", "activation"),
    [
        ("cond_stage_model.model.", 1024, "clip_h", "gelu"),
        ("cond_stage_model.model.", 768, "clip_l", "quick_gelu"),  # zero123: OpenAI's L/14
        ("conditioner.embedders.0.model.", 1280, "clip_g", "gelu"),
        ("conditioner.embedders.0.model.", 1024, "clip_h", "gelu"),  # SD2 in the names of SDXL
    ],
)
def test_a_family_may_hold_another_clip_than_usual(tmp_path, prefix, width, member, activation):
    config = text_config(hidden_size=width, num_attention_heads=1, intermediate_size=8, num_hidden_layers=1)
    state = by_hand(CLIPTextModelWithProjection(config).state_dict())
    found = layouts.read_text(save(prefixed(state, prefix), tmp_path / "a"))
    assert (found.source.member, found.config.activation) == (member, activation)


# ---- damage


def refused(state, path, match, read=layouts.read_text, **arguments):
    with pytest.raises(InputError, match=match) as error:
        read(save(state, path), **arguments)
    assert "\n" not in str(error.value) and path.name in str(error.value)


def test_missing_tensors_are_named_together(tmp_path, model):
    lost = [
        "final_layer_norm.bias",
        "encoder.layers.1.mlp.fc1.weight",
        "encoder.layers.0.self_attn.v_proj.bias",
    ]
    state = without(model.state_dict(), *(f"text_model.{name}" for name in lost))
    named = ", ".join(sorted(f"text_model.{name}" for name in lost))
    refused(state, tmp_path / "a", f"tensors are missing: {named}$")
    few = {n: t for n, t in model.state_dict().items() if "layer_norm" not in n}
    refused(few, tmp_path / "a", r"layer_norm1.bias, .* … \(14 in all\)")


def test_gaps_in_the_block_numbers(tmp_path, model):
    state = {n: t for n, t in model.state_dict().items() if ".layers.1." not in n}
    refused(state, tmp_path / "a", r"blocks are missing from text_model.encoder.layers: 1 \(1 in all\)")
    far = {n.replace("text_model.encoder.layers.2.", "text_model.encoder.layers.99999."): t
           for n, t in model.state_dict().items()}  # fmt: skip
    refused(far, tmp_path / "a", r"2, 3, 4, 5, 6, 7 … \(99997 in all\)")


def test_damage_to_one_tower_does_not_keep_the_other_from_being_read(tmp_path, canonical):
    state = without(canonical, "visual.ln_pre.bias")
    refused(state, tmp_path / "a", "visual.ln_pre.bias", layouts.read_vision)
    assert_same(layouts.read_text(tmp_path / "a", heads=HEADS).state, text_part(canonical))
    contents = layouts.describe(files.read_header(tmp_path / "a"))
    assert contents.problems == ("vision: tensors are missing: visual.ln_pre.bias",)


def test_shapes_that_contradict_each_other(tmp_path, model):
    name = "text_model.encoder.layers.1.mlp.fc2.weight"
    refused(
        {**model.state_dict(), name: torch.zeros(5, 5)},
        tmp_path / "a",
        r"1.mlp.c_proj.weight is \[5, 5\] and",
    )


def test_not_a_number(tmp_path, canonical):
    state = {name: tensor.clone() for name, tensor in canonical.items()}
    state["ln_final.bias"][3] = float("inf")
    state["positional_embedding"][0, 0] = float("nan")
    refused(state, tmp_path / "a", "2 tensors hold NaN or infinity: ln_final.bias, positional_emb", heads=HEADS)


def test_tensors_that_belong_to_nothing_are_reported_or_refused(tmp_path, canonical):
    state = {**canonical, "logit_bias": torch.zeros(()), "junk.weight": torch.zeros(2)}
    found = layouts.read_text(save(state, tmp_path / "a"), heads=HEADS)
    assert found.source.unexpected == ("junk.weight", "logit_bias")
    layer_scale = {**canonical, "transformer.resblocks.0.ls_1.gamma": torch.zeros(WIDTH)}
    refused(layer_scale, tmp_path / "a", "not those of a CLIP: transformer.resblocks.0.ls_1.gamma")


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("text.cls_emb", layouts.read_text),  # OpenCLIP's CoCa
        ("vision_model.embeddings.patch_embedding.bias", layouts.read_vision),
        ("visual_projection.bias", layouts.read_vision),
        ("text_model.embeddings.LayerNorm.weight", layouts.read_text),
        ("visual.head.weight", layouts.read_vision),
    ],
)
def test_what_changes_a_tower_is_refused_wherever_it_lies_in_it(tmp_path, model, canonical, name, read):
    state = model.state_dict()
    if name.startswith("text."):
        parts = without(text_part(canonical), "logit_scale")
        state = prefixed(parts, "text.") | vision_part(canonical)
    if name.startswith("visual."):
        state = canonical
    refused({**state, name: torch.zeros(3)}, tmp_path / "a", f"not those of a CLIP: {name}", read)


def test_a_tower_that_is_there_twice_is_refused(tmp_path, model, canonical):
    slim = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("text_model.")}
    twice = prefixed(slim, "clip_l.transformer.") | prefixed(slim, "text_encoders.clip_l.transformer.")
    refused(twice, tmp_path / "a", "is there twice, at text_encoders.clip_l.* and clip_l.transformer")
    refused(model.state_dict() | canonical, tmp_path / "a", "is there twice", layouts.read_vision)


@pytest.mark.parametrize("name", ["visual.positional_embedding", "visual.conv1.weight", "token_embedding.weight"])
def test_sizes_of_nothing_are_refused(tmp_path, canonical, name):
    state = {**canonical, name: canonical[name][:0]}
    if name == "visual.conv1.weight":
        state[name] = canonical[name][:, :, :0, :0]
    read = layouts.read_vision if name.startswith("visual") else layouts.read_text
    refused(state, tmp_path / "a", "shapes do not fit together", read)


def test_metadata_of_strangers_says_only_what_it_may(tmp_path, canonical):
    for fields in ({"other": 5}, {"end_of_text": 10**30, "embed_dim": -1, "assumed": 7}, {"assumed": ["other"]}):
        path = save(text_part(canonical), tmp_path / "a", {"clip_config": json.dumps({"text": fields})})
        config = layouts.read_text(path, heads=4).config
        assert (config.end_of_text, config.embed_dim) == (None, EMBED)


def test_whole_numbers_as_weights_are_refused(tmp_path, model):
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    state = {**model.state_dict(), name: torch.zeros(MLP, WIDTH, dtype=torch.int8)}
    refused(state, tmp_path / "a", f"tensors are I8, not a floating point type that is read: {name}")


@pytest.mark.parametrize(
    ("keys", "kind", "message"),
    [
        (["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"], "t5", "is a T5 text encoder"),
        (["shared.weight"], "t5", "is a T5 text encoder"),
        (["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"], "lora",
         "is a LoRA, not a text encoder: apply it in ComfyUI and use Text Encoder from CLIP, "
         "or give the base model's encoder"),
        (["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"], "lora", "is a LoRA"),
        (["text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight"], "lora", "is a LoRA"),
        (["lora_unet_x.hada_w1_a"], "lora", "is a LoRA"),
        (["model.diffusion_model.out.2.weight"], "checkpoint", "is a checkpoint without a text encoder"),
        (["model.diffusion_model.out.2.weight", "first_stage_model.decoder.conv_in.weight"], "checkpoint",
         "is a checkpoint without a text encoder"),
        (["double_blocks.0.img_attn.norm.key_norm.scale"], "diffusion_model", "is a diffusion model without"),
        (["decoder.conv_in.weight", "encoder.mid.block_1.conv1.weight"], "vae", "is a VAE"),
        (["first_stage_model.encoder.conv_in.weight"], "vae", "is a VAE"),
        (["model.layers.0.mlp.up_proj.weight"], "language_model", "is a language model"),
        (["blocks.0.mlp.up_proj.weight"], "unknown", "holds no CLIP.*it begins with blocks.0"),
        (["control_model.input_blocks.0.0.weight"], "controlnet", "is a ControlNet"),
        (["image_proj.norm.weight", "ip_adapter.1.to_k_ip.weight"], "ip_adapter", "is an IP-Adapter"),
        (["clip_l", "clip_g"], "embedding", "is a textual inversion embedding"),
        (["encoder.layers.0.layer_norm1.weight", "head.weight"], "siglip", "is a SigLIP"),
        (["vision_model.encoder.layers.0.layer_norm1.weight", "vision_model.head.attention.in_proj_weight"],
         "siglip", "is a SigLIP"),
        (["bert.encoder.layer.0.attention.self.query.weight"], "bert", "is a BERT"),
        (["model.1.sub.0.RDB1.conv1.0.weight"], "upscaler", "is an upscaler"),
        (["body.0.rdb1.conv1.weight"], "upscaler", "is an upscaler"),
        ([], "unknown", "holds no CLIP.*no tensors at all"),
        (["audio.transformer.resblocks.0.ln_1.weight"], "unknown",
         "blocks at audio.transformer.resblocks, where no layout"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("read", [layouts.read_text, layouts.read_vision])
def test_other_kinds_of_models_are_named(tmp_path, keys, kind, message, read):
    path = tmp_path / "model.safetensors"
    refused(dict.fromkeys(keys, torch.zeros(2)), path, message, read)
    assert layouts.describe(files.read_header(path)).kind == kind


def test_one_tower_in_place_of_the_other(tmp_path, canonical):
    refused(vision_part(canonical), tmp_path / "a", "holds a vision tower only, no text encoder")
    refused(
        text_part(canonical),
        tmp_path / "a",
        "holds a text encoder only .clip_l., no vision",
        layouts.read_vision,
    )
    refused(text_part(canonical), tmp_path / "a", "no text encoder 'clip_g'; it holds clip_l", member="clip_g")


@pytest.mark.parametrize("read", [layouts.read_text, layouts.read_vision])
def test_files_that_are_not_there_or_not_whole(tmp_path, canonical, read):
    path = tmp_path / "a.safetensors"
    with pytest.raises(InputError, match="does not exist"):
        read(path)
    with pytest.raises(InputError, match="is a folder without a model"):
        read(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="is empty"):
        read(path)
    save(canonical, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match="is truncated"):
        read(path)


def test_describe_gives_sizes(tmp_path, canonical):
    part = layouts.describe(files.read_header(save(canonical, tmp_path / "a"))).text["clip_l"]
    assert part.sizes == {"vocab": VOCAB, "width": WIDTH, "context": 77, "embed": EMBED, "mlp": MLP}
    assert part.layers == LAYERS and part.dtypes == {"F32": 6 + 12 * LAYERS}
    assert part.parameters == sum(tensor.numel() for tensor in text_part(canonical).values())
