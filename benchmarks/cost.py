"""What a repair costs at a size that nobody has tried: a model of its time, with constants from `speed.py`'s results.

python dev.py bench cost [--write] [--json]

Two measured sizes of step give the constants of this machine, two others are predicted and compared. Then: 1 million,
100 million and 2 billion pairs on 1, 8 and 512 GPUs. `--write` puts the tables into docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from contenders import arithmetic  # noqa: E402
from contenders.task import LARGE, captions  # noqa: E402

from gmp.tokenizer import lengths  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "speed.json"
PAGE = ROOT / "docs" / "scale.md"
SHORT = 14  # tokens of a caption on average
WIDTH = LARGE.text.embed_dim
PARAMETERS = 123_650_305 + 12 * (3072 + 768)  # text tower, its projection, logit scale; r of the MLPs
MOVED = 44  # bytes per parameter that an optimizer step and the gradients' norms read and write
CHECKPOINT = 12 * PARAMETERS  # bytes: weights and two moments in fp32
EVERY = 200  # steps between two checkpoints
OF_PAIR = 2 * WIDTH + 4 * LARGE.text.context_length + 88  # bytes of a pair in a shard: features, ids, keys, groups
OF_PICTURE = 110_000  # bytes of a JPEG of 640 × 480 pixels
PER_GPU, MOST = 4096, 32_768  # pairs of a step: on one GPU, and of all together
BUCKETS = 15  # in which gradients are summed (`gmp.distributed.BUCKET`)
CORES = 16  # for each GPU
DECODED = 180.0  # pictures per second and core, where it was not measured
SIZES = (1_000_000, 100_000_000, 2_000_000_000)
GPUS = (1, 8, 512)


@dataclass(frozen=True)
class Machine:
    """One process's constants. Rates in operations or bytes per second."""

    text_rate: float  # of a step's products of matrices, with all that goes with them
    vision_rate: float  # the same of an embedding
    loss_rate: float  # of products in fp32
    fixed: float  # seconds of a step that do not grow with its pairs: optimizer, statistics, starting kernels
    decode: float  # pictures per second
    link: float  # between processes, in one direction
    latency: float  # seconds until the next process has got something
    disk: float


@dataclass(frozen=True)
class Step:
    """Seconds of one step, by what takes them."""

    text: float
    again: float  # the forward pass without a graph: of several processes, or of several pieces
    loss: float
    gather: float
    gradients: float
    fixed: float
    checkpoint: float

    @property
    def seconds(self) -> float:
        return sum(asdict(self).values())


# NVIDIA's data sheet of the H100 SXM: 989 TFLOP/s dense in bf16, 67 in fp32, NVLink 450 GB/s in one direction; its
# neighbours in a cluster by InfiniBand NDR, 50 GB/s per GPU. What is reached of them is assumed: a half in bf16 for
# text, 0.55 for pictures, 0.7 in fp32, 0.8 of a link. A step starts 2,000 kernels at 5 µs; 3.35 TB/s move its AdamW.
H100 = Machine(
    text_rate=0.5 * 989e12,
    vision_rate=0.55 * 989e12,
    loss_rate=0.7 * 67e12,
    fixed=2000 * 5e-6 + MOVED * PARAMETERS / (0.8 * 3.35e12),
    decode=CORES * DECODED,
    link=0.8 * 450e9,
    latency=10e-6,
    disk=2e9,
)
INFINIBAND = 0.8 * 50e9


def text_operations(pairs: int, tokens: int, anchored: bool = False) -> float:
    """Of a step: the text tower's products forward and backward, without the loss."""
    work = arithmetic.step(LARGE, lengths(captions(pairs, tokens)), "cached", anchored)
    return work.text - loss_operations(pairs, needed=True)


def loss_operations(pairs: int, needed: bool = False) -> float:
    """Products of all pictures with all captions; the engine computes the logits twice rather than keep them."""
    return (2 if needed else 3) * 2.0 * pairs**2 * WIDTH


