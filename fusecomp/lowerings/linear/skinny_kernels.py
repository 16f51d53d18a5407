"""Kernels of a linear layer with few tokens: bound by reading the weights once, in one launch.

Legend: T tokens, N features of the output, K inputs, G accumulator groups (2: gate and up, merged by rows), BR, BK
rows and columns of a weight tile, BN = BR / G features of a tile, BT tokens of an accumulator, S splits of K.

out[T, N] = EPILOGUE(norm(x)[T, K] @ weight[G * N, K]^T). A tile interleaves the rows of its groups (feature 0 of
gate, feature 0 of up, ...), so one product serves all groups. The sum of squares that RMSNorm needs is free, for every
program reads all of its tokens' inputs anyway: the norm's weight multiplies x as it is loaded, its scale multiplies
the accumulator.

Under dependent launch (USE_PDL) a program asks for its first weight tile, and may ask the L2 for those after it,
before it waits for the kernel before; activations, scratch and counters are touched only after. Thus a launch begins
reading while the one before it ends, and consecutive launches may share scratch and counters.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def plain(accs, args, strides, m, n, mask):
    """The epilogue that does nothing."""
    return accs[0]


@triton.jit
def gemv_kernel(
    x,  # [1, K]
    weight,  # [G * N, K] contiguous
    out,  # [1, N]
    norm_weight,  # [K], or None
    args,  # tuple of the epilogue's operands
    strides,  # tuple of their row strides
    n,
    k,
    eps,
    G: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    NORM: tl.constexpr,
    EPILOGUE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One token: plain products over register tiles, one program per BN features and all of K.

    NORM: 0 no norm, 1 RMSNorm without weight, 2 with weight w, 3 with 1 + w.
    dtypes: x, weight, norm_weight, out one of fp32, fp16, bf16; products and sums fp32.
    Bytes: (G * N * K + K + N) * itemsize. FLOPs: 2 * G * N * K. Bound by reading the weights.
    """
    VEC: tl.constexpr = 128 // weight.dtype.element_ty.primitive_bitwidth  # elements of a 16-byte load
    BLOCK_N: tl.constexpr = BLOCK_R // G
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    cols = tl.arange(0, BLOCK_K)[None, :]
    tile_at = weight + _rows(first, n, BLOCK_R, G)[:, None] * k + cols

    w = _load_weight(tile_at, cols < k, EVEN_K)
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()

    # Sums of VEC neighbours stay within a thread; threads meet once, after the loop.
    acc = tl.zeros([BLOCK_R, BLOCK_K // VEC], tl.float32)
    squares = tl.zeros([1, BLOCK_K // VEC], tl.float32)
    v = _load_inputs(x + cols, cols < k, EVEN_K)
    g = _load_factors(norm_weight, cols, k, EVEN_K, NORM)
    for start in range(BLOCK_K, k, BLOCK_K):  # loads one tile, multiplies the one before
        w_next = _load_weight(tile_at + start, start + cols < k, EVEN_K)
        v_next = _load_inputs(x + start + cols, start + cols < k, EVEN_K)
        g_next = _load_factors(norm_weight, start + cols, k, EVEN_K, NORM)
        if NORM > 0:
            squares += _fold(v * v, VEC)
        acc += _fold(w.to(tl.float32) * (v * _factor(g, NORM)), VEC)
        w, v, g = w_next, v_next, g_next
    acc += _fold(w.to(tl.float32) * (v * _factor(g, NORM)), VEC)
    y = tl.sum(acc, 1)[:, None]  # [BR, 1]
    if NORM > 0:
        squares += _fold(v * v, VEC)
        y *= _scale(tl.sum(squares, 1), k, eps)[:, None]

    features = (first + tl.arange(0, BLOCK_N))[:, None]
    mask = features < n
    y = EPILOGUE(_groups(y, G), args, strides, tl.zeros([1, 1], tl.int64), features, mask)
    tl.store(out + features, y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "per_split"])
def skinny_kernel(
    x,  # [T, K], last dim contiguous
    weight,  # [G * N, K] contiguous
    out,  # [T, N], last dim contiguous
    norm_weight,  # [K], or None
    partials,  # [programs, BR, BT] fp32, scratch
    part_squares,  # [programs, BT] fp32, scratch
    counters,  # [programs / S] int32, zero before and after the launch
    args,  # tuple of the epilogue's operands
    strides,  # tuple of their row strides
    num_tokens,
    n,
    k,
    per_split,  # weight tiles along K of one split; no split is empty
    eps,
    stride_x,
    stride_out,
    G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    PIPELINED: tl.constexpr,  # tiles that the compiler's pipeline has in flight; 0 keeps one in registers
    AHEAD: tl.constexpr,  # tiles whose inputs are in flight
    PREFETCH: tl.constexpr,  # tiles that the L2 is asked for before the wait
    LEAD: tl.constexpr,  # tiles before its last at which a program lets the next launch begin; 0 lets it at once
    EVEN_K: tl.constexpr,
    NORM: tl.constexpr,
    EXACT_NORM: tl.constexpr,
    EPILOGUE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Up to BT tokens per program on the narrow side of the matrix units, weights on the wide one.

    A program owns BN features of BT tokens and one split of K. With S > 1 the last of the S programs to arrive sums
    their partial results in order of the splits, so results do not depend on who was last.

    PIPELINED: the compiler's pipeline of asynchronous copies; otherwise one tile is in registers while the next loads.
    NORM: as in `gemv_kernel`. EXACT_NORM: normalize the inputs before the product, as fp16 needs, where x * w may
    overflow; x is read twice.
    dtypes: x, weight, norm_weight, out one of fp32, fp16, bf16; operands of the product in weight's, sums fp32.
    Bytes: G * N * K * itemsize, plus T * K * itemsize from the L2 per BN features, plus 8 * S * G * N * BT of partials
    if S > 1. FLOPs: 2 * T * G * N * K.
    """
    BLOCK_N: tl.constexpr = BLOCK_R // G
    t_blocks = tl.cdiv(num_tokens, BLOCK_T)  # programs of the same weights are neighbours
    t_block = tl.program_id(0) % t_blocks
    split = tl.program_id(0) // t_blocks % SPLITS
    block = tl.program_id(0) // t_blocks // SPLITS
    first = block.to(tl.int64) * BLOCK_N
    lo = split * per_split
    hi = tl.minimum(lo + per_split, tl.cdiv(k, BLOCK_K))
    t = (t_block * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[None, :]
    live = t < num_tokens
    row_at = weight + _rows(first, n, BLOCK_R, G)[:, None] * k
    cols = tl.arange(0, BLOCK_K)
    tile_at = row_at + cols[None, :]
    x_at = x + t * stride_x + cols[:, None]

    acc = tl.zeros([BLOCK_R, BLOCK_T], tl.float32)
    squares = tl.zeros([BLOCK_K // 8, BLOCK_T], tl.float32)
    scale = tl.full([1, BLOCK_T], 1.0, tl.float32)
    SUM_SQUARES: tl.constexpr = NORM > 0 and not EXACT_NORM
    start = lo * BLOCK_K
    if not PIPELINED:
        w = _load_weight(tile_at + start, (start + cols < k)[None, :], EVEN_K)
    if USE_PDL and LEAD == 0:
        gdc_launch_dependents()
    if PIPELINED:
        # Inputs and factors of the next AHEAD tiles. Loads of nothing: the loop carries them in their loads' layout.
        vs, gs = (), ()
        for i in tl.static_range(AHEAD):
            vs += (tl.load(x_at, mask=live & (num_tokens < 0), other=0.0),)
            gs += (_load_factors(norm_weight, _spread(start + i * BLOCK_K + cols, BLOCK_T), k, False, NORM),)
        for tile in range(lo, hi):
            # The pipeline asks for the weights of its first stages before the loop, hence the wait is within: it and
            # all loads of inputs stand in branches, which the pipeline leaves in their place.
            start = tile * BLOCK_K
            w = _load_weight(tile_at + start, (start + cols < k)[None, :], EVEN_K)
            if tile == lo:
                if USE_PDL:
                    for i in tl.static_range(PREFETCH):
                        if lo + PIPELINED + i < hi:
                            _prefetch(row_at, (lo + PIPELINED + i) * BLOCK_K, k, BLOCK_K)
                    gdc_wait()
                if EXACT_NORM:
                    scale = _scale(_sum_squares(x_at, cols[:, None], live, k, BLOCK_T, BLOCK_K), k, eps)[None, :]
                vs = ()
                for i in tl.static_range(AHEAD):
                    at = start + i * BLOCK_K
                    vs += (_load_tokens(x_at + at, at + cols[:, None], live, k, False),)
            if USE_PDL and LEAD > 0:
                if tile == tl.maximum(hi - LEAD, lo):
                    gdc_launch_dependents()
            squares = _add_squares(squares, vs[0], SUM_SQUARES)
            y = _normalize(vs[0], gs[0], scale, NORM)
            v, g = vs[0], gs[0]
            if tile + AHEAD < hi:
                start += AHEAD * BLOCK_K
                v = _load_tokens(x_at + start, start + cols[:, None], live, k, EVEN_K)
                g = _load_factors(norm_weight, _spread(start + cols, BLOCK_T), k, EVEN_K, NORM)
            vs, gs = _shift(vs, v, tile < hi), _shift(gs, g, tile < hi)
            acc = tl.dot(w, y, acc, input_precision="ieee")
    else:
        if USE_PDL:
            gdc_wait()
        if EXACT_NORM:
            scale = _scale(_sum_squares(x_at, cols[:, None], live, k, BLOCK_T, BLOCK_K), k, eps)[None, :]
        v = _load_tokens(x_at + start, start + cols[:, None], live, k, EVEN_K)
        g = _load_factors(norm_weight, _spread(start + cols, BLOCK_T), k, EVEN_K, NORM)
        for tile in range(lo + 1, hi):  # loads one tile, multiplies the one before
            start = tile * BLOCK_K
            w_next = _load_weight(tile_at + start, (start + cols < k)[None, :], EVEN_K)
            v_next = _load_tokens(x_at + start, start + cols[:, None], live, k, EVEN_K)
            g_next = _load_factors(norm_weight, _spread(start + cols, BLOCK_T), k, EVEN_K, NORM)
            squares = _add_squares(squares, v, SUM_SQUARES)
            acc = tl.dot(w, _normalize(v, g, scale, NORM), acc, input_precision="ieee")
            w, v, g = w_next, v_next, g_next
        squares = _add_squares(squares, v, SUM_SQUARES)
        acc = tl.dot(w, _normalize(v, g, scale, NORM), acc, input_precision="ieee")

    sum_squares = tl.sum(squares, 0)  # [BT]
    last = True
    if SPLITS > 1:
        team = block.to(tl.int64) * t_blocks + t_block
        part_at = partials + tl.arange(0, BLOCK_R)[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
        part_squares_at = part_squares + tl.arange(0, BLOCK_T)
        mine = team * SPLITS + split
        tl.store(part_at + mine * (BLOCK_R * BLOCK_T), acc)
        if SUM_SQUARES:
            tl.store(part_squares_at + mine * BLOCK_T, sum_squares)
        tl.debug_barrier()  # all of the program's stores precede the release below
        last = tl.atomic_add(counters + team, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if last:
            tl.store(counters + team, 0)
            acc = tl.zeros([BLOCK_R, BLOCK_T], tl.float32)
            sum_squares = tl.zeros([BLOCK_T], tl.float32)
            for s in tl.static_range(SPLITS):
                acc += tl.load(part_at + (team * SPLITS + s) * (BLOCK_R * BLOCK_T), cache_modifier=".cg")
                if SUM_SQUARES:
                    sum_squares += tl.load(part_squares_at + (team * SPLITS + s) * BLOCK_T, cache_modifier=".cg")
    if last:
        if SUM_SQUARES:
            acc *= _scale(sum_squares, k, eps)[None, :]
        features = (first + tl.arange(0, BLOCK_N))[:, None]
        mask = (features < n) & live
        y = EPILOGUE(_groups(acc, G), args, strides, t, features, mask)
        tl.store(out + t * stride_out + features, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _rows(first, n, BLOCK_R: tl.constexpr, G: tl.constexpr):
    """[BR] int64 rows of the weight, groups interleaved. Features past N read the last one; they are not stored."""
    r = tl.arange(0, BLOCK_R)
    return tl.minimum(first + r // G, n - 1) + (r % G).to(tl.int64) * n


@triton.jit
def _groups(acc, G: tl.constexpr):
    """[BR, C] -> tuple of G tiles [BN, C]."""
    if G == 1:
        return (acc,)
    else:
        return tl.split(tl.permute(tl.reshape(acc, [acc.shape[0] // 2, 2, acc.shape[1]]), [0, 2, 1]))


@triton.jit
def _load_weight(at, mask, EVEN_K: tl.constexpr):
    if EVEN_K:
        return tl.load(at, eviction_policy="evict_first")
    else:
        return tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _load_inputs(at, mask, EVEN_K: tl.constexpr):
    """Inputs of one token in fp32, zero past K."""
    if EVEN_K:
        return tl.load(at, eviction_policy="evict_last").to(tl.float32)
    else:
        return tl.load(at, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)


@triton.jit
def _load_tokens(at, cols, live, k, EVEN_K: tl.constexpr):
    """[BK, BT] inputs, zero for tokens past T and columns past K."""
    if EVEN_K:
        return tl.load(at, mask=live, other=0.0, eviction_policy="evict_last")
    else:
        return tl.load(at, mask=live & (cols < k), other=0.0, eviction_policy="evict_last")


@triton.jit
def _load_factors(norm_weight, cols, k, EVEN_K: tl.constexpr, NORM: tl.constexpr):
    """The norm's weight in `cols`, zero past K; 1 where there is none."""
    if NORM <= 1:
        return tl.full([1, 1], 1.0, tl.float32)
    else:
        if EVEN_K:
            return tl.load(norm_weight + cols, eviction_policy="evict_last")
        else:
            return tl.load(norm_weight + cols, mask=cols < k, other=0.0, eviction_policy="evict_last")


@triton.jit
def _spread(cols, BLOCK_T: tl.constexpr):
    """[BK] -> [BK, BT]: loads of the norm's weight are then laid out, and as wide, as those of the inputs."""
    return tl.broadcast_to(cols[:, None], [cols.shape[0], BLOCK_T])


@triton.jit
def _shift(queue, last, true):
    """Drop the first, append `last`. The pipeline refuses loops that hand a value on unchanged, hence the selection."""
    shifted = ()
    for i in tl.static_range(1, len(queue)):
        shifted += (tl.where(true, queue[i], last),)
    shifted += (last,)
    return shifted


@triton.jit
def _fold(x, VEC: tl.constexpr):
    """[R, C] -> [R, C / VEC]: sums of VEC neighbours."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // VEC, VEC]), 2)


@triton.jit
def _add_squares(squares, v, SUM_SQUARES: tl.constexpr):
    """Adds the squares of 8 neighbours along K, which stay within a thread."""
    if SUM_SQUARES:
        v = v.to(tl.float32)
        squares += tl.sum(tl.reshape(v * v, [squares.shape[0], 8, squares.shape[1]]), 1)
    return squares


@triton.jit
def _normalize(v, g, scale, NORM: tl.constexpr):
    """[BK, BT], the product's operand: inputs times the norm's factors, in the inputs' dtype."""
    if NORM > 0:
        v = (v.to(tl.float32) * scale * _factor(g, NORM)).to(v.dtype)
    return v


@triton.jit
def _factor(g, NORM: tl.constexpr):
    g = g.to(tl.float32)
    if NORM == 3:
        g += 1.0
    return g


@triton.jit
def _sum_squares(x_at, cols, live, k, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BT] sums of squares of whole tokens."""
    squares = tl.zeros([BLOCK_K, BLOCK_T], tl.float32)
    for start in range(0, k, BLOCK_K):
        v = _load_tokens(x_at + start, start + cols, live, k, False).to(tl.float32)
        squares += v * v
    return tl.sum(squares, 0)


@triton.jit
def _scale(sum_squares, k, eps):
    """RMSNorm's factor of each token."""
    return tl.rsqrt(sum_squares / k + eps)


@triton.jit
def _prefetch(row_at, start, k, BLOCK_K: tl.constexpr):
    """Ask the L2 for the lines of BK columns from `start` on, up to the last one."""
    LINE: tl.constexpr = 1024 // row_at.dtype.element_ty.primitive_bitwidth
    lines = row_at + tl.minimum(start + tl.arange(0, BLOCK_K // LINE) * LINE, k - 1)[None, :]
    asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(asm, "=r,l", [lines.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)
