"""Compiles the optimizer step of a released model for a real TPU topology: prints one line of JSON.

    python tests/training/compile_update.py CONFIG TARGET TOPOLOGY MESH NEWTON_SCHULZ_DTYPE [PATTERN ...]

Parameters are cut over the data axis too. With patterns only the parameters that they name are trained.
"""

import json
import re
import sys
import time

import jax
import numpy as np
import optax
from jax.experimental import topologies

from deepseek_v4 import Config, Execution, Model, Placement, Rules, make_mesh
from deepseek_v4.nn.variables import MASTER
from deepseek_v4.parameters import map_specs
from deepseek_v4.training.optimizer import OptimizerConfig, make_optimizer, state_shardings
from deepseek_v4.training.partition import split, trainable_mask
from pallas_kernels.targets import abstract_devices

_COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|all-to-all|ragged-all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


def bytes_per_device(tree) -> int:
    """What one device holds of a tree of abstract arrays."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def largest_collectives(text: str) -> dict[str, tuple[int, int]]:
    """Number of every kind of collective in a program's text, and the elements of the largest array that one returns.

    What is in a loop counts once.
    """
    found: dict[str, tuple[int, int]] = {}
    for shape, kind in _COLLECTIVE.findall(text):
        elements = max(int(np.prod([int(n) for n in dims.split(",")])) for dims in re.findall(r"\[([\d,]+)\]", shape))
        count, largest = found.get(kind, (0, 0))
        found[kind] = (count + 1, max(largest, elements))
    return found


def largest_array(text: str) -> int:
    """Elements of the largest floating-point array that any operation of a program has on one device."""
    return max(
        int(np.prod([int(n) for n in dims.split(",")])) for dims in re.findall(r"\b(?:f32|bf16|f16)\[([\d,]+)\]", text)
    )


def main(path: str, target: str, topology: str, mesh_text: str, dtype: str, *patterns: str) -> dict:
    abstract_devices(target)  # lets the compiler start
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    placement = Placement(make_mesh(mesh_text, devices), Rules(fsdp=("data",)))
    model = Model(Config.from_file(path), MASTER, Execution(placement=placement))
    specs, _ = split(model.parameter_specs(), trainable_mask(model.parameter_specs(), only=patterns))
    options = OptimizerConfig(
        learning_rate=2.7e-4,
        final_learning_rate=2.7e-5,
        warmup_steps=2000,
        decay_start=3000,
        total_steps=4000,
        newton_schulz=dtype,
    )
    optimizer = make_optimizer(options, specs, placement)

    def abstract(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    params = map_specs(lambda spec: abstract(spec, placement.parameter_sharding(spec)), specs)
    shardings = state_shardings(optimizer, specs, placement)
    state = jax.tree.map(abstract, jax.eval_shape(optimizer.init, params), shardings)

    def step(params, gradients, state):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    begin = time.perf_counter()
    with jax.set_mesh(placement.mesh):
        compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(params, params, state).compile()
    memory = compiled.memory_analysis()
    return {
        "parameter_bytes": bytes_per_device(params),
        "state_bytes": bytes_per_device(state),
        "argument_bytes": memory.argument_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "collectives": largest_collectives(compiled.as_text()),
        "largest_array": largest_array(compiled.as_text()),
        "largest_shard_bytes": max(bytes_per_device(leaf) for leaf in jax.tree.leaves(params)),
        "largest_parameter": max(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params)),
        "seconds": round(time.perf_counter() - begin, 1),
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
