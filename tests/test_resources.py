"""benchmarks/resources.py reads what the compiler and the disassembler say; the samples are theirs, shortened."""

import types

import pytest

from benchmarks import resources

PTXAS = """\
ptxas info    : 28 bytes gmem, 224 bytes cmem[4]
ptxas info    : Compiling entry function '_Z5firstIfEvPT_' for 'sm_80'
ptxas info    : Function properties for _Z5firstIfEvPT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 416 bytes cmem[0], 12 bytes cmem[2]
ptxas info    : Compile time = 34.627 ms
ptxas info    : Compiling entry function '_Z6second' for 'sm_80'
ptxas info    : Function properties for __internal_fdividef
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for _Z6second
    48 bytes stack frame, 16 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, 416 bytes cmem[0]
"""

COLUMN_SUM = """\
\t.target\tsm_80

\t.section\t.text._ZN16convnext_kernels17column_sum_kernelIfEEvPKT_PS1_ll,"ax",@progbits
_ZN16convnext_kernels17column_sum_kernelIfEEvPKT_PS1_ll:
.text._ZN16convnext_kernels17column_sum_kernelIfEEvPKT_PS1_ll:
        /*00b0*/               @P0 BRA `(.L_x_161) ;
.L_x_164:
        /*02f0*/                   LDG.E.CONSTANT R11, [R10.64] ;
        /*0380*/                   FADD R4, R11, R4 ;
        /*0390*/               @P1 BRA `(.L_x_164) ;
        /*0450*/                   IMAD.SHL.U32 R19, R19, 0x80, RZ ;
.L_x_165:
        /*04a0*/                   LDG.E.CONSTANT R13, [R12.64] ;
        /*04d0*/                   LDG.E.CONSTANT R15, [R14.64] ;
        /*0510*/                   IADD3 R5, P0, R5, 0x80, RZ ;
        /*0560*/                   FADD R4, R13, R4 ;
        /*0580*/                   FADD R4, R4, R15 ;
        /*05b0*/              @!P0 BRA `(.L_x_165) ;
.L_x_161:
        /*05c0*/                   BSYNC B0 ;
        /*0610*/                   STS [R5.X4], R4 ;
        /*0630*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0670*/                   LDS R0, [R0.X4] ;
        /*0710*/               @P0 EXIT ;
        /*0750*/                   STG.E [R2.64], R5 ;
        /*0760*/                   EXIT ;
.L_x_166:
        /*0770*/                   BRA `(.L_x_166);
        /*0780*/                   NOP;
.L_x_553:
\t.section\t.nv.info._ZN16convnext_kernels17column_sum_kernelIfEEvPKT_PS1_ll,"",@"SHT_CUDA_INFO"
\t//----- nvinfo : EIATTR_MAX_THREADS
\t.align\t\t4
.L_337:
        /*00a4*/ \t.byte\t0x04, 0x05
        /*00a6*/ \t.short\t(.L_339 - .L_338)
.L_338:
        /*00a8*/ \t.word\t0x00000020
        /*00ac*/ \t.word\t0x00000020
        /*00b0*/ \t.word\t0x00000001
"""

# An inner loop does the products; the outer one around it converts and stores; the last is longer and does none.
NESTED = """\
.L_x_1:
        /*0010*/                   IMAD.U32 R4, R4, 0x10000, RZ ;
.L_x_2:
        /*0020*/                   LDS R0, [R0.X4] ;
        /*0030*/                   FFMA R1, R2, R3, R1 ;
        /*0040*/                   FFMA2 R6, R2.F32x2.HI_LO, R8.F32x2.HI_LO, R6.F32x2.HI_LO ;
        /*0050*/                   HMMA.16816.F32.BF16 R12, R4, R8, R12 ;
        /*0060*/               @P0 BRA `(.L_x_2) ;
        /*0070*/                   STG.E [R2.64], R5 ;
        /*0080*/              @!P1 BRA `(.L_x_1) ;
.L_x_3:
        /*0090*/                   STL [R1+0x8], R5 ;
        /*00a0*/                   IADD3 R5, R5, 0x1, RZ ;
        /*00b0*/                   IADD3 R5, R5, 0x1, RZ ;
        /*00c0*/                   IADD3 R5, R5, 0x1, RZ ;
        /*00d0*/                   IADD3 R5, R5, 0x1, RZ ;
        /*00e0*/                   IADD3 R5, R5, 0x1, RZ ;
        /*00f0*/                   IADD3 R5, R5, 0x1, RZ ;
        /*0100*/                   IADD3 R5, R5, 0x1, RZ ;
        /*0110*/               @P0 BRA.U UP0, `(.L_x_3) ;
        /*0120*/                   EXIT ;
"""


