"""OpenCLIP's files, read and encoded, held to what OpenCLIP itself computes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from gmp.clip import CLIPConfig
from gmp.encode import encode
from gmp.layouts import read_text, read_vision, write_clip
from tests.open_clip_peer import open_clip

TOLERANCE = 1e-5
NOT_CLOSE = 1e-3  # what a wrong activation or number of heads moves, at the least
VOCAB, CONTEXT = 300, 77
PUBLISHED = (
    "ViT-B-32", "ViT-B-16", "ViT-L-14-quickgelu", "ViT-L-14", "ViT-L-14-336-quickgelu", "ViT-H-14", "ViT-g-14",
    "ViT-bigG-14",
)  # fmt: skip
# Heads of 80 channels in the vision tower and of 16 in the text tower, MLPs of odd widths, two dimensions too few.
SMALL = {
    "embed_dim": 30,
    "vision_cfg": {
        "image_size": 28, "patch_size": 14, "layers": 3, "width": 160, "head_width": 80, "mlp_ratio": 4.3637,
    },
    "text_cfg": {"context_length": 16, "vocab_size": VOCAB, "width": 32, "heads": 2, "layers": 3, "mlp_ratio": 2.5},
}  # fmt: skip
SMALL_HEADS = (2, 2)


def relative(found, expected):
    assert found.shape == expected.shape and found.dtype == torch.float32
    return ((found - expected).norm() / expected.norm()).item()


def build(config, custom=False, **options):
    """A model with OpenCLIP's own random weights; biases, gains and logit scale moved off their zeros and ones."""
    kind = open_clip().CustomTextCLIP if custom else open_clip().CLIP
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(**config, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def inputs(config):
    """Three captions, padded with 0 as OpenCLIP does, and two pictures."""
    generator = torch.Generator().manual_seed(2)
    length, size = config["text_cfg"]["context_length"], config["vision_cfg"]["image_size"]
    ids = torch.randint(1, VOCAB - 1, (3, length), generator=generator)
    for row, end in enumerate((length - 1, 1, 9)):
        ids[row, end:] = 0
        ids[row, end] = VOCAB - 1
    return ids, torch.randn(2, 3, size, size, generator=generator)


def expected(model, ids, pixels):
    """What OpenCLIP computes, by our names; a CustomTextCLIP keeps its text tower one level down."""
    text = getattr(model, "text", model)
    with torch.no_grad():
        hidden = model.forward_intermediates(text=ids, normalize=False)["text_intermediates"]
        return {
            "penultimate": hidden[-2],
            "last": text.ln_final(hidden[-1]),
            "pooled": text.ln_final(hidden[-1])[torch.arange(len(ids)), ids.argmax(dim=-1)],
            "projected": model.encode_text(ids),
            "image": model.encode_image(pixels),
            "logits": model.get_logits(pixels, ids)[0],
        }


def activation(config):
    return "quick_gelu" if config.get("quick_gelu") else "gelu"


def check(text, vision, model, config):
    ids, pixels = inputs(config)
    found = encode(text, vision, ids, pixels)
    assert found.notes == ()
    wanted = expected(model, ids, pixels)
    assert found.tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert relative(found.tensors[name], tensor) < TOLERANCE, name


def check_file(path, model, config):
    """A file of a SMALL model."""
    heads, vision_heads = SMALL_HEADS
    text = read_text(path, heads=heads, activation=activation(config))
    vision = read_vision(path, heads=vision_heads, activation=activation(config))
    check(text, vision, model, config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_architectures_are_encoded_as_open_clip_does(tmp_path, name):
    """Widths, heads, MLPs, patches and picture sizes are the published ones; two blocks and few words are enough."""
    config = open_clip().get_model_config(name)
    config["text_cfg"] |= {"layers": 2, "vocab_size": VOCAB}
    config["vision_cfg"] |= {"layers": 2}
    model = build(config)
    path = tmp_path / "open_clip_model.safetensors"
    save_file(model.state_dict(), path)
    text, vision = read_text(path, activation=activation(config)), read_vision(path, activation=activation(config))
    path.unlink()
    assert text.config.heads == model.transformer.resblocks[0].attn.num_heads
    assert vision.config.heads == model.visual.transformer.resblocks[0].attn.num_heads
    assert vision.config.image_size == config["vision_cfg"]["image_size"]
    check(text, vision, model, config)


@pytest.mark.parametrize("custom", [False, True], ids=["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("quick", [False, True], ids=["gelu", "quick_gelu"])
@pytest.mark.parametrize("scale", [False, True], ids=["logit scale ()", "logit scale (1,)"])
def test_both_forms_of_names_are_read(tmp_path, custom, quick, scale):
    config = {**SMALL, "quick_gelu": quick}
    model = build(config, custom, nonscalar_logit_scale=scale)
    names = model.state_dict().keys()
    assert ("text.text_projection" in names) == custom and ("text_projection" in names) != custom
    path = tmp_path / "open_clip_model.safetensors"
    save_file(model.state_dict(), path)
    check_file(path, model, config)


def test_a_wrong_activation_or_number_of_heads_would_be_seen(tmp_path):
    model = build(SMALL)
    ids, pixels = inputs(SMALL)
    path = tmp_path / "open_clip_model.safetensors"
    save_file(model.state_dict(), path)
    wanted = expected(model, ids, pixels)
    for options in ((2, "quick_gelu"), (4, "gelu")):
        found = encode(read_text(path, None, *options), read_vision(path, *options), ids, pixels).tensors
        for name in wanted:
            assert relative(found[name], wanted[name]) > NOT_CLOSE, (name, options)


@pytest.mark.parametrize("custom", [False, True], ids=["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old pickle"])
def test_a_bin_file_is_read(tmp_path, custom, zipped):
    model = build(SMALL, custom)
    path = tmp_path / "open_clip_pytorch_model.bin"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=zipped)
    check_file(path, model, SMALL)


@pytest.mark.parametrize("custom", [False, True], ids=["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("prefix", ["", "module."], ids=["one device", "distributed"])
def test_a_training_checkpoint_is_read(tmp_path, custom, prefix):
    """As open_clip_train writes it, with the optimizer's moments, which have the shapes of weights."""
    model = build(SMALL, custom)
    ids, pixels = inputs(SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.get_logits(pixels, ids)[0].square().mean().backward()
    optimizer.step()
    checkpoint = {
        "epoch": 3,
        "name": "a run",
        "state_dict": {prefix + name: tensor for name, tensor in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0},
    }
    torch.save(checkpoint, tmp_path / "epoch_3.pt")
    check_file(tmp_path / "epoch_3.pt", model, SMALL)


def test_half_precision_is_read(tmp_path):
    """OpenAI's mix: LayerNorms and embeddings stay fp32. What is compared is arithmetic in fp32 on those numbers."""
    model = build(SMALL)
    open_clip().convert_weights_to_fp16(model)
    dtypes = {tensor.dtype for tensor in model.state_dict().values()}
    assert dtypes == {torch.float16, torch.float32}
    path = tmp_path / "open_clip_model.safetensors"
    save_file(model.state_dict(), path)
    check_file(path, model.float(), SMALL)


@pytest.mark.parametrize("custom", [False, True], ids=["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("quick", [False, True], ids=["gelu", "quick_gelu"])
def test_a_folder_says_its_heads_and_activation(tmp_path, custom, quick):
    config = {**SMALL, "quick_gelu": quick}
    model = build(config, custom)
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config | {"custom_text": custom}}))
    theirs = open_clip().create_model(f"local-dir:{tmp_path}").eval()
    text, vision = read_text(tmp_path), read_vision(tmp_path)
    assert (text.config.heads, vision.config.heads) == SMALL_HEADS
    assert text.source.assumptions == vision.source.assumptions == ()
    check(text, vision, theirs, config)


@pytest.mark.parametrize("quick", [False, True], ids=["gelu", "quick_gelu"])
def test_open_clip_opens_a_folder_that_was_written(tmp_path, quick):
    config = {**SMALL, "quick_gelu": quick}
    path, folder = tmp_path / "epoch_1.safetensors", tmp_path / "written"
    save_file(build(config).state_dict(), path)
    heads, vision_heads = SMALL_HEADS
    text = read_text(path, heads=heads, activation=activation(config))
    vision = read_vision(path, heads=vision_heads, activation=activation(config))
    both = CLIPConfig(text.config, vision.config)
    write_clip(text.state | vision.state, folder, layout="open_clip_folder", config=both)
    theirs = open_clip().create_model(f"local-dir:{folder}").eval()
    state = theirs.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in (text.state | vision.state).items())
    check(text, vision, theirs, config)
