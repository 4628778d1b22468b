"""How threads part and meet, functions, and what threads of a warp exchange."""

import pytest
import torch
from helpers.ptx import assemble
from helpers.ptx.assemble import element, kinds, run

STORE = f"{element('%rd8', 0, 4)} st.global.b32 [%rd8], %r1;"


def values(body, threads=64, **options):
    out = torch.zeros(threads, dtype=torch.int32)
    launch = run(f"{body} {STORE}", out, threads=threads, **options)
    return out.tolist(), launch


def test_threads_take_both_sides_of_a_branch():
    body = """mov.b32 %r1, 7; setp.lt.s32 %p1, %r0, 40; @%p1 bra then;
    add.s32 %r1, %r1, 1; bra.uni join;
then:
    add.s32 %r1, %r1, %r0;
join:
    shl.b32 %r1, %r1, 1;"""
    got, launch = values(body.replace("\n", "\n "))
    assert got == [2 * (7 + k) if k < 40 else 16 for k in range(64)] and not launch.reports


def test_threads_leave_a_loop_one_by_one():
    """And those that are inside do not write the registers of those outside."""
    got, _ = values("mov.b32 %r1, 0;\nloop:\nadd.s32 %r1, %r1, 1; setp.lt.s32 %p1, %r1, %r0; @%p1 bra loop;\n")
    assert got == [max(k, 1) for k in range(64)]


def test_threads_that_return_are_gone():
    got, launch = values("mov.b32 %r1, 5; setp.ge.s32 %p1, %r0, 32; @%p1 ret; bar.sync 0;\n")
    assert got == [5] * 32 + [0] * 32 and not launch.reports


def test_a_barrier_in_one_side_of_a_branch():
    """Where the others have passed another barrier, or are gone; and where a warp comes in parts."""
    body = "mov.b32 %r1, 1; setp.lt.s32 %p1, %r0, {}; @%p1 bra L;\n bar.sync 0; bra.uni J;\nL:\n bar.sync 0;\nJ:\n"
    assert kinds(values(body.format(32))[1]) == {"synccheck"}
    assert kinds(values(body.format(16))[1]) == {"synccheck"}


def test_parts_of_warps():
    """Instructions of whole warps under a branch that a part takes."""
    for instruction in (
        "redux.sync.add.s32 %r1, %r0, -1",
        "bar.warp.sync -1",
        "shfl.sync.bfly.b32 %r1, %r0, 16, 31, -1",
    ):
        body = f"mov.b32 %r1, 1; setp.lt.s32 %p1, %r0, {{}}; @%p1 bra L;\n {instruction};\nL:\n"
        assert not values(body.format(32))[1].reports
        assert kinds(values(body.format(5))[1]) == {"synccheck"}, instruction


def test_shuffles_and_sums():
    for mask in (1, 2, 16, 31):
        got, _ = values(f"shfl.sync.bfly.b32 %r1, %r0, {mask}, 31, -1;")
        assert got == [k ^ mask for k in range(64)]
    got, _ = values("and.b32 %r2, %r0, 7; shfl.sync.idx.b32 %r1, %r0, %r2, 31, -1;")
    assert got == [k // 32 * 32 + k % 8 for k in range(64)]
    got, _ = values("redux.sync.add.s32 %r1, %r0, -1;")
    assert got == [sum(range(32))] * 32 + [sum(range(32, 64))] * 32
    for kind, least, largest in (("s32", -40, 23), ("u32", 0, -1)):  # of -40 to 23, the bits of -1 being the largest
        got, _ = values(f"add.s32 %r2, %r0, -40; redux.sync.min.{kind} %r1, %r2, -1;")
        assert got[0] == -40 and got[32] == (least + 32 if kind == "s32" else least)
        got, _ = values(f"add.s32 %r2, %r0, -40; redux.sync.max.{kind} %r1, %r2, -1;")
        assert got[0] == -9 and got[32] == largest


def test_registers_are_packed_and_split():
    got, _ = values("mov.b32 %r2, 3; mov.b64 %rd9, {%r0, %r2}; shr.u64 %rd9, %rd9, 31; mov.b64 {%r1, _}, %rd9;")
    assert got == [6 + (k >> 31) for k in range(64)]
    got, _ = values("cvt.u16.u32 %rs1, %r0; mov.b32 %r1, {%rs1, %rs1};")
    assert got == [k | k << 16 for k in range(64)]


def test_blocks_have_their_numbers():
    out = torch.zeros(2, 3, 4, dtype=torch.int32)
    body = """mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %ctaid.z; mov.u32 %r4, %nctaid.x; mov.u32 %r5, %nctaid.y;
    mad.lo.s32 %r6, %r3, %r5, %r2; mad.lo.s32 %r6, %r6, %r4, %r1; mad.wide.u32 %rd8, %r6, 4, %rd0; st.global.b32 [%rd8], %r6;"""
    assert not run(body, out, grid=(4, 3, 2)).reports
    assert torch.equal(out.flatten(), torch.arange(24, dtype=torch.int32))


@pytest.mark.parametrize("below", [64, 32, 20])
def test_functions_are_called(below, monkeypatch):
    """By all threads and by some; parameters are theirs."""
    function = (
        """.func twice(.param .b64 twice_param_0, .param .b32 twice_param_1)
    {
    .reg .b32 %r<9>;
    .reg .b64 %rd<9>;
    ld.param.b32 %r1, [twice_param_1]; ld.param.b64 %rd1, [twice_param_0];
    add.s32 %r1, %r1, %r1; st.global.b32 [%rd1], %r1;
    ret;
    }
    """.replace("(.param", "(\n.param")
        .replace(", .param", ",\n.param")
        .replace(")\n", "\n)\n")
    )
    monkeypatch.setattr(assemble, "_TEXT", function.replace("{", "{{").replace("}", "}}") + assemble._TEXT)
    body = f"""mov.b32 %r1, 9; {element("%rd8", 0, 4)} setp.ge.s32 %p1, %r0, {below}; @%p1 bra L;
    st.param.b64 [param0], %rd8; st.param.b32 [param1], %r0; call.uni twice, (param0, param1);
L:
"""
    out = torch.full((64,), -1, dtype=torch.int32)
    assert not run(body, out, threads=64).reports
    assert out.tolist() == [2 * k if k < below else -1 for k in range(64)]


def test_parameters_by_their_addresses():
    """Of the address of a tensor, which is a parameter, the lower half, extended: its offset in its storage."""
    out, other = torch.zeros(64, dtype=torch.int32), torch.zeros(9)[3:]
    body = """mov.b64 %rd9, test_param_0; mov.b64 %rd10, test_param_1; setp.lt.s32 %p1, %r0, 20; selp.b64 %rd11, %rd9, %rd10, %p1;
    ld.param.s32 %rd12, [%rd11]; cvt.u32.u64 %r1, %rd12;"""
    assert not run(f"{body} {STORE}", out, other, threads=64).reports
    assert out.tolist() == [0] * 20 + [12] * 44


# wgmma: one warp group, A of ones and B of twos, both in shared memory without swizzle

DESCRIPTOR = "mov.b64 %rd{0}, {1};"
PREPARE = f"""
    shl.b32 %r1, %r0, 5; mov.b32 %r2, 0x3F803F80;
    st.shared.v4.b32 [%r1], {{%r2, %r2, %r2, %r2}}; st.shared.v4.b32 [%r1 + 16], {{%r2, %r2, %r2, %r2}};
    mov.b64 %rd10, {128 >> 4 << 16 | 256 >> 4 << 32}; mov.b64 %rd11, {2048 >> 4 | 128 >> 4 << 16 | 256 >> 4 << 32};
    {{fence}} bar.sync 0;
"""
ADD = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r10,%r11,%r12,%r13}, %rd10, %rd11, {0}, 1, 1, 0, 0;"
FENCE, REGISTERS = "fence.proxy.async.shared::cta;", "wgmma.fence.sync.aligned;"


