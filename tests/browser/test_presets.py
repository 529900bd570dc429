"""Presets in the real page: what a choice sets on the node, what stays when a graph is loaded, and the panel's list."""

from __future__ import annotations

import json

import pytest

from gmp.presets import presets
from tests.browser.test_page import ROOT, browse, change, host, screenshots  # noqa: F401
from tests.host.conftest import nodes  # noqa: F401


@pytest.fixture(scope="module")
def told(host) -> dict[str, dict]:  # noqa: F811
    """What each preset sets on the node."""
    return {one["name"]: one["inputs"] for one in host.get("/gmp/presets")["presets"]}


@pytest.fixture(scope="module", params=["classic", "nodes2"])
def seen(request, host, tmp_path_factory) -> dict:  # noqa: F811
    workflow = json.loads((ROOT / "workflows" / "demo_repair.json").read_text(encoding="utf-8"))
    change(workflow, epochs=4, lr=3e-6, seed=9)
    folder = tmp_path_factory.mktemp("presets")
    graph = folder / "graph.json"
    graph.write_text(json.dumps(workflow))
    pictures = screenshots(folder) / f"presets_{request.param}"
    return browse("presets.py", host.port, graph, request.param, pictures)


def test_a_graph_that_is_loaded_keeps_its_own_values(seen):
    loaded = seen["node"]["loaded"]
    assert (loaded["preset"], loaded["epochs"], loaded["lr"], loaded["seed"]) == ("sd15", 4, 3e-6, 9)
    assert seen["node"]["other"] == loaded


def test_choosing_a_preset_sets_all_that_it_says_and_leaves_the_rest(seen, told):
    loaded, chosen = seen["node"]["loaded"], seen["node"]["chosen"]
    meant = told["seed-gmp"]
    assert chosen["preset"] == "seed-gmp"
    assert {name: chosen[name] for name in meant} == meant and chosen["lr"] == 1e-7
    others = chosen.keys() - meant.keys() - {"preset"}
    assert {name: chosen[name] for name in others} == {name: loaded[name] for name in others}
    assert {name: seen["node"]["sent"][name] for name in meant} == meant


def test_a_graph_that_is_saved_and_loaded_has_the_changed_values(seen):
    again = seen["node"]["again"]
    assert again == seen["node"]["chosen"] | {"epochs": 7, "settings": "ema = 0.9"}


def test_a_choice_can_be_undone(seen, told):
    assert {name: seen["node"]["second"][name] for name in told["large-batch"]} == told["large-batch"]
    assert seen["node"]["undone"]["preset"] == "seed-gmp"


def test_the_panel_lists_every_preset_in_a_narrow_sidebar(seen):
    assert seen["panel"]["listed"] == list(presets()) and seen["panel"]["outside"] == []


def test_use_sets_the_preset_on_the_only_repair(seen, told):
    used = seen["panel"]["used"]
    assert used["preset"] == "gentle" and {name: used[name] for name in told["gentle"]} == told["gentle"]
    assert "gentle" in seen["panel"]["toast"]


def test_of_several_repairs_the_selected_one_is_set_and_none_without_a_selection(seen, told):
    assert "several" in seen["panel"]["refused"]
    assert [one["preset"] for one in seen["panel"]["both"]] == ["gentle", "sdxl-repair"]
    assert [one["preset"] for one in seen["panel"]["selected"]] == ["gentle", "clip-g"]
    second = seen["panel"]["selected"][1]
    assert {name: second[name] for name in told["clip-g"]} == told["clip-g"]
