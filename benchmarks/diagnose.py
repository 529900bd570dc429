"""How long a diagnosis of a text encoder of clip_l's size takes: a random original and a copy with noise.

python dev.py bench diagnose [--json]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from gmp.clip import CLIP, CLIPConfig, TextConfig, VisionConfig, initialize
from gmp.diagnose import diagnose
from gmp.layouts import Source, TowerFile
from gmp.terminal import show

RESULTS = Path(__file__).parent / "results" / "diagnose.json"
CLIP_L = CLIPConfig(
    TextConfig(768, 12, 12, 3072, 77, 49408, 768, "quick_gelu"), VisionConfig(32, 1, 2, 64, 16, 32, 768, "quick_gelu")
)
LIMIT = 60  # seconds on two cores
NOISE = 0.1  # of each matrix's standard deviation


def file_of(name: str, state: dict[str, torch.Tensor]) -> TowerFile:
    source = Source(name, name, "openai", "clip_l", {"F32": len(state)}, (), (), (), ())
    return TowerFile(state, CLIP_L.text, source)


def towers() -> tuple[TowerFile, TowerFile]:
    """A random original, and the same with noise on every matrix of its blocks but the last."""
    generator = torch.Generator().manual_seed(0)
    clip = initialize(CLIP(CLIP_L), generator)
    state = {name: tensor.detach() for name, tensor in clip.state_dict().items() if not name.startswith("visual.")}
    disturbed = {
        name: tensor + NOISE * tensor.std() * torch.randn(tensor.shape, generator=generator)
        if "resblocks" in name and ".11." not in name and tensor.dim() == 2
        else tensor.clone()
        for name, tensor in state.items()
    }
    return file_of("disturbed", disturbed), file_of("original", state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print all figures on the last line")
    options = parser.parse_args()
    encoder, original = towers()
    start, used = time.perf_counter(), time.process_time()
    found = show(diagnose(encoder, original))
    seconds, used = round(time.perf_counter() - start, 1), round(time.process_time() - used, 1)
    print(f"diagnosis of clip_l: {seconds} s, {used} s of processor time, limit {LIMIT} s")
    print(found.verdict.text)
    figures = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": seconds,
        "processor_seconds": used,
        "limit": LIMIT,
    }
    RESULTS.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(figures))
    sys.exit(seconds > LIMIT)


if __name__ == "__main__":
    main()
