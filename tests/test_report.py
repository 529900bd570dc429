"""The page about a run: self-contained, whole for a whole run, honest about what an unfinished or older one lacks."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

from gmp import cli, telemetry
from gmp.config import RepairConfig
from gmp.evidence import EVIDENCE, THUMBNAILS
from gmp.history import History
from gmp.plots.gradients import plot_gradients, plot_moved
from gmp.report import REPORT, report
from gmp.report.contents import without_folders
from gmp.report.redo import command_line, graph, name_only
from gmp.report.style import STYLE
from gmp.run import repair
from gmp.watch import Watch

CPU = torch.device("cpu")
CONFIG = RepairConfig(epochs=2, batch=8, lr=1e-3, held_out=0.4)
TITLES = (
    "Verdict", "Before and after", "Retrievals that changed", "How it went", "Alarms", "Saved steps", "Data set",
    "Inputs", "Versions", "Settings", "How to do it again",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reported") / "run"
    list(repair(inputs, CONFIG, folder, cache=tmp_path_factory.mktemp("cache"), device=CPU))
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy that may be changed."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch, request):
    """Drawing takes a second; one test looks at pictures."""
    if "drawn" not in request.fixturenames:
        for name in ("losses", "gradients", "moved"):
            monkeypatch.setattr(f"gmp.report.figures.{name}", lambda *given: b"a picture")


@pytest.fixture
def drawn():
    pass


def history(folder):
    found = History.load(folder)
    found.follow()
    return found.whole()


def page(folder, state=None, **named):
    return report(folder, history(folder), state, **named)


def words(html):
    """The text of a page, without tags."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)))


def row(html, name, point="projected"):
    """The cells of a line of the table, at a read point."""
    _, _, after = html.partition(f'colspan="4">{point} ')
    found = re.search(rf"<tr><th[^>]*>{re.escape(name)}</th>(.*?)</tr>", after)
    return re.findall(r"<td>(.*?)</td>", found[1])


def titles(html):
    return re.findall(r"<h2>(.*?)</h2>", html)


# --- a whole run


def test_a_finished_run_has_every_section_and_nothing_is_missing(finished):
    html = page(finished)
    assert titles(html) == list(TITLES)
    assert "Finished after 4 steps" in words(html)


def test_the_page_that_the_run_wrote_is_the_one_that_is_made_of_its_folder(finished, drawn):
    assert (finished / REPORT).read_text() == page(finished)


def test_the_page_has_no_scripts_and_asks_for_nothing(finished, drawn):
    html = page(finished)
    assert html.startswith("<!doctype html>")
    assert not re.search(r"<script|<link|https?://|src=\"(?!data:image/)|url\(|@import|\shref=|\son\w+=", html)


def test_curves_gradients_and_movement_are_pictures_in_the_page(finished, drawn):
    figures = re.findall(r'<figure><img alt="([^"]*)" src="data:image/png;base64,([^"]*)"', page(finished))
    assert [alt.split()[0] for alt, _ in figures] == ["Losses;", "Gradient", "How"]
    assert len({content for _, content in figures}) == 3


def test_every_read_point_is_told_and_the_target_is_marked(finished):
    html = page(finished)
    bodies = re.findall(r'<tbody( class="target")?><tr class="point"><th[^>]*>(\w+)', html)
    assert bodies == [(' class="target"', "penultimate"), ("", "last"), ("", "pooled"), ("", "projected")]
    assert html.count("target of this run") == 1
    for reader in ("SDXL, SD2, SD3", "SD1", "Flux", "contrastive training, and clip_g"):
        assert reader in html


def test_the_table_has_the_numbers_of_the_evidence(finished):
    html, encoders = page(finished), json.loads((finished / EVIDENCE).read_text())["evidence"]["encoders"]
    names = ("broken", "repaired", "original")
    recalls = [encoders[name]["retrieval"]["text_to_image"]["recall_at_1"] for name in names]
    assert row(html, "recall@1, text to image") == [
        f'{100 * r["value"]:.1f} %<span class="between">{100 * r["low"]:.1f}–{100 * r["high"]:.1f}</span>'
        for r in recalls
    ]
    for point in ("penultimate", "pooled"):
        cosines = [encoders[name]["to_original"][point]["cosine"] for name in names]
        assert row(html, "cosine to the original", point) == [f"{value:.3f}" for value in cosines]
        cosines = [encoders[name]["to_broken"][point]["cosine"] for name in names]
        assert row(html, "cosine to the encoder before", point) == [f"{value:.3f}" for value in cosines]
        assert row(html, "CKA with the original", point) == [
            f"{encoders[name]['structure'][point]['cka']:.3f}" for name in names
        ]
    assert row(html, "cosine to the original", "last")[2] == "1.000"


