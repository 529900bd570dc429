"""`python -m gmp COMMAND`: every command is a form over one engine function.

Results go to standard output, progress to standard error. `--json` prints one object on the last line. Bad input ends
with exit code 2 and one sentence. torch is imported only by the commands that compute.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Generator
from dataclasses import asdict
from pathlib import Path

from .errors import InputError
from .events import Event
from .terminal import Stop, show, tell


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
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
    except OSError as error:
        print(f"error: {error.strerror or error}" + (f": {error.filename}" if error.filename else ""), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps(answer, default=str))
    return 0


# ---- commands -------------------------------------------------------------------------------------------------------


def _inspect(options: argparse.Namespace) -> object:
    from .files import read_header
    from .layouts import describe

    answers, problems = [], []
    for path in options.files:
        try:
            header = read_header(path)
        except InputError as error:
            problems.append(str(error))
            continue
        contents = describe(header)
        towers = [*contents.text.values(), *([contents.vision] if contents.vision else [])]
        answer = {
            "file": str(path),
            "kind": contents.kind,
            "layout": contents.layout,
            "tensors": len(header.tensors),
            "towers": [
                {
                    "tower": part.place.tower,
                    "member": part.member,
                    "layout": part.layout,
                    "layers": part.layers,
                    "sizes": part.sizes,
                    "parameters": part.parameters,
                    "dtypes": part.dtypes,
                    "missing": part.missing,
                    "problems": part.problems,
                }
                for part in towers
            ],
            "problems": contents.problems,
        }
        answers.append(answer)
        print(f"{path}: {contents.kind}" + (f", {contents.layout}" if contents.layout else ""))
        for tower in answer["towers"]:
            sizes = ", ".join(f"{name} {size}" for name, size in tower["sizes"].items())
            stored = ", ".join(f"{count} {dtype}" for dtype, count in tower["dtypes"].items())
            name = tower["member"] or tower["tower"]
            print(f"  {name}: {tower['layers']} layers, {sizes}; stored as {stored}")
            if tower["missing"]:
                print(f"    lacks {', '.join(tower['missing'])}: the original CLIP lends them")
            for problem in tower["problems"]:
                print(f"    {problem}")
        for problem in contents.problems:
            print(f"  {problem}")
    if problems:
        raise InputError("; ".join(problems))
    return answers


def _read_towers(options: argparse.Namespace):
    """text tower, vision tower, and the vision file's own text tower where it has one."""
    from .files import read_header
    from .layouts import describe, read_text, read_vision

    text = read_text(options.text, options.member, options.heads, options.activation)
    vision = read_vision(options.vision, options.vision_heads, options.activation)
    whole = describe(read_header(options.vision)).text
    original = read_text(options.vision, None, options.heads, options.activation) if whole else None
    return text, vision, original


def _join(options: argparse.Namespace) -> object:
    from .join import join
    from .layouts import write_clip

    _check_new(options)
    text, vision, original = _read_towers(options)
    joined = join(text, vision, original)
    if options.layout == "gmp":
        _split_mlps(joined.state)
    hashes = {role: source.sha256 for role, source in joined.sources.items()}
    metadata = {"gmp_sources": json.dumps({"sha256": hashes, "tensors": joined.summary()})}
    write_clip(
        joined.state,
        options.out,
        layout=options.layout,
        dtype=options.dtype,
        config=joined.config,
        metadata=metadata,
    )
    for origin in joined.report:
        print(f"{origin.name}: {origin.tensors} tensors from {origin.source} ({origin.reason})")
    for sentence in joined.assumptions:
        print(f"assumed: {sentence}")
    print(f"written: {options.out}")
    return {"out": str(options.out), "tensors": joined.summary(), "assumptions": joined.assumptions}


