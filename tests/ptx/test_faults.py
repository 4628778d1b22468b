"""The checks bite: faults in the PTX of kernels are reported, or proven to be none.

A barrier or an order that is missing is compared with a second judge, which knows no shadows: it keeps every access of a
launch and looks at all pairs. Both must agree, so what is not reported is redundant for these inputs. Loops run longer
than their number of stages; else the last barriers of a pipeline have nothing to order.
"""

import collections
import math
import re

import numpy as np
import pytest
import torch
from helpers.ptx import memory
from helpers.ptx.driver import executing

from condlr_ext import reference
from condlr_ext.kernels.triton.linear import launch as layers
from condlr_ext.kernels.triton.spectral import newton_schulz

HALF, SINGLE = torch.float16, torch.float32


def without(pattern, count=0):
    return lambda ptx: re.sub(pattern, "", ptx, count=count)


BARRIER = r"\tbar\.sync[^\n]*;\n"


def without_one(pattern, ptx, k):
    begin, end = list(re.finditer(pattern, ptx))[k].span()
    return ptx[:begin] + ptx[end:]


def forward(dtype=HALF, rank=16, rows=33, n=304, m=50):
    """Run `chain`; return the relative error of its output. Rows of multiples of 16 bytes are copied asynchronously."""
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, n), (m, rank), (rank, rank), (n, rank), (m,)
    low = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    Y, _ = layers.low_rank_linear(*low)
    true, _ = reference.low_rank_linear(*(t.double() for t in low))
    return ((Y.double() - true).norm() / true.norm()).item()


def found(sm, change, compute=forward, kernel="chain"):
    """Return the kinds of reports by a fault of a kernel, and the result."""
    with executing(sm, faults=lambda name, ptx: change(ptx) if name == kernel else ptx) as run:
        result = compute()
    return {report.kind for report in run.reports}, result


class Judge:
    """All accesses of a launch to shared and global memory.

    An event is an instruction: its number, the places of two bytes that it accesses, the warp of each, the first and the
    last epoch of the block in which it may do so, and whether it writes.
    """

    def __init__(self, monkeypatch):
        self.events, self.bases = [], {}
        self.copies = collections.defaultdict(lambda: [[], []])  # of a block: not committed, and committed groups
        original = {
            name: getattr(memory.Shared, name) for name in ("_reading", "_writing", "commit", "wait", "read_by_group")
        }
        check = memory.GlobalAccess._check

        def reading(shared, at, size, stamp, instruction):
            self.add(shared, at, size, stamp & 63, shared.epoch, False)
            return original["_reading"](shared, at, size, stamp, instruction)

        def writing(shared, at, size, stamp, instruction, leave=None):
            event = self.add(shared, at, size, stamp & 63, shared.epoch, True)
            if leave is not None:
                event[4] = math.inf
                self.copies[shared][0].append(event)
            return original["_writing"](shared, at, size, stamp, instruction, leave)

        def commit(shared):
            copies = self.copies[shared]
            copies[1].append(copies[0])
            copies[0] = []
            original["commit"](shared)

        def wait(shared, most):
            groups = self.copies[shared][1]
            while len(groups) > most:
                for event in groups.pop(0):
                    event[4] = shared.epoch
            original["wait"](shared, most)

        def read_by_group(shared, at, size, group, instruction):
            places = np.tile(at.reshape(-1), 4)  # by each of its warps
            event = self.add(shared, places, size, 4 * group + np.repeat(np.arange(4), at.size), shared.epoch, False)
            event[4] = math.inf
            values, finish = original["read_by_group"](shared, at, size, group, instruction)
            return values, lambda: (event.__setitem__(4, shared.epoch), finish())

        def checked(access, block, allocation, at, size, lanes, instruction, writes):
            warp = block.warp if lanes is None else block.warp[lanes]
            self.add((block.index, allocation), at, size, warp, block.epoch, writes)
            check(access, block, allocation, at, size, lanes, instruction, writes)

        for name, method in dict(
            _reading=reading, _writing=writing, commit=commit, wait=wait, read_by_group=read_by_group
        ).items():
            monkeypatch.setattr(memory.Shared, name, method)
        monkeypatch.setattr(memory.GlobalAccess, "_check", checked)

    def add(self, where, at, size, warp, epoch, writes):
        """Note an instruction and return its event."""
        base = self.bases.setdefault(where, len(self.bases) << 40)
        places = base + (at[:, None] + np.arange(0, size, 2)) // 2
        places, warp = np.unique(
            np.stack([places, np.broadcast_to(warp[:, None], places.shape)]).reshape(2, -1), axis=1
        )
        self.events.append([len(self.events), places, warp, epoch, epoch, writes])
        return self.events[-1]

    def race(self) -> bool:
        """Return whether accesses of one place by different warps meet, of which one writes."""
        place = np.concatenate([event[1] for event in self.events])
        order = np.argsort(place, kind="stable")
        place, warp = place[order], np.concatenate([event[2] for event in self.events])[order]
        counts = [len(event[1]) for event in self.events]
        number, first, last, writes = (
            np.repeat([event[k] for event in self.events], counts)[order] for k in (0, 3, 4, 5)
        )
        for distance in range(1, len(place)):
            a, b = slice(None, -distance), slice(distance, None)
            same = place[a] == place[b]
            meet = (first[a] <= last[b]) & (first[b] <= last[a]) & (writes[a] | writes[b])
            if (same & meet & (warp[a] != warp[b]) & (number[a] != number[b])).any():
                return True
            if not same.any():
                return False


