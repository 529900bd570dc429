"""The repair LoRA, held to torch's full SVD and to a second application of the file, written here by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from gmp import __version__, layouts
from gmp.clip import TextConfig, TextTower
from gmp.errors import InputError
from gmp.events import finish
from gmp.files import read_header
from gmp.geometric import split
from gmp.layouts import TowerFile
from gmp.lora import repair_lora, write_lora
from gmp.terminal import show

# Sizes that differ from each other, but for the projection: ComfyUI knows a square one only.
CONFIG = TextConfig(width=24, layers=2, heads=2, mlp_width=40, context_length=20, vocab_size=90, embed_dim=24)
PREFIX = {"clip_l": "lora_te1", "clip_g": "lora_te2", "clip_h": "lora_te"}
FULL = 24
TOKENS = "text_model.embeddings.token_embedding"
POSITIONS = "text_model.embeddings.position_embedding"
ROUNDING = {"fp32": 1e-7, "fp16": 1e-3, "bf16": 1e-2}


def encoder(folder, name: str, state: dict, config: TextConfig = CONFIG) -> TowerFile:
    layouts.write_text(state, folder / name, config=config)
    return layouts.read_text(folder / name)


def random_state(config: TextConfig = CONFIG) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in TextTower(config).state_dict().items()} | {"logit_scale": ()}
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def moved(state: dict, names: str = "", amount: float = 0.03) -> dict[str, torch.Tensor]:
    """A copy with noise on the tensors whose name holds `names`."""
    generator = torch.Generator().manual_seed(1)
    noise = {name: amount * torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}
    return {name: tensor + noise[name] if names in name else tensor for name, tensor in state.items()}


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> TowerFile:
    return encoder(tmp_path_factory.mktemp("broken"), "broken.safetensors", random_state())


@pytest.fixture(scope="module")
def repaired(tmp_path_factory, broken) -> TowerFile:
    return encoder(tmp_path_factory.mktemp("repaired"), "repaired.safetensors", moved(broken.state))


def member(tower: TowerFile, name: str) -> TowerFile:
    return replace(tower, source=replace(tower.source, member=name))


def make(repaired: TowerFile, broken: TowerFile, rank: int, **options):
    return finish(repair_lora(repaired, broken, rank, **{"dtype": "fp32", **options}))


def only(broken: TowerFile, names: str) -> TowerFile:
    state = moved(broken.state, names)
    return replace(broken, state=state, source=replace(broken.source, path="repaired.safetensors"))


def plain(state: dict) -> dict[str, torch.Tensor]:
    """Hugging Face's names, fp64: a second mapping, one line per kind of tensor."""
    names = {
        f"{TOKENS}.weight": state["token_embedding.weight"],
        f"{POSITIONS}.weight": state["positional_embedding"],
        "text_model.final_layer_norm.weight": state["ln_final.weight"],
        "text_model.final_layer_norm.bias": state["ln_final.bias"],
        "text_projection.weight": state["text_projection"].T,
    }
    for number in range(1 + max(int(name.split(".")[2]) for name in state if "resblocks" in name)):
        here, there = f"transformer.resblocks.{number}", f"text_model.encoder.layers.{number}"
        for leaf in ("weight", "bias"):
            fused = state[f"{here}.attn.in_proj_{leaf}"]
            third = len(fused) // 3
            names[f"{there}.self_attn.q_proj.{leaf}"] = fused[:third]
            names[f"{there}.self_attn.k_proj.{leaf}"] = fused[third : 2 * third]
            names[f"{there}.self_attn.v_proj.{leaf}"] = fused[2 * third :]
            names[f"{there}.self_attn.out_proj.{leaf}"] = state[f"{here}.attn.out_proj.{leaf}"]
            names[f"{there}.layer_norm1.{leaf}"] = state[f"{here}.ln_1.{leaf}"]
            names[f"{there}.layer_norm2.{leaf}"] = state[f"{here}.ln_2.{leaf}"]
            names[f"{there}.mlp.fc1.{leaf}"] = state[f"{here}.mlp.c_fc.{leaf}"]
            names[f"{there}.mlp.fc2.{leaf}"] = state[f"{here}.mlp.c_proj.{leaf}"]
    return {name: tensor.double() for name, tensor in names.items()}


