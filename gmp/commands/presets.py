"""presets: recipes and when to use them."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this one as TOML, every setting with a sentence")
    parser.add_argument("--check", type=Path, metavar="TOML", help="tell all that does not work in a configuration")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write it there, for --config, in place of printing it"
    )
    parser.add_argument("--force", action="store_true", help="replace what exists")


def presets(options: argparse.Namespace) -> object:
    from ..errors import InputError
    from ..presets import preset, read_config
    from ..presets import presets as known
    from .towers import check_new, check_place

    if options.check and options.name:
        raise InputError("--check takes a file in place of a name; give one of them")
    if options.check:
        config = read_config(options.check)
        print(f"{options.check} works: {', '.join(map(str, config.anchors)) or 'no anchor'}, epochs {config.epochs}")
        return config.to_json()
    if options.name:
        chosen = preset(options.name)
        text = "\n".join([*(f"# {line}" for line in textwrap.wrap(chosen.when, 118)), chosen.config.to_toml()])
        if options.out:
            check_new([options.out], options.force)
            check_place([options.out])
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(text, encoding="utf-8")
            print(f"{options.out} has every setting of {chosen.name}; repair takes it as --config")
        else:
            print(text)
        return {"name": chosen.name, "when": chosen.when, "settings": chosen.config.to_json()}
    if options.out:
        raise InputError("--out writes one preset; name it")
    for one in known().values():
        print(textwrap.fill(f"{one.name:<24}{one.when}", 110, subsequent_indent=" " * 24))
    return [{"name": one.name, "when": one.when} for one in known().values()]
