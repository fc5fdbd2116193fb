"""The token-level compressor of CSA, HCA and the indexer (architecture section 3)."""

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
from pallas_kernels.compress import compress


class Compressor(nnx.Module):
    """Pools every ``ratio`` tokens into one entry of ``width`` channels; float32 up to the normalisation."""

    def __init__(self, config: Config, spec: LayerSpec, width: int, storage: Storage):
        self.spec = spec
        self.eps = config.rms_norm_eps
        lanes = spec.lanes * width
        self.ape = variable(Weight, (spec.compress_ratio, lanes), jnp.float32, (None, None), "island")
        self.wkv = PlainLinear(lanes, config.hidden_size, (None, "embed"), storage)
        self.wgate = PlainLinear(lanes, config.hidden_size, (None, "embed"), storage)
        self.norm = RMSNorm(width, config.rms_norm_eps, storage.norms)

    def __call__(
        self,
        x: jax.Array,
        state: tuple[jax.Array, jax.Array] | None,
        layer: jax.Array | int,
        start: jax.Array,
        lengths: jax.Array,
        execution: Execution,
    ) -> tuple[jax.Array, jax.Array, jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Entries of every window that ends inside this call.

        x [B, S, d] are the tokens of positions start .. start + S - 1 [B], of which the first ``lengths`` [B] are real;
        state the (kv, score) rings of earlier tokens, or None at the beginning of the sequences (start 0). Returns
        entries [B, W, width], the window index of the first [B], which of them are complete [B, W], and the new state.
        """
        ratio, length = self.spec.compress_ratio, x.shape[1]
        positions = start[:, None] + jnp.arange(length)
        kv = self.wkv(x, jnp.float32)
        score = self.wgate(x, jnp.float32) + self.ape[...][positions % ratio]

        # Rows in position order, from the window before the one that `start` falls in (CSA) or from that one (HCA).
        history = self.spec.pool_rows - 1
        windows = -(-length // ratio)
        rows = (windows + (1 if self.spec.overlap else 0)) * ratio
        if state is None:
            # start is 0: nothing came before, and window 0 begins at the first row.
            before = history + 1 - ratio

            def aligned(new, ring):
                tail = rows - before - length
                return jnp.pad(new, [(0, 0), (before, max(tail, 0)), (0, 0)])[:, :rows]

            new_state = None
            rings = (None, None)
        else:
            offset = ratio - 1 - start % ratio

            def aligned(new, ring):
                joined = jnp.concatenate([ring_read(ring, layer, start, history), new], axis=1)
                joined = jnp.pad(joined, [(0, 0), (0, max(0, ratio - 1 + rows - joined.shape[1])), (0, 0)])
                return jax.vmap(lambda a, first: jax.lax.dynamic_slice_in_dim(a, first, rows, axis=0))(joined, offset)

            new_state = tuple(ring_write(r, layer, start, lengths, a) for r, a in zip(state, (kv, score), strict=True))
            rings = state

        first = start // ratio
        entries = compress(
            aligned(kv, rings[0]),
            aligned(score, rings[1]),
            self.norm.weight[...],
            first,
            ratio=ratio,
            overlap=self.spec.overlap,
            rope=self.spec.rope,
            norm_eps=self.eps,
            dtype=execution.activation_dtype,
            implementation=execution.implementation,
        )
        complete = (first[:, None] + jnp.arange(windows) + 1) * ratio <= (start + lengths)[:, None]
        return entries, first, complete, new_state


def store_entries(
    cache: jax.Array | None,
    layer: jax.Array | int,
    first: jax.Array,
    complete: jax.Array,
    rows: jax.Array,
) -> tuple[jax.Array, jax.Array | int]:
    """New entries added to a cache [n, B, T, w]; without one they are all there is. Returns (entries, layer)."""
    if cache is None:
        return rows[None], 0
    return entries_write(cache, layer, first, complete, rows), layer
