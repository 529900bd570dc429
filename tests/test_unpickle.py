"""Pickles read as data: what Python's own pickle gives for plain values, and nothing run for all others."""

from __future__ import annotations

import collections
import io
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmp.errors import InputError
from gmp.files import unpickle
from gmp.files.unpickle import Global, Persistent, Standin

ROOT = Path(__file__).parents[1]
QUICK = settings(max_examples=200, deadline=None)
HERE = b"c" + __name__.encode() + b"\nTrap\n"  # GLOBAL


def load(content: bytes, **limits: int) -> unpickle.Loaded:
    return unpickle.load(io.BytesIO(content), "a.pt", **limits)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


sprung: list[str] = []


class Trap:
    """Notes everything that is done to it or to objects of it."""

    def __new__(cls, *args, **kwargs):
        sprung.append("__new__")
        return super().__new__(cls)

    def __init__(self, *args):
        sprung.append("__init__")

    def __setstate__(self, state):
        sprung.append("__setstate__")

    def append(self, value):
        sprung.append("append")

    def add(self, value):
        sprung.append("add")

    def __setitem__(self, key, value):
        sprung.append("__setitem__")

    def __hash__(self):
        sprung.append("__hash__")
        return 0


# Plain values

keys = st.one_of(st.text(max_size=9), st.binary(max_size=9), st.booleans(), st.none(), st.integers(-(2**31), 2**31))
values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.integers(10**300, 10**310), st.floats(allow_nan=False),
        st.text(), st.binary(), st.sets(keys, max_size=4),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.lists(inner, max_size=5).map(tuple),
        st.dictionaries(keys, inner, max_size=5),
        st.dictionaries(keys, inner, max_size=5).map(collections.OrderedDict),
        st.dictionaries(keys, inner, max_size=5).map(lambda items: collections.defaultdict(list, items)),
    ),
    max_leaves=20,
)  # fmt: skip


@QUICK
@given(values, st.integers(3, pickle.HIGHEST_PROTOCOL), st.booleans())
def test_plain_values_are_those_that_python_reads(value, protocol, without_c):
    content = pickle._dumps(value, protocol) if without_c else pickle.dumps(value, protocol)
    assert load(content).value == pickle.loads(content) == value


