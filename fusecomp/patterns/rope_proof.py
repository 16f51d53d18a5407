"""Proof of what makes the queries or keys of an attention: norm, rotation, both or neither.

From the value that attention gets, the graph is read backwards to the nearest-to-the-projection value that has its
shape and from which it follows by pointwise operations, shape changes and reductions. What lies between is evaluated
in fp64 on random values and compared with the formulas of `fusecomp.ops.rope`; one that agrees is the rule, however it
is spelled.

Legend: T tokens, N heads, D head dim, C columns of a cos or sin table.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fusecomp._compat import real_tensors
from fusecomp.ops.rope import (
    FULL,
    HALF,
    INTERLEAVED,
    NO_NORM,
    PAIRS,
    RMS,
    RMS_PLUS_ONE,
    UNROTATED,
    Rope,
    rotate_reference,
)
from fusecomp.patterns import functional
from fusecomp.patterns.base import fake_value
from fusecomp.patterns.functional import CAST, FLOATS, RESHAPES, aten, is_call, size_key

SHAPES = (
    *RESHAPES,
    aten.permute.default,
    aten.transpose.int,
    aten.expand.default,
    aten.clone.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    operator.getitem,
    aten.index.Tensor,
    aten.index_select.default,
    aten.repeat.default,
)
ARITHMETIC = (
    CAST,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.neg.default,
    aten.rsqrt.default,
    aten.sqrt.default,
    aten.reciprocal.default,
    aten.pow.Tensor_Scalar,
    aten.square.default,
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.cat.default,
    aten.stack.default,
)
MAX_NODES = 80
AGREEMENT = 1e-9


@dataclass(frozen=True)
class Heads:
    """A value that holds [T, N, D] in dims `order` (all other dims are 1)."""

    node: Node
    order: tuple[int, int, int]


@dataclass(frozen=True)
class Chain:
    """How queries or keys follow from `source`: `region` in graph order, `tables` and `vectors` its other inputs."""

    source: Heads
    region: tuple[Node, ...]
    tables: tuple[Node, ...]
    vectors: tuple[Node, ...]


@dataclass(frozen=True)
class Proof:
    """The rule that a chain was proven to compute, and the chain's inputs by their role."""

    rope: Rope
    source: Heads
    cos: Node | None
    sin: Node | None
    weight: Node | None

    def facts(self) -> tuple:
        """What must be the same for queries and keys; their norms' weights need not be."""
        return str(self.rope), self.cos, self.sin, self.weight is None


def prove_chain(target: Node) -> Proof | None:
    """How `target` [T, N, D] is made, from the earliest value for which that can be proven."""
    rotated = None
    for chain in chains(target):
        rotated = bool(chain.tables) if rotated is None else rotated
        if len(chain.tables) not in (0, 2) or len(chain.vectors) > 1:
            continue
        proof = _identify(chain, target)
        # Leaving a rotation in the graph and calling it proven would hide that it was not recognised.
        if proof is not None and not (rotated and proof.rope == Rope()):
            return proof
    return None


def chains(target: Node) -> Iterator[Chain]:
    """Ways to read `target` as a function of a value of its shape, earliest value first; the last is itself."""
    whole = functional.cone(target, lambda node: not is_call(node, *SHAPES, *ARITHMETIC), 10 * MAX_NODES)
    if whole is None or not is_call(target, *SHAPES, *ARITHMETIC):
        whole = []
    shape = fake_value(target).shape
    members = set(whole)
    for source in sorted({*members, *functional.leaves(members), target}):
        orders = list(_orders(source, fake_value(target)))
        if not orders:
            continue
        below = functional.descendants(source)
        region = [node for node in whole if node in below and node is not source]
        if len(region) > MAX_NODES or (not region and source is not target):
            continue
        others = [leaf for leaf in functional.leaves(region) if leaf is not source and not _is_size(leaf)]
        tables = tuple(leaf for leaf in others if not _is_vector(leaf, shape[2]))
        vectors = tuple(leaf for leaf in others if leaf not in tables)
        if any(leaf in below for leaf in others):
            continue
        for order in orders:
            yield from _widened(Chain(Heads(source, order), tuple(region), tables, vectors), shape)


