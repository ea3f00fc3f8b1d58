"""Reading machine code: kinds, source lines and loops of listings written by hand."""

import pytest

from bench.disassembly import OTHER, Place, kind_of, loops_of, main_loops, read_amd, read_nvidia


def listing(*lines: str) -> str:
    """nvdisasm's form: "label:" lines stand as they are, instructions get an address."""
    return "\n".join(
        line if line.endswith(":") or "//##" in line else f"        /*{16 * i:04x}*/   {line} ;"
        for i, line in enumerate(lines)
    )


# A loop of three blocks; its waiting block stands behind the exit, as ptxas puts them, and jumps back into the middle.
OUT_OF_LINE = listing(
    "kernel:",
    "MOV R1, c[0x0][0x28]",
    ".L_x_1:",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3",
    "@!P0 BRA `(.L_x_3)",
    ".L_x_2:",
    "HGMMA.64x128x16.F32 R24, gdesc[UR8], R24",
    "MUFU.EX2 R5, R4",
    "@P1 BRA `(.L_x_1)",
    "EXIT",
    ".L_x_3:",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3",
    "@!P0 BRA `(.L_x_3)",
    "BRA `(.L_x_2)",
    ".L_x_4:",
    "BRA `(.L_x_4)",
    "NOP",
)


def test_code_moved_out_of_line_belongs_to_its_loop():
    loops = loops_of(read_nvidia(OUT_OF_LINE))
    assert [loop.size for loop in loops] == [8, 2]  # the loop, and the wait in it; not the trap at the end
    assert loops[0].counts == {"barriers and waits": 2, "branches": 4, "tensor core": 1, "exponentials": 1}
    assert main_loops(loops) == loops[:1]


def test_nested_loops_have_one_main_loop():
    code = read_nvidia(listing(
        ".L_x_1:", "MUFU.EX2 R1, R2", ".L_x_2:", "HMMA.16816.F32 R4, R8, R12, R4", "@P0 BRA `(.L_x_2)",
        "FADD R1, R1, R2", "@P1 BRA `(.L_x_1)", "EXIT",
    ))  # fmt: skip
    loops = loops_of(code)
    assert [loop.size for loop in loops] == [5, 2]
    assert main_loops(loops) == [loops[1]]


def test_without_tensor_cores_the_exponentials_tell():
    loops = loops_of(read_nvidia(listing(
        ".L_x_1:", "FADD R1, R1, R2", "@P0 BRA `(.L_x_1)", ".L_x_2:", "MUFU.EX2 R1, R2", "@P0 BRA `(.L_x_2)", "EXIT",
    )))  # fmt: skip
    assert [loop.counts["exponentials"] for loop in loops] == [0, 1]
    assert main_loops(loops) == loops[1:]
    assert main_loops(loops[:1]) == []


def test_source_lines_with_their_callers():
    code = read_nvidia(listing(
        '\t//## File "helper.py", line 3 inlined at "kernel.py", line 40', '\t//## File "kernel.py", line 40',
        "FADD R1, R1, R2", '\t//## File "kernel.py", line 41', "@!UP0 FMUL R1, R1, R2", "MUFU.RCP R1, R2",
    ))  # fmt: skip
    first, second, third = code.instructions
    assert first.places == (Place("helper.py", 3), Place("kernel.py", 40))
    assert second.places == third.places == (Place("kernel.py", 41),)
    assert (second.predicate, second.text, second.opcode) == ("@!UP0", "FMUL R1, R1, R2", "FMUL")


