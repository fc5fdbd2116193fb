"""Compiles a released model's step for a real TPU topology, as a program of its own: prints one line of JSON.

python tests/compile_full_size.py CONFIG TARGET MESH BATCH CONTEXT TOKENS_PER_CALL
"""

import functools
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_v4 import Config, Execution, Model, Placement, make_mesh
from pallas_kernels.targets import abstract_devices


def bytes_per_device(tree) -> int:
    """What one device holds of a tree of abstract arrays."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def main(config: str, target: str, mesh_text: str, batch: int, context: int, length: int) -> dict:
    mesh = make_mesh(mesh_text, abstract_devices(target))
    placement = Placement(mesh)
    model = Model(Config.from_file(config), execution=Execution(placement=placement))
    params, cache = model.abstract_params(), model.abstract_cache(batch, context, rollback=4)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=placement.sharding(("batch", None)))
    step = jax.jit(functools.partial(model.forward, last_only=True, draft=True), donate_argnums=2)
    begin = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = step.lower(params, tokens, cache).compile()
    memory = compiled.memory_analysis()
    return {
        "parameter_bytes": bytes_per_device(params),
        "cache_bytes": bytes_per_device(cache),
        "argument_bytes": memory.argument_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "seconds": round(time.perf_counter() - begin, 1),
    }


if __name__ == "__main__":
    path, target, mesh, *numbers = sys.argv[1:]
    print(json.dumps(main(path, target, mesh, *map(int, numbers))))
