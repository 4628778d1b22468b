"""Every arithmetic opcode against exact arithmetic, on the numbers where they go wrong."""

import re
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers.ptx import translate
from helpers.ptx.assemble import element, run

INTEGERS = [0, 1, 2, 3, 5, 31, 32, 33, 255, 0x7FFF, 0x8000, 0xFFFF, 0x12345678, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF,
            0x0123456789ABCDEF, 0x7FFFFFFFFFFFFFFF, 0x8000000000000000, 0xFFFFFFFFFFFFFFFF, 0xFFFFFFFF00000001]  # fmt: skip
FLOATS = [0.0, -0.0, 1.0, -1.5, 1 / 3, 3.0, 1 + 2**-23, 1 + 2**-52, 1e30, -1e-30, 2.0**-126, 2.0**-140, 65504.0, 65520.0,
          1 + 2**-11, 1 + 2**-8, 1 + 3 * 2**-11, 1 + 2**-12, float("inf"), float("-inf"), float("nan")]  # fmt: skip


def bits(value: float, width: int) -> int:
    with np.errstate(over="ignore"):
        return int.from_bytes(np.array(value, f"f{width}").tobytes(), "little")


def signed(x: int, width: int) -> int:
    x &= (1 << 8 * width) - 1
    return x - (1 << 8 * width) if x >> 8 * width - 1 else x


