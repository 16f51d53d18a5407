"""Weights of experts asked into the L2 while a router chooses: its launches leave the memory idle for microseconds.

Few tokens touch few experts, so the first bytes of those chosen are asked for, by several programs a token; many touch
nearly all, so the first bytes of the layer are asked for before anything is known of the choice.

Legend: T tokens, K chosen per token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from fusecomp.lowerings.paged_attention.heuristics import Target

ALIGNMENT = 16  # bytes of an address, and of a size, that is asked for


@dataclass(frozen=True)
class Ahead:
    """What a choice of experts asks the L2 for.

    Attributes:
        expert_bytes: of one expert's up projection.
        parts: halves of it whose first bytes are wanted: gate and up, or 1.
        size: bytes of each part that one program asks for, of every expert it chose; `early`, of the layer in all.
        programs: of one token. The first writes what is chosen; each asks for the next `size` bytes.
        early: ask before the choice is known.
    """

    expert_bytes: int
    parts: int
    size: int
    programs: int = 1
    early: bool = False

    @property
    def constants(self) -> dict[str, int | bool]:
        """The constexpr arguments of `route_kernel`."""
        return {
            "AHEAD": self.size, "EARLY": self.early, "PARTS": self.parts, "EXPERT_BYTES": self.expert_bytes,
            "PROGRAMS": self.programs,
        }  # fmt: skip


def ahead_of(target: Target, tokens: int, up: Tensor, top_k: int) -> Ahead | None:
    """What the choice of `top_k` experts of `up` [E, ...] for each token asks for; None if nothing."""
    size = up[0].numel() * up.element_size()
    if not target.has_pdl or not up.is_contiguous() or size % (2 * ALIGNMENT) or up.data_ptr() % ALIGNMENT:
        return None
    return None


@dataclass(frozen=True)
class Later:
    """A weight that is read after the experts, of which the L2 is asked for the first bytes while they are chosen."""

    weight: Tensor
    size: int

    def per_program(self, programs: int, num_warps: int) -> int:
        """Bytes that each of some programs asks for, a multiple of what its threads take."""
        threads = 32 * num_warps * ALIGNMENT
        return min(self.size, self.weight.numel() * self.weight.element_size()) // programs // threads * threads


@triton.jit
def ask_for_piece(weights, program, SIZE: tl.constexpr, THREADS: tl.constexpr):
    """Ask for the program's SIZE bytes from `weights` on, by THREADS that have as much each."""
    PIECE: tl.constexpr = SIZE // THREADS
    at = program.to(tl.int64) * SIZE + tl.arange(0, THREADS).to(tl.int64) * PIECE
    _ask(weights.to(tl.int64) + at, at >= 0, PIECE)


@triton.jit
def ask_for_experts(
    weights, expert, live, program, SIZE: tl.constexpr, PARTS: tl.constexpr, EXPERT_BYTES: tl.constexpr
):
    """Ask for the program's SIZE bytes of each part of the experts [1, W] that are live."""
    at = weights.to(tl.int64) + expert.to(tl.int64) * EXPERT_BYTES + program * SIZE
    for part in tl.static_range(PARTS):
        _ask(at + part * (EXPERT_BYTES // PARTS), live, SIZE)


@triton.jit
def _ask(at, live, SIZE: tl.constexpr):
    asm: tl.constexpr = (
        "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }"
    )
    size = tl.zeros_like(at).to(tl.int32) + SIZE
    tl.inline_asm_elementwise(
        asm, "=r,l,r,r", [at, size, live.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1
    )  # fmt: skip