@pytest.mark.parametrize(
    "text, kind",
    [
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", "tensor core"),
        ("QGMMA.64x128x32.F32.E4M3.E4M3 R24, R4, gdesc[UR4], R24", "tensor core"),
        ("UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UPT", "tensor core"),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", "barriers and waits"),
        ("MUFU.EX2 R5, R4", "exponentials"),
        ("MUFU.RCP R5, R4", "reciprocals and divisions"),
        ("MUFU.LG2 R5, R4", "other special functions"),
        ("FFMA R1, R2, R3, R4", "fused multiply-adds"),
        ("FFMA2 R2, R4, R6, R8", "fused multiply-adds"),
        ("HFMA2.MMA R1, R2, R3, R4", "fused multiply-adds"),
        ("HFMA2.MMA R1, -RZ, RZ, 0, 0", "moves"),
        ("IMAD.MOV.U32 R1, RZ, RZ, R2", "moves"),
        ("IMAD.WIDE R2, R4, R6, R8", OTHER),
        ("FMNMX3 R1, R2, R3, R4, !PT", "max and min"),
        ("F2FP.F16.F32.PACK_AB R1, R2, R3", "conversions"),
        ("HADD2.F32 R1, -RZ, R2.H0_H0", "conversions"),
        ("HADD2 R1, R2, R3", "adds"),
        ("SHFL.BFLY PT, R1, R2, 0x2, 0x1f", "shuffles"),
        ("LDG.E.128 R4, desc[UR4][R2.64]", "global loads"),
        ("LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]", "global loads (cp.async)"),
        ("LDGDEPBAR", "barriers and waits"),
        ("UTMALDG.2D [UR8], [UR4]", "global loads (TMA)"),
        ("LDSM.16.MT88.4 R4, [R2]", "shared loads"),
        ("STSM.16.M88.4 [R2], R4", "shared stores"),
        ("STS.U8 [R2], R4", "shared stores"),
        ("STG.E.128 desc[UR4][R2.64], R4", "global stores"),
        ("STL [R1], R2", "spills"),
        ("LDL.LU R2, [R1]", "spills"),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", "barriers and waits"),
        ("ISETP.GE.AND P0, PT, R1, R2, PT", "compares and selects"),
        ("FSEL R1, R2, -INF , !P0", "compares and selects"),
        ("PRMT R1, R2, 0x5410, R3", "byte permutes"),
        ("IADD3 R1, R2, R3, RZ", OTHER),
    ],
)
def test_kinds_on_nvidia(text, kind):
    assert kind_of(text) == kind


@pytest.mark.parametrize(
    "text, kind",
    [
        ("v_mfma_f32_32x32x8_f16 v[0:15], v[16:17], v[18:19], v[0:15]", "tensor core"),
        ("v_exp_f32_e32 v1, v2", "exponentials"),
        ("v_rcp_f32_e32 v1, v2", "reciprocals and divisions"),
        ("v_div_fixup_f32 v1, v2, v3, v4", "reciprocals and divisions"),
        ("v_fma_f32 v1, v2, v3, v4", "fused multiply-adds"),
        ("v_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[6:7]", "fused multiply-adds"),
        ("v_pk_mul_f32 v[0:1], v[2:3], v[4:5]", "multiplies"),
        ("v_mul_lo_u32 v1, v2, v3", OTHER),
        ("v_sub_f32_e32 v1, v2, v3", "adds"),
        ("v_max3_f32 v1, v2, v3, v4", "max and min"),
        ("v_cvt_f16_f32_e32 v1, v2", "conversions"),
        ("ds_bpermute_b32 v1, v2, v3", "shuffles"),
        ("buffer_load_dwordx4 v[0:3], v4, s[8:11], 0 offen", "global loads"),
        ("buffer_load_dword v4, s[8:11], 0 offen lds", "global loads (to LDS)"),
        ("buffer_store_dword v4, off, s[0:3], 0 ; 4-byte Folded Spill", "spills"),
        ("ds_read_b128 v[0:3], v4", "shared loads"),
        ("ds_write_b64 v4, v[0:1]", "shared stores"),
        ("s_waitcnt vmcnt(0)", "barriers and waits"),
        ("v_cndmask_b32_e32 v1, v2, v3, vcc", "compares and selects"),
        ("s_cbranch_scc1 .LBB0_2", "branches"),
    ],
)
def test_kinds_on_amd(text, kind):
    assert kind_of(text, amd=True) == kind


AMD = """\
	.file	1 "prefill" "v2.py"
kernel:
	.loc	1 8 0 prologue_end ; v2.py:8:0
	s_load_dwordx2 s[0:1], s[4:5], 0x0
.LBB0_1: ; =>This Inner Loop Header
	.loc	1 12 3
	v_exp_f32_e32 v1, v2
	s_cbranch_scc1 .LBB0_1
	s_endpgm
.Lfunc_end0:
	v_exp_f32_e32 v1, v2
"""


def test_amd_listing():
    code = read_amd(AMD)
    assert [i.opcode for i in code.instructions] == ["s_load_dwordx2", "v_exp_f32_e32", "s_cbranch_scc1", "s_endpgm"]
    assert code.instructions[1].places == (Place("prefill/v2.py", 12),)
    [loop] = loops_of(code)
    assert loop.counts == {"exponentials": 1, "branches": 1}
