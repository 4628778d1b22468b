"""Instructions to Python: a function for every basic block, which works on all threads of a block at once.

A register is a NumPy array with one element per thread. Its type is the one that most instructions use it as, because PTX
keeps float32 and integers in the same registers; others take a view. A generated function has the arguments R (the
registers), C (the block of threads, `run.Block`), P (the parameters) and M (the threads that are here, None: all).

Every opcode has one row, in OPCODES or in SPECIAL. What has no row raises NotImplementedError.
"""

import re
from typing import NamedTuple

import numpy as np

from . import values
from .parse import Function, Instruction, address, elements

ENDS = ("bra", "ret", "bar", "call", "atom")  # a basic block ends behind these
THREAD_REGISTERS = ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z")
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
OPPOSITE = {"equ": "ne", "neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}  # true for NaN: not these


class Row(NamedTuple):
    """The meaning of an instruction.

    code is an expression of the operands {0}, {1}, ..., of the threads that take part {g}, of the threads that are here
    {m} and of the instruction {i}. Its value is one array, or a list where there are several results. Types are NumPy's,
    or "=": as the first result is kept.
    """

    code: str
    results: list[tuple[str, str]]
    operands: list[tuple[str, str]]


def _numpy_type(ptx: str) -> str:
    """Return the NumPy type of a PTX type: b32 -> u4."""
    kind, bits = ptx[0], int(ptx[1:])
    return f"{'u' if kind == 'b' else {'s': 'i'}.get(kind, kind)}{bits // 8}"


# A regular expression of the whole opcode; the types of results and operands; an expression of the operands. Types: t as
# the last modifier says, s as the one before, u unsigned of the width of t, w twice as wide as t; h, i, f, d: 16 and 32
# bits, float32, float64; p: predicate; =: as the result is kept. {s} and so on stand for these types in expressions.
OPCODES = {
    r"mov\.[bu](16|32|64)": ("= =", "{0}"),
    r"mov\.pred": ("p p", "{0}"),
    r"selp\.[bf](16|32|64)": ("= ==p", "np.where({2}, {0}, {1})"),
    # integers, which wrap around
    r"add\.s(32|64)": ("u uu", "{0} + {1}"),
    r"sub\.s(32|64)": ("u uu", "{0} - {1}"),
    r"mul\.lo\.s(32|64)": ("u uu", "{0} * {1}"),
    r"mad\.lo\.s(32|64)": ("u uuu", "{0} * {1} + {2}"),
    r"mul\.wide\.[su](16|32)": ("w tt", "{0}.astype({w}) * {1}"),
    r"mad\.wide\.[su]32": ("w ttw", "{0}.astype({w}) * {1} + {2}"),
    r"div\.[su](32|64)": ("t tt", "divide({0}, {1})"),
    r"rem\.[su](32|64)": ("t tt", "remainder({0}, {1})"),
    r"min\.[su](32|64)": ("t tt", "np.minimum({0}, {1})"),
    r"max\.[su](32|64)": ("t tt", "np.maximum({0}, {1})"),
    r"neg\.s(32|64)": ("u u", "-{0}"),
    # bits
    r"not\.b(32|64)": ("u u", "~{0}"),
    r"and\.b(16|32|64)": ("u uu", "{0} & {1}"),
    r"or\.b(16|32|64)": ("u uu", "{0} | {1}"),
    r"xor\.b(16|32|64)": ("u uu", "{0} ^ {1}"),
    r"shl\.b(16|32|64)": ("u ui", "shift_left({0}, {1})"),
    r"shr\.[su](16|32|64)": ("t ti", "shift_right({0}, {1})"),
    r"bfe\.[su]32": ("t tii", "extract({0}, {1}, {2})"),
    r"popc\.b32": ("i i", "np.bitwise_count({0}).astype(u4)"),
    r"prmt\.b32": ("i iii", "permute({0}, {1}, {2})"),
    # predicates
    r"not\.pred": ("p p", "~{0}"),
    r"and\.pred": ("p pp", "{0} & {1}"),
    r"or\.pred": ("p pp", "{0} | {1}"),
    r"xor\.pred": ("p pp", "{0} ^ {1}"),
    # floating point
    r"add\.f(32|64)": ("t tt", "{0} + {1}"),
    r"sub\.f(32|64)": ("t tt", "{0} - {1}"),
    r"mul\.f(32|64)": ("t tt", "{0} * {1}"),
    r"fma\.rn\.f32": ("f fff", "fma32({0}, {1}, {2})"),
    r"fma\.rn\.f64": ("d ddd", "fma64({0}, {1}, {2})"),
    r"div\.rn\.f(32|64)": ("t tt", "{0} / {1}"),
    r"div\.full\.f32": ("f ff", "perturb({0} / {1}, 2, C.noise)"),
    r"sqrt\.rn\.f(32|64)": ("t t", "np.sqrt({0})"),
    r"sqrt\.approx\.ftz\.f32": ("f f", "flush(perturb(np.sqrt(flush({0})), 1, C.noise))"),
    r"min\.f(32|64)": ("t tt", "np.fmin({0}, {1})"),
    r"max\.f(32|64)": ("t tt", "np.fmax({0}, {1})"),
    r"neg\.f(32|64)": ("t t", "-{0}"),
    r"abs\.f(32|64)": ("t t", "np.abs({0})"),
    # conversions
    r"cvt\.[su]\d+\.[su]\d+": ("s t", "{0}.astype({s})"),
    r"cvt\.rn\.f(32|64)\.[su](32|64)": ("s t", "{0}.astype({s})"),
    r"cvt\.(rn\.f32\.f64|f64\.f32)": ("s t", "{0}.astype({s})"),
    r"cvt\.rn\.f16\.f32": ("h f", "float16({0})"),
    r"cvt\.rn\.bf16\.f32": ("h f", "bfloat16({0})"),
    r"cvt\.rn\.f16x2\.f32": ("i ff", "pack([float16({1}), float16({0})])"),
    r"cvt\.rn\.bf16x2\.f32": ("i ff", "pack([bfloat16({1}), bfloat16({0})])"),
    r"cvt\.rna\.tf32\.f32": ("f f", "tf32({0})"),
    r"cvt\.f32\.f16": ("f h", "{0}.view(f2).astype(f4)"),
    r"cvt\.f32\.bf16": ("f h", "from_bfloat16({0})"),
    # comparisons; with NaN they are false, those of OPPOSITE true
    r"setp\.(eq|ne|lt|le|gt|ge)\.[bsu](16|32|64)": ("p tt", "{0} {sign} {1}"),
    r"setp\.(eq|lt|le|gt|ge)\.f(32|64)": ("p tt", "{0} {sign} {1}"),
    r"setp\.ne\.f(32|64)": ("p tt", "({0} < {1}) | ({0} > {1})"),
    r"setp\.neu\.f(32|64)": ("p tt", "{0} != {1}"),
    r"setp\.equ\.f(32|64)": ("p tt", "~(({0} < {1}) | ({0} > {1}))"),
    r"setp\.(ltu|leu|gtu|geu)\.f(32|64)": ("p tt", "~({0} {sign} {1})"),
    r"setp\.nan\.f(32|64)": ("p tt", "np.isnan({0}) | np.isnan({1})"),
    r"setp\.num\.f(16|32|64)": ("p tt", "~(np.isnan({0}) | np.isnan({1}))"),
    r"setp\.num\.bf16": ("p hh", "~(np.isnan(from_bfloat16({0})) | np.isnan(from_bfloat16({1})))"),
    # between the threads of a warp
    r"redux\.sync\.add\.s32": ("t ti", "C.reduce(np.add, {0}, {g}, {i})"),
    r"redux\.sync\.min\.[su]32": ("t ti", "C.reduce(np.minimum, {0}, {g}, {i})"),
    r"redux\.sync\.max\.[su]32": ("t ti", "C.reduce(np.maximum, {0}, {g}, {i})"),
    r"bar\.warp\.sync": (" i", "C.whole_warps({g}, {i})"),
    # orders
    r"fence\.proxy\.async\.shared::cta": (" ", "C.shared.fence()"),
    r"cp\.async\.commit_group": (" ", "C.commit({m}, {i})"),
    r"wgmma\.fence\.sync\.aligned": (" ", "C.fence_products(R, {m}, {i})"),
    r"wgmma\.commit_group\.sync\.aligned": (" ", "C.commit_products({m}, {i})"),
    # what `run` does
    r"bra(\.uni)?|ret|bar\.sync": (None, ""),
    r"call\.uni": (None, ""),
}


def _simple(i: Instruction, types: str, code: str) -> Row:
    """Return the row of an opcode of OPCODES."""
    last = _numpy_type(i.type) if re.fullmatch(r"[bsuf]\d+", i.type) else "u4"
    before = i.modifiers[-2] if len(i.modifiers) > 1 else ""
    names = {
        "t": last,
        "u": f"u{last[1:]}",
        "w": f"{last[0]}{2 * int(last[1:])}",
        "s": _numpy_type(before) if re.fullmatch(r"[bsuf]\d+", before) else "",
        "h": "u2", "i": "u4", "f": "f4", "d": "f8", "p": "?", "=": "=",
    }  # fmt: skip
    results, operands = (types or " ").split(" ")
    if i.opcode in ("shl", "shr") and not i.operands[2].startswith("%") and int(i.operands[2], 0) < 8 * int(last[1:]):
        operands, code = 2 * results, f"{{0}} {'<<' if i.opcode == 'shl' else '>>'} {{1}}"
    comparison = OPPOSITE.get(i.modifiers[0], i.modifiers[0]) if i.modifiers else ""
    code = code.replace("{s}", names["s"]).replace("{w}", names["w"]).replace("{sign}", COMPARISONS.get(comparison, ""))
    if types is None:
        return Row("", [], [])
    given = i.operands[len(results) :]
    if len(given) != len(operands):
        raise NotImplementedError(str(i))
    return Row(
        code,
        [(name, names[key]) for name, key in zip(i.operands, results, strict=False)],
        [(name, names[key]) for name, key in zip(given, operands, strict=True)],
    )


def _list(first: int, count: int) -> str:
    return "[" + ", ".join(f"{{{k}}}" for k in range(first, first + count)) + "]"


def _load(i: Instruction) -> Row:
    """ld.global.v2.b32 {%r1, %r2}, [%rd1 + 8]."""
    space, registers, (base, offset) = i.modifiers[0], elements(i.operands[0]), address(i.operands[1])
    width = int(i.type[1:]) // 8
    code = f"C.load_{space}({{0}}, {offset}, {width}, {len(registers)}, {{g}}, {{i}})"
    return Row(
        code if len(registers) > 1 else code + "[0]",
        [(register, f"u{width}") for register in registers],
        [(base, "u8" if space == "global" else "u4")],
    )


def _store(i: Instruction) -> Row:
    space, (base, offset), registers = i.modifiers[0], address(i.operands[0]), elements(i.operands[1])
    code = f"C.store_{space}({{0}}, {offset}, {_list(1, len(registers))}, {{g}}, {{i}})"
    kind = f"u{int(i.type[1:]) // 8}"
    return Row(code, [], [(base, "u8" if space == "global" else "u4"), *((r, kind) for r in registers)])


def _load_parameter(i: Instruction) -> Row:
    """ld.param.b64 %rd1, [chain_param_0], or from the address of a parameter."""
    (base, offset), kind = address(i.operands[1]), _numpy_type(i.type)
    if base.startswith("%"):
        code, operands = f"C.parameter_at(P, {{0}} + np.uint64({offset}), u{kind[1:]}).view({kind})", [(base, "u8")]
    else:
        code, operands = f"P['{base}'].view({kind})", []
    return Row(code, [(i.operands[0], kind)], operands)


def _store_parameter(i: Instruction) -> Row:
    name, _ = address(i.operands[0])
    return Row(f"C.arguments['{name}'] = {{0}}", [], [(i.operands[1], _numpy_type(i.type))])


def _move_vector(i: Instruction) -> Row:
    """mov.b64 {%r1, %r2}, %rd1 or the other way round."""
    width = int(i.type[1:]) // 8
    parts = elements(i.operands[0] if i.operands[0].startswith("{") else i.operands[1])
    part = f"u{width // len(parts)}"
    if i.operands[0].startswith("{"):
        return Row(f"unpack({{0}}, {len(parts)})", [(p, part) for p in parts], [(i.operands[1], f"u{width}")])
    return Row(f"pack({_list(0, len(parts))})", [(i.operands[0], f"u{width}")], [(p, part) for p in parts])


def _copy_async(i: Instruction) -> Row:
    """cp.async [shared], [global], bytes, bytes that are read; the rest is zero."""
    (to, to_offset), (base, offset), size = address(i.operands[0]), address(i.operands[1]), int(i.operands[2], 0)
    code = f"C.copy_async({{0}}, {to_offset}, {{1}}, {offset}, {size}, {{2}}, {{g}}, {{i}})"
    return Row(code, [], [(to, "u4"), (base, "u8"), (i.operands[3] if len(i.operands) > 3 else str(size), "u4")])


def _wait_async(i: Instruction) -> Row:
    return Row(f"C.wait({int(i.operands[0], 0)}, {{m}}, {{i}})", [], [])


def _ldmatrix(i: Instruction) -> Row:
    registers, (base, offset) = elements(i.operands[0]), address(i.operands[1])
    code = f"C.ldmatrix({{0}}, {offset}, {len(registers)}, {'trans' in i.modifiers}, {{g}}, {{i}})"
    return Row(code if len(registers) > 1 else code + "[0]", [(r, "u4") for r in registers], [(base, "u4")])


def _stmatrix(i: Instruction) -> Row:
    (base, offset), registers = address(i.operands[0]), elements(i.operands[1])
    code = f"C.stmatrix({{0}}, {offset}, {_list(1, len(registers))}, {'trans' in i.modifiers}, {{g}}, {{i}})"
    return Row(code, [], [(base, "u4"), *((r, "u4") for r in registers)])


def _mma(i: Instruction) -> Row:
    kind = i.modifiers[-2]
    wide, bits = ("f8", "f8") if kind == "f64" else ("f4", "u4")
    d, a, b, c = (elements(operand) for operand in i.operands)
    lists = _list(0, len(a)), _list(len(a), len(b)), _list(len(a) + len(b), len(c))
    return Row(
        f"C.mma({', '.join(lists)}, '{kind}', {{g}}, {{i}})",
        [(r, wide) for r in d],
        [*((r, bits) for r in (*a, *b)), *((r, wide) for r in c)],
    )


def _wgmma(i: Instruction) -> Row:
    """wgmma.mma_async {d}, {a} or descriptor of A, descriptor of B, whether d is added to, signs, transpositions.

    The results are read as operands too; they are unknown until they are waited for, and `run` writes them.
    """
    kind, d, a = i.modifiers[-1], elements(i.operands[0]), elements(i.operands[1])
    columns = int(re.search(r"n(\d+)k", i.modifiers[3])[1])
    signs, flags = i.operands[4:6], [flag == "1" for flag in i.operands[6:]]
    if signs != ["1", "1"]:
        raise NotImplementedError(str(i))
    left = _list(0, len(a)) if len(a) > 1 else "{0}"
    transposed = [False] * (2 - len(flags)) + flags  # of A only where it has a descriptor; of TF32 never
    code = (
        f"C.multiply_async(R, {left}, {{{len(a)}}}, {{{len(a) + 1}}}, {_list(len(a) + 2, len(d))}, '{kind}', {columns}, "
        f"{transposed}, {{results}}, {{fragments}}, {{m}}, {{i}})"
    )
    operands = [(r, "u4" if len(a) > 1 else "u8") for r in a] + [(i.operands[2], "u8"), (i.operands[3], "?")]
    return Row(code, [(r, "f4") for r in d], [*operands, *((r, "f4") for r in d)])


def _wait_products(i: Instruction) -> Row:
    return Row(f"C.wait_for_products(R, {int(i.operands[0], 0)}, {{m}}, {{i}})", [], [])


def _shuffle(i: Instruction) -> Row:
    mode, width = i.modifiers[1], i.operands[3:]
    if "|" in i.operands[0] or width != ["31", "-1"]:  # among all threads of the warp
        raise NotImplementedError(str(i))
    operands = [(i.operands[1], "u4"), (i.operands[2], "u4")]
    return Row(f"C.shuffle({{0}}, {{1}}, '{mode}', {{g}}, {{i}})", [(i.operands[0], "u4")], operands)


def _atomic(i: Instruction) -> Row:
    (base, offset), kind = address(i.operands[1]), _numpy_type(i.type)
    function = {"add": "np.add", "or": "np.bitwise_or", "min": "np.minimum", "max": "np.maximum"}[i.modifiers[3]]
    code = f"C.atomic({function}, {{0}}, {offset}, {{1}}, {{g}}, {{i}})"
    return Row(code, [(i.operands[0], kind)], [(base, "u8"), (i.operands[2], kind)])


SPECIAL = {
    r"ld\.(global|shared)(\.v[24])?\.b(8|16|32|64)": _load,
    r"st\.(global|shared)(\.v[24])?\.b(8|16|32|64)": _store,
    r"ld\.param\.[bsu](32|64)": _load_parameter,
    r"st\.param\.b(32|64)": _store_parameter,
    r"mov\.b(32|64) vector": _move_vector,
    r"cp\.async\.c[ag]\.shared\.global": _copy_async,
    r"cp\.async\.wait_group": _wait_async,
    r"ldmatrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16": _ldmatrix,
    r"stmatrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16": _stmatrix,
    r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(b?f16)\.\1\.f32": _mma,
    r"mma\.sync\.aligned\.m16n8k8\.row\.col\.f32\.tf32\.tf32\.f32": _mma,
    r"mma\.sync\.aligned\.(m8n8k4|m16n8k16)\.row\.col\.f64\.f64\.f64\.f64": _mma,
    r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.(b?f16)\.\1": _wgmma,
    r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k8\.f32\.tf32\.tf32": _wgmma,
    r"wgmma\.wait_group\.sync\.aligned": _wait_products,
    r"shfl\.sync\.(bfly|idx)\.b32": _shuffle,
    r"atom\.global\.gpu\.(acq_rel|acquire|release|relaxed)\.((add|min|max)\.[su]|or\.b)(32|64)": _atomic,
}
_rows = {}  # opcode as written: (types, expression), or the function that makes the row


def row(i: Instruction) -> Row:
    """Return the meaning of an instruction."""
    name = ".".join([i.opcode, *i.modifiers])
    if i.opcode == "mov" and any(operand.startswith("{") for operand in i.operands):
        name += " vector"
    if name not in _rows:
        found = [value for table in (OPCODES, SPECIAL) for key, value in table.items() if re.fullmatch(key, name)]
        if len(found) != 1:
            raise NotImplementedError(f"{len(found)} rows for {i}")
        _rows[name] = found[0]
    meaning = _rows[name]
    return meaning(i) if callable(meaning) else _simple(i, *meaning)


class Block(NamedTuple):
    """A basic block: instructions from start to stop, the last of them, and the block it may branch to."""

    start: int
    stop: int
    last: Instruction
    target: int | None


class Code:
    """A function of PTX as Python.

    Args:
        function: It.
        threads: The number of threads of a block.
        symbols: The addresses of names.

    Attributes:
        registers: The index of each register.
        kinds: The NumPy type of each register.
        blocks: The basic blocks, in order. Their number stands for the end of the function.
    """

    def __init__(self, function: Function, threads: int, symbols: dict[str, int]):
        self.function, self.threads, self.symbols = function, threads, symbols
        self.rows = [row(i) for i in function.instructions]
        self.constants, self._constant_index = [], {}
        votes: dict[str, dict[str, int]] = {}
        for i, (_, results, operands) in zip(function.instructions, self.rows, strict=True):
            guards = [(i.guard, "?")] if i.guard else []
            for name, kind in (*results, *operands, *guards):
                if self._is_register(name):
                    ballots = votes.setdefault(name, {})
                    if kind != "=" and np.dtype(kind).itemsize == (function.width(name) or 1):
                        ballots[kind] = ballots.get(kind, 0) + 1
        self.registers = {name: k for k, name in enumerate(votes)}
        self.kinds = [
            max(ballots, key=ballots.get) if ballots else f"u{function.width(name)}" for name, ballots in votes.items()
        ]
        starts = {
            0,
            *function.labels.values(),
            *(k + 1 for k, i in enumerate(function.instructions) if i.opcode in ENDS),
        }
        starts = sorted(starts - {len(function.instructions)})
        index = {start: k for k, start in enumerate(starts)} | {len(function.instructions): len(starts)}
        self.blocks = []
        for start, stop in zip(starts, [*starts[1:], len(function.instructions)], strict=True):
            last = function.instructions[stop - 1]
            target = index[function.labels[last.operands[0]]] if last.opcode == "bra" else None
            self.blocks.append(Block(start, stop, last, target))
        self._compiled = {}

    def compiled(self, block: int, masked: bool):
        """Return the function of a block, for all threads or for those of a mask."""
        if (block, masked) not in self._compiled:
            self._compiled[block, masked] = self._compile(block, masked)
        return self._compiled[block, masked]

    def _compile(self, number: int, masked: bool):
        block = self.blocks[number]
        lines = [line for k in range(block.start, block.stop) for line in self._statements(k, masked)]
        text = "\n ".join(["def f(R, C, P, M):", *lines, "pass"])
        names = vars(values) | {name: np.dtype(name) for name in ("u1", "u2", "u4", "u8", "i4", "i8", "f2", "f4", "f8")}
        names |= {"i2": np.dtype("i2"), "K": self.constants, "I": self.function.instructions}
        exec(compile(text, f"<{self.function.name} {number}>", "exec"), names)
        return names["f"]

    def _statements(self, k: int, masked: bool) -> list[str]:
        i, (code, results, operands) = self.function.instructions[k], self.rows[k]
        if not code:
            return []
        here = guard = "M" if masked else "None"
        if i.guard:
            guard = f"{'~' * i.negated}{self._read(i.guard, '?')}"
            guard = f"({guard} & M)" if masked else guard
        stored = self.kinds[self.registers[results[0][0]]] if results and results[0][0] != "_" else None
        sources = [self._read(name, stored if kind == "=" else kind) for name, kind in operands]
        places = [(self.registers[name], self.kinds[self.registers[name]]) for name, _ in results if name != "_"]
        # of wgmma, whose other operands, descriptors and a predicate, have other types
        fragments = [
            self.registers[name] for name, kind in operands if kind in ("u4", "f4") and self._is_register(name)
        ]
        code = code.format(*sources, g=guard, m=here, i=f"I[{k}]", results=places, fragments=fragments)
        if not results or i.opcode == "wgmma":
            return [code]
        if len(results) == 1:
            return [self._write(*results[0], code, stored, guard)]
        writes = [
            self._write(name, kind, f"v[{n}]", None, guard) for n, (name, kind) in enumerate(results) if name != "_"
        ]
        return [f"v = {code}", *writes]

    def _read(self, name: str, kind: str) -> str:
        """Return an operand as this type. A register may be wider: its lowest bits are taken."""
        if not self._is_register(name):
            return f"C.registers['{name}'].view({kind})" if name.startswith("%") else self._constant(name, kind)
        index = self.registers[name]
        have, value = self.kinds[index], f"R[{index}]"
        if have == kind:
            return value
        if np.dtype(have).itemsize != np.dtype(kind).itemsize:
            value = f"{value}.view(u{have[1:]}).astype(u{kind[1:]})"
        return f"{value}.view({kind})"

    def _write(self, name: str, kind: str, value: str, stored: str | None, guard: str) -> str:
        """Return the statement that writes a value of this type. A register may be wider: it is extended."""
        index = self.registers[name]
        have = self.kinds[index]
        kind = stored if kind == "=" else kind
        if have != kind:
            if np.dtype(have).itemsize != np.dtype(kind).itemsize:
                value = f"({value}).astype({kind[0]}{have[1:]})"
            value = f"({value}).view({have})"
        return f"R[{index}] = {value}" if guard == "None" else f"R[{index}] = np.where({guard}, {value}, R[{index}])"

    def _is_register(self, name: str) -> bool:
        if name in THREAD_REGISTERS:
            return False
        if name.startswith("%") and name.rstrip("0123456789") not in self.function.registers:
            raise NotImplementedError(f"the register {name}")
        return name.startswith("%")

    def _constant(self, text: str, kind: str) -> str:
        """Return a constant as an array: 0f3F800000 and 0d... by their bits, integers, names of addresses."""
        dtype = np.dtype(kind)
        if text in self.symbols:
            value = self.symbols[text]
        elif text[:2] in ("0f", "0d"):
            value = int(text[2:], 16)
        else:
            value = int(text.rstrip("U"), 0)
        if kind == "?":
            scalar = np.bool_(value)
        else:
            scalar = np.frombuffer((value & (1 << 8 * dtype.itemsize) - 1).to_bytes(dtype.itemsize, "little"), dtype)[0]
        key = scalar.tobytes(), kind
        if key not in self._constant_index:
            self._constant_index[key] = len(self.constants)
            self.constants.append(np.full(self.threads, scalar))
        return f"K[{self._constant_index[key]}]"


class Module:
    """The functions of a compiled kernel, translated when they are first called.

    Args:
        functions: As `parse` returns them.
        kernel: The name of the kernel.
        shared: Bytes of shared memory of a block.
    """

    def __init__(self, functions: dict[str, Function], kernel: str, shared: int):
        self.functions, self.kernel, self.shared = functions, kernel, shared
        self.threads = functions[kernel].threads
        self._codes = {}
        instructions = [i for function in functions.values() for i in function.instructions]
        self.grain = {space: self._grain(instructions, space) for space in ("global", "shared")}
        self.has_atomics = any(i.opcode == "atom" for i in instructions)

    @staticmethod
    def _grain(instructions, space: str) -> int:
        """Return the logarithm of the bytes of the smallest access to a space, at most two."""
        types = [i for i in instructions if i.opcode in ("ld", "st", "ldmatrix", "stmatrix") and space in i.modifiers]
        sizes = [
            len(elements(i.operands[i.opcode == "st"])) * int(i.type[1:]) // 8
            for i in types
            if i.opcode in ("ld", "st")
        ]
        return min([4, *sizes]).bit_length() - 1

    def code(self, name: str) -> Code:
        if name not in self._codes:
            function = self.functions[name]
            symbols = {"global_smem": 0} | {name: 8 * k for k, (name, _) in enumerate(function.parameters)}
            self._codes[name] = Code(function, self.threads, symbols)
        return self._codes[name]
