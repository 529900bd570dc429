"""What each part of a repair contributes, in one run: `python dev.py bench quality`.

The shipped ruined encoder is repaired with and without the anchor, in GmP and in plain form, on the same pictures in
the same order, and measured on scenes that no one was trained on. Prints a table and ratios, writes JSON to `results/`.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gmp.data.captions import read_index  # noqa: E402
from gmp.demo import CONFIG, PICTURES, measure_encoders, table  # noqa: E402
from gmp.events import finish  # noqa: E402
from gmp.layouts import read_text, read_vision  # noqa: E402
from gmp.run import RESULT, Inputs, repair  # noqa: E402
from gmp.tokenizer import Tokenizer  # noqa: E402
from gmp.world.models import ASSETS, ORIGINAL, RUINED  # noqa: E402
from gmp.world.write import write_world  # noqa: E402

CONTENDERS = {
    "repaired": CONFIG,  # GmP, anchor at penultimate
    "no anchor": replace(CONFIG, anchors=()),
    "plain weights": replace(CONFIG, geometric=()),
}


def main() -> None:
    device = torch.device("cpu")
    vision, original = read_vision(ASSETS / ORIGINAL), read_text(ASSETS / ORIGINAL)
    encoders = {"original": original, "ruined": read_text(ASSETS / RUINED)}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        captions = finish(write_world(out / "pictures", PICTURES, seed=1))
        index = read_index(out / "pictures", captions)
        inputs = Inputs(encoders["ruined"], vision, original, index, Tokenizer())
        for name, config in CONTENDERS.items():
            finish(repair(inputs, config, out / name, cache=out / "cache", device=device))
            encoders[name] = read_text(out / name / RESULT)
        figures = finish(measure_encoders(encoders, vision, original, out, device))
    whole = figures["original"]["recall_at_1_text_to_image"]
    ratios = {
        name: {
            "recall_at_1_over_original": figures[name]["recall_at_1_text_to_image"] / whole,
            "penultimate_cosine": figures[name]["drift"]["penultimate"]["cosine"],
        }
        for name in figures
    }
    print(table(figures))
    report = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "figures": figures,
        "ratios": ratios,
    }
    (ROOT / "benchmarks" / "results" / "quality.json").write_text(json.dumps(report, indent=2) + "\n")
    if "--json" in sys.argv:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
