"""Text towers of 248 positions (Long-CLIP): repaired at their full length, from files to what other programs load."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection

from gmp import step
from gmp.architectures import LONG_CONTEXT, LONG_KEPT
from gmp.clip import CLIP, CLIPConfig, TextConfig, VisionConfig, initialize
from gmp.config import Anchor, RepairConfig
from gmp.data.captions import read_index
from gmp.errors import InputError
from gmp.evaluate import evaluate
from gmp.events import finish
from gmp.inspection import inspect
from gmp.join import join, text_tower, unlike
from gmp.layouts import huggingface, insert_text, read_lender, read_text, read_vision, write_clip, write_text
from gmp.layouts.canonical import take_apart, text_part
from gmp.run import BEST, RESULT, repair
from gmp.tokenizer import END_ID, lengths, tokenizer_for
from gmp.training_data import Inputs
from tests.small import disturbed

CPU = torch.device("cpu")
VISION = VisionConfig(32, 1, 2, 64, 16, 32, 16, "quick_gelu")
SHORT_TEXT = TextConfig(64, 2, 1, 64, 77, 49408, 16, "quick_gelu")
LONG = CLIPConfig(dataclasses.replace(SHORT_TEXT, context_length=LONG_CONTEXT), VISION)
SHORT = CLIPConfig(SHORT_TEXT, VISION)
ANCHORS = (Anchor("original", "penultimate", 0.3), Anchor("original", "pooled", 0.1))
# 26 pictures, 2 held out: 3 steps an epoch, 6 in all
CONFIG = RepairConfig(epochs=2, batch=8, lr=1e-3, held_out=0.08, anchors=ANCHORS, best_by="penultimate")
FILLER = "beside it, seen from far above on a quiet and rather cloudy afternoon in early autumn, "


def clip_of(config: CLIPConfig) -> CLIP:
    return initialize(CLIP(config), torch.Generator().manual_seed(0))


def state_of(clip: CLIP, text: bool) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in clip.state_dict().items() if not (text and name.startswith("visual."))}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Long-CLIP's own file with its two tables, a broken encoder of it, and a CLIP of 77 positions."""
    folder = tmp_path_factory.mktemp("long")
    clip = clip_of(LONG)
    whole = state_of(clip, text=False)
    table = whole.pop("positional_embedding")
    rest = torch.randn(LONG_KEPT, 64, generator=torch.Generator().manual_seed(3))
    tables = {
        "positional_embedding": torch.cat([table[:LONG_KEPT], torch.full((LONG_CONTEXT - LONG_KEPT, 64), 9.0)]),
        "positional_embedding_res": torch.cat([rest, table[LONG_KEPT:]]),
    }
    torch.save(whole | tables, folder / "longclip.pt")
    broken = {
        n: t for n, t in state_of(disturbed(clip), text=True).items() if n not in ("text_projection", "logit_scale")
    }
    write_text(broken, folder / "broken.safetensors", config=LONG.text)
    write_clip(state_of(clip_of(SHORT), text=False), folder / "short.safetensors", config=SHORT)
    return {name: folder / name for name in ("longclip.pt", "broken.safetensors", "short.safetensors")}


@pytest.fixture(scope="module")
def captioned(pictures, tmp_path_factory):
    """The small world's pictures, every caption but one in three longer than 77 tokens, what matters at its end."""
    known = json.loads((pictures / "captions.json").read_text())
    told = {
        name: [(FILLER * 6 if at % 3 else "") + caption for caption in ([one] if isinstance(one, str) else one)]
        for at, (name, one) in enumerate(known.items())
    }
    path = tmp_path_factory.mktemp("captions") / "captions.json"
    path.write_text(json.dumps(told))
    return read_index(pictures, path)


