"""Starts processes of processes.py side by side, and kills them at the latest when a test ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
LONGEST = 150  # seconds, after which a test's processes are killed
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen:
    """A process in a session of its own, so that a signal to its group does not reach the tests."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | ONE_THREAD | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


class Started:
    """Processes side by side, with the environment that torchrun gives them."""

    def __init__(self, case: str, size: int, folder: Path):
        folder.mkdir(exist_ok=True)
        shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.processes = [
            start(["-m", "tests.processes", case, str(folder)], shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(size)
        ]

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            end(process)

    def wait(self, ranks: slice = slice(None)) -> list[int]:
        """Exit codes, once these processes have ended."""
        until = time.monotonic() + LONGEST
        codes, self.err = [], ""
        for process in self.processes[ranks]:
            self.err += process.communicate(timeout=max(1, until - time.monotonic()))[1]
            codes.append(process.returncode)
        return codes


class Torchrun:
    """torchrun and what it has started."""

    def __init__(self, size: int, *arguments: object, restarts: int = 0):
        options = ["--nproc_per_node", str(size), "--max_restarts", str(restarts), "--monitor_interval", "0.1"]
        place = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
        given = ["-m", "torch.distributed.run", *options, *place, "-m", *map(str, arguments)]
        self.process = start(given, {})

    def __enter__(self) -> Torchrun:
        return self

    def __exit__(self, *_) -> None:
        end(self.process)

    def wait(self) -> tuple[int, str, str]:
        """Exit code, standard output, standard error, once it has ended."""
        out, err = self.process.communicate(timeout=LONGEST)
        return self.process.returncode, out, err


def end(process: subprocess.Popen) -> None:
    """Kills a process with all that it has started."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        children = []
    process.kill()
    for child in children:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            pass
    process.communicate()
