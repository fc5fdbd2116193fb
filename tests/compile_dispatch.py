"""What experts exchange, compiled for four chips: prints JSON, the collectives and kernels of every program.

python tests/compile_dispatch.py v6e exact gradient

Two and a half thousand tokens of a group, more than are gathered, go to sixteen experts on four devices: FP4 experts as
inference runs them, of a precision, or the gradient of float32 masters or through packed experts; or, "scattered", the
tokens of a row that is split between sublayers are on all devices, which have a half of half of the experts. A program
of its own (``abstract_devices``).
"""

import dataclasses
import functools
import json
import re
import sys

import jax
import jax.numpy as jnp

from deepseek_v4 import Placement, make_mesh
from deepseek_v4.planning.program import collectives
from pallas_kernels.grouped_matmul import expert_mlp
from pallas_kernels.targets import abstract_devices

TOKENS, EXPERTS, CHOICES, WIDTH, HIDDEN = 2560, 16, 4, 1024, 512
AXES = (
    ("experts", "expert_width", "embed"),
    ("experts", "embed", "expert_width"),
    ("experts", "expert_width", "embed"),
)


def weights(placement, packed):
    """Abstract (weight, scale) of w1, w2, w3."""
    found = []
    for axes, (out, inputs) in zip(AXES, ((HIDDEN, WIDTH), (WIDTH, HIDDEN), (HIDDEN, WIDTH)), strict=True):

        def array(shape, dtype, axes=axes):
            return jax.ShapeDtypeStruct((EXPERTS, *shape), dtype, sharding=placement.sharding(axes))

        if packed:
            scale = array((out, inputs // 32), jnp.float8_e8m0fnu)
            found.append((array((out, inputs // 2), jnp.uint8), scale))
        else:
            found.append((array((out, inputs), jnp.float32), None))
    return tuple(found)


def run(placement, x, ids, routing, stored):
    def local(x, ids, routing, layer, *weights, **moved):
        flat = (a.reshape(-1, a.shape[-1]) for a in (x, ids, routing))
        return expert_mlp(*flat, *weights, limit=10.0, **moved).reshape(x.shape)

    axes = [(names, None if scale is None else names) for names, (_, scale) in zip(AXES, stored, strict=True)]
    return placement.run_experts(local, x, ids, routing, jnp.asarray(0), stored, axes)


def loss(placement, x, routing, masters, ids):
    return packed_loss(placement, x, routing, tuple((w, None) for w in masters), ids)


def packed_loss(placement, x, routing, stored, ids):
    return jnp.sum(run(placement, x, ids, routing, stored) ** 2)


def scattered(devices):
    placement = Placement.of(make_mesh("expert=2,tensor=2", devices))

    def row(width, dtype):
        return jax.ShapeDtypeStruct((1, TOKENS, width), dtype, sharding=placement.sharding(("batch", None, None)))

    x, ids, routing = row(WIDTH, jnp.bfloat16), row(CHOICES, jnp.int32), row(CHOICES, jnp.float32)
    with jax.set_mesh(placement.mesh):
        call = jax.jit(functools.partial(run, placement))
        return call.lower(x, ids, routing, weights(placement, packed=True)).compile()


def programs(devices, names):
    """(name, compiled program) of each name: a precision, "gradient", "gradient-packed" or "scattered"."""
    for name in names:
        if name == "scattered":
            yield name, scattered(devices)
            continue
        precision = "exact" if name.startswith("gradient") else name
        placement = Placement.of(make_mesh("expert=4", devices), expert_parallel=True, expert_precision=precision)

        def rows(width, dtype, placement=placement):
            return jax.ShapeDtypeStruct((TOKENS, width), dtype, sharding=placement.sharding(("batch", None)))

        x, ids, routing = rows(WIDTH, jnp.bfloat16), rows(CHOICES, jnp.int32), rows(CHOICES, jnp.float32)
        with jax.set_mesh(placement.mesh):
            if name == "gradient":
                masters = tuple(weight for weight, _ in weights(placement, packed=False))
                gradient = jax.jit(jax.grad(functools.partial(loss, placement), argnums=(0, 1, 2)))
                yield name, gradient.lower(x, routing, masters, ids).compile()
            elif name == "gradient-packed":
                gradient = jax.jit(jax.grad(functools.partial(packed_loss, placement), argnums=(0, 1)))
                yield name, gradient.lower(x, routing, weights(placement, packed=True), ids).compile()
            else:
                forward = jax.jit(functools.partial(run, placement))
                yield name, forward.lower(x, ids, routing, weights(placement, packed=True)).compile()


def kernels(text):
    """The names of the expert kernels that a program calls on TPUs."""
    return sorted(set(re.findall(r"%(expert_\w+?)(?:\.\d+)? = [^\n]*tpu_custom_call", text)))


def main(chip, *names):
    devices = abstract_devices(chip, (2, 2) if chip.startswith("v") else (4, 1))
    return {
        name: {
            "collectives": {found.kind: dataclasses.asdict(found) for found in collectives(program.as_text())},
            "kernels": kernels(program.as_text()),
        }
        for name, program in programs(devices, names)
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