@pytest.fixture(scope="module")
def inputs(files, captioned) -> Inputs:
    text = read_text(files["broken.safetensors"])
    vision = read_vision(files["longclip.pt"], heads=2)
    original, sentence = read_lender(files["longclip.pt"])
    assert sentence == "a full CLIP: its text tower lends and anchors"
    tokenize = tokenizer_for(text.config.context_length, text.source.member)
    return Inputs(text, vision, original, captioned, tokenize)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(inputs, cache, tmp_path_factory):
    """An uninterrupted run: its folder and events."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, list(repair(inputs, CONFIG, folder, cache=cache, device=CPU))


def of(kind, events):
    return [event for event in events if event["type"] == kind]


# ---- tokens and towers ----------------------------------------------------------------------------------------------


def test_both_towers_of_long_clips_file_are_found(files, inputs):
    assert inputs.text.config.context_length == inputs.original.config.context_length == LONG_CONTEXT
    table = clip_of(LONG).positional_embedding
    assert torch.equal(inputs.original.state["positional_embedding"], table)
    assert "Long-CLIP's positions: the first 20 rows" in " ".join(inputs.original.source.notes)
    assert unlike(inputs.text, inputs.original) is None
    text, _ = inspect(files["longclip.pt"]).towers
    assert text.sizes["context"] == LONG_CONTEXT and not text.missing and not text.unexpected


def test_captions_are_cut_at_248_tokens_and_not_at_77():
    tokenize = tokenizer_for(LONG_CONTEXT, "clip_l")
    fits, over, short = " ".join(["fox"] * 246), " ".join(["fox"] * 247), "a fox"
    tokens = tokenize([fits, over, short])
    assert tokens.ids.shape == (3, LONG_CONTEXT) and tokens.truncated == 1
    assert lengths(tokens.ids).tolist() == [248, 248, 4]
    assert (tokens.ids[0, -1], tokens.ids[1, -1]) == (END_ID, END_ID) and tokens.ids[2, 4:].eq(END_ID).all()
    assert torch.equal(tokens.ids[0], tokens.ids[1])


def test_what_is_said_behind_the_77th_token_counts(inputs):
    tower = text_tower(inputs.original, join(inputs.text, inputs.vision, inputs.original))
    ids = inputs.tokenize([FILLER * 6 + "a red fox", FILLER * 6 + "a blue cup"]).ids
    assert torch.equal(ids[0, :77], ids[1, :77]) and lengths(ids).min() > 77
    with torch.no_grad():
        red, blue = tower.encode_text(ids)
    assert (red - blue).norm() > 1e-3 * red.norm()


def test_captions_of_any_length_without_padding_are_those_with_it(inputs):
    """`encode_text` packs captions of 4 to 248 tokens into one stream; `forward` computes every row."""
    tower = text_tower(inputs.text, join(inputs.text, inputs.vision, inputs.original))
    counts = (2, 40, 75, 76, 120, 246, 246, 20)
    ids = inputs.tokenize([" ".join(["fox", "cup", "tree"][at % 3] for at in range(count)) for count in counts]).ids
    with torch.no_grad():
        points = tower(ids)
        torch.testing.assert_close(tower.encode_text(ids), points.projected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(tower.penultimate(ids), points.penultimate, rtol=1e-5, atol=1e-6)
    assert points.penultimate.shape == (len(counts), LONG_CONTEXT, 64)


# ---- a repair -------------------------------------------------------------------------------------------------------


def test_a_whole_repair_at_248_positions(whole, inputs):
    folder, events = whole
    assert events[-1]["type"] == "done" and of("join", events)[0]["notes"] == []
    steps, measures = of("step", events), of("measure", events)
    assert len(steps) == 6 and [one["step"] for one in measures] == [0, 3, 6]
    assert steps[0]["losses"].keys() == {"contrastive", "original:penultimate=0.3", "original:pooled=0.1"}
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert of("dataset", events)[0]["captions cut to the context length"] == 0
    assert steps[0]["tokens_per_second"] > 0
    for one in measures:
        assert one["drift"]["penultimate"]["cosine"] <= 1 and one["held_out"]["original:penultimate=0.3"] > 0
    assert measures[-1]["drift"]["penultimate"]["cosine"] > measures[0]["drift"]["penultimate"]["cosine"]
    assert {RESULT, "report.html", "evidence.json"} <= {path.name for path in folder.iterdir()}
    found = read_text(folder / RESULT)
    assert found.config == dataclasses.replace(LONG.text, assumed=()) and not found.source.missing
    best = json.loads((folder / "result.json").read_text())["best"]
    assert best["step"] > 0 and read_text(folder / BEST).config.context_length == LONG_CONTEXT


def test_anchors_read_all_248_rows(inputs, tmp_path, cache, monkeypatch):
    shapes = set()
    read = step.read

    def spy(tower, ids, anchors):
        points = read(tower, ids, anchors)
        shapes.update((name, *point.shape[1:]) for name, point in points.items())
        return points

    monkeypatch.setattr(step, "read", spy)
    config = dataclasses.replace(CONFIG, epochs=1, anchors=ANCHORS[:1])
    assert list(repair(inputs, config, tmp_path / "run", cache=cache, device=CPU))[-1]["type"] == "done"
    assert shapes == {("penultimate", LONG_CONTEXT, 64)}


def test_a_run_that_breaks_off_goes_on_to_the_same_bytes(whole, inputs, tmp_path, cache):
    folder = tmp_path / "run"
    events = repair(inputs, CONFIG, folder, cache=cache, device=CPU)
    while next(events)["type"] != "checkpoint":
        pass
    events.close()
    again = list(repair(inputs, CONFIG, folder, cache=cache, device=CPU))
    assert of("resume", again)[0]["step"] == 3 and again[-1]["type"] == "done"
    assert (folder / RESULT).read_bytes() == (whole[0] / RESULT).read_bytes()


def test_both_towers_train_at_248_positions(inputs, tmp_path, cache):
    config = dataclasses.replace(CONFIG, epochs=1, train="both")
    assert list(repair(inputs, config, tmp_path / "run", cache=cache, device=CPU))[-1]["type"] == "done"
    text, vision = inspect(tmp_path / "run" / "clip.safetensors").towers
    assert text.sizes["context"] == LONG_CONTEXT and vision.layers == 1


def test_all_rows_of_the_table_train_the_first_20_like_the_others(whole, inputs):
    """Long-CLIP was made with these rows held; a repair holds none of them unless it is told to."""
    before, after = inputs.text.state["positional_embedding"], load_file(whole[0] / RESULT)
    after = after["text_model.embeddings.position_embedding.weight"]
    assert ((after - before).norm(dim=1) > 0).all()


def test_the_table_stays_where_its_rate_is_0(inputs, tmp_path, cache):
    config = dataclasses.replace(CONFIG, epochs=1, rates={"positional_embedding": 0.0})
    list(repair(inputs, config, tmp_path / "run", cache=cache, device=CPU))
    after = load_file(tmp_path / "run" / RESULT)["text_model.embeddings.position_embedding.weight"]
    assert torch.equal(after, inputs.text.state["positional_embedding"])


# ---- an original of 77 positions ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_short(files, inputs) -> Inputs:
    """OpenAI's CLIP as the vision file: what people have who never saw a Long-CLIP's whole file."""
    vision = read_vision(files["short.safetensors"])
    original, _ = read_lender(files["short.safetensors"])
    return dataclasses.replace(inputs, vision=vision, original=original)


def test_an_original_of_77_positions_is_no_anchor_and_the_sentence_says_what_is(with_short, tmp_path, cache):
    with pytest.raises(InputError, match=r"context length 248 against 77 \(a Long-CLIP's original is a Long-CLIP"):
        list(repair(with_short, CONFIG, tmp_path / "run", cache=cache, device=CPU))
    assert unlike(with_short.original, with_short.text).endswith(
        "context length 77 against 248 "
        "(a Long-CLIP's original is a Long-CLIP of 248: blocks and table were trained together)"
    )


def test_without_anchors_it_lends_projection_and_scale_and_the_text_trains(with_short, tmp_path, cache):
    config = dataclasses.replace(CONFIG, anchors=(), best_by="objective")
    events = list(repair(with_short, config, tmp_path / "run", cache=cache, device=CPU))
    assert events[-1]["type"] == "done" and "drift is not measured" in of("join", events)[0]["notes"][0]
    assert of("measure", events)[0]["drift"] == {}
    lent = {one["name"]: one["source"] for one in of("join", events)[0]["tensors"]}
    assert lent["text_projection"] == lent["logit_scale"] == "short.safetensors"
    assert read_text(tmp_path / "run" / RESULT).config.context_length == LONG_CONTEXT


def test_the_broken_encoder_itself_may_be_the_anchor(with_short, tmp_path, cache):
    anchors = (Anchor("broken", "penultimate", 0.3),)
    config = dataclasses.replace(CONFIG, epochs=1, anchors=anchors, best_by="objective")
    events = list(repair(with_short, config, tmp_path / "run", cache=cache, device=CPU))
    assert events[-1]["type"] == "done" and of("step", events)[-1]["losses"]["broken:penultimate=0.3"] > 0


def test_it_is_measured_without_what_needs_a_like_original(with_short, captioned, cache):
    found = finish(evaluate(
        {"broken": with_short.text}, with_short.vision, with_short.original, captioned, with_short.tokenize,
        cache=cache, device=CPU, prompts=("a red fox", FILLER * 6 + "a blue cup", "a green tree", "a white box"),
    ))  # fmt: skip
    document = found["broken"].document
    assert "drift" not in document and "context length 248 against 77" in " ".join(document["warnings"])


# ---- other programs -------------------------------------------------------------------------------------------------


def test_transformers_loads_the_result_with_all_its_positions(whole, inputs, tmp_path):
    file = read_text(whole[0] / RESULT)
    write_text(file.state, tmp_path / "encoder", layout="huggingface_folder", config=file.config)
    theirs = CLIPTextModelWithProjection.from_pretrained(tmp_path / "encoder").eval()
    assert theirs.config.max_position_embeddings == LONG_CONTEXT
    tower = text_tower(file, join(inputs.text, inputs.vision, inputs.original))
    ids = inputs.tokenize([FILLER * 6 + "a red fox", "a cup"]).ids
    with torch.no_grad():
        points, seen = tower(ids), theirs(input_ids=ids, output_hidden_states=True)
    torch.testing.assert_close(points.penultimate, seen.hidden_states[-2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(points.projected, seen.text_embeds, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_of_77_positions_does_not_take_it(whole, tmp_path):
    short = {f"cond_stage_model.transformer.{name}": t for name, t in _transformers_text(SHORT).items()}
    save_file(short | {"model.diffusion_model.out.0.weight": torch.zeros(4, 4)}, tmp_path / "sd15.safetensors")
    file = read_text(whole[0] / RESULT)
    with pytest.raises(
        InputError, match=r"does not fit its clip_l: positional_embedding is \[248, 64\] and not \[77, 64\]"
    ):
        insert_text(
            file.state, tmp_path / "sd15.safetensors", tmp_path / "out.safetensors", member="clip_l", config=file.config
        )


def _transformers_text(config: CLIPConfig) -> dict[str, torch.Tensor]:
    state = text_part(clip_of(config).state_dict())
    del state["text_projection"]
    return {
        key: part.contiguous()
        for name, t in state.items()
        for key, part in take_apart(huggingface.piece(name), t).items()
    }
