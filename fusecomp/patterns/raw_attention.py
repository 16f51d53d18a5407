"""Attention written out in the graph -> canonical `attention`: SDPA calls and eager softmax chains.

What stands between the score matmul and the softmax (scale, softcap, mask, in whatever spelling) is not
matched by shape of code: it is evaluated on known scores and positions, and fitted. What does not fit is refused.
"""

from __future__ import annotations

import math
import operator
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from fusecomp.ops import OPS
from fusecomp.patterns.base import TOLERANCE, Example, PassContext, Pattern, fake_value, replace_and_prune
from fusecomp.patterns.evaluate import writers
from fusecomp.patterns.masks import CAUSAL, UNKNOWN, MaskSpec, unknown
from fusecomp.patterns.scores import ScoreFacts, fit_scores, mask_from_node

MATMULS = (torch.matmul, operator.matmul, torch.bmm)
SOFTMAXES = (F.softmax, torch.softmax)


def is_call(node: Any, functions: tuple, method: str = "") -> bool:
    """Whether `node` calls one of `functions`, or the tensor method of that name."""
    if not isinstance(node, Node):
        return False
    if node.op == "call_function":
        return node.target in functions
    return bool(method) and node.op == "call_method" and node.target == method


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def shared_heads(node: Any) -> Any:
    """The tensor before its kv heads were repeated for grouped-query attention, or `node` itself.

    Recognises `repeat_interleave(dim=1)` and reshape(expand(x[:, :, None])) by their shapes in the graph.
    """
    if is_call(node, (torch.repeat_interleave,), "repeat_interleave") and argument(node, 2, "dim") in (1, -3):
        repeats = argument(node, 1, "repeats")
        return node.args[0] if isinstance(repeats, int) else node
    if not is_call(node, (torch.reshape,), "reshape"):
        return node
    expand: Any = node.args[0]
    if not is_call(expand, (), "expand"):
        return node
    index: Any = expand.args[0]
    if not (is_call(index, (operator.getitem,)) and fake_value(index).dim() == 5):
        return node
    source, before, after = index.args[0], fake_value(index.args[0]), fake_value(node)
    full = slice(None, None, None)
    keys = tuple(index.args[1])
    expanded_only_copies = fake_value(index).shape[2] == 1 and keys[:3] == (full, full, None)
    same_ends = before.dim() == 4 and before.shape[-1] == after.shape[-1] and after.dim() == 4
    return source if expanded_only_copies and same_ends else node


@dataclass
class RawCandidate:
    """Attention spelled out: `node` produces [B, H, T, D]; `facts` are fitted in the guard."""

    node: Node
    q: Any
    k: Any
    v: Any
    inner: list[Node]
    swap_keys: bool = False  # k is [B, G, D, T] and needs its last dims swapped
    facts: ScoreFacts | None = None
    refusal: str = ""


