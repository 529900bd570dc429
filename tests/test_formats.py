"""Every row of docs/formats.md: what is read, what is written and who loads that, and there and back again."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.clip.modeling_clip import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection

from gmp import files
from gmp.clip import CLIPConfig
from gmp.encode import encode
from gmp.errors import InputError
from gmp.geometric import split_mlps
from gmp.layouts import WRITERS, insert_text, open_text, open_vision, read_text, read_vision, write_clip, write_text
from tests import formats
from tests.formats import ROWS, TEXT, VISION, captions, hf_clip, hf_text, oc_clip, pictures, points, save
from tests.open_clip_peer import open_clip

TOLERANCE = 1e-5
# Where the file's names leave the activation open, and it has to be assumed if nobody tells it.
ASSUMED = (
    "clip_model_without_config", "openai_state_dict", "openai_pt", "openai_torchscript", "whole_model_pickle",
    "whole_gmp_model_pickle", "gmp_state_dict", "long_clip", "clip_save", "cast_to_fp16", "cast_to_bf16",
    "cast_to_fp8_e4m3", "cast_to_fp8_e5m2", "scaled_fp8_of_comfy_quant",
)  # fmt: skip
TOLD = ("clip_save_g", "clip_save_of_2023", "clip_vision", "odd_sizes")  # the tests tell some of it
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def relative(found, expected):
    assert found.shape == expected.shape and found.dtype == torch.float32
    return ((found - expected).norm() / expected.norm()).item()


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for point, tensor in expected.items():
        assert relative(found[point], tensor) < TOLERANCE, point


def raw(path):
    """Every tensor of a safetensors file: dtype, shape and bytes."""
    return {name: (t.dtype, tuple(t.shape), t.reshape(-1).view(torch.uint8).numpy().tobytes())
            for name, t in load_file(path).items()}  # fmt: skip


# ---- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # torch's, on TorchScript and on pickled classes
@pytest.mark.parametrize("name", ROWS)
def test_read(tmp_path, name):
    """Every read point equals what the library that writes such files computes."""
    seen, assumptions = 0, []
    for case in ROWS[name](tmp_path):
        text = None if case.ids is None else read_text(case.path, **case.text)
        vision = None if case.pixels is None else read_vision(case.path, **case.vision)
        assert_close(encode(text, vision, case.ids, case.pixels).tensors, case.expected)
        seen += 1
        assumptions += [sentence for tower in (text, vision) if tower for sentence in tower.source.assumptions]
    assert seen
    if name not in TOLD:
        assert bool(assumptions) == (name in ASSUMED), assumptions


def quantised(folder, change):
    """A ComfyUI file whose first Linear was quantised in another way."""
    state = dict(hf_text(CLIPTextModelWithProjection).state_dict())
    layer = "text_model.encoder.layers.0.mlp.fc1"
    change(state, layer)
    return save(state, folder / "clip_l.safetensors")


def nvfp4(state, layer):
    rows, columns = state[f"{layer}.weight"].shape
    state[f"{layer}.weight"] = torch.zeros(rows, columns // 2, dtype=torch.uint8)
    state[f"{layer}.weight_scale"] = torch.ones(rows, columns // 16).to(torch.float8_e4m3fn)
    state[f"{layer}.weight_scale_2"] = torch.tensor(1.0)
    state[f"{layer}.comfy_quant"] = formats.comfy_quant({"format": "nvfp4"})


def mxfp8(state, layer):
    rows, columns = state[f"{layer}.weight"].shape
    state[f"{layer}.weight"] = state[f"{layer}.weight"].to(torch.float8_e4m3fn)
    state[f"{layer}.weight_scale"] = torch.full((rows, columns // 32), 127, dtype=torch.uint8)
    state[f"{layer}.comfy_quant"] = formats.comfy_quant({"format": "mxfp8"})


def mxfp8_by_metadata_alone(state, layer):
    mxfp8(state, layer)
    del state[f"{layer}.comfy_quant"]


def int8(state, layer):
    state[f"{layer}.weight"] = state[f"{layer}.weight"].to(torch.int8)
    state[f"{layer}.weight_scale"] = torch.tensor(1.0)
    state[f"{layer}.comfy_quant"] = formats.comfy_quant({"format": "int8_tensorwise", "convrot": True})


@pytest.mark.parametrize(
    "change, words",
    [
        (nvfp4, "quantised as nvfp4, which is not read; give the fp16 or fp32 edition"),
        (mxfp8, "quantised as mxfp8, which is not read; give the fp16 or fp32 edition"),
        (mxfp8_by_metadata_alone, "scales are neither one number nor one for each row"),
        (int8, "quantised as int8_tensorwise, which is not read"),
    ],
)
def test_other_quantisations_are_refused(tmp_path, change, words):
    with pytest.raises(InputError, match=f"^clip_l.safetensors: the text encoder cannot be read: .*{words}"):
        read_text(quantised(tmp_path, change), **TEXT)


def test_paddles_files_are_refused_with_advice(tmp_path):
    """`paddle.save`: a pickle of numpy arrays, and a table of names."""
    import pickle

    state = {name: tensor.numpy() for name, tensor in hf_clip().state_dict().items()}
    state["StructuredToParameterName@@"] = {name: name for name in state}
    path = tmp_path / "model_state.pdparams"
    path.write_bytes(pickle.dumps(state, protocol=2))
    with pytest.raises(InputError, match=r"^model_state.pdparams is a pickle of numpy arrays, as PaddlePaddle saves"):
        read_text(path)


# ---- writing, and who loads it --------------------------------------------------------------------------------------


def opened(path, whole=True, activation=None):
    """State and config of a file of the small models, in the dtypes that it has."""
    text = open_text(path, activation=activation, **TEXT)
    if not whole:
        return text.tensors(), text.config
    vision = open_vision(path, activation=activation, **VISION)
    return text.tensors() | vision.tensors(), CLIPConfig(text.config, vision.config)


def of_open_clip(folder, quick):
    """An OpenCLIP model, and its file opened: fused, named and oriented in another way than transformers'."""
    model = oc_clip(quick)
    path = save(model.state_dict(), folder / "source.safetensors")
    return model, *opened(path, activation="quick_gelu" if quick else "gelu")


