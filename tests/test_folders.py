"""Model folders, and files that change while they are read."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from gmp import files
from gmp.clip import CLIP as Clip
from gmp.clip import CLIPConfig, TextConfig, VisionConfig, initialize
from gmp.errors import ChangedError, InputError
from gmp.layouts import open_text, read_lender, read_text, write_clip, write_text
from gmp.layouts import read as reading

CONFIG = CLIPConfig(TextConfig(64, 2, 1, 96, 20, 64, 32), VisionConfig(64, 1, 1, 64, 16, 32, 32))


def state(seed: int) -> dict[str, torch.Tensor]:
    return dict(initialize(Clip(CONFIG), torch.Generator().manual_seed(seed)).state_dict())


def text(seed: int) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state(seed).items() if not name.startswith("visual.")}


def same(path, seed: int) -> bool:
    wanted = text(seed)
    return all(torch.equal(tensor, wanted[name]) for name, tensor in read_text(path).state.items())


def shards(folder, seed: int, unlisted: str = "") -> None:
    """A model in two parts with an index, as transformers writes it."""
    write_text(text(seed), folder / "whole.safetensors", config=CONFIG.text)
    header = files.read_header(folder / "whole.safetensors")
    tensors = files.read_tensors(header, header.tensors)
    names = sorted(tensors)
    listed = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({each: tensors[each] for each in part}, folder / name)
        listed |= {each: name for each in part if each != unlisted}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    os.unlink(folder / "whole.safetensors")


def test_a_whole_file_comes_before_shards_as_in_transformers(tmp_path):
    shards(tmp_path, 1)
    assert same(tmp_path, 1) and not any("too" in note for note in read_text(tmp_path).source.notes)
    write_text(text(2), tmp_path / "model.safetensors", config=CONFIG.text)
    assert same(tmp_path, 2)
    assert "holds model.safetensors.index.json too, which was not read" in " ".join(read_text(tmp_path).source.notes)


def test_a_variant_comes_last_and_is_named(tmp_path):
    write_text(text(1), tmp_path / "model.fp16.safetensors", config=CONFIG.text)
    assert same(tmp_path, 1)
    torch.save({"text_model.x": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert list(files.read_header(tmp_path).tensors) == ["text_model.x"]
    assert "holds model.fp16.safetensors too" in " ".join(files.read_header(tmp_path).notes)


def test_shards_are_read_as_their_index_says_and_the_rest_is_named(tmp_path):
    shards(tmp_path, 1, unlisted="text_projection.weight")
    read = read_text(tmp_path)
    assert "text_projection" in read.source.missing
    assert "does not list there, which were not read: text_projection.weight" in " ".join(read.source.notes)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="lacks 1 of 2 files of its model: model-00002-of-00002.safetensors"):
        read_text(tmp_path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", ".."])
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputError, match="names files outside of the folder"):
        files.read_header(folder)


def test_a_pipeline_whose_t5_was_not_downloaded_is_read(tmp_path):
    for name in ("text_encoder", "text_encoder_2"):
        (tmp_path / name).mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "text_encoder_2" / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(InputError, match="without a text encoder .*text_encoder_2 is a folder without a model"):
        files.read_header(tmp_path)
    write_text(text(1), tmp_path / "text_encoder" / "model.safetensors", config=CONFIG.text)
    assert same(tmp_path, 1)
    assert "text_encoder_2 is a folder without a model in it" in " ".join(read_text(tmp_path).source.notes)


def test_a_folder_is_not_written_beside_other_weights(tmp_path):
    (tmp_path / "model.fp16.safetensors").write_bytes(b"old")
    with pytest.raises(InputError, match="it holds model.fp16.safetensors, which programs may read instead"):
        write_text(text(1), tmp_path, layout="huggingface_folder", config=CONFIG.text)
    (tmp_path / "model.fp16.safetensors").unlink()
    for seed in (1, 2):  # its own files are replaced
        write_text(text(seed), tmp_path, layout="huggingface_folder", config=CONFIG.text)
        assert same(tmp_path, seed)


def test_a_config_with_a_byte_order_mark_is_read(tmp_path):
    write_text(text(1), tmp_path, layout="huggingface_folder", config=CONFIG.text)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config, encoding="utf-8-sig")
    assert same(tmp_path, 1)


def test_tensors_of_a_file_that_was_replaced_are_not_mixed(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    write_text(text(1), path, config=CONFIG.text)
    tensors = open_text(path).tensors()
    write_text(text(2), path, config=CONFIG.text)
    with pytest.raises(ChangedError, match="was changed while it was read"):
        tensors["ln_final.weight"].make()

    made, real = [], reading._make

    def replaced_in_between(header, name, piece):
        made.append(name)
        if len(made) == 20:
            write_text(text(3), path, config=CONFIG.text)
        return real(header, name, piece)

    monkeypatch.setattr(reading, "_make", replaced_in_between)
    assert same(path, 3) and len(made) > 40  # it was read anew


def test_a_file_that_changes_while_it_is_copied_is_not_written(tmp_path):
    path, out = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    write_text(text(1), path, config=CONFIG.text)
    header = files.read_header(path)
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\4")
    os.utime(path, ns=(1, 1))
    with pytest.raises(ChangedError):
        files.write_safetensors({name: files.Stored(header, name) for name in header.tensors}, out)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_what_a_vision_file_lends(tmp_path):
    write_clip(state(1), tmp_path / "full.safetensors", config=CONFIG)
    lender, sentence = read_lender(tmp_path / "full.safetensors")
    assert "text_projection" in lender.state and sentence.startswith("a full CLIP")
    vision = {name: tensor.contiguous() for name, tensor in state(1).items() if name.startswith("visual.")}
    save_file(vision, tmp_path / "vision.safetensors")
    assert read_lender(tmp_path / "vision.safetensors")[0] is None
    broken = {name: tensor.contiguous() for name, tensor in state(1).items() if name != "ln_final.bias"}
    save_file(broken, tmp_path / "half.safetensors")
    lender, sentence = read_lender(tmp_path / "half.safetensors")
    assert lender is None and "tensors are missing: ln_final.bias" in sentence


def test_a_relative_name_of_a_folder_is_told_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"^{tmp_path.name} is a folder"):
        files.read_header(".")
