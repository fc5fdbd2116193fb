"""What several processes compute on meshes of all their devices; run as a program, one process of them.

    python tests/process_cases.py COORDINATOR PROCESSES PROCESS DEVICES OUTPUT CASE ...

The first process writes what it computed to OUTPUT (.npz), by the names that ``numbers`` gives.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
from small_models import compiled, small_config, small_model

from deepseek_v4 import Execution, Model, Placement, Rules, make_mesh
from deepseek_v4.dispatch import Exchange
from deepseek_v4.distributed import is_main
from deepseek_v4.engine import Engine, Pool, Request
from deepseek_v4.nn.variables import MASTER, RELEASED

QUICK = {"xla_backend_optimization_level": 0}

# Both compressions, a draft, sizes that divide over two devices along every axis.
SIZES = {"num_hash_layers": 0, "hidden_size": 128, "index_topk": 8, "hc_sinkhorn_iters": 3, "swiglu_limit": 10.0}
CONFIG = small_config((4, 128), **SIZES)
PROMPTS, NEW = (5, 130, 140), 6

# Of eight devices: mesh, rules, how tokens travel.
CASES = {
    "context": ("data=2,context=4", Rules(), Exchange()),
    "context of processes": ("tensor=2,context=4", Rules(), Exchange()),
    "gather": ("data=2,expert=4", Rules.expert_parallel(fsdp=True), Exchange("gather")),
    "dispatch": ("data=2,expert=2,tensor=2", Rules.expert_parallel(fsdp=True), Exchange("dispatch", rows=200)),
}


def numbers(case: str | None) -> dict[str, np.ndarray]:
    """Logits of a pass, tokens of an engine with drafts, and loss and gradients, of a case or (None) of one device.

    Gradients are those of full passes without a cache, which a ``context`` axis does not split: none there.
    """
    small = small_model(CONFIG)
    placement = None
    if case is not None:
        mesh, rules, exchange = CASES[case]
        placement = Placement(make_mesh(mesh), rules, exchange)

    def placed(model: Model, params):
        """On this process's devices, what is theirs; every process has all of it."""
        model = dataclasses.replace(model, execution=dataclasses.replace(model.execution, placement=placement))
        if placement is None:
            return model, params

        def put(array, like):
            host = np.asarray(array)
            return jax.make_array_from_callback(host.shape, like.sharding, lambda index: host[index])

        return model, jax.tree.map(put, params, model.abstract_params())

    def whole(tree):
        if placement is not None:
            tree = jax.jit(lambda tree: tree, out_shardings=placement.replicated())(tree)
        return jax.tree.map(np.asarray, tree)

    rng = np.random.default_rng(2)
    tokens = rng.integers(3, 256, (8, 136)).astype(np.int32)
    model, params = placed(small.model, small.params)
    cache = model.init_cache(8, 256)
    out = compiled(model.forward)(params, jnp.asarray(tokens), cache)
    found = {"logits": whole(out.logits)}

    engine = Engine(model, params, [Pool(4, 256)], chunks=(64,), drafts=2, compiler_options=QUICK)
    requests = [Request(tuple(tokens[n, :length].tolist()), NEW, stream=n) for n, length in enumerate(PROMPTS)]
    new: list[list[int]] = [[] for _ in requests]
    for update in engine.run(requests):
        new[update.request_id] += update.token_ids
    found["tokens"] = np.asarray(new)

    if case is None or not case.startswith("context"):
        from deepseek_v4.training.masters import to_masters

        master = Model(CONFIG, MASTER, Execution("float32", quantise=RELEASED))
        model, masters = placed(master, to_masters(small.params, master))

        def loss(params):
            out = model.forward(params, jnp.asarray(tokens[:, :40]), draft=True)
            return sum(jnp.mean(jnp.sin(logits[:, 1:])) for logits in out[:2])

        value, gradient = jax.jit(jax.value_and_grad(loss, allow_int=True), compiler_options=QUICK)(masters)
        found["loss"] = whole(value)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                found[jax.tree_util.keystr(path)] = whole(leaf)
    return found


if __name__ == "__main__":
    coordinator, processes, process, devices, output = sys.argv[1:6]
    jax.config.update("jax_num_cpu_devices", int(devices))
    # As distributed.start does, but for machines that stand still for minutes.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, int(processes), int(process), heartbeat_timeout_seconds=900)
    assert jax.process_count() == int(processes)
    assert jax.device_count() == int(processes) * int(devices)
    results = {case: numbers(case) for case in sys.argv[6:]}
    if is_main():
        np.savez(output, **{f"{case}/{name}": a for case, found in results.items() for name, a in found.items()})
