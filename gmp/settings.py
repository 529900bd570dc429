"""Settings that document and check themselves: frozen dataclasses, read from TOML or JSON and written back.

A field made by `setting` carries its sentence and its bounds. Reading collects every problem of a file, in nested
tables too, before it raises, and names the nearest known key for one that is not known.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import tomli_w

from .errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Settings = TypeVar("Settings")
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


def setting(
    default: Any,
    doc: str,
    *,
    least: float | None = None,
    most: float | None = None,
    below: float | None = None,
    above: float | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """A dataclass field with a sentence that documents it and the bounds that `faults` checks.

    A default that cannot be shared, a mapping, is given as the function that makes it; `dataclasses.MISSING` is none.
    """
    bounds = {"least": least, "most": most, "below": below, "above": above, "choices": tuple(choices)}
    kind = "default_factory" if callable(default) else "default"
    return dataclasses.field(**{kind: default}, metadata={"doc": doc} | bounds)


REQUIRED = dataclasses.MISSING


def read_toml(text: str, name: str) -> dict[str, Any]:
    """A TOML document as plain values. Raises InputError with the line that is wrong; `name` says whose it is."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{name} is not TOML: {error}") from None


class SettingsError(InputError):
    """Settings that do not work; `problems` has a sentence for each reason."""

    def __init__(self, name: str, problems: Sequence[str]):
        self.problems = tuple(problems)
        told = self.problems[0] if len(self.problems) == 1 else "".join(f"\n  {one}" for one in self.problems)
        super().__init__(f"{name} does not work: {told}")


def build(kind: type[Settings], values: Mapping[str, Any], name: str) -> Settings:
    """Settings from plain values of TOML or JSON; what is not given has its default.

    Raises SettingsError with all unknown keys, wrong types, values out of bounds and contradictions at once; `name`
    says whose they are.
    """
    problems: list[str] = []
    made = _build(kind, values, "", problems)
    if problems:
        raise SettingsError(name, dict.fromkeys(problems))
    return made


def faults(settings: Any, where: str = "") -> Iterator[str]:
    """A sentence for every value out of its bounds, in nested settings too."""
    for field in dataclasses.fields(settings):
        value, path = getattr(settings, field.name), where + field.name
        for at, part in _parts(value, path):
            yield from faults(part, f"{at}.") if dataclasses.is_dataclass(part) else _fault(part, at, field)