def applied(base: TowerFile, path, name: str) -> dict[str, torch.Tensor]:
    """The encoder with the file added, as a loader does: W + alpha/rank · up @ down, or W + diff. All keys are used."""
    entries = {key: tensor.double() for key, tensor in load_file(path).items()}
    result = plain(base.state)
    for key in result:
        module, _, leaf = key.rpartition(".")
        generic = f"text_encoders.{name}.transformer.{module}"
        kohya = f"{PREFIX[name]}_{module.replace('.', '_')}"
        if leaf == "bias":
            result[key] = result[key] + entries.pop(f"{generic}.diff_b", 0)
            continue
        result[key] = result[key] + entries.pop(f"{generic}.diff", 0)
        for stem in (generic, kohya):
            if f"{stem}.alpha" in entries:
                down, up = entries.pop(f"{stem}.lora_down.weight"), entries.pop(f"{stem}.lora_up.weight")
                result[key] = result[key] + entries.pop(f"{stem}.alpha") / len(down) * up @ down
    assert not entries
    return result


def written(lora, folder) -> str:
    path = folder / "lora.safetensors"
    write_lora(lora, path)
    return path


def read_by_diffusion(name: str, clip: str) -> bool:
    return clip == "clip_g" or name != "text_projection.weight"


@pytest.mark.parametrize("name", PREFIX)
def test_at_full_rank_the_file_turns_the_broken_encoder_into_the_repaired_one(repaired, broken, tmp_path, name):
    lora = make(member(repaired, name), member(broken, name), FULL)
    found, wanted = applied(broken, written(lora, tmp_path), name), plain(repaired.state)
    for key, tensor in found.items():
        goal = wanted[key] if read_by_diffusion(key, name) else plain(broken.state)[key]
        torch.testing.assert_close(tensor, goal, rtol=0, atol=1e-6, msg=key)
    assert lora.kept == pytest.approx(1, abs=1e-12)


def test_at_a_low_rank_every_matrix_is_the_truncated_svd_and_all_else_is_exact(repaired, broken, tmp_path):
    lora = make(member(repaired, "clip_g"), member(broken, "clip_g"), 5)
    found = applied(broken, written(lora, tmp_path), "clip_g")
    before, after = plain(broken.state), plain(repaired.state)
    for name, tensor in found.items():
        change = after[name] - before[name]
        if change.ndim == 2 and POSITIONS not in name:
            up, values, down = torch.linalg.svd(change, full_matrices=False)
            change = (up[:, :5] * values[:5]) @ down[:5]
        torch.testing.assert_close(tensor - before[name], change, rtol=0, atol=1e-7, msg=name)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", ["clip_l", "clip_g"])
def test_the_share_that_is_kept_is_that_of_the_written_file(repaired, broken, tmp_path, name, dtype, whole):
    lora = make(member(repaired, name), member(broken, name), 5, dtype=dtype, whole=whole)
    found, before, after = applied(broken, written(lora, tmp_path), name), plain(broken.state), plain(repaired.state)
    names = [key for key in found if read_by_diffusion(key, name)]
    lost = {key: (after[key] - found[key]).square().sum().item() for key in names}
    change = {key: (after[key] - before[key]).square().sum().item() for key in names}
    assert lora.kept == pytest.approx(1 - sum(lost.values()) / sum(change.values()), rel=1e-9)
    for row in lora.layers:
        assert row.norm == pytest.approx(math.sqrt(change[row.name]), rel=1e-9)
        assert row.kept == pytest.approx(1 - lost[row.name] / change[row.name], rel=1e-9)
    left_out = {row.name: row.norm for row in lora.left_out if row.name in names}
    assert left_out.keys() | {row.name for row in lora.layers} == set(names)
    assert all(norm == pytest.approx(math.sqrt(change[key]), rel=1e-9) for key, norm in left_out.items())


