"""inspect, encode, join, convert and lora: files in, files out."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..errors import InputError
from ..terminal import show
from .towers import check_new, check_out, read_towers

if TYPE_CHECKING:
    from ..layouts import OpenTower


def inspect(options: argparse.Namespace) -> object:
    from ..inspection import inspect as look
    from ..inspection import lines

    answers, problems = [], []
    for path in options.files:
        try:
            inspection = look(path)
        except InputError as error:
            problems.append(str(error))
            answers.append({"file": str(path), "kind": None, "problems": [str(error)]})
            print(f"{path}: {error}")
            continue
        answers.append(asdict(inspection))
        print("\n".join(lines(inspection)))
    if problems:
        print(f"error: {'; '.join(problems)}", file=sys.stderr)
        options.code = 2
    return answers


def encode(options: argparse.Namespace) -> object:
    from ..data.images import load_picture, preprocess
    from ..encode import encode as compute
    from ..encode import read_pixels, read_tokens
    from ..files import write_safetensors
    from ..layouts import read_text, read_vision
    from ..tokenizer import tokenizer_for

    check_out(options.out, options.force)
    asked = [options.text or options.tokens, options.image or options.pixels]
    if not any(asked):
        raise InputError("nothing to encode; give --text or --tokens, --image or --pixels, or one of each pair")
    text = vision = ids = pixels = None
    notes: list[str] = []
    if asked[0]:
        text = read_text(options.file, options.member, options.heads, options.activation, options.end_of_text)
        notes += [*text.source.assumptions, *text.source.notes]
    if asked[1]:
        vision = read_vision(options.file, options.vision_heads, options.activation)
        notes += [*vision.source.assumptions, *vision.source.notes]
    if options.tokens:
        ids = read_tokens(options.tokens)
    elif options.text:
        tokens = tokenizer_for(text.config.context_length, text.source.member)(options.text)
        ids = tokens.ids
        if tokens.truncated:
            notes.append(f"{tokens.truncated} texts were cut to {text.config.context_length} tokens")
    if options.pixels:
        pixels = read_pixels(options.pixels)
    elif options.image:
        pixels = preprocess(load_picture(options.image), vision.config.image_size)[None]
    encoded = compute(text, vision, ids, pixels)
    notes += encoded.notes
    taken = {"file": options.file.name, "member": text and text.source.member, "text": options.text}
    taken |= {"tokens": ids.tolist() if options.text else None, "notes": notes}
    write_safetensors(encoded.tensors, options.out, {"gmp_encoded": json.dumps(taken)})
    for name, tensor in encoded.tensors.items():
        print(f"{name}: {list(tensor.shape)}")
    for note in notes:
        print(note)
    print(f"written: {options.out}")
    shapes = {name: list(tensor.shape) for name, tensor in encoded.tensors.items()}
    return {"out": str(options.out), "tensors": shapes, "notes": notes}


def join(options: argparse.Namespace) -> object:
    from ..geometric import split_mlps
    from ..join import join as put_together
    from ..layouts import write_clip

    options.layout = options.layout or "huggingface"
    check_writing(options)
    text, vision, original = read_towers(options)
    joined = put_together(text, vision, original)
    state = split_mlps(joined.state) if options.layout == "gmp" else joined.state
    hashes = {role: source.sha256 for role, source in joined.sources.items()}
    metadata = {"gmp_sources": json.dumps({"sha256": hashes, "tensors": joined.summary()})}
    write_clip(state, options.out, layout=options.layout, dtype=options.dtype, config=joined.config, metadata=metadata)
    for origin in joined.report:
        print(f"{origin.name}: {origin.tensors} tensors from {origin.source} ({origin.reason})")
    for sentence in joined.assumptions:
        print(f"assumed: {sentence}")
    print(f"written: {options.out}")
    report = joined.as_json()
    return {"out": str(options.out), "tensors": report["tensors"], "assumptions": joined.assumptions}


def convert(options: argparse.Namespace) -> object:
    from ..clip import CLIPConfig
    from ..geometric import split_mlps
    from ..layouts import insert_text, open_text, open_vision, write_clip, write_text

    if options.into and options.layout:
        raise InputError("--into keeps the checkpoint's own layout; give --layout or --into, not both")
    options.layout = options.layout or "huggingface"
    if options.into:
        check_out(options.out, options.force)
    else:
        check_writing(options)
    text = open_text(options.file, options.member, options.heads, options.activation, options.end_of_text)
    towers = [text]
    if options.whole:
        towers.append(open_vision(options.file, options.vision_heads, options.activation))
    fold = options.layout != "gmp" or options.into is not None
    state = {name: tensor for tower in towers for name, tensor in tower.tensors(fold).items()}
    if not fold:
        state = split_mlps({name: pending.make().float() for name, pending in state.items()})
    dtype = "fp32" if not fold and options.dtype == "keep" else options.dtype
    source = text.source()
    metadata = {"gmp_source": json.dumps({"file": source.path, "sha256": source.sha256})}
    if options.into:
        names = {"member": source.member, "config": text.config}
        inserted = insert_text(state, options.into, options.out, dtype=dtype, metadata=metadata, **names)
        print(f"{len(inserted.replaced)} tensors of {options.into.name} replaced; its other tensors keep their bytes")
        for sentence in inserted.notes:
            print(f"{options.into.name}: {sentence}")
    elif options.whole:
        config = CLIPConfig(text.config, towers[1].config)
        write_clip(state, options.out, layout=options.layout, dtype=dtype, config=config, metadata=metadata)
    else:
        write_text(state, options.out, layout=options.layout, dtype=dtype, config=text.config, metadata=metadata)
    _tell(towers)
    print(f"written: {options.out}")
    return {"out": str(options.out), "source": asdict(source)}


def lora(options: argparse.Namespace) -> object:
    from ..layouts import read_text
    from ..lora import repair_lora, write_lora

    check_out(options.out, options.force)
    repaired = read_text(options.file, options.member, options.heads, options.activation)
    broken = read_text(options.broken, options.member or repaired.source.member, options.heads, options.activation)
    made = show(repair_lora(repaired, broken, options.rank, whole=not options.linears_only, dtype=options.dtype))
    write_lora(made, options.out)
    print(f"{made.member}, rank {made.rank}: keeps {made.kept:.1%} of the change in {len(made.layers)} tensors")
    for row in made.left_out:
        print(f"left out: {row.name} ({row.reason})")
    print(f"written: {options.out}; Load LoRA applies it to the broken encoder's {made.member} at strength_clip 1")
    return {
        "out": str(options.out),
        "member": made.member,
        "rank": made.rank,
        "kept": made.kept,
        "layers": [asdict(row) for row in made.layers],
        "left_out": [asdict(row) for row in made.left_out],
    }


def check_writing(options: argparse.Namespace) -> None:
    from ..layouts import targets

    paths = targets(options.out, options.layout)
    if paths == [options.out]:
        return check_out(options.out, options.force)
    if options.out.suffix or options.out.is_file():
        raise InputError(f"{options.out} will be a folder in layout {options.layout}; give it a name without a suffix")
    check_new(paths, options.force)


def _tell(towers: list[OpenTower]) -> None:
    for tower in towers:
        for sentence in (*tower.assumptions, *tower.notes):
            print(sentence)