class _RawAttention(Pattern):
    numerics = TOLERANCE

    def guard(self, candidate: RawCandidate, context: PassContext) -> str | None:
        if candidate.refusal:
            return candidate.refusal
        q, k, v = (fake_value(n) for n in (candidate.q, candidate.k, candidate.v))
        if candidate.swap_keys:
            k = k.transpose(-1, -2)
        if not (q.dim() == k.dim() == v.dim() == 4):
            return "operands are not [batch, heads, tokens, head_dim]"
        if k.shape[1] != v.shape[1] or not isinstance(q.shape[1], int) or q.shape[1] % k.shape[1]:
            return f"{q.shape[1]} query heads cannot share {k.shape[1]} and {v.shape[1]} kv heads"
        if k.shape[-1] != q.shape[-1] or v.shape[-1] != q.shape[-1]:
            return "query, key and value head dims differ"
        if str(k.shape[-2]) != str(q.shape[-2]):
            return "queries and keys differ in length (a cache, or cross attention)"
        candidate.facts = facts = self.facts(candidate, context)
        if facts.mask.kind == UNKNOWN:
            return f"mask is unknown: {facts.mask.reason}"
        return None

    @abstractmethod
    def facts(self, candidate: RawCandidate, context: PassContext) -> ScoreFacts:
        """Scale, softcap and mask of a structurally sound candidate."""

    def emit(self, candidate: RawCandidate, gm: GraphModule, context: PassContext) -> str:
        facts = candidate.facts
        assert facts is not None
        layer = len(context.masks)
        context.masks[layer] = facts.mask
        with gm.graph.inserting_before(candidate.node):
            k = candidate.k
            if candidate.swap_keys:
                k = gm.graph.call_method("transpose", (candidate.k, -2, -1))
                k.meta["example_value"] = fake_value(candidate.k).transpose(-2, -1)
            args = (candidate.q, k, candidate.v, facts.scale, facts.mask.kind, facts.mask.window)
            new = gm.graph.call_function(OPS.attention.default, (*args, facts.softcap, None, layer))
        new.meta.update({k: v for k, v in candidate.node.meta.items() if k != "tensor_dict"})
        replace_and_prune(candidate.node, new)
        return f"{facts.mask}, scale {facts.scale:.6g}" + (f", softcap {facts.softcap:g}" if facts.softcap else "")


