"""Pickles from strangers, read as data: an interpreter of their operations that imports nothing and calls nothing.

Classes and functions become their names, and what calling them would have given becomes a stand-in that keeps the
arguments. The standard library's `pickletools` tells the operations apart and documents each. Refused are copyreg's
extension codes and buffers outside of the pickle, which no model file has.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from ..errors import InputError

SIZE_LIMIT = 100_000_000  # bytes; the pickle in Stable Diffusion's first checkpoint has less than a million
OPERATION_LIMIT = 5_000_000  # a model of 3,000 tensors takes 100,000; all of them as empty sets take 1 GB
LINE_LIMIT = 65_536  # bytes of an argument that ends with its line
PROTOCOL = 5
KEY_LIMIT = 1 << 32  # larger numbers could be chosen to collide in a dict, which then takes hours to fill

_DICTS = {"collections.OrderedDict", "collections.defaultdict", "builtins.dict", "__builtin__.dict"}
_SETS = {"builtins.set", "builtins.frozenset", "__builtin__.set", "__builtin__.frozenset"}


@dataclass(frozen=True)
class Global:
    """A class or function that a pickle asks for, by name."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


# These two are compared by identity and have no repr: what they hold may nest deeper than Python's stack.
@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Persistent:
    """Something that lies outside of the pickle, by what the pickle calls it."""

    pid: Any


@dataclass(eq=False, repr=False, slots=True)
class Standin:
    """What calling `made_by` with `args` would have given. Not frozen: pickles make objects first and fill them later.

    state: what the pickle sets its attributes to. items: what the pickle adds to it, as pairs where it gives keys.
    """

    made_by: Global | Persistent | Standin
    args: tuple[Any, ...]
    state: Any = None
    items: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Loaded:
    """A pickle's value, of None, numbers, str, bytes, list, tuple, dict, set and the three classes above.

    globals: every name it asks for, in order. left_out: how many entries of dicts and sets had a key that is not
    text, bytes, None, a Global or a number below 2³²; hashing any other may crash or take hours.
    """

    value: Any
    globals: tuple[Global, ...]
    persistents: tuple[Persistent, ...]
    left_out: int


def load(file: BinaryIO, name: str, *, size_limit: int = SIZE_LIMIT, operation_limit: int = OPERATION_LIMIT) -> Loaded:
    """Read one pickle from where the file stands, and no byte further.

    name: what errors call the file. size_limit: bytes.
    Containers in the value may hold themselves and nest to any depth: walk them without recursion, and count.
    Raises InputError for a damaged pickle, one that is over a limit, and operations that are not supported.
    """
    machine = _Machine(operation_limit)
    here = file.tell()
    there = file.seek(0, io.SEEK_END) - here
    file.seek(here)
    try:
        for operation, argument, _ in pickletools.genops(_Bounded(file, min(there, size_limit))):
            machine.spend(1)
            if operation.name not in _OPERATIONS:
                raise ValueError(f"{operation.name} is not supported")
            _OPERATIONS[operation.name](machine, argument)
        value = machine.stack.pop()
    except IndexError:
        problem = "it takes more from its stack than is there"
    except ValueError as error:
        problem = str(error)
    else:
        return Loaded(value, tuple(machine.globals), tuple(machine.persistents), machine.left_out)
    problem = problem if len(problem) < 200 else f"{problem[:200]} …"
    raise InputError(f"{name} holds a pickle that is damaged or no model's ({problem}); download it again")


class _Bounded:
    """A file that gives so many bytes, and allocates nothing for those it cannot give."""

    def __init__(self, file: BinaryIO, limit: int):
        self.file, self.left, self.limit = file, limit, limit

    def read(self, count: int) -> bytes:
        if count > self.left:
            raise ValueError(f"it goes on beyond {self.limit:,} bytes")
        self.left -= count
        return self.file.read(count)

    def readline(self) -> bytes:
        line = self.file.readline(min(self.left, LINE_LIMIT))
        self.left -= len(line)
        return line


