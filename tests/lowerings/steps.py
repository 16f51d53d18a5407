"""Random packed steps for the attention tests and benchmarks.

Legend: T tokens, S rows, P pages per row, H query heads, G kv heads, D head dim, B page size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.lowerings import reference

NOT_A_NUMBER = float("nan")


@dataclass
class Step:
    """Inputs of `cache_write` and `paged_attention`; the cache holds the prefixes and NaN everywhere else."""

    q: Tensor
    k: Tensor
    v: Tensor
    kv_cache: Tensor
    slots: Tensor
    cu_q_lens: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    host_meta: Tensor

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
    kv_cache = torch.randn(sum(need) + 2, 2, kv_heads, page_size, head_dim, **options)
    used = torch.zeros(sum(need) + 2, page_size, dtype=torch.bool)
    for row, (cached, _) in enumerate(rows):
        p = torch.arange(cached)
        used[block_tables[row, p // page_size].long(), p % page_size] = True
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
    )


def relative_error(out: Tensor, exact: Tensor) -> float:
    """||out - exact|| / ||exact||, infinite if out has a NaN."""
    if not out.isfinite().all():
        return float("inf")
    norm = exact.norm().item()
    return (out.to(exact.dtype) - exact).norm().item() / norm if norm else out.abs().max().item()


def check_attention(step: Step, out: Tensor, scale: float, window: int, softcap: float, sinks: Tensor | None) -> None:
    """Error against fp64 at most 1.5 times that of unfused eager attention in q's dtype, or one rounding of it."""
    rows = (step.q, step.kv_cache, step.cu_q_lens, step.seq_lens, step.block_tables, scale, window, softcap, sinks)
    exact = reference.paged_attention(*rows)
    eager = reference.paged_attention(*rows, dtype=step.q.dtype)
    error = relative_error(out, exact)
    bound = max(1.5 * relative_error(eager, exact), torch.finfo(step.q.dtype).eps)
    assert out.shape == step.q.shape and out.is_contiguous() and out.dtype == step.q.dtype
    assert error <= bound, f"relative error {error:.2e} above {bound:.2e}"
    padding = step.seq_lens == 0
    if padding.any():
        assert not out[step.cu_q_lens[:-1][padding].long()].any(), "a padding row is not zero"
