"""Reading machine code: widths, tensor cores, and which jumps make loops."""

from __future__ import annotations

import pytest

from fastllama.testing.machine_code import Code, gcn, loops, memory_loops, mix, sass


def nvidia(*lines: str) -> Code:
    """Instructions as nvdisasm prints them; a line that ends in a colon is a label."""
    return sass("\n".join(line if line.endswith(":") else f"        /*0a0*/    {line} ;" for line in lines))


def amd(*lines: str) -> Code:
    return gcn("\n".join(line if line.endswith(":") else f"\t{line}" for line in lines))


@pytest.mark.parametrize(
    ("line", "kind", "width"),
    [
        ("LDG.E.128 R4, desc[UR12][R20.64]", "loads", "128"),
        ("LDG.E.ENL2.256 R4, R8, desc[UR12][R20.64]", "loads", "256"),
        ("@!P0 LDG.E.64.CONSTANT R4, [R2.64+0x100]", "loads", "64"),
        ("LDG.E R4, [R2.64]", "loads", "32"),
        ("LDG.E.U16.CONSTANT R4, [R2.64]", "loads", "16"),
        ("@P1 LDG.E.S8 R4, [R2.64]", "loads", "8"),
        ("LDGSTS.E.BYPASS.LTC128B.128 [R23], desc[UR18][R4.64], P3", "loads", "async 128"),
        ("LDGSTS.E.LTC128B [R23], desc[UR18][R4.64], P3", "loads", "async 32"),
        ("@UP0 UTMALDG.2D [UR8], [UR4], desc[UR6]", "loads", "bulk"),
        ("STG.E.128 desc[UR12][R10.64], R4", "stores", "128"),
        ("STG.E.U8 [R2.64], R3", "stores", "8"),
        ("UTMASTG.2D [UR8], [UR4]", "stores", "bulk"),
    ],
)
def test_widths_on_nvidia(line: str, kind: str, width: str) -> None:
    found = mix(nvidia(line, "EXIT").instructions)
    assert (found.loads, found.stores) == (({width: 1}, {}) if kind == "loads" else ({}, {width: 1}))
    assert found.bytes_moved == (None if width == "bulk" else int(width.split()[-1]) // 8)


@pytest.mark.parametrize(
    ("line", "kind", "width"),
    [
        ("buffer_load_dwordx4 v[2:5], v2, s[24:27], 0 offen", "loads", "128"),
        ("global_load_dwordx3 v[2:4], v[0:1], off", "loads", "96"),
        ("global_load_dwordx2 v[2:3], v[0:1], off offset:8", "loads", "64"),
        ("flat_load_dword v2, v[0:1]", "loads", "32"),
        ("global_load_ushort v2, v[0:1], off", "loads", "16"),
        ("buffer_load_short_d16_hi v2, v1, s[0:3], 0 offen", "loads", "16"),
        ("global_load_sbyte v2, v[0:1], off", "loads", "8"),
        ("buffer_load_dword v2, s[0:3], 0 offen lds", "loads", "async 32"),
        ("global_load_lds_dwordx4 v[0:1], off", "loads", "async 128"),
        ("buffer_store_dwordx4 v[2:5], v6, s[4:7], 0 offen", "stores", "128"),
        ("global_store_byte v[0:1], v2, off", "stores", "8"),
        ("buffer_store_short v2, v1, s[0:3], 0 offen ; a comment", "stores", "16"),
    ],
)
def test_widths_on_amd(line: str, kind: str, width: str) -> None:
    found = mix(amd(line, "s_endpgm").instructions)
    assert (found.loads, found.stores) == (({width: 1}, {}) if kind == "loads" else ({}, {width: 1}))


def test_what_is_not_global_memory() -> None:
    assert mix(nvidia("LDS.128 R4, [R2]", "STL [R1], R3", "LDC.64 R4, c[0x0][0x28]").instructions).bytes_moved == 0
    assert mix(amd("ds_read_b128 v[0:3], v4", "s_load_dwordx4 s[0:3], s[0:1], 0x0").instructions).bytes_moved == 0


def test_tensor_cores_and_atomics() -> None:
    lines = ["HMMA.16816.F32.BF16 R4, R8, R2, R4", "HGMMA.64x64x16.F32 R24, gdesc[UR4], R24", "IMMA.16832.S8.S8 R4"]
    found = mix(
        nvidia(*lines, lines[0], "UTCHMMA gdesc[UR4], gdesc[UR6]", "RED.E.ADD.STRONG.GPU [R2.64], R5").instructions
    )
    assert found.matrix == {"HGMMA": 1, "HMMA": 2, "IMMA": 1, "UTCHMMA": 1}
    assert found.atomics == 1
    found = mix(
        amd(
            "v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], v[0:3]", "global_atomic_add_f32 v[0:1], v2, off"
        ).instructions
    )
    assert (found.matrix, found.atomics, found.bytes_moved) == ({"MFMA": 1}, 1, 0)


def test_instructions_for_each_byte() -> None:
    found = mix(nvidia("LDG.E.128 R4, [R2.64]", "FADD R4, R4, R5", "STG.E.64 [R2.64], R4").instructions)
    assert (found.instructions, found.bytes_moved, found.instructions_per_byte) == (3, 24, 3 / 24)
    assert mix(nvidia("FADD R4, R4, R5").instructions).instructions_per_byte is None
    assert found.narrower_than(128) == {"store 64": 1}


def names(code: Code) -> list[list[str]]:
    return [[each.name for each in body] for body in loops(code)]


def test_padding_is_no_code() -> None:
    code = nvidia("MOV R1, R2", "@P0 EXIT", "EXIT", ".L_x_9:", "BRA `(.L_x_9)", "NOP", "NOP")
    assert [each.name for each in code.instructions] == ["MOV", "EXIT", "EXIT"]
    assert loops(code) == []


def test_a_loop_and_the_loop_inside() -> None:
    code = nvidia(
        *("MOV R1, R2", ".L_x_0:", "LDG.E R4, [R2.64]", ".L_x_1:", "LDG.E.64 R4, [R2.64]", "@P0 BRA `(.L_x_1)"),
        *("FADD R4, R4, R5", "@!P1 BRA `(.L_x_0)", "STG.E [R2.64], R4", "EXIT"),
    )
    assert names(code) == [["LDG.E", "LDG.E.64", "BRA", "FADD", "BRA"], ["LDG.E.64", "BRA"]]
    assert [mix(body).loads for body in memory_loops(code)] == [{"64": 1}]


def test_two_ways_back_are_one_loop() -> None:
    code = nvidia(
        *(".L_x_0:", "LDG.E R4, [R2.64]", "@P0 BRA `(.L_x_0)", "FADD R4, R4, R5", "@P1 BRA `(.L_x_0)", "EXIT"),
    )
    assert names(code) == [["LDG.E", "BRA", "FADD", "BRA"]]


def test_code_moved_past_the_end_is_no_loop() -> None:
    """It jumps backward, but to an instruction that is also reached without it."""
    code = nvidia(
        *("@P0 BRA `(.L_x_1)", "FADD R4, R4, R5", ".L_x_0:", "STG.E [R2.64], R4", "EXIT"),
        *(".L_x_1:", "LDG.E R4, [R2.64]", "BRA `(.L_x_0)"),
    )
    assert loops(code) == []


def test_a_loop_that_waits_belongs_to_the_loop_that_encloses_it() -> None:
    """As ptxas compiles the wait for a barrier on Hopper and Blackwell: a separate loop after the code."""
    code = nvidia(
        *(".L_x_0:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR16], R22", "@!P4 BRA `(.L_x_9)", ".L_x_8:"),
        *("LDG.E.128 R4, [R2.64]", "@P1 BRA `(.L_x_0)", "EXIT"),
        *(".L_x_9:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR16], R22", "@!P4 BRA `(.L_x_9)", "BRA `(.L_x_8)"),
    )
    (body,) = memory_loops(code)
    assert (mix(body).loads, len(body)) == ({"128": 1}, 7)
    assert len(loops(code)) == 2


def test_a_jump_with_its_condition_as_an_operand_may_fall_through() -> None:
    code = nvidia(".L_x_0:", "BRA.U UP0, `(.L_x_1)", "LDG.E R4, [R2.64]", "BRA `(.L_x_0)", ".L_x_1:", "EXIT")
    assert names(code) == [["BRA.U", "LDG.E", "BRA"]]


def test_a_loop_on_amd() -> None:
    code = amd(
        *("s_load_dwordx2 s[2:3], s[0:1], 0x0", ".LBB0_1:", "global_load_dword v1, v[0:1], off", "s_nop 0"),
        *("s_cbranch_scc0 .LBB0_1", "s_branch .LBB0_3", ".LBB0_2:", "v_mov_b32 v0, 0", ".LBB0_3:", "s_endpgm"),
    )
    assert names(code) == [["global_load_dword", "s_cbranch_scc0"]]