class _Machine:
    """The stack and the memo that operations work on. A mark sets the stack aside and begins another."""

    def __init__(self, operation_limit: int):
        self.limit, self.left = operation_limit, operation_limit
        self.stack: list[Any] = []
        self.aside: list[list[Any]] = []
        self.memo: dict[int, Any] = {}  # not a list: a pickle may begin to count anywhere
        self.globals: dict[Global, Global] = {}
        self.persistents: list[Persistent] = []
        self.left_out = 0

    def spend(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise ValueError(f"it takes more than {self.limit:,} operations")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        self.aside.append(self.stack)
        self.stack = []

    def above_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.aside.pop()
        return items

    def top(self, count: int) -> list[Any]:
        """The last `count` values, taken from the stack."""
        return [self.stack.pop() for _ in range(count)][::-1]

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.above_mark()

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise ValueError("it asks for a memo that it never wrote")
        self.stack.append(self.memo[index])

    def put(self, index: int) -> None:
        if not 0 <= index < KEY_LIMIT:
            raise ValueError("it numbers a memo out of range")
        self.memo[index] = self.stack[-1]

    def add(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, set):
            target |= self.plain(values)
        elif isinstance(target, list):
            target += values
        elif isinstance(target, Standin):
            target.items += values
        else:
            raise ValueError(f"it adds items to a {type(target).__name__}")

    def make_dict(self) -> None:
        flat = self.above_mark()
        self.stack.append({})
        self.set_items(flat)

    def set_items(self, flat: list[Any]) -> None:
        target = self.stack[-1]
        pairs = zip(flat[::2], flat[1::2], strict=True)
        if isinstance(target, dict):
            self.update(target, pairs)
        elif isinstance(target, Standin):
            target.items += pairs
        else:
            raise ValueError(f"it sets entries of a {type(target).__name__}")

    def update(self, target: dict[Any, Any], pairs: Iterable[Any]) -> None:
        for pair in pairs:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise ValueError("it fills a dict with something else than pairs")
            if _is_plain(pair[0]):
                target[pair[0]] = pair[1]
            else:
                self.left_out += 1

    def plain(self, values: list[Any]) -> set[Any]:
        kept = [value for value in values if _is_plain(value)]
        self.left_out += len(values) - len(kept)
        return set(kept)

    def name(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError("it names a class by something else than text")
        found = Global(module, name)
        self.stack.append(self.globals.setdefault(found, found))

    def make(self, made_by: Any, args: Any) -> None:
        """What stands for an object. Only dicts and sets become themselves."""
        if not isinstance(made_by, (Global, Persistent, Standin)) or not isinstance(args, tuple):
            raise ValueError("it makes an object of something that is no class")
        filled = args[-1] if args and isinstance(args[-1], (list, dict)) else []
        known = str(made_by) if isinstance(made_by, Global) else ""
        if known in _DICTS | _SETS:
            self.spend(len(filled))  # copies: one list, taken again and again, is cheap in the file
        if known in _DICTS:
            value = {}
            self.update(value, filled.items() if isinstance(filled, dict) else filled)
        elif known in _SETS:
            value = self.plain(list(filled))
        else:
            value = Standin(made_by, args)
        self.stack.append(value)

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Standin):
            target.state = state
        elif not isinstance(target, dict):  # an OrderedDict's own attributes, such as _metadata, are no entries
            raise ValueError(f"it sets attributes of a {type(target).__name__}")

    def persistent(self, pid: Any) -> None:
        self.persistents.append(Persistent(pid))
        self.stack.append(self.persistents[-1])

    def make_above_mark(self) -> None:
        made_by, args = self.stack[0], self.stack[1:]
        self.above_mark()
        self.make(made_by, tuple(args))

    def make_named(self, pair: str) -> None:
        args = tuple(self.above_mark())
        self.name(*pair.split(" ", 1))
        self.make(self.stack.pop(), args)


def _is_plain(key: Any) -> bool:
    """True for what may be hashed: in constant time, without recursion, and to no value that the file chose."""
    return type(key) in (str, bytes, bool, type(None), Global) or (type(key) is int and abs(key) < KEY_LIMIT)


def _check_protocol(machine: _Machine, protocol: int) -> None:
    if protocol > PROTOCOL:
        raise ValueError(f"it is of protocol {protocol}, and {PROTOCOL} is the latest")


_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _check_protocol,
    **dict.fromkeys(("FRAME", "STOP"), lambda machine, _: None),
    **dict.fromkeys(
        (
            "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE",
            "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING",
            "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
        ),
        _Machine.push,
    ),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_SET": lambda machine, _: machine.push(set()),
    "MARK": lambda machine, _: machine.mark(),
    "POP": lambda machine, _: machine.pop(),
    "POP_MARK": lambda machine, _: machine.above_mark(),
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    "MEMOIZE": lambda machine, _: machine.put(len(machine.memo)),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.above_mark())),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.top(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.top(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.top(3))),
    "LIST": lambda machine, _: machine.push(machine.above_mark()),
    "DICT": lambda machine, _: machine.make_dict(),
    "FROZENSET": lambda machine, _: machine.push(machine.plain(machine.above_mark())),
    "APPEND": lambda machine, _: machine.add(machine.top(1)),
    "APPENDS": lambda machine, _: machine.add(machine.above_mark()),
    "ADDITEMS": lambda machine, _: machine.add(machine.above_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.top(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.above_mark()),
    "GLOBAL": lambda machine, pair: machine.name(*pair.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.name(*machine.top(2)),
    "REDUCE": lambda machine, _: machine.make(*machine.top(2)),
    "NEWOBJ": lambda machine, _: machine.make(*machine.top(2)),
    "NEWOBJ_EX": lambda machine, _: machine.make(*machine.top(3)[:2]),
    "OBJ": lambda machine, _: machine.make_above_mark(),
    "INST": _Machine.make_named,
    "BUILD": lambda machine, _: machine.build(),
    "PERSID": _Machine.persistent,
    "BINPERSID": lambda machine, _: machine.persistent(machine.stack.pop()),
}  # fmt: skip
