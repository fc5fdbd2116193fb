"""A transformer block and its draft sibling (architecture sections 5 and 8)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_v4.config import Config
from deepseek_v4.execution import Execution
from deepseek_v4.layer_spec import LayerSpec
from deepseek_v4.nn.attention import Attention
from deepseek_v4.nn.linear import Linear
from deepseek_v4.nn.mixing import Unmixed, on_own_tokens
from deepseek_v4.nn.moe import MoE
from deepseek_v4.nn.norm import RMSNorm
from deepseek_v4.nn.variables import Storage, Weight, variable
from deepseek_v4.positions import Tokens
from pallas_kernels.hyper_connection import head_mix, pre_mix, seam


class Block(nnx.Module):
    """Attention and experts, each between a mix of the n residual streams into one input and a mix back."""

    def __init__(self, config: Config, spec: LayerSpec, storage: Storage):
        self.config = config
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, storage.norms)
        self.attn = Attention(config, spec, storage)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, storage.norms)
        self.ffn = MoE(config, spec, storage)
        n = config.hc_mult
        mixes, matrices = (2 + n) * n, (n, n, n * n)  # rows of pre, post and comb
        for sublayer in ("attn", "ffn"):
            fn = variable(Weight, (mixes, n * config.hidden_size), jnp.float32, (None, None), "hyper", matrices)
            setattr(self, f"hc_{sublayer}_fn", fn)
            setattr(self, f"hc_{sublayer}_base", variable(Weight, (mixes,), jnp.float32, (None,), "island"))
            setattr(self, f"hc_{sublayer}_scale", variable(Weight, (3,), jnp.float32, (None,), "island"))

    def __call__(
        self,
        streams: jax.Array | Unmixed,
        tokens: Tokens,
        cache: dict[str, jax.Array] | None,
        layer: jax.Array | int,
        execution: Execution,
        chosen: jax.Array | None = None,
    ) -> tuple[Unmixed, dict[str, jax.Array] | None, dict[str, jax.Array]]:
        """Streams [B, S, n, d], or what the block before left of them, to the same, the updated cache, and what
        training asked for.

        Tokens are split over devices as ``Execution.tokens`` says, and sublayers get and return them so.
        ``chosen`` [B, S, K], if given, are the experts to use.
        """
        if isinstance(streams, Unmixed):
            streams, x, post, comb = self._mix(seam, "attn", streams._asdict(), execution)
        else:
            x, post, comb = self._mix(pre_mix, "attn", {"streams": streams}, execution)
        y, cache, observed = self.attn(self.attn_norm(x), tokens, cache, layer, execution)
        ended = Unmixed(y, streams, post, comb)
        streams, x, post, comb = self._mix(seam, "ffn", ended._asdict(), execution)
        y, routed = self.ffn(self.ffn_norm(x), tokens, layer, execution, chosen)
        return Unmixed(y, streams, post, comb), cache, observed | routed

    def _mix(
        self, operation: Callable, sublayer: str, of_tokens: dict[str, jax.Array], execution: Execution
    ) -> tuple[jax.Array, ...]:
        """``operation`` with the weights and constants that mix the streams into a sublayer."""
        return on_own_tokens(
            operation,
            of_tokens,
            {name: getattr(self, f"hc_{sublayer}_{name}")[...] for name in ("fn", "scale", "base")},
            execution,
            sinkhorn_iters=self.config.hc_sinkhorn_iters,
            norm_eps=self.config.rms_norm_eps,
            hc_eps=self.config.hc_eps,
        )


class OutputHead(nnx.Module):
    """Streams to one normed vector: hc_head weights and the final norm; the vocabulary projection is shared."""

    def __init__(self, config: Config, storage: Storage):
        self.config = config
        n = config.hc_mult
        self.hc_head_fn = variable(Weight, (n, n * config.hidden_size), jnp.float32, (None, None), "hyper")
        self.hc_head_base = variable(Weight, (n,), jnp.float32, (None,), "island")
        self.hc_head_scale = variable(Weight, (1,), jnp.float32, (None,), "island")
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, storage.norms)

    def output(self, streams: jax.Array, execution: Execution) -> jax.Array:
        """streams [B, S, n, d] to [B, S, d]."""
        mixed = head_mix(
            streams,
            self.hc_head_fn[...],
            self.hc_head_scale[...],
            self.hc_head_base[...],
            norm_eps=self.config.rms_norm_eps,
            hc_eps=self.config.hc_eps,
            implementation=execution.implementation,
        )
        return self.norm(mixed)


class DraftBlock(Block, OutputHead):
    """One multi-token-prediction block: a block with its own input projections and output head."""

    def __init__(self, config: Config, spec: LayerSpec, storage: Storage):
        Block.__init__(self, config, spec, storage)
        OutputHead.__init__(self, config, storage)
        d = config.hidden_size
        self.e_proj = Linear(d, d, (None, "embed"), storage)
        self.h_proj = Linear(d, d, (None, "embed"), storage)
        self.enorm = RMSNorm(d, config.rms_norm_eps, storage.norms)
        self.hnorm = RMSNorm(d, config.rms_norm_eps, storage.norms)

    def combine(self, embedded: jax.Array, streams: jax.Array, execution: Execution) -> jax.Array:
        """The draft streams of position t from embed(token_{t+1}) [B, S, d] and the main streams X_t [B, S, n, d]."""
        token = self.e_proj(self.enorm(embedded), execution)
        return token[:, :, None, :] + self.h_proj(self.hnorm(streams), execution)
