"""What the compiler makes of kernels, where the design depends on it: read off their TTGIR, PTX and machine code."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusecomp.lowerings.aot import compile_one
from fusecomp.lowerings.machine_code import waits_for_each_product
from fusecomp.lowerings.paged_attention.attention_aot import Case
from fusecomp.lowerings.paged_attention.attention_aot import specializations as specializations_of_attention
from fusecomp.lowerings.paged_attention.decode_apart import decode_apart_kernel
from fusecomp.lowerings.paged_attention.heuristics import SM90
from fusecomp.lowerings.quant import folded_pieces, folded_wide, quant_aot
from fusecomp.lowerings.quant.heuristics import FOLDED_WIDE, QuantConfig
from fusecomp.lowerings.quant.quant_aot import LAYOUTS, specialization
from fusecomp.lowerings.sampling import greedy_aot
from fusecomp.ops.quant import FOLD_ORDER, FP8, INT


def test_greedy_reads_logits_sixteen_bytes_at_a_time():
    """Where a load begins is known to be aligned, however a row is split."""
    for spec in greedy_aot.specializations(SM90):
        ptx = compile_one(spec, "sm_90")[1].asm["ptx"]
        loads = re.findall(r"ld\.global\.(?!cg)(\S+)", ptx)
        assert loads and all(load.startswith("v4.b32") for load in loads), (spec.name, set(loads))


@pytest.mark.parametrize(("layout", "tokens"), [(1, 8), (3, 1), (3, 8)])
def test_codes_are_asked_for_before_the_wait(layout, tokens):
    """Under dependent launch; for the tile kernel it is Triton's pipeline that puts the copies there."""
    spec = specialization(SM90, LAYOUTS[layout], 2, tokens, "bfloat16", 2)
    assert spec.constants.get("EARLY", True)
    ptx = compile_one(spec, "sm_90")[1].asm["ptx"]
    first = "ld.global" if spec.kernel.__name__ == "quant_vector_kernel" else "cp.async"
    assert 0 < ptx.index(first) < ptx.index("griddepcontrol.wait")
    assert "st.global" not in ptx[: ptx.index("griddepcontrol.wait")]


@pytest.mark.parametrize("ahead", [0, 1])
def test_words_behind_the_first_tile_are_asked_of_the_l2_before_the_wait(ahead):
    """By requests of whole rows' parts, before anything waits."""
    config = QuantConfig("words", 1, 8, 1024, 2, ahead=ahead)
    spec = specialization(SM90, (FP8, 8, 1, 0, False, 0), 1, 1, "bfloat16", 0, config)
    ptx = compile_one(spec, "sm_90")[1].asm["ptx"]
    assert ptx.count("cp.async.bulk.prefetch.L2.global") == ahead
    assert not ahead or ptx.index("prefetch.L2") < ptx.index("griddepcontrol.wait")


@pytest.mark.parametrize(
    ("rule", "apart", "loads"),
    [
        ("half:128:full", (32, 8, 1), 32),
        ("half:128:full", (16, 8, 2), 32),
        ("half:128:full", (16, 4, 2), 32),
        ("interleaved:128:pairs", (16, 4, 2), 16),
    ],
)
def test_warps_apart_hold_first_tiles_before_the_wait_and_exchange_nothing_between_products(rule, apart, loads):
    """All of 32 keys and values a warp, sixteen bytes a load, asked for behind a row's pages and length alone.

    They are of one tile or, where one is loaded ahead, of two: of one alone if what rotates takes the registers.
    """
    case = Case(rope=rule, num_rows=1, apart=apart)
    spec = next(s for s in specializations_of_attention(case, SM90) if s.kernel is decode_apart_kernel)
    resources, compiled = compile_one(spec, "sm_90")
    ptx = compiled.asm["ptx"]
    before = ptx[: ptx.index("griddepcontrol.wait")]
    assert resources.spills == 0 and before.count("ld.global.v4.b32") == loads
    # Pages of the first tile, a length, pages of another first tile; those of the second and third.
    each = apart[0] // 16
    assert before.count("ld.volatile.global") == 1 + each * (2 if apart[2] == 1 else 4 if loads == 32 else 3)
    assert not re.search(r"st\.(shared|global)|bar\.sync|shfl|ldmatrix", before)
    products = ptx[ptx.index("mma.sync") : ptx.rindex("mma.sync")]
    assert "shared" not in products and "bar.sync" not in products


@pytest.mark.parametrize(("layout", "groups"), [(0, 1), (0, 2), (7, 2)])
def test_folded_codes_become_bytes_in_their_registers(layout, groups):
    """By a mask for four of them, as the products' operand: a step stores nothing and exchanges nothing."""
    config = QuantConfig("folded digits", 16, 64 * groups, 256, 4, 4)
    resources, compiled = compile_one(specialization(SM90, LAYOUTS[layout], groups, 16, "bfloat16", 0, config), "sm_90")
    loop = compiled.asm["ttgir"].split("scf.for")[1].split("scf.yield")[0]
    assert loop.count("warp_group_dot %") == 2 * groups and loop.count("local_load") == groups
    assert not re.search("convert_layout|local_alloc|local_store", loop)
    ptx = compiled.asm["ptx"]
    words = 64 * groups * 128 // 4 // 128  # of a thread
    assert ptx.count("0x0f0f0f0f") == 2 * words and "m64n32k32.s32.s8.s8" in ptx
    assert resources.spills == 0 and resources.registers <= 168  # three programs a multiprocessor, by this Triton


