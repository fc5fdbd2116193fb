"""What a checkpoint offers, whatever its format: the leaves of every item, readable in parts."""

import collections
import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from deepseek_v4.checkpoint.layout import Item, disk_dtype, is_expert, item_specs
from deepseek_v4.checkpoint.safetensors import Index
from deepseek_v4.config import Config
from deepseek_v4.nn.variables import Storage
from deepseek_v4.parameters import Path

PIECE_BYTES = 64 << 20
"""Bytes that are read or written at once, except where one expert's matrix is larger."""


class Leaf(Protocol):
    """One parameter of an item: shape and dtype of the parameter tree, read in parts."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, index: Index) -> np.ndarray:
        """The part that ``index`` (one slice per dim) selects, as a new array."""
        ...


class Source(Protocol):
    """A checkpoint as a tree of leaves per item; ``draft_copies`` as in ``layout.shards``."""

    config: Config
    storage: Storage
    draft_copies: tuple[str, ...]

    def leaves(self, item: Item) -> Mapping[Path, Leaf]:
        """The leaves of one item by path."""
        ...

    def fingerprint(self, item: Item) -> Any:
        """JSON that changes when the item's bytes change; None where nothing of the kind is known."""
        ...

    def config_json(self) -> dict[str, Any]:
        """``config.json`` of the model the leaves make up."""
        ...

    def travelling_files(self) -> Mapping[str, bytes]:
        """Tokenizer and other small files that belong to the checkpoint, by name."""
        ...


def whole(leaf: Leaf) -> Index:
    """The index of all of a leaf."""
    return tuple(slice(0, size) for size in leaf.shape)


def pieces(path: Path, leaf: Leaf) -> Iterator[Index]:
    """Indices that cut a leaf along its first dim: one expert each, or as many rows as fit ``PIECE_BYTES``."""
    if not leaf.shape:
        yield ()
        return
    row = int(np.prod(leaf.shape[1:], dtype=np.int64)) * leaf.dtype.itemsize
    rows = 1 if is_expert(path) else max(1, PIECE_BYTES // max(row, 1))
    for start in range(0, leaf.shape[0], rows):
        yield (
            slice(start, min(start + rows, leaf.shape[0])),
            *(slice(0, size) for size in leaf.shape[1:]),
        )


def read_ahead(reads: Iterable[tuple[Leaf, Index]], limit_bytes: int = 4 * PIECE_BYTES) -> Iterator[np.ndarray]:
    """The given parts in order, read by two threads at most ``limit_bytes`` (or one part) ahead of the consumer."""
    waiting: collections.deque[tuple[Future[np.ndarray], int]] = collections.deque()
    held = 0
    with ThreadPoolExecutor(2) as pool:
        for leaf, index in reads:
            size = math.prod(s.stop - s.start for s in index) * leaf.dtype.itemsize
            while waiting and held + size > limit_bytes:
                future, count = waiting.popleft()
                yield future.result()
                held -= count
            waiting.append((pool.submit(leaf.read, index), size))
            held += size
        while waiting:
            yield waiting.popleft()[0].result()


def bad_values(source: Source, item: Item) -> list[str]:
    """One line per tensor of an item that holds a non-finite scale or a token table entry that is no expert."""
    problems = []
    specs = item_specs(item, source.config, source.storage)
    leaves = source.leaves(item)
    for path, spec in specs.items():
        if spec.role not in ("scale", "token_table"):
            continue
        leaf = leaves[path]
        for index in pieces(path, leaf):
            values = leaf.read(index)
            name = item.prefix + ".".join(path)
            if is_expert(path):
                name = f"{item.prefix}ffn.experts.{index[0].start}.{'.'.join(path[2:])}"
            if spec.role == "token_table":
                count = int(np.sum((values < 0) | (values >= source.config.n_routed_experts)))
                what = f"entries outside 0..{source.config.n_routed_experts - 1}"
            elif disk_dtype(spec) == "F8_E8M0":
                count, what = int(np.sum(values.view(np.uint8) == 0xFF)), "non-finite scales (code 0xFF)"
            else:
                count, what = int(np.sum(~np.isfinite(values))), "non-finite scales"
            if count:
                problems.append(f"{name}: {count} {what}")
    return problems
