"""Memory with the checks of compute-sanitizer: who may access what, and when.

A granule is the smallest piece of memory that a kernel accesses, at most four bytes. The shadow of a memory has for every
granule who wrote it last and who has read it, as stamps: epoch * 64 + warp. The epoch of a block is the number of its
barriers so far. Two accesses of one block, of which one writes, race if they have one epoch and different warps: threads
of a warp run in lockstep here. Blocks are ordered by the clocks of `run.Block` alone.
"""

import ctypes
from dataclasses import dataclass

import numpy as np

UNSIGNED = {n: np.dtype(f"u{n}") for n in (1, 2, 4, 8)}
IN_FLIGHT = 1 << 50  # the stamp of what an asynchronous copy will write
SLOT = 32  # bits of an address within an allocation


class SanitizerError(AssertionError):
    """A kernel did what no kernel may."""


@dataclass
class Report:
    """What a check has found, by instruction; count: how often.

    kind is memcheck (bounds, alignment), racecheck, initcheck (reads what nobody wrote) or synccheck (parts of warps or
    of blocks where all are needed, waits that are missing).
    """

    kind: str
    kernel: str
    instruction: object
    text: str
    count: int = 1

    def __str__(self):
        return f"{self.kind}: {self.kernel} {self.text} (x{self.count})\n    {self.instruction}"


class Readers:
    """Who has read each granule last, and the epoch in which several warps have."""

    def __init__(self, granules):
        self.last = np.full(granules, -1, "i8")
        self.several = np.full(granules, -1, "i8")

    def add(self, at, stamp, epoch):
        before = self.last[at]
        self.last[at] = stamp
        other = self.last[at] != stamp  # within this instruction
        if before.max() >= epoch * 64:
            other |= (before >= epoch * 64) & (before != stamp)
        if other.any():
            self.several[at[other]] = epoch

    def others(self, at, stamp, epoch):
        """Return where another warp has read in this epoch; None: nowhere."""
        last = self.last[at]
        if last.max() < epoch * 64:
            return None
        return (last >= epoch * 64) & ((last != stamp) | (self.several[at] == epoch))


def granules(at, size, grain, stamp):
    """Return the granules of accesses of `size` bytes, and a stamp for each."""
    first = at >> grain
    if size >> grain <= 1:
        return first, stamp
    count = size >> grain
    return (first[:, None] + np.arange(count)).reshape(-1), np.repeat(stamp, count)