CASES = {  # name: architecture, dtype, rank, columns of X
    "sm_80": (80, HALF, 16, 304),
    "sm_80 unaligned": (80, HALF, 5, 301),
    "sm_80 P read back": (80, HALF, 72, 256),
    "sm_90": (90, HALF, 16, 400),
    "sm_90 unaligned": (90, HALF, 5, 400),
    "sm_90 P read back": (90, HALF, 136, 256),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if "sm_90 " in c else c for c in CASES])
def test_every_barrier_of_chain(case, monkeypatch):
    """Removed one by one: reported, or the judge finds nothing either."""
    sm, dtype, rank, n = CASES[case]
    texts = {}
    with executing(sm, faults=lambda name, ptx: texts.setdefault(name, ptx)) as run:
        forward(dtype, rank, n=n)
    assert not run.reports
    count, reported = len(re.findall(BARRIER, texts["chain"])), 0
    for k in range(count):
        with (
            monkeypatch.context() as patch,
            executing(sm, faults=lambda name, ptx, k=k: without_one(BARRIER, ptx, k)) as run,
        ):
            judge = Judge(patch)
            forward(dtype, rank, n=n)
            assert any(report.kind == "racecheck" for report in run.reports) == judge.race(), (k, run.reports)
        reported += bool(run.reports)
        texts |= dict.fromkeys(report.text for report in run.reports)
    assert reported > 0.5 * count
    # P goes to other threads through global memory
    assert any("P_ptr" in text for text in texts) == case.endswith("P read back")


@pytest.mark.parametrize("sm", [80, 90])
def test_masks(sm):
    """Of the stores, and of the copies from global memory."""
    stores = re.compile(r"@%p\d+ (st\.global)")
    assert {"memcheck"} <= found(sm, lambda ptx: stores.sub(r"\1", ptx))[0]
    assert found(sm, lambda ptx: stores.sub(r"\1", ptx, count=1))[0]
    copies = re.compile(r"(cp\.async\.c[ag]\.shared\.global[^;]*), (0x\w+), %r\d+;")
    assert "memcheck" in found(sm, lambda ptx: copies.sub(r"\1, \2;", ptx))[0]


@pytest.mark.parametrize("sm", [80, 90])
def test_waits_for_copies(sm):
    wait = re.compile(r"cp\.async\.wait_group \t?(\d+)")
    assert "racecheck" in found(sm, lambda ptx: wait.sub(lambda m: f"cp.async.wait_group {int(m[1]) + 2}", ptx))[0]
    assert "racecheck" in found(sm, without(r"\tcp\.async\.wait_group[^\n]*\n"))[0]


@pytest.mark.parametrize("name", ["X_ptr", "V_ptr", "S_ptr", "U_ptr", "bias_ptr", "P_ptr", "Y_ptr"])
def test_storages_that_are_short(name, monkeypatch):
    """By one element, the last, which is the fault of a wrong size or of a wrong mask."""
    original = memory.Allocation.__init__

    def shorter(self, storage, label):
        original(self, storage, label)
        self.nbytes -= 4 if label == name else 0

    monkeypatch.setattr(memory.Allocation, "__init__", shorter)
    kinds, _ = found(80, lambda ptx: ptx, lambda: forward(SINGLE, 5, n=70))
    assert kinds == {"memcheck"}


def test_shared_memory_that_is_not_written():
    kinds, error = found(80, without(r"\tst\.shared[^\n]*\n", count=1), lambda: forward(rank=5, n=70))
    assert "initcheck" in kinds and error > 0.01


def test_the_tensor_core_of_hopper():
    """Its waits, without which the numbers are not there either."""
    kinds, error = found(90, without(r"\twgmma\.wait_group[^\n]*\n"), lambda: forward(n=400))
    assert "synccheck" in kinds and math.isnan(error)


@pytest.mark.parametrize("fence", [r"\tfence\.proxy[^\n]*\n", r"\twgmma\.fence[^\n]*\n"])
def test_every_fence_of_the_tensor_core(fence):
    """Removed one by one: of shared memory, and of registers."""
    for k in range(3):  # of X V, P Sᵀ, T Uᵀ
        assert found(90, lambda ptx, k=k: without_one(fence, ptx, k), lambda: forward(n=64))[0] == {"racecheck"}


def polar():
    """The polar factor by a group of three programs; return its error."""
    generator = torch.Generator().manual_seed(1)
    Q = torch.linalg.qr(torch.randn(66, 66, dtype=torch.float64, generator=generator))[0]
    A = (Q * torch.linspace(1, 2, 66, dtype=torch.float64)).float()[None]
    out = torch.empty_like(A)
    newton_schulz.polar_factor(A, out)
    return (out[0].double() - reference.polar(A.double())[0]).norm().item()


@pytest.mark.parametrize("order", ["relaxed", "acquire", "release"])
def test_the_order_of_atomics(order):
    kinds, error = found(90, lambda ptx: ptx.replace("acq_rel", order), polar, "polar")
    assert kinds == {"racecheck"} and error < 1e-5  # the result does not show it


def test_nobody_waits_for_the_group():
    no_wait = re.compile(r"(min\.s64 \t%rd\d+, %rd\d+, )281474976710656;")
    assert found(90, lambda ptx: no_wait.sub(r"\g<1>0;", ptx), polar, "polar")[0] == {"racecheck"}
