"""Bias-free linear layers, weights [out, in] as stored."""

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_v4.execution import Execution, dot_precision
from deepseek_v4.formats import ACTIVATION_BLOCK, FP8_BLOCK, simulate_fp8
from deepseek_v4.nn.variables import Packed, Storage, Weight, variable
from deepseek_v4.relayout import scatter_tokens
from pallas_kernels.block_scaled_matmul import block_scaled_matmul

if TYPE_CHECKING:
    from deepseek_v4.sharding import Axis


class Linear(nnx.Module):
    """A linear that the releases store as E4M3 with 128 x 128 scales; ``groups`` > 1 is the grouped ``wo_a``.

    weight [out, in], scale [ceil(out/128), ceil(in/128)] when stored in FP8. ``axes`` are the logical axes of
    (out, in); ``matrices`` as in ``variable`` (by default one per group).
    """

    lora_a: Weight | None = None
    lora_b: Weight | None = None
    lora_scale = 1.0

    def __init__(
        self,
        out: int,
        inputs: int,
        axes: tuple[str | None, str | None],
        storage: Storage,
        *,
        groups: int = 1,
        matrices: tuple[int, ...] = (),
    ):
        self.groups = groups
        self.sizes = (out, inputs)
        self.axes = axes
        matrices = matrices or (groups * (out // groups,) if groups > 1 else ())
        self.scale: Packed | None
        if storage.linears == "fp8":
            blocks = (math.ceil(out / FP8_BLOCK), math.ceil(inputs / FP8_BLOCK))
            self.weight: Packed | Weight = variable(Packed, (out, inputs), jnp.float8_e4m3fn, axes, "linear", matrices)
            self.scale = variable(Packed, blocks, storage.scales, axes, "scale")
        else:
            self.weight = variable(Weight, (out, inputs), storage.linears, axes, "linear", matrices)
            self.scale = None

    def __call__(self, x: jax.Array, execution: Execution, *, whole: bool = False) -> jax.Array:
        """x [..., in] to [..., out]; grouped: [..., g, in] to [..., g, out/g]. Dtype of x.

        Tokens of rows [B, S, ...] that are split between sublayers are multiplied where they are by a whole weight; by
        split outputs, split over the axes that are left (``whole``: not at all); and of split inputs every device gets
        the sums of its own tokens.
        """
        scale = None if self.scale is None else self.scale[...]
        # The reference runs the grouped output projection in BF16 although it is stored in FP8.
        if "activations" in execution.simulate and self.groups == 1:
            x = simulate_fp8(x, ACTIVATION_BLOCK)
        rows = self._rows(x, execution, whole)
        if scale is not None and self._splits_in_blocks(execution):
            out = self._by_shard(x, self.weight[...], scale, execution, rows)
        else:
            if rows.output == rows.input != ():
                per_token = (self.axes[0], None) if self.groups > 1 else (None,)
                x = execution.constrain(x, _layout(x.ndim, rows.input, *per_token))
            out = block_scaled_matmul(
                x, self.weight[...], scale, groups=self.groups, implementation=execution.implementation
            )
            out = self._summed(out, rows, execution)
        if self.lora_a is None or self.lora_b is None:
            return out
        low = plain_matmul(x, self.lora_a[...], x.dtype)
        b = self.lora_b[...]
        if self.groups == 1:
            delta = self._summed(plain_matmul(low, b, x.dtype), rows, execution)
        else:
            b = b.reshape(self.groups, -1, b.shape[-1]).astype(x.dtype)
            delta = jnp.einsum(
                "...gr,gnr->...gn", low, b, precision=dot_precision(x.dtype), preferred_element_type=jnp.float32
            )
        return (out + self.lora_scale * delta).astype(x.dtype)

    def _rows(self, x: jax.Array, execution: Execution, whole: bool) -> "_Rows":
        per_token = 2 if self.groups > 1 else 1
        split = execution.tokens(x.shape[1])[1] if x.ndim - per_token > 1 else ()
        out_axes, summed = (() if axis is None else execution.mesh_axes(axis) for axis in self.axes)
        if not split:
            return _Rows((), (), summed)
        left = tuple(name for name in split if name not in out_axes + summed)
        if not summed:
            left = () if whole and out_axes else left
            return _Rows(left, left, ())
        # Sums are scattered within what each device has, so over the last of the axes.
        scattered = tuple(name for name in split if name in summed)
        if out_axes or left + scattered != split:
            return _Rows((), (), summed)
        return _Rows(left, split, summed)

    def _summed(self, out: jax.Array, rows: "_Rows", execution: Execution) -> jax.Array:
        return execution.split_tokens(out, rows.input) if rows.output != rows.input else out

    def _splits_in_blocks(self, execution: Execution) -> bool:
        """Whether devices hold whole blocks of a packed weight, each with its scale."""
        placement = execution.placement
        if placement is None:
            return False
        shards = [1 if axis is None else placement.size(axis) for axis in self.axes]
        return all(n == 1 or size % (n * FP8_BLOCK) == 0 for size, n in zip(self.sizes, shards, strict=True))

    def _by_shard(
        self, x: jax.Array, weight: jax.Array, scale: jax.Array, execution: Execution, rows: "_Rows"
    ) -> jax.Array:
        """The product with a packed weight on each device's own shards, where kernels can run.

        Rows follow the batch; partial sums of inputs that are split are added up in the dtype of x. The gradient is
        that of the whole product: a transposed ``shard_map`` would sum it over every axis that x is not split over.
        """
        out_axis, in_axis = self.axes
        scatter = tuple(name for name in rows.output if name not in rows.input)
        sum_over = tuple(name for name in rows.summed if name not in scatter)
        grouped = self.groups > 1

        def multiply(x, weight, scale):
            groups = x.shape[-2] if grouped else 1
            out = block_scaled_matmul(x, weight, scale, groups=groups, implementation=execution.implementation)
            out = jax.lax.psum(out, sum_over) if sum_over else out
            return scatter_tokens(out, scatter) if scatter else out

        layout = functools.partial(_layout, x.ndim)
        x_axes = layout(rows.input, out_axis, in_axis) if grouped else layout(rows.input, in_axis)
        out_axes = layout(rows.output, out_axis, None) if grouped else layout(rows.output, out_axis)

        @jax.custom_vjp
        def run(x, weight, scale):
            return execution.per_shard(multiply, (x, weight, scale), (x_axes, self.axes, self.axes), out_axes)

        def run_forward(x, weight, scale):
            return run(x, weight, scale), (x, weight, scale)

        def run_backward(saved, gradient):
            x, weight, scale = saved
            if scatter:
                gradient = execution.constrain(gradient, layout(rows.input, out_axis))
            whole = functools.partial(block_scaled_matmul, groups=self.groups, implementation="xla")
            _, pull = jax.vjp(lambda x: whole(x, weight, scale), x)
            return *pull(gradient), None, None

        run.defvjp(run_forward, run_backward)
        return run(x, weight, scale)

    def add_adapter(self, rank: int, scale: float) -> None:
        """A low-rank addition, a [rank, in] and b [out, rank], shared by the groups in a and by rows in b."""
        (out, inputs), (out_axis, in_axis) = self.sizes, self.axes
        self.lora_a = variable(Weight, (rank, inputs), jnp.float32, (None, in_axis), "adapter")
        self.lora_b = variable(Weight, (out, rank), jnp.float32, (out_axis, None), "adapter")
        self.lora_scale = scale


class _Rows(NamedTuple):
    """Mesh axes that tokens are split over before and after a product, and those that its parts are summed over."""

    input: tuple[str, ...]
    output: tuple[str, ...]
    summed: tuple[str, ...]


def _layout(ndim: int, tokens: tuple[str, ...], *last: "Axis") -> "tuple[Axis, ...]":
    """Axes of an array [B, S, ...] of ``ndim`` dims whose last ones are split as ``last`` says."""
    return (*("batch", tokens, *(None,) * ndim)[: ndim - len(last)], *last)


class PlainLinear(nnx.Module):
    """A linear that every release stores unquantised; ``dtype`` of the call decides the arithmetic."""

    def __init__(
        self,
        out: int,
        inputs: int,
        axes: tuple[str | None, str | None],
        storage: Storage,
        role: str = "matrix",
        matrices: tuple[int, ...] = (),
    ):
        self.weight = variable(Weight, (out, inputs), storage.matrices, axes, role, matrices)

    def __call__(self, x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """x [..., in] to [..., out], multiplied and returned in ``dtype`` (accumulated in float32)."""
        return plain_matmul(x, self.weight[...], dtype)


def plain_matmul(x: jax.Array, weight: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """x [..., K] times weight [N, K] transposed, in ``dtype`` with float32 accumulation."""
    dtype = jnp.dtype(dtype)
    if dtype == jnp.float32 and x.dtype == weight.dtype == jnp.bfloat16:
        return _bfloat16_in_float32(x, weight)
    return _matmul(x.astype(dtype), weight.astype(dtype)).astype(dtype)


def _matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.einsum("...k,nk->...n", x, weight, precision=dot_precision(x.dtype), preferred_element_type=jnp.float32)


@jax.custom_vjp
def _bfloat16_in_float32(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The float32 product of bfloat16 operands, whose products float32 holds exactly.

    Hardware of bfloat16 multiplies float32 in six passes, of which these need one. Gradients are float32 and multiply
    as such.
    """
    return jax.lax.platform_dependent(x, weight, cpu=_widened, default=_matmul)


def _widened(x: jax.Array, weight: jax.Array) -> jax.Array:
    return _matmul(x.astype(jnp.float32), weight.astype(jnp.float32))


def _bfloat16_forward(x, weight):
    return _bfloat16_in_float32(x, weight), (x, weight)


def _bfloat16_backward(saved, gradient):
    return jax.vjp(_widened, *saved)[1](gradient)


_bfloat16_in_float32.defvjp(_bfloat16_forward, _bfloat16_backward)
