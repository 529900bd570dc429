"""What watching costs: steps of a ViT-L/14 text tower with and without statistics, alarms and record, in one run.

python dev.py bench telemetry [--quick] [--json]

Two trainings of the same random tower take turns, step by step, one of them watched. Both clip their gradients, for
which the norms are needed anyhow. Every tenth step also looks at the size of the updates; a round is ten steps of each.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from gmp import telemetry
from gmp.alarms import Alarms
from gmp.clip import CLIP, CLIPConfig, TextConfig, VisionConfig, initialize
from gmp.config import RepairConfig
from gmp.control import Control
from gmp.events import Event
from gmp.pairs import Pairs
from gmp.trainer import begin, precision_of, set_up, train

RESULTS = Path(__file__).parent / "results" / "telemetry.json"
ROUND = 10  # steps
LARGE = CLIPConfig(
    TextConfig(768, 12, 12, 3072, 77, 49408, 768, "quick_gelu"), VisionConfig(32, 1, 2, 64, 16, 32, 768, "quick_gelu")
)


def captions(count: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Random ids of captions that are `tokens` long on average, end-of-text included."""
    ids = torch.randint(1, 40000, (count, 77), generator=generator)
    ids[:, 0] = 49406
    ends = torch.randint(tokens // 2, tokens + tokens // 2, (count,), generator=generator)
    return torch.where(torch.arange(77)[None] < ends[:, None], ids, 49407)


def training(batch: int, tokens: int, device: torch.device, watched: bool) -> Iterator[Event]:
    """Steps of a random ViT-L/14 text tower in GmP form, without an end."""
    generator = torch.Generator().manual_seed(0)
    config = RepairConfig(epochs=1000, batch=batch, anchors=(), lr=1e-6)
    clip = initialize(CLIP(LARGE), generator).to(device)
    optimizer = set_up(clip, config, device)
    pairs = Pairs(
        captions(4 * batch, tokens, generator),
        (1,) * (4 * batch),
        torch.randn(4 * batch, 768, generator=generator),
        None,
    )
    state = begin(clip, optimizer, pairs.counts, config, device)
    return train(state, pairs, {}, config, device, statistics=watched)


def watch(events: Iterator[Event], folder: Path) -> Iterator[Event]:
    """What a run does with every step beside training."""
    alarms, control = Alarms(), Control(folder, lambda: False, lambda: False)
    for event in events:
        event["t"] = round(time.time(), 3)
        telemetry.append(folder, event)
        for alarm in alarms.hear(event):
            telemetry.append(folder, alarm)
        list(control.obey(event["step"], {}))
        yield event


def seconds(events: Iterator[Event], device: torch.device) -> float:
    start = time.perf_counter()
    next(events)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(batch: int, tokens: int, rounds: int, device: torch.device) -> dict[str, float]:
    """Seconds of a step without and with watching, medians of rounds that were taken in turns."""
    with tempfile.TemporaryDirectory() as folder:
        plain = training(batch, tokens, device, watched=False)
        watched = watch(training(batch, tokens, device, watched=True), Path(folder))
        for _ in range(2):  # the first step makes buffers, and looks at the updates
            seconds(plain, device), seconds(watched, device)
        ratios, times = [], {"plain": [], "watched": []}
        for _ in tqdm(range(rounds), desc=f"batch {batch}, {tokens} tokens, {device.type}", file=sys.stderr):
            took = [(seconds(plain, device), seconds(watched, device)) for _ in range(ROUND)]
            sums = [sum(column) / ROUND for column in zip(*took, strict=True)]
            times["plain"].append(sums[0])
            times["watched"].append(sums[1])
            ratios.append(sums[1] / sums[0])
        size = (Path(folder) / telemetry.EVENTS).stat().st_size
    medians = {name: round(statistics.median(values), 5) for name, values in times.items()}
    return medians | {
        "watched_over_plain": round(statistics.median(ratios), 4),
        "bytes_per_step": size // (10 * rounds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small round, to see that it runs")
    parser.add_argument("--json", action="store_true", help="print all figures on the last line")
    options = parser.parse_args()
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    figures: dict[str, object] = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    for device in devices:
        sizes = ((32, 14, 5), (16, 57, 3)) if device.type == "cpu" else ((256, 14, 20), (1024, 14, 10))
        if options.quick:
            sizes = ((8, 14, 1),)
        for batch, tokens, rounds in sizes:
            name = f"{device.type}, batch {batch}, {tokens} tokens, {precision_of('auto', device)}"
            found = measure(batch, tokens, rounds, device)
            figures[name] = found
            times = f"{found['plain']:.3f} s a step, watched {found['watched']:.3f} s"
            print(f"{name}: {times}: × {found['watched_over_plain']}")
    if not options.quick:
        RESULTS.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
