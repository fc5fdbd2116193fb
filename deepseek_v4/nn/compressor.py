"""The token-level compressor of CSA, HCA and the indexer (architecture section 3)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_v4.cache import entries_write, ring_read, ring_write
from deepseek_v4.config import Config
from deepseek_v4.execution import Execution
from deepseek_v4.layer_spec import LayerSpec
from deepseek_v4.nn.linear import PlainLinear
from deepseek_v4.nn.norm import RMSNorm
from deepseek_v4.nn.variables import Storage, Weight, variable
from deepseek_v4.positions import Tokens, window_ends
from pallas_kernels.compress import compress


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
        ratio, length, start, lengths = self.spec.compress_ratio, x.shape[1], tokens.start, tokens.lengths
        kv = self.wkv(x, jnp.float32)
        score = self.wgate(x, jnp.float32) + self.ape[...][tokens.positions % ratio]
        if tokens.documents is not None:
            return stored(self._packed(kv, score, tokens.documents, execution))[None], 0, {}
        rings = {} if cache is None else {name: cache[self.prefix + name] for name in ("entries", "kv", "score")}

        # Rows in position order, from the window before the one that `start` falls in (CSA) or from that one (HCA).
        history = self.spec.pool_rows - 1
        windows = -(-length // ratio)
        rows = (windows + (1 if self.spec.overlap else 0)) * ratio
        first = start // ratio
        offset = ratio - 1 - start % ratio

        def aligned(new: jax.Array, ring: jax.Array | None) -> jax.Array:
            if ring is None:
                before = jnp.zeros((new.shape[0], history, new.shape[2]), new.dtype)
            else:
                before = ring_read(ring, layer, start, history)
            joined = jnp.concatenate([before, new], axis=1)
            joined = jnp.pad(joined, [(0, 0), (0, max(0, ratio - 1 + rows - joined.shape[1])), (0, 0)])
            return jax.vmap(lambda a, at: jax.lax.dynamic_slice_in_dim(a, at, rows, axis=0))(joined, offset)

        new = self._pool(aligned(kv, rings.get("kv")), aligned(score, rings.get("score")), first, execution)
        new = stored(new)
        if cache is None:
            return new[None], 0, {}
        complete = (first[:, None] + jnp.arange(windows) + 1) * ratio <= (start + lengths)[:, None]
        updates = {
            "entries": self._write(rings["entries"], layer, first, complete, new, execution),
            "kv": ring_write(rings["kv"], layer, start, lengths, kv),
            "score": ring_write(rings["score"], layer, start, lengths, score),
        }
        return updates["entries"], layer, {self.prefix + name: array for name, array in updates.items()}

    def _write(self, entries, layer, first, complete, rows, execution: Execution):
        split = execution.mesh_axes("entries")
        if not split:
            return entries_write(entries, layer, first, complete, rows)

        # Said explicitly, that only the device writes that owns a row: nothing is sent.
        def write(*arguments):
            return entries_write(*arguments, rows_over=split)

        stacked = (None, "batch", "entries", None)
        per_window = ("batch", None)
        axes = (stacked, (), ("batch",), per_window, ("batch", None, None))
        return execution.per_shard(write, (entries, jnp.asarray(layer), first, complete, rows), axes, stacked)

    def _pool(self, kv: jax.Array, score: jax.Array, first: jax.Array, execution: Execution) -> jax.Array:
        return compress(
            kv,
            score,
            self.norm.weight[...],
            first,
            ratio=self.spec.compress_ratio,
            overlap=self.spec.overlap,
            rope=self.spec.rope,
            norm_eps=self.eps,
            dtype=execution.activation_dtype,
            implementation=execution.implementation,
        )

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
        entries = self._pool(windows(kv), windows(score), first, execution)
        return entries.reshape(batch, ends.shape[1], -1)
