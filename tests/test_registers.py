"""Vision towers with registers and gates: computed by their definition, read, refused, trained and written."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gmp.clip import (
    CLIP,
    CLIPConfig,
    TextConfig,
    VisionConfig,
    VisionTower,
    initialize,
    load,
    precision,
    set_checkpointing,
)
from gmp.config import Geometric, RepairConfig
from gmp.data.captions import read_index
from gmp.encode import encode
from gmp.errors import InputError
from gmp.files import read_header
from gmp.geometric import fold_state, split_mlps
from gmp.gradients import layer_and_role
from gmp.inspection import inspect, lines
from gmp.join import join
from gmp.layouts import describe, read_text, read_vision, write_clip, write_text
from gmp.layouts.canonical import vision_part
from gmp.run import repair
from gmp.trainer import set_up
from gmp.training_data import Inputs
from tests.small import SMALL, disturbed, tokenize

CPU = torch.device("cpu")
SIZE, PATCH, WIDTH, HEADS = 32, 8, 32, 2
PATCHES = (SIZE // PATCH) ** 2
PLAIN = VisionConfig(WIDTH, 3, HEADS, 64, PATCH, SIZE, 16, "quick_gelu")
KINDS = {  # registers and gates
    "registers": dataclasses.replace(PLAIN, registers=3),
    "a gate behind the tower": dataclasses.replace(PLAIN, registers=3, gates=1),
    "gates behind two blocks": dataclasses.replace(PLAIN, registers=4, gates=3),
    "gates behind all blocks": dataclasses.replace(PLAIN, registers=1, gates=4),
}
GATED = KINDS["gates behind two blocks"]
L14 = VisionConfig(1024, 24, 16, 4096, 14, 224, 768, "quick_gelu", registers=4, gates=12)
L14_TEXT = TextConfig(768, 12, 12, 3072, 77, 49408, 768, "quick_gelu")
RUN = {"epochs": 2, "batch": 8, "lr": 1e-3, "held_out": 0.08, "train": "both"}


def lively(clip: CLIP) -> CLIP:
    """Biases, gains and gates that matter: freshly made gates all stand at about one half."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in clip.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
            if "fusion" in name and parameter.ndim == 2:
                parameter *= 2
    return clip


def clip_of(vision: VisionConfig, seed: int = 0) -> CLIP:
    return lively(initialize(CLIP(CLIPConfig(SMALL.text, vision)), torch.Generator().manual_seed(seed)))


