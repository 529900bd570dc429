"""The line at a device: in order, over processes, and cleared of the dead."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import torch

from gmp.line import Place, ahead, device_name

ROOT = Path(__file__).parent.parent
STAND = """
import sys, pathlib, gmp.line
with gmp.line.Place("cpu", pathlib.Path(sys.argv[1])):
    print(1, flush=True)
    input()
"""


def in_another_process(run: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", STAND, str(run)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"1\n"
    return process


def test_the_first_comes_first(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    with Place("cpu", a) as first, Place("cpu", b) as second, Place("cpu", c) as third:
        assert first.ahead() == [] and second.ahead() == [a] and third.ahead() == [a, b]
        assert ahead("cpu", a) == [] and ahead("cpu", c) == [a, b]


def test_who_leaves_is_waited_for_no_longer(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    with Place("cpu", a) as first:
        with Place("cpu", b), Place("cpu", c) as third:
            assert third.ahead() == [a, b]
        with Place("cpu", c) as third:  # cancelled, and come back behind nobody but the first
            assert third.ahead() == [a]
        assert first.ahead() == []
    assert ahead("cpu", c) == []


def test_who_comes_later_stands_behind_even_if_places_before_are_free(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    first = Place("cpu", a).__enter__()
    with Place("cpu", b) as second:
        first.__exit__()
        with Place("cpu", c) as third:
            assert second.ahead() == [] and third.ahead() == [b]


def test_devices_have_lines_of_their_own(tmp_path):
    with Place("cpu", tmp_path / "a"), Place("cuda-0", tmp_path / "b") as other:
        assert other.ahead() == []
        assert ahead("cuda-0", tmp_path / "a") == []


def test_other_processes_are_waited_for_and_dead_ones_are_not(tmp_path, own_line):
    a, b = tmp_path / "a", tmp_path / "b"
    other = in_another_process(a)
    with Place("cpu", b) as mine:
        assert mine.ahead() == [a] and ahead("cpu", b) == [a]
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert mine.ahead() == [] and ahead("cpu", b) == []
    left = {path.name for path in own_line.rglob("*") if path.is_file()}
    assert left == {"line.lock"}


def test_a_cpu_is_a_cpu():
    assert device_name(torch.device("cpu")) == "cpu"
