"""How to do a run again: its command or its graph, without folders of this machine."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath


def command_line(arguments: list[str]) -> str:
    """The command that was given in a terminal; absolute paths are told by their last part."""
    return shlex.join(["python", "-m", "gmp", "repair", *map(_argument, arguments)])


def graph(prompt: Mapping[str, object]) -> str:
    """The nodes that were queued, as ComfyUI's POST /prompt takes them."""
    return json.dumps(_names_only(prompt), indent=1, ensure_ascii=False)


def name_only(value: str) -> str:
    """An absolute path's last part; any other text as it is."""
    absolute = PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()
    return (PureWindowsPath(value).name or value) if absolute and "\n" not in value else value


def _argument(given: str) -> str:
    """`--images=/data/pictures` names a path as well."""
    option, is_, value = given.partition("=")
    return f"{option}={name_only(value)}" if is_ and option.startswith("--") else name_only(given)


def _names_only(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _names_only(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_names_only(one) for one in value]
    return name_only(value) if isinstance(value, str) else value