def complete(information):
    assert not information["missing_keys"] and not information["unexpected_keys"]
    assert not information["mismatched_keys"] and not information["error_msgs"]


@pytest.mark.parametrize("quick", [True, False], ids=["quick_gelu", "gelu"])
@pytest.mark.parametrize("layout", ["huggingface", "huggingface_folder"])
def test_transformers_loads_a_whole_clip(tmp_path, layout, quick):
    model, state, config = of_open_clip(tmp_path, quick)
    out = tmp_path / "out"
    write_clip(state, out, layout=layout, dtype="keep", config=config)
    if layout == "huggingface":  # a file by itself: the config comes from the user
        activation = {"hidden_act": "quick_gelu" if quick else "gelu"}
        known = hf_clip(activation, {"intermediate_size": 96, **activation}).config
        theirs, information = CLIPModel.from_pretrained(
            None, config=known, state_dict=load_file(out), output_loading_info=True
        )
    else:
        theirs, information = CLIPModel.from_pretrained(out, output_loading_info=True)
    complete(information)
    ids, pixels = captions(), pictures()
    assert_close(points(theirs.eval(), ids, pixels), points(model, ids, pixels))


def test_transformers_loads_towers_of_different_activations(tmp_path):
    model = hf_clip(vision={"hidden_act": "gelu"})
    path = save(model.state_dict(), tmp_path / "clip.safetensors")
    text = open_text(path, activation="quick_gelu", **TEXT)
    vision = open_vision(path, activation="gelu", **VISION)
    config = CLIPConfig(text.config, vision.config)
    write_clip(text.tensors() | vision.tensors(), tmp_path / "out", layout="huggingface_folder", config=config)
    theirs, ids, pixels = CLIPModel.from_pretrained(tmp_path / "out"), captions(), pictures()
    assert_close(points(theirs.eval(), ids, pixels), points(model, ids, pixels))


