"""Dotted names of parameters, and patterns that name them."""

import fnmatch
import re

_LAYER = re.compile(r"(layers|mtp)\.\d+\.")


def unnumbered(name: str) -> str:
    """A dotted name without the number of its layer: "attn.wq_a.weight"."""
    return _LAYER.sub("", name, count=1)


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern names a parameter or a module that it is part of.

    ``name`` is dotted ("layers.3.attn.wq_a.weight"). ``pattern`` is a shell pattern whose ``*`` also spans dots; it is
    held against the name and every leading part of it, with the number of the layer and without: "attn",
    "attn.wq_*", "*.norm.weight", "layers.3.attn" and "layers.3" all match.
    """
    for text in (name, unnumbered(name)):
        parts = text.split(".")
        if any(fnmatch.fnmatchcase(".".join(parts[:count]), pattern) for count in range(1, len(parts) + 1)):
            return True
    return False