def test_registers_and_spills():
    assert resources.parse_ptxas(PTXAS) == {
        "_Z5firstIfEvPT_": {"registers": 40, "stack": 0, "spill_stores": 0, "spill_loads": 0},
        "_Z6second": {"registers": 255, "stack": 48, "spill_stores": 16, "spill_loads": 20},
    }


def test_a_report_without_spills_is_refused():
    with pytest.raises(resources.ResourceError, match="no line about the stack of _Z1k"):
        resources.parse_ptxas("ptxas info : Compiling entry function '_Z1k' for 'sm_90'\nptxas info : Used 8 registers")


def test_instructions_and_launch_bounds():
    (found,) = resources.parse_disassembly(COLUMN_SUM).values()
    assert found["most_threads"] == 1024
    assert found["instructions"] == 19  # those that pad the end are not counted
    assert found["loop"] == {"LDG": 2, "other": 4} and found["loop_instructions"] == 6
    assert found["local_accesses"] == 0
    assert resources.architecture_of(COLUMN_SUM) == 80


def test_the_main_loop_is_the_one_with_the_products():
    instructions, local, loop = resources.main_loop(NESTED.splitlines())
    assert (instructions, local) == (18, 1)
    assert [opcode.split(".")[0] for opcode, _ in loop] == ["LDS", "FFMA", "FFMA2", "HMMA", "BRA"]


def test_no_loop():
    assert resources.main_loop(["        /*0010*/                   EXIT ;"]) == (1, 0, [])


@pytest.mark.parametrize(
    ("opcode", "operands", "kind"),
    [
        ("FFMA.FTZ", "R1, R2, R3, R1", "FFMA"),
        ("HFMA2.MMA", "R2, -RZ, RZ, 0, 0", "other"),
        ("HGMMA.64x64x16.F32", "R24, gdesc[UR4], R24", "HMMA"),
        ("UTCHMMA", "gdesc[UR6], gdesc[UR8], tmem[UR10]", "HMMA"),
        ("LDSM.16.M88.4", "R4, [R4]", "LDSM"),
        ("LDGSTS.E.BYPASS.128.ZFILL", "[R2], [R4.64], P0", "LDGSTS"),
        ("HADD2.F32", "R3, -RZ, R3.H0_H0", "convert"),
        ("SHF.L.U32", "R36, R36, 0x10, RZ", "convert"),
        ("IMAD.U32", "R4, R4, 0x10000, RZ", "convert"),
        ("IMAD.SHL.U32", "R4, R4, 0x10, RZ", "other"),
        ("LOP3.LUT", "R4, R4, 0xffff0000, RZ, 0xc0, !PT", "convert"),
        ("F2FP.BF16.F32.PACK_AB", "R4, R5, R4", "convert"),
        ("BAR.SYNC.DEFER_BLOCKING", "0x0", "BAR"),
        ("MUFU.EX2", "R4, R4", "MUFU"),
    ],
)
def test_kinds(opcode, operands, kind):
    assert resources.kind_of(opcode, operands) == kind