class Shared:
    """The shared memory of a block.

    Args:
        nbytes: Its size.
        grain: Logarithm of the bytes of a granule.
        warp: Warp of every thread.
        report: Takes kind, instruction and text.

    Methods take `mask`, which threads take part, or None for all. `at` are addresses in bytes.
    """

    def __init__(self, nbytes, grain, warp, report):
        self.nbytes, self.grain, self.warp, self.report = nbytes, grain, warp, report
        self.bytes = np.full(-(-nbytes // 16) * 16, 0xA5, "u1")
        self.views = {width: self.bytes.view(dtype) for width, dtype in UNSIGNED.items()}
        count = len(self.bytes) >> grain
        self.writer = np.full(count, -1, "i8")
        self.readers = Readers(count)
        # the number of the last write, and of that at the last fence, behind which wgmma sees what was written
        self.order, self.writes, self.fenced = np.zeros(count, "i8"), 0, 0
        self.open, self.groups = [], []  # asynchronous copies: not committed, and committed groups
        self.start_epoch(0)

    def start_epoch(self, epoch):
        self.epoch, self.stamp = epoch, self.warp + 64 * epoch

    def _select(self, address, offset, size, mask, instruction):
        """Return the addresses of the threads that take part, which threads (None: all), and their stamps."""
        at, stamp = address.astype("i8") + offset, self.stamp
        lanes = None
        if mask is not None:
            lanes = np.flatnonzero(mask)
            at, stamp = at[lanes], stamp[lanes]
            if not len(at):
                return at, lanes, stamp
        if np.bitwise_or.reduce(at) & (size - 1):
            self.report("memcheck", instruction, f"accesses {size} bytes of shared memory at a misaligned address")
            at &= -size
        if at.max() + size > self.nbytes or at.min() < 0:
            self.report("memcheck", instruction, f"accesses shared memory at {at.max()} of {self.nbytes} bytes")
            at = at.clip(0, self.nbytes - size)
        return at, lanes, stamp

    def _written(self, at, stamp, instruction, verb):
        """Report what another warp has written in this epoch."""
        writer = self.writer[at]
        if writer.max() >= 64 * self.epoch:
            race = (writer >= 64 * self.epoch) & (writer != stamp)
            if race.any():
                last = writer[race].max()
                who = "cp.async may still be writing" if last == IN_FLIGHT else f"warp {last & 63} has written"
                self.report("racecheck", instruction, f"{verb} shared memory that {who} since the last barrier")
        return writer

    def _reading(self, at, size, stamp, instruction):
        at, stamp = granules(at, size, self.grain, stamp)
        if self._written(at, stamp, instruction, "reads").min() < 0:
            self.report("initcheck", instruction, "reads shared memory that nobody has written")
        self.readers.add(at, stamp, self.epoch)

    def _writing(self, at, size, stamp, instruction, leave=None):
        """Check and note a write; leave: another stamp. Return the granules."""
        at, stamp = granules(at, size, self.grain, stamp)
        self._written(at, stamp, instruction, "writes")
        race = self.readers.others(at, stamp, self.epoch)
        if race is not None and race.any():
            self.report(
                "racecheck", instruction, "writes shared memory that another warp has read since the last barrier"
            )
        self._note(at, stamp if leave is None else leave)
        return at

    def _note(self, at, stamp):
        self.writer[at] = stamp
        self.writes += 1
        self.order[at] = self.writes

    def load(self, address, offset, width, count, mask, instruction):
        """Return `count` registers of `width` bytes each; those of threads that do not take part are 0."""
        at, lanes, stamp = self._select(address, offset, width * count, mask, instruction)
        if not len(at):
            return [np.zeros(len(address), UNSIGNED[width])] * count
        self._reading(at, width * count, stamp, instruction)
        index, view = at // width, self.views[width]
        return [spread(view[index + k], lanes, len(address)) for k in range(count)]

    def store(self, address, offset, values, mask, instruction):
        width, count = values[0].itemsize, len(values)
        at, lanes, stamp = self._select(address, offset, width * count, mask, instruction)
        if not len(at):
            return
        self._writing(at, width * count, stamp, instruction)
        index, view = at // width, self.views[width]
        for k, value in enumerate(values):
            value = value if lanes is None else value[lanes]
            view[index + k] = value
            if (view[index + k] != value).any():
                self.report("racecheck", instruction, "writes different values to one shared address")

    def load_rows(self, address, offset, count, mask, instruction):
        """Return rows [warps, 8 count, 8] of 16 bits at the addresses of the first 8 count threads of each warp."""
        at, lanes, stamp = self._select(address, offset, 16, self._first(count, mask), instruction)
        rows = np.zeros((len(address) // 32, 8 * count, 8), "u2")
        if len(at):
            self._reading(at, 16, stamp, instruction)
            rows[lanes // 32, lanes % 32] = self.views[2][(at // 2)[:, None] + np.arange(8)]
        return rows

    def store_rows(self, address, offset, rows, mask, instruction):
        at, lanes, stamp = self._select(address, offset, 16, self._first(rows.shape[1] // 8, mask), instruction)
        if len(at):
            self._writing(at, 16, stamp, instruction)
            self.views[2][(at // 2)[:, None] + np.arange(8)] = rows[lanes // 32, lanes % 32]

    def _first(self, count, mask):
        first = np.arange(len(self.warp)) % 32 < 8 * count
        return first if mask is None else first & mask

    def copy_async(self, address, offset, values, mask, instruction):
        """Let registers land in shared memory when their group is waited for."""
        size = sum(value.itemsize for value in values)
        at, lanes, stamp = self._select(address, offset, size, mask, instruction)
        if len(at):
            data = np.stack(values, 1) if lanes is None else np.stack(values, 1)[lanes]
            written = self._writing(at, size, stamp, instruction, IN_FLIGHT)
            self.open.append((at, data, written, lanes, instruction))

    def commit(self):
        self.groups.append(self.open)
        self.open = []

    def wait(self, most):
        """Let all groups land but the last `most`; their threads see what they copied, others after a barrier."""
        while len(self.groups) > most:
            for at, data, written, lanes, _ in self.groups.pop(0):
                self.views[4][(at // 4)[:, None] + np.arange(data.shape[1])] = data
                stamp = self.stamp if lanes is None else self.stamp[lanes]
                self._note(written, np.repeat(stamp, len(written) // len(stamp)))

    def fence(self):
        """Let the tensor core see all that was written so far (fence.proxy.async)."""
        self.fenced = self.writes

    def read_by_group(self, at, size, group, instruction):
        """Return the elements at these addresses for a warp group, and the check for when it has read them."""
        if at.max() + size > self.nbytes:
            self.report("memcheck", instruction, f"reads shared memory at {at.max()} of {self.nbytes} bytes")
            at = at.clip(0, self.nbytes - size)
        read = np.unique(at >> self.grain)
        writer, order = self.writer[read], self.order[read]
        if writer.max() >= 64 * self.epoch:  # by any warp: all four read it
            self.report("racecheck", instruction, "reads shared memory that was written since the last barrier")
        if (order > self.fenced).any():
            self.report("racecheck", instruction, "reads shared memory written with no fence.proxy.async since")
        if writer.min() < 0:
            self.report("initcheck", instruction, "reads shared memory that nobody has written")
        self._group_reads(read, group)

        def finish():
            if (self.order[read] != order).any():
                self.report("racecheck", instruction, "reads shared memory that is written before the end of its wait")
            self._group_reads(read, group)

        return self.views[size][at // size], finish

    def _group_reads(self, read, group):
        self.readers.last[read] = 64 * self.epoch + 4 * group
        self.readers.several[read] = self.epoch

    def left(self):
        """Return the instructions whose copies nobody waited for."""
        return [copy[-1] for group in (*self.groups, self.open) for copy in group]


def spread(values, lanes, threads):
    """Return a register with these values in these lanes and zeros elsewhere."""
    if lanes is None:
        return values
    register = np.zeros(threads, values.dtype)
    register[lanes] = values
    return register


class Allocation:
    """A storage that kernels may access."""

    def __init__(self, storage, name):
        self.name, self.nbytes, self.storage = name, storage.nbytes(), storage
        start = storage.data_ptr()
        if start % 16:
            raise NotImplementedError(f"a storage that starts at {start:#x}, no multiple of 16")
        raw = (ctypes.c_uint8 * self.nbytes).from_address(start) if self.nbytes else b""
        raw = np.frombuffer(raw, "u1")
        self.views = {width: raw[: self.nbytes // width * width].view(dtype) for width, dtype in UNSIGNED.items()}


class Global:
    """The address space: every storage has four GiB of addresses to itself, so what leaves it is nowhere."""

    def __init__(self):
        self.allocations = [None]
        self._slots = {}

    def address(self, tensor, name="a tensor"):
        """Return the address of a tensor. Its storage stays, so that no other takes its place."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr(), storage.nbytes()
        if key not in self._slots:
            self._slots[key] = len(self.allocations)
            self.allocations.append(Allocation(storage, name))
        return (self._slots[key] << SLOT) + tensor.storage_offset() * tensor.element_size()


class GlobalAccess:
    """The accesses of one launch to global memory, and its shadow."""

    def __init__(self, memory, grain, report, counts=None):
        self.allocations, self.grain, self.report, self.counts = memory.allocations, grain, report, counts
        self._shadows = {}  # allocation: writer, and readers by block
        self._clocks = {}  # allocation, element: what those who released it had seen

    def _select(self, block, address, offset, size, mask, instruction):
        """Yield each allocation that threads access, where, and which threads do (None: all)."""
        lanes = None
        if mask is not None:
            lanes = np.flatnonzero(mask)
            address = address[lanes]
        at = address.view("i8") + offset
        if not len(at):
            return
        slots = at >> SLOT
        one = (slots == slots[0]).all()
        for slot in [int(slots[0])] if one else np.unique(slots).tolist():
            allocation = self.allocations[slot] if 0 < slot < len(self.allocations) else None
            if allocation is None:
                self.report(
                    "memcheck", instruction, f"accesses {slot << SLOT:#x}, where nothing is, by block {block.index}"
                )
                continue
            here = at if one else at[slots == slot]
            threads = lanes if one else np.flatnonzero(slots == slot) if lanes is None else lanes[slots == slot]
            here = here & ((1 << SLOT) - 1)
            wrong = here & (size - 1) != 0
            if wrong.any():
                self.report(
                    "memcheck", instruction, f"accesses {size} bytes of {allocation.name} at a misaligned address"
                )
            beyond = here > allocation.nbytes - size
            if beyond.any():
                where = f"{here[beyond].max()} of {allocation.nbytes} bytes of {allocation.name}"
                self.report("memcheck", instruction, f"accesses {size} bytes at {where}, by block {block.index}")
            if (wrong | beyond).any():
                right = ~(wrong | beyond)
                here, threads = here[right], np.flatnonzero(right) if threads is None else threads[right]
            if len(here):
                if self.counts is not None:
                    self.counts.access(block.warp if threads is None else block.warp[threads], here)
                yield allocation, here, threads

    def load(self, block, address, offset, width, count, mask, instruction):
        """Return `count` registers of `width` bytes each; those of threads that do not take part are 0."""
        result = None
        for allocation, at, lanes in self._select(block, address, offset, width * count, mask, instruction):
            self._check(block, allocation, at, width * count, lanes, instruction, False)
            index, view = at // width, allocation.views[width]
            if lanes is None:
                return [view[index + k] for k in range(count)]
            result = result or [np.zeros(len(address), UNSIGNED[width]) for _ in range(count)]
            for k in range(count):
                result[k][lanes] = view[index + k]
        return result or [np.zeros(len(address), UNSIGNED[width])] * count

    def store(self, block, address, offset, values, mask, instruction):
        width, count = values[0].itemsize, len(values)
        for allocation, at, lanes in self._select(block, address, offset, width * count, mask, instruction):
            self._check(block, allocation, at, width * count, lanes, instruction, True)
            index, view = at // width, allocation.views[width]
            for k, value in enumerate(values):
                value = value if lanes is None else value[lanes]
                view[index + k] = value
                if (view[index + k] != value).any():
                    self.report(
                        "racecheck", instruction, f"writes different values to one address of {allocation.name}"
                    )

    def atomic(self, block, function, address, offset, value, mask, instruction):
        """Return what was there before; a release publishes what the block has done, an acquire sees what others did."""
        result = np.zeros_like(value)
        for allocation, at, lanes in self._select(block, address, offset, value.itemsize, mask, instruction):
            view = allocation.views[value.itemsize].view(value.dtype)
            for k, lane in enumerate(range(len(value)) if lanes is None else lanes):
                index = at[k] // value.itemsize
                result[lane] = view[index]
                view[index] = function(view[index], value[lane])
                clock = self._clocks.setdefault((allocation, int(index)), np.zeros_like(block.seen))
                if {"acq_rel", "acquire"} & set(instruction.modifiers):
                    block.acquired.append((block.warp[lane], clock.copy()))
                if {"acq_rel", "release"} & set(instruction.modifiers):
                    np.maximum(clock, block.clock(block.warp[lane]), out=clock)
        return result

    def touched(self, size):
        """Return the bytes of all pieces of this size that were read or written, atomics aside."""
        count = 0
        for writer, _, readers in self._shadows.values():
            touched = np.maximum.reduce([writer, *(read.last for read in readers.values())]) >= 0
            count += len(np.unique((np.flatnonzero(touched) << self.grain) // size))
        return size * count

    def _check(self, block, allocation, at, size, lanes, instruction, writes):
        shadow = self._shadows.get(allocation)
        if shadow is None:
            count = (allocation.nbytes >> self.grain) + 1
            shadow = self._shadows[allocation] = np.full(count, -1, "i8"), np.full(count, -1, "i8"), {}
        writer, author, readers = shadow
        warp = block.warp if lanes is None else block.warp[lanes]
        at, stamp = granules(at, size, self.grain, warp + 64 * block.epoch)
        verb = f"block {block.index} {'writes' if writes else 'reads'} {allocation.name}"

        last = writer[at]
        if last.max() >= 0:
            by = author[at]
            race = (by == block.index) & (last >= 64 * block.epoch) & (last != stamp)
            race |= (by != block.index) & (last >= 0) & block.unseen(by, last >> 6, stamp & 63)
            if race.any():
                who = f"warp {last[race][0] & 63} of block {by[race][0]}"
                self.report("racecheck", instruction, f"{verb} that {who} has written, with nothing between")
        if not writes:
            if block.index not in readers:
                readers[block.index] = Readers(len(writer))
            readers[block.index].add(at, stamp, block.epoch)
            return
        for index, read in readers.items():
            if index == block.index:
                race = read.others(at, stamp, block.epoch)
            else:
                last = read.last[at]
                race = (last >= 0) & block.unseen(np.full(len(at), index), last >> 6, stamp & 63)
            if race is not None and race.any():
                self.report("racecheck", instruction, f"{verb} that block {index} has read, with nothing between")
        writer[at] = stamp
        author[at] = block.index
