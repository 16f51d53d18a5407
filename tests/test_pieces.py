"""What passes between the pieces of a cut graph."""

import torch

from fusecomp._compat import mark_unbacked
from fusecomp.patterns.base import fake_value, own_graph
from fusecomp.pieces import _unstrided


def crossing(function, x):
    """The values that the last operation of the captured `function` reads, once cut off from the others."""
    found = []

    def backend(gm, _):
        graph = own_graph(gm)
        calls = [node for node in graph.graph.nodes if node.op in ("call_function", "call_method")]
        pieces = {node: int(node is calls[-1] or node.op == "output") for node in graph.graph.nodes}
        _unstrided(graph, pieces)
        graph.recompile()
        found.extend(calls[-1].all_input_nodes)
        assert all(pieces[node] == 0 for node in found)
        return graph.forward

    mark_unbacked(x, 1)
    out = torch.compile(function, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(out, function(x))
    return found


def test_a_transposed_value_of_unknown_size_becomes_plain():
    (value,) = crossing(lambda x: (x * 2).transpose(0, 1) + 1, torch.randn(4, 7))
    assert value.target is torch.clone and fake_value(value).stride(-1) == 1


def test_other_values_are_passed_as_they_are():
    (value,) = crossing(lambda x: (x * 2) + 1, torch.randn(4, 7))
    assert value.target is not torch.clone
