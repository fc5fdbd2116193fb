"""The mixture of experts: routers, routed experts, shared expert (architecture section 6)."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_v4.config import Config
from deepseek_v4.execution import Execution
from deepseek_v4.formats import ACTIVATION_BLOCK, FP4_BLOCK, FP8_BLOCK, simulate_fp8
from deepseek_v4.layer_spec import LayerSpec
from deepseek_v4.nn.linear import Linear, plain_matmul
from deepseek_v4.nn.swiglu import clamped_swiglu
from deepseek_v4.nn.variables import Buffer, Packed, Storage, Weight, variable
from deepseek_v4.positions import Tokens
from pallas_kernels.grouped_matmul import expert_mlp

# Logical axes of (out, in) of the gate and up projections, and of the down projection.
_IN_TO_WIDTH = ("expert_width", "embed")
_WIDTH_TO_OUT = ("embed", "expert_width")


class Router(nnx.Module):
    """Chooses experts by score plus balance bias, or by token id, and weighs them by score without the bias."""

    def __init__(self, config: Config, spec: LayerSpec, storage: Storage):
        self.config = config
        self.tid2eid: Buffer | None
        self.bias: Buffer | None
        experts = config.n_routed_experts
        self.weight = variable(Weight, (experts, config.hidden_size), storage.matrices, (None, "embed"), "matrix")
        if spec.hash_router:
            table = (config.vocab_size, config.num_experts_per_tok)
            self.tid2eid = variable(Buffer, table, jnp.int32, (None, None), "token_table")
            self.bias = None
        else:
            self.tid2eid = None
            self.bias = variable(Buffer, (experts,), jnp.float32, (None,), "router_bias")

    def __call__(
        self, x: jax.Array, token_ids: jax.Array, execution: Execution, chosen: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [..., d], token_ids [...] to ids int32 [..., K], routing weights float32 [..., K] and log-scores [..., E].

        ``chosen`` are expert ids that were decided elsewhere; this router then only weighs them.
        """
        c = self.config
        logits = plain_matmul(x, self.weight[...], jnp.float32)
        log_scores = log_sqrt_softplus(logits)
        tokens = execution.tokens(x.shape[1])
        if chosen is not None:
            ids = chosen
        elif self.bias is None:
            assert self.tid2eid is not None
            ids = execution.constrain(self.tid2eid[...][token_ids], tokens)
        else:
            biased = jnp.exp(log_scores) + self.bias[...]
            ids = execution.per_shard(
                lambda scores: jax.lax.top_k(scores, c.num_experts_per_tok)[1],
                (jax.lax.stop_gradient(biased),),
                (tokens,),
                tokens,
            )
        # score / sum of scores, as a softmax of logarithms: a hash layer may choose experts whose scores all underflow.
        weights = jax.nn.softmax(jnp.take_along_axis(log_scores, ids, axis=-1), axis=-1)
        return ids.astype(jnp.int32), weights * c.routed_scaling_factor, log_scores


