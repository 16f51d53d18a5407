"""Generated epilogues for ahead-of-time compilation: every function and operand layout, in the epilogue's kernel."""

from __future__ import annotations

from collections.abc import Iterator

from fusecomp.lowerings.aot import Specialization
from fusecomp.lowerings.linear.epilogue import EXPRESSIONS, epilogue_hook
from fusecomp.lowerings.linear.pointwise import pointwise_kernel
from fusecomp.lowerings.paged_attention.heuristics import Target
from fusecomp.ops.linear import COLUMN, FULL, ROW, SCALAR, Program

COMPARISONS = ("gt", "ge", "lt", "le")
OPERANDS = (FULL, ROW, COLUMN, SCALAR)

# The two epilogues of a decoder layer, as the fuse stage writes them.
RESIDUAL = epilogue_hook(Program(1, (FULL,), (("add", "i0", "a0"),), "bfloat16"))
_SILU = (("neg", "a0"), ("exp", "t0"), ("add", "t1", 1), ("div", "a0", "t2"))
SWIGLU = epilogue_hook(Program(2, (), (*_SILU, ("mul", "t3", "a1")), "bfloat16"))


def every_function() -> Program:
    """A program that uses each function once, on two accumulators and operands of all layouts."""
    steps: list[tuple] = [("add", "a0", "i0"), ("mul", "t0", "a1"), ("mul", "t1", "i1"), ("add", "t2", "i2")]
    steps.append(("mul", "t3", "i3"))
    for function in EXPRESSIONS:
        last = f"t{len(steps) - 1}"
        if function == "where":
            steps.append(("gt", last, 0.5))
            steps.append(("where", f"t{len(steps) - 1}", last, 0.25))
        elif function in COMPARISONS:
            steps.append((function, last, 0.5))
            steps.append(("where", f"t{len(steps) - 1}", last, 0.125))
        elif function in ("add", "sub", "mul", "div", "maximum", "minimum"):
            steps.append((function, last, 1.5))
        else:
            steps.append((function, last))
    return Program(2, OPERANDS, tuple(steps), "bfloat16")


def specializations(target: Target) -> Iterator[Specialization]:
    """One kernel with the program above, bf16."""
    yield Specialization(
        "epilogue-every-function",
        pointwise_kernel,
        {"acc": "bf16", "out": "bf16", "args": ("bf16",) * len(OPERANDS)},
        {"num_tokens": "i32", "stride_o": "i32", "strides": ("i32",) * len(OPERANDS)},
        {
            **{
                "N": 14336,
                "G": 2,
                "SPLITS": 1,
                "BLOCK_T": 1,
                "BLOCK_N": 1024,
                "EPILOGUE": epilogue_hook(every_function()),
            },
            "USE_PDL": target.has_tma,
        },
        num_warps=4,
        num_stages=1,
    )