def _orders(node: Node, like: Tensor) -> Iterator[tuple[int, int, int]]:
    """Dims of `node` that can be those of `like` [T, N, D], which has the same dtype; the likeliest order first."""
    fake = fake_value(node)
    if not isinstance(fake, Tensor) or fake.dtype != like.dtype or not 3 <= fake.dim() <= 5:
        return
    sizes, wanted = [size_key(s) for s in fake.shape], [size_key(s) for s in like.shape]
    for order in itertools.permutations(range(fake.dim()), 3):
        rest = [size for dim, size in enumerate(sizes) if dim not in order]
        if [sizes[dim] for dim in order] == wanted and all(size == 1 for size in rest) and order[2] > order[0]:
            yield order


def _widened(chain: Chain, shape: Any) -> Iterator[Chain]:
    """`chain` with its tables and vectors followed back to where they come from, the farthest first.

    Only shape changes of tables are followed (and casts of the graph's inputs), and pointwise operations of vectors:
    what is shared by all layers is computed once.
    """
    tails = [list(_table_tail(leaf, shape[0])) for leaf in chain.tables]
    tails += [list(_vector_tail(leaf, shape[2])) for leaf in chain.vectors]
    if any(not tail for tail in tails) or len(tails) > 3:
        yield chain
        return
    for choice in itertools.product(*(reversed(tail) for tail in tails)):
        added = {node for _, nodes in choice for node in nodes}
        region = functional.members_in_order({*chain.region, *added})
        leaves = [leaf for leaf, _ in choice]
        split = len(chain.tables)
        yield Chain(chain.source, tuple(region), tuple(leaves[:split]), tuple(leaves[split:]))


def _table_tail(leaf: Node, tokens: Any) -> Iterator[tuple[Node, tuple[Node, ...]]]:
    """(table, nodes from it to `leaf`) for `leaf` and the values it shows, where they are [T, C]."""
    passed: list[Node] = []
    while True:
        if _columns(leaf, tokens) is not None:
            yield leaf, tuple(passed)
        source = leaf.args[0] if leaf.args else None
        followed = is_call(leaf, *SHAPES) or (is_call(leaf, CAST) and isinstance(source, Node) and _is_input(source))
        if not followed or not isinstance(source, Node) or any(not _is_size(a) for a in leaf.all_input_nodes[1:]):
            return
        passed.append(leaf)
        leaf = source


def _vector_tail(leaf: Node, width: int) -> Iterator[tuple[Node, tuple[Node, ...]]]:
    """(vector, nodes from it to `leaf`) for `leaf` and the vectors that it is computed from alone."""
    passed: list[Node] = []
    while True:
        yield leaf, tuple(passed)
        inputs = leaf.all_input_nodes
        if not is_call(leaf, *SHAPES, *ARITHMETIC) or len(inputs) != 1 or not _is_vector(inputs[0], width):
            return
        passed.append(leaf)
        leaf = inputs[0]


def _is_input(node: Node) -> bool:
    return node.op == "placeholder"


def _is_size(node: Node) -> bool:
    return isinstance(fake_value(node), torch.SymInt | int)


def _is_vector(node: Node, width: int) -> bool:
    """Whether `node` has one value a head dim, as a norm's weight has."""
    fake = fake_value(node)
    sizes = [size_key(s) for s in fake.shape] if isinstance(fake, Tensor) else []
    return [s for s in sizes if s != 1] == [width] and sizes[-1] == width and fake.dtype in FLOATS


def _columns(node: Node, tokens: Any) -> int | None:
    """C if `node` is a table [T, C] (all other dims 1), else None."""
    fake = fake_value(node)
    if (
        not isinstance(fake, Tensor)
        or fake.dtype not in FLOATS
        or fake.dim() < 2
        or not isinstance(fake.shape[-1], int)
    ):
        return None
    rows = [size_key(s) for s in fake.shape[:-1]]
    return fake.shape[-1] if rows.count(size_key(tokens)) >= 1 and rows.count(1) >= len(rows) - 1 else None


