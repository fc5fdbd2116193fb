"""Dense linears whose weights stay in their stored format (architecture section 7)."""

import functools

import jax

from pallas_kernels.block_scaled_matmul import gpu, tpu, xla
from pallas_kernels.block_scaled_matmul.unserved import unserved
from pallas_kernels.implementation import choose


def _with_gradient(forward):
    """``forward``, differentiable with respect to x; the packed weight and its scales are constants (XLA backward)."""

    def call(x, weight, scale, *, groups, layer):
        @jax.custom_vjp
        def run(x, weight, scale, layer):
            return forward(x, weight, scale, groups=groups, layer=layer)

        def run_forward(x, weight, scale, layer):
            return run(x, weight, scale, layer), (x, weight, scale, layer)

        def run_backward(saved, gradient):
            x, weight, scale, layer = saved
            twin = functools.partial(xla.block_scaled_matmul, groups=groups, layer=layer)
            _, pull = jax.vjp(lambda x: twin(x, weight, scale), x)
            return *pull(gradient), None, None, None

        run.defvjp(run_forward, run_backward)
        return run(x, weight, scale, layer)

    return call


def _xla(x, weight, scale, *, groups, layer):
    # Plain differentiation would keep every packed weight decoded until the backward pass.
    function = xla.block_scaled_matmul if scale is None else _with_gradient(xla.block_scaled_matmul)
    return function(x, weight, scale, groups=groups, layer=layer)


_IMPLEMENTATIONS = {
    "xla": _xla,
    "tpu": _with_gradient(tpu.block_scaled_matmul),
    "tpu_interpret": _with_gradient(functools.partial(tpu.block_scaled_matmul, interpret=True)),
    "gpu": _with_gradient(gpu.block_scaled_matmul),
    "gpu_interpret": _with_gradient(functools.partial(gpu.block_scaled_matmul, interpret=True)),
}


def block_scaled_matmul(
    x: jax.Array,
    weight: jax.Array,
    scale: jax.Array | None,
    *,
    groups: int = 1,
    layer: jax.Array | int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """x W^T with W stored as E4M3 with one scale per 128 x 128 block, or plain.

    Shapes: weight [N, K]; scale [ceil(N/128), ceil(K/128)] (E8M0 or float32), or None for a plain BF16/F32 weight.
    With groups = 1, x [..., K] gives [..., N]. With groups = g > 1 (``wo_a``), x [..., g, K] gives [..., g, N/g]:
    group i uses its own rows i*N/g .. (i+1)*N/g of the weight. Weights are decoded to the dtype of x (exact for E8M0
    scales), products are accumulated in float32 and returned in the dtype of x. With ``layer`` the weight and its scale
    are stacked, with a leading dim of which that index is used: a kernel reads it in place, where slices taken before
    the call would be copies. Gradients reach x and plain weights; kernels serve packed weights only, and leave those
    constant.
    """
    reason = functools.partial(unserved, x=x, weight=weight, scale=scale, groups=groups)
    reasons = dict.fromkeys(set(_IMPLEMENTATIONS) - {"xla"}, reason)
    function = choose("block_scaled_matmul", _IMPLEMENTATIONS, implementation, reasons)
    return function(x, weight, scale, groups=groups, layer=layer)
