"""What `torch.save` and training programs put around tensors: dicts, checkpoints, modules, TorchScript.

Works on the inert stand-ins of `unpickle`. They may hold themselves and share parts, so every walk is counted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError, some
from .header import NAME_LIMIT, TensorInfo
from .tensors import DTYPES, STORAGES, Storage, is_tensor, makes_tensors, tensor_info
from .unpickle import Global, Loaded, Standin

# Of several sets of tensors in a checkpoint, the first of these is the model.
PREFERRED = ("state_dict", "model_state_dict", "model", "module", "params_ema", "params")
LEVELS = 4  # of dicts around the tensors
DEPTH_LIMIT = 64  # modules within modules
NODE_LIMIT = 200_000  # entries of modules; shared ones count as often as they have a name

_TREE = ("_parameters", "_buffers", "_modules")
# What the pickles of plain tensors name.
_OWN = {
    "collections.OrderedDict", "collections.defaultdict", "torch.Size", "torch.device", "_codecs.encode",
    "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer", "torch.jit._pickle.restore_type_tag",
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("set", "frozenset", "dict")),
    *(f"{module}.{name}" for module in ("torch", "torch.storage", "torch.cuda") for name in STORAGES),
    *(f"torch.{name}" for name in DTYPES),
}  # fmt: skip


def find(loaded: Loaded, path: Path, storages: Mapping[str, Storage]) -> tuple[dict[str, TensorInfo], tuple[str, ...]]:
    """The named tensors of what `torch.save` or `torch.jit.save` wrote, and sentences on what else was in it.

    They are in a dict, or in a module as parameters and lasting buffers, or in a checkpoint around one of these.
    Raises InputError where there are none, or several sets and no telling which is the model; and for tensors that
    reach beyond their storage, or are sparse, quantised, expanded or otherwise more than their bytes.
    """
    unread: list[str] = []
    try:
        named = _search(loaded.value, unread)
    except ValueError as error:
        raise InputError(f"{path.name} {error}") from error
    tensors, problems = {}, []
    for name, value in named.items():
        try:
            tensors[name] = tensor_info(name, value, path, storages)
        except ValueError as error:
            problems.append(f"{name} {error}")
    if problems:
        raise InputError(
            f"{path.name} holds tensors that cannot be read: {some(problems)}; download it again, or have the program "
            "that made it save plain tensors"
        )
    notes = [f"holds {some(unread)}, which {'was' if len(unread) == 1 else 'were'} not read"] if unread else []
    if loaded.left_out:
        notes.append(f"holds {loaded.left_out:,} entries whose key is neither text nor number; they were left out")
    if foreign := _foreign(loaded.globals):
        notes.append(f"beside tensors it names {some(foreign, sort=False)}: nothing of it was imported or run")
    return tensors, tuple(notes)


def _search(value: Any, unread: list[str]) -> dict[str, Any]:
    """Stand-ins of tensors by name. `unread` gets the names of what lies beside them."""
    for _ in range(LEVELS):
        if _is_module(value):
            return _walk(value, unread)
        if not isinstance(value, dict):
            break
        tensors = {key: item for key, item in value.items() if isinstance(key, str) and is_tensor(item)}
        chosen = _inner(value, any_name=not tensors)
        unread += [str(key) for key in value if key != chosen and (chosen is not None or key not in tensors)]
        if chosen is None and tensors:
            return tensors
        if chosen is None:
            break
        value = value[chosen]
    found = "a single tensor without a name" if is_tensor(value) else "no tensors by name"
    beside = f", but {some(unread)}" if unread else ""
    raise ValueError(f"holds {found}{beside}; give the file of a model's weights")


def _inner(value: dict[Any, Any], any_name: bool) -> str | None:
    """Under which key a checkpoint has its model; None where there is none. any_name: take the only one there is."""
    seen: dict[tuple[int, int], bool] = {}
    inner = [key for key, item in value.items() if isinstance(key, str) and _has_tensors(item, LEVELS, seen)]
    for key in PREFERRED:
        if key in inner:
            return key
    if any_name and len(inner) > 1:
        raise ValueError(f"holds several sets of tensors ({some(inner)}); save the one that is meant by itself")
    return inner[0] if any_name and inner else None


def _has_tensors(value: Any, depth: int, seen: dict[tuple[int, int], bool]) -> bool:
    """True for modules, dicts of tensors and dicts around these. `seen` keeps shared dicts from being read again."""
    if _is_module(value):
        return True
    if not isinstance(value, dict) or not depth:
        return False
    place = (id(value), depth)
    if place not in seen:
        seen[place] = any(
            isinstance(key, str) and (is_tensor(item) or _has_tensors(item, depth - 1, seen))
            for key, item in value.items()
        )
    return seen[place]


def _is_script(value: Any) -> bool:
    """True for a module of TorchScript, which has all its attributes in one dict."""
    return (
        isinstance(value, Standin)
        and isinstance(value.made_by, Global)
        and _is_script_class(value.made_by)
        and isinstance(value.state, dict)
    )


def _is_script_class(name: Global) -> bool:
    return name.module.partition(".")[0] == "__torch__"


def _is_module(value: Any) -> bool:
    """True for a torch.nn.Module of any class, and for a module of TorchScript."""
    state = value.state if isinstance(value, Standin) else None
    return _is_script(value) or (isinstance(state, dict) and all(isinstance(state.get(name), dict) for name in _TREE))


def _entries(module: Standin) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and submodules by name, as in the module's state_dict."""
    if _is_script(module):
        tensors = {name: value for name, value in module.state.items() if is_tensor(value)}
        return tensors, {name: value for name, value in module.state.items() if _is_script(value)}
    parameters, buffers, modules = (module.state[name] for name in _TREE)
    passing = module.state.get("_non_persistent_buffers_set")
    passing = passing if isinstance(passing, set) else set()
    tensors = {**parameters, **{name: value for name, value in buffers.items() if name not in passing}}
    tensors = {name: value for name, value in tensors.items() if value is not None}
    return tensors, {name: value for name, value in modules.items() if value is not None}