def execute(opcode: str, operands: list[list[int]], widths: list[int], result: int) -> list[int]:
    """Return the results of an instruction, as bits, for operands as bits; widths in bytes, 0: predicates."""
    threads = len(operands[0])
    padded = -(-threads // 32) * 32
    registers = {0: "%p", 2: "%rs", 4: "%r", 8: "%rd"}
    body, names, tensors = [], [], []
    for k, (values, width) in enumerate(zip(operands, widths, strict=True)):
        tensors.append(torch.tensor([signed(v, 8) for v in values + [values[0]] * (padded - threads)]))
        body.append(f"{element('%rd30', k, 8)} ld.global.b64 %rd{40 + k}, [%rd30];")
        name = f"{registers[width]}{20 + k}"
        if width == 0:
            body.append(f"setp.ne.b64 {name}, %rd{40 + k}, 0;")
        elif width < 8:
            body.append(f"cvt.u{8 * width}.u64 {name}, %rd{40 + k};")
        else:
            body.append(f"mov.b64 {name}, %rd{40 + k};")
        names.append(name)
    out = torch.zeros(padded, dtype=torch.int64)
    to = f"{registers[result]}10"
    body.append(f"{opcode} {', '.join([to, *names])};")
    body.append({0: f"selp.b64 %rd10, 1, 0, {to};", 8: ""}.get(result, f"cvt.u64.u{8 * result} %rd10, {to};"))
    body.append(f"{element('%rd30', len(tensors), 8)} st.global.b64 [%rd30], %rd10;")
    launch = run("\n".join(body), *tensors, out, threads=padded)
    assert not launch.reports
    return [x & (1 << 64) - 1 for x in out[:threads].tolist()]


def pairs(values):
    return [list(column) for column in zip(*((a, b) for a in values for b in values), strict=True)]


def triples(values):
    some = values[::2]
    return [list(column) for column in zip(*((a, b, c) for a in some for b in some for c in some), strict=True)]


def shift(x, count, width, is_signed):
    x = signed(x, width) if is_signed else x
    return x >> min(count, 8 * width)


def field(x, position, count, is_signed):
    """bfe of 32 bits, bit by bit, after the definition of the PTX ISA."""
    position, count = position & 255, count & 255
    sign = 0 if not is_signed or count == 0 else x >> min(position + count - 1, 31) & 1
    result = 0
    for i in range(32):
        inside = i < count and position + i <= 31
        result |= (x >> position + i & 1 if inside else sign) << i
    return result


def permuted(a, b, selector):
    source, result = (b << 32 | a).to_bytes(8, "little"), 0
    for k in range(4):
        nibble = selector >> 4 * k & 15
        byte = source[nibble & 7]
        result |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * k
    return result


def quotient(a, b):
    return 0 if b == 0 else abs(a) // abs(b) * (-1 if (a < 0) != (b < 0) else 1)


INTEGER = {  # opcode without type: function of Python's integers
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "mul.wide": lambda a, b: a * b,
    "mad.lo": lambda a, b, c: a * b + c,
    "mad.wide": lambda a, b, c: a * b + c,
    "div": quotient,
    "rem": lambda a, b: a - quotient(a, b) * b,
    "min": min,
    "max": max,
    "neg": lambda a: -a,
    "not": lambda a: ~a,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "popc": lambda a: (a & 0xFFFFFFFF).bit_count(),
}


@pytest.mark.parametrize(
    "opcode",
    ["add.s32", "add.s64", "sub.s32", "sub.s64", "mul.lo.s32", "mul.lo.s64", "mul.wide.s32", "mul.wide.u32", "mul.wide.u16", "mad.lo.s32",
     "mad.lo.s64", "mad.wide.s32", "mad.wide.u32", "div.s32", "div.u32", "div.s64", "rem.s64", "rem.u32", "min.s32",
     "min.u32", "min.s64", "min.u64", "max.s32", "max.u32", "max.s64", "max.u64", "neg.s32", "neg.s64", "not.b32",
     "not.b64", "and.b16", "and.b32", "or.b16", "or.b64", "xor.b32", "xor.b64", "popc.b32"],
)  # fmt: skip
def test_integers(opcode):
    name, _, kind = opcode.rpartition(".")
    width, function = int(kind[1:]) // 8, INTEGER[name]
    result = 2 * width if name.endswith("wide") else width
    count = function.__code__.co_argcount if hasattr(function, "__code__") else 2
    operands = {1: lambda: [INTEGERS], 2: lambda: pairs(INTEGERS), 3: lambda: triples(INTEGERS)}[count]()
    widths = [width, width, result][:count]
    if name in ("div", "rem"):  # of 0 and of the quotient that has no place, nothing is specified
        keep = [k for k, b in enumerate(operands[1]) if b & (1 << 8 * width) - 1 not in (0, (1 << 8 * width) - 1)]
        operands = [[values[k] for k in keep] for values in operands]

    def number(x, width):
        return signed(x, width) if kind[0] == "s" else x & (1 << 8 * width) - 1

    expected = [
        function(*(number(x, w) for x, w in zip(values, widths, strict=True))) & (1 << 8 * result) - 1
        for values in zip(*operands, strict=True)
    ]
    assert execute(opcode, operands, widths, result) == expected


@pytest.mark.parametrize(
    "opcode", ["shl.b16", "shl.b32", "shl.b64", "shr.u16", "shr.u32", "shr.s32", "shr.u64", "shr.s64"]
)
def test_shifts(opcode):
    width = int(opcode[5:]) // 8
    values, counts = pairs(INTEGERS)
    values, counts = ([v & (1 << n) - 1 for v in x] for x, n in ((values, 8 * width), (counts, 32)))
    if opcode.startswith("shl"):
        expected = [v << min(c, 64) for v, c in zip(values, counts, strict=True)]
    else:
        expected = [shift(v, c, width, opcode[4] == "s") for v, c in zip(values, counts, strict=True)]
    expected = [e & (1 << 8 * width) - 1 for e in expected]
    assert execute(opcode, [values, counts], [width, 4], width) == expected
    for count in (0, 1, 8 * width - 1, 8 * width):  # as a constant
        out = torch.zeros(32, dtype=torch.int64)
        registers = {2: "%rs", 4: "%r", 8: "%rd"}[width]
        make = f"mov.b{8 * width} {registers}20, {INTEGERS[-2] & (1 << 8 * width) - 1};"
        widen = "" if width == 8 else f"cvt.u64.u{8 * width} %rd21, {registers}21;"
        body = f"{make} {opcode} {registers}21, {registers}20, {count}; {widen} {element('%rd30', 0, 8)} st.global.b64 [%rd30], %rd21;"
        assert not run(body, out).reports
        x = INTEGERS[-2] & (1 << 8 * width) - 1
        right = x << count if opcode.startswith("shl") else shift(x, count, width, opcode[4] == "s")
        assert out[0].item() & (1 << 8 * width) - 1 == right & (1 << 8 * width) - 1


@pytest.mark.parametrize("opcode", ["bfe.u32", "bfe.s32"])
def test_fields(opcode):
    cases = [
        (v & 0xFFFFFFFF, p, n)
        for v in INTEGERS
        for p in (0, 1, 5, 31, 32, 40, 255, 256)
        for n in (0, 1, 4, 31, 32, 255)
    ]
    expected = [field(*case, opcode[4] == "s") for case in cases]
    assert execute(opcode, [list(column) for column in zip(*cases, strict=True)], [4, 4, 4], 4) == expected


def test_bytes_are_permuted():
    cases = [(0x83218765, 0x0FEDCBA9, s) for s in (0x7773, 0x5410, 0x3340, 0x0123, 0xFEDC, 0x89AB)]
    expected = [permuted(*case) for case in cases]
    assert execute("prmt.b32", [list(column) for column in zip(*cases, strict=True)], [4, 4, 4], 4) == expected


@pytest.mark.parametrize("opcode,function", [("and", int.__and__), ("or", int.__or__), ("xor", int.__xor__)])
def test_predicates(opcode, function):
    a, b = [0, 0, 1, 1], [0, 1, 0, 1]
    assert execute(f"{opcode}.pred", [a, b], [0, 0], 0) == [function(x, y) for x, y in zip(a, b, strict=True)]
    assert execute("not.pred", [a], [0], 0) == [1 - x for x in a]
    assert execute("mov.pred", [a], [0], 0) == a


@pytest.mark.parametrize("width", [2, 4, 8])
def test_moves_and_selections(width):
    a = [x & (1 << 8 * width) - 1 for x in INTEGERS]
    assert execute(f"mov.b{8 * width}", [a], [width], width) == a
    assert execute(f"mov.u{8 * width}", [a], [width], width) == a
    which = [k % 2 for k in range(len(a))]
    expected = [x if w else y for x, y, w in zip(a, a[::-1], which, strict=True)]
    for kind in ("b", "f") if width > 2 else ("b",):
        assert execute(f"selp.{kind}{8 * width}", [a, a[::-1], which], [width, width, 0], width) == expected


def rounded(value: Fraction, width: int) -> float:
    """Round a fraction to the nearest number, halfway cases to the even one."""
    mantissa, least, largest = {2: (11, -24, 16), 4: (24, -149, 128), 8: (53, -1074, 1024)}[width]
    if value == 0:
        return 0.0
    exponent = 0
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - mantissa + 1, least)
    result = round(value / unit) * unit  # round() takes the even one
    if abs(result) >= Fraction(2) ** largest:
        return float("inf") if value > 0 else float("-inf")
    return float(result)