@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_file_has_the_dtype_that_was_asked_for_and_rounds_no_more_than_it(repaired, broken, tmp_path, dtype):
    lora = make(repaired, broken, FULL, dtype=dtype)
    path = written(lora, tmp_path)
    kinds = {key: tensor.dtype for key, tensor in load_file(path).items()}
    assert {kind for key, kind in kinds.items() if not key.endswith(".alpha")} == {
        {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    }
    wanted = plain(repaired.state)
    for name, tensor in applied(broken, path, "clip_l").items():
        if read_by_diffusion(name, "clip_l"):
            change = wanted[name] - plain(broken.state)[name]
            assert (tensor - wanted[name]).norm() < 2 * ROUNDING[dtype] * change.norm() + 1e-6


def test_more_rank_keeps_more(repaired, broken):
    kept = [make(repaired, broken, rank).kept for rank in (1, 2, 4, 8, 16, FULL, 1000)]
    assert kept == sorted(kept) and len(set(kept[:-1])) == len(kept) - 1
    assert kept[0] > 0 and kept[-2] == kept[-1] == pytest.approx(1, abs=1e-12)


def test_a_rank_above_the_size_is_the_size(repaired, broken):
    lora = make(repaired, broken, 1000)
    assert lora.rank == FULL
    assert lora.tensors["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"].shape == (40, 24)


def test_a_change_of_a_lower_rank_takes_no_more_than_that_and_is_exact(broken, tmp_path):
    generator = torch.Generator().manual_seed(5)
    name = "transformer.resblocks.1.mlp.c_proj.weight"
    # eighths, so that the sum with the weights, which are rounded to eighths too, is exact in fp32
    base = replace(broken, state=broken.state | {name: (broken.state[name] * 8).round() / 8})
    up, down = (torch.randint(-3, 4, shape, generator=generator) for shape in ((24, 3), (3, 40)))
    after = replace(base, state=base.state | {name: base.state[name] + (up @ down) / 8})
    lora = make(after, base, 10)
    assert lora.rank == 3 and lora.kept == pytest.approx(1, abs=1e-12)
    assert lora.tensors["lora_te1_text_model_encoder_layers_1_mlp_fc2.alpha"] == 3
    found = applied(base, written(lora, tmp_path), "clip_l")["text_model.encoder.layers.1.mlp.fc2.weight"]
    torch.testing.assert_close(found, after.state[name].double(), rtol=0, atol=1e-6)


def test_both_factors_have_the_same_size(repaired, broken):
    tensors = make(repaired, broken, 5).tensors
    ups = [key for key in tensors if key.endswith(".lora_up.weight")]
    assert len(ups) == 13
    for key in ups:
        up, down = tensors[key], tensors[key.replace("_up", "_down")]
        torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))


def test_alpha_is_exact_where_bf16_cannot_hold_it(tmp_path):
    config = replace(CONFIG, width=264, layers=1, heads=4, mlp_width=300, embed_dim=264)
    before = encoder(tmp_path, "before.safetensors", random_state(config), config)
    after = encoder(tmp_path, "after.safetensors", moved(before.state), config)
    lora = make(after, before, 257, dtype="bf16")
    assert lora.tensors["lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha"].item() == 257


def test_without_the_whole_change_there_are_linears_only_and_the_rest_is_listed(repaired, broken):
    lora = make(repaired, broken, 4, whole=False)
    assert all(key.startswith("lora_te1_text_model_encoder_layers_") for key in lora.tensors)
    assert len(lora.tensors) == 3 * 12
    left_out = {row.name for row in lora.left_out}
    assert {f"{TOKENS}.weight", f"{POSITIONS}.weight", "text_model.encoder.layers.0.mlp.fc1.bias"} <= left_out
    assert lora.kept < make(repaired, broken, 4).kept


FACTORS = ("alpha", "lora_down.weight", "lora_up.weight")
INSIDE = "text_encoders.clip_l.transformer.text_model.encoder.layers"


