"""The error that the tests of linear kernels allow: that of adding up in fp32 in any order, and nothing worse."""

import pytest
import torch

from tests.lowerings.linear_cases import EPILOGUES, Linear

epilogues = pytest.mark.parametrize("epilogue", EPILOGUES)
norms = pytest.mark.parametrize("norm", ["none", "weight"])


def finish(layer, products):
    """The layer's fp32 output from its accumulators."""
    return layer.epilogue.exact(*products.chunk(layer.epilogue.groups, 1), *layer.args)


def chain(layer):
    """Products added one by one, over all of K: the longest way of rounding there is."""
    x, weight = layer._inputs(torch.float32), layer.weight
    products = torch.zeros(x.shape[0], weight.shape[0])
    for x_k, weight_k in zip(x.T.contiguous(), weight.T.contiguous(), strict=True):
        products = torch.addcmul(products, x_k[:, None], weight_k[None])
    return finish(layer, products)


def tf32(value):
    """fp32 with the 10 bits of mantissa that TF32 keeps, rounded to nearest."""
    return ((value.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@epilogues
@norms
@pytest.mark.parametrize("k", [72, 5000, 14336])
def test_adding_up_one_by_one_is_allowed(epilogue, norm, k):
    layer = Linear.random(5, 40, k, epilogue=epilogue, norm=norm, dtype=torch.float32)
    layer.assert_accurate(chain(layer))


@epilogues
@norms
@pytest.mark.parametrize("k", [72, 5000, 14336])
def test_tf32_is_not(epilogue, norm, k):
    """Products of TF32 operands, added up in fp64: a tenth of their error would be refused too."""
    layer = Linear.random(5, 40, k, epilogue=epilogue, norm=norm, dtype=torch.float32)
    exact = layer.compute(torch.float64)
    products = tf32(layer._inputs(torch.float32)).double() @ tf32(layer.weight).double().T
    off = layer.epilogue.exact(*products.chunk(layer.epilogue.groups, 1), *(a.double() for a in layer.args))
    for out in (off, exact + (off - exact) / 10):
        with pytest.raises(AssertionError, match="allowed"):
            layer.assert_accurate(out.float())


@pytest.mark.parametrize("epilogue", [name for name, e in EPILOGUES.items() if e.groups == 1])
def test_one_product_left_out_of_one_element_is_not(epilogue):
    """At the largest of the tests' shapes, and of an average product: 287,000 elements of 2,056 products each."""
    layer = Linear.random(70, 4097, 2056, epilogue=epilogue, dtype=torch.float32)
    products = layer.x @ layer.weight.T
    layer.assert_accurate(finish(layer, products))
    products[3, 7] -= (layer.x[3].square() @ layer.weight[7].square()).sqrt() / layer.x.shape[1] ** 0.5
    with pytest.raises(AssertionError, match="allowed"):
        layer.assert_accurate(finish(layer, products))


@epilogues
def test_an_element_of_another_row_is_not(epilogue):
    layer = Linear.random(16, 1000, 14336, epilogue=epilogue, dtype=torch.float32)
    out = layer.compute(torch.float32)
    out[3, 7] = out[4, 7]
    with pytest.raises(AssertionError, match="allowed"):
        layer.assert_accurate(out)
