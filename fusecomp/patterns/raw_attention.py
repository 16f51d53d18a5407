"""Attention written out in the graph -> canonical `attention`: SDPA calls and eager softmax chains.

What stands between the score matmul and the softmax (scale, softcap, mask, in whatever spelling) is not
matched by shape of code: it is evaluated on known scores and positions, and fitted. What does not fit is refused.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from fusecomp.ops import OPS
from fusecomp.patterns.base import TOLERANCE, Example, PassContext, Pattern, fake_value, replace_and_prune
from fusecomp.patterns.evaluate import Inputs, NotProvable, evaluate, static_length
from fusecomp.patterns.masks import CAUSAL, UNKNOWN, MaskSpec, classify_matrix, unknown

# Added to a masked score; models use finfo.min, -inf, -1e9 or -1e4.
MASKED_BELOW = -9.9e3
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


@dataclass
class ScoreFacts:
    """What lies between q @ k^T and the softmax: scale, softcap (0 for none), and the mask."""

    scale: float
    softcap: float
    mask: MaskSpec


def proof_length(q: Tensor, context: PassContext) -> int:
    """Positions to evaluate: the graph's own length when it is fixed, else what the context asks for."""
    return static_length(q, -2) or context.proof_length


def mask_from_node(node: Node, q: Tensor, context: PassContext) -> MaskSpec:
    """Classify a boolean or additive mask node by evaluating it."""
    length = proof_length(q, context)
    try:
        masks = [evaluate(node, q.shape[-2], Inputs(length, seed)) for seed in (0, 1)]
    except NotProvable as error:
        return unknown(str(error))
    visible = []
    for mask in masks:
        if mask.dtype != torch.bool and not bool(((mask == 0) | (mask < MASKED_BELOW)).all()):
            return unknown("the mask adds a bias to visible scores")
        visible.append(mask if mask.dtype == torch.bool else mask == 0)
    if not torch.equal(visible[0], visible[1]):
        return unknown("the mask depends on token ids")
    try:
        return classify_matrix(_one_matrix(visible[0], length))
    except NotProvable as error:
        return unknown(str(error))


def _one_matrix(values: Tensor, length: int) -> Tensor:
    """The [length, length] matrix that every batch row and head shares."""
    matrices = values.expand(*values.shape[:-2], length, length).reshape(-1, length, length)
    if not bool((matrices == matrices[:1]).all()):
        raise NotProvable("the mask depends on the batch row or on the head")
    return matrices[0]


def fit_scores(final: Node, scores: Node, q: Tensor, context: PassContext) -> ScoreFacts:
    """Fit `final = softcap(scale * scores) + mask` by evaluating the chain on constant scores."""
    length = proof_length(q, context)

    def chain(value: float | Tensor, seed: int = 0) -> Tensor:
        given = {scores: torch.zeros(1, 1, length, length) + value}
        out = evaluate(final, q.shape[-2], Inputs(length, seed), given)
        return _one_matrix(out.float(), length)

    try:
        at = {x: chain(x) for x in (0.0, 1e-3, 1.0, -2.0, 30.0, 1e6)}
        other_ids = chain(0.0, seed=1)
        varied = 4 * torch.randn(length, length, generator=torch.Generator().manual_seed(2))
        at_varied = chain(varied)
    except NotProvable as error:
        return ScoreFacts(0.0, 0.0, unknown(str(error)))
    visible = at[0.0] > MASKED_BELOW
    if not bool(visible.any()):
        return ScoreFacts(0.0, 0.0, unknown("every score is masked"))
    if not torch.equal(visible, other_ids > MASKED_BELOW):
        return ScoreFacts(0.0, 0.0, unknown("the mask depends on token ids"))
    seen = {x: values[visible] for x, values in at.items()}
    # A masked score must stay far below any visible one whatever it was before (the largest probe aside).
    if any(bool((at[x][~visible] > MASKED_BELOW / 2).any()) for x in (1.0, -2.0, 30.0)):
        return ScoreFacts(0.0, 0.0, unknown("masking scales scores instead of replacing or lowering them"))
    if bool((seen[0.0] != 0).any()):
        return ScoreFacts(0.0, 0.0, unknown("a bias is added to visible scores (ALiBi or relative positions?)"))
    if any(bool((v != v[0]).any()) for v in seen.values()):
        return ScoreFacts(0.0, 0.0, unknown("the scale depends on the position"))
    point = {x: float(v[0]) for x, v in seen.items()}
    scale, softcap = point[1.0], 0.0
    if not math.isclose(point[30.0], 30 * scale, rel_tol=1e-3):
        scale, softcap = point[1e-3] / 1e-3, point[1e6]
        fitted = {x: softcap * math.tanh(scale * x / softcap) if softcap > 0 else math.nan for x in point}
        if not all(math.isclose(fitted[x], point[x], rel_tol=1e-3, abs_tol=1e-6) for x in point):
            return ScoreFacts(0.0, 0.0, unknown("scores go through a function that is neither a scale nor a softcap"))
    elif not math.isclose(point[-2.0], -2 * scale, rel_tol=1e-5):
        return ScoreFacts(0.0, 0.0, unknown("scores go through a non-linear function"))
    # Constant scores cannot show that one score changes another (a mean, a rank): varied ones must fit as well.
    fit = softcap * torch.tanh(scale * varied / softcap) if softcap else scale * varied
    if not torch.allclose(at_varied[visible], fit[visible], rtol=1e-3, atol=1e-5) or bool(
        (at_varied[~visible] > MASKED_BELOW / 2).any()
    ):
        return ScoreFacts(0.0, 0.0, unknown("what becomes of a score depends on other scores"))
    return ScoreFacts(scale, softcap, classify_matrix(visible))


