"""Random packed steps for the attention tests and benchmarks.

Legend: T tokens, S rows, P pages per row, H query heads, G kv heads, D head dim, B page size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusecomp.ops.kv_cache import KVLayout, fill_random
from fusecomp.ops.rope import Rope
from tests.lowerings import reference

NOT_A_NUMBER = float("nan")


@dataclass
class Step:
    """Inputs of `cache_write` and `paged_attention`; the cache holds the prefixes and NaN everywhere else.

    A quantized one holds the bytes 255 instead, which as codes and as scales are NaN too.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    kv_cache: Tensor
    slots: Tensor
    cu_q_lens: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    host_meta: Tensor
    page_size: int

    def plain_cache(self) -> Tensor:
        """The cache [num_blocks, 2, G, B, D], in fp64 if it is quantized."""
        if self.kv_cache.dim() == 5:
            return self.kv_cache
        return reference.unpack(self.kv_cache, self.page_size, self.q.shape[2])

    def attention_inputs(self) -> tuple[Tensor, ...]:
        return (
            self.q, self.k, self.v, self.kv_cache, self.cu_q_lens, self.seq_lens, self.block_tables, self.host_meta
        )  # fmt: skip


def make_step(
    rows: list[tuple[int, int]],
    *,
    padding: int = 0,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    quantized: bool = False,
) -> Step:
    """A step of `rows` = (cached, new) lengths, decodes first, and `padding` rows of length 0 after the decodes.

    q is a transposed view and k, v are slices of one projection, as a model produces them. Pages are a random
    permutation; page 0 is NaN, and the entries of a block table that must not be read point to it.
    """
    torch.manual_seed(seed)
    decodes = sum(new == 1 for _, new in rows)
    assert all(new == 1 for _, new in rows[:decodes]), "decodes come first"
    assert not padding or decodes == len(rows), "padding exists in decode steps only"
    lengths = [cached + new for cached, new in rows] + [0] * padding
    new = [n for _, n in rows] + [1] * padding
    tokens = sum(new)
    need = [-(-n // page_size) for n in lengths]
    pages = torch.randperm(sum(need) + 2)
    pages = pages[pages != 0][: sum(need)]
    block_tables = torch.zeros(len(lengths), max(need) + 1, dtype=torch.int32)
    for row, own in enumerate(pages.split(need)):
        block_tables[row, : len(own)] = own
    slots = [
        block_tables[row, p // page_size].item() * page_size + p % page_size if lengths[row] else -1
        for row, n in enumerate(new)
        for p in range(lengths[row] - n, lengths[row])
    ]
    options = {"dtype": dtype, "device": device}
    layout = KVLayout(kv_heads, page_size, head_dim, quantized)
    kv_cache = layout.zeros(sum(need) + 2, dtype, device)
    fill_random(kv_cache, head_dim)
    used = torch.zeros(sum(need) + 2, page_size, dtype=torch.bool)
    for row, (cached, _) in enumerate(rows):
        p = torch.arange(cached)
        used[block_tables[row, p // page_size].long(), p % page_size] = True
    if quantized:
        scales = layout.scales(kv_cache)  # a power of two each
        scales.copy_(torch.randint(-9, -2, scales.shape, device=device).float().exp2())
        codes = layout.codes(kv_cache)
        codes |= torch.randint(0, 2, codes.shape, dtype=torch.uint8, device=device) << 7
        codes.movedim(3, 1)[~used.to(device)] = 255
        scales.view(torch.uint8).transpose(1, 2)[~used.to(device)] = 255
    else:
        kv_cache.movedim(3, 1)[~used.to(device)] = NOT_A_NUMBER
    kv = torch.randn(tokens, 2 * kv_heads, head_dim, **options)
    int32 = {"dtype": torch.int32, "device": device}
    return Step(
        q=torch.randn(heads, tokens, head_dim, **options).transpose(0, 1),
        k=kv[:, :kv_heads],
        v=kv[:, kv_heads:],
        kv_cache=kv_cache,
        slots=torch.tensor(slots, device=device),
        cu_q_lens=torch.tensor([0, *new], **int32).cumsum(0).to(torch.int32),
        seq_lens=torch.tensor(lengths, **int32),
        block_tables=block_tables.to(device),
        host_meta=torch.tensor([decodes + padding, max(new), max(lengths), len(lengths)], dtype=torch.int32),
        page_size=page_size,
    )


def padded(step: Step, decodes: int, prefills: int, tokens: int) -> Step:
    """The step in the layout of a `MixedShape` with so many more rows and tokens; the cache is the same tensor."""
    nd, T = int(step.host_meta[0]), step.q.shape[0]
    rows = len(step.seq_lens) - nd + prefills + nd + decodes

    def more(x: Tensor, value: int) -> Tensor:
        """`x` [S, ...] with the padding's rows in place."""
        out = x.new_full((rows, *x.shape[1:]), value)
        out[:nd], out[nd + decodes : len(x) + decodes] = x[:nd], x[nd:]
        return out

    seq_lens = more(step.seq_lens, 0)
    seq_lens[len(step.seq_lens) + decodes] = tokens
    ends = more(step.cu_q_lens[1:], T + tokens)
    ends[nd : nd + decodes] = nd
    kv = torch.cat([step.k, step.v], 1)
    kv = torch.cat([kv, torch.randn_like(kv[:1]).expand(tokens, -1, -1)])
    heads = step.q.transpose(0, 1)
    return Step(
        q=torch.cat([heads, torch.randn_like(heads[:, :1]).expand(-1, tokens, -1)], 1).transpose(0, 1),
        k=kv[:, : step.k.shape[1]],
        v=kv[:, step.k.shape[1] :],
        kv_cache=step.kv_cache,
        slots=torch.cat([step.slots, step.slots.new_full((tokens,), -1)]),
        cu_q_lens=torch.cat([ends.new_zeros(1), ends]),
        seq_lens=seq_lens,
        block_tables=more(step.block_tables, 0),
        host_meta=torch.tensor([nd + decodes, T + tokens, int(step.host_meta[2]) + 999, rows], dtype=torch.int32),
        page_size=step.page_size,
    )


@dataclass
class RopeInputs:
    """What `rope_attention` takes beside a step: tables of arbitrary numbers, norm weights, and the rule."""

    cos: Tensor | None
    sin: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    rope: Rope

    def arguments(self, step: Step, mode: tuple) -> tuple:
        """Arguments of the op on a step; `mode` is (scale, window, softcap, sinks)."""
        q, k, v, kv_cache, *rest = step.attention_inputs()
        return (
            q, k, v, self.cos, self.sin, self.q_norm, self.k_norm, kv_cache, step.slots, *rest, *mode, str(self.rope)
        )  # fmt: skip


def make_rope(step: Step, rope: Rope, *, table_dtype: torch.dtype, weights: bool = True, seed: int = 0) -> RopeInputs:
    """Tables [T, columns] (the columns of a wider tensor) of unrelated cosines and sines, and weights for a step."""
    torch.manual_seed(seed)
    tokens, _, head_dim = step.q.shape
    tables = torch.randn(2, tokens, max(rope.columns(), 1) + 3, device=step.q.device).mul(9).cos().to(table_dtype)
    tables[:, :, rope.columns() :] = NOT_A_NUMBER
    norms = torch.randn(2, head_dim, dtype=step.q.dtype, device=step.q.device)
    cos, sin = tables if rope.dims else (None, None)
    q_norm, k_norm = norms if rope.norm != "none" and weights else (None, None)
    return RopeInputs(cos, sin, q_norm, k_norm, rope)


def check_rope_attention(before: Step, after: Step, given: RopeInputs, out: Tensor, mode: tuple) -> None:
    """As `check_attention`, from raw q, k, v and the cache `before`; also what was written to the cache `after`.

    Raises:
        AssertionError: an error above 1.5 times that of the unfused computation, a wrong value or a changed slot.
    """
    quantized = before.kv_cache.dtype == torch.uint8
    results = []
    for dtype in (torch.float64, before.q.dtype):
        q, k = (
            reference.rotate(x, given.cos, given.sin, weight, given.rope, dtype)
            for x, weight in ((before.q, given.q_norm), (before.k, given.k_norm))
        )
        if quantized:  # nearly tied codes may fall either way: what was written is judged below, and read here
            cache = after.plain_cache().to(dtype)
        else:
            cache = before.kv_cache.to(dtype)
            reference.cache_write(k, before.v.to(dtype), cache, before.slots)
        rows = (before.cu_q_lens, before.seq_lens, before.block_tables)
        results.append((reference.paged_attention(q, cache, *rows, *mode, dtype=dtype), k, cache))
    (exact, exact_k, exact_cache), (eager, eager_k, _) = results
    eps = 2 * torch.finfo(before.q.dtype).eps  # one rounding of the rotated heads, one of the result
    bound = max(1.5 * relative_error(eager, exact), eps)
    error = relative_error(out, exact)
    assert out.shape == before.q.shape and out.is_contiguous() and out.dtype == before.q.dtype
    assert error <= bound, f"relative error {error:.2e} above {bound:.2e}"
    padding = before.seq_lens == 0
    if padding.any():
        assert not out[before.cu_q_lens[:-1][padding].long()].any(), "a padding row is not zero"
    kept = before.slots >= 0
    slots = before.slots[kept]
    block, offset = slots // before.page_size, slots % before.page_size
    written = torch.zeros(before.kv_cache.shape[0], before.page_size, dtype=torch.bool, device=slots.device)
    written[block, offset] = True
    old, new = (step.plain_cache().movedim(3, 1)[~written] for step in (before, after))
    assert torch.equal(old.nan_to_num(7.0), new.nan_to_num(7.0)), "a slot that is not of the step changed"
    if quantized:
        stored = exact_cache.movedim(3, 1)[block, offset]  # [n, 2, G, D], of the step's tokens in order
        assert torch.equal(stored[:, 1], reference.quantized(before.v[kept])), "values are not the nearest codes"
        bound = 1.5 * relative_error(reference.quantized(eager_k[kept]), exact_k[kept])
        assert relative_error(stored[:, 0], exact_k[kept]) <= max(bound, eps)
        return
    stored, expected = (cache.movedim(3, 1)[written] for cache in (after.kv_cache, exact_cache))  # [n, 2, G, D]
    assert torch.equal(stored[:, 1].to(expected.dtype), expected[:, 1]), "values were not copied"
    bound = max(1.5 * relative_error(eager_k, exact_k), eps)
    assert relative_error(stored[:, 0], expected[:, 0]) <= bound


def relative_error(out: Tensor, exact: Tensor) -> float:
    """||out - exact|| / ||exact||, infinite if out has a NaN."""
    if not out.isfinite().all():
        return float("inf")
    norm = exact.norm().item()
    return (out.to(exact.dtype) - exact).norm().item() / norm if norm else out.abs().max().item()


def check_attention(step: Step, out: Tensor, scale: float, window: int, softcap: float, sinks: Tensor | None) -> None:
    """Error against fp64 at most 1.5 times that of unfused eager attention in q's dtype, or one rounding of it."""
    rows = (step.q, step.plain_cache(), step.cu_q_lens, step.seq_lens, step.block_tables, scale, window, softcap, sinks)
    exact = reference.paged_attention(*rows)
    eager = reference.paged_attention(*rows, dtype=step.q.dtype)
    error = relative_error(out, exact)
    bound = max(1.5 * relative_error(eager, exact), torch.finfo(step.q.dtype).eps)
    assert out.shape == step.q.shape and out.is_contiguous() and out.dtype == step.q.dtype
    assert error <= bound, f"relative error {error:.2e} above {bound:.2e}"
    padding = step.seq_lens == 0
    if padding.any():
        assert not out[step.cu_q_lens[:-1][padding].long()].any(), "a padding row is not zero"
