"""How fast a repair is against other trainers of the same CLIP: the seed's recipe, transformers, open_clip.

python dev.py bench speed [--quick] [--json] [--only CONTENDER …]

Random ViT-L/14 weights, random captions as long as COCO's short and long ones, random pictures. Every turn is a process
of its own: one step to warm up, then whole steps (forward, backward, optimizer, statistics). Contenders take turns, and
ratios are taken within a round; what is reported is the median of the rounds. That all compute the same gradients is
checked first. Where there is a GPU, it follows the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from contenders import openclip  # noqa: E402
from contenders.seed import ACCUMULATE  # noqa: E402
from contenders.task import LARGE, SMALL, Task, write  # noqa: E402
from contenders.turn import take  # noqa: E402
from tqdm import tqdm  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
SHORT, LONG = 14, 57  # tokens of COCO's own captions and of its spatial ones, on average
PAIRS, EPOCHS = 40_000, 5  # of the repair that the time is given for
TOLERANCE = 1e-3  # of gradients
PICTURES = {"cpu": 32, "cuda": 2048}  # files; all of them are embedded


@dataclass(frozen=True)
class Line:
    """A line of the table."""

    contender: str
    tokens: int
    pairs: dict[str, int]  # of a step, by device
    text: str

    def name(self, device: str, precision: str) -> str:
        return f"{self.contender}_{self.tokens}_{device}_{precision}"


LINES = (
    Line("seed", SHORT, {"cpu": 4 * ACCUMULATE, "cuda": 40 * ACCUMULATE}, "CLIP-fine-tune, GmP script"),
    Line("transformers", SHORT, {"cpu": 16, "cuda": 256}, "transformers, vision frozen"),
    Line("open_clip", SHORT, {"cpu": 16, "cuda": 256}, "open_clip, image tower locked"),
    Line("both", SHORT, {"cpu": 8, "cuda": 128}, "both towers"),
    Line("cached", SHORT, {"cpu": 256, "cuda": 4096}, "pictures cached"),
    Line("cached_small", SHORT, {"cpu": 32, "cuda": 512}, "pictures cached, a small step"),
    Line("cached", LONG, {"cpu": 64, "cuda": 1024}, "pictures cached, long captions"),
    Line("cached_anchor", SHORT, {"cpu": 256, "cuda": 4096}, "pictures cached, with the default anchor"),
    Line("embed", SHORT, {"cpu": 1, "cuda": 1}, "pictures embedded"),
)
QUICK_PAIRS = 16
WATCHED = {"cpu": 64, "cuda": 1024}  # pairs of a step
# What is aimed at: at the least, or at the most of what `MOST` names.
GOALS = {
    "cpu": {
        "cached_over_seed": 100, "cached_over_seed_fp32": 70, "cached_over_seed_57_tokens": 25,
        "cached_over_frozen_transformers": 25, "both_over_seed_bf16": 2, "both_over_seed_fp32": 1.2,
        "share_of_matmul_rate_fp32": 0.75, "share_of_matmul_rate_bf16": 0.45, "telemetry_and_gmp_over_plain": 1.10,
    },
    "cuda": {
        "cached_over_seed": 50, "cached_over_seed_57_tokens": 15, "cached_over_frozen_transformers": 10,
        "both_over_seed_bf16": 2, "share_of_matmul_rate_bf16": 0.5, "telemetry_and_gmp_over_plain": 1.10,
        "seconds_of_a_repair": 60,
    },
}  # fmt: skip
MOST = ("telemetry_and_gmp_over_plain", "seconds_of_a_repair")  # where less is better

Figures = dict[str, float]


def turn(task: Task) -> Figures:
    """What a contender found in a process of its own."""
    command = [sys.executable, __file__, "--turn", json.dumps(asdict(task))]
    # threads that wait leave their core to others, as in dev.py
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={"OMP_WAIT_POLICY": "PASSIVE"} | os.environ)
    if done.returncode:
        sys.exit(f"{task.contender} in {task.precision} on {task.device} failed, see above")
    return json.loads(done.stdout.splitlines()[-1])


def take_turns(turns: list[tuple[str, Task]], rounds: int, device: str) -> list[dict[str, Figures]]:
    """What every contender found, by name, in each round."""
    found: list[dict[str, Figures]] = []
    with tqdm(total=rounds * len(turns), desc=device, file=sys.stderr) as bar:
        for _ in range(rounds):
            found.append({})
            for name, task in turns:
                bar.set_postfix_str(name)
                found[-1][name] = turn(task)
                bar.update()
    return found


def medians(rounds: list[dict[str, Figures]]) -> dict[str, Figures]:
    """Every figure's median over the rounds."""
    return {
        name: {key: statistics.median(one[name][key] for one in rounds) for key in rounds[0][name]}
        for name in rounds[0]
    }