def _device(name: str | None):
    import torch

    if name and name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError, NotImplementedError):
            there = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
            there += ["mps"] if torch.backends.mps.is_available() else []
            raise InputError(f"device {name!r} cannot be used here; there is {', '.join(there)}, or auto") from None
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _repair(options: argparse.Namespace) -> object:
    from .config import SDXL_ANCHOR, Anchor, RepairConfig
    from .data.captions import read_index
    from .features import default_cache
    from .run import BEST, RESULT, Inputs, repair
    from .tokenizer import tokenizer_for

    if options.anchor and options.no_anchor:
        raise InputError("--anchor and --no-anchor contradict each other; give one of them")
    anchors = tuple(Anchor.parse(a) for a in options.anchor or ()) or (SDXL_ANCHOR,)
    config = RepairConfig(
        train=options.train,
        epochs=options.epochs,
        batch=options.batch,
        accumulate=options.accumulate,
        lr=options.lr,
        rates=dict(_rate(text) for text in options.rate or ()),
        weight_decay=options.weight_decay,
        schedule=options.schedule,
        warmup=options.warmup,
        smoothing=options.smoothing,
        clip_norm=options.clip_norm,
        geometric=not options.plain,
        anchors=() if options.no_anchor else anchors,
        anchor_captions=options.anchor_captions,
        precision=options.precision,
        held_out=options.held_out,
        save_every=options.save_every,
        keep=options.keep,
        seed=options.seed,
    )
    index = read_index(options.images, options.captions, options.allow_missing)
    text, vision, original = _read_towers(options)
    tokenize = tokenizer_for(text.config.context_length, text.source.member)
    inputs = Inputs(text, vision, original, index, tokenize)
    last: Event = {}

    def hear(event: Event) -> str | None:
        last.update(event)
        return tell(event)

    with Stop() as stop:
        cache = options.cache or default_cache()
        events = repair(inputs, config, options.out, cache=cache, device=_device(options.device), stop=stop)
        show(events, hear)
    if last["type"] == "stopped":
        where = f"at step {last['step']} of {last['steps']}" if last["steps"] else "before training"
        print(f"stopped {where}; the same command goes on from there")
    elif last["resumed"]:
        print(f"{options.out} is finished already")
    if (options.out / RESULT).exists():
        print(f"text encoder: {options.out / RESULT}")
    there = {name: options.out / file for name, file in (("text_encoder", RESULT), ("best_text_encoder", BEST))}
    answer = {"run": str(options.out), "state": last["type"]}
    answer |= {name: str(path) if path.exists() else None for name, path in there.items()}
    if last["type"] != "done":
        return answer
    result = json.loads((options.out / "result.json").read_text(encoding="utf-8"))
    if not result["measurements"]:
        print("no pictures were held out, so nothing was measured")
    if result["best"] and result["best"]["step"] == 0:
        print("no step was better than the start on the held-out pictures: lower the learning rate")
    return answer | result


def _rate(text: str) -> tuple[str, float]:
    pattern, _, factor = text.rpartition("=")
    try:
        return pattern, float(factor)
    except ValueError:
        raise InputError(f"rate {text!r} is not of the form PATTERN=FACTOR, such as token_embedding*=0.1") from None


def _check_new(options: argparse.Namespace) -> None:
    """Raises InputError for an output file that exists, and for a name that is not safetensors."""
    if options.out.suffix not in (".safetensors", ".sft"):
        raise InputError(f"{options.out} will be a safetensors file; let its name end in .safetensors")
    if options.out.exists() and not options.overwrite:
        raise InputError(f"{options.out} exists; choose another name, or pass --overwrite")


def _split_mlps(state: dict) -> None:
    """Turns the MLPs of a canonical state dict into r and theta, in place."""
    from .geometric import is_mlp, split

    for stem in [n.removesuffix(".weight") for n in state if n.endswith(".weight") and is_mlp(n[: -len(".weight")])]:
        state[f"{stem}.r"], state[f"{stem}.theta"] = split(state.pop(f"{stem}.weight"))


def _convert(options: argparse.Namespace) -> object:
    from .clip import CLIPConfig
    from .layouts import read_text, read_vision, write_clip, write_text

    _check_new(options)
    geometric = options.layout == "gmp"
    text = read_text(options.file, options.member, options.heads, options.activation, fold=not geometric)
    state = dict(text.state)
    if options.whole:
        vision = read_vision(options.file, options.vision_heads, options.activation, fold=not geometric)
        state |= vision.state
    if geometric:
        _split_mlps(state)
    sources = {"gmp_source": json.dumps({"file": text.source.path, "sha256": text.source.sha256})}
    if options.whole:
        config = CLIPConfig(text.config, vision.config)
        write_clip(state, options.out, layout=options.layout, dtype=options.dtype, config=config, metadata=sources)
    else:
        write_text(state, options.out, layout=options.layout, dtype=options.dtype, config=text.config, metadata=sources)
    for sentence in (*text.source.assumptions, *text.source.notes):
        print(sentence)
    print(f"written: {options.out}")
    return {"out": str(options.out), "source": asdict(text.source)}


