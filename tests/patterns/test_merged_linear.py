"""Merging of parallel linears: the pattern's examples, and what happens to the parameters."""

import copy

import pytest
import torch

from fusecomp.patterns.linear import MergedLinears
from fusecomp.runtime.verify import relative_error
from fusecomp.testing.patterns import check_outcome, flat, new_context

PATTERN = MergedLinears()


def run_merged(module, inputs, context):
    """Compile as the engine's backend does: a graph of its own, and the stacked weights appended to its inputs."""
    from fusecomp._compat import dynamo_settings
    from fusecomp.patterns.base import own_graph

    graphs = []

    def backend(gm, example_inputs):
        gm = own_graph(gm)
        PATTERN.apply(gm, context)
        gm.recompile()
        graphs.append(gm)
        return lambda *args: gm(*args, *(m.tensor for m in context.merged))

    torch._dynamo.reset()
    with dynamo_settings(), torch.no_grad():
        return torch.compile(module, backend=backend, fullgraph=True)(*inputs), graphs[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("index", range(len(PATTERN.examples())), ids=[e.name for e in PATTERN.examples()])
def test_example(index, dtype):
    example = PATTERN.examples()[index]
    module = example.function.to(dtype)
    exact_module, plain = copy.deepcopy(module).float(), copy.deepcopy(module)
    inputs, context = example.inputs(dtype), new_context()
    output, _ = run_merged(module, inputs, context)

    def reference(x):
        return exact_module(x) if x.dtype == torch.float32 and dtype != torch.float32 else plain(x)

    example = type(example)(example.name, module, example.inputs, example.matches, example.reason, reference)
    check_outcome(PATTERN, example, context, inputs, output)


def test_parameters_become_views_of_one_weight():
    module = PATTERN.examples()[0].function
    before = {name: p.clone() for name, p in module.state_dict().items()}
    context = new_context()
    run_merged(module, PATTERN.examples()[0].inputs(torch.float32), context)
    after = module.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    merged = context.merged[0].tensor
    storages = {p.untyped_storage().data_ptr() for p in module.parameters()}
    assert storages == {merged.untyped_storage().data_ptr()}
    assert sum(p.numel() for p in module.parameters()) == merged.numel()


def test_second_capture_takes_the_weight_as_it_lies():
    module = PATTERN.examples()[0].function
    inputs, first, second = PATTERN.examples()[0].inputs(torch.float32), new_context(), new_context()
    run_merged(module, inputs, first)
    output, _ = run_merged(module, inputs, second)
    assert first.merged[0].tensor.data_ptr() == second.merged[0].tensor.data_ptr()
    wanted = flat(copy.deepcopy(module)(*inputs))
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(flat(output), wanted, strict=True))


@pytest.mark.parametrize("name", ["int4_zero_gate_up", "fp8_blocks", "fp8_one_scale_gate_up"])
def test_codes_become_views_too(name):
    """Also of fp8 as it is stored, which an example's cast to its dtype would widen."""
    example = next(e for e in PATTERN.examples() if e.name == name)
    module, inputs, context = example.function, example.inputs(torch.float32), new_context()
    before = {key: p.clone() for key, p in module.state_dict().items()}
    wanted = flat(copy.deepcopy(module)(*inputs))
    output, graph = run_merged(module, inputs, context)
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(flat(output), wanted, strict=True))
    after = module.state_dict()
    assert all(torch.equal(after[key].float(), before[key].float()) for key in before)
    assert [m.tensor.dtype for m in context.merged] == [module.layers[0].q.dtype] + [torch.float32] * (
        1 + (module.layers[0].zero is not None)
    )
    for merged, part in zip(context.merged, ("q", "scale", "zero"), strict=False):
        storages = {getattr(layer, part).untyped_storage().data_ptr() for layer in module.layers}
        assert storages == {merged.tensor.untyped_storage().data_ptr()}
    assert sum("dequantize" in str(n.target) for n in graph.graph.nodes) == 1
    second = new_context()
    run_merged(module, inputs, second)
    assert [m.tensor.data_ptr() for m in second.merged] == [m.tensor.data_ptr() for m in context.merged]