@pytest.mark.parametrize("parts", [1, 4])
def test_codes_that_go_through_the_pipeline_late_are_asked_of_the_l2_before(monkeypatch, parts):
    """Each 32 bytes of the tiles named, and of the scales, once; the pipeline begins after the wait."""

    def requests(ahead):
        config = QuantConfig("folded", 8, 64 // parts, num_stages=3, early=False, sums=True, parts=parts, ahead=ahead)
        monkeypatch.setattr(quant_aot, "quant_config", lambda *_: config)
        resources, compiled = compile_one(specialization(SM90, LAYOUTS[7], 1, 8, "bfloat16", 0), "sm_90")
        ptx = compiled.asm["ptx"]
        assert resources.spills == 0
        assert ptx.rindex("prefetch.global.L2") < ptx.index("griddepcontrol.wait") < ptx.index("cp.async")
        return ptx.count("prefetch.global.L2")

    assert requests(8) - requests(0) == 64 // parts * 8 * 4 // 128


@pytest.mark.parametrize(("layout", "tokens"), [(0, 8), (7, 8), (7, 64)])
def test_folded_codes_become_operands_in_their_registers(layout, tokens):
    """By a shift and a mask for two of them, without conversions of integers or a way through shared memory.

    What is stored there are inputs and zero points: fewer bytes than the codes alone would be.
    """
    spec = specialization(SM90, LAYOUTS[layout], 1, tokens, "bfloat16", 0)
    ptx = compile_one(spec, "sm_90")[1].asm["ptx"]
    tile = spec.constants["BLOCK_R"] * 4 * spec.constants["FOLD"] // (32 * spec.num_warps)
    tile *= spec.constants.get("PARTS", 1)
    assert ptx.count("0x000f000f, 0x43004300, 0xEA") == tile // 2
    assert not re.search(r"cvt\.rn\.(f32|bf16)\.[su]\d", ptx) and "ldmatrix" in ptx


@pytest.mark.parametrize("layout", [0, 7], ids=["zero points", "symmetric"])
@pytest.mark.parametrize("tile", [(64, 64, 4, 3), (64, 128, 8, 2), (128, 64, 4, 2), (128, 128, 8, 2)], ids=str)
@pytest.mark.parametrize("use_tma", [False, True], ids=["pointers", "tma"])
def test_codes_of_many_tokens_become_operands_in_their_registers(layout, tile, use_tma):
    """Words of two scales go through the pipeline as codes do, and nothing is laid out anew in shared memory.

    Nor does the assembler wait for one instruction of a product before it issues the next. Inputs that TMA reads need
    no fence before a product, and one wait for the four blocks of a step.
    """
    block_t, block_r, warps, stages = tile
    config = QuantConfig(FOLDED_WIDE, block_t, block_r, 128, warps, stages, use_tma=use_tma)
    spec = specialization(SM90, LAYOUTS[layout], 2, block_t, "bfloat16", 0, config)
    resources, compiled = compile_one(spec, "sm_90")
    loop = compiled.asm["ttgir"].split("scf.for")[1].split("scf.yield")[0]
    ptx = compiled.asm["ptx"]
    assert resources.spills == 0 and "wgmma" in ptx and not waits_for_each_product(compiled)
    assert "local_alloc" not in loop and "tt.load" not in loop and "convert_layout" not in loop
    assert loop.count("async_copy_global_to_local") == (2 if use_tma else 6) + (layout == 0)
    assert loop.count("async_tma_copy_global_to_local") == 4 * use_tma and loop.count("wait_barrier") == use_tma
    assert ("fence.proxy.async" in ptx) != use_tma
    assert not use_tma or ptx.index("griddepcontrol.wait") < ptx.index("cp.async.bulk.tensor")


@pytest.mark.parametrize("layout", [0, 7], ids=["zero points", "symmetric"])
@pytest.mark.parametrize(
    ("warps", "early", "tokens"),
    [(2, True, 1), (4, False, 1), (16, False, 1), (16, True, 1), (2, False, 2), (4, True, 2)],
)
def test_held_inputs_meet_codes_in_the_lanes_that_read_both(layout, warps, early, tokens):
    """Between products nothing goes through shared memory but codes, sixteen bytes at a time, and no warp waits.

    Sixteen warps, of two tokens twelve, in however many programs, have a multiprocessor's registers.
    """
    config = QuantConfig("folded held", 1, parts=warps, num_stages=3, ahead=1, early=early)
    spec = specialization(SM90, LAYOUTS[layout], 2, tokens, "bfloat16", 2, config)
    resources, compiled = compile_one(spec, "sm_90")
    ptx = compiled.asm["ptx"]
    assert resources.spills == 0 and resources.registers <= (128, 168)[tokens - 1]
    assert len(re.findall(r"mma\.sync\S*m16n8k32\S*\.s8\.s8\.s32", ptx)) == 8 and "ldmatrix" not in ptx
    assert ptx.count("0x0f0f0f0f") == 32
    products = ptx[ptx.index("mma.sync") : ptx.rindex("mma.sync")]
    assert not re.search(r"st\.shared|bar\.sync|shfl|ld\.global", products)
    step = ptx[ptx.rindex("cp.async.wait_group", 0, ptx.index("mma.sync")) : ptx.rindex("mma.sync")]
    assert re.findall(r"ld\.shared\S*", step) == ["ld.shared.v4.b32"] * 4
    asks, wait = ptx.index("cp.async.bulk.prefetch.L2.global"), ptx.index("griddepcontrol.wait")
    assert asks < wait and (early or wait < ptx.index("st.global"))
    assert (ptx.index("cp.async.cg.shared.global") < wait) == early
    copies = re.findall(r"async_copy_global_to_local.*contiguity = (\d+).*", compiled.asm["ttgir"])
    assert copies and set(copies) == {"16"}  # bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_multiply_and_round_once(dtype):
    """The instruction adds -0, which leaves every product, and the sign of a zero, as it is."""
    text = folded_wide.TIMES.value[dtype == torch.float16]
    assert "0x80008000" in text and f"fma.rn.{'f16' if dtype == torch.float16 else 'bf16'}x2 $0, $1, $2, o" in text
    codes = torch.arange(-16, 16).to(dtype)
    scales = torch.randn(64, generator=torch.Generator().manual_seed(0)).to(dtype)[:, None]
    negative_zero = torch.tensor(0x8000 - 0x10000, dtype=torch.int16).view(dtype)
    assert torch.equal(codes * scales + negative_zero, (codes.double() * scales.double()).to(dtype))


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), st.sampled_from(["bf16", "fp16"]), st.integers(0, 16))
def test_assembly_means_what_the_codes_do(low, high, dtype, zero):
    """The instructions' arithmetic on two words, as bits: exact, for every nibble."""
    word, bias = low | high << 16, {"bf16": 0x4300, "fp16": 0x6400}[dtype]
    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float16
    for quarter, place in enumerate(FOLD_ORDER):
        text = folded_pieces.BIASED.value[quarter + 4 * (dtype == "fp16")]
        shift = re.search(r"shr\.u32 t, \$1, (\d+);", text)
        mask, added, table = (int(v, 16) for v in re.search(r"(0x\w+), (0x\w+), (0x\w+);", text).groups())
        assert (mask, added, table) == (0x000F000F, bias << 16 | bias, 0xEA)  # 0xEA: a & b | c
        bits = (word >> (int(shift[1]) if shift else 0)) & mask | added
        floats = torch.tensor([bits & 0xFFFF, bits >> 16], dtype=torch.int32).to(torch.int16).view(torch_dtype)
        wanted = [(half >> 4 * place & 15) for half in (low, high)]
        less = -torch.tensor([bias], dtype=torch.int32).to(torch.int16).view(torch_dtype) - zero
        assert (floats + less).tolist() == [float(code - zero) for code in wanted]


