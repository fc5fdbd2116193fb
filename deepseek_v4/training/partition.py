"""Which parameters are trained: masks by name, and trees cut into what is trained and what is not."""

from collections.abc import Sequence
from typing import Any

import jax

from deepseek_v4.names import matches, unnumbered
from deepseek_v4.nn.variables import Weight
from deepseek_v4.parameters import ParameterSpec, is_spec

Tree = Any


def parameter_names(specs: Tree) -> Tree:
    """The released names of every leaf of ``Model.parameter_specs()``, one per layer of its stack.

    A leaf of a scan group answers to several: ("layers.3.attn.wq_a.weight", "layers.5.attn.wq_a.weight"). Routed
    experts are one leaf per layer: "layers.3.ffn.experts.w1.weight".
    """

    def named(tree: Tree, prefixes: Sequence[str]) -> Tree:
        return jax.tree_util.tree_map_with_path(
            lambda path, spec: tuple(prefix + ".".join(key.key for key in path) for prefix in prefixes),
            tree,
            is_leaf=is_spec,
        )

    groups, first = [], 0
    for group in specs["groups"]:
        repeats, members = jax.tree.leaves(group, is_leaf=is_spec)[0].shape[0], len(group)
        layers = [range(first + j, first + members * repeats, members) for j in range(members)]
        groups.append(tuple(named(m, [f"layers.{i}." for i in stack]) for m, stack in zip(group, layers, strict=True)))
        first += members * repeats
    drafts = tuple(named(block, [f"mtp.{i}."]) for i, block in enumerate(specs["drafts"]))
    return {"shell": named(specs["shell"], [""]), "groups": tuple(groups), "drafts": drafts}


def trainable_mask(specs: Tree, *, freeze: Sequence[str] = (), only: Sequence[str] = ()) -> Tree:
    """A bool per leaf of ``Model.parameter_specs()``: whether it is trained.

    Trained is what some pattern of ``only`` names (all, if there is none) and no pattern of ``freeze`` does; buffers
    and packed weights never are. Patterns are those of ``names.matches``: "attn", "ffn.experts.*", "*.norm*",
    "layers.3.attn.wq_a", "mtp", "embed". Raises ``ValueError`` for a pattern that names no parameter, or in ``only`` no
    trainable one, and where patterns name some layers of a stack that is one array, but not all.
    """
    leaves, structure = jax.tree.flatten(specs, is_leaf=is_spec)
    names = structure.flatten_up_to(parameter_names(specs))  # type: ignore[attr-defined]
    pairs = list(zip(leaves, names, strict=True))
    for what, patterns, eligible in (("freeze", freeze, False), ("only", only, True)):
        for pattern in patterns:
            candidates = [name for spec, leaf in pairs if _is_weight(spec) or not eligible for name in leaf]
            if not any(matches(pattern, name) for name in candidates):
                kind = "trainable parameter" if eligible else "parameter"
                known = sorted({unnumbered(name) for name in candidates})
                raise ValueError(f"{what}: pattern {pattern!r} names no {kind}; there are: {', '.join(known)}")

    def named(leaf: Sequence[str], patterns: Sequence[str], what: str) -> bool:
        hits = [name for name in leaf if any(matches(pattern, name) for pattern in patterns)]
        if hits and len(hits) < len(leaf):
            raise ValueError(
                f"{what}: {hits[0]} is named but {next(n for n in leaf if n not in hits)} is not, and the layers of a "
                "scan group are one array: name all of them or none"
            )
        return bool(hits)

    flags = [
        _is_weight(spec) and (not only or named(leaf, only, "only")) and not named(leaf, freeze, "freeze")
        for spec, leaf in pairs
    ]
    return jax.tree.unflatten(structure, flags)


def _is_weight(spec: ParameterSpec) -> bool:
    return issubclass(spec.kind, Weight)


def split(params: Tree, mask: Tree) -> tuple[Tree, Tree]:
    """(trained, frozen): both in the structure of ``params``, with None where a leaf is in the other."""
    trained = jax.tree.map(lambda leaf, keep: leaf if keep else None, params, mask)
    frozen = jax.tree.map(lambda leaf, keep: None if keep else leaf, params, mask)
    return trained, frozen


def merge(trained: Tree, frozen: Tree) -> Tree:
    """The inverse of ``split``."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda leaf: leaf is None)
