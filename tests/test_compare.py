"""Drift of weights against known rotations and scalings, neighbours against loops, and the whole comparison."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch

from gmp import READ_POINTS, telemetry
from gmp.cli import main
from gmp.clip import TextTower, load
from gmp.commands.compare import names
from gmp.compare import BINS, REACH, check_alike, geometry, layer_of, neighbours, similarity, weight_drift
from gmp.comparison import FEW_PROMPTS, PICTURES, build_towers, compare, own_prompts
from gmp.data.captions import read_index
from gmp.errors import InputError
from gmp.events import finish
from gmp.gradients import layer_and_role
from gmp.layouts import Source, TowerFile, read_text, read_vision
from gmp.measure import drift
from gmp.pca import fit_plane, fit_umap
from gmp.prompts import Prompt
from gmp.structure import compare_structure, prompt_vectors
from gmp.tokenizer import Tokenizer
from gmp.world.models import ASSETS, ORIGINAL, RUINED
from gmp.world.write import CAPTIONS_FILE, write_world
from tests.small import SMALL, disturbed, small_clip, tokenize

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
PROMPTS = tuple(
    Prompt(kind, f"{count} {colour} {thing}")
    for kind, thing in (("fruit", "apple"), ("animal", "dog"), ("place", "harbour"))
    for colour in ("red", "green", "blue")
    for count in ("one", "two")
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def file(clip, path="some.safetensors", left_out=()):
    state = {n: t for n, t in clip.state_dict().items() if not n.startswith("visual.") and n not in left_out}
    source = Source(path, path, "openai", "clip_l", {}, (), tuple(left_out), (), ())
    return TowerFile(state, SMALL.text, source)


def rotated(rows, degrees, seed=1):
    """Every row turned by so many degrees, in a direction of its own, its length kept."""
    aside = torch.randn(rows.shape, generator=generator(seed), dtype=torch.float64)
    length = rows.norm(dim=1, keepdim=True)
    unit = rows / length
    aside = torch.nn.functional.normalize(aside - (aside * unit).sum(dim=1, keepdim=True) * unit, dim=1)
    angle = math.radians(degrees)
    return length * (math.cos(angle) * unit + math.sin(angle) * aside)


@pytest.fixture(scope="module")
def original():
    return {n: t.double() for n, t in file(small_clip()).state.items()}


def by_layer(state, original):
    return {one.layer: one for one in weight_drift(state, original)}


# ---- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [5.0, 1e-4, 120.0])
@pytest.mark.parametrize("factor", [1.1, 1.0, 0.5])
def test_rows_that_were_turned_and_scaled_read_so(original, degrees, factor):
    name = "transformer.resblocks.1.mlp.c_fc.weight"
    found = by_layer(original | {name: factor * rotated(original[name], degrees)}, original)
    one = found.pop("text.1.mlp.in")
    assert (one.block, one.role) == (1, "mlp.in")
    assert one.r == pytest.approx(abs(factor - 1), abs=1e-12)
    assert one.angle == pytest.approx(degrees, rel=1e-6, abs=1e-7)
    assert one.cosine_distance == pytest.approx(1 - math.cos(math.radians(degrees)), rel=1e-6, abs=1e-15)
    assert all(o.r == o.angle == o.change == o.cosine_distance == 0 and o.norm == 1 for o in found.values())


def test_a_projection_is_read_by_its_columns(original):
    name = "text_projection"
    turned = 1.1 * rotated(original[name].T, 5.0).T
    one = by_layer(original | {name: turned}, original)["text.projection"]
    assert one.angle == pytest.approx(5.0) and one.r == pytest.approx(0.1)


def test_a_layer_norm_is_one_row(original):
    name = "transformer.resblocks.0.ln_1.weight"
    start = original | {name: torch.rand(32, generator=generator(), dtype=torch.float64) + 0.5}
    other = "transformer.resblocks.0.ln_2.weight"  # unchanged, and in the same layer
    one = by_layer(start | {name: 1.1 * rotated(start[name][None], 5.0)[0]}, start)["text.0.layer_norm"]
    lengths = start[name].norm(), start[other].norm()
    assert one.angle == pytest.approx(2.5)
    assert one.r == pytest.approx((0.1 * lengths[0] / (lengths[0] + lengths[1])).item())


def test_against_loops_over_rows(original):
    """Every number of a disturbed tower, by the definitions: angles by arccos, row for row."""
    state = {n: t.double() for n, t in file(disturbed(small_clip())).state.items()}
    block = "transformer.resblocks"
    parts = {
        "text.0.attention.in": [f"{block}.0.attn.in_proj_weight", f"{block}.0.attn.in_proj_bias"],
        "text.1.mlp.out": [f"{block}.1.mlp.c_proj.weight", f"{block}.1.mlp.c_proj.bias"],
        "text.embedding.token": ["token_embedding.weight"],
        "text.embedding.position": ["positional_embedding"],
    }
    found = by_layer(state, original)
    for layer, tensors in parts.items():
        one = found[layer]
        then, now = (np.concatenate([side[n].numpy().ravel() for n in tensors]) for side in (original, state))
        assert one.change == pytest.approx(np.linalg.norm(now - then) / np.linalg.norm(then), rel=1e-9)
        assert one.norm == pytest.approx(np.linalg.norm(now) / np.linalg.norm(then), rel=1e-9)
        lengths, angles, distances = [], [], []
        for a, b in zip(original[tensors[0]].numpy(), state[tensors[0]].numpy(), strict=True):
            lengths.append((np.linalg.norm(a), np.linalg.norm(b)))
            cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            angles.append(np.degrees(np.arccos(cosine)))
            distances.append(1 - cosine)
        assert one.angle == pytest.approx(np.mean(angles), rel=1e-6) and one.angle > 5
        assert one.cosine_distance == pytest.approx(np.mean(distances), rel=1e-9)
        assert one.r == pytest.approx(sum(abs(b - a) for a, b in lengths) / sum(a for a, _ in lengths), rel=1e-9)


def test_layers_are_named_as_gradients_are_and_stand_in_the_order_of_computation(original):
    layers = [one.layer for one in weight_drift(original, original)]
    block = ["layer_norm", "attention.in", "attention.out", "mlp.in", "mlp.out"]
    wanted = ["text.embedding.token", "text.embedding.position"]
    wanted += [f"text.{n}.{role}" for n in (0, 1) for role in block]
    assert layers == [*wanted, "text.layer_norm", "text.projection"]
    for name in original:
        layer, block, role = layer_of(name)
        assert layer == layer_and_role(name) or layer.rpartition(".")[0] == layer_and_role(name)
        assert layer == (f"text.{role}" if block is None else f"text.{block}.{role}")


def test_rows_without_length_have_no_angle(original):
    name = "transformer.resblocks.0.mlp.c_fc.weight"
    start = original[name].clone()
    start[3] = 0
    turned = rotated(original[name], 7.0)
    one = by_layer(original | {name: turned}, original | {name: start})["text.0.mlp.in"]
    assert one.angle == pytest.approx(7.0)
    none = by_layer(original | {name: torch.zeros_like(start)}, original)["text.0.mlp.in"]
    assert none.angle == 0 and none.r == 1 and none.norm == pytest.approx(0)


def test_what_one_file_lacks_is_left_out(original):
    half = {n: t for n, t in original.items() if n != "text_projection" and ".resblocks.1." not in n}
    assert {one.block for one in weight_drift(half, original)} == {0, None}
    assert "text.projection" not in by_layer(half, original)


def test_stored_precision_does_not_matter(original):
    half = {n: t.half() for n, t in original.items()}
    for one in weight_drift(half, original):
        assert one.angle < 0.05 and one.r < 1e-3


def test_r_and_theta_are_those_of_the_rows(original):
    for one in geometry(original):
        part = {"attention.in": "attn.in_proj_weight", "attention.out": "attn.out_proj.weight"}.get(one.role)
        part = part or {"mlp.in": "mlp.c_fc.weight", "mlp.out": "mlp.c_proj.weight"}[one.role]
        matrix = original[f"transformer.resblocks.{one.block}.{part}"].numpy()
        lengths = np.linalg.norm(matrix, axis=1)
        np.testing.assert_allclose(one.r.numpy(), lengths, rtol=1e-6)
        values = (matrix / lengths[:, None] * math.sqrt(matrix.shape[1])).clip(-REACH, REACH)
        shares, _ = np.histogram(values.astype(np.float32), BINS, (-REACH, REACH))
        np.testing.assert_allclose(one.theta.numpy(), shares / values.size, atol=2 / values.size)
    assert len(geometry(original)) == 8


# ---- which files ----------------------------------------------------------------------------------------------------


def test_towers_of_another_shape_are_refused_by_name():
    one = file(small_clip(), "original.safetensors")
    for change, words in (
        ({"width": 64}, "width 64 against 32"),
        ({"mlp_width": 96}, "MLP width 96 against 64"),
        ({"layers": 5}, "5 blocks against 2"),
        ({"vocab_size": 99}, "vocabulary 99 against 64"),
    ):
        other = replace(file(small_clip(), "broken.pt"), config=replace(SMALL.text, **change))
        with pytest.raises(InputError, match=rf"broken.pt.*original.safetensors.*{words}"):
            check_alike(one, [one, other])


def test_a_file_that_lacks_its_last_block_is_compared():
    one, whole = file(small_clip()), file(disturbed(small_clip()))
    state = {n: t for n, t in whole.state.items() if ".resblocks.1." not in n}
    short = TowerFile(state, replace(SMALL.text, layers=1), replace(one.source, missing=("transformer.resblocks.1",)))
    check_alike(one, [short])
    towers, said = build_towers({"original": one, "short": short})
    assert "last block" in said["short"]
    ids = tokenize([prompt.text for prompt in PROMPTS]).ids
    wanted = prompt_vectors(load(TextTower, SMALL.text, _tower(whole)), ids)["penultimate"]
    torch.testing.assert_close(prompt_vectors(towers["short"], ids)["penultimate"], wanted)
    with pytest.raises(InputError, match="ends before its last block"):
        build_towers({"short": short, "original": short})


def _tower(one):
    return {n: t for n, t in one.state.items() if n != "logit_scale"}


def test_files_of_one_name_are_told_apart():
    paths = [Path("runs/a/te.safetensors"), Path("runs/b/te.safetensors"), Path("c.safetensors")]
    assert names(paths) == ["a/te.safetensors", "b/te.safetensors", "c.safetensors"]
    assert names([paths[2], paths[2]])[0] != names([paths[2], paths[2]])[1]


# ---- prompts --------------------------------------------------------------------------------------------------------


def test_neighbours_against_loops():
    before = torch.randn(20, 6, generator=generator(1))
    after = torch.randn(20, 9, generator=generator(2))
    texts = [f"prompt {i}" for i in range(20)]

    def order(vectors, i):
        """All others, the nearest first, by a stable sort."""
        rows = vectors.double().numpy()
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return sorted((j for j in range(20) if j != i), key=lambda j: (-(rows[i] @ rows[j]), j))

    wanted = {}
    for i in range(20):
        first, second = order(before, i), order(after, i)
        if first[0] != second[0]:
            wanted[texts[i]] = (
                texts[first[0]],
                texts[second[0]],
                second.index(first[0]) + 1,
                first.index(second[0]) + 1,
            )
    found = neighbours(before, after, texts, k=20)
    assert {o.prompt: (o.before, o.after, o.rank_of_before, o.rank_of_after) for o in found} == wanted
    sums = [o.rank_of_before + o.rank_of_after for o in found]
    assert sums == sorted(sums, reverse=True) and len(set(sums)) > 3
    assert neighbours(before, after, texts, k=3) == found[:3]
    assert found[0].before_cosine == pytest.approx(
        torch.cosine_similarity(*(before[texts.index(t)][None] for t in (found[0].prompt, found[0].before))).item()
    )


def test_a_rotation_changes_no_neighbour():
    before = torch.randn(20, 6, generator=generator(1), dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator(2), dtype=torch.float64)).Q
    assert neighbours(before, 3 * before @ turn, [str(i) for i in range(20)]) == ()
    torch.testing.assert_close(similarity(before @ turn), similarity(before))
    assert (similarity(before).diagonal() == 1).all()


def test_the_plane_is_that_of_the_covariance_and_is_kept_for_others():
    points = torch.randn(40, 7, generator=generator(), dtype=torch.float64) * torch.tensor([5.0, 3, 1, 1, 1, 1, 1])
    plane = fit_plane(points.float())
    values, vectors = np.linalg.eigh(np.cov(points.numpy().T))
    for axis in (0, 1):
        wanted = vectors[:, -1 - axis]
        wanted = wanted * np.sign(wanted[np.abs(wanted).argmax()])
        np.testing.assert_allclose(plane.axes[axis].numpy(), wanted, atol=1e-5)
        assert plane.explained[axis] == pytest.approx(values[-1 - axis] / values.sum(), rel=1e-5)
    moved = points + 100 * plane.axes[0]
    torch.testing.assert_close(plane.of(moved)[:, 0], plane.of(points)[:, 0] + 100, atol=1e-3, rtol=0)
    torch.testing.assert_close(plane.of(moved)[:, 1], plane.of(points)[:, 1], atol=1e-4, rtol=0)


def test_the_plane_does_not_depend_on_the_order_of_points():
    points = torch.randn(30, 50, generator=generator())
    torch.testing.assert_close(fit_plane(points).axes, fit_plane(points.flip(0)).axes, atol=1e-5, rtol=0)


@pytest.mark.parametrize("points", [torch.ones(5, 3), torch.ones(5, 1), torch.eye(1, 4)])
def test_points_that_span_no_plane_are_drawn_all_the_same(points):
    plane = fit_plane(points)
    assert plane.axes.shape == (2, points.shape[1]) and plane.of(points).isfinite().all()


def test_umap_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "umap", None)
    with pytest.raises(InputError, match="umap-learn, which is not installed"):
        fit_umap(torch.randn(5, 3, generator=generator()))


def test_prompts_of_ones_own():
    found = own_prompts("a cat\n\n animal\ta dog \na cat\n\t\n")
    assert found == (Prompt("prompts", "a cat"), Prompt("animal", "a dog"))


# ---- the whole ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    whole, broken = file(small_clip(), "a.safetensors"), disturbed(small_clip(), 0.02)
    lacking = file(broken, "b.safetensors", left_out=("text_projection", "logit_scale"))
    files = {"original": whole, "broken": lacking, "same": copy.deepcopy(whole)}
    events = []
    return files, finish(compare(files, PROMPTS, tokenize, device=CPU), events.append), events


def test_a_comparison_holds_what_its_parts_compute(small):
    files, one, events = small
    assert one.weights["broken"] == weight_drift(files["broken"].state, files["original"].state)
    assert list(one.weights) == ["broken", "same"] and one.original == "original"
    lent = _tower(files["broken"]) | {"text_projection": files["original"].state["text_projection"]}
    towers = [load(TextTower, SMALL.text, state) for state in (_tower(files["original"]), lent)]
    ids = tokenize([prompt.text for prompt in PROMPTS]).ids
    vectors = [prompt_vectors(tower, ids) for tower in towers]
    for point in READ_POINTS:
        torch.testing.assert_close(one.vectors["broken"][point], vectors[1][point])
    assert one.structure["broken"] == compare_structure(vectors[1], vectors[0])
    assert one.drift["broken"] == drift(towers[1], towers[0], ids)
    assert all(moved.cosine == pytest.approx(1) for moved in one.drift["same"].values())
    assert all(moved.cosine < 0.999 for moved in one.drift["broken"].values())
    assert one.warnings == (
        "b.safetensors has no usable text_projection; the original lends its own",
        "same and original hold the same weights",
        f"{len(PROMPTS)} prompts are too few to judge CKA by; give {FEW_PROMPTS} or more",
    )
    assert {event["stage"] for event in events} == {"compare weights", "read prompts"}
    assert [e["done"] for e in events if e["stage"] == "read prompts"] == [0, 1, 2, 3]


def test_documents_follow_the_schema(small):
    schema = json.loads((ROOT / "gmp" / "assets" / "measurement.schema.json").read_text(encoding="utf-8"))
    documents = small[1].documents()
    assert [document["encoder"]["path"] for document in documents] == ["b.safetensors", "a.safetensors"]
    for document in documents:
        jsonschema.validate(json.loads(json.dumps(document, allow_nan=False)), schema)
        assert document["kind"] == "comparison" and document["structure"].keys() == set(READ_POINTS)
    assert [len(document["blocks"]) for document in documents] == [13, 14]  # the first lacks its projection
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(documents[0] | {"blocks": [documents[0]["blocks"][0] | {"angle": "5"}]}, schema)


def test_without_a_projection_projected_is_left_out_and_said(small):
    files, _, _ = small
    bare = {name: file(small_clip(), left_out=("text_projection",)) for name in ("original", "other")}
    one = finish(compare(bare, PROMPTS, tokenize, device=CPU))
    assert one.vectors["original"].keys() == {"penultimate", "last", "pooled"}
    assert "no text_projection, so that projected is not compared" in one.warnings[0]
    with pytest.raises(InputError, match="projected is not known"):
        PICTURES["prompts"](one, "projected", False)
    assert finish(compare(bare, PROMPTS, tokenize, device=CPU, lender=files["original"])).warnings


def test_too_little_to_compare_is_refused(small):
    files, one, _ = small
    with pytest.raises(InputError, match="one text encoder alone"):
        finish(compare({"original": files["original"]}, PROMPTS, tokenize, device=CPU))
    with pytest.raises(InputError, match="3 prompts are too few"):
        finish(compare(files, PROMPTS[:3], tokenize, device=CPU))
    with pytest.raises(InputError, match="no pictures to draw"):
        PICTURES["pictures and captions"](one, "penultimate", False)


def test_captioned_pictures_are_seen_by_every_encoder(tmp_path):
    finish(write_world(tmp_path / "world", 16, 3))
    index = read_index(tmp_path / "world", tmp_path / "world" / CAPTIONS_FILE)
    files = {"original": read_text(ASSETS / ORIGINAL), "ruined": read_text(ASSETS / RUINED)}
    one = finish(
        compare(
            files,
            PROMPTS,
            Tokenizer(),
            device=CPU,
            index=index,
            vision=read_vision(ASSETS / ORIGINAL),
            cache=tmp_path / "cache",
        )
    )
    seen, texts = one.pairs.pictures, one.pairs.captions
    assert seen.shape == (16, 64) and texts["ruined"].shape == (16, 64)
    matched = {name: (seen * captions).sum(dim=1).mean().item() for name, captions in texts.items()}
    assert matched["original"] > matched["ruined"] + 0.1
    assert one.documents()[0]["vision"]["path"] == ORIGINAL
    assert "ruined at penultimate: cosine to original 0." in one.lines("penultimate")[0]


# ---- the command ----------------------------------------------------------------------------------------------------


def asked(capsys, *arguments):
    """Exit code, and what was printed on standard output and as errors."""
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, [line for line in said.err.replace("\r", "\n").splitlines() if line.startswith("error: ")]


@pytest.fixture
def four(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("shape\ta red circle\nshape\ta blue square\na large star\nnothing", encoding="utf-8")
    return ("compare", ASSETS / ORIGINAL, ASSETS / RUINED, "--device", "cpu", "--prompts", path)


def test_the_command_writes_pictures_and_numbers_and_names_them(tmp_path, four, capsys):
    out = tmp_path / "out"
    code, said, _ = asked(capsys, *four[:3], ASSETS / ORIGINAL, *four[3:], "--out", out, "--format", "svg", "--json")
    assert code == 0
    answer = json.loads(said.splitlines()[-1])
    drawn = {f"{name.replace(' ', '_')}.svg" for name in PICTURES if name != "pictures and captions"}
    assert {path.name for path in out.iterdir()} == drawn | {"comparison.json", "comparison_2.json"}
    assert set(answer["written"]) == {str(path) for path in out.iterdir()}
    assert all(f"written: {path}" in said for path in out.iterdir())
    first, second = (json.loads((out / f"comparison{n}.json").read_text(encoding="utf-8")) for n in ("", "_2"))
    assert [first, second] == answer["comparisons"]
    assert first["encoder"]["path"] == RUINED and second["encoder"]["path"] == ORIGINAL
    assert f"{RUINED} at penultimate: cosine to" in said


def test_the_command_replaces_nothing_unasked(tmp_path, four, capsys):
    (tmp_path / "prompts.png").write_text("mine")
    code, _, errors = asked(capsys, *four, "--out", tmp_path)
    assert code == 2 and "prompts.png exists; choose another name, or pass --force" in errors[0]
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.png", "prompts.txt"}
    assert (tmp_path / "prompts.png").read_text() == "mine"
    assert asked(capsys, *four, "--out", tmp_path, "--force")[0] == 0
    assert (tmp_path / "prompts.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_is_drawn_by_the_command(tmp_path, capsys):
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    where = ("compare", "--run", "first", "--folder", tmp_path / "runs", "--out", tmp_path / "out")
    telemetry.append(run, {"type": "start", "step": -1, "steps": 9, "device": "cpu", "t": 0.0})
    assert "has measured nothing" in asked(capsys, *where)[2][0]
    measured = {"held_out": {"loss": 1.0}, "recall_at_1_text_to_image": 0.5, "drift": {"pooled": {"cosine": 0.7}}}
    telemetry.append(run, {"type": "measure", "step": 0, "t": 1.0, "moved": {"text.0.r": 0.1}} | measured)
    code, said, _ = asked(capsys, *where)
    assert code == 0 and [path.name for path in (tmp_path / "out").iterdir()] == ["recall_and_drift_over_steps.png"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), "nothing to compare"),
        ((ASSETS / ORIGINAL,), f"{ORIGINAL} stands alone"),
        ((ASSETS / ORIGINAL, ASSETS / RUINED, "--captions", "a.json"), "--captions belongs to --images"),
        ((ASSETS / ORIGINAL, ASSETS / RUINED, "--prompts", ASSETS / RUINED), "is no text in UTF-8"),
        (("--run", "nowhere"), "there is no run nowhere"),
    ],
)
def test_what_the_command_cannot_compare_is_named(tmp_path, capsys, arguments, words):
    code, _, errors = asked(capsys, "compare", *arguments, "--out", tmp_path / "out")
    assert code == 2 and len(errors) == 1 and words in errors[0]
    assert not (tmp_path / "out").exists()