def _parts(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The values that a field's bounds are about, each with its place."""
    if isinstance(value, Mapping):
        yield from ((f"{path}.{key}", part) for key, part in value.items())
    elif isinstance(value, tuple):
        yield from ((f"{path}[{i}]", part) for i, part in enumerate(value))
    elif value is not None:
        yield path, value


def _fault(value: Any, path: str, field: dataclasses.Field) -> Iterator[str]:
    bounds = field.metadata
    if dataclasses.is_dataclass(value):  # its fields have bounds of their own
        return
    if choices := bounds["choices"]:
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, 1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            yield f"{path} is {value!r}, not one of {', '.join(choices)}{meant}"
        return
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{path} is {value}, not a finite number"
        return
    for bound, holds, words in (
        ("least", lambda v, b: v >= b, "less than"),
        ("most", lambda v, b: v <= b, "more than"),
        ("above", lambda v, b: v > b, "not above"),
        ("below", lambda v, b: v < b, "not below"),
    ):
        limit = bounds[bound]
        if limit is not None and not holds(value, limit):
            yield f"{path} is {value:g}, {words} {limit:g}"


def over(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values with others in their place, tables key by key."""
    merged = dict(values)
    for key, change in changes.items():
        before = merged.get(key)
        both = isinstance(before, Mapping) and isinstance(change, Mapping)
        merged[key] = over(before, change) if both else change
    return merged


# ---- plain values -> settings ---------------------------------------------------------------------------------------


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _build(kind: type, values: Any, where: str, problems: list[str]) -> Any:
    """Settings of this kind, None where a value has no place or not its type."""
    if not isinstance(values, Mapping):
        problems.append(f"{where.rstrip('.') or 'the whole'} is {values!r}, not a table of settings")
        return None
    hints = _hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in [key for key in values if key not in fields]:
        near = difflib.get_close_matches(str(key), fields, 1)
        problems.append(f"{where}{key} is no setting{f'; did you mean {where}{near[0]}?' if near else ''}")
    made = {}
    for name, field in fields.items():
        if name in values:
            before = len(problems)
            value = _value(hints[name], values[name], where + name, problems)
            if len(problems) == before:
                problems += [fault for at, part in _parts(value, where + name) for fault in _fault(part, at, field)]
            if len(problems) == before:
                made[name] = value
        elif field.default is REQUIRED and field.default_factory is REQUIRED:
            problems.append(f"{where}{name} is missing ({field.metadata['doc']})")
    try:
        return kind(**made)  # what is wrong has its default: contradictions of the rest are told too
    except SettingsError as error:
        problems += error.problems
    except TypeError:  # something required is missing or wrong
        pass
    return None


def _value(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _value(next(one for one in arguments if one is not type(None)), value, path, problems)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{path}.", problems)
    if origin is tuple:
        return _tuple(arguments, value, path, problems)
    if origin is dict:
        if not isinstance(value, Mapping):
            problems.append(f"{path} is {value!r}, not a table")
            return None
        return {key: _value(arguments[1], part, f"{path}.{key}", problems) for key, part in value.items()}
    fits = isinstance(value, (int, float) if hint is float else hint) and (hint is bool or not isinstance(value, bool))
    if not fits:
        problems.append(f"{path} is {value!r}, not {_KINDS[hint]}")
        return None
    return hint(value)


def _tuple(arguments: tuple, value: Any, path: str, problems: list[str]) -> tuple | None:
    if not isinstance(value, (list, tuple)):
        problems.append(f"{path} is {value!r}, not a list")
        return None
    if arguments[-1] is not Ellipsis and len(value) != len(arguments):
        problems.append(f"{path} has {len(value)} values, not {len(arguments)}")
        return None
    return tuple(_value(arguments[0], part, f"{path}[{i}]", problems) for i, part in enumerate(value))


# ---- settings -> plain values ---------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Settings as JSON has them: tables, lists, None."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, tuple) else value


def as_toml(settings: Any, head: Mapping[str, Any]) -> str:
    """A TOML document with every setting, each under its sentence; one that is not set is a comment.

    head: values that come first, such as the version.
    """
    return "\n".join([tomli_w.dumps(head), *_document(settings, "")])


def _document(settings: Any, where: str) -> list[str]:
    lines, tables = [], []
    for field in dataclasses.fields(settings):
        value, path = getattr(settings, field.name), where + field.name
        doc = [f"# {line}" for line in _told(field)]
        if dataclasses.is_dataclass(value):
            tables += ["", *doc, f"[{path}]", *_document(value, f"{path}.")]
        elif isinstance(value, Mapping):
            body = tomli_w.dumps(dict(value)).rstrip("\n").split("\n") if value else ["# none"]
            tables += ["", *doc, f"[{path}]", *body]
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            tables += ["", *doc]
            for one in value:
                given = {key: part for key, part in vars(one).items() if part is not None}
                tables += [f"[[{path}]]", *(f"{key} = {_inline(part)}" for key, part in given.items()), ""]
            tables.pop()
        elif value is None:
            lines += [*doc, f"# {field.name} = (not set)"]
        else:
            lines += [*doc, f"{field.name} = {_inline(value)}"]
    return [*lines, *tables]


def _inline(value: Any) -> str:
    """A value as it stands behind `key = `."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_inline, value))}]"
    return tomli_w.dumps({"key": value}).removeprefix("key = ").rstrip("\n")


def _told(field: dataclasses.Field) -> list[str]:
    doc, choices = field.metadata["doc"], field.metadata["choices"]
    return [doc, *([f"One of {', '.join(choices)}."] if choices else [])]
