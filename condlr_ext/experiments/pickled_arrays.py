"""Pickled dictionaries of NumPy arrays, read without unpickling.

The unpickler calls what a file names with what it says; even numpy.dtype alone, given a crafted state, takes bytes of
the file for pointers. Here the instructions are followed on inert values: nothing that a file names is ever called.
"""

import math
import pickletools
from dataclasses import dataclass

import numpy as np

_ARRAY = {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}
_NAMES = _ARRAY | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
_TYPES = {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)}
_IGNORED = {"PROTO", "FRAME"}
_VALUES = {
    "INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
_STRINGS = {"STRING", "BINSTRING", "SHORT_BINSTRING"}  # bytes in Python 2
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUT, _GET = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}
_LARGEST = 2**31  # of a dimension; NumPy takes up to 64 of them
_MARK = object()


@dataclass
class _Name:
    module: str
    name: str


@dataclass
class _Dtype:
    code: str
    order: str = "|"


@dataclass
class _Array:
    state: tuple | None = None


def loads(data: bytes) -> dict:
    """Return the dictionary in a pickle of dicts, lists, tuples, strings, numbers and NumPy arrays of integers.

    Keys are bytes, as Python 2 wrote them.

    Raises:
        ValueError: Damaged, or anything else than the above.
    """
    try:
        result = _run(data)
        if not isinstance(result, dict):
            raise ValueError(f"a dictionary is needed, got {type(result).__name__}")
        return {k.encode() if isinstance(k, str) else k: _finished(v) for k, v in result.items()}
    except (IndexError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"damaged: {error!r}") from None


def _run(data: bytes):
    stack, memo = [], {}

    def above_mark() -> list:
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("damaged: no mark")
        items = stack[at + 1 :]
        del stack[at:]
        return items

    for opcode, argument, _ in pickletools.genops(data):
        op = opcode.name
        if op in _IGNORED:
            continue
        elif op == "STOP":
            return stack.pop()
        elif op in _VALUES:
            stack.append(argument)
        elif op in _STRINGS:
            stack.append(argument.encode("latin1"))
        elif op in _CONSTANTS:
            stack.append(_CONSTANTS[op])
        elif op in _EMPTY:
            stack.append(_EMPTY[op]())
        elif op == "MARK":
            stack.append(_MARK)
        elif op in _TUPLES:
            items = tuple(stack[-_TUPLES[op] :])
            del stack[-_TUPLES[op] :]
            stack.append(items)
        elif op == "TUPLE":
            stack.append(tuple(above_mark()))
        elif op == "LIST":
            stack.append(above_mark())
        elif op == "DICT":
            stack.append(_pairs(above_mark()))
        elif op == "APPEND":
            item = stack.pop()
            _expect(stack[-1], list).append(item)
        elif op == "APPENDS":
            items = above_mark()
            _expect(stack[-1], list).extend(items)
        elif op == "SETITEM":
            key, value = stack[-2:]
            del stack[-2:]
            _expect(stack[-1], dict).update(_pairs([key, value]))
        elif op == "SETITEMS":
            items = above_mark()
            _expect(stack[-1], dict).update(_pairs(items))
        elif op in _PUT:
            memo[argument] = stack[-1]
        elif op == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif op in _GET:
            stack.append(memo[argument])
        elif op == "GLOBAL":
            stack.append(_named(*argument.split(" ")))
        elif op == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            stack.append(_named(module, name))
        elif op == "REDUCE":
            arguments, name = stack.pop(), stack.pop()
            stack.append(_made(_expect(name, _Name), _expect(arguments, tuple)))
        elif op == "BUILD":
            state = stack.pop()
            _build(stack[-1], _expect(state, tuple))
        else:
            raise ValueError(f"the instruction {op} has no place in a data set")
    raise ValueError("damaged: no end")


def _expect(value, kind: type):
    if type(value) is not kind:
        raise ValueError(f"damaged: {kind.__name__.strip('_')} expected, got {type(value).__name__.strip('_')}")
    return value


def _pairs(items: list) -> dict:
    keys, values = items[::2], items[1::2]
    if not all(type(key) in (str, bytes, int) for key in keys):
        raise ValueError("keys must be strings or numbers")
    return dict(zip(keys, values, strict=True))


def _named(module: str, name: str) -> _Name:
    if (module, name) not in _NAMES:
        raise ValueError(f"it asks for {module}.{name}")
    return _Name(module, name)


def _made(name: _Name, arguments: tuple):
    """Return what calling `name` stands for; nothing is called."""
    if (name.module, name.name) in _ARRAY:
        return _Array()
    if name.name == "dtype":
        code = arguments[0].decode() if isinstance(arguments[0], bytes) else arguments[0]
        if code not in _TYPES:
            raise ValueError(f"arrays must be of integers, got dtype {code!r}")
        return _Dtype(code)
    if name.name == "encode":  # bytes, as Python 3 writes them in old protocols
        return _expect(arguments[0], str).encode("latin1")
    raise ValueError(f"it calls {name.module}.{name.name}")


def _build(target, state: tuple) -> None:
    if isinstance(target, _Array):
        target.state = state
    elif isinstance(target, _Dtype):  # (version, byte order, …): the rest says nothing about integers
        order = state[1].decode() if isinstance(state[1], bytes) else state[1]
        if order not in ("|", "<", ">", "="):
            raise ValueError(f"damaged: byte order {order!r}")
        target.order = order
    else:
        raise ValueError(f"it sets the state of a {type(target).__name__}")


def _finished(value):
    if not isinstance(value, _Array):
        return value
    _, shape, dtype, fortran, raw = value.state
    kind = np.dtype(_expect(dtype, _Dtype).order + dtype.code)
    if type(raw) is not bytes or not all(type(n) is int and 0 <= n < _LARGEST for n in _expect(shape, tuple)[:65]):
        raise ValueError("damaged: an array needs a shape and bytes")
    if len(shape) > 64:
        raise ValueError(f"damaged: an array of {len(shape)} dimensions")
    if math.prod(shape) * kind.itemsize != len(raw):
        raise ValueError(f"damaged: an array {list(shape)} of {kind} needs other than {len(raw)} bytes")
    return np.frombuffer(raw, kind).reshape(shape, order="F" if fortran else "C")