def _measure(options: argparse.Namespace) -> object:
    answer = show(_measured(options))
    for direction in ("text_to_image", "image_to_text"):
        recalls = ", ".join(f"recall@{k} {answer[f'recall_at_{k}_{direction}']:.3f}" for k in (1, 5, 10))
        print(
            f"{direction.replace('_', ' ')}: {recalls}, median rank {answer[f'median_rank_{direction}']}, "
            f"mean rank {answer[f'mean_rank_{direction}']:.1f}"
        )
    for point, moved in answer["drift"].items():
        print(f"{point}: cosine to the original {moved['cosine']:.4f}, relative norm {moved['relative_norm']:.3f}")
    for note in answer["notes"]:
        print(note)
    for name, reason in answer["broken"].items():
        print(f"left out: {name} ({reason})")
    return answer


def _measured(options: argparse.Namespace) -> Generator[Event, None, Event]:

    from .data.captions import read_index
    from .features import default_cache, embed_index
    from .join import join, text_tower, unlike
    from .measure import measure_tower
    from .tokenizer import tokenizer_for

    index = read_index(options.images, options.captions, options.allow_missing)
    text, vision, original = _read_towers(options)
    joined = join(text, vision, original)
    device, cache = _device(options.device), options.cache or default_cache()
    clip = joined.build().to(device)
    index, pictures, broken = yield from embed_index(clip.visual, index, cache)
    tokens = tokenizer_for(text.config.context_length, text.source.member)(index.captions())
    difference = original and unlike(text, original)
    reference = text_tower(original, joined).to(device) if original and not difference else None
    return measure_tower(clip, pictures, tokens.ids, index.owners(), reference) | {
        "notes": [f"drift is not measured: {difference}"] if difference else [],
        "broken": broken,
        "captions cut to the context length": tokens.truncated,
    }


def _world(options: argparse.Namespace) -> object:
    from .world.write import write_world

    captions = show(write_world(options.out, options.count, options.seed, options.split))
    print(f"{options.count} pictures in {options.out}, captions in {captions}")
    return {"images": str(options.out), "captions": str(captions), "count": options.count}


def _demo(options: argparse.Namespace) -> object:
    from .demo import NEAREST, demo, table
    from .run import RESULT

    last: Event = {}

    def hear(event: Event) -> str | None:
        if event["type"] == "done":
            last.update(event)
        return tell(event)

    figures = show(demo(options.out, _device(options.device)), hear)
    run = Path(figures["run"])
    print(table({name: figures[name] for name in ("ruined", "repaired", "original")}))
    print(f"\nrepaired text encoder: {run / RESULT}")
    print(f"loss picture:          {run / 'loss.png'}")
    print(f"what each one finds:   {options.out / NEAREST}")
    print(f"run folder:            {run}")
    print(f"{figures['seconds']} seconds")
    if last["resumed"]:
        print(f"The repair was finished before and only measured again; delete {options.out} to see it train.")
    return figures