@pytest.mark.parametrize("kind", [INT, FP8])
@pytest.mark.parametrize("config", [QuantConfig("words", 1, 8, 1024), QuantConfig("words", 1, 4, 2048)], ids=str)
def test_words_and_inputs_meet_where_they_are_loaded(monkeypatch, kind, config):
    """Threads exchange nothing as long as there are weights to read: codes and inputs have one layout."""
    monkeypatch.setattr(quant_aot, "quant_config", lambda *_: config)
    spec = specialization(SM90, (kind, 8, 1, 0, False, 0), 2, 1, "bfloat16", 2)
    resources, compiled = compile_one(spec, "sm_90")
    loop = compiled.asm["ttgir"].split("scf.for")[1].split("scf.yield")[0]
    assert loop.count("tt.load") == 3 and "convert_layout" not in loop and "tt.reduce" not in loop
    assert resources.spills == 0
    ptx = compiled.asm["ptx"]
    assert 0 < ptx.index("ld.global") < ptx.index("griddepcontrol.wait") < ptx.index("st.global")


@pytest.mark.parametrize("rows", [64, 128])
def test_halves_of_16_tokens_share_a_conversion(monkeypatch, rows):
    """Each code is converted once, for two products of 8 tokens, which take it from the registers it is in."""
    config = QuantConfig("tile", 16, rows, 256, rows // 16, 3, halves=True)
    monkeypatch.setattr(quant_aot, "quant_config", lambda *_: config)
    spec = specialization(SM90, (FP8, 8, 1, 0, False, 0), 2, 16, "bfloat16", 2)
    resources, compiled = compile_one(spec, "sm_90")
    ptx, codes = compiled.asm["ptx"], rows * 256 // (32 * config.num_warps)  # of a thread
    assert resources.spills == 0 and "wgmma" not in ptx
    assert ptx.count("cvt.rn.f16x2.e4m3x2") == codes // 2
    assert ptx.count("mma.sync.aligned.m16n8k16") == 2 * codes // 8
