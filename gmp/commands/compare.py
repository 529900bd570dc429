"""compare: pictures and numbers of text encoders against the original, and of a run over its steps."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import READ_POINTS
from ..errors import InputError
from ..events import Event, progress
from ..terminal import show
from .towers import add_pictures, check_new, check_place, device, has_pictures, read_pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..comparison import Comparison
    from ..prompts import Prompt

DOCUMENT = "comparison.json"
MEASURES = "recall and drift over steps"
FORMATS = ("png", "svg")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="the original first, then one or more to hold against it"
    )
    parser.add_argument(
        "--run", metavar="RUN", help="a run's folder, or its name below --folder: recall, drift by step"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where runs lie (runs)")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="for the pictures and comparison.json"
    )
    parser.add_argument("--force", action="store_true", help="replace what exists")
    parser.add_argument("--format", choices=FORMATS, default="png", help="of the pictures (png)")
    parser.add_argument(
        "--read-point", choices=READ_POINTS, default="penultimate", help="where prompts are looked at (penultimate)"
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="a prompt a line, or kind, tab, prompt; without: the shipped ones"
    )
    add_pictures(parser, "captioned pictures, to draw with their captions", required=False)
    parser.add_argument("--vision", type=Path, metavar="FILE", help="vision tower for --images (the original's file)")
    parser.add_argument("--umap", action="store_true", help="UMAP in place of PCA; needs the package umap-learn")


def compare(options: argparse.Namespace) -> object:
    _check(options)
    paths = [options.out / f"{_file(name)}.{options.format}" for name in _pictures(options)]
    documents = [options.out / _document(place) for place in range(1, len(options.files))]
    check_new([*paths, *documents], options.force)
    check_place([*paths, *documents])
    figures: dict[str, Figure] = {}
    found = None
    if options.run:
        figures[MEASURES] = _over_steps(options)
    if options.files:
        from ..comparison import PICTURES

        found = show(_compared(options))
        drawn = {name: PICTURES[name] for name in PICTURES if name in _pictures(options)}
        figures |= show(_drawn(drawn, found, options))
    return _write(options, figures, found, documents)


def _drawn(
    pictures: Mapping[str, Callable[..., Figure]], found: Comparison, options: argparse.Namespace
) -> Generator[Event, None, dict[str, Figure]]:
    figures = {}
    for done, (name, draw) in enumerate(pictures.items()):
        yield progress("draw pictures", done, len(pictures))
        figures[name] = draw(found, options.read_point, options.umap)
    yield progress("draw pictures", len(pictures), len(pictures))
    return figures


def _check(options: argparse.Namespace) -> None:
    if not options.files and not options.run:
        raise InputError("there is nothing to compare; name the original and another text encoder, or a run with --run")
    if len(options.files) == 1:
        raise InputError(f"{options.files[0].name} stands alone; name the original first, then what to hold against it")
    if options.captions and not options.images:
        raise InputError("--captions belongs to --images; name the folder with the pictures too")
    if options.out.exists() and not options.out.is_dir():
        raise InputError(f"{options.out} is a file; --out is the folder for pictures and {DOCUMENT}")
    if options.umap:
        from ..pca import check_umap

        check_umap()


def _pictures(options: argparse.Namespace) -> list[str]:
    """Names of the pictures that will be drawn."""
    names = [MEASURES] if options.run else []
    if options.files:
        from ..comparison import PICTURES

        names += [name for name in PICTURES if has_pictures(options) or name != "pictures and captions"]
    return names


def _file(name: str) -> str:
    return name.replace(" ", "_")


def _document(place: int) -> str:
    return DOCUMENT if place == 1 else f"{Path(DOCUMENT).stem}_{place}.json"


def _over_steps(options: argparse.Namespace) -> Figure:
    from ..comparison import over_steps
    from ..watch import Watch, find

    folder = find(options.folder, options.run)
    return over_steps(folder, Watch().history(folder, 0))


def _compared(options: argparse.Namespace) -> Generator[Event, None, Comparison]:
    from ..comparison import compare as hold
    from ..features import default_cache
    from ..layouts import read_text, read_vision
    from ..prompts import prompts
    from ..tokenizer import tokenizer_for

    chosen = read_prompts(options.prompts) if options.prompts else prompts()
    settings = (options.heads, options.activation, options.end_of_text)
    index = read_pictures(options) if has_pictures(options) else None  # before a bar is there
    files = {}
    for done, (name, path) in enumerate(zip(names(options.files), options.files, strict=True)):
        yield progress("read files", done, len(options.files))
        files[name] = read_text(path, options.member, *settings)
    yield progress("read files", len(files), len(files))
    vision = None
    if index is not None:
        vision = read_vision(options.vision or options.files[0], options.vision_heads, options.activation)
    original = next(iter(files.values()))
    return (
        yield from hold(
            files,
            chosen,
            tokenizer_for(original.config.context_length, original.source.member),
            device=device(options.device),
            index=index,
            vision=vision,
            cache=options.cache or default_cache(),
        )
    )


def names(paths: Sequence[Path]) -> list[str]:
    """File names, with as many folders before them, and a number at last, as tell them from each other."""
    found: list[str] = []
    for path in paths:
        alike = [other for other in paths if other.name == path.name]
        name = path.name if len(alike) == 1 else "/".join(path.absolute().parts[-2:])
        again = sum(other == name or other.startswith(f"{name} (") for other in found)
        found.append(f"{name} ({again + 1})" if again else name)
    return found


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """Prompts of a text file, as `gmp.comparison.own_prompts` reads them. Raises InputError for one that is no text."""
    from ..comparison import own_prompts

    if not path.is_file():
        raise InputError(f"{path} is no file; --prompts is a text file with one prompt a line")
    try:
        return own_prompts(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise InputError(f"{path.name} is no text in UTF-8; give a file with one prompt a line") from None


def _write(
    options: argparse.Namespace, figures: Mapping[str, Figure], found: Comparison | None, documents: Sequence[Path]
) -> object:
    from ..files import write_json

    options.out.mkdir(parents=True, exist_ok=True)
    written = show(_saved(options, figures))
    made = found.documents() if found else []
    for path, document in zip(documents, made, strict=True):
        write_json(document, path)
        written.append(path)
    for line in found.lines(options.read_point) if found else []:
        print(line)
    for path in written:
        print(f"written: {path}")
    return {"written": [str(path) for path in written], "comparisons": made}


def _saved(options: argparse.Namespace, figures: Mapping[str, Figure]) -> Generator[Event, None, list[Path]]:
    from ..plots import save

    written = []
    for name, figure in figures.items():
        yield progress("write pictures", len(written), len(figures))
        written.append(options.out / f"{_file(name)}.{options.format}")
        save(figure, written[-1])
    yield progress("write pictures", len(written), len(figures))
    return written
