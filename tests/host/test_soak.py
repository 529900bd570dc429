"""Twenty runs and ten clients for three minutes, two of them deaf: nobody waits for another, and nothing piles up."""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from pathlib import Path

import psutil

from tests.host.conftest import PYTHON
from tests.host.graphs import node
from tests.host.repairs import LONG, end, fresh_run, only, steps, waiting

SECONDS = 180
RUNS = 20
DEAF = 2


def test_soak(host, nodes):
    runs = []
    for seed in range(300, 300 + RUNS):
        known = set(host.runs())
        prompt = only(waiting(nodes, seed, on="none", **LONG | {"save_every": 200}), "GmPRepair")
        assert host.run(prompt).status == "success"
        runs.append(fresh_run(host, known))
        host.until(lambda: steps(host, runs[0]) >= 3)  # at the first one: places in the line are taken when prepared
    host.until(lambda: sum(one["state"] == "waiting" for one in host.runs().values()) == RUNS - 1)

    host.run({"lag": node("GmPTestLoopLag")})
    script = Path(__file__).parent / "clients.py"
    clients = subprocess.Popen([PYTHON, script, str(host.port), str(SECONDS), str(DEAF)], stdout=subprocess.PIPE)
    memory, process = [], psutil.Process(host.process.pid)
    while clients.poll() is None:
        memory.append(process.memory_info().rss)
        time.sleep(2)
    seen = json.loads(clients.stdout.read())
    lag, collection = map(float, host.run({"lag": node("GmPTestLoopLag")}).outputs["lag"])

    hearing = [client for client in seen if not client["deaf"]]
    assert len(seen) == 10 and len(hearing) == 10 - DEAF
    trained = steps(host, runs[0])
    figures = {"lag": lag, "longest garbage collection": collection, "steps": trained, "clients": seen}
    print(json.dumps(figures | {"memory": memory[:: len(memory) // 6]}))
    assert sum(client["errors"] for client in seen) == 0
    assert all(client["events"] > SECONDS for client in hearing), hearing  # more than one a second
    assert all(client["events"] < 6 * SECONDS and client["largest"] < 4200 for client in hearing), hearing
    assert all(client["steps"] > 0.8 * trained for client in seen)
    assert lag < 0.1
    third = len(memory) // 3
    early, late = statistics.median(memory[third : 2 * third]), statistics.median(memory[-third:])
    assert late < early + 20 * 2**20, [size // 2**20 for size in memory]
    for run in reversed(runs):
        end(host, run)
