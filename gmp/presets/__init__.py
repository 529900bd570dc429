"""Recipes: settings of a repair by name, each with a sentence that says when to use it.

A preset is one TOML file beside this one: `when`, and settings as in any configuration; what it leaves out has its
default. A table `variants.NAME` has settings that replace those of the file, and a `when` of its own. The `seed-*`
presets are the recipes of zer0int/CLIP-fine-tune as they were meant; where a defect made the two differ, `as_it_ran` is
what the scripts did.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..config import RepairConfig
from ..errors import InputError
from ..settings import SettingsError, over, read_toml

DEFAULT = "sdxl-repair"
# In the order in which people are shown them.
NAMES = (
    *("sdxl-repair", "flux-repair", "sd15", "clip-g", "gentle", "large-batch", "spectrum-icons"),
    *("seed-gmp", "seed-smooth", "seed-neurons", "seed-plain"),
)
MEANT = "as_intended"  # what a file's own settings are called beside its variants
_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Preset:
    """Settings under a name."""

    name: str
    when: str  # a sentence: when to use it
    config: RepairConfig

    def __str__(self) -> str:
        anchors = ", ".join(map(str, self.config.anchors)) or "no anchor"
        return f"{self.name} ({anchors}; epochs {self.config.epochs})"


@functools.cache
def presets() -> Mapping[str, Preset]:
    """All presets, and their variants as `NAME/VARIANT`, by name."""
    found: dict[str, Preset] = {}
    for name in NAMES:
        found |= _read(name)
    return found


def preset(name: str) -> Preset:
    """The preset of this name. Raises InputError for one that is not known, naming the nearest."""
    known = presets()
    stem, _, variant = name.partition("/")
    if variant == MEANT and any(other.startswith(f"{stem}/") for other in known):
        name = stem
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        meant = f"; did you mean {near[0]}?" if near else "."
        raise InputError(f"there is no preset {name!r}{meant} There are {', '.join(known)}")
    return known[name]


def aimed(preset: Preset, read_point: str) -> Preset:
    """The preset with its anchors at another read point."""
    anchors = tuple(replace(anchor, read_point=read_point) for anchor in preset.config.anchors)
    return replace(preset, config=replace(preset.config, anchors=anchors))


def read_config(path: Path) -> RepairConfig:
    """A configuration from a TOML file; its key `preset` names what it is a change of, otherwise defaults are.

    Raises InputError for a file that cannot be read, and with all that does not work in it.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"the configuration {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"the configuration {path} is not UTF-8 text (byte {error.start})") from None
    values = read_toml(text, str(path))
    values.pop("when", None)
    if "preset" not in values:
        return RepairConfig.from_json(values, str(path))
    try:
        base, problems = preset(str(values.pop("preset"))).config.to_json(), []
    except InputError as error:  # what else does not work is told too
        base, problems = {}, [str(error)]
    try:
        config = RepairConfig.from_json(over(base, values), str(path))
    except SettingsError as error:
        raise SettingsError(str(path), [*problems, *error.problems]) from None
    if problems:
        raise SettingsError(str(path), problems)
    return config


def _read(name: str) -> dict[str, Preset]:
    path = _FOLDER / f"{name}.toml"
    values = read_toml(path.read_text(encoding="utf-8"), path.name)
    variants = values.pop("variants", {})
    found = {name: _preset(name, values)}
    for variant, own in variants.items():
        found[f"{name}/{variant}"] = _preset(f"{name}/{variant}", values | own)
    return found


def _preset(name: str, values: Mapping[str, object]) -> Preset:
    settings = {key: value for key, value in values.items() if key != "when"}
    return Preset(name, values["when"], RepairConfig.from_json(settings, f"preset {name}"))