@pytest.mark.parametrize("layout", ["huggingface_folder", "open_clip_folder"])
def test_long_clip_is_loaded_with_its_own_table_of_positions(tmp_path, layout):
    """From its own file with two tables, which becomes one of 248 rows."""
    (case,) = ROWS["long_clip"](tmp_path)
    state, config = opened(case.path, activation="quick_gelu")
    write_clip(state, tmp_path / "out", layout=layout, config=config)
    if layout == "open_clip_folder":
        theirs = open_clip().create_model(f"local-dir:{tmp_path / 'out'}")
    else:
        theirs = CLIPModel.from_pretrained(tmp_path / "out")
    assert_close(points(theirs.eval(), case.ids, None), case.expected)


@pytest.mark.parametrize("projected", [True, False], ids=["with projection", "without"])
@pytest.mark.parametrize("layout", ["huggingface", "huggingface_folder"])
def test_transformers_loads_a_text_encoder(tmp_path, layout, projected):
    model, state, config = of_open_clip(tmp_path, quick=False)
    lacking = {"logit_scale"} if projected else {"logit_scale", "text_projection"}
    state = {name: tensor for name, tensor in state.items() if not name.startswith("visual.") and name not in lacking}
    out = tmp_path / "out"
    write_text(state, out, layout=layout, dtype="keep", config=config.text)
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    if layout == "huggingface":
        known = formats.text_config(hidden_act="gelu")
        theirs, information = kind.from_pretrained(
            None, config=known, state_dict=load_file(out), output_loading_info=True
        )
    else:
        theirs, information = kind.from_pretrained(out, output_loading_info=True)
        assert json.loads((out / "config.json").read_text())["architectures"] == [kind.__name__]
    complete(information)
    expected = points(model, captions(), None)
    if not projected:
        del expected["projected"]
    assert_close(points(theirs.eval(), captions(), None), expected)


@pytest.mark.parametrize("dtype", ["keep", "fp16"])
@pytest.mark.parametrize("xl", [False, True], ids=["Stable Diffusion 1", "SDXL"])
@torch.no_grad()
def test_diffusers_loads_a_folder_in_place_of_its_own(tmp_path, xl, dtype):
    """What the pipeline encodes afterwards is what it encodes with the other encoders put into it in memory."""
    kinds = {"text_encoder": (CLIPTextModel, "quick_gelu"), "text_encoder_2": (CLIPTextModelWithProjection, "gelu")}
    kinds = dict(list(kinds.items())[: 1 + xl])
    theirs, ours = (
        {name: hf_text(kind, seed, hidden_act=activation) for name, (kind, activation) in kinds.items()}
        for seed in (3, 5)
    )
    pipeline = formats.diffusers_pipeline(*theirs.values())
    pipeline.save_pretrained(tmp_path / "pipe")
    for name, model in ours.items():
        if dtype == "fp16":
            model.half().float()  # what fp16 leaves of it
        model.save_pretrained(tmp_path / name)
        tower = open_text(tmp_path / name)
        out = tmp_path / "pipe" / name
        write_text(tower.tensors(), out, layout="huggingface_folder", dtype=dtype, config=tower.config)
    fresh = type(pipeline).from_pretrained(tmp_path / "pipe", dtype=torch.float32)

    def encoded(one):
        options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        return [part for part in one.encode_prompt("a red fox", **options) if part is not None]

    before, after = encoded(pipeline), encoded(fresh)
    for name, model in ours.items():
        setattr(pipeline, name, model)
    for old, found, wanted in zip(before, after, encoded(pipeline), strict=True):
        assert relative(found, wanted) < TOLERANCE < 0.1 < relative(old, wanted)
    assert len(after) == (2 if xl else 1)  # SDXL: both encoders' rows side by side, and the pooled vector


