"""The record of a run: whole lines only, however it was torn, and nothing in it is ever changed."""

from __future__ import annotations

import io
import json
import os
import random
import tracemalloc

import pytest

from gmp import __version__, telemetry
from gmp.errors import InputError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "0123456789abcdef").mkdir()
    return tmp_path / "0123456789abcdef"


def record(folder) -> bytes:
    return (folder / telemetry.EVENTS).read_bytes()


def write(folder, content: bytes) -> None:
    (folder / telemetry.EVENTS).write_bytes(content)


def add(folder, content: bytes) -> None:
    with open(folder / telemetry.EVENTS, "ab") as file:
        file.write(content)


def step(number: int, **more) -> dict[str, object]:
    return {"type": "step", "step": number} | more


def line(event: dict[str, object]) -> bytes:
    return json.dumps(event).encode() + b"\n"


# --- writing


def test_a_record_begins_with_its_header(folder):
    telemetry.append(folder, step(1, t=5.0))
    telemetry.append(folder, step(2, t=6.0))
    header, *events = map(json.loads, record(folder).splitlines())
    t = header.pop("t")
    assert header == {"type": "telemetry", "version": 1, "run": folder.name, "gmp_version": __version__}
    assert isinstance(t, float) and events == [step(1, t=5.0), step(2, t=6.0)]


def test_the_header_is_named_after_the_folder_however_it_is_called(folder, monkeypatch):
    monkeypatch.chdir(folder)
    telemetry.append(type(folder)("."), step(1))
    assert json.loads(record(folder).splitlines()[0])["run"] == folder.name


def test_a_record_of_before_headers_gets_none(folder):
    write(folder, line(step(1)))
    telemetry.append(folder, step(2))
    assert [json.loads(text)["type"] for text in record(folder).splitlines()] == ["step", "step"]
    assert telemetry.read(folder) == [step(1), step(2)]


def test_what_is_written_is_never_changed(folder):
    events = [step(1), step(2), {"type": "resume", "step": 1}, step(2), {"type": "start", "step": 0}]
    before = b""
    for event in events:
        telemetry.append(folder, event)
        assert record(folder).startswith(before)
        before = record(folder)
    assert [path.name for path in folder.iterdir()] == [telemetry.EVENTS]


def test_numbers_that_json_does_not_have_are_null(folder):
    telemetry.append(folder, step(1, loss=float("nan"), all=[float("inf"), {"x": -float("inf")}, 1.5]))
    assert b"NaN" not in record(folder) and b"Infinity" not in record(folder)
    assert telemetry.read(folder) == [step(1, loss=None, all=[None, {"x": None}, 1.5])]


# --- reading


def test_nothing_is_read_where_nothing_was_recorded(folder):
    assert telemetry.read(folder) == [] and telemetry.newest(folder) is None
    assert list(telemetry.lines(folder / telemetry.EVENTS)) == []
    write(folder, b"")
    assert telemetry.read(folder) == [] and telemetry.newest(folder) is None


def test_the_header_is_no_event(folder):
    write(folder, line({"type": "telemetry", "version": 1}))
    assert telemetry.read(folder) == [] and telemetry.newest(folder) is None


@pytest.mark.parametrize("kept", range(1, len(line(step(2)))))
def test_a_torn_line_is_left_out_and_costs_no_other(folder, kept):
    telemetry.append(folder, step(1))
    add(folder, line(step(2))[:kept])
    assert telemetry.read(folder) == [step(1)] and telemetry.newest(folder) == step(1)
    telemetry.append(folder, step(3))
    whole = [step(2)] if kept == len(line(step(2))) - 1 else []  # only its newline was lost
    assert telemetry.read(folder) == [step(1), *whole, step(3)]
    assert telemetry.newest(folder) == step(3)


GARBAGE = [
    b"\n", b"[1,2]\n", b"null\n", b"17\n", b'{"type":3}\n', b'{"step":1}\n', b"\x00" * 99 + b"\n", b"\xff\xfe{}\n",
    b'{"type":"step","step":9\n', b"[" * 100_000 + b"\n", b'{"type":"step","step":' + b"9" * 5000 + b"}\n",
]  # fmt: skip


@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda garbage: repr(garbage[:20]))
def test_what_is_no_event_is_passed_over(folder, garbage):
    write(folder, line(step(1)) + garbage + line(step(2)) + garbage)
    assert telemetry.read(folder) == [step(1), step(2)]
    assert telemetry.newest(folder) == step(2)


def test_numbers_that_json_does_not_have_are_null_when_read_too(folder):
    write(folder, b'{"type":"step","step":1,"loss":NaN,"grad_norm":-Infinity}\n')
    assert telemetry.read(folder) == [step(1, loss=None, grad_norm=None)]


@pytest.mark.parametrize("version", [2, 99, None, "1", 1.5])
def test_a_record_of_a_newer_version_says_to_update(folder, version):
    write(folder, line({"type": "telemetry", "version": version}) + line(step(1)))
    for read in (telemetry.read, telemetry.newest, lambda path: list(telemetry.lines(path / telemetry.EVENTS))):
        with pytest.raises(InputError, match=f"recorded as version {version}.*up to version 1; update"):
            read(folder)


# --- taking back


def figures(events):
    return [(event["type"], event.get("step")) for event in events]


def standing(events):
    """What a list of events comes to, told from the first to the last."""
    kept = []
    for event in events:
        if event["type"] in ("resume", "start") and "step" in event:
            kept = [
                one
                for one in kept
                if one["type"] in ("resume", "start") or one.get("step", event["step"]) <= event["step"]
            ]
        kept.append(event)
    return kept


