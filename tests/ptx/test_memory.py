"""The checks of memory: each reports what it is for, and nothing else."""

import pytest
import torch
from helpers.ptx.assemble import element, kinds, run
from helpers.ptx.memory import Global

WORDS = "shl.b32 %r1, %r0, 2;"  # %r1: four bytes for every thread
WARP = "shr.u32 %r9, %r0, 5; setp.eq.s32 %p1, %r9, 1;"  # %p1: the second warp


def ints(n):
    return torch.arange(n, dtype=torch.int32)


def test_loads_and_stores():
    """Vectors, narrow elements, offsets and masks."""
    x, y = torch.arange(128, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    body = """
    mad.wide.u32 %rd8, %r0, 16, %rd0; mad.wide.u32 %rd9, %r0, 16, %rd1;
    ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd8];
    add.s32 %r1, %r1, %r4;
    st.global.v2.b32 [%rd9], {%r1, %r2};
    st.global.b16 [%rd9 + 8], %r3; setp.lt.s32 %p1, %r0, 16;
    @%p1 st.global.b32 [%rd9 + 12], %r4;
    """
    body = body.replace("st.global.b16 [%rd9 + 8], %r3", "cvt.u16.u32 %rs1, %r3; st.global.b16 [%rd9 + 8], %rs1")
    assert not run(body, x, y).reports
    rows = x.view(32, 4)
    expected = torch.stack([rows[:, 0] + rows[:, 3], rows[:, 1], rows[:, 2], rows[:, 3] * (torch.arange(32) < 16)], 1)
    assert torch.equal(y.view(32, 4), expected)


@pytest.mark.parametrize("access", ["ld.global.b32 %r2, [%rd8]", "st.global.b32 [%rd8], %r0"])
def test_beyond_a_storage(access):
    """The last thread is four bytes behind the end; a view does not matter, its storage does."""
    body = f"{element('%rd8', 0, 4)} {access};"
    assert not run(body, ints(32)).reports
    (report,) = run(body, ints(31)).reports.values()
    assert report.kind == "memcheck" and "4 bytes at 124 of 124 bytes of tensor 0" in report.text and report.count == 1
    assert not run(body, ints(64)[32:]).reports
    assert kinds(run(f"add.s64 %rd0, %rd0, -4; {body}", ints(32))) == {"memcheck"}  # in front of it is nothing


def test_addresses_that_are_nowhere_or_misaligned():
    assert "where nothing is" in str(*run("ld.global.b32 %r2, [%rd5];").reports.values())
    assert "misaligned" in str(*run("ld.global.b32 %r2, [%rd0 + 2];", ints(8)).reports.values())
    assert kinds(run("ld.global.v2.b32 {%r2, %r3}, [%rd0 + 4];", ints(8))) == {"memcheck"}


def test_masked_lanes_access_nothing():
    assert not run("setp.ne.s32 %p1, %r0, %r0; @%p1 ld.global.b32 %r2, [%rd5];").reports


def test_storages_are_apart():
    """Two tensors of one storage have one allocation; an address is that of the storage and an offset."""
    memory, base = Global(), torch.zeros(100)
    assert memory.address(base[8:]) - memory.address(base) == 32
    other = memory.address(torch.zeros(100))
    assert other - memory.address(base) == 1 << 32


@pytest.mark.parametrize(
    "access,text",
    [("st.shared.b32 [%r1 + 4], %r0", "at 128 of 128 bytes"), ("ld.shared.b32 %r2, [%r1 + 2]", "misaligned"),
     ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r1 + 100]", "misaligned")],
)  # fmt: skip
def test_beyond_shared_memory(access, text):
    launch = run(f"{WORDS} {access};", shared=128)
    assert any(text in report.text and report.kind == "memcheck" for report in launch.reports.values())


def test_reading_what_nobody_wrote():
    body = "{} bar.sync 0; ld.shared.b32 %r2, [%r1];"
    assert kinds(run(WORDS + body.format(""), shared=128)) == {"initcheck"}
    assert not run(WORDS + body.format("st.shared.b32 [%r1], %r0;"), shared=128).reports


ACROSS = "xor.b32 %r2, %r1, 128;"  # the word of the same lane of the other warp


@pytest.mark.parametrize(
    "before,after",
    [("st.shared.b32 [%r1], %r0", "ld.shared.b32 %r3, [%r2]"), ("ld.shared.b32 %r3, [%r2]", "st.shared.b32 [%r1], %r0"),
     ("st.shared.b32 [%r1], %r0", "st.shared.b32 [%r2], %r0")],
)  # fmt: skip
def test_races_of_warps(before, after):
    """Reading behind a write, writing behind a read and behind a write, with and without a barrier."""
    start = f"{WORDS} {ACROSS} st.shared.b32 [%r1], %r0; bar.sync 0;"
    assert kinds(run(f"{start} {before}; {after};", threads=64, shared=256)) == {"racecheck"}
    assert not run(f"{start} {before}; bar.sync 0; {after};", threads=64, shared=256).reports
    assert not run(
        f"{start} {before}; {after.replace('%r2', '%r1')};".replace("[%r2]", "[%r1]"), threads=64, shared=256
    ).reports


def test_races_within_an_instruction():
    """Lanes that write one address with different values, and the same values."""
    assert kinds(run("st.shared.b32 [%r20], %r0;", shared=4)) == {"racecheck"}
    assert not run("st.shared.b32 [%r20], 1;", shared=4).reports
    assert kinds(run("st.global.b32 [%rd0], %r0;", ints(1))) == {"racecheck"}


def test_a_second_reader_does_not_hide_the_first():
    """The first warp writes what the second has read, and it itself after that."""
    body = f"""{WORDS} {WARP} st.shared.b32 [%r1], %r0; bar.sync 0;
    @%p1 ld.shared.b32 %r3, [%r20]; @!%p1 ld.shared.b32 %r3, [%r20]; @!%p1 st.shared.b32 [%r20], 0;"""
    assert kinds(run(body, threads=64, shared=256)) == {"racecheck"}


def test_narrow_elements_are_told_apart():
    """Warps write neighboring elements of two bytes, or the same."""
    body = "cvt.u16.u32 %rs1, %r0; {} shl.b32 %r1, %r0, 1; st.shared.b16 [%r1], %rs1;"
    assert not run(body.format(""), threads=64, shared=128).reports
    assert kinds(run(body.format("and.b32 %r0, %r0, 31;"), threads=64, shared=128)) == {"racecheck"}
    half = torch.zeros(64, dtype=torch.float16)
    body = "cvt.u16.u32 %rs1, %r0; mad.wide.u32 %rd8, %r0, 2, %rd0; st.global.b16 [%rd8], %rs1;"
    assert not run(body, half, threads=64).reports
    body = f"{body} xor.b32 %r1, %r0, 32; mad.wide.u32 %rd9, %r1, 2, %rd0; ld.global.b16 %rs2, [%rd9];"
    assert kinds(run(body, half, threads=64)) == {"racecheck"}


COPY = "cp.async.ca.shared.global [%r1], [%rd8], 4, 4; cp.async.commit_group;"


@pytest.mark.parametrize(
    "rest,found",
    [("cp.async.wait_group 0; ld.shared.b32 %r2, [%r1];", set()), ("ld.shared.b32 %r2, [%r1];", {"racecheck", "synccheck"}),
     ("cp.async.wait_group 1; ld.shared.b32 %r2, [%r1]; cp.async.wait_group 0;", {"racecheck"}),
     ("st.shared.b32 [%r1], 0; cp.async.wait_group 0;", {"racecheck"}),
     ("bar.sync 0; ld.shared.b32 %r2, [%r1]; cp.async.wait_group 0;", {"racecheck"}),
     ("cp.async.wait_group 0; xor.b32 %r1, %r1, 128; ld.shared.b32 %r2, [%r1];", {"racecheck"}),
     ("cp.async.wait_group 0; bar.sync 0; xor.b32 %r1, %r1, 128; ld.shared.b32 %r2, [%r1];", set()),
     ("", {"synccheck"})],
)  # fmt: skip
def test_asynchronous_copies(rest, found):
    """They have landed behind their wait for the thread that waits, behind a barrier for others."""
    body = f"{WORDS} {element('%rd8', 0, 4)} {COPY} {rest}"
    assert kinds(run(body, ints(64), threads=64, shared=256)) == found


def test_asynchronous_copies_land_in_order():
    x, out = ints(64), torch.zeros(32, dtype=torch.int32)
    body = f"""{WORDS} {element("%rd8", 0, 4)} {element("%rd9", 1, 4)} {COPY}
    cp.async.ca.shared.global [%r1 + 128], [%rd8 + 128], 4, 0; cp.async.commit_group;
    cp.async.wait_group 1; ld.shared.b32 %r2, [%r1]; cp.async.wait_group 0; ld.shared.b32 %r3, [%r1 + 128];
    add.s32 %r2, %r2, %r3; st.global.b32 [%rd9], %r2;"""
    assert not run(body, x, out, shared=256).reports
    assert torch.equal(out, x[:32])  # of the second copy nothing is read: zeros


# blocks


def test_races_of_blocks():
    """What another block writes or reads in the same launch, with nothing between."""
    two = dict(grid=(2, 1, 1))
    mine = (
        "mov.u32 %r5, %ctaid.x; mad.wide.u32 %rd8, %r5, 4, %rd0; xor.b32 %r5, %r5, 1; mad.wide.u32 %rd9, %r5, 4, %rd0;"
    )
    assert not run(f"{mine} st.global.b32 [%rd8], 1;", ints(2), **two).reports
    for body in ("st.global.b32 [%rd8], 1; ld.global.b32 %r2, [%rd9]", "ld.global.b32 %r2, [%rd9]; st.global.b32 [%rd8], 1",
                 "st.global.b32 [%rd8], 1; st.global.b32 [%rd9], 1"):  # fmt: skip
        assert kinds(run(f"{mine} {body};", ints(2), **two)) == {"racecheck"}, body


MEET = """
    bar.sync 0;
    setp.eq.s32 %p3, %r0, 0;
    @%p3 atom.global.gpu.{order}.add.u64 %rd20, [%rd1], 1;
wait:
    @%p3 atom.global.gpu.{order}.add.u64 %rd20, [%rd1], 0;
    setp.lt.u64 %p4, %rd20, {blocks};
    and.pred %p4, %p4, %p3;
    @%p4 bra wait;
    bar.sync 0;
"""


@pytest.mark.parametrize("schedule", [None, 1, 2])
@pytest.mark.parametrize("order,found", [("acq_rel", set()), ("acquire", {"racecheck"}), ("release", {"racecheck"}),
                                         ("relaxed", {"racecheck"})])  # fmt: skip
def test_blocks_that_meet(order, found, schedule):
    """Three blocks write, wait for each other at a counter, and read what the next one wrote."""
    import random

    data, counter, out = (
        torch.zeros(3 * 64, dtype=torch.int32),
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(3 * 64, dtype=torch.int32),
    )
    body = f"""
    mov.u32 %r5, %ctaid.x; shl.b32 %r6, %r5, 6; add.s32 %r6, %r6, %r0; mad.wide.u32 %rd8, %r6, 4, %rd0;
    st.global.b32 [%rd8], %r6;
    {MEET.format(order=order, blocks=3)}
    add.s32 %r5, %r5, 1; rem.u32 %r5, %r5, 3; shl.b32 %r7, %r5, 6; add.s32 %r7, %r7, %r0; mad.wide.u32 %rd9, %r7, 4, %rd0;
    ld.global.b32 %r8, [%rd9]; mad.wide.u32 %rd10, %r6, 4, %rd2; st.global.b32 [%rd10], %r8;
    """
    schedule = None if schedule is None else random.Random(schedule)
    launch = run(body, data, counter, out, threads=64, grid=(3, 1, 1), schedule=schedule)
    assert kinds(launch) == found
    assert torch.equal(out, torch.arange(3 * 64, dtype=torch.int32).roll(-64)) and counter == 3


def test_an_acquire_serves_its_warp_until_the_barrier():
    """Without the barrier behind the wait only the warp that waited sees what others wrote."""
    body = f"""
    mov.u32 %r5, %ctaid.x; mad.wide.u32 %rd8, %r5, 4, %rd0; xor.b32 %r5, %r5, 1; mad.wide.u32 %rd9, %r5, 4, %rd0;
    st.global.b32 [%rd8], 1; {MEET.format(order="acq_rel", blocks=2).rpartition("bar.sync 0;")[0]}
    {WARP} setp.ne.s32 %p2, %r20, 0;
    """
    two = dict(threads=64, grid=(2, 1, 1))
    fresh = lambda: (ints(2), torch.zeros(1, dtype=torch.int64))  # noqa: E731
    assert not run(f"{body} @!%p1 ld.global.b32 %r2, [%rd9];", *fresh(), **two).reports
    assert kinds(run(f"{body} @%p1 ld.global.b32 %r2, [%rd9];", *fresh(), **two)) == {"racecheck"}


def test_atomics_add_and_combine():
    """What was there before comes back, of threads in their order; none is lost."""
    total, bits, before = (
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int32),
        torch.zeros(32, dtype=torch.int64),
    )
    body = f"""cvt.u64.u32 %rd8, %r0; atom.global.gpu.relaxed.add.u64 %rd9, [%rd0], %rd8; {element("%rd10", 2, 8)}
    st.global.b64 [%rd10], %rd9; mov.b32 %r1, 1; shl.b32 %r1, %r1, %r0; atom.global.gpu.relaxed.or.b32 %r2, [%rd1], %r1;"""
    assert not run(body, total, bits, before).reports
    assert total == sum(range(32)) and bits == -1 and torch.equal(before, torch.arange(32).cumsum(0) - torch.arange(32))


@pytest.mark.parametrize(
    "name,kind,expected", [("max", "s32", 15), ("min", "s32", -16), ("max", "u32", -1), ("min", "u32", 0)]
)
def test_atomics_of_extremes(name, kind, expected):
    """Of the numbers -16 to 15 and 0, with signs and without."""
    extreme = torch.zeros(1, dtype=torch.int32)
    run(f"add.s32 %r1, %r0, -16; atom.global.gpu.relaxed.{name}.{kind} %r2, [%rd0], %r1;", extreme)
    assert extreme == expected