def ratios(found: dict[str, Figures], device: str) -> Figures:
    """Ratios of one round; those of which a contender is missing are left out."""

    def speed(contender: str, tokens: int, precision: str) -> float | None:
        return found.get(f"{contender}_{tokens}_{device}_{precision}", {}).get("pairs_per_second")

    def best(contender: str, tokens: int = SHORT) -> float | None:
        speeds = [speed(contender, tokens, precision) for precision in ("fp32", "bf16")]
        return max((s for s in speeds if s), default=None)

    seed, cached = best("seed"), best("cached")
    wanted = {
        "cached_over_seed": (cached, seed),
        "cached_over_seed_57_tokens": (best("cached", LONG), seed),
        "cached_with_anchor_over_seed": (best("cached_anchor"), seed),
        "cached_over_frozen_transformers": (cached, best("transformers")),
        "cached_over_open_clip": (cached, best("open_clip")),
        "both_over_seed": (best("both"), seed),
    }
    for precision in ("fp32", "bf16"):
        of_seed = speed("seed", SHORT, precision)
        wanted[f"cached_over_seed_{precision}"] = (speed("cached", SHORT, precision), of_seed)
        wanted[f"both_over_seed_{precision}"] = (speed("both", SHORT, precision), of_seed)
    result = {name: ours / theirs for name, (ours, theirs) in wanted.items() if ours and theirs}
    for precision in ("fp32", "bf16"):
        share = found.get(f"cached_{SHORT}_{device}_{precision}", {}).get("share_of_matmul_rate")
        result |= {f"share_of_matmul_rate_{precision}": share} if share else {}
    return result | found.get(f"watching_{device}", {})


def add_repairs(lines: dict[str, Figures], device: str) -> None:
    """Seconds of 40,000 pairs × 5 epochs; cached pictures are decoded and embedded once before, others are for free."""
    for name, figures in lines.items():
        if "pairs_per_second" not in figures:
            continue
        figures["seconds_of_a_repair"] = PAIRS * EPOCHS / figures["pairs_per_second"]
        if name.startswith("cached"):
            rates = [f["pictures_per_second"] for n, f in lines.items() if n.startswith("embed") and device in n]
            figures["seconds_of_a_repair"] += PAIRS / max(rates) if rates else 0.0


