"""Exact reuse of what prompts begin with: compressed entries by the piece, rings by snapshots, in memory and on disk.

A prompt's beginning is cut into units of one engine piece (a multiple of 128 tokens, so that every layer's windows are
whole). A unit keeps the compressed entries it has produced and, at every ``snapshot_every``-th unit, a snapshot of what
is indexed by position: the window rings, the compressors' rows and the draft's streams (the paper's third strategy for
window caches: what lies between snapshots is computed again). Restored are the very bytes that were computed, and what
follows runs through the same calls as it would have: a hit gives the tokens of a miss, bit by bit. Only what prompts
produce is kept; decoded tokens went through calls of another shape.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from deepseek_v4.cache import ENTRIES
from deepseek_v4.checkpoint.orbax_directory import write_atomically
from deepseek_v4.engine.state import State, placed, stacked
from deepseek_v4.model import Model
from deepseek_v4.stored_rows import positions_axis, positions_in_row, put_columns

UNIT_STEP = 128
"""Units are multiples of this many tokens: the longest window that a layer compresses."""

Put = Callable[[Any], Any]


class PrefixError(ValueError):
    """A prefix store that does not fit the model or the engine."""


@dataclasses.dataclass
class _Unit:
    """What one unit keeps: host arrays, or device arrays on their way."""

    entries: list[Any]
    rings: list[Any] | None
    parent: bytes | None
    children: int = 0

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (*self.entries, *(self.rings or ())))


class _Programs(NamedTuple):
    take_entries: Callable
    take_rings: Callable
    put_entries: Callable
    put_rings: Callable


class PrefixStore:
    """Keeps what prompts have computed, up to ``max_bytes`` in memory, and on disk in ``directory`` if there is one.

    ``unit`` is the engine's largest piece. The least recently used beginnings go first, always from their ends. On disk
    units are kept until ``max_disk_bytes`` (None: no bound); ``fingerprint`` names the weights they belong to. Raises
    ``PrefixError`` for a unit that is not a multiple of 128, and for a directory of another model or other settings.
    """

    def __init__(
        self,
        unit: int,
        max_bytes: int,
        *,
        snapshot_every: int = 1,
        directory: str | Path | None = None,
        max_disk_bytes: int | None = None,
        fingerprint: str = "",
    ):
        if unit < 1 or unit % UNIT_STEP:
            raise PrefixError(f"unit: prompts are reused in multiples of {UNIT_STEP} tokens, found {unit}")
        if snapshot_every < 1:
            raise PrefixError(f"snapshot_every: expected at least 1, found {snapshot_every}")
        if directory is not None and not fingerprint:
            raise PrefixError("fingerprint: a store on disk needs to know which weights it belongs to")
        self.unit = unit
        self.max_bytes = max_bytes
        self.snapshot_every = snapshot_every
        self.directory = None if directory is None else Path(directory)
        self.max_disk_bytes = max_disk_bytes
        self.fingerprint = fingerprint
        self.hits = self.misses = 0
        self._units: OrderedDict[bytes, _Unit] = OrderedDict()
        self._bytes = 0
        self._programs: _Programs | None = None
        self._model: Model | None = None

    @property
    def nbytes(self) -> int:
        """Bytes kept in memory."""
        return self._bytes

    def check(self, model: Model, chunks: Sequence[int]) -> None:
        """Binds the store to an engine's model and pieces; raises ``PrefixError`` if it does not fit them."""
        if chunks[0] != self.unit:
            raise PrefixError(f"unit: the store keeps {self.unit} tokens at a time, the engine reads {chunks[0]}")
        if self._model is not None and self._model != model:
            raise PrefixError("the store belongs to another model; make one for each")
        self._model = model
        self._programs = _programs(model)
        if self.directory is not None and jax.process_count() > 1:
            raise PrefixError("directory: with several processes prefixes are kept in memory only")
        if self.directory is not None:
            self._open_directory(model)

    def compile(self, staging: State, put: Put) -> State:
        """Runs every program once, on row 0 of ``staging``, which stays as it is."""
        zero = put(np.int32(0))
        assert self._programs is not None
        entries = _lists(self._programs.take_entries(staging, zero, zero, unit=self.unit))
        rings = _lists(self._programs.take_rings(staging, zero))
        staging = self._programs.put_entries(staging, zero, zero, put(_host(entries)))
        return self._programs.put_rings(staging, zero, put(_host(rings)))

    def keys(self, tokens: Sequence[int]) -> list[bytes]:
        """The names of the units that ``tokens`` begin with: each depends on all tokens up to its end."""
        array, keys, key = np.asarray(tokens, np.int32), [], self.fingerprint.encode()
        for end in range(self.unit, len(array) + 1, self.unit):
            key = hashlib.sha256(key + array[end - self.unit : end].tobytes()).digest()
            keys.append(key)
        return keys

    def restore(self, staging: State, row: int, keys: Sequence[bytes], length: int, put: Put) -> tuple[State, int]:
        """Brings row ``row`` to the state after the longest known beginning of a prompt of ``length`` tokens.

        At least one token is left to run. Returns the new state and how many tokens need not be read.
        """
        assert self._programs is not None
        known, found = 0, []
        for index, key in enumerate(keys[: (length - 1) // self.unit]):
            unit = self._find(key)
            if unit is None:
                break
            found.append(unit)
            known = index + 1 if unit.rings is not None else known
        if not known:
            self.misses += 1
            return staging, 0
        self.hits += 1
        at = put(np.int32(row))
        for index, unit in enumerate(found[:known]):
            first = put(np.int32(index * self.unit))
            staging = self._programs.put_entries(staging, at, first, put(_host(unit.entries)))
        rings = found[known - 1].rings
        assert rings is not None
        return self._programs.put_rings(staging, at, put(_host(rings))), known * self.unit

    def keep(self, staging: State, row: int, keys: Sequence[bytes], put: Put) -> None:
        """Keeps the last unit of ``keys``, which row ``row`` has just read; copies run beside what follows."""
        assert self._programs is not None
        key, parent = keys[-1], keys[-2] if len(keys) > 1 else None
        if self._find(key) is not None or (parent is not None and parent not in self._units):
            return
        at, first = put(np.int32(row)), put(np.int32((len(keys) - 1) * self.unit))
        entries = _lists(self._programs.take_entries(staging, at, first, unit=self.unit))
        snapshot = len(keys) % self.snapshot_every == 0
        rings = _lists(self._programs.take_rings(staging, at)) if snapshot else None
        for array in (*entries, *(rings or ())):
            array.copy_to_host_async()
        unit = _Unit(entries, rings, parent)
        self._add(key, unit)
        if self.directory is not None:
            self._write(key, unit)

    # --- in memory ------------------------------------------------------------------------------------------------

    def _find(self, key: bytes) -> _Unit | None:
        unit = self._units.get(key)
        if unit is None and self.directory is not None:
            unit = self._read(key)
            if unit is not None:
                if unit.parent is not None and unit.parent not in self._units:
                    return None
                self._add(key, unit)
        elif unit is not None:
            self._units.move_to_end(key)
            unit.entries = _host(unit.entries)
            unit.rings = None if unit.rings is None else _host(unit.rings)
        return unit

    def _add(self, key: bytes, unit: _Unit) -> None:
        self._units[key] = unit
        self._bytes += unit.nbytes
        if unit.parent is not None:
            self._units[unit.parent].children += 1
        while self._bytes > self.max_bytes:
            # A unit is of no use without those before it: only ends go.
            victim = next((k for k, u in self._units.items() if not u.children), None)
            if victim is None:
                return
            gone = self._units.pop(victim)
            self._bytes -= gone.nbytes
            if gone.parent is not None:
                self._units[gone.parent].children -= 1

    # --- on disk --------------------------------------------------------------------------------------------------

    def _open_directory(self, model: Model) -> None:
        assert self.directory is not None
        self.directory.mkdir(parents=True, exist_ok=True)
        execution = model.execution
        about = {
            "fingerprint": self.fingerprint,
            "unit": self.unit,
            "dtype": execution.dtype,
            "simulate": sorted(execution.simulate),
            "layout": execution.cache_layout,
        }
        path = self.directory / "store.json"
        try:
            found = json.loads(path.read_bytes())
        except FileNotFoundError:
            write_atomically(path, json.dumps(about).encode())
            return
        except ValueError:
            found = None
        if found != about:
            raise PrefixError(
                f"{path}: this directory keeps {found}, this run needs {about}; choose another directory or remove it"
            )

    def _path(self, key: bytes) -> Path:
        assert self.directory is not None
        return self.directory / f"{key.hex()}.unit"

    def _write(self, key: bytes, unit: _Unit) -> None:
        arrays = [*_host(unit.entries), *_host(unit.rings or [])]
        header = {
            "parent": None if unit.parent is None else unit.parent.hex(),
            "entries": len(unit.entries),
            "arrays": [(array.dtype.name, array.shape) for array in arrays],
        }
        text = json.dumps(header).encode() + b"\n"
        write_atomically(self._path(key), text + b"".join(array.tobytes() for array in arrays))
        if self.max_disk_bytes is not None:
            self._trim_directory(self.max_disk_bytes)

    def _trim_directory(self, limit: int) -> None:
        assert self.directory is not None
        found = [(path.stat(), path) for path in self.directory.glob("*.unit")]
        total = sum(stat.st_size for stat, _ in found)
        for stat, path in sorted(found, key=lambda item: item[0].st_mtime_ns):
            if total <= limit:
                return
            path.unlink(missing_ok=True)
            total -= stat.st_size

    def _read(self, key: bytes) -> _Unit | None:
        path = self._path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        line, _, body = data.partition(b"\n")
        try:
            header = json.loads(line)
            arrays, offset = [], 0
            for name, shape in header["arrays"]:
                dtype = np.dtype(getattr(ml_dtypes, name, name))
                count = int(np.prod(shape))
                arrays.append(np.frombuffer(body, dtype, count, offset).reshape(shape))
                offset += count * dtype.itemsize
            parent = None if header["parent"] is None else bytes.fromhex(header["parent"])
            split = header["entries"]
        except (ValueError, KeyError, TypeError):
            path.unlink(missing_ok=True)  # not whole: it is computed again
            return None
        os.utime(path)
        return _Unit(arrays[:split], arrays[split:] or None, parent)


def _lists(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree)


def _host(arrays: Sequence[Any]) -> list[np.ndarray]:
    return [np.asarray(array) for array in arrays]


@functools.lru_cache(maxsize=16)
def _programs(model: Model) -> _Programs:
    """Copies between row ``row`` of a state and a unit: arrays [n, rows, w] in the order of the state's leaves."""
    ratios: dict[tuple[Any, Any], int] = {
        (g, j): spec.compress_ratio for g, group in enumerate(model.groups) for j, spec in enumerate(group.pattern)
    }

    def ratio_of(path) -> int | None:
        """Tokens per row of a leaf that holds entries; None for rings."""
        names = [getattr(key, "key", getattr(key, "idx", getattr(key, "name", None))) for key in path]
        if not any(name in ENTRIES for name in names):
            return None
        _, group, member = names[:3]
        sharing = positions_in_row(path, model.config.head_dim, model.config.qk_rope_head_dim)
        return ratios[group, member] * sharing

    def leaves(state: State):
        return [(path, leaf) for path, leaf in jax.tree.leaves_with_path(state["cache"]) if path[0].key != "position"]

    def row_of(path, leaf, row):
        axis = 1 if stacked(path) else 0
        return lax.dynamic_index_in_dim(leaf, row, axis, keepdims=False)

    def whole(arrays):
        placement = model.execution.placement
        return arrays if placement is None else lax.with_sharding_constraint(arrays, placement.replicated())

    def take_entries(state, row, first, *, unit):
        taken = []
        for path, leaf in leaves(state):
            if (ratio := ratio_of(path)) is not None:
                # A cache may end within the unit (its length is a multiple of 128 only): what is missing is zero.
                source = row_of(path, leaf, row)
                index = first // ratio + jnp.arange(unit // ratio)
                taken.append(jnp.take(source, index, axis=positions_axis(path) - 1, mode="fill", fill_value=0))
        return whole(taken)

    def take_rings(state, row):
        return whole([row_of(path, leaf, row) for path, leaf in leaves(state) if ratio_of(path) is None])

    def put_all(state, row, arrays, wanted, write):
        arrays = iter(arrays)

        def update(path, leaf):
            if path[0].key == "position" or not wanted(ratio_of(path)):
                return leaf
            return write(path, leaf, next(arrays))

        cache = jax.tree.map_with_path(update, state["cache"])
        return placed(model, {**state, "cache": cache})

    def put_entries(state, row, first, arrays):
        def write(path, leaf, rows):
            at = first // ratio_of(path)
            if positions_axis(path) == 3:
                return put_columns(leaf, (0, row), at, jnp.ones(rows.shape[2], bool), rows[:, None])
            slots = at + jnp.arange(rows.shape[1])
            return leaf.at[:, row, slots].set(rows, mode="drop")

        return put_all(state, row, arrays, lambda ratio: ratio is not None, write)

    def put_rings(state, row, arrays):
        def write(path, leaf, ring):
            return leaf.at[:, row].set(ring) if stacked(path) else leaf.at[row].set(ring)

        return put_all(state, row, arrays, lambda ratio: ratio is None, write)

    return _Programs(
        jax.jit(take_entries, static_argnames="unit"),
        jax.jit(take_rings),
        jax.jit(put_entries, donate_argnums=0),
        jax.jit(put_rings, donate_argnums=0),
    )
