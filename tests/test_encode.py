"""What `encode` writes, held to transformers' CLIPModel; and what it does with arrays from strangers."""

from __future__ import annotations

import io
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers.models.clip.configuration_clip import CLIPConfig as HFConfig
from transformers.models.clip.modeling_clip import CLIPModel

from gmp import encode as module
from gmp.clip import TextTower, VisionTower
from gmp.encode import encode, read_pixels, read_tokens
from gmp.errors import InputError
from gmp.layouts import read_text, read_vision

TOLERANCE = 1e-5
VOCAB, CONTEXT, SIZE = 100, 12, 32
READ_POINTS = ["penultimate", "last", "pooled", "projected"]
EVERYTHING = [*READ_POINTS, "image", "logits"]


def relative(found, expected):
    assert found.shape == expected.shape and found.dtype == torch.float32
    return ((found - expected).norm() / expected.norm()).item()


def hugging_face(activation, end):
    """A random CLIPModel whose config names `end` as end-of-text."""
    towers = {"hidden_act": activation, "projection_dim": 24, "attn_implementation": "eager"}
    config = HFConfig(
        text_config={
            "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4,
            "vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "eos_token_id": end, "bos_token_id": 0,
            "pad_token_id": 1, **towers,
        },
        vision_config={
            "hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 3,
            "image_size": SIZE, "patch_size": 8, **towers,
        },
        projection_dim=24,
    )  # fmt: skip
    with torch.random.fork_rng():
        model = CLIPModel(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3, generator=generator)
    return model.eval()


def read(model, folder, activation, change=None):
    """The model's file, read; `change` gets the tensors before they are written."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if change:
        change(tensors)
    path = folder / "model.safetensors"
    save_file(tensors, path, {"format": "pt"})
    text = read_text(path, heads=4, activation=activation)
    vision = read_vision(path, heads=3, activation=activation)
    path.unlink()
    return text, vision


def captions(rows, length=CONTEXT):
    """Words and one end-of-text each, with words after it as padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB - 1, (rows, length), generator=generator)
    ends = torch.randint(1, length, (rows, 1), generator=generator)
    return ids.scatter(1, ends, VOCAB - 1)


def pictures(count, size=SIZE):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def model():
    return hugging_face("gelu", VOCAB - 1)


@pytest.fixture
def files(model, tmp_path):
    return read(model, tmp_path, "gelu")


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("end", [2, VOCAB - 1], ids=["legacy end-of-text", "end-of-text"])
@pytest.mark.parametrize("length", [CONTEXT, 7])
def test_everything_equals_transformers(tmp_path, activation, end, length):
    model = hugging_face(activation, end)
    ids, pixels = captions(5, length), pictures(3)
    with torch.no_grad():
        whole = model(input_ids=ids, pixel_values=pixels)
        text = model.text_model(input_ids=ids, output_hidden_states=True)
        expected = {
            "penultimate": text.hidden_states[-2],
            "last": text.last_hidden_state,
            "pooled": text.pooler_output,
            "projected": model.text_projection(text.pooler_output),
            "image": model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output),
            "logits": whole.logits_per_image,
        }
    found = encode(*read(model, tmp_path, activation), ids, pixels)
    assert list(found.tensors) == EVERYTHING and found.notes == ()
    for name, tensor in expected.items():
        assert relative(found.tensors[name], tensor) < TOLERANCE, name
    assert found.tensors["logits"].shape == (3, 5)


def test_only_what_was_given_is_encoded(files):
    text, vision = files
    both = encode(text, vision, captions(4), pictures(2)).tensors
    for found, names in (
        (encode(text, vision, captions(4), None), READ_POINTS),
        (encode(text, None, captions(4), None), READ_POINTS),
        (encode(text, vision, None, pictures(2)), ["image"]),
        (encode(None, vision, None, pictures(2)), ["image"]),
    ):
        assert list(found.tensors) == names and found.notes == ()
        assert all(torch.equal(found.tensors[name], both[name]) for name in names)


