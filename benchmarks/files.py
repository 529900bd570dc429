"""What a 7 GB checkpoint costs: `python dev.py bench files`.

Writes an SDXL checkpoint of real names and sizes (clip_l random, the rest a hole in a sparse file), then, each in a
process of its own: inspects it, takes clip_l out, reads clip_l for a repair, and, for comparison, loads the file with
the safetensors library as scripts do. Prints seconds, peak memory and bytes read; writes JSON to `results/`. Linux.
"""

from __future__ import annotations

import json
import math
import os
import platform
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gmp.layouts.canonical import expected  # noqa: E402
from gmp.layouts.huggingface import piece  # noqa: E402

L = {"vocab": 49408, "width": 768, "context": 77, "3 width": 2304, "mlp": 3072, "embed": 768}
G = {"vocab": 49408, "width": 1280, "context": 77, "3 width": 3840, "mlp": 5120, "embed": 1280}
UNET = (1680, (1240, 1240))  # tensors and shape: 5.2 GB in fp16, as SDXL's UNet
VAE = (248, (580, 580))

# Run in a process of its own; what Python and torch read and need to start is told apart from the work.
PROGRAM = """
import json, re, time
{prepare}
read = lambda: int(open("/proc/self/io").read().split()[1])
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
memory, before, start = peak(), read(), time.perf_counter()
{work}
print(json.dumps({{"seconds": time.perf_counter() - start, "bytes_read": read() - before,
                  "memory_before": memory, "peak_memory": peak()}}))
"""
CONTENDERS = {
    "inspect": ("from gmp.cli import main", "main(['inspect', {file!r}])"),
    "take clip_l out": ("import torch; from gmp.cli import main", "main(['convert', {file!r}, '--out', {out!r}])"),
    "read clip_l": ("import torch; from gmp.layouts import read_text", "tower = read_text({file!r}, 'clip_l')"),
    "safetensors load_file": ("import torch; from safetensors.torch import load_file", "state = load_file({file!r})"),
}


def tensors() -> dict[str, tuple[int, ...]]:
    """Names and shapes of an SDXL checkpoint; clip_l's and clip_g's are the real ones."""
    result: dict[str, tuple[int, ...]] = {}
    for prefix, (count, shape) in (("model.diffusion_model.x", UNET), ("first_stage_model.decoder.x", VAE)):
        result |= {f"{prefix}.{number}.weight": shape for number in range(count)}
    for name, symbols in expected("text", range(12)).items():
        if name not in ("text_projection", "logit_scale"):
            keys = piece(name).keys
            shape = tuple(L.get(symbol, symbol) for symbol in symbols)
            shape = (shape[0] // len(keys), *shape[1:])
            result |= {f"conditioner.embedders.0.transformer.{key}": shape for key in keys}
    for name, symbols in expected("text", range(32)).items():
        result[f"conditioner.embedders.1.model.{name}"] = tuple(G.get(symbol, symbol) for symbol in symbols)
    return result


def write_checkpoint(path: Path) -> int:
    """A sparse safetensors file of these tensors in fp16; returns the bytes of clip_l."""
    entries, end, filled = {}, 0, []
    for name, shape in sorted(tensors().items()):
        begin, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
        if name.startswith("conditioner.embedders.0."):
            filled.append((begin, end))
    header = json.dumps(entries).encode()
    start = 8 + len(header)
    generator = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(start + end)
        for begin, stop in filled:
            file.seek(start + begin)
            noise = torch.randn((stop - begin) // 2, generator=generator).mul_(0.02).half()
            file.write(noise.view(torch.uint8).numpy().data)
    return sum(stop - begin for begin, stop in filled)


def measure(prepare: str, work: str) -> dict[str, float]:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(prepare=prepare, work=work)], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1]) | {"process_seconds": time.perf_counter() - start}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "sdxl.safetensors", Path(folder) / "clip_l.safetensors"
        taken = write_checkpoint(file)
        size, on_disk = file.stat().st_size, file.stat().st_blocks * 512
        print(f"checkpoint of {size / 1e9:.2f} GB ({on_disk / 1e6:.0f} MB on disk), clip_l of {taken / 1e6:.0f} MB")
        figures = {
            name: measure(prepare, work.format(file=str(file), out=str(out)))
            for name, (prepare, work) in CONTENDERS.items()
        }
    print(f"{'':24}{'process':>10}{'work':>10}{'peak':>10}{'of it work':>12}{'read':>10}")
    for name, row in figures.items():
        print(
            f"{name:24}{row['process_seconds']:>8.2f} s{row['seconds']:>8.2f} s{row['peak_memory'] / 1e6:>7.0f} MB"
            f"{(row['peak_memory'] - row['memory_before']) / 1e6:>9.0f} MB{row['bytes_read'] / 1e6:>7.0f} MB"
        )
    out_of, whole = figures["take clip_l out"], figures["safetensors load_file"]
    report = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "checkpoint_bytes": size,
        "clip_l_bytes": taken,
        "figures": figures,
        "ratios": {
            "peak_over_taken_plus_300_MB": out_of["peak_memory"] / (taken + 300e6),
            "load_file_peak_over_ours": whole["peak_memory"] / out_of["peak_memory"],
            "bytes_read_over_taken": out_of["bytes_read"] / taken,
        },
    }
    (ROOT / "benchmarks" / "results" / "files.json").write_text(json.dumps(report, indent=2) + "\n")
    if "--json" in sys.argv:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