def test_a_resume_takes_back_later_steps(folder):
    told = [
        *(("start", 0), ("measure", 0), ("step", 1), ("join", None), ("step", 2), ("alarm", 2), ("step", 3)),
        *(("failed", None), ("resume", 1), ("step", 2), ("resume", 1), ("checkpoint", 1)),
    ]
    for kind, at in told:
        telemetry.append(folder, {"type": kind} | ({} if at is None else {"step": at}))
    assert figures(telemetry.read(folder)) == [
        *(("start", 0), ("measure", 0), ("step", 1), ("join", None), ("failed", None)),
        *(("resume", 1), ("resume", 1), ("checkpoint", 1)),
    ]


def test_a_start_takes_back_an_attempt_that_has_saved_nothing(folder):
    for kind, at in [("start", 0), ("measure", 0), ("step", 1), ("step", 2), ("start", 0), ("step", 1)]:
        telemetry.append(folder, {"type": kind, "step": at})
    assert figures(telemetry.read(folder)) == [("start", 0), ("measure", 0), ("start", 0), ("step", 1)]


def test_an_event_without_a_step_takes_nothing_back(folder):
    for event in (step(1), {"type": "start"}, {"type": "resume", "step": None}, {"type": "resume", "step": 0.5}):
        telemetry.append(folder, event)
    assert len(telemetry.read(folder)) == 4


@pytest.mark.parametrize("seed", range(30))
def test_taking_back_is_what_telling_it_in_order_comes_to(folder, seed):
    dice = random.Random(seed)
    events, now = [], 0
    for _ in range(80):
        kind = dice.choices(["step", "measure", "alarm", "failed", "resume", "start"], [12, 2, 2, 1, 3, 0.3])[0]
        now = now + 1 if kind == "step" else 0 if kind == "start" else now
        now = dice.randint(-1, now) if kind == "resume" else now
        events.append({"type": kind, "t": len(events)} | ({} if kind == "failed" else {"step": now}))
    write(folder, b"".join(map(line, events)))
    assert telemetry.read(folder) == standing(events)
    for kinds in (("measure",), ("step", "resume"), ()):
        assert telemetry.read(folder, kinds) == [e for e in standing(events) if e["type"] in kinds]


# --- line by line


def test_lines_go_on_from_where_they_were(folder):
    path = folder / telemetry.EVENTS
    events = [step(number, text="é" * number) for number in range(1, 20)]
    for event in events:
        telemetry.append(folder, event)
    found = list(telemetry.lines(path))
    assert [event for _, event in found] == events
    assert found[-1][0] == os.path.getsize(path)
    for place, (behind, _) in enumerate(found, start=1):
        assert record(folder)[behind - 1 : behind] == b"\n"
        assert [event for _, event in telemetry.lines(path, behind)] == events[place:]


def test_a_record_that_grows_byte_by_byte_is_read_whole(folder):
    events = [step(1), step(2, text="é"), {"type": "done", "step": 2}]
    content, found, behind = b"garbage\n" + b"".join(map(line, events)), [], 0
    for byte in content:
        add(folder, bytes([byte]))
        more = list(telemetry.lines(folder / telemetry.EVENTS, behind))
        behind = more[-1][0] if more else behind
        found += [event for _, event in more]
    assert found == events


def test_a_line_that_is_written_while_it_is_read_is_left_for_later(folder, monkeypatch):
    """The rest of a torn line may come at any moment, even between two reads of the same pass."""

    class Growing(io.FileIO):
        def readline(self, size):
            piece = super().readline(size)
            if piece and not piece.endswith(b"\n"):
                add(folder, line(step(2))[len(piece) :] + line(step(3)))
            return piece

    path = folder / telemetry.EVENTS
    write(folder, line(step(1)) + line(step(2))[:9])
    with monkeypatch.context() as patch:
        patch.setattr(telemetry, "open", Growing, raising=False)
        [(behind, event)] = telemetry.lines(path)
    assert event == step(1)
    assert [event for _, event in telemetry.lines(path, behind)] == [step(2), step(3)]


def test_a_line_of_any_length_is_not_held_in_memory(folder, monkeypatch):
    monkeypatch.setattr(telemetry, "LONGEST", 64)
    for size in (35, 36, 37, 63, 64, 65, 100, 128, 640, 1000):
        long = b"x" * size + line(step(9))  # whose end alone would be an event
        write(folder, line(step(1)) + long + line(step(2)) + long[:-1])
        assert [event for _, event in telemetry.lines(folder / telemetry.EVENTS)] == [step(1), step(2)]


# --- the newest


@pytest.mark.parametrize("block", [1, 2, 7, 30, 1000])
def test_the_newest_event_is_found_from_the_end(folder, monkeypatch, block):
    monkeypatch.setattr(telemetry, "BLOCK", block)
    for number in range(1, 12):
        telemetry.append(folder, step(number, text="x" * number**2))
        assert telemetry.newest(folder) == telemetry.read(folder)[-1] == step(number, text="x" * number**2)
        add(folder, b'{"type":"step","st')
        assert telemetry.newest(folder) == step(number, text="x" * number**2)


def test_the_end_of_a_line_is_not_taken_for_an_event(folder, monkeypatch):
    monkeypatch.setattr(telemetry, "BLOCK", len(line(step(9))))
    write(folder, line(step(1)) + b"x" + line(step(9)))
    assert telemetry.newest(folder) == step(1)


def test_the_newest_event_is_found_without_reading_the_rest(folder):
    write(folder, line(step(1)))
    with open(folder / telemetry.EVENTS, "r+b") as file:
        file.seek(1 << 26)
        file.write(b"\n" + line(step(2)))
    tracemalloc.start()
    try:
        assert telemetry.newest(folder) == step(2)
        assert tracemalloc.get_traced_memory()[1] < 1 << 21
    finally:
        tracemalloc.stop()
