"""Who is at work in a folder: alive is only who is alive."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from gmp.errors import InputError
from gmp.owner import LOCK, OWNER, own, owner

ROOT = Path(__file__).parent.parent
HOLD = """
import sys, pathlib, gmp.owner
with gmp.owner.own(pathlib.Path(sys.argv[1]), "cpu"):
    print(1, flush=True)
    input()
"""


def held_by_another(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"1\n"
    return process


def test_nobody_owns_an_empty_folder(tmp_path):
    assert owner(tmp_path) is None
    assert list(tmp_path.iterdir()) == []  # looking leaves nothing behind


def test_the_owner_is_this_process_while_it_holds_the_folder(tmp_path):
    with own(tmp_path, "cuda-1"):
        mine = owner(tmp_path)
        assert (mine.pid, mine.device) == (os.getpid(), "cuda-1")
        assert abs(mine.started - psutil.Process().create_time()) < 1
    assert owner(tmp_path) is None and not (tmp_path / OWNER).exists()


def test_a_second_owner_is_refused_by_name(tmp_path):
    other = held_by_another(tmp_path)
    with pytest.raises(InputError, match=f"being trained by process {other.pid}"), own(tmp_path, "cpu"):
        pass
    assert owner(tmp_path).pid == other.pid
    other.communicate(b"\n")
    with own(tmp_path, "cpu"):
        pass


def test_a_killed_owner_is_gone(tmp_path):
    other = held_by_another(tmp_path)
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / OWNER).exists()  # it could not clean up
    assert owner(tmp_path) is None
    with own(tmp_path, "cpu"):
        assert owner(tmp_path).pid == os.getpid()


@pytest.mark.parametrize("change", [{"started": 1.0}, {"pid": 2**22 + 1}])
def test_a_lock_that_outlives_its_process_has_no_owner(tmp_path, change):
    """As a child process that has inherited it does; and another process may have got the same id since."""
    with own(tmp_path, "cpu"):
        path = tmp_path / OWNER
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        assert owner(tmp_path) is None


def test_a_holder_on_another_machine_is_trusted(tmp_path):
    with own(tmp_path, "cpu"):
        path = tmp_path / OWNER
        path.write_text(json.dumps(json.loads(path.read_text()) | {"machine": "elsewhere", "pid": 1, "started": 0.0}))
        assert owner(tmp_path).machine == "elsewhere"


def test_many_who_look_do_not_take_each_other_for_the_owner(tmp_path):
    FileLock(tmp_path / LOCK).acquire().lock.release()
    seen = []

    def look():
        seen.extend(owner(tmp_path) for _ in range(50))

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [None] * 200
