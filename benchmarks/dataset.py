"""How long a data set's pictures take to be looked at: for the first time, after a kill, and from the cache; and how
long it takes to find near duplicates among a million.

The pictures are JPEGs of 512 pixels (short side) in a temporary folder, with shapes of many sizes and grain, so that
they are as large as photos are. The goal: 100,000 in less than 5 minutes on 2 cores, the second time in seconds.

python dev.py bench dataset [--count 100000] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

from gmp.data.perceptual import near_groups
from gmp.data.survey import survey
from gmp.events import finish

RESULTS = Path(__file__).parent / "results" / "dataset.json"
SHORT = 512
SHAPES = ((512, 512), (768, 512), (512, 768), (683, 512), (910, 512))
PER_FOLDER = 1000
HASHES, PLANTED, RADIUS = 1_000_000, 1000, 6
KILLED_AT = 0.4  # of the pictures
SURVEY = (
    "import sys; sys.path.insert(0, sys.argv[1])\n"
    "from pathlib import Path\n"
    "from gmp.data.survey import survey\n"
    "root, cache = Path(sys.argv[2]), Path(sys.argv[3])\n"
    "names = Path(sys.argv[4]).read_text().split()\n"
    "for event in survey(root, names, cache):\n"
    "    if event['stage'] == 'look at pictures': print(event['done'], flush=True)\n"
)


def draw(folder: Path, first: int, count: int) -> None:
    """JPEGs first … first + count - 1. Grounds are drawn once; each picture is a part of two of them, and grain."""
    generator = np.random.default_rng(first)
    grounds = []
    for cells in (4, 12, 40, 160):
        noise = generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        grounds.append(np.asarray(Image.fromarray(noise).resize((1536, 1536), Image.Resampling.BICUBIC), np.int16))
    grain = generator.normal(0, 5, (1536, 1536, 1)).astype(np.int16)
    for number in range(first, first + count):
        width, height = SHAPES[generator.integers(len(SHAPES))]
        parts = []
        for layer in (*grounds, grain):
            top, left = generator.integers(0, 1536 - height), generator.integers(0, 1536 - width)
            parts.append(layer[top : top + height, left : left + width])
        weights = generator.dirichlet(np.ones(len(grounds)))
        mixed = sum((weight * part for weight, part in zip(weights, parts, strict=False)), parts[-1])
        path = folder / f"{number // PER_FOLDER:04d}" / f"{number:07d}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(mixed.clip(0, 255).astype(np.uint8)).save(path, quality=85)


def write_pictures(folder: Path, count: int) -> list[str]:
    starts = range(0, count, PER_FOLDER)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(draw, folder, start, min(PER_FOLDER, count - start)) for start in starts]
        for number, job in enumerate(jobs, 1):
            job.result()
            print(f"drawn: {min(number * PER_FOLDER, count)} of {count}", file=sys.stderr)
    return [f"{number // PER_FOLDER:04d}/{number:07d}.jpg" for number in range(count)]


def timed(root: Path, names: list[str], cache: Path) -> dict[str, object]:
    start = time.perf_counter()
    found = finish(survey(root, names, cache))
    seconds = time.perf_counter() - start
    if found.faults:
        sys.exit(f"pictures of the benchmark cannot be read: {found.faults}")
    return {"seconds": round(seconds, 2), "not read again": found.remembered}


def killed(root: Path, names: list[str], cache: Path, listed: Path) -> dict[str, object]:
    """A process is killed in the middle, another one goes on. The seconds of both, and what the second had to read."""
    start = time.perf_counter()
    command = [sys.executable, "-c", SURVEY, Path(__file__).resolve().parents[1], root, cache, listed]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) >= KILLED_AT * len(names):
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    before = time.perf_counter() - start
    return {"killed at": int(line), "seconds before": round(before, 2)} | timed(root, names, cache)


def compared() -> dict[str, object]:
    """Random hashes, some of them again with a few bits changed. All of these must be found."""
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 2**64, HASHES, dtype=np.uint64)
    bits = generator.permuted(np.tile(np.arange(64), (PLANTED, 1)), axis=1)[:, :RADIUS].astype(np.uint64)
    flips = np.bitwise_or.reduce(np.uint64(1) << bits, axis=1)
    hashes[-PLANTED:] = hashes[:PLANTED] ^ flips
    start = time.perf_counter()
    groups = finish(near_groups(hashes, RADIUS))
    seconds = time.perf_counter() - start
    planted = (groups[-PLANTED:] == groups[:PLANTED]).sum().item()
    others = (groups[:-PLANTED] != np.arange(HASHES - PLANTED)).sum().item()
    return {"hashes": HASHES, "distance": RADIUS, "seconds": round(seconds, 2), "planted": PLANTED,
            "planted that were found": planted, "chance pairs": others}  # fmt: skip


def lines(figures: dict[str, object], name: str = "") -> Iterator[str]:
    for key, value in figures.items():
        if isinstance(value, dict):
            yield from lines(value, f"{name}{key}: ")
        else:
            yield f"{name}{key}: {value}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000, help="pictures (100000), about 80 kB each")
    parser.add_argument("--json", action="store_true", help="print all figures on the last line")
    options = parser.parse_args()
    figures: dict[str, object] = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load before": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "pictures": options.count,
    }
    figures["near duplicates"] = compared()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        root = folder / "pictures"
        root.mkdir()
        names = write_pictures(root, options.count)
        (folder / "names").write_text("\n".join(names), encoding="utf-8")
        figures["kilobytes a picture"] = round(sum((root / name).stat().st_size for name in names) / len(names) / 1000)
        figures["first time"] = timed(root, names, folder / "cache")
        rate = options.count / figures["first time"]["seconds"]
        figures["pictures a second"] = round(rate)
        figures["minutes for 100,000"] = round(100_000 / rate / 60, 2)
        figures["second time"] = timed(root, names, folder / "cache")
        figures["killed and gone on"] = killed(root, names, folder / "other", folder / "names")
    figures["megabytes of memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print("\n".join(lines(figures)))
    RESULTS.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