def _walk(root: Standin, unread: list[str]) -> dict[str, Any]:
    """Stand-ins of all tensors of a module and those below it, by dotted names."""
    found: dict[str, Any] = {}
    left = NODE_LIMIT
    pending = [("", root, 0)]
    while pending:
        prefix, module, depth = pending.pop()
        if not _is_module(module):
            unread.append(prefix.removesuffix("."))
            continue
        left -= 1 + (len(module.state) if _is_script(module) else sum(len(module.state[name]) for name in _TREE))
        if left < 0 or depth > DEPTH_LIMIT or len(prefix) > NAME_LIMIT:
            raise ValueError("holds modules within modules without end; it is damaged")
        tensors, modules = _entries(module)
        if any(not isinstance(name, str) or len(name) > NAME_LIMIT for name in (*tensors, *modules)):
            raise ValueError("holds a module with parts whose names are not text, or too long; it is damaged")
        for name, value in tensors.items():
            if found.setdefault(f"{prefix}{name}", value) is not value:
                raise ValueError(f"holds two tensors of one name, {some([prefix + name])}; it is damaged")
        pending += [(f"{prefix}{name}.", child, depth + 1) for name, child in reversed(modules.items())]
    return found


def _foreign(names: Iterable[Global]) -> list[str]:
    """What has nothing to do with tensors. Python's own modules come first: through them a pickle would run code."""
    foreign = [
        str(name) for name in names if str(name) not in _OWN and not _is_script_class(name) and not makes_tensors(name)
    ]

    def rank(name: str) -> int:
        top = name.partition(".")[0]
        return 0 if top in sys.stdlib_module_names or top == "__builtin__" else 2 if top == "torch" else 1

    return sorted(foreign, key=rank)