def step(machine: Machine, pairs: int, processes: int, of_pair: float, per_node: int = 8) -> Step:
    """A step of `pairs` in all. of_pair: text operations of one pair.

    Every process computes its share of the loss from gathered features; the gradient for captions is summed. Features
    go round in a ring, gradients up and down a tree; of both each process sends about as much as there is, twice for a
    sum, and the slowest link decides.
    """
    link = machine.link if processes <= per_node else INFINIBAND
    text = of_pair * pairs / processes / machine.text_rate
    ring = (processes - 1) / processes
    exchanged = processes > 1
    return Step(
        text=text,
        again=text / 3 if exchanged else 0.0,
        loss=loss_operations(pairs) / processes / machine.loss_rate,
        gather=exchanged * 4 * (4 * WIDTH * pairs * ring / link + processes * machine.latency),
        gradients=exchanged * 2 * (4 * PARAMETERS * ring / link + BUCKETS * math.log2(processes) * machine.latency),
        fixed=machine.fixed,
        checkpoint=CHECKPOINT / machine.disk / EVERY,
    )


def embedding(machine: Machine, pictures: int, processes: int) -> tuple[float, float]:
    """Seconds to decode and to embed pictures; the two go on at the same time."""
    operations = arithmetic.vision_forward(LARGE.vision, 1)
    return pictures / processes / machine.decode, pictures / processes * operations / machine.vision_rate


def calibrate(lines: dict[str, dict[str, float]], device: str, precision: str) -> tuple[float, float]:
    """Operations per second and fixed seconds of a step, from a small and a large one of short captions."""
    small, large = (lines[f"{name}_{SHORT}_{device}_{precision}"] for name in ("cached_small", "cached"))
    few, many = (text_operations(round(one["pairs"]), SHORT) for one in (small, large))
    seconds = large["seconds_per_step"] - small["seconds_per_step"]
    rate = (many - few) / seconds
    return rate, small["seconds_per_step"] - few / rate


def checks(figures: dict[str, object]) -> list[dict[str, object]]:
    """Steps that the constants were not taken from: predicted and measured seconds."""
    found, lines = [], figures["lines"]
    for device in ("cpu", "cuda"):
        for precision in ("fp32", "bf16"):
            if f"cached_small_{SHORT}_{device}_{precision}" not in lines:
                continue
            rate, fixed = calibrate(lines, device, precision)
            for name, tokens in (("cached", 57), ("cached_anchor", SHORT)):
                measured = lines[f"{name}_{tokens}_{device}_{precision}"]
                operations = text_operations(round(measured["pairs"]), tokens, name == "cached_anchor")
                predicted = fixed + operations / rate
                found.append(
                    {"device": device, "precision": precision, "step": name, "tokens": tokens, "fixed": fixed}
                    | {"pairs": measured["pairs"], "rate": rate, "predicted": predicted}
                    | {"measured": measured["seconds_per_step"], "ratio": predicted / measured["seconds_per_step"]}
                )
    return found


def machine_of(figures: dict[str, object]) -> tuple[Machine, str]:
    """A GPU, with what was measured of it where `speed.py` has seen one."""
    lines = figures["lines"]
    decoded = [line["decoded_per_second_and_core"] for name, line in lines.items() if name.startswith("embed")]
    machine = replace(H100, decode=CORES * max(decoded, default=DECODED))
    if f"cached_small_{SHORT}_cuda_bf16" not in lines:
        return machine, "H100 SXM by its data sheet: no GPU was measured"
    rate, fixed = calibrate(lines, "cuda", "bf16")
    embedded = lines[f"embed_{SHORT}_cuda_bf16"]["pictures_per_second"]
    vision = embedded * arithmetic.vision_forward(LARGE.vision, 1)  # at the least: it may have waited for decoding
    machine = replace(machine, text_rate=rate, fixed=fixed, vision_rate=vision)
    return machine, f"{figures['versions']['gpu']}: steps and embedding as measured, the rest by an H100's data sheet"


