"""What a long run costs to look at: `python dev.py bench history`.

Records a run of a million steps of SDXL's clip_g in a temporary folder (8 GB, a few minutes), follows it from its
beginning, and opens it from its snapshot as the panel does. For comparison, the record's first steps are read with the
json module alone, and the run is opened without a snapshot at a thousandth of its length. Prints seconds and bytes,
writes JSON to `results/`; `--steps N` for another length.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gmp import telemetry  # noqa: E402
from gmp.events import Event  # noqa: E402
from gmp.history import SNAPSHOT, History  # noqa: E402

ROLES = ("r", "theta", "attention", "layer_norm", "mlp")
LAYERS = ["text.embedding", *(f"text.{block}.{role}" for block in range(32) for role in ROLES)]
LAYERS += ["text.layer_norm", "text.projection", "logit_scale"]
KINDS = 997  # different steps, told again and again; a prime, so that no bucket holds the same ones
SAVE_EVERY, MEASURE_EVERY = 500, 2000
PARSED = 2000  # steps that the json module reads


def step(generator: np.random.Generator, update: bool) -> Event:
    """A `step` event with as many digits as real ones have; its number comes later."""
    loss, anchor, norm, cosine, rate = generator.lognormal(0, 1, 5).tolist()
    norms = dict(zip(LAYERS, generator.lognormal(-4, 2, len(LAYERS)).tolist(), strict=True))
    event = {
        "type": "step",
        "steps": 0,
        "epoch": 1,
        "loss": loss + anchor,
        "losses": {"contrastive": loss, "original:penultimate=0.3": anchor},
        "lr": 7e-6 * rate,
        "lrs": {"1": 7e-6 * rate, "0.1": 7e-7 * rate},
        "logit_scale": 4.6052,
        "grad_norm": norm,
        "grad_norms": norms,
        "non_finite": 0.0,
        "text_cosine": cosine / 10,
        "skipped": 0,
        "pairs_per_second": 1000 * rate,
        "tokens_per_second": 9000 * rate,
        "memory": 8_123_456_789,
    }
    if update:
        event["update_ratios"] = dict(zip(LAYERS, generator.lognormal(-9, 1, len(LAYERS)).tolist(), strict=True))
    return event


def write_record(folder: Path, steps: int) -> None:
    """The record of a whole run; all but numbers and times are put together once."""
    generator = np.random.default_rng(0)
    text = [json.dumps(step(generator, update))[1:-1].encode() for _ in range(KINDS) for update in (False, True)]
    moved = dict(zip(LAYERS, generator.lognormal(-6, 1, len(LAYERS)).tolist(), strict=True))
    telemetry.append(folder, {"type": "start", "step": 0, "steps": steps, "t": 1.0})
    with open(folder / telemetry.EVENTS, "ab", buffering=1 << 20) as file:
        for number in range(1, steps + 1):
            kind = text[2 * (number % KINDS) + (number % 10 == 1)]
            file.write(b'{%b, "step": %d, "t": %.3f}\n' % (kind, number, 1785e6 + number))
            if number % MEASURE_EVERY == 0:
                losses = {"contrastive": 1.2345678, "loss": 1.3456789}
                event = {"type": "measure", "step": number, "held_out": losses, "moved": moved, "t": 1785e6}
                file.write(json.dumps(event).encode() + b"\n")
            if number % SAVE_EVERY == 0:
                file.write(json.dumps({"type": "checkpoint", "step": number, "t": 1785e6}).encode() + b"\n")


def first_steps(path: Path, count: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        for line in file:
            if b'"type": "step"' in line[:20]:
                yield line
                count -= 1
                if not count:
                    return


def seconds(work: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def opened(folder: Path) -> bytes:
    """What the panel gets when it opens a run."""
    history = History.load(folder)
    history.follow()
    return json.dumps(history.whole(), allow_nan=False, separators=(",", ":")).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        long, short = Path(name) / "long", Path(name) / "short"
        for folder, steps in ((long, options.steps), (short, max(1, options.steps // 1000))):
            folder.mkdir()
            write_record(folder, steps)
        record = long / telemetry.EVENTS
        lines = list(first_steps(record, PARSED))
        parse, _ = seconds(lambda: [json.loads(line) for line in lines])
        history = History(long)
        build, _ = seconds(history.follow)
        save, _ = seconds(lambda: history.save(long / SNAPSHOT))
        load, loaded = seconds(lambda: History.load(long))
        follow, _ = seconds(loaded.follow)
        whole, answer = seconds(loaded.whole)
        dump, text = seconds(lambda: json.dumps(answer, allow_nan=False, separators=(",", ":")))
        since, news = seconds(lambda: json.dumps(loaded.since(options.steps - 10), separators=(",", ":")))
        if answer != history.whole():
            sys.exit("the history that was loaded is not the one that was saved")
        from_snapshot, _ = seconds(lambda: opened(long))
        from_record, _ = seconds(lambda: opened(short))
        figures = {
            "steps": options.steps,
            "layers": len(LAYERS),
            "stride": history.stride,
            "seconds": {
                "build": build,
                "save": save,
                "load": load,
                "follow": follow,
                "whole": whole,
                "dumps": dump,
                "open": from_snapshot,
                "since 10 steps ago": since,
                "open a thousandth of it without a snapshot": from_record,
            },
            "bytes": {
                "record": record.stat().st_size,
                "snapshot": (long / SNAPSHOT).stat().st_size,
                "whole": len(text),
                "since 10 steps ago": len(news),
            },
        }
    per_step, json_per_step = build / options.steps, parse / len(lines)
    print(f"{options.steps:,} steps of {len(LAYERS)} layers, record of {figures['bytes']['record'] / 1e9:.2f} GB")
    for what, value in figures["seconds"].items():
        print(f"  {what:44}{value:>10.4f} s")
    for what, value in figures["bytes"].items():
        print(f"  {what:44}{value:>12,} bytes")
    print(f"  {per_step * 1e6:.0f} µs to read and condense a step, {json_per_step * 1e6:.0f} µs of it for json.loads")
    report = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "figures": figures,
        "ratios": {
            "build_over_json_loads": per_step / json_per_step,
            "open_over_build": from_snapshot / build,
            "whole_over_record_bytes": len(text) / figures["bytes"]["record"],
        },
    }
    (ROOT / "benchmarks" / "results" / "history.json").write_text(json.dumps(report, indent=2) + "\n")
    if options.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