def test_open_clip_builds_openais_model(tmp_path):
    """OpenCLIP's loader of OpenAI's files, which takes 64 channels for a head, and four widths for an MLP."""
    text = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512}
    model = hf_clip(text, text)
    state, model = formats.cast(model, torch.float16)
    path = save(state, tmp_path / "source.safetensors")
    tower, seen = open_text(path, heads=2), open_vision(path, heads=2)
    config = CLIPConfig(tower.config, seen.config)
    out = tmp_path / "out.safetensors"
    write_clip(tower.tensors() | seen.tensors(), out, layout="openai", dtype="keep", config=config)
    open_clip()
    theirs = sys.modules["open_clip.model"].build_model_from_openai_state_dict(load_file(out))
    ids, pixels = captions(), pictures()
    assert_close(points(theirs.float(), ids, pixels), points(model, ids, pixels))


@pytest.mark.parametrize("layout", ["open_clip", "openai", "open_clip_folder"])
@pytest.mark.parametrize("quick", [True, False], ids=["quick_gelu", "gelu"])
def test_open_clip_loads_a_whole_clip(tmp_path, layout, quick):
    activation = {"hidden_act": "quick_gelu" if quick else "gelu"}
    model = hf_clip(activation, {"intermediate_size": 96, **activation})
    model.save_pretrained(tmp_path / "source")
    text, vision = open_text(tmp_path / "source"), open_vision(tmp_path / "source")
    out = tmp_path / ("out" if layout == "open_clip_folder" else "out.safetensors")
    config = CLIPConfig(text.config, vision.config)
    write_clip(text.tensors() | vision.tensors(), out, layout=layout, dtype="keep", config=config)
    if layout == "open_clip_folder":
        theirs = open_clip().create_model(f"local-dir:{out}").eval()
    else:
        theirs = oc_clip(quick, seed=9)
        open_clip().load_checkpoint(theirs, str(out), strict=True)
    ids, pixels = captions(), pictures()
    assert_close(points(theirs, ids, pixels), points(model, ids, pixels))


@pytest.mark.parametrize("eos", [2, formats.END, formats.VOCAB - 1], ids=["largest id", "inside", "last id"])
@pytest.mark.parametrize("layout", ["huggingface_folder", "open_clip_folder"])
def test_a_folder_says_where_a_caption_ends(tmp_path, layout, eos):
    """With a textual inversion's id above end-of-text the rules differ; whoever loads the folder has the source's."""
    model = hf_clip({"eos_token_id": eos})
    model.save_pretrained(tmp_path / "source")
    text, vision = open_text(tmp_path / "source"), open_vision(tmp_path / "source")
    config, out = CLIPConfig(text.config, vision.config), tmp_path / "out"
    write_clip(text.tensors() | vision.tensors(), out, layout=layout, dtype="keep", config=config)
    if layout == "open_clip_folder":
        theirs = open_clip().create_model(f"local-dir:{out}").eval()
    else:
        theirs = CLIPModel.from_pretrained(out)
    ids = captions(end=formats.END)
    ids[0, 5] = ids[1, formats.CONTEXT - 3] = formats.INVERSION
    if eos == formats.VOCAB - 1:
        ids[ids == formats.END] = eos
    assert_close(points(theirs, ids, None), points(model, ids, None))


def test_open_clip_has_one_activation_for_both_towers(tmp_path):
    """Its config cannot say otherwise, so that a folder would compute something else in the vision tower."""
    hf_clip(vision={"hidden_act": "gelu"}).save_pretrained(tmp_path / "source")
    text, vision = open_text(tmp_path / "source"), open_vision(tmp_path / "source")
    config = CLIPConfig(text.config, vision.config)
    with pytest.raises(InputError, match="^cannot write out: "):
        write_clip(
            text.tensors() | vision.tensors(), tmp_path / "out", layout="open_clip_folder", dtype="keep", config=config
        )


