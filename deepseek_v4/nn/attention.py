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
from deepseek_v4.positions import Tokens, entry_range
from deepseek_v4.rope import apply_rope
from deepseek_v4.stored_rows import entry_axes
from pallas_kernels.compressed_attention import compressed_attention, index_divergence


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
        tokens: Tokens,
        cache: dict[str, jax.Array] | None,
        layer: jax.Array | int,
        execution: Execution,
    ) -> tuple[jax.Array, dict[str, jax.Array] | None, dict[str, jax.Array]]:
        """Attends from each of the tokens of a call to its window and to the entries that it may see.

        x [B, S, d] is the normed layer input; cache the layer group's arrays [n, B, ...], of which ``layer`` is read
        and written, or None for sequences that begin at position 0 and are not continued. A negative position marks a
        leading token that does not exist. Returns [B, S, d], the updated cache, and what training asked for:
        ``index_loss``, the indexer's mean divergence from this attention.
        """
        c, spec = self.config, self.spec
        batch, length, _ = x.shape
        start, lengths, positions = tokens.start, tokens.lengths, tokens.positions
        updates: dict[str, jax.Array] = {}
        observed: dict[str, jax.Array] = {}

        # Each device projects its own tokens; what others need of them is narrower than x.
        qr = execution.gather_tokens(self.q_norm(self.wq_a(x, execution)))
        q = self.wq_b(qr, execution, whole=True).reshape(batch, length, c.num_attention_heads, c.head_dim)
        q = execution.constrain(q, ("batch", None, "heads", None))
        q = apply_rope(rms_norm(q, None, c.rms_norm_eps), positions[..., None], spec.rope)

        # Gathered before positions are met: rotations of part of a row would have queries rotated in parts too.
        kv = execution.gather_tokens(self.kv_norm(self.wkv(x, execution)))
        kv = self._stored(apply_rope(kv, positions, spec.rope), execution)
        if cache is None:
            window, ring = jnp.pad(kv, [(0, 0), (c.sliding_window - 1, 0), (0, 0)]), None
        else:
            window, ring = kv, cache["window"]
            updates["window"] = ring_write(ring, layer, start, lengths, kv)
        # How much of the window is of the same document; what precedes a whole row does not exist.
        window_counts = None
        if tokens.documents is not None:
            window_counts = jnp.clip(positions + 1, 0, c.sliding_window)

        entries = first = counts = indices = scores = None
        if self.compressor is not None:
            first, counts = entry_range(tokens, spec.compress_ratio)
            entries, _, new = self.compressor(
                x, tokens, cache, layer, lambda rows: self._stored(rows, execution), execution
            )
            updates |= new
            if self.indexer is not None:
                indices, scores, new = self.indexer(x, qr, tokens, cache, layer, first, counts, execution)
                updates |= new

        # Without a cache every device has all entries of this call.
        split = None if cache is None else "entries"
        entry_shards = () if cache is None else execution.mesh_axes("entries")

        def attend(q, window, sink, start, ring, entries, layer, counts, indices, window_counts, first):
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
                window_counts=window_counts,
                first_entries=first,
                window_size=c.sliding_window,
                scale=c.head_dim**-0.5,
                entries_over=entry_shards,
                implementation=execution.implementation,
            )

        rows, heads, stacked = ("batch", None, None), ("batch", None, "heads", None), (None, "batch", None, None)
        # Without a cache the entries of this call are the only layer there is.
        layer = jnp.asarray(0 if cache is None else layer)
        per_token = ("batch", None)
        inputs = (q, window, self.attn_sink[...], start, ring, entries, layer, counts, indices, window_counts, first)
        kept = entry_axes(entries, split)
        axes = (heads, rows, ("heads",), ("batch",), stacked, kept, (), per_token, rows, per_token, per_token)
        out = execution.per_shard(attend, inputs, axes, heads)
        if scores is not None:
            assert tokens.training is not None

            def teach(scores, *inputs):
                return index_divergence(
                    scores,
                    *inputs,
                    window_size=c.sliding_window,
                    scale=c.head_dim**-0.5,
                    sum_over=execution.mesh_axes("heads"),
                )

            divergence = execution.per_shard(teach, (scores, *jax.lax.stop_gradient(inputs)), (rows, *axes), per_token)
            assert counts is not None
            # A query without entries has nothing to select.
            seen = tokens.training.real & ((counts if first is None else counts - first) > 0)
            observed["index_loss"] = jnp.sum(jnp.where(seen, divergence, 0.0)) / jnp.maximum(jnp.sum(seen), 1)
        # Keys carry their position into the values; turning the output back makes it relative.
        out = apply_rope(out, positions[..., None], spec.rope, inverse=True)
        out = out.reshape(batch, length, c.o_groups, -1)
        out = self.wo_a(execution.constrain(out, ("batch", None, "o_groups", None)), execution)
        out = self.wo_b(out.reshape(batch, length, -1), execution)
        out = execution.constrain(out, execution.tokens(length))
        return out, (None if cache is None else {**cache, **updates}), observed

    def _stored(self, entries: jax.Array, execution: Execution) -> jax.Array:
        return simulate_kv(entries, self.spec.rope.dims) if "kv" in execution.simulate else entries
