"""What the tests of linear lowerings share: epilogues, inputs, and the exact result to compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusecomp.lowerings.linear.skinny_pieces import plain


@triton.jit
def residual(accs, args, strides, m, n, mask):
    return accs[0] + tl.load(args[0] + m * strides[0] + n, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def bias(accs, args, strides, m, n, mask):
    return accs[0] + tl.load(args[0] + n, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def swiglu(accs, args, strides, m, n, mask):
    g = accs[0]
    return (g / (1 + tl.exp(-g))) * accs[1]


@dataclass(frozen=True)
class Epilogue:
    kernel: Any
    exact: Callable[..., Tensor]
    operands: tuple[str, ...] = ()  # "matrix" [T, N] or "vector" [N]
    groups: int = 1


EPILOGUES = {
    "plain": Epilogue(plain, lambda acc: acc),
    "residual": Epilogue(residual, lambda acc, r: acc + r, ("matrix",)),
    "bias": Epilogue(bias, lambda acc, b: acc + b, ("vector",)),
    "swiglu": Epilogue(swiglu, lambda gate, up: torch.nn.functional.silu(gate) * up, groups=2),
}


@dataclass
class Linear:
    """Inputs of one layer. Rows of x and of the residual have gaps; norm: "none", "unit", "weight" or "plus one"."""

    x: Tensor
    weight: Tensor
    norm: str
    norm_weight: Tensor | None
    epilogue: Epilogue
    args: tuple[Tensor, ...]
    eps: float = 1e-5

    @classmethod
    def random(
        cls, tokens: int, n: int, k: int, *, epilogue: str = "plain", norm: str = "none", dtype: torch.dtype,
        device: str = "cpu", seed: int = 0,
    ) -> Linear:  # fmt: skip
        generator = torch.Generator(device).manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        chosen = EPILOGUES[epilogue]
        args = tuple(randn(tokens, n + 8)[:, :n] if kind == "matrix" else randn(n) for kind in chosen.operands)
        norm_weight = randn(k) if norm in ("weight", "plus one") else None
        weight = (randn(chosen.groups * n, k) / k**0.5).contiguous()
        return cls(randn(tokens, k + 8)[:, :k] * 3, weight, norm, norm_weight, chosen, args)

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(a.stride(0) if a.dim() == 2 else 0 for a in self.args)

    @property
    def call(self) -> tuple:
        """Arguments of `run_skinny` after `out`, use_pdl excepted."""
        eps = None if self.norm == "none" else self.eps
        plus_one = self.norm == "plus one"
        groups = self.epilogue.groups
        return self.norm_weight, eps, plus_one, self.epilogue.kernel, self.args, self.strides, groups

    def _inputs(self, dtype: torch.dtype) -> Tensor:
        """norm(x), each step rounded to `dtype`."""
        x = self.x.to(dtype)
        if self.norm == "none":
            return x
        wide = x if dtype == torch.float64 else x.float()
        x = (wide * torch.rsqrt(wide.pow(2).mean(1, keepdim=True) + self.eps)).to(dtype)
        if self.norm_weight is not None:
            factor = self.norm_weight.to(wide.dtype) + (self.norm == "plus one")
            x = (x.to(wide.dtype) * factor).to(dtype)
        return x

    def compute(self, dtype: torch.dtype) -> Tensor:
        """The unfused layer, each step rounded to `dtype`."""
        y = self._inputs(dtype) @ self.weight.to(dtype).T
        return self.epilogue.exact(*y.chunk(self.epilogue.groups, 1), *(a.to(dtype) for a in self.args))

    def _chain_error(self) -> Tensor:
        """Error to expect of adding up in fp32, one product after the other over all of K: other orders have less.

        Each partial sum is rounded, with an error of at most eps / sqrt(12) of it in the root mean square. After j of K
        products whose squares add up to s^2 it is about s * sqrt(j / K), so the errors are s * eps * sqrt(K / 24)
        together. The epilogue shows what it makes of accumulators that are off by as much.
        """
        x, weight, k = self._inputs(torch.float64), self.weight.double(), self.x.shape[1]
        products = x @ weight.T
        size = (x.square() @ weight.square().T).sqrt() * torch.finfo(torch.float32).eps * (k / 24) ** 0.5
        signs = torch.randint(2, size.shape, generator=torch.Generator().manual_seed(0)).to(size.device) * 2 - 1
        exact, off = (
            self.epilogue.exact(*p.chunk(self.epilogue.groups, 1), *(a.double() for a in self.args))
            for p in (products, products + signs * size)
        )
        return (off - exact).norm()

    def assert_accurate(self, out: Tensor, ulps: float = 1.0) -> None:
        """Error against fp64 at most 1.5 times that of the unfused layer in the same dtype.

        Args:
            ulps: error allowed in any case, in units of the last place of sums without cancellation, beside that of
                adding up in fp32: the unfused layer's matmul may add up in blocks and so be more exact than a chain is.

        Raises:
            AssertionError: it is larger, or a value is not finite.
        """
        exact = self.compute(torch.float64)
        size = (self._inputs(torch.float64).square() @ self.weight.double().square().T).sum().sqrt()
        floor = ulps * torch.finfo(self.x.dtype).eps * (exact.norm() + size) + self._chain_error()
        allowed = torch.maximum(1.5 * (self.compute(self.x.dtype).double() - exact).norm(), floor)
        error = (out.double() - exact).norm()
        assert out.isfinite().all(), "an output is not finite"
        assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}, of {exact.norm():.2e}"
