"""The token-level compressor of CSA, HCA and the indexer (architecture section 3)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_v4.cache import entries_write, ring_write
from deepseek_v4.config import Config
from deepseek_v4.execution import Execution
from deepseek_v4.layer_spec import LayerSpec
from deepseek_v4.nn.linear import PlainLinear
from deepseek_v4.nn.norm import RMSNorm
from deepseek_v4.nn.variables import Storage, Weight, variable
from deepseek_v4.positions import Tokens, window_ends
from deepseek_v4.stored_rows import COLUMNS, entry_axes
from pallas_kernels.compress import compress, pool_windows


class Compressor(nnx.Module):
    """Pools every ``compress_ratio`` tokens into one entry of ``width`` channels; float32 up to the normalisation.

    Its cache arrays are ``entries``, ``kv`` and ``score``, with ``prefix`` before each name.
    """

    def __init__(self, config: Config, spec: LayerSpec, width: int, storage: Storage, prefix: str = ""):
        self.spec = spec
        self.eps = config.rms_norm_eps
        self.prefix = prefix
        lanes = spec.lanes * width
        self.ape = variable(Weight, (spec.compress_ratio, lanes), jnp.float32, (None, None), "island")
        matrices = spec.lanes * (width,)
        self.wkv = PlainLinear(lanes, config.hidden_size, (None, "embed"), storage, matrices=matrices)
        self.wgate = PlainLinear(lanes, config.hidden_size, (None, "embed"), storage, matrices=matrices)
        self.norm = RMSNorm(width, config.rms_norm_eps, storage.norms)

    def __call__(
        self,
        x: jax.Array,
        tokens: Tokens,
        cache: dict[str, jax.Array] | None,
        layer: jax.Array | int,
        stored: Callable[[jax.Array], jax.Array],
        execution: Execution,
    ) -> tuple[jax.Array, jax.Array | int, dict[str, jax.Array]]:
        """All entries so far, among them those of every window that ends inside this call.

        x [B, S, d] are the inputs of ``tokens``; ``cache`` the layer group's arrays, of which ``layer`` is read and
        written, or None at the beginning of sequences that are not continued; ``stored`` gives an entry the form in
        which it is kept. Returns the entries [n, B, T, width], the layer to read of them, and the updated cache arrays.
        """
        ratio, start, lengths = self.spec.compress_ratio, tokens.start, tokens.lengths
        kv = execution.gather_tokens(self.wkv(x, jnp.float32))
        score = execution.gather_tokens(self.wgate(x, jnp.float32)) + self.ape[...][tokens.positions % ratio]
        if tokens.documents is not None:
            return stored(self._packed(kv, score, tokens.documents, execution))[None], 0, {}
        rings = {} if cache is None else {name: cache[self.prefix + name] for name in ("entries", "kv", "score")}

        new = stored(self._entries(kv, score, start, lengths, rings, layer, execution))
        if cache is None:
            return new[None], 0, {}
        first = start // ratio
        complete = (first[:, None] + jnp.arange(new.shape[1]) + 1) * ratio <= (start + lengths)[:, None]
        updates = {
            "entries": self._write(rings["entries"], layer, first, complete, new, execution),
            "kv": ring_write(rings["kv"], layer, start, lengths, kv),
            "score": ring_write(rings["score"], layer, start, lengths, score),
        }
        return updates["entries"], layer, {self.prefix + name: array for name, array in updates.items()}

    def _write(self, entries, layer, first, complete, rows, execution: Execution):
        split = execution.mesh_axes("entries")
        if not split and not isinstance(entries, COLUMNS):
            return entries_write(entries, layer, first, complete, rows)

        # Said explicitly, that only the device writes that owns a row: nothing is sent. Columns are written in a loop
        # over rows of the batch, each of which must be a device's own.
        def write(*arguments):
            return entries_write(*arguments, rows_over=split)

        stacked = entry_axes(entries, "entries")
        per_window = ("batch", None)
        axes = (stacked, (), ("batch",), per_window, ("batch", None, None))
        return execution.per_shard(write, (entries, jnp.asarray(layer), first, complete, rows), axes, stacked)

    def _entries(self, kv, score, start, lengths, rings, layer, execution: Execution) -> jax.Array:
        """The entries of the windows that end in this call."""
        options = self._options(execution) | {"implementation": execution.implementation}
        if not rings:
            return compress(kv, score, self.norm.weight[...], start, lengths, **options)

        def on_own_rows(kv, score, weight, start, lengths, kv_ring, score_ring, layer):
            return compress(
                kv, score, weight, start, lengths, kv_ring=kv_ring, score_ring=score_ring, layer=layer, **options
            )

        arguments = (kv, score, self.norm.weight[...], start, lengths, rings["kv"], rings["score"], jnp.asarray(layer))
        rows, stacked = ("batch", None, None), (None, "batch", None, None)
        axes = (rows, rows, (None,), ("batch",), ("batch",), stacked, stacked, ())
        return execution.per_shard(on_own_rows, arguments, axes, rows)

    def _options(self, execution: Execution) -> dict[str, Any]:
        return {
            "ratio": self.spec.compress_ratio,
            "overlap": self.spec.overlap,
            "rope": self.spec.rope,
            "norm_eps": self.eps,
            "dtype": execution.activation_dtype,
        }

    def _packed(self, kv: jax.Array, score: jax.Array, documents: jax.Array, execution: Execution) -> jax.Array:
        """Entries of rows of several documents, in the order in which they are completed: [B, T, width]."""
        ratio, batch = self.spec.compress_ratio, kv.shape[0]
        ends = window_ends(documents, ratio)
        index = jnp.maximum(ends[..., None] + jnp.arange(1 - self.spec.pool_rows, 1), 0)

        def windows(rows: jax.Array) -> jax.Array:
            taken = jax.vmap(lambda a, i: a[i])(rows, index.reshape(batch, -1))
            return taken.reshape(-1, self.spec.pool_rows, rows.shape[-1])

        first = (jnp.take_along_axis(documents, ends, axis=1) // ratio).reshape(-1)
        # Every window is a row of its own: its neighbours may be another document's.
        entries = pool_windows(windows(kv), windows(score), self.norm.weight[...], first, **self._options(execution))
        return entries.reshape(batch, ends.shape[1], -1)