@pytest.mark.parametrize(
    "projection",
    [None, torch.zeros(24, 32), torch.full((24, 32), torch.nan), torch.eye(32)],
    ids=["none", "zeros", "nan", "identity"],
)
def test_a_projection_that_was_never_trained_is_not_used(model, files, tmp_path, projection):
    def change(tensors):
        del tensors["text_projection.weight"]
        if projection is not None:
            tensors["text_projection.weight"] = projection

    found = encode(*read(model, tmp_path, "gelu", change), captions(4), pictures(2))
    assert list(found.tensors) == ["penultimate", "last", "pooled", "image"]
    assert found.notes == (
        "projected is left out: model.safetensors has no text_projection that can be used",
        "logits are left out: they need projected",
    )
    whole = encode(*files, captions(4), pictures(2))
    assert all(torch.equal(tensor, whole.tensors[name]) for name, tensor in found.tensors.items())


def test_without_a_logit_scale_there_are_no_logits(model, tmp_path):
    found = encode(*read(model, tmp_path, "gelu", lambda t: t.pop("logit_scale")), captions(4), pictures(2))
    assert list(found.tensors) == EVERYTHING[:-1]
    assert found.notes == ("logits are left out: model.safetensors has no logit_scale that can be used",)


def test_a_logit_bias_that_is_not_read_leaves_no_logits(model, tmp_path):
    text, vision = read(model, tmp_path, "gelu", lambda t: t.update(logit_bias=torch.tensor(-10.0)))
    assert "logit_bias" in text.source.unexpected
    found = encode(text, vision, captions(4), pictures(2))
    assert "logits" not in found.tensors
    assert found.notes == ("logits are left out: model.safetensors has a logit_bias, which is not read",)


def test_towers_of_different_spaces_have_no_logits(model, files, tmp_path):
    wider = {"visual_projection.weight": torch.ones(40, 48)}
    _, vision = read(model, tmp_path, "gelu", lambda t: t.update(wider))
    found = encode(files[0], vision, captions(4), pictures(2))
    assert "logits" not in found.tensors
    assert found.notes[0].startswith("logits are left out: text has 24 dimensions and pictures have 40")


def test_where_libraries_read_elsewhere_is_said(model, files):
    """Row 2 has no end-of-text: transformers then reads its first token, OpenCLIP its largest id."""
    text, vision = files
    ids = captions(4)
    ids[2] = ids[2].clamp(max=VOCAB - 2)
    largest = encode(text, None, ids, None)
    known = encode(replace(text, config=replace(text.config, end_of_text=VOCAB - 1)), None, ids, None)
    said = (
        "in 1 of 4 captions the largest id is not the first end-of-text (99), so libraries differ; pooled is read at "
    )
    assert largest.notes == (said + "the largest id, as OpenCLIP does",)
    assert known.notes == (said + "the first 99, as its config says",)
    with torch.no_grad():
        theirs = model.text_model(input_ids=ids).pooler_output
    assert relative(known.tensors["pooled"], theirs) < TOLERANCE
    rows = torch.arange(4)
    assert torch.equal(largest.tensors["pooled"], largest.tensors["last"][rows, ids.argmax(dim=1)])
    assert not torch.equal(largest.tensors["pooled"][2], known.tensors["pooled"][2])


def test_a_large_batch_is_cut_into_chunks(files, monkeypatch):
    ids, pixels = captions(7), pictures(5)
    whole = encode(*files, ids, pixels).tensors
    seen = []
    for tower in (TextTower, VisionTower):
        forward = tower.forward
        monkeypatch.setattr(tower, "forward", lambda self, x, run=forward: seen.append(len(x)) or run(self, x))
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * CONTEXT * 72 * 3)  # three captions, one picture
    chunked = encode(*files, ids, pixels).tensors
    assert seen == [3, 3, 1, 1, 1, 1, 1, 1]
    for name in EVERYTHING:
        assert relative(chunked[name], whole[name]) < TOLERANCE, name


