"""Reading machine code: parts of hand-written listings, counted by hand."""

import pytest

from r2ec_kernels import sass

# One tile a program: 3 instructions before the loop, 5 in it, 12 after it (a loop over exclusions
# of 3 and a skipped store among them), then a trap and padding, which are never reached or count
# as nothing.
TILE = """
	.section	.text.best,"ax",@progbits
        .other          best,@"STO_CUDA_ENTRY STV_DEFAULT"
best:
.text.best:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDGSTS.E.BYPASS.128 [R0], desc[UR16][R42.64], P4 ;
        /*0020*/              @!P6 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*0050*/                   LDGSTS.E.BYPASS.128 [R53], desc[UR16][R46.64], P6 ;
        /*0060*/              @P1  LDG.E.U16 R26, desc[UR18][R16.64] ;
        /*0070*/               @P6 BRA `(.L_x_1) ;
.L_x_0:
        /*0080*/                   SHFL.BFLY PT, R3, R4, 0x8, 0x1f ;
        /*0090*/                   VIMNMX R3, R3, R4, !PT ;
        /*00a0*/                   STS [R5], R3 ;
.L_x_2:
        /*00b0*/                   LDG.E.64 R46, desc[UR16][R18.64] ;
        /*00c0*/                   ISETP.NE.U32.AND P2, PT, R46, R7, PT ;
        /*00d0*/               @P2 BRA `(.L_x_2) ;
        /*00e0*/                   BSSY B0, `(.L_x_3) ;
        /*00f0*/               @P0 BRA `(.L_x_4) ;
        /*0100*/                   STG.E desc[UR6][R2.64], R3 ;
.L_x_4:
        /*0110*/                   BSYNC B0 ;
.L_x_3:
        /*0120*/                   LDS.128 R8, [R5] ;
        /*0130*/                   EXIT ;
.L_x_5:
        /*0140*/                   BRA `(.L_x_5);
        /*0150*/                   NOP;
"""
# A persistent program: 1 before, 2 + 4 around a loop of 3 for every tile, 2 at the end. The tile's
# loop is closed by a jump back to it from behind the end, as ptxas places it.
PERSISTENT = """
        /*0000*/                   S2R R8, SR_CTAID.X ;
.L_x_0:
        /*0010*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0020*/                   CS2R R46, SRZ ;
.L_x_1:
        /*0030*/                   HMMA.16816.F32.BF16 R76, R76, R64, R68 ;
        /*0040*/                   UTMALDG.2D [UR8], [UR12] ;
        /*0050*/              @!P6 BRA `(.L_x_1) ;
        /*0060*/                   SHFL.IDX PT, R3, R4, RZ, 0x1f ;
        /*0070*/                   STG.E desc[UR6][R2.64], R3 ;
        /*0080*/                   BRA.U UP0, `(.L_x_2) ;
        /*0090*/                   MOV R3, R4 ;
        /*00a0*/                   EXIT ;
.L_x_2:
        /*00b0*/                   BRA `(.L_x_0) ;
"""
# A flattened loop: 2 + 3 of every step, 3 that run at the end of a tile alone.
FLATTENED = """
.L_x_0:
        /*0000*/                   HGMMA.64x64x16.F32 R24, gdesc[UR4], R24 ;
        /*0010*/               @P0 BRA `(.L_x_1) ;
        /*0020*/                   SHFL.BFLY PT, R3, R4, 0x8, 0x1f ;
        /*0030*/                   FMNMX R3, R3, R4, !PT ;
        /*0040*/                   {STORE} ;
.L_x_1:
        /*0050*/                   LDGSTS.E.64 [R53], desc[UR16][R46.64] ;
        /*0060*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0070*/               @P6 BRA 0x0 ;
        /*0080*/                   EXIT ;
"""


def sizes(text, **options):
    parts = sass.regions(sass.read(text), **options)
    return [len(part) for part in (parts.before, parts.loop, parts.epilogue, parts.after)], parts


def names(lines):
    return [line.name for line in lines]


def test_a_tile_a_program():
    counts, parts = sizes(TILE)
    assert counts == [3, 5, 12, 0] and not parts.persistent
    assert names(parts.loop) == ["HGMMA", "HGMMA", "LDGSTS", "LDG", "BRA"]
    epilogue = names(parts.epilogue)
    assert [epilogue.count(name) for name in ("SHFL", "STS", "LDS", "STG")] == [1, 1, 1, 1]


def test_a_persistent_program():
    counts, parts = sizes(PERSISTENT)
    assert counts == [1, 3, 6, 2] and parts.persistent
    assert names(parts.epilogue) == ["IADD3", "CS2R", "SHFL", "STG", "BRA", "BRA"]


def test_a_flattened_loop_ends_tiles_under_a_condition():
    counts, parts = sizes(FLATTENED.format(STORE="STG.E desc[UR6][R2.64], R3"))
    assert counts == [0, 5, 3, 1] and parts.persistent
    assert names(parts.epilogue) == ["SHFL", "FMNMX", "STG"]


def test_a_warp_that_issues_for_others_does_so_in_the_step():
    text = FLATTENED.format(STORE="STG.E desc[UR6][R2.64], R3")
    chosen = "@P3 BRA 0x78 ;\n/*0074*/ UTMALDG.2D [UR8], [UR12] ;\n/*0078*/ @P6 BRA 0x0"
    counts, parts = sizes(text.replace("@P6 BRA 0x0", chosen))
    assert counts == [0, 7, 3, 1] and "UTMALDG" in names(parts.loop)


