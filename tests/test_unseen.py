"""Pictures that an encoder was trained on do not count when it is measured."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from gmp.config import RepairConfig
from gmp.data.captions import split
from gmp.evaluate import evaluate
from gmp.events import finish
from gmp.features import index_keys
from gmp.layouts import read_text
from gmp.run import RESULT, repair
from gmp.unseen import held_out, unseen
from tests.small import PICTURES, tokenize

CONFIG = RepairConfig(epochs=1, batch=8, lr=1e-3, held_out=0.3)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ran(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unseen")
    events = list(repair(inputs, CONFIG, folder / "run", cache=folder / "cache", device=CPU))
    keys = finish(index_keys(inputs.index, folder / "cache"))
    return read_text(folder / "run" / RESULT), [e for e in events if e["type"] == "measure"][-1], keys, folder / "cache"


def test_a_measurement_on_a_runs_own_pictures_is_the_runs_own(ran, inputs):
    encoder, measured, _, cache = ran
    found = finish(
        evaluate(
            {"encoder": encoder}, inputs.vision, inputs.original, inputs.index, tokenize,
            cache=cache, device=CPU, prompts=["a", "b c", "d e f", "g"],
        )
    )["encoder"].document  # fmt: skip
    assert found["retrieval"]["images"] == measured["images"] == 8
    for direction in ("text_to_image", "image_to_text"):
        value = found["retrieval"][direction]["recall_at_5"]["value"]
        assert value == pytest.approx(measured[f"recall_at_5_{direction}"])
    assert any(f"the 8 of {PICTURES} pictures" in words for words in found["warnings"])


def test_the_part_is_what_the_run_held_out(ran, inputs):
    encoder, _, keys, _ = ran
    assert held_out(inputs.index, keys, encoder) == 8
    part, words = unseen(inputs.index, keys, [inputs.text, encoder])
    assert part == split(inputs.index, keys, 8)[1] and len(words) == 1


def test_of_two_runs_the_pictures_that_both_held_out(ran, inputs):
    encoder, _, keys, _ = ran
    run = json.loads(encoder.source.metadata["gmp_run"])
    run["config"]["held_out"] = 0.2
    source = dataclasses.replace(encoder.source, path="other", metadata={"gmp_run": json.dumps(run)})
    part, words = unseen(inputs.index, keys, [encoder, dataclasses.replace(encoder, source=source)])
    assert part == split(inputs.index, keys, 5)[1] and "and other held out" in words[0]
    run["config"]["held_out"] = 0.0
    source = dataclasses.replace(source, metadata={"gmp_run": json.dumps(run)})
    part, words = unseen(inputs.index, keys, [dataclasses.replace(encoder, source=source)])
    assert part == inputs.index and "trained on all of these" in words[0]


def test_two_runs_whose_files_have_one_name_are_two_runs(ran, inputs):
    encoder, _, keys, _ = ran
    run = json.loads(encoder.source.metadata["gmp_run"])
    run["config"]["held_out"] = 0.2
    source = dataclasses.replace(encoder.source, metadata={"gmp_run": json.dumps(run)})
    fewer = dataclasses.replace(encoder, source=source)
    for both in ([encoder, fewer], [fewer, encoder]):
        assert unseen(inputs.index, keys, both)[0] == split(inputs.index, keys, 5)[1]


@pytest.mark.parametrize("metadata", [{}, {"gmp_run": "{"}, {"gmp_run": "[]"}, {"gmp_run": '{"config": 3}'}])
def test_without_a_run_all_pictures_count(ran, inputs, metadata):
    encoder, _, keys, _ = ran
    stranger = dataclasses.replace(encoder, source=dataclasses.replace(encoder.source, metadata=metadata))
    assert held_out(inputs.index, keys, stranger) is None
    assert unseen(inputs.index, keys, [stranger]) == (inputs.index, [])


def test_other_pictures_all_count(ran, inputs):
    encoder, _, keys, _ = ran
    fewer = dataclasses.replace(inputs.index, pictures=inputs.index.pictures[1:])
    part, (words,) = unseen(fewer, keys, [encoder])
    assert part == fewer and "had another data set" in words
