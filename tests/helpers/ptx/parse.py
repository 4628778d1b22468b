"""PTX text to functions and instructions."""

import re
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Instruction:
    """An instruction, as `@!%p1 ld.global.v2.b32 {%r1, %r2}, [%rd1 + 8];`.

    Attributes:
        opcode: "ld".
        modifiers: ["global", "v2", "b32"].
        operands: ["{%r1, %r2}", "[%rd1 + 8]"].
        guard: The predicate register of the threads that take part, "%p1"; None: all.
        negated: Whether those take part for which it is false.
        line: Where it is in the text.
        source: Where it comes from, as "low_rank.py:126:0"; inlined functions from the innermost outward.
        text: The instruction as written.
    """

    opcode: str
    modifiers: list[str]
    operands: list[str]
    guard: str | None
    negated: bool
    line: int
    source: str
    text: str

    @property
    def type(self) -> str:
        """The last modifier, which is the type of the operands, "b32"."""
        return self.modifiers[-1] if self.modifiers else ""

    def __str__(self):
        return f"PTX {self.line}: {self.text}  ({self.source})"


@dataclass(eq=False)
class Function:
    """A function or a kernel.

    Attributes:
        name: Its name.
        parameters: Name and type of each parameter, ("chain_param_0", "u64").
        registers: Width in bytes of the registers with a prefix, {"%rd": 8, "%p": 0}; 0 for predicates.
        instructions: All of them, in order.
        labels: Index of the instruction that follows a label.
        threads: Of a kernel: the number of threads of a block.
    """

    name: str
    parameters: list[tuple[str, str]] = field(default_factory=list)
    registers: dict[str, int] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    threads: int = 0

    def width(self, register: str) -> int:
        """Return the bytes of a register, 0 for a predicate."""
        return self.registers[register.rstrip("0123456789")]


def split(text: str) -> list[str]:
    """Split at the commas outside of brackets: "{%r1, %r2}, [%rd1]" is two operands."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def elements(operand: str) -> list[str]:
    """Return the elements of a vector "{%r1, %r2}", or the operand alone."""
    return split(operand.strip("{} ")) if operand.startswith("{") else [operand]


def address(operand: str) -> tuple[str, int]:
    """Return base and offset of "[%rd1 + 8]"."""
    base, offset = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+)\s*)?\]", operand).groups()
    return base, int(offset or "0", 0)


def parse(text: str) -> dict[str, Function]:
    """Return the functions of a module by name."""
    functions, function, source, depth = {}, None, "", 0
    for number, raw in enumerate(text.split("\n"), 1):
        code, _, comment = raw.partition("//")
        code = code.strip()
        if code.startswith(".section"):  # debugging information, to the end
            break
        if code.startswith(".loc"):
            source = comment.strip()
        elif match := re.match(r"(?:\.visible\s+)?\.(?:entry|func)\s+([\w$]+)", code):
            function = None if code.endswith(";") else Function(match[1])  # a declaration is defined later
        elif function is None or not code:
            continue
        elif depth == 0:
            if match := re.match(r"\.param\s+\.(\w+)\s+(?:.*\s)?([\w$]+)(?:\[\d+\])?,?$", code):
                function.parameters.append((match[2], match[1]))
            elif match := re.match(r"\.reqntid\s+(\d+)", code):
                function.threads = int(match[1])
            elif code == "{":
                functions[function.name], depth = function, 1
            elif code.endswith(";"):
                function = None
        elif code == "{":  # the scope of the parameters of a call
            depth += 1
        elif code == "}":
            depth -= 1
        elif match := re.match(r"\.reg\s+\.(\w+)\s+(%\w+)<\d+>;", code):
            function.registers[match[2]] = 0 if match[1] == "pred" else int(match[1][1:]) // 8
        elif code.startswith("."):
            continue
        elif match := re.match(r"([$\w]+):$", code):
            function.labels[match[1]] = len(function.instructions)
        else:
            statements = filter(None, (statement.strip() for statement in code.split(";")))
            function.instructions += [_instruction(statement, number, source) for statement in statements]
    return functions


def _instruction(text: str, line: int, source: str) -> Instruction:
    negated, guard, rest = re.match(r"(?:@(!?)(%\w+)\s+)?(.*)", text).groups()
    name, _, operands = rest.replace("\t", " ").partition(" ")
    opcode, *modifiers = name.split(".")
    return Instruction(opcode, modifiers, split(operands), guard, negated == "!", line, source, text)