def test_the_verdict_is_told_with_what_it_cannot_say(finished):
    outcome = json.loads((finished / EVIDENCE).read_text())["evidence"]["outcome"]
    text = words(page(finished))
    for sentence in (*outcome["text"], outcome["unknown"]):
        assert sentence.replace("'", "&#x27;") in text
    assert "too few for a verdict" in text


def test_captions_that_changed_are_counted_and_shown(run):
    document = json.loads((run / EVIDENCE).read_text())
    changes = document["evidence"]["changes"]
    thumbnail = next((run / THUMBNAILS).iterdir()).name
    found = {"picture": "1.png", "thumbnail": thumbnail}
    changes |= {"became_right": 7, "became_wrong": 3, "stayed_right": 2, "stayed_wrong": 1}
    changes["shown"] = [
        {"caption": f"it became {became}", "became": became, "before": found, "after": found}
        for became in ("right", "wrong")
    ]
    (run / EVIDENCE).write_text(json.dumps(document))
    html = page(run)
    assert "Of 13 held-out captions, 7 find their own picture first now and did not before, 3 did" in words(html)
    assert "Became right: 1 of 7" in html and "Became wrong: 1 of 3" in html
    cards = html.split("<figcaption>it became ")[1:]
    assert [re.findall(r"[✓✗]</span> (?:before|after)", card) for card in cards] == [
        ["✗</span> before", "✓</span> after"], ["✓</span> before", "✗</span> after"],
    ]  # fmt: skip
    assert html.count("data:image/jpeg;base64,") == 4


def test_what_it_takes_to_redo_a_run_is_told(finished, inputs):
    text = words(page(finished))
    for sha256 in (inputs.text.source.sha256, inputs.vision.source.sha256, inputs.original.source.sha256):
        assert sha256 in text
    known = json.loads((finished / "run.json").read_text())
    assert (
        known["dataset"] in text and f"torch {torch.__version__}" in text and "anchors original:penultimate=0.3" in text
    )
    for name in known["config"]:
        assert name in text
    assert "epochs 2 " in text and "weight_decay 0.01 (default)" in text and "epochs 2 (default)" not in text


def test_what_was_left_out_of_the_data_set_is_told_with_reasons(run):
    data = json.loads((run / "dataset.json").read_text())
    data |= {"missing": [f"{i}.png" for i in range(7)], "broken": [["a.png", "/data/pictures/a.png: truncated"]]}
    (run / "dataset.json").write_text(json.dumps(data))
    text = words(page(run))
    assert "left out: named, but not there 7: 0.png, 1.png, 2.png, 3.png, 4.png, …" in text
    assert (
        "left out: cannot be read 1: a.png (a.png: truncated)" in text and "captions cut to the context length" in text
    )


def test_the_best_step_is_told_and_by_what(finished):
    best = json.loads((finished / "result.json").read_text())["best"]
    assert f"step {best['step']}, by objective on held-out pairs" in words(page(finished))
    assert "steps that can be gone back to 2, 4" in words(page(finished))


def test_a_run_that_ended_early_is_named_as_such(run):
    result = json.loads((run / "result.json").read_text()) | {"early": True, "steps": 3}
    (run / "result.json").write_text(json.dumps(result))
    assert "Finished after 3 steps, early" in words(page(run)) and "4 were planned" in words(page(run))


def test_alarms_are_told_without_folders(run):
    alarm = {"type": "alarm", "alarm": "slow", "step": 4, "raised": True, "advice": "see /home/me/notes.txt", "t": 1.0}
    telemetry.append(run, alarm)
    text = words(page(run))
    assert "step 4: slow raised: see notes.txt" in text and "/home" not in text


# --- a run that lacks something


def test_a_run_that_was_stopped_says_what_is_missing_and_why(inputs, tmp_path):
    asked = []
    for event in repair(inputs, CONFIG, tmp_path / "run", cache=tmp_path, device=CPU, stop=lambda: bool(asked)):
        if event["type"] == "step" and event["step"] == 2:
            asked.append(True)
    html = page(tmp_path / "run", Watch().overview(tmp_path / "run")["text"])
    text = words(html)
    assert "What is missing here, and why" in titles(html) and "Verdict" not in titles(html)
    assert "gathered when the run ends, and it has not ended" in text and "Interrupted, resumable at step 2" in text
    assert "step 0 step 2" in text and "cosine to the original at penultimate" in text