def steps(machine: Machine) -> list[dict[str, float]]:
    """Steps of up to MOST pairs on every number of GPUs, and one as large as all of these GPUs can have."""
    sizes = [(gpus, min(PER_GPU * gpus, MOST)) for gpus in GPUS] + [(GPUS[-1], PER_GPU * GPUS[-1])]
    of_pair = text_operations(PER_GPU, SHORT) / PER_GPU
    return [{"gpus": gpus, "batch": pairs} | asdict(step(machine, pairs, gpus, of_pair)) for gpus, pairs in sizes]


def forecast(machine: Machine) -> list[dict[str, float]]:
    """Every size on every number of GPUs: pictures embedded once, and one epoch."""
    of_pair = text_operations(PER_GPU, SHORT) / PER_GPU
    rows = []
    for size in SIZES:
        for gpus in GPUS:
            pairs = min(PER_GPU * gpus, MOST)
            one = step(machine, pairs, gpus, of_pair)
            decode, embed = embedding(machine, size, gpus)
            rows.append(
                {"pairs": size, "gpus": gpus, "batch": pairs, "decode": decode, "embed": embed}
                | {"epoch": one.seconds * size / pairs, "disk": size * OF_PAIR}
            )
    return rows


def duration(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.2g} s"


def tables(figures: dict[str, object]) -> str:
    """The checks, the forecast and its steps in Markdown."""
    machine, who = machine_of(figures)
    lines = [
        f"Constants and checks from {figures['versions']['machine']}, {figures['versions']['threads']} threads, torch "
        f"{figures['versions']['torch']}.",
        "",
        "| step | precision | GFLOP/s | fixed, s | predicted, s | measured, s | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in checks(figures):
        what = "with the default anchor" if one["step"] == "cached_anchor" else ""
        lines.append(
            f"| {one['device']}, {one['pairs']:.0f} pairs of {one['tokens']} tokens {what} | {one['precision']} | "
            f"{one['rate'] / 1e9:.0f} | {one['fixed']:.2f} | {one['predicted']:.2f} | {one['measured']:.2f} | "
            f"{one['ratio']:.2f} |"
        )
    lines += [
        "",
        f"Forecast. {who}.",
        "",
        "| pairs | GPUs | of a step | decode once | embed once | an epoch | shards on disk |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in forecast(machine):
        lines.append(
            f"| {row['pairs'] / 1e6:,.0f} M | {row['gpus']} | {row['batch']:,} pairs | {duration(row['decode'])} | "
            f"{duration(row['embed'])} | {duration(row['epoch'])} | {row['disk'] / 1e9:,.0f} GB |"
        )
    names = {
        "text": "text", "again": "forward again", "loss": "loss", "gather": "gather", "gradients": "sum gradients",
        "fixed": "fixed", "checkpoint": "checkpoint",
    }  # fmt: skip
    lines += [
        "",
        "| GPUs | of a step | " + " | ".join(f"{name}, ms" for name in names.values()) + " | pairs/s |",
        "|---" * (len(names) + 3) + "|",
    ]
    for row in steps(machine):
        parts = [row[name] for name in names]
        cells = " | ".join(f"{1000 * part:.3g}" for part in parts)
        lines.append(f"| {row['gpus']} | {row['batch']:,} pairs | {cells} | {row['batch'] / sum(parts):,.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.relative_to(ROOT)}")
    parser.add_argument("--json", action="store_true", help="print all figures on the last line")
    options = parser.parse_args()
    if not RESULTS.exists():
        sys.exit("there are no results to take constants from: python dev.py bench speed")
    figures = json.loads(RESULTS.read_text(encoding="utf-8"))
    text = tables(figures)
    print(text)
    if options.write:
        page = PAGE.read_text(encoding="utf-8")
        begin, end = "<!-- cost -->\n", "<!-- /cost -->"
        PAGE.write_text(re.sub(f"{begin}.*{end}", lambda _: begin + text + end, page, flags=re.S), encoding="utf-8")
    if options.json:
        machine = machine_of(figures)[0]
        found = {"checks": checks(figures), "forecast": forecast(machine), "steps": steps(machine)}
        print(json.dumps(found | {"machine": asdict(machine)}))


if __name__ == "__main__":
    main()
