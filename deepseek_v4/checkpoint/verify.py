"""Tensor-by-tensor equality of two checkpoints of any formats."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from deepseek_v4.checkpoint.huggingface import collapse_experts
from deepseek_v4.checkpoint.layout import Item, expert_name, is_expert, items
from deepseek_v4.checkpoint.safetensors import Index
from deepseek_v4.checkpoint.source import Leaf, Source, pieces, read_ahead
from deepseek_v4.parameters import Path

_PLAIN = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How two checkpoints differ: tensors compared and equal, and a line per difference.

    ``widened`` are the tensors whose values are equal although one side keeps them in BF16 and the other in F32.
    """

    compared: int
    widened: int
    differences: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether no difference was found."""
        return not self.differences


def compare(
    first: Source,
    second: Source,
    on_bytes: Callable[[int], None] = lambda count: None,
    on_item: Callable[[str], None] = lambda name: None,
) -> Comparison:
    """Compares every tensor of two checkpoints, holding a few pieces of them at a time.

    Tensors are equal when their bytes are; plain tensors (BF16, F32) of different dtypes when their values are.
    """
    differences, compared, widened = [], 0, 0
    if first.config != second.config:
        for field in dataclasses.fields(first.config):
            a, b = getattr(first.config, field.name), getattr(second.config, field.name)
            if a != b:
                differences.append(f"config.{field.name}: {a} and {b}")
    ours = {item.name: item for item in items(first.config)}
    theirs = {item.name: item for item in items(second.config)}
    differences += [f"{name}: only in the first" for name in ours if name not in theirs]
    differences += [f"{name}: only in the second" for name in theirs if name not in ours]
    for name, item in ours.items():
        if name not in theirs:
            continue
        on_item(name)
        a, b = first.leaves(item), second.leaves(theirs[name])
        differences += [f"{item.prefix}{'.'.join(path)}: only in the first" for path in a if path not in b]
        differences += [f"{item.prefix}{'.'.join(path)}: only in the second" for path in b if path not in a]
        both = {path: (a[path], b[path]) for path in a if path in b}
        counts = _compare_item(item, both, differences, on_bytes)
        compared, widened = compared + counts[0], widened + counts[1]
    return Comparison(compared, widened, tuple(collapse_experts(differences)))


def _compare_item(
    item: Item,
    leaves: Mapping[Path, tuple[Leaf, Leaf]],
    differences: list[str],
    on_bytes: Callable[[int], None],
) -> tuple[int, int]:
    work: list[tuple[Path, Leaf, Leaf, Index]] = []
    compared = widened = 0
    for path, (a, b) in leaves.items():
        tensors = a.shape[0] if is_expert(path) else 1
        compared += tensors
        name = item.prefix + ".".join(path)
        if tuple(a.shape) != tuple(b.shape):
            differences.append(f"{name}: shapes {list(a.shape)} and {list(b.shape)}")
        elif a.dtype != b.dtype and not {a.dtype.name, b.dtype.name} <= set(_PLAIN):
            differences.append(f"{name}: dtypes {a.dtype.name} and {b.dtype.name}")
        else:
            widened += tensors if a.dtype != b.dtype else 0
            work += [(path, a, b, index) for index in pieces(path, a)]

    different: dict[str, int] = {}
    arrays = read_ahead((leaf, index) for _, a, b, index in work for leaf in (a, b))
    for path, a, b, index in work:
        x, y = next(arrays), next(arrays)
        on_bytes(x.nbytes)
        if a.dtype == b.dtype:
            x, y = (v.reshape(-1).view(np.uint8).reshape(-1, v.dtype.itemsize) for v in (x, y))
            unequal = 0 if np.array_equal(x, y) else int(np.sum(np.any(x != y, axis=-1)))
        else:
            x, y = x.astype(np.float32), y.astype(np.float32)
            unequal = int(np.sum((x != y) & ~(np.isnan(x) & np.isnan(y))))
        if unequal:
            name = item.prefix + ".".join(path)
            if is_expert(path):
                name = expert_name(item.prefix, path, index[0].start)
            different[name] = different.get(name, 0) + unequal
    differences += [f"{name}: {count} values differ" for name, count in different.items()]
    return compared, widened