def pixels(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


# ---- what is computed -----------------------------------------------------------------------------------------------


def by_definition(state: dict[str, torch.Tensor], picture: torch.Tensor, config: VisionConfig) -> torch.Tensor:
    """One picture (3, S, S), token by token, with the names of the published checkpoints; -> (embed,)."""

    def norm(x, name):
        centred = x - x.mean()
        return centred / (centred.square().mean() + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x, name):
        return state[f"{name}.weight"] @ x + state[f"{name}.bias"]

    def gate(tokens, name):
        summary = sum(tokens[1 : 1 + config.registers]) / config.registers
        hidden = linear(torch.cat([tokens[0], summary]), f"{name}.0").clamp_min(0)
        share = 1 / (1 + torch.exp(-linear(hidden, f"{name}.2")))
        return share * tokens[0] + (1 - share) * summary

    edge = SIZE // PATCH
    patches = []
    for row in range(edge):
        for column in range(edge):
            square = picture[:, PATCH * row : PATCH * (row + 1), PATCH * column : PATCH * (column + 1)]
            patches.append((state["conv1.weight"] * square).sum(dim=(1, 2, 3)))
    tokens = [state["class_embedding"], *state["register_tokens"], *patches]
    tokens = [norm(token + state["positional_embedding"][at], "ln_pre") for at, token in enumerate(tokens)]
    depth = config.width // config.heads
    for number in range(config.layers):
        block = f"transformer.resblocks.{number}"
        seen = [norm(token, f"{block}.ln_1") for token in tokens]
        weight, bias = state[f"{block}.attn.in_proj_weight"], state[f"{block}.attn.in_proj_bias"]
        q, k, v = zip(*[(weight @ token + bias).split(config.width) for token in seen], strict=True)
        for at in range(len(tokens)):
            heads = []
            for head in range(config.heads):
                here = slice(head * depth, (head + 1) * depth)
                scores = torch.stack([q[at][here] @ key[here] / math.sqrt(depth) for key in k])
                shares = scores.exp() / scores.exp().sum()
                heads.append(sum(share * value[here] for share, value in zip(shares, v, strict=True)))
            tokens[at] = tokens[at] + linear(torch.cat(heads), f"{block}.attn.out_proj")
        for at, token in enumerate(tokens):
            hidden = linear(norm(token, f"{block}.ln_2"), f"{block}.mlp.c_fc")
            tokens[at] = token + linear(hidden / (1 + torch.exp(-1.702 * hidden)), f"{block}.mlp.c_proj")
        gated = number - (config.layers - (config.gates - 1))
        if config.gates and gated >= 0:
            tokens[0] = gate(tokens, f"transformer.intermediate_fusion_mlps.{gated}")
    read = [norm(token, "ln_post") for token in tokens[: 1 + config.registers]]
    return (gate(read, "fusion_mlp") if config.gates else read[0]) @ state["proj"]


@pytest.mark.parametrize("kind", KINDS)
def test_features_and_gradients_are_those_of_the_definition(kind):
    config = KINDS[kind]
    tower = clip_of(config).visual.double()
    state = {name: p.detach().clone().requires_grad_() for name, p in tower.named_parameters()}
    given = pixels().double()
    wanted = torch.stack([by_definition(state, picture, config) for picture in given])
    found = tower(given)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    wanted.square().sum().backward()
    found.square().sum().backward()
    for name, parameter in tower.named_parameters():
        scale = state[name].grad.abs().max()
        assert scale > 0, name  # each tensor matters
        assert (parameter.grad - state[name].grad).abs().max() < 1e-9 * scale, name


def test_patches_take_the_positions_behind_the_registers():
    """As published: the rows that were added lie at the end, and what is learnt for patch n goes to patch n - 4."""
    tower = clip_of(GATED).visual
    state = dict(tower.state_dict())
    rows = state["positional_embedding"]
    by_kind = torch.cat([rows[:1], rows[-GATED.registers :], rows[1 : -GATED.registers]])
    other = load(VisionTower, GATED, state | {"positional_embedding": by_kind})
    with torch.no_grad():
        assert (other(pixels()) - tower(pixels())).norm() > 0.05 * tower(pixels()).norm()


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_changes_no_gradient(kind):
    grads = []
    for on in (False, True):
        tower = clip_of(KINDS[kind]).visual
        set_checkpointing(tower, on)
        tower(pixels()).square().sum().backward()
        grads.append([parameter.grad for parameter in tower.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_gates_stay_in_fp32_where_blocks_compute_in_bf16():
    tower = clip_of(GATED).visual
    seen = []
    tower.fusion_mlp[0].register_forward_hook(lambda module, given, out: seen.append((given[0].dtype, out.dtype)))
    with torch.no_grad(), precision(torch.bfloat16, tower):
        near = tower(pixels())
        assert seen == [(torch.float32, torch.float32)]
    with torch.no_grad():
        assert torch.nn.functional.cosine_similarity(near, tower(pixels())).min() > 0.999


@pytest.mark.parametrize(("registers", "gates"), [(0, 1), (2, 5)])
def test_gates_that_nothing_goes_through_are_no_tower(registers, gates):
    with pytest.raises(ValueError, match=f"{gates} gates for {registers} registers and 3 blocks"):
        VisionTower(dataclasses.replace(PLAIN, registers=registers, gates=gates))


# ---- files ----------------------------------------------------------------------------------------------------------


def saved(clip: CLIP, path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in clip.state_dict().items()}, path)
    return path


def hollow(path: Path, shapes: dict[str, torch.Size]) -> Path:
    """A safetensors file in fp16 of which only the header takes disk."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape.numel()
        entries[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def test_a_full_size_tower_has_the_published_names_and_parameters(tmp_path):
    """427,616,513 parameters of OpenAI's L/14, 4 tokens and positions, and 12 gates of 2,099,201."""
    with torch.device("meta"):
        clip = CLIP(CLIPConfig(L14_TEXT, L14))
    assert sum(p.numel() for p in clip.parameters()) == 452_815_117 == 427_616_513 + 8 * 1024 + 12 * 2_099_201
    shapes = {name: list(p.shape) for name, p in clip.visual.state_dict().items()}
    plain = CLIPConfig(L14_TEXT, dataclasses.replace(L14, registers=0, gates=0))
    with torch.device("meta"):
        more = shapes.keys() - CLIP(plain).visual.state_dict().keys()
    leaves = {"0.weight": [1024, 2048], "0.bias": [1024], "2.weight": [1, 1024], "2.bias": [1]}
    stems = ["fusion_mlp", *(f"transformer.intermediate_fusion_mlps.{n}" for n in range(11))]
    wanted = {f"{stem}.{leaf}": shape for stem in stems for leaf, shape in leaves.items()}
    assert {name: shapes[name] for name in more} == wanted | {"register_tokens": [4, 1024]}
    assert shapes["positional_embedding"] == [261, 1024]

    path = hollow(tmp_path / "registers.safetensors", {name: p.shape for name, p in clip.state_dict().items()})
    text, vision = inspect(path).towers
    assert vision.problems == vision.unexpected == ()
    assert vision.architecture == "ViT-L/14 with 4 registers and 12 gates" and text.architecture == "ViT-L/14"
    assert (vision.heads, vision.sizes["registers"], vision.sizes["gates"]) == (16, 4, 12)
    assert text.parameters + vision.parameters == 452_815_117
    assert "rows 261, embed 768, mlp 4096, registers 4, gates 12" in "\n".join(lines(inspect(path)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_is_read_as_it_is(tmp_path, kind):
    config = KINDS[kind]
    clip = clip_of(config)
    path = saved(clip, tmp_path / "clip.safetensors")
    vision, text = read_vision(path, heads=HEADS), read_text(path, heads=2)
    assert vision.config == config and not vision.source.unexpected and not vision.source.missing
    wanted = clip.visual.state_dict()
    assert vision.state.keys() == {f"visual.{name}" for name in wanted}
    assert all(torch.equal(tensor, wanted[name.removeprefix("visual.")]) for name, tensor in vision.state.items())
    ids = tokenize(["a red fox", "a box"]).ids
    found = encode(text, vision, ids, pixels()).tensors
    with torch.no_grad():
        torch.testing.assert_close(found["image"], clip.encode_image(pixels()), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["projected"], clip.encode_text(ids), rtol=1e-5, atol=1e-6)


def test_a_pickled_model_and_a_dict_with_dicts_are_read(tmp_path):
    """The converter of the published ones writes the gates twice: by name, and once more as dicts."""
    clip = clip_of(GATED)
    torch.save(clip, tmp_path / "model.pt")
    gates = clip.visual.transformer.intermediate_fusion_mlps
    nested = {
        "visual.fusion_mlp": dict(clip.visual.fusion_mlp.state_dict()),
        "visual.transformer.intermediate_fusion_mlps": dict(gates.state_dict()),
    }
    torch.save(clip.state_dict() | nested, tmp_path / "dict.pt")
    wanted = read_vision(saved(clip, tmp_path / "clip.safetensors"), heads=HEADS)
    for name in ("model.pt", "dict.pt"):
        found = read_vision(tmp_path / name, heads=HEADS)
        assert found.config == GATED and found.source.sha256 == wanted.source.sha256


def transformers_names(clip: CLIP) -> dict[str, torch.Tensor]:
    """Those of the fork of transformers that the gated ones were published for."""
    result = {}
    for name, tensor in clip.visual.state_dict().items():
        name, tensor = f"visual.{name}", tensor
        if ".attn.in_proj_" in name:
            stem, _, leaf = name.rpartition("attn.in_proj_")
            stem = stem.replace("visual.transformer.resblocks", "vision_model.encoder.layers")
            result |= {
                f"{stem}self_attn.{letter}_proj.{leaf}": part
                for letter, part in zip("qkv", tensor.chunk(3), strict=True)
            }
            continue
        for theirs, ours in (
            ("visual.transformer.resblocks", "vision_model.encoder.layers"),
            ("visual.transformer.intermediate_fusion_mlps", "vision_model.intermediate_fusion_mlps"),
            ("visual.fusion_mlp", "vision_model.fusion_mlp"),
            ("visual.register_tokens", "vision_model.embeddings.register_embeddings"),
            ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
            ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
            ("visual.conv1", "vision_model.embeddings.patch_embedding"),
            ("visual.ln_pre", "vision_model.pre_layrnorm"),
            ("visual.ln_post", "vision_model.post_layernorm"),
            ("visual.proj", "visual_projection.weight"),
            ("attn.out_proj", "self_attn.out_proj"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"),
            ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"),
        ):  # fmt: skip
            name = name.replace(theirs, ours)
        result[name] = tensor.T if name == "visual_projection.weight" else tensor
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_the_names_of_a_transformers_with_registers_are_read(tmp_path, kind):
    clip = clip_of(KINDS[kind])
    tensors = {name: tensor.contiguous() for name, tensor in transformers_names(clip).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    found = read_vision(tmp_path / "model.safetensors", heads=HEADS, activation="quick_gelu")
    wanted = read_vision(saved(clip, tmp_path / "clip.safetensors"), heads=HEADS)
    assert found.config == KINDS[kind] and found.source.layout == "huggingface" and not found.source.unexpected
    assert found.source.sha256 == wanted.source.sha256


LEAVES = ("0.weight", "0.bias", "2.weight", "2.bias")
DAMAGED = {  # what is lost, and what is said
    "a gate without its bias": (("fusion_mlp.2.bias",), "tensors are missing: visual.fusion_mlp.2.bias"),
    "gates in blocks and none behind": (
        [f"fusion_mlp.{leaf}" for leaf in LEAVES],
        "tensors are missing: visual.fusion_mlp.0.bias, visual.fusion_mlp.0.weight",
    ),
    "the first gate is missing": (
        [f"transformer.intermediate_fusion_mlps.0.{leaf}" for leaf in LEAVES],
        "tensors are not those of a CLIP: visual.transformer.intermediate_fusion_mlps.1",
    ),
    "gates without registers": (("register_tokens",), "tensors are not those of a CLIP: visual.fusion_mlp"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_registers_and_gates_that_are_not_whole_are_refused(tmp_path, case):
    lost, sentence = DAMAGED[case]
    state = clip_of(GATED).state_dict()
    for name in lost:
        del state[f"visual.{name}"]
    save_file(state, tmp_path / "clip.safetensors")
    with pytest.raises(InputError, match=sentence):
        read_vision(tmp_path / "clip.safetensors", heads=HEADS)


def test_positions_must_be_those_of_registers_and_patches(tmp_path):
    state = clip_of(GATED).state_dict()
    state["visual.positional_embedding"] = state["visual.positional_embedding"][:-4].clone()
    save_file(state, tmp_path / "clip.safetensors")
    with pytest.raises(InputError, match="has 17 rows, not 5, class token and registers, more than a square number"):
        read_vision(tmp_path / "clip.safetensors", heads=HEADS)


def test_more_gates_than_blocks_are_refused(tmp_path):
    state = clip_of(KINDS["gates behind all blocks"]).state_dict()
    stem = "visual.transformer.intermediate_fusion_mlps"
    state |= {name.replace(f"{stem}.2", f"{stem}.3"): t.clone() for name, t in state.items() if f"{stem}.2." in name}
    save_file(state, tmp_path / "clip.safetensors")
    with pytest.raises(InputError, match="has 5 gates, more than its 3 blocks and one"):
        read_vision(tmp_path / "clip.safetensors", heads=HEADS)


@pytest.mark.parametrize("kind", KINDS)
def test_written_in_openais_names_and_read_back_it_has_the_same_bytes(tmp_path, kind):
    clip = clip_of(KINDS[kind])
    state = {name: tensor.half() for name, tensor in clip.state_dict().items()}
    write_clip(state, tmp_path / "clip.safetensors", layout="openai", dtype="keep", config=clip.config)
    with safe_open(tmp_path / "clip.safetensors", "pt") as file:
        written = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert written.keys() == state.keys() and all(torch.equal(written[name], state[name]) for name in state)
    vision = read_vision(tmp_path / "clip.safetensors")
    assert vision.config == KINDS[kind] and vision.source.assumptions == ()


@pytest.mark.parametrize("layout", ["huggingface", "huggingface_folder", "open_clip", "open_clip_folder"])
def test_layouts_of_programs_that_know_no_registers_are_refused(tmp_path, layout):
    clip = clip_of(GATED)
    with pytest.raises(
        InputError, match=f"layout {layout} has no place for a vision tower's registers; write the whole"
    ):
        write_clip(clip.state_dict(), tmp_path / "out", layout=layout, config=clip.config)
    assert not (tmp_path / "out").exists()
    text = {name: tensor for name, tensor in clip.state_dict().items() if not name.startswith("visual.")}
    if layout != "open_clip_folder":  # which is of both towers always
        write_text(text, tmp_path / "text.safetensors", layout=layout, config=clip.text_config)


def test_a_config_of_another_tower_is_refused(tmp_path):
    clip = clip_of(GATED)
    config = CLIPConfig(SMALL.text, dataclasses.replace(GATED, registers=3, gates=1))
    with pytest.raises(InputError, match="the config says 3 registers and 1 gates, the vision tower has 4 and 3"):
        write_clip(clip.state_dict(), tmp_path / "out.safetensors", layout="openai", config=config)


# ---- a repair -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gated_inputs(pictures, tmp_path_factory) -> Inputs:
    folder = tmp_path_factory.mktemp("gated")
    clip = clip_of(GATED)
    saved(clip, folder / "original.safetensors")
    broken = {n: t for n, t in disturbed(clip).state_dict().items() if not n.startswith("visual.")}
    save_file(broken, folder / "broken.safetensors")
    index = read_index(pictures, pictures / "captions.json")
    vision = read_vision(folder / "original.safetensors", heads=HEADS)
    text = read_text(folder / "broken.safetensors", heads=2)
    original = read_text(folder / "original.safetensors", heads=2)
    return Inputs(text, vision, original, index, tokenize)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def run(inputs, config, folder, cache):
    return list(repair(inputs, config, folder, cache=cache, device=CPU))


def test_joined_registers_come_from_the_vision_file(gated_inputs):
    joined = join(gated_inputs.text, gated_inputs.vision, gated_inputs.original)
    assert joined.config.vision == GATED
    origin = {name: one.name for one in joined.report for name in one.names}
    names = [name for name in joined.state if "register" in name or "fusion" in name]
    assert len(names) == 1 + 4 * GATED.gates and {origin[name] for name in names} == {"vision tower"}
    with torch.no_grad():
        wanted = load(VisionTower, GATED, vision_part(gated_inputs.vision.state))(pixels())
        assert torch.equal(joined.build_vision()(pixels()), wanted)


def test_a_locked_tower_embeds_the_pictures_and_the_text_trains(gated_inputs, tmp_path, cache):
    config = RepairConfig(**RUN | {"train": "text"})
    events = run(gated_inputs, config, tmp_path / "run", cache)
    assert events[-1]["type"] == "done"
    losses = [event["loss"] for event in events if event["type"] == "step"]
    assert losses[-1] < losses[0]


def test_where_both_train_registers_and_gates_do_and_a_run_that_breaks_off_goes_on_to_the_same_bytes(
    gated_inputs, tmp_path, cache
):
    config = RepairConfig(**RUN, save_every=1)
    events = run(gated_inputs, config, tmp_path / "whole", cache)
    assert events[-1]["type"] == "done"
    first = next(event for event in events if event["type"] == "step")
    assert {"vision.mlp", "vision.embedding", "vision.1.theta"} <= first["grad_norms"].keys()
    before = gated_inputs.vision.state
    path = tmp_path / "whole" / "clip.safetensors"
    after = load_file(path)
    names = [name for name in after if "register" in name or "fusion" in name]
    assert len(names) == 1 + 4 * GATED.gates
    for name in names:
        assert not torch.equal(after[name], before[name]), name
    vision = read_vision(path)
    assert vision.config == GATED
    with torch.no_grad():
        assert load(VisionTower, GATED, vision_part(vision.state))(pixels()).isfinite().all()

    events = repair(gated_inputs, config, tmp_path / "parts", cache=cache, device=CPU)
    while next(events)["type"] != "checkpoint":
        pass
    events.close()
    again = run(gated_inputs, config, tmp_path / "parts", cache)
    assert next(event["step"] for event in again if event["type"] == "resume") == 1 and again[-1]["type"] == "done"
    assert (tmp_path / "parts" / "clip.safetensors").read_bytes() == path.read_bytes()


def test_mlps_are_split_and_gates_are_not_and_folding_gives_the_names_back(tmp_path):
    clip = clip_of(GATED)
    state = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    split = split_mlps(state)
    assert not [name for name in split if "fusion" in name and name.endswith((".r", ".theta"))]
    assert "visual.transformer.resblocks.2.mlp.c_fc.theta" in split
    write_clip(split, tmp_path / "gmp.safetensors", layout="gmp", config=clip.config)
    assert describe(read_header(tmp_path / "gmp.safetensors")).vision.sizes["gates"] == GATED.gates
    kept = read_vision(tmp_path / "gmp.safetensors", fold=False)
    assert all(torch.equal(kept.state[name], split[name]) for name in kept.state)
    folded = fold_state(split)
    assert folded.keys() == state.keys()
    vision = read_vision(tmp_path / "gmp.safetensors")
    for name, tensor in vision.state.items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-6, atol=1e-7)


def test_gradients_of_registers_and_gates_are_watched_as_embedding_and_mlp():
    names = [name for name, _ in clip_of(GATED).named_parameters() if "register" in name or "fusion" in name]
    assert {layer_and_role(name) for name in names} == {"vision.embedding", "vision.mlp"}
    assert layer_and_role("visual.register_tokens") == "vision.embedding"


def test_locked_blocks_keep_the_gates_behind_them(gated_inputs):
    """One unlocked block of three: the gate behind it, and that behind the tower."""
    clip = join(gated_inputs.text, gated_inputs.vision, gated_inputs.original).build()
    set_up(clip, RepairConfig(**RUN, vision_blocks=1, geometric=()), CPU)
    trains = {name for name, p in clip.visual.named_parameters() if p.requires_grad and "resblocks" not in name}
    gates = {name.rpartition(".0.")[0] for name in trains if ".0." in name}
    assert gates == {"transformer.intermediate_fusion_mlps.1", "fusion_mlp"} and "register_tokens" not in trains


def test_no_geometric_layer_is_a_gates():
    clip = clip_of(GATED)
    set_up(clip, RepairConfig(**RUN, geometric=(Geometric(layers=("mlp", "qkv", "out", "projection")),)), CPU)
    assert not [name for name, _ in clip.named_parameters() if "fusion" in name and name.endswith(".theta")]