@pytest.mark.parametrize(
    "names, keys",
    [
        ("resblocks.1.ln_2.bias", [f"{INSIDE}.1.layer_norm2.diff_b"]),
        ("resblocks.0.ln_1.weight", [f"{INSIDE}.0.layer_norm1.diff"]),
        ("positional", [f"text_encoders.clip_l.transformer.{POSITIONS}.diff"]),
        ("token_embedding", [f"text_encoders.clip_l.transformer.{TOKENS}.{x}" for x in FACTORS]),
        ("1.mlp.c_fc.weight", [f"lora_te1_text_model_encoder_layers_1_mlp_fc1.{x}" for x in FACTORS]),
        ("0.attn.in_proj_bias", [f"{INSIDE}.0.self_attn.{x}_proj.diff_b" for x in "kqv"]),
    ],
)
def test_only_what_changed_is_stored(broken, names, keys):
    assert sorted(make(only(broken, names), broken, 3).tensors) == keys


def test_a_token_embedding_is_stored_as_it_is_where_factors_would_be_larger(broken):
    after, key = only(broken, "token_embedding"), f"text_encoders.clip_l.transformer.{TOKENS}"
    assert sorted(make(after, broken, 18).tensors)[0] == f"{key}.alpha"  # 18 · (90 + 24) < 90 · 24
    assert list(make(after, broken, 19).tensors) == [f"{key}.diff"]


def test_what_no_diffusion_model_reads_is_listed_with_its_norm_and_does_not_count(repaired, broken):
    lora = make(repaired, broken, FULL)
    difference = repaired.state["text_projection"].double() - broken.state["text_projection"].double()
    rows = {row.name: row for row in lora.left_out}
    assert rows.keys() == {"text_projection.weight", "logit_scale"}
    assert rows["text_projection.weight"].norm == pytest.approx(difference.norm().item())
    assert lora.kept == pytest.approx(1, abs=1e-12)
    assert "text_projection.weight" not in {row.name for row in lora.layers}


@pytest.mark.parametrize("name", ["clip_l", "clip_g"])
def test_a_projection_that_cannot_be_subtracted_is_listed_and_says_why(repaired, broken, name):
    lacking = {key: tensor for key, tensor in broken.state.items() if key != "text_projection"}
    damaged = broken.state | {"text_projection": torch.full((24, 24), torch.nan)}
    reasons = ("only the repaired encoder has it", "it is NaN or infinite in the broken encoder")
    for state, reason in zip((lacking, damaged), reasons, strict=True):
        lora = make(member(repaired, name), member(replace(broken, state=state), name), 4)
        row = next(row for row in lora.left_out if row.name == "text_projection.weight")
        assert row.norm is None and row.reason == reason
        assert not any("text_projection" in key for key in lora.tensors)


def test_radius_and_direction_are_folded_first(repaired, broken):
    name = "transformer.resblocks.0.mlp.c_fc"
    r, theta = split(repaired.state[f"{name}.weight"])
    state = repaired.state | {f"{name}.r": r, f"{name}.theta": 2 * theta}
    del state[f"{name}.weight"]
    found, wanted = make(replace(repaired, state=state), broken, 4), make(repaired, broken, 4)
    assert found.kept == pytest.approx(wanted.kept, rel=1e-6)


def test_two_runs_write_the_same_bytes_and_draw_no_random_numbers(repaired, broken, tmp_path):
    before = torch.get_rng_state()
    for number in (1, 2):
        write_lora(make(repaired, broken, 6, dtype="fp16"), tmp_path / f"{number}.safetensors", {"b": "2", "a": "1"})
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_inputs_are_left_as_they_were(repaired, broken):
    copies = [{name: tensor.clone() for name, tensor in tower.state.items()} for tower in (repaired, broken)]
    make(repaired, broken, 4)
    for tower, copy in zip((repaired, broken), copies, strict=True):
        assert all(torch.equal(tower.state[name], tensor) for name, tensor in copy.items())


