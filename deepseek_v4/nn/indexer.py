"""The lightning indexer of CSA layers: which compressed entries each query attends to (architecture section 4)."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_v4.config import Config
from deepseek_v4.execution import Execution
from deepseek_v4.formats import hadamard_transform, simulate_fp4
from deepseek_v4.layer_spec import LayerSpec
from deepseek_v4.nn.compressor import Compressor
from deepseek_v4.nn.linear import Linear, PlainLinear, plain_matmul
from deepseek_v4.nn.variables import Storage
from deepseek_v4.positions import Tokens
from deepseek_v4.rope import apply_rope
from deepseek_v4.stored_rows import entry_axes
from pallas_kernels.index_topk import index_scores, index_topk, select_topk


class Indexer(nnx.Module):
    """Scores compressed entries with its own compressed keys and keeps the ``index_topk`` best per query."""

    def __init__(self, config: Config, spec: LayerSpec, storage: Storage):
        self.config = config
        self.spec = spec
        heads, dim = config.index_n_heads, config.index_head_dim
        # Queries are independent by head group, of which there are as many as in attention.
        groups = math.gcd(heads, config.o_groups)
        matrices = groups * (heads * dim // groups,)
        self.wq_b = Linear(heads * dim, config.q_lora_rank, ("index_heads", "q_lora"), storage, matrices=matrices)
        self.weights_proj = PlainLinear(heads, config.hidden_size, ("index_heads", "embed"), storage)
        self.compressor = Compressor(config, spec, dim, storage, prefix="index_")

    def __call__(
        self,
        x: jax.Array,
        qr: jax.Array,
        tokens: Tokens,
        cache: dict[str, jax.Array] | None,
        layer: jax.Array | int,
        first: jax.Array | None,
        counts: jax.Array,
        execution: Execution,
    ) -> tuple[jax.Array | None, jax.Array | None, dict[str, jax.Array]]:
        """Indices [B, S, min(index_topk, T)] (-1 pads) of the entries each query selects, and the cache updates.

        x [B, S, d] is the layer input, qr [B, S, q_lora_rank] the query latent, ``first`` (None for 0) and ``counts``
        [B, S] the range of visible entries. Index keys are stored from the first token on, also while every visible
        entry would be selected anyway. In training, what learns from the divergence gets its scores [B, S, T] too,
        whose gradient stops at x and qr; no indices (None) mean all visible entries.
        """
        config = self.config
        heads, dim = config.index_n_heads, config.index_head_dim
        learns = "off" if tokens.training is None else tokens.training.indexer
        if tokens.training is not None:
            x, qr = jax.lax.stop_gradient((x, qr))
        keys, key_layer, updates = self.compressor(
            x, tokens, cache, layer, lambda keys: self._quantised(keys, execution), execution
        )

        q = self.wq_b(qr, execution, whole=True).reshape(*qr.shape[:-1], heads, dim)
        q = execution.constrain(q, ("batch", None, "index_heads", None))
        q = self._quantised(apply_rope(q, tokens.positions[..., None], self.spec.rope), execution)
        weights = execution.gather_tokens(self._head_weights(x, execution)) * (heads * dim) ** -0.5
        head_shards = execution.mesh_axes("index_heads")
        # Without a cache every device has all keys of this call.
        split = None if cache is None else "entries"
        key_shards = () if cache is None else execution.mesh_axes("entries")
        rows = ("batch", None, None)
        arguments = (q, weights, keys, counts, jnp.asarray(key_layer), first)
        axes = (
            ("batch", None, "index_heads", None),
            ("batch", None, "index_heads"),
            entry_axes(keys, split),
            ("batch", None),
            (),
            ("batch", None),
        )

        if learns != "off":
            # Scores are wanted in any case: select from them.
            def score(q, weights, keys, counts, layer, first):
                return index_scores(q, weights, keys, counts, first_entries=first, layer=layer, sum_over=head_shards)

            scores = execution.per_shard(score, arguments, axes, rows)
            if learns == "dense":
                return None, scores, updates
            indices = execution.per_shard(lambda s: select_topk(s, config.index_topk), (scores,), (rows,), rows)
            return indices, scores, updates

        def select(q, weights, keys, counts, layer, first):
            return index_topk(
                q,
                weights,
                keys,
                counts,
                first_entries=first,
                layer=layer,
                k=config.index_topk,
                sum_over=head_shards,
                keys_over=key_shards,
                implementation=execution.implementation,
            )

        return execution.per_shard(select, arguments, axes, rows), None, updates

    def _head_weights(self, x: jax.Array, execution: Execution) -> jax.Array:
        """float32 [B, S, heads]. Where tokens are split the weight comes to them, which is smaller than they are."""
        weight = self.weights_proj.weight[...]
        if execution.tokens(x.shape[1])[1]:
            weight = execution.constrain(weight, (None, "embed"))
        return plain_matmul(x, weight, execution.activation_dtype).astype(jnp.float32)

    def _quantised(self, vectors: jax.Array, execution: Execution) -> jax.Array:
        # Queries and keys alike: on one side only, the Hadamard rotation would not cancel in their product.
        if "indexer" not in execution.simulate:
            return vectors
        return simulate_fp4(hadamard_transform(vectors))
