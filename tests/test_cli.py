"""The command line as a person types it; in a process of its own where that makes a difference."""

import contextlib
import io
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from gmp.cli import _parser, main
from gmp.files import read_header
from gmp.world.models import ASSETS, ORIGINAL, RUINED

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (
    "inspect",
    "encode",
    "join",
    "repair",
    "convert",
    "lora",
    "measure",
    "diagnose",
    "compare",
    "scan",
    "blend",
    "report",
    "presets",
    "captions",
    "pictures",
    "dataset",
    "runs",
    "world",
    "demo",
)
TOWERS = ("--text", ASSETS / RUINED, "--vision", ASSETS / ORIGINAL)


def gmp(*arguments, code=0):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            returned = main([str(one) for one in arguments])
        except SystemExit as end:  # argparse: help, and what it does not understand
            returned = end.code
    assert returned == code, out.getvalue() + err.getvalue()
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


def answer(*arguments):
    return json.loads(gmp(*arguments, "--json").stdout.splitlines()[-1])


def complaint(*arguments):
    """The one sentence of a command that refuses its input."""
    done = gmp(*arguments, code=2)
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr
    told = done.stderr.replace("\r", "\n")
    return told[told.index("error: ") :]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "world"
    gmp("world", "--out", folder, "--count", 300, "--seed", 5)
    return folder


def data(world):
    return ("--images", world, "--captions", world / "captions.json", "--cache", world.parent / "cache")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command):
    assert f"python -m gmp {command}" in gmp(command, "--help").stdout.split("example:")[1]