def test_a_gmp_file_is_loaded_by_a_model_of_geometric_linears(tmp_path):
    """A naive one, strictly; and what is read back has every bit of r and theta, or their product."""
    model = oc_clip(quick=True)
    path = save(model.state_dict(), tmp_path / "source.safetensors")
    state, config = opened(path)
    out = tmp_path / "out.safetensors"
    made = split_mlps({name: tensor.make() for name, tensor in state.items()})
    write_clip(made, out, layout="gmp", config=config)
    theirs = formats.geometric(oc_clip(quick=True, seed=9))
    theirs.load_state_dict(load_file(out), strict=True)
    ids, pixels = captions(), pictures()
    assert_close(points(theirs, ids, pixels), points(model, ids, pixels))
    again = open_text(out).tensors(fold=False) | open_vision(out).tensors(fold=False)
    write_clip(again, tmp_path / "again.safetensors", layout="gmp", config=config)
    assert raw(tmp_path / "again.safetensors") == raw(out)
    folded = read_text(out).state | read_vision(out).state
    for name, tensor in model.state_dict().items():
        assert relative(folded[name], tensor) < 1e-7, name


def test_every_layout_that_is_written_is_tested():
    assert set(WRITERS) == {"huggingface", "huggingface_folder", "openai", "open_clip", "open_clip_folder", "gmp"}


# ---- back into a checkpoint -----------------------------------------------------------------------------------------


def encoder(library, seed):
    """A text encoder by the names of one library, with projection, in fp16."""
    if library == "transformers":
        return halves(hf_text(CLIPTextModelWithProjection, seed).state_dict())
    return halves(formats.text_part(oc_clip(False, seed).state_dict())) | {"logit_scale": torch.tensor(1.0 + seed)}


def halves(state):
    return {name: tensor.half() for name, tensor in state.items()}


def plain(state):
    """As a CLIPTextModel has it: no projection, no level."""
    return {name.removeprefix("text_model."): t for name, t in state.items() if name.startswith("text_model.")}


def bare(state):
    return {name: tensor for name, tensor in state.items() if name not in ("text_projection", "logit_scale")}


def turned(state):
    """With the projection as a Linear's weight."""
    rest = {name: tensor for name, tensor in state.items() if name != "text_projection"}
    return rest | {"text_projection.weight": state["text_projection"].T}


# Checkpoint -> the member that is replaced, the library whose names it has there, and all tensors from that encoder.
CHECKPOINTS = {
    "sd1": ("clip_l", "transformers", lambda e: formats.sd1_tensors(plain(e))),
    "sd1_without_level": ("clip_l", "transformers", lambda e: formats.sd1_tensors(plain(e), "")),
    "sd2": ("clip_h", "open_clip", formats.sd2_tensors),
    "sd2_without_projection": ("clip_h", "open_clip", lambda e: formats.sd2_tensors(bare(e))),
    "sdxl_clip_l": ("clip_l", "transformers", lambda e: formats.sdxl_tensors(plain(e), encoder("open_clip", 1))),
    "sdxl_clip_g": ("clip_g", "open_clip", lambda e: formats.sdxl_tensors(plain(encoder("transformers", 1)), e)),
    "playground": ("clip_g", "open_clip", lambda e: formats.sdxl_tensors(plain(encoder("transformers", 1)), turned(e))),
    "sdxl_refiner": ("clip_g", "open_clip", formats.refiner_tensors),
    "sd3_clip_l": ("clip_l", "transformers", lambda e: formats.sd3_tensors(e, encoder("transformers", 1))),
    "sd3_clip_g": ("clip_g", "transformers", lambda e: formats.sd3_tensors(encoder("transformers", 1), e)),
}


