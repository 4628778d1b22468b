"""Blocks of threads that run a kernel, one after another, or taking turns where they wait for each other.

All threads of a block execute a basic block at once. Where they part, those go on that are furthest behind, until they
meet again or wait at a barrier.
"""

import itertools

import numpy as np

from . import matrices
from .count import SECTOR, Counts
from .memory import GlobalAccess, Report, Shared
from .parse import Instruction, split
from .translate import Code, Module


class Launch:
    """A grid of blocks.

    Args:
        module: What they run.
        memory: The address space, `memory.Global`.
        grid: Number of blocks in each dimension.
        parameters: The bits of the arguments, by name, as NumPy numbers.
        noise: A seed by which approximate instructions are off by what they may be; None: they are exact.
        schedule: A random.Random that shuffles the order of the blocks; None: as they are numbered.
        counts: Takes what is executed; None: nobody counts.

    Attributes:
        reports: What the checks found, by kind, line and text.
        instructions: Number of instructions executed by blocks.
    """

    def __init__(
        self, module: Module, memory, grid, parameters, noise=None, schedule=None, counts: Counts | None = None
    ):
        self.module, self.grid, self.noise, self.schedule, self.counts = module, grid, noise, schedule, counts
        self.parameters = {name: np.full(module.threads, value) for name, value in parameters.items()}
        self.reports: dict[tuple, Report] = {}
        self.instructions = 0
        self.memory = GlobalAccess(memory, module.grain["global"], self.report, counts)

    def report(self, kind: str, instruction: Instruction, text: str) -> None:
        key = kind, instruction.line
        if key in self.reports:
            self.reports[key].count += 1
        else:
            self.reports[key] = Report(kind, self.module.kernel, instruction, text)

    def run(self) -> None:
        with np.errstate(all="ignore"):
            places = itertools.product(*(range(size) for size in self.grid[::-1]))
            blocks = [Block(self, number, place[::-1]).run() for number, place in enumerate(places)]
            if self.module.has_atomics:  # they may wait for each other: each goes on to its next atomic in turn
                while blocks:
                    if self.schedule is not None:
                        self.schedule.shuffle(blocks)
                    blocks = [block for block in blocks if next(block, "ended") != "ended"]
            else:
                if self.schedule is not None:
                    self.schedule.shuffle(blocks)
                for block in blocks:
                    assert next(block, "ended") == "ended"
        if self.counts is not None:
            self.counts.touched = self.memory.touched(SECTOR)

    def execute(self, code: Code, number: int, mask, *state) -> None:
        """Run a basic block by the threads of a mask, or by all."""
        code.compiled(number, mask is not None)(*state, mask)
        start, stop, *_ = code.blocks[number]
        self.instructions += stop - start
        if self.counts is not None:
            self.counts.execute(code, number, self.module.threads, mask)


