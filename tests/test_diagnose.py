"""Diagnosis of known damages of the world's text encoder: what was done to it is what is found, and nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gmp.cli import main
from gmp.commands.diagnose import TARGETS as OFFERED
from gmp.data.captions import dataset_key, read_index
from gmp.diagnose import Pictures, diagnose
from gmp.diagnosis import Diagnosis, as_document, lines
from gmp.errors import InputError
from gmp.evaluate import SCHEMA
from gmp.events import finish
from gmp.features import index_keys
from gmp.layouts import TowerFile, read_text, read_vision
from gmp.plots.diagnosis import plot_diagnosis
from gmp.plots.figure import pixels
from gmp.presets import preset
from gmp.trained import is_rounding, what_was_trained
from gmp.verdict import FAR, LEAST_PAIRS, ORDER_LOST, TARGETS, align
from gmp.world.models import ASSETS, ORIGINAL, RUINED
from gmp.world.write import write_world

START = read_text(ASSETS / ORIGINAL)
BROKEN = read_text(ASSETS / RUINED)
LAYERS = START.config.layers
State = dict[str, Tensor]


def changed(change: Callable[[State], None], start: TowerFile = START) -> TowerFile:
    """The original with its tensors changed in place."""
    state = {name: tensor.clone() for name, tensor in start.state.items()}
    change(state)
    return replace(start, state=state)


def found(encoder: TowerFile, **options) -> Diagnosis:
    return finish(diagnose(encoder, START, **options))


def noise(amount: float, names: Callable[[str], bool], seed: int = 0) -> Callable[[State], None]:
    """Noise of so many standard deviations on the tensors of those names."""

    def add(state: State) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name in filter(names, state):
            spread = state[name].std(correction=0).nan_to_num(0.0) + 1e-6
            state[name] += amount * spread * torch.randn(state[name].shape, generator=generator)

    return add


def matrix(name: str) -> bool:
    return "resblocks" in name and name.endswith("weight") and "ln_" not in name


def in_last_block(name: str) -> bool:
    return f"resblocks.{LAYERS - 1}." in name


def round_to(dtype: torch.dtype) -> Callable[[State], None]:
    def change(state: State) -> None:
        state.update({name: tensor.to(dtype).float() for name, tensor in state.items()})

    return change


def collapse(state: State) -> None:
    """All that the blocks before the last say is one direction."""
    for block in range(LAYERS - 1):
        for name in ("attn.out_proj.weight", "mlp.c_proj.weight"):
            state[f"transformer.resblocks.{block}.{name}"] *= 0.02
        state[f"transformer.resblocks.{block}.mlp.c_proj.bias"] += 20


def shuffle_tokens(state: State) -> None:
    table = state["token_embedding.weight"]
    order = torch.randperm(49406, generator=torch.Generator().manual_seed(1))
    table[:49406] = table[:49406][order].clone()


def rotate(state: State) -> None:
    """The same encoder in a turned basis: what every block reads and writes is turned along.

    LayerNorm stands a rotation that leaves the vector of ones alone, with a gain that is the same everywhere: so gains
    are first folded into the matrices behind them. The final LayerNorm keeps its own, so `last` is not merely turned.
    """
    width = START.config.width
    ones = torch.ones(width, dtype=torch.float64) / math.sqrt(width)
    seed = torch.randn(width, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    basis = torch.linalg.qr(torch.cat([ones[:, None], seed[:, 1:]], dim=1)).Q
    inner = torch.linalg.qr(seed[1:, 1:]).Q
    turn = torch.eye(width, dtype=torch.float64)
    turn[1:, 1:] = inner
    turn = basis @ turn @ basis.T  # x @ turn; ones @ turn = ones
    double = {name: tensor.double() for name, tensor in state.items()}
    for name in ("token_embedding.weight", "positional_embedding"):
        double[name] = double[name] @ turn
    for block in range(LAYERS):
        inside = f"transformer.resblocks.{block}."
        for norm, weight, bias in (
            ("ln_1", "attn.in_proj_weight", "attn.in_proj_bias"),
            ("ln_2", "mlp.c_fc.weight", "mlp.c_fc.bias"),
        ):
            matrix, gain = double[f"{inside}{weight}"], double[f"{inside}{norm}.weight"]
            double[f"{inside}{bias}"] = double[f"{inside}{bias}"] + matrix @ double[f"{inside}{norm}.bias"]
            double[f"{inside}{weight}"] = (matrix * gain) @ turn
            double[f"{inside}{norm}.weight"] = torch.ones_like(gain)
            double[f"{inside}{norm}.bias"] = torch.zeros_like(gain)
        for name in ("attn.out_proj", "mlp.c_proj"):
            double[f"{inside}{name}.weight"] = turn.T @ double[f"{inside}{name}.weight"]
            double[f"{inside}{name}.bias"] = double[f"{inside}{name}.bias"] @ turn
    state.update({name: tensor.float() for name, tensor in double.items()})


@pytest.fixture(scope="module")
def ruined() -> Diagnosis:
    return found(BROKEN)


@pytest.fixture(scope="module")
def rotated() -> Diagnosis:
    return found(changed(rotate))


@pytest.fixture(scope="module")
def shuffled() -> Diagnosis:
    return found(changed(shuffle_tokens))


@pytest.fixture(scope="module")
def copied() -> Diagnosis:
    return found(changed(lambda state: None))


# ---- untouched ------------------------------------------------------------------------------------------------------


def test_a_copy_is_the_original_bit_by_bit(copied):
    one = copied
    assert one.verdict.finding == one.trained.pattern == "identical"
    assert "bit by bit" in one.verdict.text and one.verdict.preset is None
    assert {part.state for part in one.parts} == {reading.state for reading in one.readings.values()} == {"untouched"}
    assert all(part.error == 0 and part.change == 0 and part.structure.cka == pytest.approx(1) for part in one.parts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_for_storage_is_no_training(dtype):
    start = changed(noise(1e-3, lambda name: name != "logit_scale"))  # the shipped one is fp16 already
    one = finish(diagnose(changed(round_to(dtype), start), start))
    assert one.verdict.finding == "rounded" and one.trained.rounded > 40
    assert {part.state for part in one.parts} == {"untouched"}
    assert what_was_trained(start.state, changed(round_to(dtype), start).state).pattern == "rounded"


def test_roundings_are_told_from_small_changes():
    exact = 0.02 * torch.randn(20000, generator=torch.Generator().manual_seed(0))
    half, brain = exact.half().float(), exact.bfloat16().float()
    assert is_rounding(exact, exact) and is_rounding(half, exact) and is_rounding(exact, brain)
    assert is_rounding(half, brain) and is_rounding(brain, half)
    moved = exact.clone()
    moved[-1] *= 1.01
    assert not is_rounding(moved, exact)
    assert not is_rounding(moved.half().float(), exact) and not is_rounding(moved.half().float(), brain)
    assert not is_rounding(exact * 1.0001, exact)


@pytest.mark.parametrize("last", [torch.bfloat16, torch.float8_e4m3fn])
def test_what_was_rounded_twice_was_not_trained(last):
    start = changed(noise(1e-3, lambda name: name != "logit_scale"))
    twice = changed(round_to(last), changed(round_to(torch.float16), start))
    once = changed(round_to(last), start)
    assert any(not torch.equal(twice.state[name], once.state[name]) for name in start.state)  # or it shows nothing
    trained = what_was_trained(twice.state, start.state)
    assert trained.pattern == "rounded" and trained.token_rows == 0


def test_noise_of_a_hundredth_is_moved_and_healthy():
    one = found(changed(noise(0.01, matrix)))
    assert one.verdict.finding == "healthy" and one.verdict.preset is None
    assert all(reading.state == "moved" and not reading.far for reading in one.readings.values())
    assert {part.state for part in one.parts if part.name.startswith("block")} == {"moved"}
    assert one.alignment.finding == "aligned" and not one.alignment.measured


# ---- what was trained -----------------------------------------------------------------------------------------------


def test_the_shipped_ruin_is_named_as_sdxl_training(ruined):
    assert ruined.trained.pattern == "sdxl" and "kohya" in ruined.trained.text
    assert "blocks 0 to 2" in ruined.trained.text and "positions" in ruined.trained.text
    states = {part.name: part.state for part in ruined.parts}
    assert [states[name] for name in (f"block {LAYERS - 1}", "final LayerNorm", "projection")] == ["untouched"] * 3


@pytest.mark.parametrize(
    "names, pattern, words",
    [
        (matrix, "lora", "LoRA"),
        (lambda name: matrix(name) and not in_last_block(name), "sdxl+lora", "kohya"),
        (lambda name: name == "positional_embedding", "embeddings", "positions"),
        (lambda name: name == "text_projection", "projection", "projection"),
        (in_last_block, "last_block", "last block"),
        (lambda name: in_last_block(name) or "ln_final" in name, "last_block", "final LayerNorm"),
        (lambda name: name != "logit_scale", "all", "All 53 tensors"),
        (lambda name: ".1." in name or "ln_final" in name, "some", "block 1, the final LayerNorm"),
    ],
)
def test_what_was_trained_is_named(names, pattern, words):
    trained = what_was_trained(changed(noise(0.05, names)).state, START.state)
    assert trained.pattern == pattern and words in trained.text
    assert set(trained.moved) == set(filter(names, START.state)) - {"logit_scale"}


def test_textual_inversion_is_told_by_its_rows_though_the_rest_was_rounded():
    start = changed(noise(1e-3, lambda name: name != "logit_scale"))
    encoder = changed(round_to(torch.float16), start)
    encoder.state["token_embedding.weight"][[320, 1125]] += 0.1
    one = finish(diagnose(encoder, start))
    assert one.trained.pattern == "embeddings" and one.trained.token_rows == 2
    assert "Textual inversion" in one.trained.text and "2 rows" in one.trained.text
    whole = what_was_trained(changed(noise(0.1, lambda name: "token" in name)).state, START.state)
    assert whole.pattern == "embeddings" and "Textual inversion" not in whole.text


def test_tokens_that_no_prompt_has_are_said_to_be_unseen():
    def train(state: State) -> None:
        state["token_embedding.weight"][40000] += 1

    one = found(changed(train))
    assert any("None of the prompts" in warning for warning in one.warnings)
    assert one.verdict.finding == "healthy"


# ---- three damages, kept apart --------------------------------------------------------------------------------------


def test_the_ruin_is_rearranged_far_and_unaligned(ruined):
    assert ruined.verdict.finding == "rearranged" and ruined.alignment.finding == "lost"
    assert all(r.state == "damaged" and r.far and r.order == "lost" for r in ruined.readings.values())
    assert "coherent in itself (tells 100%" in ruined.verdict.text and "far from the original" in ruined.verdict.text
    assert (
        "prompts arranged otherwise" in ruined.verdict.text and "no longer aligned with vision" in ruined.verdict.text
    )
    assert ruined.verdict.text.count(". ") == 0  # one sentence
    states = {part.name: part.state for part in ruined.parts}
    assert [states[f"block {n}"] for n in range(LAYERS - 1)] == ["damaged"] * (LAYERS - 1)


def test_no_verdict_calls_an_encoder_ruined_and_all_warn_of_the_pair(ruined, rotated, shuffled):
    for one in (ruined, rotated, shuffled):
        text = " ".join(lines(one)).replace(BROKEN.source.path, "")
        assert "ruined" not in text.lower()
        assert "the original swapped in may draw worse" in text


def test_a_rotated_encoder_is_far_and_yet_coherent(rotated):
    for point in ("penultimate", "last", "pooled"):
        reading = rotated.readings[point]
        assert reading.far and reading.state == "moved" and not reading.collapsed, point
    assert rotated.readings["penultimate"].order == "kept"
    assert rotated.readings["penultimate"].structure.cka == pytest.approx(1, abs=1e-3)
    assert rotated.readings["penultimate"].error > FAR
    assert rotated.verdict.finding == "far"
    assert "coherent in itself" in rotated.verdict.text and "incoherent" not in rotated.verdict.text


def test_shuffled_tokens_arrange_prompts_otherwise_though_every_one_is_told_apart(shuffled):
    one = shuffled
    assert one.trained.pattern == "embeddings"
    reading = one.readings["penultimate"]
    assert reading.structure.told_apart > 0.99 and not reading.collapsed
    assert reading.order == "lost" and reading.structure.cka < ORDER_LOST
    assert one.verdict.finding == "rearranged"


def test_one_direction_for_everything_is_a_collapse():
    one = found(changed(collapse))
    reading = one.readings["penultimate"]
    assert reading.collapsed and reading.state == "damaged"
    assert one.verdict.finding == "collapsed" and "apart" in one.verdict.text


def test_alignment_alone_is_lost_where_only_the_projection_was_trained():
    one = found(changed(noise(2.0, lambda name: name == "text_projection")))
    assert one.verdict.finding == "unread"
    assert {p: r.state for p, r in one.readings.items() if p != "projected"} == dict.fromkeys(
        ("penultimate", "last", "pooled"), "untouched"
    )
    assert one.readings["projected"].state == "moved" and one.readings["projected"].far
    assert one.alignment.finding == "lost" and "no longer aligned with vision" in one.verdict.text
    assert one.verdict.preset is None


def test_sdxl_sees_nothing_of_a_trained_last_block_and_flux_does():
    encoder = changed(noise(3.0, in_last_block))
    sdxl, flux = found(encoder), found(encoder, target="flux")
    assert sdxl.verdict.finding == "unread" and "SDXL sees nothing" in sdxl.verdict.text
    assert sdxl.verdict.preset is None and "as it was" in sdxl.verdict.advice
    assert sdxl.readings["penultimate"].state == "untouched"
    assert flux.verdict.finding == "rearranged" and flux.verdict.preset == preset("flux-repair")
    assert {anchor.read_point for anchor in flux.verdict.preset.config.anchors} == {"pooled"}


def test_barely_broken_encoders_get_the_gentle_preset():
    one = found(changed(noise(0.35, matrix)))
    assert one.verdict.finding in ("loosened", "misaligned")
    assert one.verdict.preset.name == "gentle" and "gentle" in one.verdict.advice
    sd1 = found(changed(noise(0.35, matrix)), target="sd1")
    assert {anchor.read_point for anchor in sd1.verdict.preset.config.anchors} == {"last"}


def test_clip_g_is_read_behind_its_projection_too():
    encoder = changed(noise(2.0, lambda name: name == "text_projection"))
    encoder = replace(encoder, source=replace(encoder.source, member="clip_g"))
    one = found(encoder)
    assert one.verdict.finding == "far" and one.verdict.preset.name == "clip-g"
    assert "unchanged at penultimate" in one.verdict.text and "at projected" in one.verdict.text


# ---- pictures -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("diagnose") / "pictures"
    finish(write_world(folder, LEAST_PAIRS + 20, seed=4, split="held_out"))
    return folder


def look(world: Path, encoder: TowerFile, most: int | None = None) -> Diagnosis:
    index = read_index(world, world / "captions.json")
    index = replace(index, pictures=index.pictures[:most])
    return found(encoder, pictures=Pictures(read_vision(ASSETS / ORIGINAL), index, world.parent / "cache"))


@pytest.fixture(scope="module")
def measured(world) -> Diagnosis:
    return look(world, BROKEN)


def test_pictures_measure_the_alignment_of_both(measured):
    one = measured
    assert one.alignment.measured and one.alignment.finding == "lost"
    assert one.alignment.recall_at_1 < 0.5 < 0.9 < one.alignment.original_recall_at_1
    assert one.retrieval["images"] == LEAST_PAIRS + 20
    low, value, high = (one.retrieval["text_to_image"]["recall_at_1"][name] for name in ("low", "value", "high"))
    assert low <= value <= high and low < high
    assert "probably" not in one.verdict.text and "recall@1" in one.verdict.text


def test_too_few_pictures_are_a_warning_and_no_verdict(world):
    one = look(world, BROKEN, 20)
    assert not one.alignment.measured and one.alignment.images == 20
    assert any("too few" in warning for warning in one.warnings)
    assert any(line.startswith("Recall@1 on 20 pictures") for line in lines(one))
    assert "probably" in one.verdict.text


def test_pictures_that_the_encoder_was_trained_on_do_not_count(world, measured):
    index = read_index(world, world / "captions.json")
    keys = finish(index_keys(index, world.parent / "cache"))
    run = {"config": {"held_out": 0.5, "held_out_most": 30}, "dataset": dataset_key(index, keys)}
    encoder = replace(BROKEN, source=replace(BROKEN.source, metadata={"gmp_run": json.dumps(run)}))
    one = look(world, encoder)
    assert measured.alignment.images == LEAST_PAIRS + 20 and one.alignment.images == 30
    assert any("held out" in warning for warning in one.warnings)


def test_pictures_that_the_original_does_not_find_tell_nothing():
    alignment, warnings = align(0.95, (0.001, 0.002), 500)
    assert not alignment.measured and alignment.finding == "aligned"
    assert len(warnings) == 1 and "original itself" in warnings[0]


@pytest.mark.parametrize("recall, finding", [(0.9, "aligned"), (0.7, "weakened"), (0.3, "lost")])
def test_recall_is_judged_against_the_originals(recall, finding):
    assert align(0.1, (recall, 0.95), 500)[0].finding == finding


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, words",
    [
        ({"width": 128}, "width 64 against 128"),
        ({"layers": 6}, "blocks"),
        ({"vocab_size": 49409}, "vocabulary 49408 against 49409"),
        ({"mlp_width": 256}, "MLP width"),
    ],
)
def test_towers_of_other_shapes_are_refused_by_name(change, words):
    other = replace(START, config=replace(START.config, **change), source=replace(START.source, path="other.pt"))
    with pytest.raises(InputError, match=words) as refusal:
        finish(diagnose(BROKEN, other))
    assert BROKEN.source.path in str(refusal.value) and "other.pt" in str(refusal.value)


def test_an_original_without_its_last_block_is_refused_for_any_encoder():
    def short(file: TowerFile) -> TowerFile:
        state = {name: tensor for name, tensor in file.state.items() if f".{LAYERS - 1}." not in name}
        source = replace(file.source, missing=(f"transformer.resblocks.{LAYERS - 1}",))
        return TowerFile(state, replace(file.config, layers=LAYERS - 1), source)

    for encoder in (BROKEN, short(BROKEN)):
        with pytest.raises(InputError, match="ends before its last block"):
            finish(diagnose(encoder, short(START)))
    assert finish(diagnose(short(BROKEN), START)).verdict.finding == found(BROKEN).verdict.finding


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_get_a_sentence_of_their_own(value):
    encoder = changed(lambda state: state["ln_final.bias"].fill_(value))
    with pytest.raises(InputError, match="1 tensors hold NaN or infinity: ln_final.bias"):
        found(encoder)


def test_a_target_that_nobody_knows_is_refused():
    assert OFFERED == TARGETS
    with pytest.raises(InputError, match="sdxl, sd1, flux"):
        found(BROKEN, target="sd9")


def test_states_that_overflow_are_told():
    def swell(state: State) -> None:
        state["transformer.resblocks.1.mlp.c_proj.bias"] += 1e6

    one = found(changed(swell))
    assert any("overflow" in warning and "block 1" in warning for warning in one.warnings)
    one = found(changed(lambda state: state["transformer.resblocks.1.mlp.c_proj.bias"].fill_(1e30)))
    document = json.dumps(as_document(one), allow_nan=False)  # squares of these leave fp32
    assert "NaN" not in document and one.readings["penultimate"].state == "damaged"


def test_what_a_file_lacks_is_lent_and_told(ruined):
    assert any("no text projection" in warning for warning in ruined.warnings)
    foreign = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for projection in (foreign, foreign[:, :32]):
        one = found(changed(lambda state, p=projection: state.update(text_projection=p)))
        assert any("not of this CLIP" in warning for warning in one.warnings)
        assert one.verdict.finding == "identical" and one.readings["projected"].state == "untouched"
    both = [
        replace(file, state={n: t for n, t in file.state.items() if n != "text_projection"}) for file in (BROKEN, START)
    ]
    one = finish(diagnose(*both))
    assert set(one.readings) == {"penultimate", "last", "pooled"} and one.alignment.finding == "unknown"
    jsonschema.validate(as_document(one), json.loads(SCHEMA.read_text(encoding="utf-8")))


# ---- what is said ---------------------------------------------------------------------------------------------------


def test_documents_keep_to_the_schema(ruined, rotated, copied, measured):
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    for one in (ruined, rotated, copied, measured):
        document = json.loads(json.dumps(as_document(one), allow_nan=False))
        jsonschema.validate(document, schema)
        assert document["kind"] == "diagnosis" and document["verdict"]["text"] == one.verdict.text
        assert document["trained"]["moved"] == len(one.trained.moved)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document | {"verdict": {"text": "fine"}}, schema)


def test_every_part_and_read_point_has_a_line_with_its_state(ruined):
    text = lines(ruined)
    assert text[0] == ruined.verdict.text
    for part in ruined.parts:
        assert any(line.startswith(f"{part.name}: {part.state}") for line in text)
    assert any(line.startswith("penultimate (read by SDXL): damaged") for line in text)
    assert any(line.startswith("pooled (read by Flux): damaged") for line in text)


def test_the_picture_has_a_row_for_every_part_in_the_colours_of_the_verdict(ruined):
    figure = plot_diagnosis(ruined)
    (axes,) = figure.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert [label.split(" →")[0] for label in labels] == [part.name for part in ruined.parts]
    assert labels[LAYERS - 1] == f"block {LAYERS - 2} → SDXL" and labels[-2] == "final LayerNorm → SD1, Flux"
    words = [text.get_text() for text in axes.texts]
    assert [words.count(state) for state in ("untouched", "moved", "damaged")] == [3, 1, 3]
    picture = pixels(figure)
    assert picture.shape[2] == 3 and 0 <= picture.min() and picture.max() <= 1
    orange = torch.tensor(picture) - torch.tensor([0xD5, 0x5E, 0x00]) / 255
    assert (orange.abs().amax(dim=2) < 0.01).float().mean() > 0.1


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_tells_the_verdict_and_writes_document_and_picture(capsys, tmp_path, ruined):
    picture = tmp_path / "diagnosis.png"
    given = ["diagnose", str(ASSETS / RUINED), "--original", str(ASSETS / ORIGINAL), "--device", "cpu"]
    assert main([*given, "--json", "--out", str(picture)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == ruined.verdict.text
    document = json.loads(out[-1])
    jsonschema.validate(document, json.loads(SCHEMA.read_text(encoding="utf-8")))
    assert document["encoder"]["path"] == RUINED and document["verdict"]["target"] == "sdxl"
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert main([*given, "--out", str(picture)]) == 2
    assert "exists" in capsys.readouterr().err


def test_the_command_takes_pictures_and_a_target(capsys, world):
    given = ["diagnose", str(ASSETS / RUINED), "--original", str(ASSETS / ORIGINAL), "--device", "cpu"]
    given += ["--images", str(world), "--captions", str(world / "captions.json"), "--target", "flux", "--json"]
    assert main([*given, "--cache", str(world.parent / "cache")]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["verdict"]["target"] == "flux" and document["retrieval"]["images"] == LEAST_PAIRS + 20


def test_the_command_refuses_what_does_not_fit(capsys, tmp_path):
    given = ["diagnose", str(ASSETS / RUINED), "--original", str(ASSETS / RUINED)]
    assert main([*given, "--captions", "x.json"]) == 2
    assert "--images" in capsys.readouterr().err
    assert main([*given, "--out", str(tmp_path / "picture.bmp")]) == 2
    assert ".png" in capsys.readouterr().err
    path = tmp_path / "nan.safetensors"
    save_file(changed(lambda state: state["ln_final.bias"].fill_(torch.nan)).state, path)
    assert main(["diagnose", str(path), "--original", str(ASSETS / ORIGINAL)]) == 2
    assert "NaN or infinity" in capsys.readouterr().err