class SdpaAttention(_RawAttention):
    """`scaled_dot_product_attention` with a mask that evaluates to a known one."""

    name = "sdpa_attention"

    def find(self, graph: torch.fx.Graph) -> Iterable[RawCandidate]:
        for node in list(graph.nodes):
            if is_call(node, (F.scaled_dot_product_attention,)):
                q, k, v = (argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
                candidate = RawCandidate(node, q, shared_heads(k), shared_heads(v), [])
                if argument(node, 4, "dropout_p", 0.0) != 0:
                    candidate.refusal = f"dropout {argument(node, 4, 'dropout_p')} is active"
                yield candidate

    def facts(self, candidate: RawCandidate, context: PassContext) -> ScoreFacts:
        node, q = candidate.node, fake_value(candidate.q)
        scale = argument(node, 6, "scale")
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        if not isinstance(scale, int | float):
            return ScoreFacts(0.0, 0.0, unknown("the scale is not a constant"))
        mask, is_causal = argument(node, 3, "attn_mask"), argument(node, 5, "is_causal", False)
        if mask is not None:
            if is_causal is not False:
                return ScoreFacts(0.0, 0.0, unknown("both attn_mask and is_causal are given"))
            return ScoreFacts(scale, 0.0, mask_from_node(mask, q, context))
        if not isinstance(is_causal, bool):
            return ScoreFacts(0.0, 0.0, unknown("is_causal is computed at run time"))
        return ScoreFacts(scale, 0.0, MaskSpec(CAUSAL if is_causal else "bidirectional", 0, 2**31 - 1))

    def examples(self) -> list[Example]:
        from fusecomp.patterns.examples import sdpa_examples

        return sdpa_examples()


class SoftmaxAttention(_RawAttention):
    """matmul -> scale, softcap, mask in any spelling -> softmax -> matmul."""

    name = "softmax_attention"

    def find(self, graph: torch.fx.Graph) -> Iterable[RawCandidate]:
        for node in list(graph.nodes):
            if not is_call(node, SOFTMAXES, "softmax") or argument(node, 1, "dim") not in (-1, 3):
                continue
            scores = self._scores(node.args[0])
            final, refusal = self._value_matmul(node)
            if scores is None or final is None:
                continue  # a softmax that is not attention at all
            q, keys = scores.args[0], scores.args[1]
            values = final.args[1]
            candidate = RawCandidate(final, q, keys, shared_heads(values), [scores, node], refusal=refusal)
            candidate.refusal = candidate.refusal or self._second_users(scores, node)
            candidate.refusal = candidate.refusal or self._changed(scores, node, final)
            transposed = self._untranspose(keys)
            candidate.swap_keys = transposed is None
            candidate.k = keys if transposed is None else shared_heads(transposed)
            yield candidate

    def facts(self, candidate: RawCandidate, context: PassContext) -> ScoreFacts:
        scores, softmax = candidate.inner
        return fit_scores(softmax.args[0], scores, fake_value(candidate.q), context)  # type: ignore[arg-type]

    @staticmethod
    def _scores(node: Any) -> Any:
        """The one matmul that the softmax's input is an elementwise function of."""
        found, seen, stack = [], set(), [node]
        while stack:
            at = stack.pop()
            if not isinstance(at, Node) or at in seen:
                continue
            seen.add(at)
            value = fake_value(at)
            if not isinstance(value, Tensor):
                continue
            if is_call(at, MATMULS, "matmul"):
                found.append(at)
            elif at.op in ("call_function", "call_method"):
                stack.extend(at.all_input_nodes)
        same_shape = [
            n for n in found if fake_value(n).dim() == 4 and str(fake_value(n).shape) == str(fake_value(node).shape)
        ]
        return same_shape[0] if len(same_shape) == 1 else None

    @staticmethod
    def _value_matmul(softmax: Node) -> tuple[Node | None, str]:
        """Follow casts and inactive dropout from the softmax to the matmul with the values."""
        node, refusal = softmax, ""
        while True:
            users = list(node.users)
            products = [u for u in users if is_call(u, MATMULS, "matmul") and u.args[0] is node]
            if products:
                return products[0], refusal or ("the probabilities have a second user" if len(users) > 1 else "")
            if len(users) != 1:
                onward = [u for u in users if is_call(u, (F.dropout,), "to")]
                if len(onward) != 1:
                    return None, ""
                refusal, users = "the probabilities have a second user", onward
            node = users[0]
            if is_call(node, (F.dropout, torch.dropout)):
                if argument(node, 1, "p", 0.5) != 0 and argument(node, 2, "training", True) is not False:
                    refusal = refusal or f"dropout {argument(node, 1, 'p', 0.5)} is active"
            elif node.op != "call_method" or node.target not in ("to", "type", "type_as", "float", "half", "bfloat16"):
                return None, ""

    @staticmethod
    def _second_users(scores: Node, softmax: Node) -> str:
        """Refuse when a value between the matmul and the softmax is read by anyone else."""
        chain, stack = {scores}, [scores]
        while stack:
            for user in stack.pop().users:
                if user not in chain and user is not softmax:
                    chain.add(user)
                    stack.append(user)
                    if user.op == "output" or len(chain) > 32:
                        return "the scores have a second user"
        return ""

    @staticmethod
    def _changed(scores: Node, softmax: Node, final: Node) -> str:
        """Refuse when an operand is written in place after it was read, or a score other than through its only user."""
        order = {node: i for i, node in enumerate(scores.graph.nodes)}
        for operand in (scores.args[0], scores.args[1], softmax):
            for writer in writers(operand):  # type: ignore[arg-type]
                if order[scores] < order[writer] < order[final]:
                    return f"{operand} is changed in place by {writer.name}"
        changes = writers(scores)
        if changes and not (len(scores.users) == 1 and changes[0] in scores.users and changes[0].users):
            return f"the scores are changed in place by {changes[0].name}"
        return ""

    @staticmethod
    def _untranspose(node: Any) -> Any:
        """The [B, G, T, D] tensor whose last two dims `node` swaps, when it is such a swap."""
        if is_call(node, (torch.transpose,), "transpose"):
            dims = {d % 4 for d in node.args[1:3] if isinstance(d, int)}
            return node.args[0] if dims == {2, 3} else None
        if is_call(node, (torch.permute,), "permute"):
            order = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
            return node.args[0] if tuple(order) == (0, 1, 3, 2) else None
        return None

    def examples(self) -> list[Example]:
        from fusecomp.patterns.examples import softmax_examples

        return softmax_examples()
