"""Text to instructions."""

from helpers.ptx.parse import address, elements, parse, split

TEXT = """
.version 8.7
.extern .func later(.param .b32 later_param_0);
.func helper(
    .param .b64 helper_param_0
)
{
    .reg .b64 %rd<2>;
    ret;
}
.visible .entry chain(
    .param .u64 .ptr .global .align 1 chain_param_0,
    .param .u32 chain_param_1
)
.reqntid 128
.maxnreg 255
{
    .reg .pred %p<3>;
    .reg .b16 %rs<3>;
    .loc 1 126 0    // low_rank.py:126:0 @[ low_rank.py:200:4 ]
$L__func_begin0:
    @!%p1 ld.global.v2.b32 {%r1, %r2}, [%rd1 + 0x8]; // comment
    { // callseq 0
    .param .b64 param0;
    st.param.b64 [param0], %rd1;
    call.uni helper, (param0, param1);
    } // callseq 0
    bra.uni $L__BB0_2;
$L__BB0_2:   // loop
    mov.u32 %r3, 0x0; mov.u32 %r4, 1;
    ret;
}
.section .debug_info { .b8 1 }
"""


def test_functions_and_instructions():
    functions = parse(TEXT)
    assert list(functions) == ["helper", "chain"]
    chain = functions["chain"]
    assert chain.parameters == [("chain_param_0", "u64"), ("chain_param_1", "u32")] and chain.threads == 128
    assert functions["helper"].parameters == [("helper_param_0", "b64")]
    assert [i.opcode for i in chain.instructions] == ["ld", "st", "call", "bra", "mov", "mov", "ret"]
    load = chain.instructions[0]
    assert (load.guard, load.negated, load.modifiers) == ("%p1", True, ["global", "v2", "b32"]) and load.type == "b32"
    assert load.operands == ["{%r1, %r2}", "[%rd1 + 0x8]"]
    assert load.source == "low_rank.py:126:0 @[ low_rank.py:200:4 ]" and TEXT.split("\n")[load.line - 1].count("@!%p1")
    assert chain.instructions[2].operands == ["helper", "(param0, param1)"]
    assert chain.labels == {"$L__func_begin0": 0, "$L__BB0_2": 4}
    assert chain.width("%rs2") == 2 and chain.width("%p1") == 0


def test_operands():
    assert split("{%r1, %r2}, [%rd1+8], 0x10") == ["{%r1, %r2}", "[%rd1+8]", "0x10"]
    assert elements("{%r1, _}") == ["%r1", "_"] and elements("%r1") == ["%r1"]
    assert (
        address("[%r1]") == ("%r1", 0)
        and address("[ %rd1 + 0x10 ]") == ("%rd1", 16)
        and address("[%r1+-4]") == ("%r1", -4)
    )