@QUICK
@given(st.recursive(st.text() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_protocols_of_python_2_too(value):
    for protocol in (0, 1, 2):
        assert load(pickle.dumps(value, protocol)).value == value


def test_what_python_2_wrote():
    """A str of Python 2 is taken as Latin-1, which any bytes are."""
    content = b"(dp0\nS'a\\n'\np1\nI01\nsS'b'\nL12L\nsVc\\u00e9\nF0.5\ns."
    assert load(content).value == pickle.loads(content) == {"a\n": True, "b": 12, "cé": 0.5}
    assert load(b"}U\x01a]T\x01\0\0\0\xe9\x61s.").value == {"a": ["é"]}


def test_containers_that_hold_themselves_and_shared_ones():
    items: list = [1]
    items.append(items)
    found = load(pickle.dumps({"a": items, "b": items})).value
    assert found["a"] is found["b"] and found["a"][1] is found["a"] and found["a"][0] == 1


def test_one_pickle_is_read_and_not_a_byte_more():
    file = io.BytesIO(pickle.dumps(1) + pickle.dumps({"a": 2}) + b"rest")
    assert unpickle.load(file, "a").value == 1
    assert unpickle.load(file, "a").value == {"a": 2}
    assert file.read() == b"rest"


def test_an_ordered_dict_of_python_2_is_made_of_pairs():
    content = b"ccollections\nOrderedDict\n((lp0\n(lp1\nS'a'\naI1\naatR."
    assert load(content).value == pickle.loads(content) == {"a": 1}


# Nothing runs


@pytest.mark.parametrize(
    ("content", "methods", "args"),
    [
        (HERE + b")R.", ["__new__", "__init__"], ()),
        (b"\x80\x04" + text(__name__) + text("Trap") + b"\x93)R.", ["__new__", "__init__"], ()),
        (b"(I1\ni" + HERE[1:] + b".", ["__new__", "__init__"], (1,)),
        (b"(" + HERE + b"I1\nI2\no.", ["__new__", "__init__"], (1, 2)),
        (HERE + b"I1\n\x85\x81.", ["__new__"], (1,)),
        (HERE + b"I1\n\x85}\x92.", ["__new__"], (1,)),
        (HERE + b")\x81}b.", ["__new__", "__setstate__"], ()),
        (HERE + b")\x81I1\na.", ["__new__", "append"], ()),
        (HERE + b")\x81(I1\nI2\ne.", ["__new__", "append", "append"], ()),
        (HERE + b")\x81I1\nI2\ns.", ["__new__", "__setitem__"], ()),
        (HERE + b")\x81(I1\nI2\nu.", ["__new__", "__setitem__"], ()),
        (HERE + b")\x81(I1\n\x90.", ["__new__", "add"], ()),
    ],
)  # fmt: skip
def test_objects_become_stand_ins_with_their_arguments(content, methods, args):
    sprung.clear()
    loaded = load(content)
    assert sprung == []
    assert isinstance(loaded.value, Standin) and loaded.value.args == args
    assert loaded.value.made_by == Global(__name__, "Trap") and loaded.globals == (Global(__name__, "Trap"),)
    pickle.loads(content)  # the same pickle does it all in Python's own hands
    assert sprung == methods


def test_stand_ins_keep_their_state_and_their_items():
    made = HERE + b")\x81"
    assert load(made + b"}(" + text("a") + b"I1\nub.").value.state == {"a": 1}
    assert load(made + b"I1\na(I2\nI3\ne.").value.items == [1, 2, 3]
    assert load(made + b"I1\nI2\ns(I3\nI4\nu.").value.items == [(1, 2), (3, 4)]
    inner = load(HERE + b")R)R.").value  # what the call gave is called again
    assert isinstance(inner.made_by, Standin) and inner.made_by.made_by.name == "Trap"
    assert load(b"Pabc\n.").value.pid == "abc"
    outside = load(b"(K\x01K\x02tQ)R.")
    assert outside.value.made_by.pid == (1, 2) and isinstance(outside.persistents[0], Persistent)


def test_a_key_is_never_hashed_by_the_class_of_a_stranger():
    for content in (b"}" + HERE + b")\x81I1\ns.", b"\x8f(" + HERE + b")\x81\x90."):
        sprung.clear()
        loaded = load(content)
        assert len(loaded.value) == 0 and loaded.left_out == 1 and sprung == []
        pickle.loads(content)
        assert "__hash__" in sprung


def test_a_class_as_a_key_is_kept():
    """PyTorch Lightning's older checkpoints key the state of callbacks by their class."""
    assert load(b"}" + HERE + b"I1\ns.").value == {Global(__name__, "Trap"): 1}


def test_shell_commands_are_data(tmp_path):
    class Command:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    content = pickle.dumps(Command())
    loaded = load(content)
    assert loaded.value.args == (str(tmp_path / "made"),) and not list(tmp_path.iterdir())
    assert [str(name) for name in loaded.globals] == [f"{os.name}.mkdir" if os.name == "nt" else "posix.mkdir"]
    pickle.loads(content)
    assert (tmp_path / "made").is_dir()


# Damage and bombs

MISUSE = {
    "nothing": b"",
    "no STOP": b"}",
    "nothing left at STOP": b".",
    "an unknown operation": b"\xff.",
    "a later protocol": b"\x80\x06N.",
    "an argument cut short": b"\x80\x02X\x09\0\0\0abc",
    "a line without an end": b"I12",
    "a number that is none": b"Iabc\n.",
    "text that is not UTF-8": b"X\x01\0\0\0\xff.",
    "text without quotes": b"Sabc\n.",
    "a negative length": b"T\xff\xff\xff\xff.",
    "a negative long": b"\x8b\xff\xff\xff\xff.",
    "a length beyond the file": b"\x8b\xff\xff\xff\x7f.",
    "a length of 2^62": b"\x8e" + struct.pack("<Q", 1 << 62) + b".",
    "a length of 2^64": b"\x8d" + struct.pack("<Q", (1 << 64) - 1) + b".",
    "an extension": b"\x82\x01.",
    "a large extension": b"\x84\x01\0\0\0.",
    "a buffer": b"\x97.",
    "a read-only buffer": b"\x97\x98.",
    "a memo out of range": b"Np99999999999999999999999\n.",
    "a negative memo": b"Np-1\n.",
    "a memo that is not there": b"h\x01.",
    "a mark that is not there": b"NNt.",
    "items below the mark": b"N(a.",
    "a class named by a number": b"K\x01K\x02\x93.",
    "a class below the mark": b"(o.",
    "a call of a number": b"K\x01)R.",
    "arguments that are no tuple": HERE + b"]R.",
    "items of a number": b"K\x01K\x02a.",
    "items of a dict": b"}K\x02a.",
    "entries of a list": b"]K\x01K\x02s.",
    "an odd entry": b"}(K\x01u.",
    "attributes of a list": b"]}b.",
    "a dict of something else than pairs": b"ccollections\nOrderedDict\n((lI1\natR.",
    "a line of 100 kB": b"V" + b"a" * 100_000 + b"\n.",
    "a number of 60,000 digits": b"L" + b"1" * 60_000 + b"L\n.",
}


@pytest.mark.parametrize("content", MISUSE.values(), ids=MISUSE)
def test_damage_is_one_sentence(content):
    with pytest.raises(
        InputError, match=r"^a\.pt holds a pickle that is damaged or no model's \(.+\); download it"
    ) as e:
        load(content)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400


@pytest.mark.parametrize("operation", [o.name for o in pickletools.opcodes])
def test_no_operation_survives_an_empty_stack_with_another_error(operation):
    code = {o.name: o.code for o in pickletools.opcodes}[operation].encode("latin-1")
    for argument in (b"", b"\0" * 8, b"1\n", b"'a'\n", b"a\nb\n"):
        for before in (b"", b"(", b"N", b"NN", b"NNN", b"(N", b"]N", b"}", HERE, b"N("):
            try:
                load(before + code + argument + b".")
            except InputError:
                pass


def test_a_number_as_large_as_its_bytes():
    content = pickle.dumps(1 << 100_000)
    assert load(content).value == 1 << 100_000


@pytest.mark.parametrize(
    "content",
    [
        b"\x8e" + struct.pack("<Q", 1 << 30) + b"a.",  # BINBYTES8
        b"B" + struct.pack("<I", 0xFFFFFFFF) + b"a.",
        b"Nr" + struct.pack("<I", 0xFFFFFFFF) + b"0j" + struct.pack("<I", 0xFFFFFFFF) + b".",  # LONG_BINPUT
        b"\x95" + struct.pack("<Q", 1 << 62) + b"N.",  # FRAME
    ],
)
def test_nothing_is_allocated_for_what_is_not_there(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    tracemalloc.start()
    try:
        with (tmp_path / "a").open("rb") as file:
            try:
                unpickle.load(file, "a")
            except InputError:
                pass
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_limits():
    content = pickle.dumps(list(range(1000)))
    assert load(content, size_limit=len(content)).value == list(range(1000))
    with pytest.raises(InputError, match=f"goes on beyond {len(content) - 1:,} bytes"):
        load(content, size_limit=len(content) - 1)
    with pytest.raises(InputError, match="takes more than 500 operations"):
        load(content, operation_limit=500)


def test_copies_count_as_operations():
    """A list of a thousand pairs, copied a thousand times: 8 kB in the file, and a million steps."""
    pairs = b"]q\0(" + b"K\x01K\x02\x86" * 1000 + b"e\x85q\x01"
    for name in (b"ccollections\nOrderedDict\n", b"cbuiltins\nset\n"):
        content = pairs + name + b"q\x02(" + b"h\x02h\x01R" * 1000 + b"t."
        with pytest.raises(InputError, match="takes more than 100,000 operations"):
            load(content, operation_limit=100_000)


def test_numbers_that_would_all_fall_into_one_slot_of_a_dict_are_left_out():
    modulus = sys.hash_info.modulus
    content = pickle.dumps({n * modulus: n for n in range(-5, 6)})
    assert load(content).value == {0: 0} and load(content).left_out == 10
    content = pickle.dumps({(1, "a"): 1, 0.5: 2, frozenset(): 3, "b": 4})
    assert load(content).value == {"b": 4} and load(content).left_out == 3


DEEP = {
    "tuples": b")" + b"\x85" * 200_000 + b".",
    "lists": b"(" * 200_000 + b"l" * 200_000 + b".",
    "dicts": b"}K\x01" * 200_000 + b"}" + b"s" * 200_000 + b".",
    "a key of tuples": b"})" + b"\x85" * 200_000 + b"Ns.",
    "a set of tuples": b"\x8f()" + b"\x85" * 200_000 + b"\x90.",
    "a memo of tuples": b")" + b"\x85" * 200_000 + b"p0\n0g0\n.",
    "a name outside": b")" + b"\x85" * 200_000 + b"Q.",
    "arguments": b"cos\nsystem\n)" + b"\x85" * 200_000 + b"R.",
    "objects": b"cos\nsystem\n" + b")R" * 200_000 + b".",
    "states": b"cos\nsystem\nq\0)R" + b"h\0)R" * 200_000 + b"b" * 200_000 + b".",
    "marks": b"(" * 1_000_000 + b"N.",
    "a tuple compared with a word": b"(" + b")" + b"\x85" * 200_000 + b"NNNNtQ.",
}


@pytest.mark.parametrize("content", DEEP.values(), ids=DEEP)
def test_what_nests_200_000_deep_does_not_crash_the_interpreter(tmp_path, content):
    """In a process of its own: a stack that overflows in C ends the process, and no test could report it."""
    (tmp_path / "a.pkl").write_bytes(content)
    code = (
        "import sys; from gmp.errors import InputError\n"
        "from gmp.files import archive, unpickle, objects\n"
        "from pathlib import Path\n"
        "loaded = unpickle.load(open(sys.argv[1], 'rb'), 'a')\n"
        "for value in (loaded.value, {'a': loaded.value}):\n"
        "    try: objects.find(unpickle.Loaded(value, (), loaded.persistents, 0), Path('a'), {})\n"
        "    except InputError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.pkl")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.count("\n") == 2


# Anything at all

_CODES = [o.code.encode("latin-1") for o in pickletools.opcodes]
_ARGUMENTS = st.one_of(
    st.binary(max_size=9),
    st.integers(0, 255).map(lambda n: bytes([n])),
    st.integers(0, 2**32 - 1).map(lambda n: struct.pack("<I", n)),
    st.sampled_from([b"", b"", b"a\n", b"1\n", b"os\nsystem\n", b"collections\nOrderedDict\n", b"\x01\0\0\0a"]),
)


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(_CODES), _ARGUMENTS), max_size=30))
def test_any_operations_give_a_value_or_a_sentence(parts):
    try:
        load(b"".join(code + argument for code, argument in parts) + b".")
    except InputError as error:
        assert str(error).startswith("a.pt holds a pickle") and "\n" not in str(error)


@QUICK
@given(values, st.data())
def test_any_change_of_a_pickle_gives_a_value_or_a_sentence(value, data):
    content = bytearray(pickle.dumps(value, data.draw(st.integers(0, 5))))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        load(bytes(content))
    except InputError:
        pass