@pytest.mark.parametrize("layout", ["huggingface", "openai"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_takes_another_encoder(tmp_path, name, layout):
    """Tensor for tensor and byte for byte it is what its program would have written with that encoder in it.

    layout: of the file that the encoder comes from, in fp32. It has a projection and a logit scale, wanted or not; the
    scale of the checkpoint stays.
    """
    member, library, tensors = CHECKPOINTS[name]
    before, after = encoder(library, 0), encoder(library, 7)
    metadata = {"modelspec.title": "mine", "modelspec.hash_sha256": "0x1", "sshs_model_hash": "2", "prompt": "{}"}
    checkpoint = save(tensors(before), tmp_path / "checkpoint.safetensors", metadata)
    given = {each: tensor.float() for each, tensor in after.items()} | {"logit_scale": torch.tensor(8.0)}
    activation = "quick_gelu" if member == "clip_l" else "gelu"
    state, config = opened(save(given, tmp_path / "given.safetensors"), whole=False, activation=activation)
    write_text(state, tmp_path / "encoder.safetensors", layout=layout, dtype="keep", config=config)
    state, config = opened(tmp_path / "encoder.safetensors", whole=False)
    out = tmp_path / "out.safetensors"
    inserted = insert_text(state, checkpoint, out, member=member, config=config)
    written = inserted.replaced
    told = " ".join(inserted.notes)
    assert ("text_projection" in told) == (not any("text_projection" in each for each in written))
    assert "logit_scale" in told

    kept = {"logit_scale": before["logit_scale"]} if "logit_scale" in before else {}
    wanted = raw(save(tensors(after | kept), tmp_path / "wanted.safetensors"))
    found, old = raw(out), raw(checkpoint)
    assert found == wanted
    assert {each for each in found if found[each] != old[each]} == set(written)
    entries = files.read_header(out).metadata
    assert entries.items() >= {"modelspec.title": "mine", "prompt": "{}", "format": "pt"}.items()
    assert not {"modelspec.hash_sha256", "sshs_model_hash"} & entries.keys()
    for each, tensor in read_text(out, member, **TEXT).state.items():
        if each != "logit_scale":
            assert torch.equal(tensor, state[each].make().half().float()), each


def test_a_pickled_checkpoint_takes_another_encoder(tmp_path):
    """With objects of pytorch-lightning beside the tensors, and tensors that share memory or are not contiguous."""
    before, other = (plain(encoder("transformers", seed)) for seed in (0, 7))
    tensors = formats.sd1_tensors(before)
    tensors["model.diffusion_model.turned.weight"] = torch.arange(12.0).reshape(3, 4).T
    tensors["model_ema.decay"] = torch.tensor(0.9999)
    checkpoint = formats.save_lightning(tensors, tmp_path / "sd-v1-4.ckpt")
    path = save(formats.prefixed(other, "text_model."), tmp_path / "encoder.safetensors")
    out = tmp_path / "out.safetensors"
    state, config = opened(path, whole=False)
    inserted = insert_text(state, checkpoint, out, member="clip_l", config=config)
    assert any("which were not read" in note for note in inserted.notes)
    changed = formats.sd1_tensors(other)
    wanted = save({name: changed.get(name, tensor) for name, tensor in tensors.items()}, tmp_path / "wanted")
    assert raw(out) == raw(wanted)


def test_a_deeper_encoder_is_not_cut_to_fit_a_checkpoint(tmp_path):
    """Only SD 2's 24th block has no place in a checkpoint that never reads it."""
    shallow = plain(hf_text(CLIPTextModelWithProjection, num_hidden_layers=2).state_dict())
    checkpoint = save(formats.sd1_tensors(shallow), tmp_path / "checkpoint.safetensors")
    state, config = opened(save(encoder("transformers", 7), tmp_path / "encoder.safetensors"), whole=False)
    with pytest.raises(InputError, match="^checkpoint.safetensors.*resblocks.2 has no place"):
        insert_text(state, checkpoint, tmp_path / "out.safetensors", member="clip_l", config=config)


def test_an_encoder_of_another_activation_is_not_put_into_a_checkpoint(tmp_path):
    """The checkpoint's family settles the activation, and no tensor would show the change."""
    checkpoint = save(formats.sd1_tensors(plain(encoder("transformers", 0))), tmp_path / "checkpoint.safetensors")
    path = save(encoder("transformers", 7), tmp_path / "encoder.safetensors")
    state, config = opened(path, whole=False, activation="gelu")
    with pytest.raises(InputError, match="activation is gelu and not quick_gelu"):
        insert_text(state, checkpoint, tmp_path / "out.safetensors", member="clip_l", config=config)


@pytest.mark.parametrize(("dtype", "limit"), [("F8_E4M3", 448), ("F8_E5M2", 57344), ("F16", 65504)])
def test_values_that_a_checkpoints_dtype_cannot_hold_are_refused_not_clipped(tmp_path, dtype, limit):
    before, after = plain(encoder("transformers", 0)), encoder("transformers", 7)
    kind = files.torch_dtypes()[dtype]
    held = {name: tensor.to(kind) for name, tensor in formats.sd1_tensors(before).items()}
    checkpoint = save(held, tmp_path / "checkpoint.safetensors")
    for value, fits in ((limit, True), (limit + 1, False)):
        given = {name: tensor.float() for name, tensor in after.items()}
        given["text_model.encoder.layers.1.mlp.fc1.bias"][3] = value
        state, config = opened(save(given, tmp_path / "encoder.safetensors"), whole=False)
        if fits:
            insert_text(state, checkpoint, tmp_path / "out.safetensors", member="clip_l", config=config)
            continue
        with pytest.raises(InputError, match=f"over {limit:g}, which is where {dtype} ends.*layers.1.mlp.fc1.bias"):
            insert_text(state, checkpoint, tmp_path / "out.safetensors", member="clip_l", config=config)


def test_a_diffusers_folder_is_no_checkpoint_to_write_into(tmp_path):
    """A file with its text encoders and without its UNet would be no model; a folder in place of one is."""
    model = hf_text(CLIPTextModel)
    formats.diffusers_pipeline(model).save_pretrained(tmp_path / "pipe")
    state, config = opened(save(encoder("transformers", 7), tmp_path / "encoder.safetensors"), whole=False)
    with pytest.raises(InputError, match="^pipe"):
        insert_text(state, tmp_path / "pipe", tmp_path / "out.safetensors", member="clip_l", config=config)


# ---- there and back again -------------------------------------------------------------------------------------------


def as_it_is(model):
    return model.state_dict()


def openais_mix(model):
    """fp16 where matrices are multiplied, fp32 elsewhere, by transformers' names or OpenAI's."""
    halved = ("proj", "fc", "conv1.weight", "patch_embedding.weight")
    return {
        name: tensor.half() if any(part in name for part in halved) and "ln" not in name else tensor
        for name, tensor in model.state_dict().items()
    }


DTYPES = {
    "fp32": as_it_is,
    "fp16": lambda model: halves(model.state_dict()),
    "bf16": lambda model: {name: tensor.bfloat16() for name, tensor in model.state_dict().items()},
    "fp8_e4m3": lambda model: {name: tensor.to(FP8[0]) for name, tensor in model.state_dict().items()},
    "fp8_e5m2": lambda model: {name: tensor.to(FP8[1]) for name, tensor in model.state_dict().items()},
    "mixed": openais_mix,
}
# Where a file comes from -> a model whose names these are, and the layout that writes them.
SOURCES = {
    "transformers": (hf_clip, "huggingface"),
    "transformers' folder": (hf_clip, "huggingface_folder"),
    "openai": (lambda: oc_clip(True), "openai"),
    "open_clip": (lambda: oc_clip(False), "open_clip"),
    "open_clip's folder": (lambda: oc_clip(False), "open_clip_folder"),
}


def weights(path):
    """The file that holds the weights of a layout's file or folder."""
    return next(path.glob("*.safetensors")) if path.is_dir() else path


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", SOURCES)
def test_there_and_back_gives_the_same_bytes(tmp_path, source, dtype):
    """A -> B -> A for every B, whole CLIPs and text encoders: the same names, dtypes, shapes and bytes."""
    make, layout = SOURCES[source]
    first = save(DTYPES[dtype](make()), tmp_path / "first.safetensors")
    if dtype == "mixed":
        assert {kind for kind, _, _ in raw(first).values()} == {torch.float16, torch.float32}
    state, config = opened(first)
    text = {name: tensor for name, tensor in state.items() if not name.startswith("visual.")}
    seen = ("visual", "vision_model.")
    text_alone = {name: value for name, value in raw(first).items() if not name.startswith(seen)}
    for via in (name for name in WRITERS if name != "gmp"):
        there, back = tmp_path / f"{via}.there", tmp_path / f"{via}.back"
        write_clip(state, there, layout=via, dtype="keep", config=config)
        write_clip(opened(there)[0], back, layout=layout, dtype="keep", config=config)
        assert raw(weights(back)) == raw(first), via
        if via.startswith("open_clip_") or layout.startswith("open_clip_"):
            continue  # that folder is of both towers
        there, back = tmp_path / f"{via}.text", tmp_path / f"{via}.text.back"
        write_text(text, there, layout=via, dtype="keep", config=config.text)
        write_text(opened(there, whole=False)[0], back, layout=layout, dtype="keep", config=config.text)
        assert raw(weights(back)) == text_alone, via


@pytest.mark.parametrize("projected", [True, False], ids=["with projection", "without"])
def test_a_diffusers_folder_comes_back(tmp_path, projected):
    """Without projection transformers 5 leaves out the level `text_model.`, which is written again."""
    model = hf_text(CLIPTextModelWithProjection if projected else CLIPTextModel)
    formats.diffusers_pipeline(model).save_pretrained(tmp_path / "pipe")
    first = raw(tmp_path / "pipe" / "text_encoder" / "model.safetensors")
    tower = open_text(tmp_path / "pipe")
    for via in ("openai", "open_clip", "huggingface"):
        there = tmp_path / f"{via}.safetensors"
        write_text(tower.tensors(), there, layout=via, dtype="keep", config=tower.config)
        state = open_text(there).tensors()
        write_text(state, tmp_path / via, layout="huggingface_folder", dtype="keep", config=open_text(there).config)
        found = raw(tmp_path / via / "model.safetensors")
        assert found == (first if projected else {f"text_model.{name}": value for name, value in first.items()})
    before = json.loads((tmp_path / "pipe" / "text_encoder" / "config.json").read_text())
    after = json.loads((tmp_path / "openai" / "config.json").read_text())
    for key in set(before) - {"dtype", "transformers_version", "attention_dropout", "initializer_factor",
                              "initializer_range"}:  # fmt: skip
        assert after[key] == before[key], key


def test_a_gmp_state_dict_comes_back(tmp_path):
    """Through its own layout, which is fp32; the plain layouts fold it."""
    model = formats.geometric(oc_clip(quick=True))
    first = save(model.state_dict(), tmp_path / "first.safetensors")
    text, vision = open_text(first, **TEXT), open_vision(first, **VISION)
    config = CLIPConfig(text.config, vision.config)
    both = text.tensors(fold=False) | vision.tensors(fold=False)
    write_clip(both, tmp_path / "back.safetensors", layout="gmp", config=config)
    assert raw(tmp_path / "back.safetensors") == raw(first)


# ---- the page -------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parent
PAGE = ROOT.parent / "docs" / "formats.md"


def tables():
    """The rows of each table of the page, without its two lines of heads."""
    blocks = re.findall(r"(?:^\|.*\n)+", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()[2:]]
            for block in blocks]  # fmt: skip


def named(cell):
    return re.findall(r"`([\w/]+\.py)::(test_\w+)(?:\[(\w+)\])?`", cell)


def test_every_row_of_the_page_names_a_test_and_all_tests_that_it_names_exist():
    for table in tables():
        assert all(named(cells[-1]) for cells in table)
    for file, test, row in named(PAGE.read_text(encoding="utf-8")):
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (file, test)
        assert not row or row in ROWS, row


def test_every_file_that_is_read_is_in_the_first_table():
    first = tables()[0]
    shown = [
        row
        for cells in first
        for file, test, row in named(cells[-1])
        if (file, test) == (Path(__file__).name, "test_read")
    ]
    assert sorted(shown) == sorted(ROWS)
    for cells in first:
        for _, _, row in named(cells[-1]):
            if row and row not in TOLD:
                assert (cells[-2] == "assumed") == (row in ASSUMED), cells


def test_every_layout_that_is_written_is_in_the_second_table():
    assert {layout for cells in tables()[1] for layout in re.findall(r"`(\w+)`", cells[0])} >= set(WRITERS)
