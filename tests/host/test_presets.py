"""Presets, concepts and further settings of GmP Repair, in real graphs."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from gmp.layouts import read_text, read_vision
from gmp.presets import DEFAULT, presets
from gmp.settings import read_toml
from gmp.world.models import ASSETS, ORIGINAL, RUINED
from tests.host.repairs import events, fresh_run, only, waiting

SMALL = {"epochs": 1, "batch": 16, "accumulate": 1, "held_out": 0.1}


def widgets(nodes: dict) -> dict[str, dict]:
    """Options of GmP Repair's inputs, by name."""
    sections = nodes["GmPRepair"]["input"]
    return {
        name: rest[0] if rest else {}
        for section in ("required", "optional")
        for name, (_, *rest) in sections[section].items()
    }


@pytest.fixture(scope="module")
def told(host) -> dict[str, dict]:
    return {one["name"]: one for one in host.get("/gmp/presets")["presets"]}


def test_the_route_tells_every_preset_the_default_first(told):
    assert list(told) == list(presets()) and next(iter(told)) == DEFAULT
    assert {name: one["when"] for name, one in told.items()} == {name: one.when for name, one in presets().items()}


def test_the_nodes_defaults_are_the_default_presets(nodes, told):
    given = widgets(nodes)
    assert given["preset"]["default"] == DEFAULT and given["preset"]["options"] == list(told)
    for name, value in told[DEFAULT]["inputs"].items():
        assert given[name]["default"] == value, name


def test_every_value_of_a_preset_fits_its_input(nodes, told):
    given = widgets(nodes)
    for preset in told.values():
        for name, value in preset["inputs"].items():
            options = given[name]
            if "options" in options:
                assert value in options["options"], (preset["name"], name)
            elif not isinstance(value, bool):
                assert options["min"] <= value <= options["max"], (preset["name"], name)


def repaired(host, nodes: dict, told: dict, preset: str, seed: int, **inputs: object):
    """A run as the page would start it: a preset's values, then changed ones. Gives its settings and its record."""
    known = set(host.runs())
    graph = only(waiting(nodes, seed), "GmPRepair")
    graph["GmPRepair"]["inputs"] |= {"preset": preset} | told[preset]["inputs"] | SMALL | inputs
    result = host.run(graph, 240)
    assert result.status == "success", result.error
    run = fresh_run(host, known)
    assert host.runs()[run]["state"] == "finished"
    folder = host.output / "gmp_runs" / run
    return read_toml((folder / "config.toml").read_text(encoding="utf-8"), run), events(host, run)


def test_a_preset_gives_the_optimizer_and_all_else_that_has_no_input(host, nodes, told):
    config, seen = repaired(host, nodes, told, "seed-gmp", 400, lr=1e-4)
    meant = json.loads(json.dumps(presets()["seed-gmp"].config.to_json()))
    changed = {"epochs": 1, "batch": 16, "accumulate": 1, "lr": 1e-4, "seed": 400}
    assert {name: config[name] for name in changed} == changed
    unset = {name for name, value in meant.items() if value is None}
    same = meant.keys() - changed.keys() - unset
    assert {name: config[name] for name in same} == {name: meant[name] for name in same}
    assert (config["optimizer"], config["train"]) == ("adabelief", "both")
    assert [event for event in seen if event["type"] == "step"][-1]["step"] >= 10
    after = load_file(host.output / "gmp_runs" / seen[0]["run"] / "clip.safetensors")
    before = read_vision(ASSETS / ORIGINAL).state | read_text(ASSETS / RUINED).state
    for name in ("visual.transformer.resblocks.0.mlp.c_fc.weight", "transformer.resblocks.0.mlp.c_fc.weight"):
        moved = (after[name] - before[name]).abs().max()
        assert 1e-6 < moved < 0.1, (name, moved)


def test_concepts_are_held_on_without_pictures(host, nodes, told):
    words = "a sks cross\n\n  a sks circle above a square \na sks cross\n"
    config, seen = repaired(host, nodes, told, "sd15", 401, concepts=words, concept_weight=0.5)
    held = [anchor for anchor in config["anchors"] if anchor["captions"] == "concepts"]
    assert [(anchor["teacher"], anchor["read_point"], anchor["weight"]) for anchor in held] == [("broken", "last", 0.5)]
    data = next(event for event in seen if event["type"] == "dataset")
    assert data["captions of concepts"] == 2
    step = next(event for event in seen if event["type"] == "step")
    assert "concepts" in json.dumps(step), step


def test_concepts_without_a_weight_and_a_weight_without_concepts_hold_nothing(host, nodes, told):
    for seed, given in ((402, {"concepts": "a cross", "concept_weight": 0.0}), (403, {"concepts": " \n"})):
        config, _ = repaired(host, nodes, told, "sd15", seed, **given)
        assert [anchor["captions"] for anchor in config["anchors"]] == ["dataset"]


def test_settings_go_over_preset_and_inputs(host, nodes, told):
    text = (
        'epochs = 2\nema = 0.9\n[captions]\nprefix = "photo: "\n[pictures]\ncrop = "letterbox"\nviews = 2\nflip = 0.5\n'
    )
    config, seen = repaired(host, nodes, told, "sd15", 404, settings=text)
    assert (config["epochs"], config["ema"], config["captions"]["prefix"]) == (2, 0.9, "photo: ")
    assert config["captions"]["choose"] == "random" and config["pictures"]["crop"] == "letterbox"
    assert next(event for event in seen if event["type"] == "dataset")["views of each picture"] == 2


@pytest.mark.parametrize(
    "text, words",
    [
        ("ema = 2\nepoch = 3\n[captions]\nshufle = true", ["ema is 2", "did you mean epochs", "captions.shuffle"]),
        ("ema = \nepochs = 2", ["the text of `settings` is not TOML", "line 1"]),
        ("[pictures]\njitter = [0.2, 0.2, 0.1, 0.0]", ["pictures vary and a locked vision tower sees each once"]),
        ('optimizer = "adabelieve"', ["did you mean adabelief?"]),
    ],
)
def test_wrong_settings_are_one_clear_error_at_the_node(host, nodes, text, words):
    known = set(host.runs())
    graph = only(waiting(nodes, 405, settings=text), "GmPRepair")
    result = host.run(graph)
    assert result.failed == "GmPRepair"
    assert all(word in result.error for word in words), result.error
    assert result.error.count("\n") == 0 and set(host.runs()) == known
