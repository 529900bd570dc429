"""How much memory and time exact retrieval takes: `python dev.py bench retrieval`.

100,000 pictures and 500,000 captions, 768 numbers each, in fp32 and in fp16, each in a process of its own whose peak of
resident memory the operating system tells. Every block of scores takes the same memory and time, so only the first
`--blocks` of them are computed, and the time of all is extrapolated; `--whole` computes all. Seconds of the processor,
all cores together, depend less on other programs than those of the clock. Beside it the plain way, a full table of
scores and a sort, as far as it fits. Writes JSON to `results/`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PICTURES, CAPTIONS, WIDTH = 100_000, 500_000, 768
LIMIT = 4_000_000_000  # bytes
WARM_UP = 4  # blocks that are not timed


def peak() -> int:
    """Bytes of resident memory at the most, of this process."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def features(count: int, dtype: str, seed: int):
    """Random features, a part at a time, so that making them takes no more memory than they do."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    made = torch.empty(count, WIDTH, dtype=getattr(torch, dtype))
    for rows in made.split(10_000):
        rows.copy_(torch.randn(rows.shape, generator=generator))
    return made


def ours(pictures: int, captions: int, dtype: str, blocks: int | None) -> dict[str, object]:
    from gmp.measure import rank_pairs, resample

    images, texts = features(pictures, dtype, 0), features(captions, dtype, 1)
    held = peak()
    events = rank_pairs(images, texts, [i * pictures // captions for i in range(captions)])
    start = time.perf_counter()
    total = next(events)["total"]
    first = (
        time.perf_counter() - start
    )  # with the score of every caption and its own picture, which is all there is beside
    for _ in islice(events, WARM_UP):
        pass
    start, used, timed = time.perf_counter(), time.process_time(), 0
    places = None
    while blocks is None or timed < blocks:
        try:
            next(events)
        except StopIteration as end:
            places = end.value
            break
        timed += 1
    each, used = (time.perf_counter() - start) / timed, (time.process_time() - used) / timed
    found = {"blocks": total, "blocks_timed": timed, "seconds_per_block": each, "processor_seconds_per_block": used}
    found["bytes_with_features_alone"] = held
    found["seconds" if places else "seconds_extrapolated"] = first + each * total
    if places:
        start = time.perf_counter()
        for _ in resample(places):
            pass
        found["seconds_of_intervals"] = time.perf_counter() - start
    return found | {"peak_bytes": peak()}


def intervals(pictures: int, captions: int) -> dict[str, object]:
    """1000 resamples of random ranks."""
    import torch

    from gmp.measure import Places, resample

    generator = torch.Generator().manual_seed(0)
    ranks = [torch.randint(1000, (count,), generator=generator) for count in (captions, pictures)]
    start = time.perf_counter()
    for _ in resample(Places(*ranks, torch.arange(captions) * pictures // captions)):
        pass
    return {"seconds": time.perf_counter() - start, "peak_bytes": peak()}


def plain(pictures: int, captions: int) -> dict[str, object]:
    """All scores at once in fp32, and a sort in both directions, as open_clip's `get_clip_metrics` computes it."""
    import torch

    images, texts = features(pictures, "float32", 0), features(captions, "float32", 1)
    start = time.perf_counter()
    scores = torch.nn.functional.normalize(texts, dim=-1) @ torch.nn.functional.normalize(images, dim=-1).T
    for table in (scores, scores.T):
        torch.argsort(table, descending=True)
    return {"seconds": time.perf_counter() - start, "peak_bytes": peak()}


def child(*arguments: object) -> dict[str, object]:
    command = [sys.executable, __file__, "--child", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def told(name: str, found: dict[str, object]) -> str:
    time_of = found.get("seconds", found.get("seconds_extrapolated"))
    used = found.get("processor_seconds_per_block", 0) * found.get("blocks", 0)
    cores = f", {used:.0f} s of the processor" if used else ""
    how = "" if "seconds" in found else f", extrapolated from {found['blocks_timed']} of {found['blocks']} blocks"
    return f"{name:<44} {found['peak_bytes'] / 1e9:6.2f} GB  {time_of:9.1f} s{cores}{how}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=60, help="of scores, that are timed (60)")
    parser.add_argument("--whole", action="store_true", help="compute all of them")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, *arguments = json.loads(options.child)
        print(json.dumps({"ours": ours, "plain": plain, "intervals": intervals}[name](*arguments)))
        return
    blocks = None if options.whole else options.blocks
    small = (5_000, 25_000)
    runs = {
        f"{PICTURES:,} × {CAPTIONS:,}, fp32": child("ours", PICTURES, CAPTIONS, "float32", blocks),
        f"{PICTURES:,} × {CAPTIONS:,}, fp16": child("ours", PICTURES, CAPTIONS, "float16", blocks),
        f"{PICTURES:,} × {CAPTIONS:,}, intervals alone": child("intervals", PICTURES, CAPTIONS),
        f"{small[0]:,} × {small[1]:,}, fp32": child("ours", *small, "float32", None),
        f"{small[0]:,} × {small[1]:,}, plain": child("plain", *small),
    }
    for name, found in runs.items():
        print(told(name, found))
    largest = max(found["peak_bytes"] for name, found in runs.items() if not name.endswith("plain"))
    kept = "holds" if largest < LIMIT else "does NOT hold"
    print(f"at most {LIMIT / 1e9:.0f} GB in all: {kept}, {largest / 1e9:.2f} GB")
    result = {
        "machine": {"python": platform.python_version(), "cpus": os.cpu_count(), "system": platform.platform()},
        "width": WIDTH,
        "limit_bytes": LIMIT,
        "runs": runs,
    }
    path = ROOT / "benchmarks" / "results" / "retrieval.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(result))
    if largest >= LIMIT:
        sys.exit(1)


if __name__ == "__main__":
    main()
