"""How many pictures a second are decoded, embedded by a random ViT-L/14, and read back as features.

JPEGs are decoded to 224 pixels by 1, 2 and 4 threads, at a reduced scale where that is enough (draft) and in full.

python dev.py bench pictures [--json]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image

from gmp.clip import CLIP, CLIPConfig, TextConfig, VisionConfig, VisionTower, initialize, precision
from gmp.data.images import load_picture, load_pixels, normalize, square
from gmp.events import finish
from gmp.features import DTYPES, Features, embed_files, mapped
from gmp.files import read_header, write_safetensors

RESULTS = Path(__file__).parent / "results" / "pictures.json"
SIZE = 224
PICTURES = {(640, 480): 64, (4000, 3000): 8}  # how many of each are decoded
THREADS = (1, 2, 4)
ROUNDS = 3
CLIP_L = CLIPConfig(
    TextConfig(32, 1, 2, 64, 16, 64, 768, "quick_gelu"), VisionConfig(1024, 24, 16, 4096, 14, SIZE, 768, "quick_gelu")
)
EMBEDDED = {"cpu": (4, 1), "cuda": (256, 10)}  # pictures in a pass, passes
ROWS, SHARDS, WIDTH, TAKEN = 200_000, 50, 768, 4096  # features on disk, and rows of a step


def photo(width: int, height: int, generator: np.random.Generator) -> Image.Image:
    """Shapes of many sizes and a little grain, so that a JPEG of it is as large as one of a photo."""
    image = Image.new("RGB", (width, height))
    for cells in (4, 16, 64, 256):
        noise = generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        image = Image.blend(image, Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC), 0.4)
    grain = generator.normal(0, 4, (height, width, 1))
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


def write_photos(folder: Path) -> dict[tuple[int, int], list[Path]]:
    generator, found = np.random.default_rng(0), {}
    for (width, height), count in PICTURES.items():
        found[width, height] = [folder / f"{width}_{number}.jpg" for number in range(count)]
        for path in found[width, height]:
            photo(width, height, generator).save(path, quality=90)
    return found


def in_full(path: Path, size: int) -> torch.Tensor:
    return square(load_picture(path), size)


def per_second(count: int, work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Median of some rounds, after one that is not counted."""
    work()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return float(f"{count / statistics.median(seconds):.4g}")


def decoding(paths: list[Path]) -> dict[str, object]:
    """Pictures a second by way and threads, and by how many of 255 levels draft differs from full decoding."""
    found: dict[str, object] = {"kilobytes": round(statistics.mean(path.stat().st_size for path in paths) / 1000)}
    for name, load in (("draft", load_pixels), ("full", in_full)):
        for threads in THREADS:
            with ThreadPoolExecutor(threads) as pool:
                rate = per_second(len(paths), lambda: list(pool.map(lambda path: load(path, SIZE), paths)))  # noqa: B023
            found[f"{name}, {threads} threads"] = rate
    difference = torch.stack([load_pixels(p, SIZE).int() - in_full(p, SIZE).int() for p in paths[:4]]).abs()
    return found | {"levels_mean": round(difference.float().mean().item(), 3), "levels_most": difference.max().item()}


def embedding(tower: VisionTower, device: torch.device) -> dict[str, float]:
    """Pictures a second by precision, from bytes to features."""
    count, passes = EMBEDDED[device.type]
    generator, found = torch.Generator().manual_seed(0), {}
    pixels = torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)

    def run() -> None:
        for _ in range(passes):
            rows = tower(normalize(pixels.to(device))).half()
        rows.cpu()

    for name in ("fp32", "bf16"):
        with torch.no_grad(), precision(DTYPES[name], tower):
            found[name] = per_second(count * passes, run, 1 if device.type == "cpu" else ROUNDS)
    return found


def reading(folder: Path) -> dict[str, float]:
    """Rows a second of a step, of features that the system has in memory."""
    generator, shards = torch.Generator().manual_seed(0), []
    for number in range(SHARDS):
        path = folder / f"{number}.safetensors"
        rows = torch.randn(ROWS // SHARDS, WIDTH, generator=generator).half()
        write_safetensors({"features": rows}, path, {})
        shards.append(mapped(read_header(path), "features"))
    features = Features(shards, torch.randperm(ROWS, generator=generator))
    for start in range(0, ROWS, TAKEN):
        features[start : start + TAKEN]
    return {"rows": per_second(TAKEN, lambda: features[torch.randint(0, ROWS, (TAKEN,), generator=generator)], 9)}


def whole(tower: VisionTower, folder: Path, paths: list[Path]) -> dict[str, float]:
    """Pictures a second of `embed_files`, from the file to the cache."""
    names, keys = [path.name for path in paths], [f"{number:064x}" for number in range(len(paths))]
    start = time.perf_counter()
    finish(embed_files(tower, folder, names, keys, folder, precision="bf16"))
    return {"bf16, from file to cache": float(f"{len(paths) / (time.perf_counter() - start):.4g}")}


def lines(figures: dict[str, object], name: str = "") -> Iterator[str]:
    for key, value in figures.items():
        if isinstance(value, dict):
            yield from lines(value, f"{name}{key}: ")
        else:
            yield f"{name}{key}: {value}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print all figures on the last line")
    options = parser.parse_args()
    figures: dict[str, object] = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    tower = initialize(CLIP(CLIP_L), torch.Generator().manual_seed(0)).visual.requires_grad_(False)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        photos = write_photos(folder)
        figures["decoded_per_second"] = {f"{w} x {h}": decoding(paths) for (w, h), paths in photos.items()}
        figures["read_per_second"] = reading(folder)
        figures["embedded_per_second"] = {"cpu": embedding(tower, torch.device("cpu"))}
        if torch.cuda.is_available():
            figures["gpu"] = torch.cuda.get_device_name()
            device = torch.device("cuda")
            small = photos[640, 480]
            figures["embedded_per_second"]["cuda"] = embedding(tower.to(device), device) | whole(tower, folder, small)
    print("\n".join(lines(figures)))
    RESULTS.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