def test_a_finished_run_of_a_version_without_evidence_has_a_page(run):
    (run / EVIDENCE).unlink()
    html = page(run)
    assert "evidence.json is not there" in words(html) and "step 0 step 4" in words(html)
    assert {"How it went", "Settings", "Inputs"} <= set(titles(html))


def test_why_there_is_no_evidence_is_told_where_it_failed(run):
    (run / EVIDENCE).unlink()
    alarm = {
        "type": "alarm",
        "alarm": "no_evidence",
        "step": 4,
        "raised": True,
        "advice": "no evidence: disk full",
        "t": 1.0,
    }
    telemetry.append(run, alarm)
    assert "before, after and original: no evidence: disk full" in words(page(run))


def test_thumbnails_that_are_gone_are_told(run):
    shutil.rmtree(run / THUMBNAILS)
    html = page(run)
    assert "their small copies are not in the run&#x27;s folder" in html and 'class="none"' in html


@pytest.mark.parametrize(
    "damage",
    ["{", "[]", '{"evidence": 3}', '{"evidence": {}}', '{"evidence": {"encoders": {"broken": null}, "target": 1}}'],
)
def test_damaged_evidence_leaves_the_rest_of_the_page(run, damage):
    (run / EVIDENCE).write_text(damage)
    html = page(run)
    assert "damaged" in html and "Settings" in titles(html) and html.endswith("</html>\n")


def test_an_empty_folder_has_a_page(tmp_path):
    html = page(tmp_path, "empty")
    assert "Nothing was measured." in html and "nothing was trained yet" in html


def test_thumbnails_are_taken_from_their_folder_only(run):
    (run / "secret.jpg").write_bytes(b"secret")
    document = json.loads((run / EVIDENCE).read_text())
    found = {"picture": "1.png", "thumbnail": "../secret.jpg"}
    shown = {"caption": "x", "became": "right", "before": found, "after": found}
    document["evidence"]["changes"]["shown"] = [shown]
    (run / EVIDENCE).write_text(json.dumps(document))
    assert "data:image/jpeg" not in page(run)


def test_names_in_a_report_are_text(run):
    hostile = "<script>alert(1)</script><img src=x onerror=y>"
    document = json.loads((run / EVIDENCE).read_text())
    found = {"picture": hostile, "thumbnail": None}
    shown = {"caption": hostile, "became": "right", "before": found, "after": found}
    document["evidence"]["changes"]["shown"] = [shown]
    document["evidence"]["outcome"]["text"] = [hostile, hostile]
    document["warnings"] = [hostile]
    (run / EVIDENCE).write_text(json.dumps(document))
    (run / "run.json").write_text(json.dumps({"config": {hostile: hostile}, "gmp_version": hostile}))
    (run / "command.json").write_text(json.dumps({"arguments": [hostile]}))
    html = page(run, hostile)
    assert "<script" not in html and "<img src=x" not in html and html.count("&lt;script&gt;") > 6


# --- how to do it again


def test_a_command_is_told_without_folders_of_this_machine(run):
    arguments = ["--text", "/home/me/my models/broken.safetensors", "--images=C:\\data\\my pictures", "--out", "runs/a"]
    (run / "command.json").write_text(json.dumps({"arguments": arguments, "folder": "/home/me"}))
    text = words(page(run))
    assert "python -m gmp repair --text broken.safetensors &#x27;--images=my pictures&#x27; --out runs/a" in text
    assert "/home" not in text and "C:" not in text


def test_a_graph_is_told_without_folders_of_this_machine(run):
    prompt = {"1": {"class_type": "GmPCaptionDataset", "inputs": {"folder": "/data/pictures", "note": "a/b", "n": 3}}}
    (run / "prompt.json").write_text(json.dumps(prompt))
    text = words(page(run)).replace("&quot;", '"')
    assert '"folder": "pictures"' in text and '"note": "a/b"' in text and "/data" not in text


def test_a_run_of_a_program_says_so(finished):
    assert "it was started by a program" in words(page(finished))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("cannot open /home/me/pictures/1.png: gone", "cannot open 1.png: gone"),
        ("C:\\Users\\me\\a.png is broken", "a.png is broken"),
        ("'/data/x/a.png'", "'a.png'"),
        ("file:/data/x/a.png", "file:a.png"),
        ("1/0.07 and/or text→image", "1/0.07 and/or text→image"),
        ("runs/first/a.png", "runs/first/a.png"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("a photo of a cat", "a photo of a cat"),
    ],
)
def test_folders_are_taken_out_of_sentences(given, told):
    assert without_folders(given) == told