def test_inspect_reads_headers_only_and_imports_no_torch():
    code = (
        "import sys; from gmp.cli import main; "
        f"assert main(['inspect', {str(ASSETS / RUINED)!r}]) == 0; assert not sys.modules.keys() & {{'torch', 'numpy'}}"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "clip_l: 4 blocks" in done.stdout and "lacks text_projection, logit_scale" in done.stdout


def test_inspect_tells_all_files_and_names_those_that_it_cannot_read(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"GGUF" + bytes(60))
    files = (tmp_path / "a.safetensors", ASSETS / RUINED, tmp_path / "b.safetensors")
    sentence = complaint("inspect", *files)
    assert "a.safetensors is a GGUF file" in sentence and "b.safetensors does not exist" in sentence
    assert "text encoder: clip_l" in gmp("inspect", *files, code=2).stdout


def test_join_and_convert_round_trip(tmp_path):
    joined = answer("join", *TOWERS, "--out", tmp_path / "joined.safetensors", "--layout", "openai")
    assert [row["source"] for row in joined["tensors"]] == [RUINED, ORIGINAL, ORIGINAL, ORIGINAL]
    gmp("convert", tmp_path / "joined.safetensors", "--out", tmp_path / "gmp.safetensors", "--layout", "gmp", "--whole")
    assert "transformer.resblocks.0.mlp.c_fc.theta" in read_header(tmp_path / "gmp.safetensors").tensors
    gmp("convert", tmp_path / "gmp.safetensors", "--out", tmp_path / "te.safetensors")
    header = read_header(tmp_path / "te.safetensors")
    assert header.tensors["text_model.encoder.layers.0.mlp.fc1.weight"].shape == (128, 64)
    assert json.loads(header.metadata["gmp_source"])["file"] == "gmp.safetensors"


def test_files_are_not_overwritten_unasked(tmp_path):
    convert = ("convert", ASSETS / RUINED, "--out", tmp_path / "te.safetensors")
    gmp(*convert)
    before = (tmp_path / "te.safetensors").read_bytes()
    assert "exists; choose another name, or pass --force" in complaint(*convert, "--dtype", "fp16")
    assert (tmp_path / "te.safetensors").read_bytes() == before
    gmp(*convert, "--dtype", "fp16", "--force")
    assert {info.dtype for info in read_header(tmp_path / "te.safetensors").tensors.values()} == {"F16"}
    assert "end in .safetensors" in complaint(*convert[:-1], tmp_path / "te.pt")


def test_convert_keeps_what_the_file_has(tmp_path):
    gmp("convert", ASSETS / RUINED, "--out", tmp_path / "te.safetensors")
    before, after = load_file(ASSETS / RUINED), load_file(tmp_path / "te.safetensors")
    assert before.keys() == after.keys()
    assert all(after[name].dtype == tensor.dtype for name, tensor in before.items())
    assert all(torch.equal(after[name].float(), tensor.float()) for name, tensor in before.items())


def test_folders_are_written_with_their_config_and_read_again(tmp_path):
    for layout, config in (("huggingface_folder", "config.json"), ("open_clip_folder", "open_clip_config.json")):
        whole = ("convert", ASSETS / ORIGINAL, "--whole", "--layout", layout, "--out", tmp_path / layout)
        gmp(*whole)
        assert (tmp_path / layout / config).exists()
        there = complaint(*whole)
        assert "pass --force" in there and config in there
        gmp(*whole, "--force")
        seen = answer("inspect", tmp_path / layout)[0]
        assert seen["kind"] == "clip" and [tower["assumptions"] for tower in seen["towers"]] == [[], []]
    assert "both towers" in complaint(
        "convert", ASSETS / RUINED, "--layout", "open_clip_folder", "--out", tmp_path / "text"
    )
    wrong = complaint(
        "convert", ASSETS / RUINED, "--layout", "huggingface_folder", "--out", tmp_path / "te.safetensors"
    )
    assert "will be a folder" in wrong


def test_a_text_encoder_goes_back_into_its_checkpoint(tmp_path):
    gmp("convert", ASSETS / RUINED, "--into", ASSETS / ORIGINAL, "--out", tmp_path / "new.safetensors")
    before, after, ruined = (
        load_file(path) for path in (ASSETS / ORIGINAL, tmp_path / "new.safetensors", ASSETS / RUINED)
    )
    assert before.keys() == after.keys()
    others = [n for n in before if n.startswith("visual.") or n in ("text_projection", "logit_scale")]
    assert all(torch.equal(before[name], after[name]) for name in others)
    name = "transformer.resblocks.0.mlp.c_fc.weight"
    assert torch.equal(after[name], ruined["text_model.encoder.layers.0.mlp.fc1.weight"].to(after[name].dtype))
    assert not torch.equal(before[name], after[name])


def test_encode_writes_what_the_file_can_compute(tmp_path):
    out = tmp_path / "encoded.safetensors"
    np.save(tmp_path / "tokens.npy", np.array([[49406, 320, 736, 49407, 49407]]))
    np.save(tmp_path / "pixels.npy", np.zeros((2, 3, 64, 64), np.float32))
    picture = tmp_path / "red.png"
    Image.new("RGB", (90, 70), "red").save(picture)
    arrays = ("--tokens", tmp_path / "tokens.npy", "--pixels", tmp_path / "pixels.npy")
    gmp("encode", ASSETS / ORIGINAL, *arrays, "--out", out)
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(out).items()}
    assert shapes == {
        "penultimate": (1, 5, 64), "last": (1, 5, 64), "pooled": (1, 64), "projected": (1, 64), "image": (2, 64),
        "logits": (2, 1),
    }  # fmt: skip
    found = answer("encode", ASSETS / RUINED, "--text", "a red circle", "b", "--out", out, "--force")
    assert found["tensors"] == {"penultimate": [2, 77, 64], "last": [2, 77, 64], "pooled": [2, 64]}
    assert any("projected is left out" in note for note in found["notes"])
    assert answer("encode", ASSETS / ORIGINAL, "--image", picture, "--out", out, "--force")["tensors"] == {
        "image": [1, 64]
    }
    assert "nothing to encode" in complaint("encode", ASSETS / ORIGINAL, "--out", out, "--force")
    assert "holds a text encoder only" in complaint(
        "encode", ASSETS / RUINED, "--image", picture, "--out", out, "--force"
    )
    assert "exists" in complaint("encode", ASSETS / RUINED, "--text", "a", "--out", out)


def test_a_repair_lora_says_what_it_keeps(tmp_path):
    command = ("lora", ASSETS / ORIGINAL, "--broken", ASSETS / RUINED)
    small = answer(*command, "--rank", 2, "--out", tmp_path / "2.safetensors")
    large = answer(*command, "--rank", 64, "--out", tmp_path / "64.safetensors")
    assert small["kept"] < large["kept"] and large["kept"] == pytest.approx(1, abs=1e-3)
    assert {row["name"] for row in large["left_out"]} == {"text_projection.weight", "logit_scale"}
    assert answer("inspect", tmp_path / "64.safetensors")[0]["kind"] == "lora"


