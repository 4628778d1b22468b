"""Pickles of data sets are read without calling what they name."""

import pickle
import struct

import numpy as np
import pytest

from condlr_ext.experiments import pickled_arrays


@pytest.mark.parametrize("protocol", range(5))
def test_dictionaries_of_arrays(protocol):
    content = {
        b"data": np.arange(24, dtype=np.uint8).reshape(4, 6),
        b"labels": [3, 1, 0, 2],
        b"fortran": np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
        b"big": np.arange(3, dtype=">i4"),
        b"filenames": [b"a.png", "b.png"],
        b"nothing": None,
    }
    found = pickled_arrays.loads(pickle.dumps(content, protocol))
    assert found.keys() == content.keys()
    for key in ("data", "fortran", "big"):
        expected = content[key.encode()]
        assert found[key.encode()].dtype == expected.dtype
        np.testing.assert_array_equal(found[key.encode()], expected)
    assert found[b"labels"] == [3, 1, 0, 2] and found[b"nothing"] is None
    assert pickled_arrays.loads(pickle.dumps({"data": 1}, protocol)) == {b"data": 1}


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def integer(n):
    return b"J" + struct.pack("<i", n)


def text(s):
    return b"X" + struct.pack("<I", len(s)) + s


def array(dtype, raw=b"A" * 32, shape=(4,)):
    made = (
        name("numpy.core.multiarray", "_reconstruct")
        + b"("
        + name("numpy", "ndarray")
        + b"("
        + integer(0)
        + b"tC\x01btR"
    )
    sizes = b"(" + b"".join(map(integer, shape)) + b"t"
    return made + b"(" + integer(1) + sizes + dtype + b"\x89C" + bytes([len(raw)]) + raw + b"tb"


def dtype(code, flags, fields=b"N"):
    state = b"(" + integer(3) + text(b"|") + b"NN" + fields + integer(8) + integer(1) + integer(flags) + b"t"
    return name("numpy", "dtype") + b"(" + text(code) + b"\x89\x88tR" + state + b"b"


def batch(value):
    return b"\x80\x04}" + text(b"data") + value + b"s."


HOSTILE = {
    "an array without content": batch(array(dtype(b"u1", 0)).split(b"tR")[0] + b"tR"),
    "pointers in data": batch(array(dtype(b"O8", 1))),
    "pointers by flags": batch(array(dtype(b"V8", 0x3F))),
    "system": b"\x80\x04" + name("posix", "system") + text(b"false") + b"\x85R.",
    "eval": b"\x80\x04" + name("builtins", "eval") + text(b"1") + b"\x85R.",
    "a known name of another module": batch(name("builtins", "encode") + text(b"1") + text(b"latin1") + b"\x86R"),
    "a known type of another module": batch(array(dtype(b"u1", 0).replace(b"cnumpy\n", b"cpickle\n"))),
    "a name, not called": batch(b"(" + name("posix", "system") + b"t"),
    "ndarray called": batch(name("numpy", "ndarray") + b"(" + integer(10) + b"tR"),
    "huge shape": batch(array(dtype(b"u1", 0), shape=(2**31 - 1, 2**31 - 1))),
    "negative shape": batch(array(dtype(b"u1", 0), shape=(-32,))),
    "large numbers for sizes": batch(
        array(dtype(b"u1", 0), shape=()).replace(
            b"(t" + name("numpy", "dtype"),
            b"(" + (b"\x8b" + struct.pack("<I", 50000) + b"\x7f" * 50000) * 20 + b"t" + name("numpy", "dtype"),
        )
    ),
    "too many dimensions": batch(array(dtype(b"u1", 0), shape=(1,) * 100)),
    "frame bomb": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"abc",
    "memo": b"\x80\x04h\x07.",
    "no mark": b"\x80\x04t.",
    "empty": b"",
    "cut off": b"\x80\x04}",
    "a list": b"\x80\x04].",
    "unhashable key": b"\x80\x04}]Ns.",
    "state of a list": batch(b"])b"),
    "persistent": b"Pabc\n.",
    "instance": b"(i__main__\nX\n.",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_everything_else_is_refused(data):
    with pytest.raises(ValueError):
        pickled_arrays.loads(data)


def test_integer_flags_change_nothing():
    """They would change a dtype through numpy.dtype.__setstate__."""
    found = pickled_arrays.loads(batch(array(dtype(b"i8", 0x3F))))[b"data"]
    assert found.dtype == np.int64 and not found.dtype.hasobject


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of escapes in changed text
def test_every_cut_and_every_changed_byte_is_refused_or_read():
    data = pickle.dumps({b"data": np.arange(12, dtype=np.uint8).reshape(3, 4), b"labels": [1, 2, 3]}, 2)
    rng = np.random.default_rng(0)
    for end in range(len(data)):
        with pytest.raises(ValueError):
            pickled_arrays.loads(data[:end])
    for _ in range(2000):
        changed = bytearray(data)
        changed[rng.integers(len(data))] = rng.integers(256)
        try:
            pickled_arrays.loads(bytes(changed))
        except ValueError:
            pass