def test_readable_names():
    names = [
        "_ZN16convnext_kernels14depthwise_conv18convolution_kernelI13__nv_bfloat16S2_Lb1EEEvNS0_17ConvolutionParamsIT_T0_EE",
        "_ZN16convnext_kernels17column_sum_kernelIfEEvPKT_PS1_ll",
        "layer_norm_mlp_forward",
    ]
    assert (
        resources._short("convnext_kernels::column_sum_kernel<(int)8, float>(float*)") == "column_sum_kernel<8, float>"
    )
    assert resources.demangle(names) == [
        "convolution_kernel<bf16, bf16, true>",
        "column_sum_kernel<float>",
        "layer_norm_mlp_forward",
    ]


H100 = types.SimpleNamespace(shared_bytes_per_multiprocessor=228 * 1024, threads_per_multiprocessor=2048)
L40 = types.SimpleNamespace(shared_bytes_per_multiprocessor=100 * 1024, threads_per_multiprocessor=1536)


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "architecture", "blocks", "limit"),
    [
        (128, 256, 62848, 90, 2, "registers"),
        (32, 256, 0, 90, 8, "registers"),
        (33, 256, 0, 90, 6, "registers"),  # 40 are given, 12 warps of a scheduler fit
        (32, 128, 75 * 1024, 90, 3, "shared memory"),
        (32, 256, 99 * 1024, 89, 1, "shared memory"),
        (24, 256, 0, 89, 6, "threads"),
        (16, 32, 0, 90, 32, "blocks"),
        (255, 512, 0, 90, 0, "registers"),
    ],
)
def test_occupancy(registers, threads, shared, architecture, blocks, limit):
    chip = L40 if architecture == 89 else H100
    found = resources.occupancy(registers, threads, shared, architecture, chip)
    assert (found.blocks, found.warps, found.limit) == (blocks, blocks * threads // 32, limit)


def test_arguments(capsys):
    assert resources.parse_arguments([]).arch == [80, 90, 120]
    assert resources.parse_arguments(["--arch", "all"]).arch == list(resources.ALL_ARCHITECTURES)
    assert resources.parse_arguments(["--arch", "sm_86", "100"]).arch == [86, 100]
    with pytest.raises(SystemExit):
        resources.parse_arguments(["--arch", "75"])
    assert "expected some of 80, 86, 89, 90, 100, 120, or all, got 75" in capsys.readouterr().err


def test_table():
    kernel = resources.Kernel("k<8>", 40, 0, 0, loop={"FFMA": 3, "other": 1}, loop_instructions=4, instructions=9)
    rows = resources.rows_of("room/cuda", 90, [kernel], None)
    head, line = resources.table(rows).splitlines()
    assert head.split() == [
        "kernel",
        "regs",
        "stack",
        "spill",
        "threads",
        "shared",
        "blocks",
        "warps",
        "limit",
        "loop",
    ] + [
        "FFMA",
        "other",
    ]
    assert line.split() == ["k<8>", "40", "0", "-", "-", "-", "-", "-", "-", "4", "75", "25"]
    assert kernel.share("FFMA") == 0.75 and kernel.share("HMMA") == 0


def test_architecture_of_both_formats():
    assert resources.architecture_of("\t.target\tsm_120\n") == 120
    assert resources.architecture_of('\t.headerflags\t@"EF_CUDA_64BIT_ADDRESS EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM"') == 90
    with pytest.raises(resources.ResourceError, match="no architecture"):
        resources.architecture_of("")


def test_triton_kernels(monkeypatch):
    """Compiled for a chip that is not here, with the threads and the shared memory that they are launched with."""
    pytest.importorskip("triton")
    monkeypatch.setattr(resources, "STAGES", ((96, 14),))
    found = {name: rows for name, _, rows in resources.triton_rows([90], resources.load_plans())}
    (forward,) = found["layer_norm_mlp V1 96@14 batch 128 bfloat16"]
    assert forward["name"] == "fused_kernel"
    assert forward["stack"] == 0
    assert forward["loop"]["HMMA"] > 0
    assert forward["threads"] in (128, 256) and 2**14 < forward["shared"] <= 227 * 1024
    assert forward["blocks"] >= 1
    assert {name.split()[0] for name in found} >= {"depthwise_conv2d_weight_grad", "layer_norm_mlp_backward"}