def report(lines: dict[str, Figures], found: Figures, device: str) -> str:
    """The table of a device in Markdown, and its goals."""
    rows = [
        "| | captions | step | precision | pairs/s | step, s | peak, GB | of matmul rate | 40,000 pairs, 5 epochs, h |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for line in LINES:
        for precision in ("fp32", "bf16"):
            figures = lines.get(line.name(device, precision))
            if not figures:
                continue
            if line.contender == "embed":
                rows.append(
                    f"| {line.text} | | | {precision} | {figures['pictures_per_second']:.2f} pictures/s | | "
                    f"{figures['peak_memory']:.1f} | | |"
                )
                continue
            rows.append(
                f"| {line.text} | {line.tokens} tokens | {figures['pairs']:.0f} pairs | {precision} | "
                f"{figures['pairs_per_second']:.3g} | {figures['seconds_per_step']:.3g} | "
                f"{figures['peak_memory']:.1f} | {figures['share_of_matmul_rate']:.0%} | "
                f"{figures['seconds_of_a_repair'] / 3600:.3g} |"
            )
    rows += ["", "| ratio | | aimed at |", "|---|---|---|"]
    for name, value in found.items():
        goal = GOALS[device].get(name)
        aim = "" if goal is None else f"{'≤' if name in MOST else '≥'} {goal}"
        missed = goal is not None and (value > goal if name in MOST else value < goal)
        rows.append(f"| {name} | {value:.3g} | {aim}{', missed' if missed else ''} |")
    return "\n".join(rows) + "\n"


def versions() -> dict[str, str]:
    """Machine and libraries."""
    found = {"machine": _processor(), "threads": str(torch.get_num_threads()), "python": platform.python_version()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    for name in ("torch", "transformers", "open_clip_torch"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        bf16 = "AMX" if any("amx_bf16" in line for line in lines) else "AVX-512 bf16"
        known = any("amx_bf16" in line or "avx512_bf16" in line for line in lines)
        return f"{model}, {bf16 if known else 'no bf16'}"
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def run(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """All turns of all rounds. Prints tables as they come."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    precisions = ("bf16",) if options.quick else ("fp32", "bf16")
    lines = [line for line in LINES if not options.only or line.contender in options.only]
    if openclip.library() is None:
        print("open_clip does not import here and is left out", file=sys.stderr)
        lines = [line for line in lines if line.contender != "open_clip"]
    seconds = 0.2 if options.quick else 8.0
    figures: dict[str, object] = {"versions": versions(), "lines": {}, "ratios": {}, "tables": {}}

    def task(contender: str, device: str, precision: str, pairs: int, tokens: int) -> Task:
        pairs = min(pairs, QUICK_PAIRS) if options.quick else pairs
        return Task(contender, device, precision, pairs, tokens, str(folder), options.quick, seconds)

    if not options.only or "gradients" in options.only:
        figures["gradients"] = turn(task("gradients", "cpu", "fp32", 4, SHORT))
        print("largest relative difference of gradients:", figures["gradients"])
        if not all(difference <= TOLERANCE for difference in figures["gradients"].values()):  # NaN is none of both
            sys.exit(f"the contenders do not compute the same gradients: more than {TOLERANCE} apart")
    for device in devices:
        turns = [
            (line.name(device, precision), task(line.contender, device, precision, line.pairs[device], line.tokens))
            for line in lines
            for precision in precisions
        ]
        if not options.only or "watching" in options.only:
            precision = "bf16" if device == "cuda" else "fp32"
            turns.append((f"watching_{device}", task("watching", device, precision, WATCHED[device], SHORT)))
        rounds = take_turns(turns, options.rounds, device)
        found = medians(rounds)
        add_repairs(found, device)
        of_rounds = medians([{"": ratios(one, device)} for one in rounds])[""]
        repairs = [f["seconds_of_a_repair"] for n, f in found.items() if n.startswith(f"cached_{SHORT}_")]
        of_rounds |= {"seconds_of_a_repair": min(repairs)} if repairs else {}
        table = report(found, of_rounds, device)
        print(table)
        prefix = "" if device == "cpu" else f"{device}_"
        figures["lines"] |= found
        figures["ratios"] |= {f"{prefix}{name}": value for name, value in of_rounds.items()}
        figures["tables"][device] = table
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small towers, one short round, no result file")
    parser.add_argument("--json", action="store_true", help="print all figures on the last line")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="these contenders alone, no result file")
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.turn:
        print(json.dumps(take(Task(**json.loads(options.turn)))))
        return
    options.rounds = 1 if options.quick else options.rounds
    with tempfile.TemporaryDirectory() as folder:
        pictures = PICTURES["cuda" if torch.cuda.is_available() and not options.quick else "cpu"]
        write(Path(folder), SMALL if options.quick else LARGE, pictures)
        figures = run(options, Path(folder))
    tables = figures.pop("tables")
    if not options.quick and not options.only:
        RESULTS.joinpath("speed.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        heads = {device: f"## {device.upper()}\n\n{table}" for device, table in tables.items()}
        machine = ", ".join(f"{name} {value}" for name, value in figures["versions"].items())
        text = f"# `python dev.py bench speed`\n\n{machine}\n\n" + "\n".join(heads.values())
        RESULTS.joinpath("speed.md").write_text(text, encoding="utf-8")
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