def products(rest, fence=FENCE, prepare=PREPARE, registers=REGISTERS):
    out = torch.zeros(128, dtype=torch.float32)
    body = f"{prepare.replace('{fence}', fence)} {registers} {rest} {element('%rd8', 0, 4)} st.global.b32 [%rd8], %r10;"
    launch = run(body, out, torch.zeros(4), threads=128, shared=4096)
    return out, launch


COMMIT, WAIT = "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned {0};"


def test_products_of_warp_groups():
    """Two into the same registers, the first of which forgets what was there."""
    out, launch = products(ADD.replace("{0}", "0") + ADD.replace("{0}", "1") + COMMIT + WAIT.replace("{0}", "0"))
    assert not launch.reports and (out == 32).all()


def test_products_are_unknown_until_they_are_waited_for():
    for wait in ("", WAIT.replace("{0}", "1")):
        out, launch = products(ADD.replace("{0}", "0") + COMMIT + wait)
        assert out.isnan().all() and kinds(launch) == {"synccheck"}


@pytest.mark.parametrize(
    "rest", ["st.shared.b32 [%r1], 0;", "cp.async.cg.shared.global [%r1], [%rd1], 16, 16; cp.async.commit_group;"]
)  # fmt: skip
def test_shared_memory_that_products_still_read(rest):
    """Written between a product and its wait; behind the wait it may be."""
    end = WAIT.replace("{0}", "0") + "bar.sync 0;"
    land = "cp.async.wait_group 0;"
    start = ADD.replace("{0}", "0") + COMMIT
    assert "racecheck" in kinds(products(start + rest + end + land)[1])
    assert not products(start + end + rest + land)[1].reports


def test_products_need_fences_and_barriers():
    end = ADD.replace("{0}", "0") + COMMIT + WAIT.replace("{0}", "0")
    assert kinds(products(end, fence="")[1]) == {"racecheck"}
    assert kinds(products(end, prepare=PREPARE.replace("bar.sync 0;", ""))[1]) == {"racecheck"}
    assert kinds(products(end, prepare=PREPARE.replace("st.shared.v4.b32 [%r1 +", "// "))[1]) == {"initcheck"}


def test_registers_of_products_need_fences():
    """Those that are computed; the same value in another register needs none, nor do further products."""
    one, end = ADD.replace("{0}", "1"), COMMIT + WAIT.replace("{0}", "0")
    assert kinds(products(one + end, registers="")[1]) == {"racecheck"}
    out, launch = products(one + one + end + one + end)
    assert not launch.reports and (out == 48).all()
    for change, expected in (("mov.b32 %r10, %r11;", set()), ("add.f32 %r10, %r11, %r11;", {"racecheck"})):
        assert kinds(products(one + end + change + one + end)[1]) == expected
        assert not products(one + end + change + REGISTERS + one + end)[1].reports
