"""Compiles a deep graph once per kind of layer: cut after every attention, compile one of each, call all.

Between two attentions lies the same work in every layer: output projection, norms, MLP or experts, the next
layer's projections and its attention. The cut graph therefore has as many kinds of pieces as the model has
kinds of layers, plus its two ends, and compile time no longer grows with depth. Attention is opaque to Inductor,
so no fusion is lost at a cut.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import _get_qualified_name
from torch.fx.passes.split_module import split_module

from fusecomp._compat import own_tracing_context
from fusecomp.fusion import compile_fused
from fusecomp.ops import OPS
from fusecomp.patterns.base import Pattern, fake_value, module_path
from fusecomp.report import FusionReport

CUT_AFTER = (OPS.paged_attention, OPS.paged_attention.default)


@dataclass(frozen=True)
class CompiledPieces:
    """A graph cut into pieces, each compiled.

    Attributes:
        whole: calls the pieces by name, in order.
        kinds: name of a piece -> its kind.
        artifacts: kind -> what pieces of that kind were compiled to.
    """

    whole: GraphModule
    kinds: dict[str, str]
    artifacts: dict[str, Any]


def cut(gm: GraphModule) -> GraphModule:
    """Split after every `paged_attention`; what remains calls `submod_0`, `submod_1`, ..., which return tuples."""
    piece, pieces = 0, {}
    for node in gm.graph.nodes:
        pieces[node] = piece
        if node.op == "call_function" and node.target in CUT_AFTER:
            piece += 1
    _unstrided(gm, pieces)
    whole = split_module(gm, gm, lambda node: pieces[node], keep_original_order=True, keep_original_node_name=True)
    for node in whole.graph.find_nodes(op="call_module", sort=False):
        _return_tuple(whole, node)
    whole.recompile()
    return whole


def _unstrided(gm: GraphModule, pieces: dict[Node, int]) -> None:
    """Give values that pass from piece to piece a plain layout, where the stride of their last dimension is unknown.

    Inductor keeps the strides of what a graph returns only if they are known, and the next piece checks them.
    """
    for node in list(pieces):
        fake = fake_value(node)
        later = [user for user in node.users if pieces[user] != pieces[node]]
        if node.op not in ("call_function", "call_method") or not later or not isinstance(fake, Tensor):
            continue
        if fake.dim() and isinstance(fake.stride(-1), torch.SymInt):
            with gm.graph.inserting_after(node):
                plain = gm.graph.call_function(torch.clone, (node,), {"memory_format": torch.contiguous_format})
            plain.meta.update(node.meta)
            plain.meta["example_value"] = torch.clone(fake, memory_format=torch.contiguous_format)
            pieces[plain] = pieces[node]
            for user in later:
                user.replace_input_with(node, plain)


def _return_tuple(whole: GraphModule, call: Node) -> None:
    """Make a piece that returns one tensor return a tuple of it: only such graphs become artefacts."""
    piece = whole.get_submodule(str(call.target))
    if not isinstance(piece, GraphModule):
        return
    output = piece.graph.output_node()
    if isinstance(output.args[0], Node):
        output.args = ((output.args[0],),)
        piece.recompile()
        with whole.graph.inserting_after(call):
            only = whole.graph.call_function(operator.getitem, (call, 0))
        call.replace_all_uses_with(only, delete_user_cb=lambda user: user is not only)


class _Symbols:
    """Names sizes by order of appearance, so that pieces that differ only in which symbol they use look alike."""

    def __init__(self) -> None:
        self._names: dict[Any, str] = {}

    def describe(self, value: Any) -> str:
        """A fake tensor or size, with what compilation may know of its symbols."""
        if isinstance(value, Tensor):
            sizes = [self._size(x) for x in (*value.shape, *value.stride(), value.storage_offset())]
            return f"{value.dtype} {sizes} {value.device}"
        return f"{type(value).__name__} {self._size(value)}"

    def _size(self, value: Any) -> str:
        if not isinstance(value, torch.SymInt):
            return str(value)
        expr, known = value.node.expr, ""
        for symbol in sorted(expr.free_symbols, key=str):
            if symbol not in self._names:
                self._names[symbol] = f"z{len(self._names)}"
                known += f" {value.node.shape_env.var_to_range.get(symbol)}"
        renamed = expr.xreplace({s: sympy.Symbol(n, integer=True) for s, n in self._names.items()})
        return f"{renamed}{known}"


def structure(gm: GraphModule) -> str:
    """Hash of everything that compilation depends on, with nodes and symbols named by their order."""
    number: dict[Node, int] = {}
    symbols = _Symbols()
    digest = hashlib.sha256()
    for i, node in enumerate(gm.graph.nodes):
        number[node] = i
        args, kwargs = torch.fx.node.map_aggregate(
            (node.args, node.kwargs), lambda a: f"%{number[a]}" if isinstance(a, Node) else a
        )
        target = "" if node.op == "placeholder" else _target_name(node.target)
        seen = symbols.describe(fake_value(node)) if node.op == "placeholder" else ""
        digest.update(f"{node.op}|{target}|{args}|{kwargs}|{seen}\n".encode())
    return digest.hexdigest()


def _target_name(target: Any) -> str:
    """A name that is the same in every process, where a repr may hold an address."""
    return target if isinstance(target, str) else _get_qualified_name(target)


def compile_pieces(
    gm: GraphModule, fuse: Sequence[Pattern], report: FusionReport, *, artifacts: bool = False
) -> CompiledPieces:
    """Compile `gm` piece by piece with Inductor, equal pieces once; `fuse` is applied to the ATen graph of each.

    Args:
        report: receives what the fuse stage did, for every piece.
        artifacts: whether the compiled pieces are to be saved.
    """
    whole = cut(gm)
    kinds: dict[str, str] = {}
    compiled: dict[str, Any] = {}
    done: dict[str, tuple[GraphModule, FusionReport]] = {}
    for name, piece in list(whole.named_children()):
        if not isinstance(piece, GraphModule):
            continue
        kind = kinds[name] = structure(piece)
        if kind not in compiled:
            inputs = [fake_value(n) for n in piece.graph.nodes if n.op == "placeholder"]
            with own_tracing_context(inputs):
                compiled[kind], fused = compile_fused(piece, inputs, fuse, kind, artifact=artifacts)
            done[kind] = piece, fused
        _record(report, *done[kind], piece)
        delattr(whole, name)
        setattr(whole, name, compiled[kind])
    return CompiledPieces(whole, kinds, compiled)


def _record(report: FusionReport, first: GraphModule, fused: FusionReport, piece: GraphModule) -> None:
    """Add what was done to `first` to the report, as done to the structurally equal `piece`."""
    pairs = zip(first.graph.nodes, piece.graph.nodes, strict=True)
    places = {module_path(a): module_path(b) for a, b in pairs if a.op != "placeholder"}
    report.matches += [replace(m, where=places.get(m.where, m.where)) for m in fused.matches]
    report.near_misses += [replace(m, where=places.get(m.where, m.where)) for m in fused.near_misses]
