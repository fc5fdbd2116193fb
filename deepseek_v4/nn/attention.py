"""One attention layer of any kind: window, compressed branch, grouped output (architecture section 2)."""

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_v4.cache import ring_write
from deepseek_v4.config import Config
from deepseek_v4.execution import Execution
from deepseek_v4.formats import simulate_kv
from deepseek_v4.layer_spec import LayerSpec
from deepseek_v4.nn.compressor import Compressor
from deepseek_v4.nn.indexer import Indexer
from deepseek_v4.nn.linear import Linear
from deepseek_v4.nn.norm import RMSNorm, rms_norm
from deepseek_v4.nn.variables import Storage, Weight, variable
from deepseek_v4.rope import apply_rope
from deepseek_v4.visibility import visible_entries
from pallas_kernels.compressed_attention import compressed_attention


class Attention(nnx.Module):
    """SWA, CSA or HCA, as ``spec`` says; one KV head that is key and value at once."""

    def __init__(self, config: Config, spec: LayerSpec, storage: Storage):
        c = config
        self.config = config
        self.spec = spec
        heads, groups = c.num_attention_heads, c.o_groups
        self.attn_sink = variable(Weight, (heads,), jnp.float32, ("heads",), "island")
        self.wq_a = Linear(c.q_lora_rank, c.hidden_size, ("q_lora", "embed"), storage)
        self.q_norm = RMSNorm(c.q_lora_rank, c.rms_norm_eps, storage.norms)
        # Queries are independent by head group, the groups that wo_a mixes.
        query_groups = groups * (heads * c.head_dim // groups,)
        self.wq_b = Linear(heads * c.head_dim, c.q_lora_rank, ("heads", "q_lora"), storage, matrices=query_groups)
        self.wkv = Linear(c.head_dim, c.hidden_size, (None, "embed"), storage)
        self.kv_norm = RMSNorm(c.head_dim, c.rms_norm_eps, storage.norms)
        self.wo_a = Linear(
            groups * c.o_lora_rank, heads * c.head_dim // groups, ("o_groups", None), storage, groups=groups
        )
        self.wo_b = Linear(c.hidden_size, groups * c.o_lora_rank, ("embed", "o_groups"), storage)
        self.compressor = Compressor(c, spec, c.head_dim, storage) if spec.compress_ratio else None
        self.indexer = Indexer(c, spec, storage) if spec.indexer else None

    def __call__(
        self,
        x: jax.Array,
        cache: dict[str, jax.Array] | None,
        layer: jax.Array | int,
        start: jax.Array,
        lengths: jax.Array,
        execution: Execution,
    ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        """Attends from the tokens of positions start .. start + S - 1 of each row, of which ``lengths`` are real.

        x [B, S, d] is the normed layer input; cache the layer group's arrays [n, B, ...], of which ``layer`` is read
        and written, or None for sequences that begin at position 0 and are not continued. A negative ``start`` marks
        leading tokens that do not exist. Returns [B, S, d] and the updated cache.
        """
        c, spec = self.config, self.spec
        batch, length, _ = x.shape
        positions = start[:, None] + jnp.arange(length)
        updates: dict[str, jax.Array] = {}

        qr = self.q_norm(self.wq_a(x, execution))
        q = self.wq_b(qr, execution).reshape(batch, length, c.num_attention_heads, c.head_dim)
        q = execution.constrain(q, ("batch", None, "heads", None))
        q = apply_rope(rms_norm(q, None, c.rms_norm_eps), positions[..., None], spec.rope)

        kv = apply_rope(self.kv_norm(self.wkv(x, execution)), positions, spec.rope)
        kv = self._stored(kv, execution)
        if cache is None:
            window, ring = jnp.pad(kv, [(0, 0), (c.sliding_window - 1, 0), (0, 0)]), None
        else:
            window, ring = kv, cache["window"]
            updates["window"] = ring_write(ring, layer, start, lengths, kv)

        entries = counts = indices = None
        if self.compressor is not None:
            # Padding sees what the last real token sees: entries beyond that have not been written.
            last = (start + lengths)[:, None] - 1
            counts = visible_entries(jnp.minimum(positions, last), spec.compress_ratio)
            entries, _, new = self.compressor(
                x, cache, layer, start, lengths, lambda rows: self._stored(rows, execution), execution
            )
            updates |= new
            if self.indexer is not None:
                indices, new = self.indexer(x, qr, cache, layer, start, lengths, counts, execution)
                updates |= new

        def attend(q, window, sink, start, ring, entries, layer, counts, indices):
            return compressed_attention(
                q,
                window,
                sink,
                start,
                ring=ring,
                entries=entries,
                layer=layer,
                counts=counts,
                indices=indices,
                window_size=c.sliding_window,
                scale=c.head_dim**-0.5,
                implementation=execution.implementation,
            )

        rows, heads, stacked = ("batch", None, None), ("batch", None, "heads", None), (None, "batch", None, None)
        # Without a cache the entries of this call are the only layer there is.
        layer = jnp.asarray(0 if cache is None else layer)
        out = execution.per_shard(
            attend,
            (q, window, self.attn_sink[...], start, ring, entries, layer, counts, indices),
            (heads, rows, ("heads",), ("batch",), stacked, stacked, (), ("batch", None), rows),
            heads,
        )
        # Keys carry their position into the values; turning the output back makes it relative.
        out = apply_rope(out, positions[..., None], spec.rope, inverse=True)
        out = out.reshape(batch, length, c.o_groups, -1)
        out = self.wo_a(execution.constrain(out, ("batch", None, "o_groups", None)), execution)
        out = self.wo_b(out.reshape(batch, length, -1), execution)
        return execution.constrain(out, ("batch", None, None)), (None if cache is None else {**cache, **updates})

    def _stored(self, entries: jax.Array, execution: Execution) -> jax.Array:
        return simulate_kv(entries, self.spec.rope.dims) if "kv" in execution.simulate else entries
