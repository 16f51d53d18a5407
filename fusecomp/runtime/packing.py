"""Start-up check that the packed step keeps sequences apart and loses nothing between steps.

The step packs all sequences along one axis, and only attention knows where one ends. An operation elsewhere that mixes
tokens (a convolution, a token shift, a mean, a scan, state kept in a buffer) would read a neighbour, and would lose its
past when a sequence continues in a later step. Nothing about a graph says that reliably; a few tiny steps do:

- the same prompts in the opposite order, beside another prompt in the middle: equal shapes, so a sound model's logits
  agree almost bitwise in every dtype;
- whole prompts against prompts whose last token is decoded on cached keys: other kernels, so rounding is allowed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusecomp.errors import UnsupportedModelError, VerificationError

if TYPE_CHECKING:
    from fusecomp.runtime.engine import Engine

# Prompt lengths, the largest set that fits is taken. Short ones end close to their neighbours; positions run on from
# row to row in the second list, as if all were one sequence.
PACKED = ((3, 1, 12, 2, 1), (2, 4, 1), (1, 1))
DECODED = ((4, 5, 6, 7, 8), (2, 3, 4), (2, 3), (2,))
# More tokens than any narrow tile, keys of more than one segment, and rows of few; then what fits smaller engines.
INVARIANT = ((700, 150, 33, 2), (150, 33, 17, 2), (40, 5, 2), (5, 2), (2,))
MOST_BLOCKS = max(map(sum, (*PACKED, *DECODED)))  # of the KV cache that are written, whatever their size
# Allowed relative error in units of the dtype's epsilon, and at least so much (fp32 sums may run as TF32 on a GPU).
SAME_SHAPES, OTHER_SHAPES = (8, 1e-3), (32, 1e-2)


def row_errors(actual: Tensor, exact: Tensor) -> list[float]:
    """Relative RMS error of each row [S, V]. A row that is not finite in both says nothing and is left out."""
    errors = []
    for a, e in zip(actual.double(), exact.double(), strict=True):
        finite = bool(torch.isfinite(a).all()), bool(torch.isfinite(e).all())
        if all(finite):
            difference = float((a - e).norm())
            errors.append(difference / max(float(e.norm()), 1e-30) if difference else 0.0)
        elif any(finite):
            errors.append(float("inf"))
    return errors


def _fitting(engine: Engine, choices: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """The first of `choices` that fits one step and the KV cache; empty when none does."""
    config, blocks_for = engine.config, lambda n: -(-n // engine.config.block_size)
    assert config.max_model_len is not None
    for lengths in choices:
        if (
            len(lengths) <= config.max_num_seqs
            and max(lengths) <= config.max_model_len
            and sum(lengths) <= config.max_num_batched_tokens
            and sum(map(blocks_for, lengths)) <= engine.num_kv_blocks
        ):
            return lengths
    return ()


def _judge(engine: Engine, actual: Tensor, exact: Tensor, limits: tuple[int, float], what: str, why: str) -> None:
    errors = sorted(row_errors(actual, exact))
    if not errors:
        return
    ops = engine.report.ops_before
    # Nearly tied routing scores may fall either way under any rounding: then the row in the middle is judged. A model
    # that mixes tokens is wrong in every row.
    tied = exact.dtype != torch.float32 and ("topk" in ops or engine.report.count("experts") > 0)
    error = errors[(len(errors) - 1) // 2] if tied else errors[-1]
    allowed = max(limits[0] * torch.finfo(exact.dtype).eps, limits[1])
    if error > allowed:
        raise UnsupportedModelError(
            what,
            where=engine.report.model,
            why=f"{why}: logits differ by {error:.2g} (relative), where rounding explains {allowed:.2g}",
            remedy="use stock transformers: only attention may mix tokens (no convolution, scan, token shift or state)",
        )


def check_invariance(engine: Engine) -> int:
    """What `deterministic=True` promises, tried on an idle engine: the same bits in one step, alone, and as a decode.

    Returns: leading blocks of the KV cache that were written.

    Raises:
        VerificationError: some bits differ. Kernels rest on how matrix units add up; this card's do otherwise.
    """
    generator = torch.Generator().manual_seed(7)
    lengths = _fitting(engine, INVARIANT)
    prompts = [torch.randint(0, engine.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    if not prompts:
        return 0
    together = engine.prompt_logits(prompts)
    ways = {
        "one by one": torch.cat([engine.prompt_logits([prompt]) for prompt in prompts]),
        "with their last tokens decoded": engine.prompt_logits(prompts, decode_last=True),
    }
    for how, logits in ways.items():
        if not torch.equal(logits, together):
            worst = max(row_errors(logits, together), default=float("inf"))
            raise VerificationError(
                f"deterministic=True does not hold: prompts {how} give other logits than in one step",
                where=engine.report.model,
                why=f"they differ by {worst:.2g} (relative)",
                remedy="use deterministic=False on this card, and report this",
            )
    return sum(-(-n // engine.config.block_size) for n in lengths)


def check_packing(engine: Engine) -> None:
    """Run the check on an idle engine, in at most eight tiny steps.

    Raises:
        UnsupportedModelError: a sequence's logits depend on its neighbours, or on how it was cut into steps.
    """
    generator = torch.Generator().manual_seed(5)

    def tokens(length: int) -> list[int]:
        return torch.randint(0, engine.vocab_size, (length,), generator=generator).tolist()

    def compare_orders(prompts: list[list[int]], first: Tensor, *, decode_last: bool) -> None:
        other = len(prompts) // 2
        changed = [tokens(len(p)) if row == other else p for row, p in enumerate(prompts)]
        second = engine.prompt_logits(changed[::-1], decode_last=decode_last).flip(0)
        kept = [row for row in range(len(prompts)) if row != other]
        _judge(
            engine,
            second[kept],
            first[kept],
            SAME_SHAPES,
            "sequences packed in one step influence each other",
            f"the same prompts were {'decoded' if decode_last else 'computed'} beside others",
        )

    if lengths := _fitting(engine, PACKED):
        prompts = [tokens(n) for n in lengths]
        compare_orders(prompts, engine.prompt_logits(prompts), decode_last=False)
    if lengths := _fitting(engine, DECODED):
        prompts = [tokens(n) for n in lengths]
        whole = engine.prompt_logits(prompts)
        decoded = engine.prompt_logits(prompts, decode_last=True)
        if len(prompts) > 1:
            compare_orders(prompts, decoded, decode_last=True)
        _judge(
            engine,
            decoded,
            whole,
            OTHER_SHAPES,
            "what a sequence computed is lost between steps",
            "prompts were computed whole, and with their last token in a step of its own",
        )