FLOAT = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "fma.rn": lambda a, b, c: a * b + c,
    "div.rn": lambda a, b: a / b,
    "div.full": lambda a, b: a / b,
}
FINITE = [x for x in FLOATS if abs(x) < float("inf")]


def value(pattern: int, width: int) -> float:
    return struct.unpack(
        {2: "<e", 4: "<f", 8: "<d"}[width], (pattern & (1 << 8 * width) - 1).to_bytes(width, "little")
    )[0]


@pytest.mark.parametrize(
    "opcode",
    ["add.f32", "add.f64", "sub.f32", "sub.f64", "mul.f32", "mul.f64", "fma.rn.f32", "fma.rn.f64", "div.rn.f32",
     "div.rn.f64", "div.full.f32"],
)  # fmt: skip
def test_floating_point(opcode):
    """Correctly rounded; of fma the numbers here are none of the few that are not."""
    name, width = opcode[:-4], int(opcode[-2:]) // 8
    count = FLOAT[name].__code__.co_argcount
    patterns = [bits(x, width) for x in FINITE]
    operands = triples(patterns) if count == 3 else pairs(patterns)
    if name.startswith("div"):
        keep = [k for k, b in enumerate(operands[1]) if value(b, width)]
        operands = [[x[k] for k in keep] for x in operands]
    got = execute(opcode, operands, [width] * count, width)
    for pattern, case in zip(got, zip(*operands, strict=True), strict=True):
        numbers = [value(x, width) for x in case]
        if not all(map(np.isfinite, numbers)):
            continue  # in float32 1e30 and others are finite; a product in float16 would not be
        assert value(pattern, width) == rounded(FLOAT[name](*map(Fraction, numbers)), width), (opcode, numbers)