def test_the_original_may_be_a_third_file(tmp_path):
    vision = tmp_path / "vision.safetensors"
    save_file({name: t for name, t in load_file(ASSETS / ORIGINAL).items() if name.startswith("visual.")}, vision)
    towers = ("--text", ASSETS / RUINED, "--vision", vision, "--vision-heads", 2)
    assert "lends none" in complaint("join", *towers, "--out", tmp_path / "a.safetensors")
    joined = answer("join", *towers, "--original", ASSETS / ORIGINAL, "--out", tmp_path / "a.safetensors")
    sources = {row["name"]: row["source"] for row in joined["tensors"]}
    assert sources == {
        "text tower": RUINED, "text_projection": ORIGINAL, "logit_scale": ORIGINAL, "vision tower": vision.name,
    }  # fmt: skip
    assert len(joined["tensors"][0]["names"]) == 52


def test_a_repair_that_is_stopped_goes_on_with_the_same_command(world, tmp_path):
    repair = ("repair", *TOWERS, *data(world), "--out", tmp_path / "run", "--epochs", 400, "--batch", 50)
    process = subprocess.Popen(
        [sys.executable, "-m", "gmp", *map(str, repair)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 90
    while not list((tmp_path / "run").glob("checkpoints/*.state.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert "the same command goes on from there" in process.communicate(timeout=60)[0].decode()
    assert process.returncode == 0 and (tmp_path / "run" / "text_encoder.safetensors").exists()
    assert "epochs was 400, is 2" in complaint(*repair[:-3], 2, "--batch", 50)


def test_the_result_is_measured_and_repeated(world, tmp_path):
    repair = ("repair", *TOWERS, *data(world), "--out", tmp_path / "run", "--epochs", 6, "--batch", 50)
    first, again = answer(*repair), answer(*repair)
    assert first == again and first["state"] == "done" and first["steps"] == 30
    before = answer("measure", *TOWERS, *data(world))
    after = answer("measure", "--text", first["text_encoder"], *TOWERS[2:], *data(world))
    found, lost = (one["retrieval"]["text_to_image"]["recall_at_1"] for one in (after, before))
    assert found["value"] >= found["low"] > 0.7 > 0.5 > lost["high"] > lost["value"]
    assert (after["retrieval"]["images"], before["retrieval"]["images"]) == (15, 300)  # what the run held out, and all
    assert after["drift"]["penultimate"]["cosine"] > before["drift"]["penultimate"]["cosine"] + 0.1
    assert read_header(first["text_encoder"]).metadata["gmp_version"]


def test_negatives_and_the_optimizer_state_are_settings_of_a_run(world, tmp_path):
    captions = json.loads((world / "captions.json").read_text())
    twice = {}
    for name, texts in list(captions.items())[:60]:
        for folder in ("one", "two"):
            path = tmp_path / "pictures" / folder / Path(name).name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(world / name, path)
            twice[f"{folder}/{path.name}"] = texts
    (tmp_path / "captions.json").write_text(json.dumps(twice))
    pictures = ("--images", tmp_path / "pictures", "--captions", tmp_path / "captions.json", *data(world)[-2:])
    repair = ("repair", *TOWERS, *pictures, "--out", tmp_path / "run", "--epochs", 1, "--batch", 50)
    done = gmp(*repair, "--negatives", "all", "--optimizer-state", "bf16")
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert (config["negatives"], config["optimizer_state"]) == ("all", "bf16")
    assert "57 training pictures and 171 training captions equal another, and are not its negatives" in done.stderr
    events = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    steps = [event for event in map(json.loads, events) if event["type"] == "step"]
    assert len(steps) == 2 and all(0 < step["masked"] <= 25 for step in steps)
    other = complaint(*repair)
    assert "negatives was 'all', is 'batch'" in other and "optimizer_state was 'bf16', is 'fp32'" in other
    assert "needs a locked vision tower" in complaint(*repair, "--negatives", "all", "--train", "both")


def test_a_measurement_is_a_table_and_a_file(world, tmp_path):
    before = ("--before", ASSETS / ORIGINAL)
    measure = ("measure", *TOWERS, *data(world), *before, "--relations", "--out", tmp_path / "below" / "found.json")
    done = gmp(*measure, "--json")
    *table, last = done.stdout.splitlines()
    found = json.loads(last)
    assert json.loads((tmp_path / "below" / "found.json").read_text()) == found
    one = found["retrieval"]["text_to_image"]["recall_at_1"]
    line = next(line for line in table if line.startswith("recall@1 "))
    assert f"text → image {one['value']:.3f} ({one['low']:.3f} … {one['high']:.3f})" in line
    assert any(line.startswith("penultimate (SDXL, SD2, SD3)") for line in table)
    assert any(line.startswith("relations, side: ") for line in table)
    assert found["change"]["from"]["path"] == ORIGINAL and found["change"]["text_to_image"]["recall_at_1"]["high"] < 0
    assert "exists; choose another name, or pass --force" in complaint(*measure)
    assert "end in .json" in complaint(*measure[:-1], tmp_path / "found.txt")
    assert "give --classes" in complaint(*measure, "--templates", tmp_path / "templates.txt")
    assert "class" in complaint(*measure[:-2], "--classes", tmp_path / "none")


def test_classes_are_measured_without_captions(world, tmp_path):
    rows = ["image,label"]
    for number in range(12):
        colour = ("red", "green", "blue")[number % 3]
        (tmp_path / "classes" / colour).mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (64, 64), colour)
        image.putpixel((number, 0), (number, 0, 0))
        image.save(tmp_path / "classes" / colour / f"{number}.png")
        rows.append(f"{colour}/{number}.png,{colour}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    (tmp_path / "templates.txt").write_text("a {} circle")
    (tmp_path / "empty.txt").write_text("")
    classes = ("--classes", tmp_path / "classes", "--templates", tmp_path / "templates.txt")
    measure = ("measure", *TOWERS, "--cache", world.parent / "cache", *classes)
    picture = tmp_path / "below" / "confusion.png"
    done = gmp(*measure, "--confusion", picture, "--json")
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["zero_shot"]["pictures"] == 12 and found["zero_shot"]["templates"] == ["a {} circle"]
    assert "structure" in found and "retrieval" not in found and f"picture: {picture}" in done.stdout
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.width > 300
    assert answer(*measure, "--labels", tmp_path / "labels.csv") == found
    gmp(*measure, "--confusion", tmp_path / "confusion.svg")
    assert "<svg" in (tmp_path / "confusion.svg").read_text()

    assert "exists; choose another name" in complaint(*measure, "--confusion", picture)
    assert "end in .png or .svg" in complaint(*measure, "--confusion", tmp_path / "confusion.gif")
    assert "no column image" in complaint(*measure, "--labels", tmp_path / "templates.txt")
    assert "There are no templates" in complaint(*measure[:-1], tmp_path / "empty.txt")
    assert "--relations needs captioned pictures; give --images" in complaint(*measure, "--relations")
    assert "--captions needs captioned pictures" in complaint(*measure, "--captions", world / "captions.json")
    bare = ("measure", *TOWERS)
    assert "nothing to measure on; give --images with captioned pictures, or --classes" in complaint(*bare)
    for option, path in (("--labels", tmp_path / "labels.csv"), ("--confusion", tmp_path / "other.png")):
        assert "give --classes" in complaint(*bare, *data(world), option, path)


def test_bad_input_is_met_with_one_sentence(world, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "captions.json").write_text(json.dumps({f"{i}.png": ["x"] for i in range(7)}))
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes((ASSETS / RUINED).read_bytes()[:-1000])
    run = ("--out", tmp_path / "run")
    pictures = data(world)
    assert "does not exist" in complaint("repair", "--text", tmp_path / "no", *TOWERS[2:], *pictures, *run)
    assert "truncated" in complaint("repair", "--text", truncated, *TOWERS[2:], *pictures, *run)
    assert "no vision tower" in complaint("repair", *TOWERS[:2], "--vision", ASSETS / RUINED, *pictures, *run)
    assert "no pictures" in complaint("repair", *TOWERS, "--images", tmp_path / "empty", *run)
    missing = complaint("repair", *TOWERS, "--images", world, "--captions", tmp_path / "captions.json", *run)
    assert "7 of the pictures" in missing and "4.png" in missing and "5.png" not in missing
    assert "fewer than one step of 256" in complaint("repair", *TOWERS, *pictures, *run, "--held-out", 0.5)
    both = complaint("repair", *TOWERS, *pictures, *run, "--epochs", 0, "--smoothing", 3)
    assert "epochs is 0" in both and "smoothing is 3" in both
    assert "not of the form" in complaint("repair", *TOWERS, *pictures, *run, "--anchor", "penultimate")
    once = complaint("repair", *TOWERS, *pictures, *run, "--anchor", "broken@concepts:last=1")
    assert "give them as --concepts FILE" in once
    (tmp_path / "concepts.json").write_text('{"a.png": ["x"]}')
    assert "look like JSON" in complaint("repair", *TOWERS, *pictures, *run, "--concepts", tmp_path / "concepts.json")
    assert "is not TOML" in complaint("repair", *TOWERS, *pictures, *run, "--set", 'captions.prefix="')
    assert "--preset" in complaint("repair", *TOWERS, *pictures, *run, "--set", "preset=gentle")
    assert "contradict" in complaint("repair", *TOWERS, *pictures, *run, "--anchor", "pooled=1", "--no-anchor")
    assert "there is cpu" in complaint("repair", *TOWERS, *pictures, *run, "--device", "nonsense")
    assert "match no parameter" in complaint("repair", *TOWERS, *pictures, *run, "--rate", "nothing*=0", "--batch", 50)


def test_what_is_left_out_of_captioned_pictures_is_named(tmp_path):
    for number, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{colour}.png")
        if number:
            (tmp_path / f"{colour}.txt").write_text(f"a {colour} square")
    (tmp_path / "black.txt").write_text("a black square")
    found = gmp("measure", *TOWERS, "--images", tmp_path, "--cache", tmp_path / "cache")
    assert "left out: without captions: 1: red.png" in found.stderr
    assert "left out: text files without a picture: 1: black.txt" in found.stderr
    (tmp_path / "captions.json").write_text(json.dumps({"red.png": "red", "blue.png": "blue", "gone.png": "gone"}))
    named = ("--images", tmp_path, "--captions", tmp_path / "captions.json", "--cache", tmp_path / "cache")
    compare = ("compare", ASSETS / ORIGINAL, ASSETS / RUINED, "--out", tmp_path / "compared", *named)
    assert "gone.png" in complaint(*compare)
    assert "left out: not found: 1: gone.png" in gmp(*compare, "--allow-missing").stderr


def test_a_class_without_a_readable_picture_is_named(world, tmp_path):
    for colour in ("red", "green", "blue"):
        (tmp_path / colour).mkdir()
        Image.new("RGB", (64, 64), colour).save(tmp_path / colour / "0.png")
    (tmp_path / "red" / "0.png").write_text("no picture")
    table = gmp("measure", *TOWERS, "--classes", tmp_path, "--cache", world.parent / "cache").stdout
    assert "no readable picture of red" in table
    labels = ("measure", *TOWERS, "--classes", tmp_path, "--labels")
    assert "is not there. Give a CSV file" in complaint(*labels, tmp_path / "none.csv")
    assert "is a folder. Give a CSV file" in complaint(*labels, tmp_path)


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    def never(*arguments, **more):
        raise AssertionError("a file was read")

    monkeypatch.setattr("gmp.layouts.read_text", never)
    file, folder = tmp_path / "file.json", tmp_path / "folder.png"
    file.write_text("{}")
    folder.mkdir()
    ends = ("--broken", ASSETS / RUINED, "--repaired", ASSETS / ORIGINAL, "--original", ASSETS / ORIGINAL)
    diagnose = ("diagnose", ASSETS / RUINED, "--original", ASSETS / ORIGINAL)
    assert "file.json is no folder" in complaint("scan", *ends, "--out", file)
    assert "file.json is no folder" in complaint(*diagnose, "--out", file / "below" / "found.png")
    assert "is a folder; give the name of a file" in complaint(*diagnose, "--out", folder, "--force")
    assert "file.json is no folder" in complaint("measure", *TOWERS, "--images", tmp_path, "--out", file / "found.json")
    assert "file.json is no folder" in complaint(
        "compare", ASSETS / ORIGINAL, ASSETS / RUINED, "--out", file / "compared"
    )
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert f"nothing may be made in {tmp_path}" in complaint(*diagnose, "--out", tmp_path / "found.png")


def test_a_diagnosis_ends_with_its_repair_as_a_command(tmp_path):
    broken = tmp_path / "a broken one.safetensors"
    broken.write_bytes((ASSETS / RUINED).read_bytes())
    picture = tmp_path / "below" / "found.png"
    done = gmp("diagnose", broken, "--original", ASSETS / ORIGINAL, "--out", picture)
    assert picture.exists() and f"picture: {picture}" in done.stdout and "note: " not in done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("the suggested repair"))
    words = shlex.split(line.partition(": ")[2])
    assert words[:3] == ["python", "-m", "gmp"]
    options = _parser().parse_args(words[3:])
    assert (options.text, options.vision, options.preset) == (broken, ASSETS / ORIGINAL, "sdxl-repair")
    assert options.anchor is None
    same = gmp("diagnose", ASSETS / ORIGINAL, "--original", ASSETS / ORIGINAL).stdout
    assert "the suggested repair" not in same


def test_a_doubtful_original_is_doubted_and_a_wrong_one_named(tmp_path):
    swapped = gmp("diagnose", ASSETS / ORIGINAL, "--original", ASSETS / RUINED).stderr
    assert "make sure that the two are not swapped" in swapped
    repaired = tmp_path / "repaired.safetensors"
    save_file(load_file(ASSETS / ORIGINAL), repaired, {"gmp_run": "{}"})
    assert "written by a repair" in gmp("diagnose", ASSETS / RUINED, "--original", repaired).stderr
    save_file(
        {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(2, 2)}, tmp_path / "l.safetensors"
    )
    lora = complaint("diagnose", ASSETS / RUINED, "--original", tmp_path / "l.safetensors")
    assert "l.safetensors is a LoRA" in lora and "unless an original is given" not in lora


def test_a_blend_refuses_options_that_would_do_nothing(tmp_path):
    blend = ("blend", "--broken", ASSETS / RUINED, "--repaired", ASSETS / ORIGINAL, "--strength", 1)
    out = ("--out", tmp_path / "blended.safetensors")
    assert "give --toward-original" in complaint(*blend, "--original", ASSETS / ORIGINAL, *out)
    assert "with --original" in complaint(*blend, "--toward-original", 0.5, *out)
    same = gmp("blend", "--broken", ASSETS / RUINED, "--repaired", ASSETS / RUINED, "--strength", 1, *out)
    assert "hold the same weights" in same.stderr


def test_a_comparison_says_why_there_is_little_to_see(world, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na red car\nthe sea at night\n")
    compare = ("compare", ASSETS / ORIGINAL, ASSETS / ORIGINAL, "--prompts", tmp_path / "prompts.txt", *data(world))
    done = gmp(*compare, "--out", tmp_path / "compared")
    assert "hold the same weights" in done.stdout and "4 prompts are too few to judge CKA by" in done.stdout
    assert "150 of 300 pictures are drawn, evenly taken" in done.stdout
    assert "is no file; --prompts" in complaint(*compare[:3], "--prompts", tmp_path, "--out", tmp_path / "other")


def test_a_report_replaces_nothing_unasked_and_says_what_its_run_lacks(world, tmp_path):
    run = tmp_path / "run"
    gmp("repair", *TOWERS, *data(world), "--out", run, "--epochs", 1, "--batch", 100)
    page, model = tmp_path / "below" / "page.html", run / "text_encoder.safetensors"
    weights = model.read_bytes()
    assert "end in .html" in complaint("report", run, "--out", model)
    assert model.read_bytes() == weights
    assert "no comparison" not in gmp("report", run, "--out", page).stdout
    assert "exists; choose another name, or pass --force" in complaint("report", run, "--out", page)
    gmp("report", run, "--out", page, "--force")
    gmp("report", run)
    (run / "evidence.json").unlink()
    assert "there is no comparison of before, after and original" in gmp("report", run).stdout
    assert "automatic" in gmp("runs", "show", run).stdout
    (run / "run.json").write_text("{")
    assert "tells no settings" in gmp("report", run).stderr
    assert "tells no settings" in gmp("runs", "show", run).stderr


def test_the_demo_keeps_its_promise(tmp_path):
    figures = answer("demo", "--out", tmp_path / "demo")
    original, ruined, repaired = (figures[name] for name in ("original", "ruined", "repaired"))
    for direction in ("text_to_image", "image_to_text"):
        whole = original[f"recall_at_1_{direction}"]
        assert ruined[f"recall_at_1_{direction}"] < 0.5 * whole
        assert repaired[f"recall_at_1_{direction}"] >= 0.9 * whole
        assert repaired[f"median_rank_{direction}"] == 1
    assert repaired["drift"]["penultimate"]["cosine"] >= 0.9
    run = Path(figures["run"])
    assert all((run / name).exists() for name in ("text_encoder.safetensors", "loss.png", "events.jsonl"))