def test_nothing_else_is_touched(files):
    """Neither the process's random numbers, nor the file's tensors, nor the arrays; and nothing needs gradients."""
    ids, pixels = captions(3), pictures(2)
    text, vision = files
    kept = {n: t.clone() for n, t in (text.state | vision.state).items()}, ids.clone(), pixels.clone()
    random = torch.get_rng_state()
    found = encode(text, vision, ids, pixels)
    assert torch.equal(torch.get_rng_state(), random) and torch.is_grad_enabled()
    assert all(torch.equal(tensor, kept[0][name]) for name, tensor in (text.state | vision.state).items())
    assert torch.equal(ids, kept[1]) and torch.equal(pixels, kept[2])
    assert not any(tensor.requires_grad for tensor in (*found.tensors.values(), *text.state.values()))


def test_all_that_does_not_fit_is_said_at_once(files):
    ids = torch.full((2, CONTEXT + 1), VOCAB)
    ids[0, 0] = -1
    pixels = pictures(2, 40)
    pixels[1, 0, 0, 0] = torch.nan
    with pytest.raises(InputError) as error:
        encode(*files, ids, pixels)
    assert str(error.value) == (
        "model.safetensors: token ids from -1 to 100 do not lie in its vocabulary 0..99; use its own tokenizer; "
        "captions of 13 tokens are longer than its context of 12; cut them; "
        "pixels are torch.float32 of shape [2, 3, 40, 40]; give normalised floating point of shape "
        "(pictures, 3, 32, 32); 1 pixels are NaN or infinity; make the array again"
    )


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(3, dtype=torch.long),
        torch.zeros(2, 3),
        torch.zeros(2, 3, dtype=torch.bool),
        torch.zeros(0, 3, dtype=torch.long),
        torch.zeros(3, 0, dtype=torch.long),
    ],
    ids=["1-D", "float", "bool", "no captions", "no tokens"],
)
def test_tokens_of_another_form_are_refused(files, ids):
    with pytest.raises(InputError, match=r"^model\.safetensors: tokens are .*; give whole numbers of shape"):
        encode(*files, ids, None)


@pytest.mark.parametrize(
    "pixels",
    [
        torch.zeros(3, SIZE, SIZE),
        torch.zeros(2, SIZE, SIZE, 3),
        torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8),
        torch.zeros(0, 3, SIZE, SIZE),
    ],
    ids=["one picture", "channels last", "bytes", "no pictures"],
)
def test_pixels_of_another_form_are_refused(files, pixels):
    with pytest.raises(InputError, match=r"^model\.safetensors: pixels are .* of shape \(pictures, 3, 32, 32\)$"):
        encode(*files, None, pixels)


def test_an_array_without_a_tower_is_refused(files):
    text, vision = files
    with pytest.raises(InputError, match=r"^model\.safetensors: pixels are given and there is no vision tower"):
        encode(text, None, captions(2), pictures(2))
    with pytest.raises(InputError, match=r"^model\.safetensors: tokens are given and there is no text encoder"):
        encode(None, vision, captions(2), pictures(2))
    with pytest.raises(InputError, match=r"^model\.safetensors: nothing to encode; give tokens, pixels or both$"):
        encode(text, vision, None, None)


# ---- arrays on disk -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint16", ">i4", "uint64"])
def test_tokens_of_any_whole_type_are_read(tmp_path, dtype):
    ids = captions(4).numpy()
    np.save(tmp_path / "tokens.npy", np.asfortranarray(ids.astype(dtype)))
    found = read_tokens(tmp_path / "tokens.npy")
    assert found.dtype == torch.int64 and np.array_equal(found.numpy(), ids)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_pixels_of_any_floating_type_become_fp32(tmp_path, files, dtype):
    stored = pictures(2).numpy().astype(dtype)
    np.save(tmp_path / "pixels.npy", stored)
    found = read_pixels(tmp_path / "pixels.npy")
    assert found.dtype == torch.float32 and np.array_equal(found.numpy(), stored.astype(np.float32))
    assert encode(*files, None, found).tensors["image"].shape == (2, 24)


