"""Matrix products counted in a traced program: what an implementation computes, to hold against the list of terms."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def dot_operations(function: Callable, *args: Any) -> Counter[tuple[str, ...]]:
    """Operations of every ``dot_general`` that ``function(*args)`` runs, by what they multiply.

    A multiply-add is two operations; what has no matrix on one side, a weighted sum, is no product. The body of a scan
    counts as often as it runs, of a conditional the branch with the most operations; a ``while`` whose trip count the
    trace does not know is refused with ``ValueError``, as are Pallas kernels, whose products a trace does not show.
    Keys are the shapes and dtypes of the operands.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: core.Jaxpr) -> Counter[tuple[str, ...]]:
    total: Counter[tuple[str, ...]] = Counter()
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            contracting, batch = params["dimension_numbers"]
            left, right = (_array(v) for v in equation.invars)
            if any(len(c) + len(b) == a.ndim for c, b, a in zip(contracting, batch, (left, right), strict=True)):
                continue
            contracted = contracting[0]
            depth = math.prod(left.shape[axis] for axis in contracted)
            key = tuple(f"{a.dtype}{list(a.shape)}" for a in (left, right))
            total[key] += 2 * depth * math.prod(_array(equation.outvars[0]).shape)
        elif name in ("while", "pallas_call"):
            inner = [sub for sub in _inner(params) if _count(sub)]
            if inner or name == "pallas_call":
                raise ValueError(f"{name}: its products cannot be counted in a trace")
        elif name == "cond":
            branches = [_count(branch.jaxpr) for branch in params["branches"]]
            total += branches[max(range(len(branches)), key=lambda index: branches[index].total())]
        else:
            times = params["length"] if name == "scan" else 1
            for sub in _inner(params):
                for key, operations in _count(sub).items():
                    total[key] += times * operations
    return total


def _array(variable: Any) -> jax.core.ShapedArray:
    return variable.aval


def _inner(params: dict[str, Any]) -> list[core.Jaxpr]:
    found = []
    for value in jax.tree.leaves(list(params.values()), is_leaf=_is_jaxpr):
        if isinstance(value, core.ClosedJaxpr):
            found.append(value.jaxpr)
        elif isinstance(value, core.Jaxpr):
            found.append(value)
    return found


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, core.ClosedJaxpr | core.Jaxpr)
