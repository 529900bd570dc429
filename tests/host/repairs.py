"""Repairs of the demo world in a running ComfyUI, and what they have recorded."""

from __future__ import annotations

import json

from tests.host.graphs import demo

LONG = {"epochs": 1000, "save_every": 5}


def only(prompt: dict, *names: str) -> dict:
    """A part of a prompt, with the nodes that it needs."""
    kept: dict = {}
    todo = list(names)
    while todo:
        name = todo.pop()
        kept[name] = prompt[name]
        todo += [v[0] for v in prompt[name]["inputs"].values() if isinstance(v, list) and v[0] not in kept]
    return kept


def waiting(nodes: dict, seed: int, on: str = "GmPRepair", **settings: object) -> dict:
    """The demo's repair with a seed of its own, which makes it a run of its own."""
    prompt = demo(nodes)
    prompt["GmPRepair"]["inputs"] |= {"seed": seed, "wait": on == "GmPRepair"} | settings
    prompt["GmPRepairedTextEncoder"]["inputs"]["wait"] = on == "GmPRepairedTextEncoder"
    prompt["GmPSaveTextEncoder"]["inputs"]["filename_prefix"] = f"clip/seed_{seed}"
    return prompt


def events(host, run: str) -> list[dict]:
    path = host.output / "gmp_runs" / run / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def steps(host, run: str) -> int:
    return max((event["step"] for event in events(host, run) if event["type"] == "step"), default=0)


def fresh_run(host, known: set[str]) -> str:
    return host.until(lambda: next(iter(host.runs().keys() - known), None))


def start(host, nodes: dict, seed: int, **settings: object) -> str:
    """A run that goes on in the background, for long enough, from its third step on."""
    known = set(host.runs())
    prompt = only(waiting(nodes, seed, on="none", **LONG | settings), "GmPRepair")
    assert host.run(prompt).status == "success"
    run = fresh_run(host, known)
    host.until(lambda: steps(host, run) >= 3)
    return run


def end(host, run: str) -> None:
    """Discards a run, whatever it is doing."""
    host.ask(run, "discard")
    host.until(lambda: run not in host.runs())