def test_ids_and_pixels_beyond_the_types_are_not_wrapped(tmp_path, files):
    np.save(tmp_path / "tokens.npy", np.full((1, 2), 2**64 - 1, dtype=np.uint64))
    with pytest.raises(InputError, match="do not lie in its vocabulary"):
        encode(*files, read_tokens(tmp_path / "tokens.npy"), None)
    np.save(tmp_path / "pixels.npy", np.full((1, 3, SIZE, SIZE), 1e300))
    with pytest.raises(InputError, match="3072 pixels are NaN or infinity"):
        encode(*files, None, read_pixels(tmp_path / "pixels.npy"))


@pytest.mark.parametrize(
    "array",
    [np.zeros(3, int), np.zeros((2, 3)), np.zeros((2, 3), bool), np.zeros((0, 3), int), np.zeros((1, 2), "i4,i4")],
    ids=["1-D", "float", "bool", "empty", "records"],
)
def test_tokens_of_another_form_on_disk_are_refused(tmp_path, array):
    np.save(tmp_path / "tokens.npy", array)
    with pytest.raises(InputError, match=r"^tokens\.npy holds .* of shape .*; save token ids as whole numbers"):
        read_tokens(tmp_path / "tokens.npy")


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((3, 8, 8), np.float32),
        np.zeros((2, 3, 8, 8), np.uint8),
        np.zeros((2, 3, 8, 8), np.complex64),
        np.zeros((0, 3, 8, 8), np.float32),
    ],
    ids=["channels last", "one picture", "bytes", "complex", "empty"],
)
def test_pixels_of_another_form_on_disk_are_refused(tmp_path, array):
    np.save(tmp_path / "pixels.npy", array)
    with pytest.raises(InputError, match=r"^pixels\.npy holds .* of shape .*; save normalised pixels as"):
        read_pixels(tmp_path / "pixels.npy")


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.mkdir, (Path(self.path),)


def saved(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


@pytest.mark.parametrize("read", [read_tokens, read_pixels])
def test_an_array_of_objects_is_refused_and_nothing_in_it_runs(tmp_path, read):
    path, sprung = tmp_path / "array.npy", tmp_path / "sprung"
    bomb = np.empty((1, 1), dtype=object)
    bomb[0, 0] = Bomb(sprung)
    for content in (saved(bomb, allow_pickle=True), pickle.dumps(Bomb(sprung))):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"^array\.npy is .*save .* with numpy\.save$"):
            read(path)
        assert not sprung.exists()
    pickle.loads(content)
    assert sprung.exists()  # the bomb is a real one


@pytest.mark.parametrize("read", [read_tokens, read_pixels])
def test_files_that_hold_no_single_array_are_refused(tmp_path, read):
    path, zipped = tmp_path / "array.npy", io.BytesIO()
    np.savez(zipped, ids=np.zeros((2, 3), int))
    whole = saved(np.zeros((2, 3), int))
    for content, reason in (
        (zipped.getvalue(), "is a zip archive such as .npz; save one array"),
        (b"", "is not a .npy file"),
        (b"1 2 3\n", "is not a .npy file"),
        (whole[:-1], "is damaged"),
        (whole[:40], "is damaged"),
        (whole.replace(b"(2, 3)", b"(2, 3 "), "is damaged"),
        (whole.replace(b"(2, 3), }", b"(2, 3**9)"), "is damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError) as error:
            read(path)
        assert str(error.value).startswith(f"array.npy {reason}")
    with pytest.raises(InputError, match=r"^none\.npy cannot be read: No such file"):
        read(tmp_path / "none.npy")
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path)