@pytest.mark.parametrize("width", [4, 8])
def test_roots_signs_and_extremes(width):
    numbers = [value(bits(x, width), width) for x in FLOATS]
    patterns = [bits(x, width) for x in numbers]
    n = 8 * width
    for got, x in zip(execute(f"sqrt.rn.f{n}", [patterns], [width], width), numbers, strict=True):
        if 0 < x < float("inf"):  # the root of the nearest number is the nearest to the root: check by squaring halves
            root, unit = (
                Fraction(value(got, width)),
                Fraction(float(np.spacing(np.array(value(got, width), f"f{width}")))),
            )
            assert (root - unit / 2) ** 2 <= Fraction(x) <= (root + unit / 2) ** 2
    top = 1 << n - 1
    assert execute(f"neg.f{n}", [patterns], [width], width) == [p ^ top for p in patterns]
    assert execute(f"abs.f{n}", [patterns], [width], width) == [p & ~top for p in patterns]
    a, b = pairs(patterns)
    for name, function in (("min", min), ("max", max)):
        for got, x, y in zip(execute(f"{name}.f{n}", [a, b], [width] * 2, width), a, b, strict=True):
            x, y = value(x, width), value(y, width)
            expected = y if x != x else x if y != y else function(x, y)  # NaN only where both are
            assert value(got, width) == expected or expected != expected != value(got, width)


def test_the_approximate_root():
    numbers = [2.0**-140, 2.0**-126, 2.0, 3.0, 1e30, 0.0]
    got = [value(p, 4) for p in execute("sqrt.approx.ftz.f32", [[bits(x, 4) for x in numbers]], [4], 4)]
    assert got[0] == 0 and got[1:] == [float(np.sqrt(np.float32(x))) for x in numbers[1:]]


def test_noise_is_within_the_bounds():
    """Approximate instructions are off by one or two units and a rounding, equal operands by the same."""
    x = torch.linspace(0.5, 2, 128)
    for opcode, ulps in (("sqrt.approx.ftz.f32 %r2, %r1", 1), ("div.full.f32 %r2, %r1, 0f40400000", 2)):
        out = torch.empty_like(x)
        body = f"{element('%rd8', 0, 4)} {element('%rd9', 1, 4)} ld.global.b32 %r1, [%rd8]; {opcode}; st.global.b32 [%rd9], %r2;"
        run(body, x, out, threads=128, noise=3)
        exact = x.double().sqrt() if ulps == 1 else x.double() / 3
        off = (out.double() - exact).abs() / exact / 2.0**-23
        assert 0.6 < off.max() <= ulps + 1
        again = torch.empty_like(x)
        run(body, x, again, threads=128, noise=3)
        assert torch.equal(out, again)


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("to", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_integers_are_converted(to, kind):
    width, wide = int(kind[1:]) // 8, int(to[1:]) // 8
    values = [x & (1 << 8 * width) - 1 for x in INTEGERS]
    expected = [(signed(x, width) if kind[0] == "s" else x) & (1 << 8 * wide) - 1 for x in values]
    assert execute(f"cvt.{to}.{kind}", [values], [width], wide) == expected


@pytest.mark.parametrize("kind", ["s32", "u32", "s64"])
@pytest.mark.parametrize("to", [4, 8])
def test_integers_become_floating_point(to, kind):
    width = int(kind[1:]) // 8
    values = [x & (1 << 8 * width) - 1 for x in INTEGERS]
    got = execute(f"cvt.rn.f{8 * to}.{kind}", [values], [width], to)
    numbers = [signed(x, width) if kind[0] == "s" else x for x in values]
    assert [value(p, to) for p in got] == [rounded(Fraction(x), to) for x in numbers]


def to_bfloat16(x: float) -> int:
    """The nearest, halfway to even: of the bits of float32 the upper half."""
    pattern = bits(x, 4)
    low, high = Fraction(value(pattern & 0xFFFF0000, 4)), pattern >> 16
    up = value(pattern + 0x10000 & 0xFFFF0000, 4)
    if up in (float("inf"), float("-inf")):
        up = 2.0**128 if up > 0 else -(2.0**128)
    distance, other = abs(Fraction(x) - low), abs(Fraction(up) - Fraction(x))
    return high + (distance > other or distance == other and high % 2)


def test_floating_point_is_converted():
    single = [value(bits(x, 4), 4) for x in [*FINITE, 3.3e38, 3.4e38]]
    patterns = [bits(x, 4) for x in single]
    halves = [bits(rounded(Fraction(x), 2), 2) | (0x8000 if np.signbit(x) else 0) for x in single]
    brains = [to_bfloat16(x) for x in single]
    assert execute("cvt.rn.f16.f32", [patterns], [4], 2) == halves
    assert execute("cvt.rn.bf16.f32", [patterns], [4], 2) == brains
    for opcode, each in (("cvt.rn.f16x2.f32", halves), ("cvt.rn.bf16x2.f32", brains)):
        expected = [high << 16 | low for high, low in zip(each, each[::-1], strict=True)]
        assert execute(opcode, [patterns, patterns[::-1]], [4, 4], 4) == expected
    finite = [h for h in halves if np.isfinite(value(h, 2))]
    assert execute("cvt.f32.f16", [finite], [2], 4) == [bits(value(h, 2), 4) for h in finite]
    assert execute("cvt.f32.bf16", [brains], [2], 4) == [b << 16 for b in brains]
    assert execute("cvt.f64.f32", [patterns], [4], 8) == [bits(x, 8) for x in single]
    double = [bits(x, 8) for x in FINITE]
    got = execute("cvt.rn.f32.f64", [double], [8], 4)
    assert [value(p, 4) for p in got] == [rounded(Fraction(x), 4) for x in FINITE]
    nan = execute("cvt.rn.bf16.f32", [[0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF]], [4], 2)
    assert all(np.isnan(value(x << 16, 4)) for x in nan)


def test_rounding_to_tf32():
    """Ten bits behind the point, halfway cases away from zero."""
    single = [value(bits(x, 4), 4) for x in FINITE]
    for got, x in zip(execute("cvt.rna.tf32.f32", [[bits(x, 4) for x in single]], [4], 4), single, strict=True):
        low = Fraction(value(bits(x, 4) & 0xFFFFE000, 4))
        high = Fraction(value((bits(x, 4) & 0xFFFFE000) + 0x2000, 4))
        expected = low if abs(Fraction(x) - low) < abs(high - Fraction(x)) else high
        assert got & 0x1FFF == 0 and Fraction(value(got, 4)) == expected
    assert execute("cvt.rna.tf32.f32", [[0x7F800000, 0xFF800000, 0xFFFFFFFF]], [4], 4) == [
        0x7F800000,
        0xFF800000,
        0x7FFFFFFF,
    ]


COMPARE = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["b16", "s32", "u32", "b32", "s64", "u64", "b64"])
def test_integers_are_compared(kind):
    width = int(kind[1:]) // 8
    a, b = pairs([x & (1 << 8 * width) - 1 for x in INTEGERS])
    for name, function in COMPARE.items():
        if kind[0] == "b" and name not in ("eq", "ne"):
            continue
        numbers = [[signed(x, width) for x in side] if kind[0] == "s" else side for side in (a, b)]
        expected = [function(x, y) for x, y in zip(*numbers, strict=True)]
        assert execute(f"setp.{name}.{kind}", [a, b], [width, width], 0) == expected