def load_and_balance(ids: jax.Array, log_scores: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens per expert of a call, float32 [E], and the sequence-wise balance loss, the mean over rows (V3 2.1.2).

    ids [B, S, K], log-scores [B, S, E], real [B, S] the tokens that count. A row's loss is sum_i f_i P_i with
    f_i = E / (K T) * (tokens of the row sent to i) and P_i the mean of its normalised scores; 1 if all are alike.
    Gradients flow through P alone.
    """
    experts, choices = log_scores.shape[-1], ids.shape[-1]
    counted = real.astype(jnp.float32)
    loads = jnp.einsum("bske,bs->be", jax.nn.one_hot(ids, experts, dtype=jnp.float32), counted)
    tokens = jnp.sum(counted, axis=1, keepdims=True)
    frequency = loads * experts / (choices * jnp.maximum(tokens, 1))
    shares = jnp.einsum("bse,bs->be", jax.nn.softmax(log_scores, axis=-1), counted) / jnp.maximum(tokens, 1)
    rows = jnp.maximum(jnp.sum(tokens > 0), 1)
    balance = jnp.sum(jax.lax.stop_gradient(frequency) * shares) / rows
    return jnp.sum(jax.lax.stop_gradient(loads), axis=0), balance


def log_sqrt_softplus(x: jax.Array) -> jax.Array:
    """log(sqrt(log(1 + exp(x)))), finite for every finite float32 x."""
    # Below -20 softplus(x) is exp(x) to float32 rounding, and would underflow from -104 on.
    return 0.5 * jnp.where(x < -20, x, jnp.log(jax.nn.softplus(jnp.maximum(x, -20))))


class ExpertLinear(nnx.Module):
    """One linear of every routed expert, stacked: weight [E, out, in], in the checkpoint's format.

    FP4: uint8 [E, out, in/2] with scale [E, out, in/32]; FP8: E4M3 with scale [E, ceil(out/128), ceil(in/128)].
    """

    lora_a: Weight | None = None
    lora_b: Weight | None = None
    lora_scale = 1.0

    def __init__(self, experts: int, out: int, inputs: int, axes: tuple[str, str], storage: Storage):
        self.scale: Packed | None
        self.sizes = (experts, out, inputs)
        self.axes = axes
        axes3 = ("experts", *axes)
        if storage.experts == "fp4":
            self.weight: Packed | Weight = variable(Packed, (experts, out, inputs // 2), jnp.uint8, axes3, "expert")
            self.scale = variable(Packed, (experts, out, inputs // FP4_BLOCK), jnp.float8_e8m0fnu, axes3, "scale")
        elif storage.experts == "fp8":
            blocks = (experts, math.ceil(out / FP8_BLOCK), math.ceil(inputs / FP8_BLOCK))
            self.weight = variable(Packed, (experts, out, inputs), jnp.float8_e4m3fn, axes3, "expert")
            self.scale = variable(Packed, blocks, storage.scales, axes3, "scale")
        else:
            self.weight = variable(Weight, (experts, out, inputs), storage.experts, axes3, "expert")
            self.scale = None

    def stored(self) -> tuple[jax.Array, jax.Array | None]:
        """(weight, scale) as stored."""
        return self.weight[...], None if self.scale is None else self.scale[...]

    def adapter(self) -> tuple[jax.Array, jax.Array] | None:
        """(a [E, rank, in], b [E, out, rank] times the adapter's factor), or None."""
        if self.lora_a is None or self.lora_b is None:
            return None
        return self.lora_a[...], self.lora_scale * self.lora_b[...]

    def add_adapter(self, rank: int, scale: float) -> None:
        """A low-rank addition for every expert."""
        (experts, out, inputs), (out_axis, in_axis) = self.sizes, self.axes
        self.lora_a = variable(Weight, (experts, rank, inputs), jnp.float32, ("experts", None, in_axis), "adapter")
        self.lora_b = variable(Weight, (experts, out, rank), jnp.float32, ("experts", out_axis, None), "adapter")
        self.lora_scale = scale


class Experts(nnx.Module):
    """The routed experts: w1 gate, w3 up, w2 down."""

    def __init__(self, config: Config, storage: Storage):
        self.limit = config.swiglu_limit
        experts, d, m = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.w1 = ExpertLinear(experts, m, d, _IN_TO_WIDTH, storage)
        self.w2 = ExpertLinear(experts, d, m, _WIDTH_TO_OUT, storage)
        self.w3 = ExpertLinear(experts, m, d, _IN_TO_WIDTH, storage)

    def __call__(
        self, x: jax.Array, ids: jax.Array, weights: jax.Array, layer: jax.Array | int, execution: Execution
    ) -> jax.Array:
        """x [B, S, d] with expert ids and weights [B, S, K] to float32 [B, S, d], summed over the experts of a token.

        Of whole rows; tokens of the result are split as between sublayers.
        The arrays of w1, w2 and w3 may be those of a whole scan group, [n, E, ...], of which ``layer`` is used.
        """
        simulate = "activations" in execution.simulate
        linears = (self.w1, self.w2, self.w3)
        stored = [w.stored() for w in linears]
        adapters = tuple(w.adapter() for w in linears)
        stacked = stored[0][0].ndim == 4

        def run(x, ids, weights, layer, w1, w2, w3, *adapters, **moved):
            x_rows, *chosen = (a.reshape(-1, a.shape[-1]) for a in (x, ids, weights))
            out = expert_mlp(
                x_rows,
                *chosen,
                w1,
                w2,
                w3,
                limit=self.limit,
                simulate_activations=simulate,
                layer=layer if stacked else None,
                adapters=adapters if any(adapters) else None,
                **moved,
                implementation=execution.implementation,
            )
            return out.reshape(x.shape)

        if simulate:
            x = simulate_fp8(x, ACTIVATION_BLOCK)
        placement = execution.placement
        if placement is None:
            return run(x, ids, weights, layer, *stored, *adapters)
        leading = (None, "experts") if stacked else ("experts",)
        axes = [2 * ((*leading, *w.axes),) for w in linears]
        axes += [(("experts", None, w.axes[1]), ("experts", w.axes[0], None)) for w in linears]
        return placement.run_experts(run, x, ids, weights, jnp.asarray(layer), (*stored, *adapters), axes)


class SharedExpert(nnx.Module):
    """The expert every token visits, unweighted, with the same clamp as the routed ones."""

    def __init__(self, config: Config, storage: Storage):
        self.limit = config.swiglu_limit
        d, m = config.hidden_size, config.moe_intermediate_size * config.n_shared_experts
        self.w1 = Linear(m, d, _IN_TO_WIDTH, storage)
        self.w2 = Linear(d, m, _WIDTH_TO_OUT, storage)
        self.w3 = Linear(m, d, _IN_TO_WIDTH, storage)

    def __call__(self, x: jax.Array, execution: Execution) -> jax.Array:
        """x [..., d] to [..., d]."""
        hidden = clamped_swiglu(self.w1(x, execution), self.w3(x, execution), self.limit)
        return self.w2(hidden.astype(x.dtype), execution)


class MoE(nnx.Module):
    """Routed plus shared experts of one layer."""

    def __init__(self, config: Config, spec: LayerSpec, storage: Storage):
        self.gate = Router(config, spec, storage)
        self.experts = Experts(config, storage)
        self.shared_experts = SharedExpert(config, storage)

    def __call__(
        self,
        x: jax.Array,
        tokens: Tokens,
        layer: jax.Array | int,
        execution: Execution,
        chosen: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """x [B, S, d] to the same shape, summed over experts in float32, and what training asked for.

        ``layer`` as in ``Experts``; ``chosen`` [B, S, K] replaces the router's choice. Observed are ``experts`` int32
        [B, S, K], the choice made, ``load`` [E] and, where scores route, ``balance_loss`` (see ``load_and_balance``).
        """
        ids, weights, log_scores = self.gate(x, tokens.ids, execution, chosen)
        observed = {}
        if tokens.training is not None:
            load, balance = load_and_balance(ids, log_scores, tokens.training.real)
            observed = {"experts": ids, "load": load}
            if self.gate.bias is not None:
                observed["balance_loss"] = balance
        x, ids, weights = (execution.gather_tokens(a) for a in (x, ids, weights))
        routed = self.experts(x, ids, weights, layer, execution)
        shared = self.shared_experts(x, execution).astype(jnp.float32)
        return execution.constrain((routed + shared).astype(x.dtype), execution.tokens(x.shape[1])), observed