class Block:
    """The threads of a block (a CTA).

    Attributes:
        index: Number of the block.
        warp: Warp of every thread.
        epoch: Number of barriers so far.
        seen: For every block the epoch up to which all warps of this one see what it has done.
        acquired: Since the last barrier: pairs of a warp and of what it has seen besides.
    """

    def __init__(self, launch: Launch, index: int, place):
        module = launch.module
        self.launch, self.module, self.index, self.noise = launch, module, index, launch.noise
        self.report = launch.report
        self.threads, thread = module.threads, np.arange(module.threads, dtype="u4")
        self.warp = (thread >> 5).astype("i8")
        self.registers = {"%tid.x": thread}
        for dimension, at, size in zip("xyz", place, launch.grid, strict=True):
            self.registers[f"%ctaid.{dimension}"] = np.full_like(thread, at)
            self.registers[f"%nctaid.{dimension}"] = np.full_like(thread, size)
        self.shared = Shared(module.shared, module.grain["shared"], self.warp, self.report)
        self.epoch = 0
        self.seen = np.zeros(int(np.prod(launch.grid)), "i8")
        self.acquired = []
        self.arguments = {}  # of the next call
        self.open, self.groups = ([], {}), []  # checks and results of wgmma: not committed, and committed groups
        self.fenced = {}  # what wgmma may find in registers: what was there at its last fence, what it put there since

    # what threads do next

    def run(self):
        """Run the kernel; a generator that yields behind atomics."""
        yield from self._call(self.module.code(self.module.kernel), self.launch.parameters, None)
        for instruction in self.shared.left():
            self.report("synccheck", instruction, "is never waited for")
        for checks, _ in (*self.groups, self.open):
            for _, instruction in checks:
                self.report("synccheck", instruction, "is never waited for")

    def _call(self, code: Code, parameters, mask):
        """Run a function by the threads of a mask, or by all."""
        R = [np.zeros(self.threads, kind) for kind in code.kinds]
        end = len(code.blocks)
        position = 0 if mask is None else np.where(mask, 0, end)  # a block of code, or one for each thread
        while np.any(position != end):
            together = not isinstance(position, np.ndarray)
            if together:
                position = yield from self._together(code, R, parameters, position)
            else:
                position = yield from self._apart(code, R, parameters, position, mask is None or mask.all())

    def _together(self, code: Code, R, parameters, at):
        """Run all threads from a block of code on until they part. Return where they are."""
        end = len(code.blocks)
        while at != end:
            _, _, last, target = code.blocks[at]
            self.launch.execute(code, at, None, R, self, parameters)
            at += 1
            if last.opcode in ("bra", "ret"):
                target = end if last.opcode == "ret" else target
                taken = self._taken(code, R, last)
                if taken is None or taken.all():
                    at = target
                elif taken.any():
                    return np.where(taken, target, at)
            elif last.opcode == "bar" and last.modifiers == ["sync"]:
                self._barrier(last)
            elif last.opcode == "call":
                yield from self._call(*self._callee(last), None)
            elif last.opcode == "atom":
                yield
        return at

    def _apart(self, code: Code, R, parameters, at, whole: bool):
        """Run threads that are in different blocks of code until all are in one. Return where they are.

        whole: whether all threads were in this function; those that have returned from a kernel meet no barrier.
        """
        end = len(code.blocks)
        waiting, barriers = np.zeros(self.threads, "?"), []
        while (at != end).any():
            ready = (at != end) & ~waiting
            if not ready.any():
                if len({i.line for i in barriers}) > 1:
                    self.report("synccheck", barriers[0], "is where some threads wait while others wait elsewhere")
                if not whole:
                    self.report("synccheck", barriers[0], "is not reached by all threads")
                self._barrier(barriers[0])
                waiting[:], ready, barriers = False, waiting.copy(), []
            here = int(at[ready].min())
            mask = ready & (at == here)
            if mask.all():
                return here
            block = code.blocks[here]
            self.launch.execute(code, here, mask, R, self, parameters)
            at[mask] = here + 1
            last = block.last
            if last.opcode in ("bra", "ret"):
                taken = self._taken(code, R, last)
                at[mask if taken is None else mask & taken] = end if last.opcode == "ret" else block.target
            elif last.opcode == "bar" and last.modifiers == ["sync"]:
                self.whole_warps(mask, last)
                waiting |= mask
                barriers.append(last)
            elif last.opcode == "call":
                yield from self._call(*self._callee(last), mask)
            elif last.opcode == "atom":
                yield
        return end

    @staticmethod
    def _taken(code: Code, R, instruction):
        """Return which threads a branch or a return takes; None: all."""
        if instruction.guard is None:
            return None
        predicate = R[code.registers[instruction.guard]]
        return ~predicate if instruction.negated else predicate

    def _callee(self, instruction):
        """Return the function that is called, and its parameters."""
        code = self.module.code(instruction.operands[0])
        given = split(instruction.operands[1].strip("()"))
        names = [name for name, _ in code.function.parameters]
        return code, {name: self.arguments[g] for name, g in zip(names, given, strict=True)}

    def _barrier(self, instruction):
        if instruction.operands != ["0"]:
            raise NotImplementedError(str(instruction))
        self.epoch += 1
        self.shared.start_epoch(self.epoch)
        for _, clock in self.acquired:
            np.maximum(self.seen, clock, out=self.seen)
        self.acquired = []

    def whole_warps(self, mask, instruction):
        if mask is not None:
            warps = mask.reshape(-1, 32)
            if (warps.any(1) & ~warps.all(1)).any():
                self.report("synccheck", instruction, "is executed by a part of a warp")

    def _whole_block(self, mask, instruction):
        if mask is not None and not mask.all():
            raise NotImplementedError(f"by a part of the block: {instruction}")

    # the order of blocks

    def clock(self, warp):
        """Return up to which epoch a warp has seen every block; what it has done itself counts behind a barrier."""
        clocks = [clock for of, clock in self.acquired if of == warp]
        seen = np.maximum.reduce([self.seen, *clocks])
        seen[self.index] = self.epoch
        return seen

    def unseen(self, block, epoch, warp):
        """Return where these warps have not seen what these blocks did in these epochs."""
        unseen = epoch >= self.seen[block]
        if unseen.any():
            for by, clock in self.acquired:
                unseen &= (warp != by) | (epoch >= clock[block])
        return unseen

    # instructions that need more than the registers of their thread; the arguments are those of `translate`

    def parameter_at(self, parameters, at, kind):
        """Return the parameters at these addresses, eight bytes each, as this type."""
        values = list(parameters.values())
        result = np.zeros(self.threads, kind)
        for place in np.unique(at):
            result[at == place] = values[int(place) // 8][at == place]
        return result

    def load_global(self, address, offset, width, count, mask, instruction):
        return self.launch.memory.load(self, address, offset, width, count, mask, instruction)

    def store_global(self, address, offset, values, mask, instruction):
        self.launch.memory.store(self, address, offset, values, mask, instruction)

    def atomic(self, function, address, offset, value, mask, instruction):
        return self.launch.memory.atomic(self, function, address, offset, value, mask, instruction)

    def load_shared(self, address, offset, width, count, mask, instruction):
        return self.shared.load(address, offset, width, count, mask, instruction)

    def store_shared(self, address, offset, values, mask, instruction):
        self.shared.store(address, offset, values, mask, instruction)

    def copy_async(self, to, to_offset, address, offset, size, count, mask, instruction):
        """Read `count` bytes of each thread now, all or none, and let them land later, zeros for those not read."""
        reads = count > 0
        if not np.isin(count[reads], size).all():
            raise NotImplementedError(f"cp.async that reads a part: {instruction}")
        reads = reads if mask is None else reads & mask
        values = self.load_global(address, offset, 4, size // 4, None if reads.all() else reads, instruction)
        self.shared.copy_async(to, to_offset, values, mask, instruction)

    def commit(self, mask, instruction):
        self._whole_block(mask, instruction)
        self.shared.commit()

    def wait(self, most, mask, instruction):
        self._whole_block(mask, instruction)
        self.shared.wait(most)

    def ldmatrix(self, address, offset, count, transposed, mask, instruction):
        self.whole_warps(mask, instruction)
        rows = self.shared.load_rows(address, offset, count, mask, instruction)
        return matrices.rows_to_registers(rows, transposed)

    def stmatrix(self, address, offset, registers, transposed, mask, instruction):
        self.whole_warps(mask, instruction)
        rows = matrices.registers_to_rows(registers, transposed)
        self.shared.store_rows(address, offset, rows, mask, instruction)

    def mma(self, a, b, c, kind, mask, instruction):
        self.whole_warps(mask, instruction)
        return matrices.multiply(a, b, c, kind)

    def shuffle(self, value, lane, mode, mask, instruction):
        """Return the value of lane `lane`, or of that which differs in these bits (bfly)."""
        own = np.arange(self.threads)
        source = own ^ lane.astype("i8") if mode == "bfly" else own & -32 | lane.astype("i8") & 31
        if mask is not None and not mask[source[mask]].all():
            self.report("synccheck", instruction, "reads from a thread that is not there")
        return value[source]

    def reduce(self, function, value, mask, instruction):
        """Return a function of the values of each warp to all of its threads."""
        self.whole_warps(mask, instruction)
        return np.repeat(function.reduce(value.reshape(-1, 32), axis=1, dtype=value.dtype), 32)

    # wgmma: computed at once; its results are NaN until they are waited for

    def fence_products(self, R, mask, instruction):
        self._whole_block(mask, instruction)
        self.fenced = {id(value): value for value in R}  # what is computed is another array, copies are the same

    def _write_products(self, R, register, value):
        R[register] = self.fenced[id(value)] = value  # several products may add to registers without a fence between

    def multiply_async(self, R, a, b, keep, c, kind, columns, transposed, results, fragments, mask, instruction):
        self._whole_block(mask, instruction)
        if not all(id(R[register]) in self.fenced for register in fragments):
            self.report("racecheck", instruction, "takes registers that were computed with no wgmma.fence since")
        size, depth = (4, 8) if kind == "tf32" else (2, 16)
        checks, flying = self.open
        if not (keep == keep[0]).all():
            raise NotImplementedError(f"threads differ: {instruction}")
        left, right = [], []
        for group in range(self.threads // 128):
            if not isinstance(a, list):
                left.append(self._operand(a, group, 64, depth, size, transposed[0], kind, checks, instruction))
            right.append(self._operand(b, group, columns, depth, size, transposed[1], kind, checks, instruction))
        left = matrices.gather(a, kind).reshape(-1, 64, depth) if isinstance(a, list) else np.stack(left)
        known = {}
        for _, landing in (*self.groups, self.open):
            known |= landing
        c = [
            known[register].view("f4") if register in known else x for (register, _), x in zip(results, c, strict=True)
        ]
        product = matrices.multiply_group(left, np.stack(right).swapaxes(1, 2), c, keep[0])
        for (register, kind), value in zip(results, product, strict=True):
            flying[register] = value.view(kind)
            self._write_products(R, register, np.full(self.threads, np.nan, "f4").view(kind))

    def _operand(self, descriptors, group, rows, depth, size, transposed, kind, checks, instruction):
        """Return an operand of a warp group in shared memory; add the check for when it has been read."""
        descriptor = int(descriptors[128 * group])
        if (descriptors[128 * group : 128 * group + 128] != descriptor).any():
            raise NotImplementedError(f"threads of a warp group differ: {instruction}")
        at = matrices.descriptor_addresses(descriptor, rows, depth, size, transposed)
        bits, finish = self.shared.read_by_group(at, size, group, instruction)
        checks.append((finish, instruction))
        return matrices.operand(bits, kind)

    def commit_products(self, mask, instruction):
        self._whole_block(mask, instruction)
        self.groups.append(self.open)
        self.open = [], {}

    def wait_for_products(self, R, most, mask, instruction):
        self._whole_block(mask, instruction)
        while len(self.groups) > most:
            checks, landing = self.groups.pop(0)
            for finish, _ in checks:
                finish()
            for register, value in landing.items():
                if not any(register in later for _, later in (*self.groups, self.open)):
                    self._write_products(R, register, value)
