"""The lightning indexer of CSA layers: which compressed entries each query attends to (architecture section 4)."""

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_v4.config import Config
from deepseek_v4.execution import Execution
from deepseek_v4.formats import hadamard_transform, simulate_fp4
from deepseek_v4.layer_spec import LayerSpec
from deepseek_v4.nn.compressor import Compressor
from deepseek_v4.nn.linear import Linear, PlainLinear
from deepseek_v4.nn.variables import Storage
from deepseek_v4.rope import apply_rope
from pallas_kernels.index_topk import index_topk


class Indexer(nnx.Module):
    """Scores compressed entries with its own compressed keys and keeps the ``index_topk`` best per query."""

    def __init__(self, config: Config, spec: LayerSpec, storage: Storage):
        self.config = config
        self.spec = spec
        heads, dim = config.index_n_heads, config.index_head_dim
        self.wq_b = Linear(heads * dim, config.q_lora_rank, ("index_heads", "q_lora"), storage)
        self.weights_proj = PlainLinear(heads, config.hidden_size, ("index_heads", "embed"), storage)
        self.compressor = Compressor(config, spec, dim, storage, prefix="index_")

    def __call__(
        self,
        x: jax.Array,
        qr: jax.Array,
        cache: dict[str, jax.Array] | None,
        layer: jax.Array | int,
        start: jax.Array,
        lengths: jax.Array,
        counts: jax.Array,
        execution: Execution,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Indices [B, S, min(index_topk, T)] (-1 pads) of the entries each query selects, and the cache updates.

        x [B, S, d] is the layer input, qr [B, S, q_lora_rank] the query latent, counts [B, S] the visible entries.
        Index keys are stored from the first token on, also while every visible entry would be selected anyway.
        """
        config = self.config
        heads, dim = config.index_n_heads, config.index_head_dim
        keys, key_layer, updates = self.compressor(
            x, cache, layer, start, lengths, lambda keys: self._quantised(keys, execution), execution
        )

        positions = start[:, None] + jnp.arange(x.shape[1])
        q = self.wq_b(qr, execution).reshape(*qr.shape[:-1], heads, dim)
        q = execution.constrain(q, ("batch", None, "index_heads", None))
        q = self._quantised(apply_rope(q, positions[..., None], self.spec.rope), execution)
        weights = self.weights_proj(x, execution.activation_dtype).astype(jnp.float32) * (heads * dim) ** -0.5
        placement = execution.placement
        head_shards = () if placement is None else placement.mesh_axes("index_heads")

        def select(q, weights, keys, counts, layer):
            return index_topk(
                q,
                weights,
                keys,
                counts,
                layer=layer,
                k=config.index_topk,
                sum_over=head_shards,
                implementation=execution.implementation,
            )

        indices = execution.per_shard(
            select,
            (q, weights, keys, counts, jnp.asarray(key_layer)),
            (
                ("batch", None, "index_heads", None),
                ("batch", None, "index_heads"),
                (None, "batch", None, None),
                ("batch", None),
                (),
            ),
            ("batch", None, None),
        )
        return indices, updates

    def _quantised(self, vectors: jax.Array, execution: Execution) -> jax.Array:
        # Queries and keys alike: on one side only, the Hadamard rotation would not cancel in their product.
        if "indexer" not in execution.simulate:
            return vectors
        return simulate_fp4(hadamard_transform(vectors))