@pytest.mark.parametrize("width", [4, 8])
def test_floating_point_is_compared(width):
    """With NaN nothing holds, or all that ends in u."""
    a, b = pairs([bits(x, width) for x in FLOATS])
    numbers = [(value(x, width), value(y, width)) for x, y in zip(a, b, strict=True)]
    for name, function in COMPARE.items():
        for suffix, with_nan in (("", False), ("u", True)):
            expected = [with_nan if x != x or y != y else function(x, y) for x, y in numbers]
            assert execute(f"setp.{name}{suffix}.f{8 * width}", [a, b], [width] * 2, 0) == expected, name
    expected = [x != x or y != y for x, y in numbers]
    assert execute(f"setp.nan.f{8 * width}", [a, b], [width] * 2, 0) == expected
    assert execute(f"setp.num.f{8 * width}", [a, b], [width] * 2, 0) == [not e for e in expected]


@pytest.mark.parametrize("text", ["add.sat.s32 %r1, %r2, %r3", "add.rz.f32 %r1, %r2, %r3", "vote.sync.ballot.b32 %r1, %p1, -1",
                                  "bra.convergent L", "st.local.b32 [%r1], %r2", "mov.b32 %r1, %laneid",
                                  "shfl.sync.bfly.b32 %r1|%p1, %r2, 1, 31, -1", "shfl.sync.bfly.b32 %r1, %r2, 1, 15, -1"])  # fmt: skip
def test_what_is_unknown_raises(text):
    with pytest.raises(NotImplementedError):
        run(text + ";")


def test_every_opcode_is_here():
    """Each row of the table was executed by a test of this file: the names below stand in its text."""
    with open(__file__) as file:
        text = file.read()
    for pattern, (types, _) in translate.OPCODES.items():
        name = re.split(r"[\\(\[]", pattern)[0]
        assert (
            types is None or not types.strip() or name in ("redux", "bar") or f"{name}." in text or f'"{name}"' in text
        )