def test_paths_are_told_by_their_last_part():
    assert name_only("/a/b c/d.png") == "d.png" and name_only("a/d.png") == "a/d.png"
    assert name_only("D:\\x\\y z.png") == "y z.png" and name_only("/") == "/"
    assert command_line(["--out", "a b"]) == "python -m gmp repair --out 'a b'"
    assert json.loads(graph({"1": [{"x": "/a/b"}, None, 2.5]})) == {"1": [{"x": "b"}, None, 2.5]}


def test_what_the_host_wants_hidden_is_hidden(run):
    known = json.loads((run / "run.json").read_text())
    known["config"]["note"] = "output of mine/x"
    (run / "run.json").write_text(json.dumps(known))
    assert "output of x" in words(page(run, plain=lambda text: text.replace("mine/", "")))


# --- gradients and movement


def layers(blocks, towers=("text", "vision")):
    roles = ("r", "theta", "attention", "layer_norm", "mlp")
    blocks = [f"{tower}.{block}.{role}" for tower in towers for role in roles for block in range(blocks)]
    ends = [f"{tower}.{name}" for tower in towers for name in ("embedding", "projection", "layer_norm")]
    return ["logit_scale", *blocks, *ends]


def test_gradients_are_drawn_in_the_order_of_computation_with_gaps_where_there_are_none():
    names = layers(2, ("text",))
    norms = [[10.0**-row, None, 0.0] for row in range(len(names))]
    figure = plot_gradients({"layers": {"at": [10, 20, 30], "names": names, "grad_norm": norms}})
    axes = figure.axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[:4] == ["embedding", "block 0 r", "block 0 θ", "block 0 attention"]
    assert set(labels[-3:]) == {"final LayerNorm", "projection", "temperature"}
    assert labels.index("block 0 LayerNorms") < labels.index("block 1 r") and len(labels) == len(names)
    table = axes.collections[0].get_array().reshape(len(names), 3)
    drawn = table.filled(float("nan")) if hasattr(table, "filled") else table
    assert drawn[labels.index("block 0 r"), 0] == pytest.approx(norms[names.index("text.0.r")][0])
    assert not (drawn[:, 1:] >= 0).any()


@pytest.mark.parametrize(("blocks", "towers"), [(24, ("text", "vision")), (12, ("text",)), (1, ("text",))])
def test_gradients_of_any_model_are_drawn_with_room_for_names(blocks, towers):
    names = layers(blocks, towers)
    figure = plot_gradients({"layers": {"at": [1], "names": names, "grad_norm": [[1.0]] * len(names)}})
    figure.canvas.draw()
    labels = figure.axes[0].get_yticklabels()
    boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.y0)
    assert len(boxes) >= blocks and all(low.y1 <= high.y0 + 1 for low, high in zip(boxes, boxes[1:], strict=False))
    assert min(box.x0 for box in boxes) >= 0


def test_movement_is_drawn_by_block_in_percent_and_without_what_has_not_moved():
    moved = {"text.0.r": 0.01, "text.1.r": 0.02, "text.0.theta": 0.3, "text.1.theta": None, "text.embedding": 0.0}
    moved |= {"text.projection": 0.05, "logit_scale": 0.1}
    figure = plot_moved({"measures": [{"moved": {"text.0.r": 9.0}}, {"moved": moved}, {"moved": {}}]})
    (axes,) = figure.axes
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert lines == {"r": ([0, 1], [pytest.approx(1.0), pytest.approx(2.0)]), "θ": ([0], [pytest.approx(30.0)])}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "projection"]


# --- the command


def test_the_command_writes_the_page_and_tells_the_verdict(run, capsys):
    (run / REPORT).unlink()
    assert cli.main(["report", str(run), "--json"]) == 0
    told = capsys.readouterr().out.splitlines()
    answer = json.loads(told[-1])
    assert answer["report"] == str(run / REPORT) and answer["state"] == "finished after 4 steps"
    assert answer["outcome"]["alignment"] == "too_few" and answer["outcome"]["text"][0] in told
    assert titles((run / REPORT).read_text()) == list(TITLES)


def test_the_command_writes_where_it_is_told_and_finds_runs_by_name(run, tmp_path, capsys):
    (run / REPORT).unlink()
    out = tmp_path / "page.html"
    assert cli.main(["report", run.name, "--folder", str(run.parent), "--out", str(out)]) == 0
    assert out.read_text().startswith("<!doctype html>") and not (run / REPORT).exists()


def test_the_command_refuses_what_is_no_run(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "there is no run" in capsys.readouterr().err


def test_the_style_has_light_dark_and_paper():
    assert "prefers-color-scheme: dark" in STYLE and "@media print" in STYLE and "@page" in STYLE