def test_the_file_says_what_it_is(repaired, broken, tmp_path):
    lora = make(repaired, broken, 6, dtype="fp16")
    write_lora(lora, tmp_path / "lora.safetensors", {"mine": "yes"})
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        metadata = file.metadata()
    facts = json.loads(metadata.pop("gmp_repair_lora"))
    assert metadata == {
        "format": "pt", "gmp_version": __version__, "mine": "yes",
        "ss_network_module": "networks.lora", "ss_network_dim": "6", "ss_network_alpha": "6",
    }  # fmt: skip
    assert facts["kept"] == lora.kept and facts["rank"] == 6 and facts["member"] == "clip_l"
    assert facts["broken"] == {"file": "broken.safetensors", "sha256": broken.source.sha256}
    assert facts["repaired"] == {"file": "repaired.safetensors", "sha256": repaired.source.sha256}
    assert facts["left_out"] == ["text_projection.weight", "logit_scale"]
    assert layouts.describe(read_header(tmp_path / "lora.safetensors")).kind == "lora"


def test_a_file_without_low_rank_matrices_does_not_claim_a_rank(broken, tmp_path):
    lora = make(only(broken, "ln_1"), broken, 6)
    write_lora(lora, tmp_path / "lora.safetensors")
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        assert not [name for name in file.metadata() if name.startswith("ss_")]


def test_progress_counts_the_matrices_and_the_terminal_shows_it(repaired, broken, capsys):
    events = []
    finish(repair_lora(repaired, broken, 4), events.append)
    assert [event["done"] for event in events] == list(range(1, 14))  # six Linears of two blocks, token embedding
    assert {(event["type"], event["total"]) for event in events} == {("progress", 13)}
    assert show(repair_lora(repaired, broken, 4)).rank == 4
    assert "13/13" in capsys.readouterr().err


def message(repaired: TowerFile, broken: TowerFile, rank: int = 4, **options) -> str:
    with pytest.raises(InputError) as caught:
        make(repaired, broken, rank, **options)
    return str(caught.value)


def test_encoders_of_different_shapes_are_refused_with_all_differences(repaired, tmp_path):
    config = TextConfig(width=32, layers=3, heads=2, mlp_width=48, context_length=10, vocab_size=70, embed_dim=16)
    other = encoder(tmp_path, "other.safetensors", random_state(config), config)
    text = message(repaired, member(other, "clip_g"), rank=0, dtype="fp8")
    assert text.startswith("repaired.safetensors minus other.safetensors: ")
    for problem in (
        "rank 0 is below 1", "dtype 'fp8' is not one of fp32, fp16, bf16", "the first is clip_l and the second clip_g",
        "layers 2 and 3", "width 24 and 32", "MLP width 40 and 48", "context length 20 and 10", "vocabulary 90 and 70",
    ):  # fmt: skip
        assert problem in text
    assert "projection" not in text  # clip_l's is not read
    assert "projection to 24 and 16" in message(member(repaired, "clip_g"), member(other, "clip_g"))


@pytest.mark.parametrize("name", [None, "t5xxl"])
def test_an_encoder_without_a_known_name_is_refused(repaired, broken, name):
    assert f"{name} is none of clip_l, clip_g, clip_h" in message(member(repaired, name), member(broken, name))


def test_two_equal_encoders_are_refused(broken):
    assert "nothing to write: the two are the same" in message(broken, broken)
    assert "the two are the same wherever a diffusion model reads them" in message(only(broken, "logit_scale"), broken)


def test_a_change_without_linears_needs_the_whole_change(broken):
    assert "only biases, LayerNorms or embeddings differ" in message(only(broken, "ln_"), broken, whole=False)


def test_values_beyond_fp16_are_refused_with_every_tensor(repaired, broken):
    large = {
        "ln_final.weight": torch.full((24,), 1e5),
        "transformer.resblocks.0.mlp.c_fc.weight": torch.eye(40, 24) * 1e12,
    }
    after = replace(repaired, state=repaired.state | large)
    text = message(after, broken, dtype="fp16")
    assert "too large for fp16 in 2 tensors: text_model.encoder.layers.0.mlp.fc1.weight, text_model.final_layer" in text
    assert make(after, broken, 4, dtype="bf16").kept > 0