# ---- arguments ------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gmp", description="Repairs broken text encoders.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable, text: str, example: str) -> argparse.ArgumentParser:
        one = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"example:\n  python -m gmp {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        one.set_defaults(command=run)
        one.add_argument("--json", action="store_true", help="print the answer as one JSON object on the last line")
        return one

    one = add("inspect", _inspect, "Say what files hold, from their headers.", "inspect clip_l.safetensors")
    one.add_argument("files", nargs="+", type=Path, metavar="FILE")

    one = add(
        "join",
        _join,
        "Put a text encoder and a vision tower together as one CLIP.",
        "join --text broken_clip_l.safetensors --vision ViT-L-14.safetensors --out joined.safetensors",
    )
    _add_towers(one)
    _add_writing(one)

    one = add(
        "repair",
        _repair,
        "Repair a text encoder on captioned pictures. The same command again resumes the run.",
        "repair --text broken_clip_l.safetensors --vision ViT-L-14.safetensors --images pictures "
        "--captions captions.json --out runs/first",
    )
    _add_towers(one)
    _add_data(one)
    _add_settings(one)

    one = add(
        "convert",
        _convert,
        "Write a text encoder, or a whole CLIP, in another layout.",
        "convert runs/first/text_encoder.safetensors --out clip_l.safetensors --dtype fp16",
    )
    one.add_argument("file", type=Path, metavar="FILE")
    one.add_argument("--whole", action="store_true", help="with the vision tower, where the file has one")
    _add_member(one)
    _add_writing(one)

    one = add(
        "measure",
        _measure,
        "Retrieval on captioned pictures, and drift from the original at every read point.",
        "measure --text clip_l.safetensors --vision ViT-L-14.safetensors --images pictures --captions captions.json",
    )
    _add_towers(one)
    _add_data(one)

    one = add(
        "world",
        _world,
        "Write captioned pictures of the small world.",
        "world --out pictures --count 8000 --seed 1",
    )
    one.add_argument("--out", type=Path, required=True, help="an empty folder, or one that does not exist")
    one.add_argument("--count", type=int, default=8000, help="pictures (8000)")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--split", choices=("train", "held_out"), default="train", help="seen by the shipped CLIP, or not")

    one = add("demo", _demo, "Repair the shipped ruined text encoder; no download.", "demo --out runs/demo")
    one.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for pictures and run (runs/demo)")
    one.add_argument("--device", help="cpu, cuda, cuda:1, mps or auto, the best there is (auto)")
    return parser


def _add_member(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--member", choices=("clip_l", "clip_g", "clip_h"), help="which one of a checkpoint (clip_l)")
    parser.add_argument("--heads", type=int, help="attention heads of the text tower, where the file does not say")
    parser.add_argument("--vision-heads", type=int, help="attention heads of the vision tower, likewise")
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
    _add_member(parser)


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder with the pictures")
    parser.add_argument(
        "--captions",
        type=Path,
        metavar="FILE",
        help='JSON {"sub/01.jpg": ["caption", …]}; without: .txt files beside',
    )
    parser.add_argument("--allow-missing", action="store_true", help="leave out pictures that are named but not there")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps or auto, the best there is (auto)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="for picture features (~/.cache/gmp)")


def _add_writing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .safetensors file")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    parser.add_argument(
        "--layout",
        choices=("huggingface", "openai", "gmp"),
        default="huggingface",
        help="names of the tensors (huggingface, which ComfyUI and diffusers read); gmp has r and theta",
    )
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="of the file (fp32)")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    from .config import PRECISIONS, TRAIN, RepairConfig
    from .optim import SCHEDULES

    default = RepairConfig()
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run's folder")
    parser.add_argument("--train", choices=TRAIN, default=default.train, help="text: vision is locked (default)")
    numbers = {
        "epochs": (int, "times through the pictures"),
        "batch": (int, "pairs in one forward pass"),
        "accumulate": (int, "batches in one step; exact, all pairs of the step are each other's negatives"),
        "warmup": (float, "share of the steps in which the rate rises"),
        "weight_decay": (float, "of weight matrices"),
        "smoothing": (float, "of labels"),
        "clip_norm": (float, "of all gradients together; 0 is off"),
        "anchor_captions": (int, "per step, at the full context length"),
        "held_out": (float, "share of the pictures that is measured and not trained on"),
        "save_every": (int, "steps; an epoch's end is always saved"),
        "keep": (int, "newest checkpoints that are kept"),
        "seed": (int, "of order and captions"),
    }
    for name, (kind, text) in numbers.items():
        value = getattr(default, name)
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=value, help=f"{text} ({value})")
    parser.add_argument("--lr", type=float, help="learning rate (1e-3 · (64 / text width)²: 7e-6 for clip_l)")
    parser.add_argument(
        "--rate", action="append", metavar="PATTERN=FACTOR", help="factor on the rate of parameters by name; 0 freezes"
    )
    parser.add_argument(
        "--schedule", choices=SCHEDULES, default=default.schedule, help=f"of the rate ({default.schedule})"
    )
    parser.add_argument(
        "--anchor",
        action="append",
        metavar="[TEACHER:]POINT=WEIGHT",
        help="keep a read point near the original's or the broken encoder's (original:penultimate=0.3)",
    )
    parser.add_argument("--no-anchor", action="store_true", help="contrastive loss alone: what SDXL reads stays broken")
    parser.add_argument("--plain", action="store_true", help="train plain weights, no r and theta")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default=default.precision, help="auto: bf16 or fp16 on a GPU, fp32 on a CPU"
    )