def test_a_condition_without_a_global_store_belongs_to_the_step():
    counts, parts = sizes(FLATTENED.format(STORE="STS [R5], R3"))
    assert counts == [0, 8, 1, 0] and not parts.persistent


def test_straight_code_is_one_step():
    counts, _ = sizes(TILE, straight=True)
    assert counts == [0, 20, 0, 0]
    counts, _ = sizes(TILE.split(".L_x_1:")[0].replace("BRA `(.L_x_0)", "EXIT"))
    assert counts == [0, 3, 0, 0]


def test_without_products_the_loop_that_loads_most_is_the_main_one():
    text = TILE.replace("HGMMA.64x128x16.F32.BF16", "FFMA")
    assert names(sizes(text)[1].loop)[:2] == ["FFMA", "FFMA"]  # 16 + 2 bytes against 8
    text = text.replace("LDGSTS.E.BYPASS.128 [R53]", "LDS R0, [R53]")
    assert names(sizes(text)[1].loop) == ["LDG", "ISETP", "BRA"]


def test_many_multiply_adds_are_a_product():
    lines = [f"/*{16 * i:04x}*/ FFMA R0, R1, R2, R0 ;" for i in range(16)]
    lines = [".L_x_0:", *lines, "/*0100*/ @P0 BRA `(.L_x_0) ;", ".L_x_1:"]
    lines += ["/*0110*/ LDG.E.128 R0, [R2] ;", "/*0120*/ @P0 BRA `(.L_x_1) ;", "/*0130*/ EXIT ;"]
    counts, _ = sizes("\n".join(lines))
    assert counts == [0, 17, 3, 0]


def test_a_call_of_a_label_is_a_way_out_and_a_subroutine_is_not_counted():
    """ptxas leaves some loops of sm_80 by a call."""
    text = TILE.replace("@P6 BRA `(.L_x_1)", "@P6 CALL.REL.NOINC `(.L_x_0)")
    text = text.replace(".L_x_0:\n", "/*0078*/ BRA `(.L_x_1) ;\n.L_x_0:\n")
    assert sizes(text)[0] == [3, 6, 12, 0]
    text = TILE.replace("MOV R3", "CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_rn_f64_full)")
    assert sizes(text)[0] == [3, 5, 12, 0]


@pytest.mark.parametrize(
    ("line", "bits", "name"),
    [
        ("LDG.E.U16 R1, desc[UR6][R2.64]", 16, "LDG.U16"),
        ("LDG.E R1, desc[UR6][R2.64]", 32, "LDG.32"),
        ("LDG.E.128.CONSTANT R1, desc[UR6][R2.64]", 128, "LDG.128"),
        ("LDGSTS.E.BYPASS.128 [R0], desc[UR6][R2.64]", 128, "LDGSTS.128"),
        ("LDGSTS.E [R0], desc[UR6][R2.64]", 32, "LDGSTS.32"),
        ("UTMALDG.2D [UR8], [UR12]", 128, "UTMALDG"),
        ("LDGDEPBAR", 0, None),
        ("LDS.128 R8, [R5]", 0, None),
    ],
)
def test_width_of_loads(line, bits, name):
    opcode, _, operands = line.partition(" ")
    found = sass.Instruction(0, "", opcode, operands)
    assert sass.load_bits(found) == bits
    assert name is None or sass.load_name(found) == name


@pytest.mark.parametrize(
    ("opcode", "flops"),
    [
        ("HGMMA.64x128x16.F32.BF16", 2 * 64 * 128 * 16),
        ("HGMMA.64x8x8.F32.TF32", 2 * 64 * 8 * 8),
        ("IGMMA.64x32x32.S8.S8", 2 * 64 * 32 * 32),
        ("HMMA.16816.F32", 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 2 * 16 * 8 * 8),
        ("IMMA.16832.S8.S8", 2 * 16 * 8 * 32),
        ("UTCHMMA", 0),
        ("FFMA", 0),
    ],
)
def test_flops_of_products(opcode, flops):
    line = sass.Instruction(0, "", opcode, "")
    assert sass.tensor_flops(line) == flops
    assert sass.is_product(line) == (opcode != "FFMA")


def test_what_is_not_understood_is_an_error():
    with pytest.raises(ValueError, match="no instruction"):
        sass.read("")
    with pytest.raises(ValueError, match="this one has 2"):
        sass.read(TILE + TILE)
    with pytest.raises(ValueError, match=r"BRX R4 -0x10 at 0x70 names no target"):
        sizes(TILE.replace("BRA `(.L_x_1)", "BRX R4 -0x10"))
    targets = 'BRX R4 -0x10 (*"BRANCH_TARGETS .L_x_1,.L_x_0"*)'
    assert sizes(TILE.replace("BRA `(.L_x_1)", targets))[0] == [3, 5, 12, 0]


def test_a_missing_nvdisasm_says_what_to_install(monkeypatch):
    import triton

    class Nothing:
        @property
        def nvdisasm(self):
            raise RuntimeError("Cannot find nvdisasm")

    monkeypatch.setattr(triton.knobs, "nvidia", Nothing())
    with pytest.raises(FileNotFoundError, match="pip install triton.*cuda-nvdisasm"):
        sass.nvdisasm()
