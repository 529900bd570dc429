"""`python -m gmp COMMAND`: every command is a form over one engine function.

Results go to standard output, progress to standard error. `--json` prints one object on the last line. Bad input ends
with exit code 2 and one sentence. torch is imported only by the commands that compute.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from .commands import (
    captions,
    compare,
    dataset,
    diagnose,
    files,
    measure,
    pictures,
    presets,
    report,
    runs,
    strength,
    training,
    world,
)
from .commands.parsers import add_command
from .commands.towers import add_pictures
from .errors import InputError


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(given)
    options.arguments = given[1:]
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a pipe on Windows has no arrows
            stream.reconfigure(errors="replace")
    try:
        answer = options.command(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("gmp"):
            raise
        print(f"error: this Python ({sys.executable}) has no {error.name}; take the one in .venv that", file=sys.stderr)
        print("`python dev.py demo` makes, or install torch and what requirements.txt lists", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read it has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return options.code
    except OSError as error:
        print(f"error: {error.strerror or error}" + (f": {error.filename}" if error.filename else ""), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if options.json and answer is not None:
        print(json.dumps(answer, default=str))
    return options.code


# ---- arguments ------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gmp", description="Repairs broken text encoders.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable, text: str, example: str) -> argparse.ArgumentParser:
        one = add_command(commands, name, text, example)
        one.set_defaults(command=run, code=0)
        return one

    one = add("inspect", files.inspect, "Say what files hold, from their headers.", "inspect clip_l.safetensors")
    one.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a model file or a model folder")

    one = add(
        "encode",
        files.encode,
        "Compute every read point, to hold a file against the library that wrote it.",
        'encode clip_l.safetensors --text "a red circle" --out encoded.safetensors',
    )
    one.add_argument("file", type=Path, metavar="FILE")
    given = one.add_mutually_exclusive_group()
    given.add_argument("--text", nargs="+", metavar="TEXT", help="captions, tokenized and padded as for its family")
    given.add_argument("--tokens", type=Path, metavar="NPY", help="token ids (B, T)")
    given = one.add_mutually_exclusive_group()
    given.add_argument("--image", type=Path, metavar="FILE", help="a picture, cropped and normalised as for CLIP")
    given.add_argument("--pixels", type=Path, metavar="NPY", help="normalised pixels (B, 3, H, W)")
    _add_member(one)
    _add_out(one)

    one = add(
        "join",
        files.join,
        "Put a text encoder and a vision tower together as one CLIP.",
        "join --text broken_clip_l.safetensors --vision ViT-L-14.safetensors --out joined.safetensors",
    )
    _add_towers(one)
    _add_writing(one, ("fp32", "fp16", "bf16"), "fp32")

    one = add(
        "repair",
        training.repair,
        "Repair a text encoder on captioned pictures. The same command again resumes the run.",
        "repair --text broken_clip_l.safetensors --vision ViT-L-14.safetensors --images pictures "
        "--captions captions.json --out runs/first",
    )
    _add_towers(one)
    add_pictures(one, required=False)
    one.add_argument(
        "--data",
        nargs="+",
        metavar="TAR",
        help="in place of --images: WebDataset tars by path or URL, such as 'shards/{00000..00099}.tar' or s3://…; "
        "each is read once",
    )
    _add_settings(one)

    one = add(
        "presets",
        presets.presets,
        "List recipes and when to use them; print one as TOML with every setting documented; check a file.",
        "presets seed-gmp --out my.toml",
    )
    presets.arguments(one)

    _add_runs(add("runs", runs.list_runs, "See, stop and resume runs.", "runs watch first"))

    one = add(
        "report",
        report.report,
        "Write one page about a run: before and after at every read point, how it went, how to do it again.",
        "report runs/first",
    )
    report.arguments(one)

    one = add(
        "convert",
        files.convert,
        "Write a text encoder, or a whole CLIP, in another layout.",
        "convert runs/first/text_encoder.safetensors --out clip_l.safetensors --dtype fp16",
    )
    one.add_argument("file", type=Path, metavar="FILE")
    where = one.add_mutually_exclusive_group()
    where.add_argument("--whole", action="store_true", help="with the vision tower, where the file has one")
    where.add_argument(
        "--into",
        type=Path,
        metavar="CHECKPOINT",
        help="write a copy of this checkpoint with the text encoder in it; all else keeps its bytes",
    )
    _add_member(one)
    _add_writing(one, ("keep", "fp32", "fp16", "bf16"), "keep")

    one = add(
        "lora",
        files.lora,
        "Write the change that a repair made as a LoRA, which ComfyUI's Load LoRA applies to the broken encoder.",
        "lora runs/first/text_encoder.safetensors --broken broken_clip_l.safetensors --rank 64 "
        "--out repair_lora.safetensors",
    )
    one.add_argument("file", type=Path, metavar="FILE", help="the repaired text encoder")
    one.add_argument("--broken", type=Path, required=True, metavar="FILE", help="what it was before the repair")
    one.add_argument("--rank", type=int, default=64, help="of each matrix (64); higher keeps more of the change")
    one.add_argument(
        "--linears-only",
        action="store_true",
        help="no biases, LayerNorms and embeddings: for programs that read only classic LoRAs",
    )
    one.add_argument("--dtype", choices=("fp16", "fp32", "bf16"), default="fp16", help="of the file (fp16)")
    _add_member(one)
    _add_out(one)

    one = add(
        "measure",
        measure.measure,
        "Measure a text encoder: retrieval, alignment and calibration on captioned pictures (--images), zero-shot "
        "classification of pictures of classes (--classes), and every read point.",
        "measure --text clip_l.safetensors --vision ViT-L-14.safetensors --images pictures --captions captions.json",
    )
    _add_towers(one)
    add_pictures(one, required=False)
    measure.arguments(one)

    one = add(
        "scan",
        strength.scan,
        "Measure a repair at growing strength, and suggest how much of it to take.",
        "scan --broken broken_clip_l.safetensors --repaired runs/first/text_encoder.safetensors "
        "--original ViT-L-14.safetensors --images pictures --captions captions.json --out scan",
    )
    strength.scan_arguments(one)
    _add_member(one)

    one = add(
        "blend",
        strength.blend,
        "Write a text encoder between a broken one and its repair, or between these and the original.",
        "blend --broken broken_clip_l.safetensors --repaired runs/first/text_encoder.safetensors --strength 0.8 "
        "--out clip_l.safetensors",
    )
    strength.blend_arguments(one)
    _add_member(one)
    _add_writing(one, ("fp32", "fp16", "bf16"), "fp32")

    one = add(
        "compare",
        compare.compare,
        "Draw what tells text encoders from the original, in weights and in what they make of prompts and pictures.",
        "compare ViT-L-14.safetensors broken_clip_l.safetensors runs/first/text_encoder.safetensors --out pictures",
    )
    compare.arguments(one)
    _add_member(one)

    one = add(
        "diagnose",
        diagnose.diagnose,
        "Tell whether a text encoder is broken, where, and for which diffusion model; needs no pictures.",
        "diagnose broken_clip_l.safetensors --original ViT-L-14.safetensors",
    )
    diagnose.arguments(one)
    _add_member(one)

    one = add(
        "pictures",
        pictures.crop,
        "Write prepared copies of a folder of pictures: cropped square, or varied; captions beside them go along.",
        "pictures crop pictures --out squares --crop salient --vision ViT-L-14.safetensors",
    )
    pictures.arguments(one)

    _add_member(
        dataset.arguments(
            add(
                "dataset",
                dataset.report,
                "Say what is in a folder of captioned pictures, and what is wrong with it, before it trains.",
                "dataset report --images pictures --out report.html --fix fixes.json --drop cleaned.json",
            )
        )
    )

    captions.arguments(
        add(
            "captions",
            captions.show,
            "Show captions of any kind, and convert them into another.",
            "captions convert pictures --to json --out captions.json",
        )
    )

    one = add(
        "world",
        world.world,
        "Write captioned pictures of the small world.",
        "world --out pictures --count 8000 --seed 1",
    )
    one.add_argument("--out", type=Path, required=True, help="an empty folder, or one that does not exist")
    one.add_argument("--count", type=int, default=8000, help="pictures (8000)")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--split", choices=("train", "held_out"), default="train", help="seen by the shipped CLIP, or not")

    one = add("demo", world.demo, "Repair the shipped ruined text encoder; no download.", "demo --out runs/demo")
    one.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for pictures and run (runs/demo)")
    one.add_argument("--device", help="cpu, cuda, cuda:1, mps or auto, the best there is (auto)")
    return parser


def _add_runs(parser: argparse.ArgumentParser) -> None:
    """runs list | show | watch | pause | resume | stop | save | measure | delete"""
    commands = parser.add_subparsers(required=True, metavar="WHAT")

    def add(name: str, run: Callable, text: str, one: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=run)
        if one:
            sub.add_argument("run", metavar="RUN", help="a run's folder, or its name below --folder")
        sub.add_argument("--folder", type=Path, default=Path("runs"), help="where runs lie (runs)")
        sub.add_argument("--json", action="store_true", help="print the answer as JSON on the last line")
        return sub

    add("list", runs.list_runs, "All runs, newest first.", one=False)
    add("show", runs.show, "State, saved steps, alarms and settings of a run.")
    sub = add("watch", runs.watch, "Follow a run until it ends, in whatever process it trains.")
    sub.add_argument("--every", type=float, default=0.5, help="seconds between two looks (0.5)")
    for name, text in {
        "pause": "Hold a run at its next step.",
        "resume": "Go on with a paused run; start an interrupted one again.",
        "stop": "Let a run save itself and end; it can be resumed.",
        "save": "Let a run write a checkpoint now.",
        "measure": "Let a run measure its held-out pictures now.",
    }.items():
        sub = add(name, runs.command, text)
        sub.set_defaults(ask=name)
        if name == "pause":
            sub.add_argument("--offload", action="store_true", help="free the GPU's memory meanwhile")
    sub = add("delete", runs.delete, "Delete a run with its checkpoints and its result.")
    sub.add_argument("--yes", action="store_true", help="really")


def _add_member(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--member", choices=("clip_l", "clip_g", "clip_h"), help="which one of a checkpoint (clip_l)")
    parser.add_argument("--heads", type=int, help="attention heads of the text tower, where the file does not say")
    parser.add_argument("--vision-heads", type=int, help="attention heads of the vision tower, likewise")
    parser.add_argument(
        "--end-of-text", type=int, metavar="ID", help="whose first place in a caption is pooled (the largest id)"
    )
    parser.add_argument("--activation", choices=("quick_gelu", "gelu"), help="likewise; LAION's CLIPs use gelu")


def _add_towers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="the text encoder, or a checkpoint")
    parser.add_argument(
        "--vision",
        type=Path,
        required=True,
        metavar="FILE",
        help="the original CLIP; a vision tower alone has no anchor",
    )
    parser.add_argument(
        "--original",
        type=Path,
        metavar="FILE",
        help="what lends projection and temperature, and is the anchor, if not the file of --vision",
    )
    _add_member(parser)


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .safetensors file")
    parser.add_argument("--force", action="store_true", help="replace what exists")


def _add_writing(parser: argparse.ArgumentParser, dtypes: tuple[str, ...], dtype: str) -> None:
    _add_out(parser)
    parser.add_argument(
        "--layout",
        choices=("huggingface", "huggingface_folder", "openai", "open_clip", "open_clip_folder", "gmp"),
        help="names of the tensors (huggingface, which ComfyUI and diffusers read); a folder has its config beside; "
        "gmp has r and theta",
    )
    kept = "; keep: as stored" if "keep" in dtypes else ""
    parser.add_argument("--dtype", choices=dtypes, default=dtype, help=f"of the file ({dtype}{kept})")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """--out, and the settings: a preset or a file, and an option for each setting that is one value."""
    from dataclasses import fields

    from .config import SINGLE, RepairConfig
    from .presets import DEFAULT

    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run's folder")
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--preset", metavar="NAME", help=f"see `python -m gmp presets` ({DEFAULT})")
    base.add_argument("--config", type=Path, metavar="TOML", help="all settings as a file, such as a run's config.toml")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any setting as TOML, over preset or file: captions.shuffle=true, unfreeze.until=0.3",
    )
    parser.add_argument(
        "--concepts",
        type=Path,
        metavar="FILE",
        help="captions of what the fine-tune taught, one per line, for anchors on concepts",
    )
    parser.add_argument(
        "--rate", action="append", metavar="PATTERN=FACTOR", help="factor on the rate of parameters by name; 0 freezes"
    )
    parser.add_argument(
        "--anchor",
        action="append",
        metavar="[TEACHER[@CAPTIONS]:]POINT=WEIGHT[..END]",
        help="keep a read point near the original's or the broken encoder's, on the data set's captions or on those of "
        "concepts; in place of the preset's anchors",
    )
    parser.add_argument("--no-anchor", action="store_true", help="contrastive loss alone: what SDXL reads stays broken")
    parser.add_argument("--plain", action="store_true", help="train plain weights, no r and theta")
    parser.add_argument(
        "--shard",
        action="store_true",
        help="with torchrun: share weights, gradients and moments out over the processes, for towers that one GPU does "
        "not hold; the same result, some slower",
    )
    default = RepairConfig()
    group = parser.add_argument_group("settings", "in place of the preset's; in brackets the default without a preset")
    for field in fields(RepairConfig):
        kind = SINGLE.get(field.name)
        if kind is None:
            continue  # tables: --set, --rate, --anchor
        value, choices = getattr(default, field.name), field.metadata["choices"]
        told = f"{field.metadata['doc']} ({'not set' if value is None else value})".replace("%", "%%")
        name = "--" + field.name.replace("_", "-")
        if kind is bool:
            group.add_argument(name, action=argparse.BooleanOptionalAction, default=None, help=told)
        else:
            group.add_argument(name, type=kind, choices=choices or None, default=None, help=told)