def shared_heads(node: Node) -> Node:
    """The tensor before its kv heads were repeated for grouped-query attention, or `node` itself.

    Recognises `repeat_interleave(dim=1)` and reshape(expand(x[:, :, None])) by their shapes in the graph.
    """
    if is_call(node, (torch.repeat_interleave,), "repeat_interleave") and argument(node, 2, "dim") in (1, -3):
        repeats = argument(node, 1, "repeats")
        return node.args[0] if isinstance(repeats, int) else node  # type: ignore[return-value]
    if not is_call(node, (torch.reshape,), "reshape"):
        return node
    expand = node.args[0]
    if not is_call(expand, (), "expand"):
        return node
    index = expand.args[0]  # type: ignore[union-attr]
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
    q: Node
    k: Node
    v: Node
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

    def facts(self, candidate: RawCandidate, context: PassContext) -> ScoreFacts:
        """Scale, softcap and mask of a structurally sound candidate."""
        raise NotImplementedError

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
        for node in graph.nodes:
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
        for node in graph.nodes:
            if not is_call(node, SOFTMAXES, "softmax") or argument(node, 1, "dim") not in (-1, 3):
                continue
            scores = self._scores(node.args[0])
            final, refusal = self._value_matmul(node)
            if scores is None or final is None:
                continue  # a softmax that is not attention at all
            q, keys = scores.args[:2]
            candidate = RawCandidate(final, q, keys, shared_heads(final.args[1]), [scores, node], refusal=refusal)
            candidate.refusal = candidate.refusal or self._second_users(scores, node)
            transposed = self._untranspose(keys)
            candidate.swap_keys = transposed is None
            candidate.k = keys if transposed is None else shared_heads(transposed)
            yield candidate

    def facts(self, candidate: RawCandidate, context: PassContext) -> ScoreFacts:
        scores, softmax = candidate.inner
        return fit_scores(softmax.args[0], scores, fake_value(candidate.q), context)  # type: ignore[arg-type]

    @staticmethod
    def _scores(node: Any) -> Node | None:
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
    def _untranspose(node: Any) -> Node | None:
        """The [B, G, T, D] tensor whose last two dims `node` swaps, when it is such a swap."""
        if is_call(node, (torch.transpose,), "transpose"):
            dims = {d % 4 for d in node.args[1:3] if isinstance(d, int)}
            return node.args[0] if dims == {2, 3} else None
        if is_call(node, (torch.permute,), "permute"):
            dims = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
            return node.args[0] if tuple(dims) == (0, 1, 3, 2) else None
        return None

    def examples(self) -> list[Example]:
        from fusecomp.patterns.examples import softmax_examples

        return softmax_examples()