def _identify(chain: Chain, target: Node) -> Proof | None:
    """The rule that the chain computes on every draw, or None."""
    shape = fake_value(target).shape
    weights: list[Node | None] = list(chain.vectors) or [None]
    constants = {float(a) for node in chain.region for a in node.args if isinstance(a, float) and 0 <= a < 1}
    norms = [(RMS, eps) for eps in sorted(constants | {0.0})]
    norms += [(RMS_PLUS_ONE, eps) for eps in sorted(constants | {0.0})] if chain.vectors else []
    norms = norms if chain.vectors else [(NO_NORM, 0.0), *norms]
    widths = {_columns(table, shape[0]) for table in chain.tables}
    if None in widths or len(widths) > 1:
        return None
    columns = widths.pop() if widths else None
    rotations: list[tuple[str, int, str]] = [(UNROTATED, 0, FULL)]
    if columns is not None:
        choices = [(columns, FULL), (2 * columns, PAIRS), (columns, PAIRS)]
        rotations = [(s, r, t) for s in (HALF, INTERLEAVED) for r, t in choices if 0 < r <= shape[2] and r % 2 == 0]
    roles = list(itertools.permutations(chain.tables)) if chain.tables else [(None, None)]
    with real_tensors(), torch.no_grad():
        draws = [_draw(chain, shape, number) for number in range(3)]
        if any(draw is None for draw in draws):
            return None
        for (norm, eps), rotation, (cos, sin) in itertools.product(norms, rotations, roles):
            rope = Rope(*rotation, norm, eps)
            if all(_agrees(draw, rope, cos, sin, weights[0]) for draw in draws):  # type: ignore[arg-type]
                return Proof(rope, chain.source, cos, sin, weights[0])
    return None


def _draw(chain: Chain, shape: Any, number: int) -> tuple[Tensor, dict[Node | None, Tensor], Tensor] | None:
    """Random heads [T, N, D], tables [T, C] and vectors [D], and what the chain makes of them; None if it fails.

    A symbolic T takes another value in each draw; the last draw's values are small, which makes eps count.
    """
    generator = torch.Generator().manual_seed(number)
    tokens = shape[0] if isinstance(shape[0], int) else 3 + number
    x = torch.randn(tokens, *shape[1:], generator=generator, dtype=torch.float64) * (1.0, 3.0, 1e-3)[number]
    given: dict[Node | None, Tensor] = {None: torch.empty(0)}
    values: dict[Node, Any] = {}
    for leaf in chain.tables:
        given[leaf] = torch.randn(tokens, fake_value(leaf).shape[-1], generator=generator, dtype=torch.float64)
        values[leaf] = given[leaf].view([tokens if size_key(s) != 1 else 1 for s in fake_value(leaf).shape[:-1]] + [-1])
    for leaf in chain.vectors:
        given[leaf] = torch.randn(shape[2], generator=generator, dtype=torch.float64)
        values[leaf] = given[leaf].view([s if s != 1 else 1 for s in fake_value(leaf).shape])
    rank = fake_value(chain.source.node).dim()
    spread = x.view([*x.shape, *[1] * (rank - 3)])
    values[chain.source.node] = torch.movedim(spread, (0, 1, 2), chain.source.order)
    if not chain.region:
        return x, given, x
    for leaf in functional.leaves(chain.region):
        if _is_size(leaf):
            size = fake_value(leaf)
            if isinstance(size, torch.SymInt) and size_key(size) != size_key(shape[0]):
                return None
            values[leaf] = tokens if isinstance(size, torch.SymInt) else size
    try:
        made = functional.evaluate_region(chain.region, values)
    except Exception:  # a foreign subgraph may fail in any way; then nothing is proven
        return None
    return (x, given, made) if isinstance(made, Tensor) and made.shape == x.shape else None


def _agrees(
    draw: tuple[Tensor, dict[Node | None, Tensor], Tensor], rope: Rope, cos: Node | None, sin: Node | None, weight: Any
) -> bool:
    x, given, made = draw
    rows = [None if table is None else given[table] for table in (cos, sin)]
    vector = None if weight is None or rope.norm == NO_NORM else given[weight]
    wanted = rotate_reference(x, rows[0], rows[1], vector, rope)
    return bool((made - wanted).abs().max() <= AGREEMENT * wanted.abs().max().clamp(min=1e-30))
